"""What the gateway does with clients that bend HTTP: on raw sockets, for a proper client would not send these."""

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_harness import STREAM_HEAD, FakeEngine, Gateway, engine_info, event, gateway, raw, whole

from lltm_ray.gateway import protocol
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.headers import build_request, upstream_headers
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.upstream import UpstreamBrokenError

GOOD = b'{"ok":true}'
BODY = b'{"prompt":"a","stream":true}'  # asked for as a stream it goes upstream byte for byte
HIDDEN = b"GET /lltm/status HTTP/1.1\r\nhost: x\r\n\r\n"
UPGRADES = {
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
    "websocket": b"connection: upgrade\r\nupgrade: websocket\r\n",
}


async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(GOOD))


async def stream(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + event(b'{"content":"a"}') + event(b"[DONE]") + b"0\r\n\r\n")


async def stall(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.8)
    writer.write(whole(GOOD))


def post(body: bytes, extra: bytes = b"", path: bytes = b"/completion", version: bytes = b"1.1") -> bytes:
    return b"POST %s HTTP/%s\r\nhost: x\r\n%scontent-length: %d\r\n\r\n%s" % (path, version, extra, len(body), body)


def statuses(answers: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d+)", answers)


@contextlib.asynccontextmanager
async def client(gate: Gateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def count_whole(answers: bytes) -> int:
    """Answers that came to their end."""
    count = 0
    while (end := answers.find(b"\r\n\r\n") + 4) > 3:
        (length,) = re.findall(rb"(?i)\ncontent-length: (\d+)", answers[:end])
        if len(answers) < end + int(length):
            break
        answers, count = answers[end + int(length) :], count + 1
    return count


async def send_parts(
    gate: Gateway, *parts: bytes, answers: float = 1, pause_s: float = 0.05, more_s: float = 0.5
) -> tuple[bytes, bool]:
    """Send parts as segments of their own; what came back, and whether the gateway closed.

    It is waited for as long as there are fewer answers, and then for more of them.
    """
    got = b""
    async with client(gate) as (reader, writer):
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause_s)
        while True:
            has_all = count_whole(got) >= answers
            try:
                async with asyncio.timeout(more_s if has_all else 60):
                    data = await reader.read(65_536)
            except TimeoutError:
                assert has_all, f"only this came: {got!r}"
                return got, False
            except ConnectionError:
                return got, True
            if not data:
                return got, True
            got += data


UNTIL_CLOSED = math.inf


async def send_often(writer: asyncio.StreamWriter, line: bytes) -> None:
    async with asyncio.timeout(60):
        for _ in range(10_000):
            writer.write(line)
            await writer.drain()


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("is_split", [True, False])
async def test_an_offered_upgrade_is_ignored_and_the_body_is_read_as_a_body(upgrade: str, is_split: bool) -> None:
    request = post(BODY, UPGRADES[upgrade])
    cut = request.index(b"\r\n\r\n") + 4 if is_split else len(request)
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
        got, _ = await send_parts(gate, request[:cut], request[cut:])
        assert statuses(got) == [b"200"]
        assert got.endswith(GOOD)
        assert BODY[:-1] in engine.requests[0]
        assert b"upgrade" not in engine.requests[0].lower()
        assert b"http2-settings" not in engine.requests[0]


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("is_split", [True, False])
async def test_a_request_hidden_in_the_body_of_an_upgrade_is_never_answered(upgrade: str, is_split: bool) -> None:
    request = post(HIDDEN, UPGRADES[upgrade])
    cut = request.index(b"\r\n\r\n") + 4 if is_split else len(request)
    async with gateway() as gate:
        got, _ = await send_parts(gate, request[:cut], request[cut:])
        assert len(statuses(got)) == 1
        assert len(gate.app.records) == 1


async def test_a_request_after_an_upgrade_with_a_chunked_body_is_served_in_its_turn() -> None:
    head = b"POST /completion HTTP/1.1\r\nhost: x\r\n" + UPGRADES["h2c"] + b"transfer-encoding: chunked\r\n\r\n"
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        got, _ = await send_parts(gate, head + chunks + post(BODY, UPGRADES["h2c"]), answers=2)
        assert statuses(got) == [b"200", b"200"]


async def test_connect_is_closed_without_a_tunnel() -> None:
    async with gateway() as gate:
        got, is_closed = await send_parts(
            gate, b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", HIDDEN, answers=UNTIL_CLOSED
        )
        assert is_closed
        assert b"200" not in statuses(got)


async def test_trailers_are_no_headers() -> None:
    head = b"POST /completion HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"%x\r\n%s\r\n0\r\nx-lltm-engine: nobody\r\nx-own: 1\r\n\r\n" % (len(BODY), BODY)
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
        got, _ = await send_parts(gate, head + chunks)
        assert statuses(got) == [b"200"]
        assert b"x-own" not in engine.requests[0]


@pytest.mark.parametrize("line", [b"x-pad: " + b"y" * 1000 + b"\r\n", b"y" * 1000], ids=["many", "one"])
async def test_trailers_without_end_are_cut_off(line: bytes) -> None:
    head = b"POST /completion HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-first: "
    async with gateway(keys=("sesame",), max_header_bytes=8192) as gate, client(gate) as (_, writer):
        writer.write(head + b"1\r\n" if line.endswith(b"\n") else head)
        with pytest.raises(ConnectionError):
            await send_often(writer, line)


async def test_more_pipelined_requests_than_may_wait_close_the_connection() -> None:
    async with FakeEngine(stall) as engine, gateway(engine_info("e", engine.url)) as gate:
        got = await raw(gate, post(BODY) + HIDDEN * (protocol.PIPELINE_LIMIT + 2))
        assert statuses(got) == []
        await gate.idle()
        assert len(gate.app.records) == 1


async def test_as_many_pipelined_requests_as_may_wait_are_answered_in_order() -> None:
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
        got, _ = await send_parts(gate, post(BODY) + b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n" * 15, answers=16)
        assert statuses(got) == [b"200"] + [b"404"] * 15


async def test_garbage_behind_a_running_request_is_not_answered_before_it() -> None:
    async with FakeEngine(stall) as engine, gateway(engine_info("e", engine.url)) as gate:
        assert await raw(gate, post(BODY) + b"\x00\x01 nonsense\r\n\r\n") == b""


@pytest.mark.parametrize("start", [b"", b"GET /hea", b"\r\n", b"GET / HTTP/1.1\r\nx: y\r\n"])
async def test_a_head_that_does_not_end_in_time_is_closed(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    async with gateway() as gate:
        got, is_closed = await send_parts(gate, start, answers=UNTIL_CLOSED)
        assert is_closed
        assert statuses(got) == ([b"408"] if b"GET" in start else [])


async def test_a_head_that_drips_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    async with gateway() as gate, client(gate) as (reader, writer):
        answer = asyncio.create_task(reader.read())
        for letter in b"GET /health-and-more-of-it-and-still-more":
            if answer.done():
                break
            writer.write(bytes([letter]))
            await asyncio.sleep(0.05)
        assert answer.done(), "it has time as long as it drips"
        with contextlib.suppress(ConnectionError):  # a reset may overtake the answer
            assert statuses(await answer) == [b"408"]


async def test_a_second_head_on_a_kept_connection_has_its_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    async with gateway() as gate:
        got, is_closed = await send_parts(gate, HIDDEN, b"GET /hea", answers=UNTIL_CLOSED)
        assert is_closed
        assert statuses(got) == [b"200", b"408"]


async def test_a_body_that_falls_silent_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", 0.3)
    async with gateway() as gate:
        got, is_closed = await send_parts(gate, post(BODY)[:-3], answers=UNTIL_CLOSED)
        assert is_closed
        assert statuses(got) == [b"408"]


async def test_a_slow_body_and_a_slow_answer_outlive_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    request = post(BODY)
    cut = request.index(BODY)
    parts = [request[:cut], *(request[at : at + 1] for at in range(cut, len(request)))]
    for limit_s in (0.4, 2.0, 8.0):  # where the machine stands still, a drop may come too late
        monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", limit_s)
        monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", limit_s)
        pause_s = 2 * limit_s / len(parts)

        async def stall(request: bytes, writer: asyncio.StreamWriter, limit_s: float = limit_s) -> None:
            await asyncio.sleep(2 * limit_s)
            writer.write(whole(GOOD))

        async with FakeEngine(stall) as engine, gateway(engine_info("e", engine.url)) as gate:
            got, is_closed = await send_parts(gate, *parts, pause_s=pause_s, more_s=limit_s / 2)
        if statuses(got) == [b"200"] and not is_closed:
            return
    raise AssertionError((got, is_closed))


async def test_a_stream_for_http_1_0_has_no_chunks_and_ends_with_the_connection() -> None:
    async with FakeEngine(stream) as engine, gateway(engine_info("e", engine.url)) as gate:
        head, _, body = (await raw(gate, post(BODY, version=b"1.0"))).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert body == b'data: {"content":"a"}\n\ndata: [DONE]\n\n'


async def test_an_answer_of_known_length_is_whole_for_http_1_0() -> None:
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
        head, _, body = (await raw(gate, post(BODY, version=b"1.0"))).partition(b"\r\n\r\n")
        assert b"content-length: 11" in head.lower()
        assert body == GOOD


def test_every_connection_header_names_hop_by_hop_headers() -> None:
    given = [(b"connection", b"keep-alive"), (b"connection", b"x-a, x-b"), (b"x-a", b"1"), (b"x-b", b"2"), (b"c", b"3")]
    assert upstream_headers(given, "", "id") == [(b"c", b"3"), (b"x-request-id", b"id")]


async def test_a_fresh_request_is_sent_once_even_when_a_pooled_connection_is_at_hand() -> None:
    async def once_then_hang_up(request: bytes, writer: asyncio.StreamWriter) -> None:
        if len(engine.requests) == 1:
            writer.write(whole(GOOD))
        else:
            writer.close()

    pool = UpstreamPool()
    async with FakeEngine(once_then_hang_up) as engine:
        request = build_request(b"POST", b"/slots/0", engine.url, [], b"")
        assert (await pool.fetch(engine.url, request, limit_bytes=100))[0] == 200
        assert pool.idle_count() == 1
        with pytest.raises(UpstreamBrokenError):
            await pool.fetch(engine.url, request, limit_bytes=100, fresh=True)
        assert (len(engine.requests), engine.connections) == (2, 2)
        pool.close()


async def test_a_pool_forgets_servers_whose_connections_it_could_not_keep() -> None:
    pool = UpstreamPool(idle_limit=0)
    async with FakeEngine(stream) as engine:
        request = build_request(b"POST", b"/completion", engine.url, [], b"")
        await pool.fetch(engine.url, request, limit_bytes=1000)
        assert pool._idle == {}


def test_a_key_file_with_a_byte_order_mark_holds_the_key_without_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfsesame\n")
    file.chmod(0o600)
    ApiKeys.from_file(file).check([(b"x-api-key", b"sesame")])
