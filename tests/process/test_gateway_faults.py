"""The gateway before engines that misbehave on demand."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest
import uvloop
from gateway_harness import STREAM_HEAD, FakeEngine, engine_info, event, gateway, raw, until, whole

from lltm_ray.gateway import pool as pool_module
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.routing import rows as rows_module

GOOD = b'{"ok":true,"usage":{"prompt_tokens":3,"completion_tokens":1}}'
BODY = b'{"prompt":"a","stream":true}'  # what a client wants streamed goes upstream byte for byte


async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(GOOD))


async def reset_before_head(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def close_before_head(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def half_a_head(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    writer.close()


async def garbage(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")


async def endless_head(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X-Pad: y\r\n" * 20_000)


async def truncated_body(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(GOOD, length=len(GOOD) + 10))
    await writer.drain()
    writer.close()


async def stream_without_an_event(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD)
    await writer.drain()
    writer.close()


async def loading(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}', status=503))


BEFORE_THE_FIRST_BYTE = [
    reset_before_head,
    close_before_head,
    half_a_head,
    garbage,
    endless_head,
    truncated_body,
    stream_without_an_event,
    loading,
]


async def post(gate, path: str = "/completion", **options):
    async with gate.http.post(f"{gate.url}{path}", data=BODY, **options) as reply:
        return reply.status, await reply.read(), reply.headers


@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_BYTE)
async def test_a_fault_before_the_first_byte_is_retried_on_another_engine(fault):
    async with (
        FakeEngine(fault) as bad,
        FakeEngine(answer) as good,
        gateway(engine_info("bad", bad.url), engine_info("good", good.url)) as gate,
    ):
        status, body, headers = await post(gate)
        assert (status, body, headers["x-lltm-engine"]) == (200, GOOD, "good")
        record = gate.app.records[-1]
        assert (record.attempts, record.error, record.engine) == (2, "", "good")
        assert record.usage.input_tokens == 3
        assert bad.requests, "the bad engine was never asked"


@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_BYTE)
async def test_when_every_attempt_fails_the_client_gets_a_503_and_no_claim_is_left(fault, monkeypatch):
    monkeypatch.setattr(rows_module, "SUSPECT_S", 0.01)
    async with FakeEngine(fault) as bad, gateway(engine_info("bad", bad.url), max_attempts=2) as gate:
        status, body, _ = await post(gate)
        assert status == 503
        assert json.loads(body)["error"]["type"] == "unavailable_error"
        assert gate.app.records[-1].attempts == 2


async def test_an_engine_that_refuses_connections_is_skipped_and_suspected(monkeypatch):
    monkeypatch.setattr(rows_module, "SUSPECT_S", rows_module.MAX_SUSPECT_S)
    with nobody() as url:
        async with FakeEngine(answer) as good, gateway(engine_info("dead", url), engine_info("good", good.url)) as gate:
            for _ in range(4):
                assert (await post(gate))[0] == 200
            assert gate.router.snapshot()["engines"]["dead"]["is_suspect"]
            assert sum(record.attempts for record in gate.app.records) == 5, "asked once, then left alone"
            async with gate.http.post(f"{gate.url}/tokenize?engine=dead", data=b"{}") as reply:
                assert reply.status == 503


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """An address where nothing listens, and which nobody else is given meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize("stream", [False, True])
async def test_engines_that_were_lost_with_their_node_cost_a_request_no_try(stream, monkeypatch):
    """Who waits for the last engine alive is offered the free slots of the dead ones again and again."""
    monkeypatch.setattr(rows_module, "SUSPECT_S", 0.02)
    free = asyncio.Event()

    async def slow(request, writer):
        await free.wait()
        writer.write(whole(GOOD))

    async with contextlib.AsyncExitStack() as stack:
        urls = [stack.enter_context(nobody()) for _ in range(5)]
        good = await stack.enter_async_context(FakeEngine(slow))
        dead = [engine_info(f"dead{number}", url).with_(node_id="gone") for number, url in enumerate(urls)]
        alive = engine_info("alive", good.url).with_(node_id="here")
        async with gateway(*dead, alive, max_attempts=2) as gate:
            body = json.dumps({"prompt": "a", "stream": stream}).encode()
            suspected, suspect = [], gate.router.suspect
            monkeypatch.setattr(gate.router, "suspect", lambda engine: suspected.append(engine) or suspect(engine))
            asked = [asyncio.create_task(gate.http.post(f"{gate.url}/completion", data=body)) for _ in range(12)]
            await until(lambda: len(suspected) > 2 * len(asked) and gate.waiting(), *asked)
            free.set()
            assert [(await reply).status for reply in asked] == [200] * 12
            assert max(record.attempts for record in gate.app.records) > 2


async def test_a_request_without_a_slot_does_not_circle_when_the_other_engine_is_drained():
    with nobody() as url:
        async with (
            FakeEngine(answer) as good,
            gateway(engine_info("drained", good.url), engine_info("dead", url)) as gate,
        ):
            gate.router.close_engine("drained")
            async with asyncio.timeout(60), gate.http.post(f"{gate.url}/tokenize", data=b"{}") as reply:
                assert reply.status == 503
            assert gate.app.records[-1].attempts <= 3


async def test_a_request_that_ends_servers_on_their_pooled_connections_ends_two_at_most():
    """No byte of an answer came, so that the pool tries again, where nobody listens any more."""
    ended: list[str] = []

    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeEngine(answer)) for _ in range(6)]

        async def die_of_poison(engine, request, writer):
            if b"poison" in request:
                ended.append(engine.url)
                await engine.__aexit__()
            await answer(request, writer)

        for engine in engines:
            engine.script = partial(die_of_poison, engine)
        infos = [engine_info(f"e{number}", engine.url) for number, engine in enumerate(engines)]
        gate = await stack.enter_async_context(gateway(*infos))
        for _ in range(12):
            assert (await post(gate))[0] == 200
        async with gate.http.post(f"{gate.url}/completion", data=b'{"prompt":"poison"}') as reply:
            assert reply.status == 503
        assert len(ended) == 2


async def test_a_stream_that_breaks_after_its_first_event_is_not_retried_and_not_ended_cleanly():
    async def break_off(request, writer):
        writer.write(STREAM_HEAD + event(b"1"))
        await writer.drain()
        writer.close()

    async with (
        FakeEngine(break_off) as bad,
        FakeEngine(answer) as good,
        gateway(engine_info("bad", bad.url), engine_info("good", good.url)) as gate,
    ):
        head = b"POST /completion HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
        seen = await raw(gate, head)
        assert seen.endswith(b"data: 1\n\n\r\n"), "no final chunk"
        assert not good.requests
        await gate.idle()
        assert "closed before the end" in gate.app.records[-1].error


async def test_a_long_answer_that_breaks_is_shorter_than_its_content_length():
    async def break_off(request, writer):
        writer.write(whole(b"x" * 1_500_000, length=2_000_000))
        await writer.drain()
        writer.close()

    async with FakeEngine(break_off) as bad, gateway(engine_info("bad", bad.url)) as gate:
        with pytest.raises(aiohttp.ClientPayloadError):
            await post(gate)


async def test_an_answer_that_ends_with_its_connection_is_whole():
    async def until_close(request, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
        await writer.drain()
        writer.close()

    async with FakeEngine(until_close) as engine, gateway(engine_info("e", engine.url)) as gate:
        assert (await post(gate))[1] == b"all of it"


async def test_a_stale_pooled_connection_is_replaced_without_counting_as_an_attempt():
    async def answer_then_close_on_the_next(request, writer):
        if engine.connections == 1 and len(engine.requests) == 2:
            writer.transport.abort()
        else:
            writer.write(whole(GOOD))

    async with (
        FakeEngine(answer_then_close_on_the_next) as engine,
        gateway(engine_info("e", engine.url), max_attempts=1) as gate,
    ):
        assert [(await post(gate))[0] for _ in range(3)] == [200, 200, 200]
        assert engine.connections == 2
        assert [record.attempts for record in gate.app.records] == [1, 1, 1]


async def chunked(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + event(b"1") + b"0\r\n\r\n")


async def test_connections_are_reused_but_not_after_close():
    async def close_after(request, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")

    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
        for script, connections in ((answer, 1), (answer, 1), (close_after, 1), (chunked, 2), (answer, 2)):
            engine.script = script
            assert (await post(gate))[0] == 200
            assert engine.connections == connections


async def test_a_server_that_hangs_up_after_streams_is_found_out_by_the_first():
    async def hang_up(request, writer):
        await chunked(request, writer)
        writer.close()

    pool = UpstreamPool()
    async with FakeEngine(hang_up) as engine:
        for streams in (1, 2, 3):
            connection = await pool.open(engine.url, [b"POST /x HTTP/1.1\r\ncontent-length: 0\r\n\r\n"])
            assert await connection.read_all(100) == b"data: 1\n\n"
            pool.release(connection)
            assert pool.idle_count() <= (streams == 1), "pooled, if at all, where nothing is known yet"
            await until(lambda: not pool.idle_count())
        assert len(engine.requests) == engine.connections == 3
    pool.close()


async def test_idle_connections_are_dropped_before_the_server_drops_them(monkeypatch):
    monkeypatch.setattr(pool_module, "_SWEEP_S", 0.02)
    async with FakeEngine(answer) as engine:
        pool = UpstreamPool(idle_timeout_s=0.05)
        await pool.fetch(engine.url, [b"GET /x HTTP/1.1\r\n\r\n"], limit_bytes=1000)
        assert pool.idle_count() == 1
        await until(lambda: not pool.idle_count())
        pool.close()


async def test_the_pool_is_bounded():
    async with FakeEngine(answer) as engine:
        pool = UpstreamPool(idle_limit=2)
        request = [b"GET /x HTTP/1.1\r\n\r\n"]
        await asyncio.gather(*(pool.fetch(engine.url, request, limit_bytes=1000) for _ in range(6)))
        assert pool.idle_count() == 2
        pool.close()


async def test_a_client_that_leaves_while_the_engine_is_silent_aborts_the_engines_connection():
    gone = asyncio.Event()

    async def silent(request, writer):
        while not engine.reader.at_eof():
            await asyncio.sleep(0.01)
        gone.set()

    async with FakeEngine(silent) as engine, gateway(engine_info("e", engine.url)) as gate:
        leaver = asyncio.create_task(post(gate))
        await until(lambda: engine.requests, leaver)
        leaver.cancel()
        async with asyncio.timeout(60):
            await gone.wait()
        await gate.idle()
        assert gate.app.records[-1].error == "client gone"
        assert gate.app.records[-1].status == 0


async def test_a_deadline_before_the_first_byte_is_a_504():
    async def slow_head(request, writer):
        await asyncio.sleep(0.5)
        writer.write(whole(GOOD))

    async with FakeEngine(slow_head) as engine:
        async with gateway(engine_info("e", engine.url), request_timeout_s=0.1) as gate:
            status, body, _ = await post(gate)
            assert (status, json.loads(body)["error"]["type"]) == (504, "timeout_error")
        async with gateway(engine_info("e", engine.url), request_timeout_s=100) as gate:
            assert (await post(gate))[0] == 200


def _sockets_bytes():
    """What the kernel lets two connections hold that nobody reads from: up to 38 MB each on an ordinary Linux."""
    largest = (int(Path(f"/proc/sys/net/ipv4/tcp_{each}mem").read_text().split()[2]) for each in "rw")
    return 2 * sum(largest)


async def test_a_client_that_does_not_read_makes_the_engine_wait():
    sent_bytes = 0

    async def flood(request, writer):
        nonlocal sent_bytes
        writer.write(STREAM_HEAD)
        while not writer.transport.is_closing():
            writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            sent_bytes += 65_536
            await writer.drain()

    async with FakeEngine(flood) as engine, gateway(engine_info("e", engine.url)) as gate:
        _, writer = await asyncio.open_connection("127.0.0.1", gate.port, limit=2**14)
        writer.write(b"POST /completion HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY))
        before = -1
        async with asyncio.timeout(100):
            while sent_bytes != before or not sent_bytes:
                before = sent_bytes
                await asyncio.sleep(0.3)
        writer.transport.abort()
        assert sent_bytes < _sockets_bytes() + 16 * 2**20, "only socket and gateway buffers were filled"
        await gate.idle()


async def test_a_request_goes_upstream_with_the_engines_key_and_its_own_bytes():
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url), keys=("client-key",)) as gate:
        headers = {"authorization": "Bearer client-key", "traceparent": "00-0af7-b7ad-01", "x-request-id": "mine"}
        assert (await post(gate, "/v1/completions?x=1&y=%20", headers=headers))[0] == 200
    request = engine.requests[0]
    assert request.startswith(b"POST /v1/completions?x=1&y=%20 HTTP/1.1\r\n")
    assert b"\r\n\r\n" + BODY[:-1] in request, "with what we add at its end"
    assert b"\r\nauthorization: Bearer engine-key\r\n" in request
    assert b"\r\ntraceparent: 00-0af7-b7ad-01\r\n" in request
    assert b"\r\nx-request-id: mine\r\n" in request
    assert b"client-key" not in request


async def test_a_fleet_answer_leaves_out_an_engine_that_does_not_answer():
    async def slots(request, writer):
        writer.write(whole(b'[{"id":0,"is_processing":false}]'))

    async with (
        FakeEngine(slots) as good,
        FakeEngine(reset_before_head) as bad,
        gateway(engine_info("good", good.url), engine_info("bad", bad.url)) as gate,
    ):
        async with gate.http.get(f"{gate.url}/slots") as reply:
            assert await reply.json() == [{"id": 0, "is_processing": False, "engine": "good"}]
        async with gate.http.post(f"{gate.url}/lora-adapters", data=b"[]") as reply:
            assert reply.status == 503
            assert "bad" in (await reply.json())["error"]["message"]


async def test_the_app_needs_nothing_beyond_asgi_to_notice_a_client_that_left():
    async def silent(request, writer):
        await asyncio.sleep(100)

    async with FakeEngine(silent) as engine, gateway(engine_info("e", engine.url)) as gate:
        messages = [{"type": "http.request", "body": BODY}, {"type": "http.disconnect"}]

        async def receive():
            await asyncio.sleep(0.05)
            return messages.pop(0)

        async def send(message):
            raise AssertionError(f"sent {message} to a client that left")

        scope = {"type": "http", "method": "POST", "path": "/completion", "query_string": b"", "headers": []}
        await gate.app(scope, receive, send)
        assert gate.claims() == {"e": 0}


async def test_a_pump_goes_on_where_the_engine_had_to_wait_before_it():
    async def flood(request, writer):
        writer.write(STREAM_HEAD + b"100000\r\n" + b"x" * 2**20 + b"\r\n0\r\n\r\n")

    pool = UpstreamPool()
    async with FakeEngine(flood) as engine:
        connection = await pool.open(engine.url, [b"GET / HTTP/1.1\r\n\r\n"])
        await asyncio.sleep(0.1)  # more has come than is taken unread
        parts: list[bytes] = []
        async with asyncio.timeout(60):
            parts.append(await connection.pump(lambda part: parts.append(part) is None))
        assert sum(map(len, parts)) == 2**20
        pool.release(connection)


async def test_what_a_sink_raises_is_not_taken_for_the_engines_fault():
    async def two_events(request, writer):
        writer.write(STREAM_HEAD)
        for _ in range(2):
            await asyncio.sleep(0.05)
            writer.write(event(b"1"))

    def sink(part):
        raise ZeroDivisionError

    pool = UpstreamPool()
    async with FakeEngine(two_events) as engine:
        connection = await pool.open(engine.url, [b"GET / HTTP/1.1\r\n\r\n"])
        with pytest.raises(ZeroDivisionError):
            await connection.pump(sink)


async def test_a_survivor_that_dies_after_its_last_event_does_not_end_the_reply_twice():
    def told(content: str, tokens: int, **more: object) -> bytes:
        counts = {"tokens": [7] if content else [], "stop": not content, "id_slot": 0, "tokens_predicted": tokens}
        return event(json.dumps({"index": 0, "content": content} | counts | {"tokens_evaluated": 3} | more).encode())

    events = [told("a", 1), told("b", 2), told("", 2, stop_type="eos")]
    asked = 0

    async def die(request, writer):
        nonlocal asked
        asked += 1
        writer.write(STREAM_HEAD + b"".join(events[:1] if asked == 1 else events))
        await writer.drain()
        writer.close()

    async with FakeEngine(die) as one, FakeEngine(die) as two, FakeEngine(die) as three:
        engines = (engine_info(name, each.url) for name, each in (("1", one), ("2", two), ("3", three)))
        async with gateway(*engines) as gate:
            body = {"prompt": "a", "stream": True, "temperature": 0}
            async with gate.http.post(f"{gate.url}/completion", json=body) as reply:
                seen = await reply.read()
        assert seen.count(b'"stop":true') == 1
        assert asked == 2


async def test_a_stream_is_tried_on_so_many_engines_and_no_more_its_first_included():
    told = b'{"index":0,"content":"a","tokens":[7],"stop":false,"id_slot":0,"tokens_predicted":1,"tokens_evaluated":3}'
    asked = 0

    async def die(request, writer):
        nonlocal asked
        asked += 1
        writer.write(STREAM_HEAD + event(told))
        await writer.drain()
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        urls = [(await stack.enter_async_context(FakeEngine(die))).url for _ in range(4)]
        gate = await stack.enter_async_context(
            gateway(*(engine_info(f"e{number}", url) for number, url in enumerate(urls)), max_attempts=2)
        )
        body = {"prompt": "a", "stream": True, "temperature": 0}
        async with gate.http.post(f"{gate.url}/completion", json=body) as reply:
            with pytest.raises(aiohttp.ClientPayloadError):
                await reply.read()
        assert asked == 2


def test_everything_works_on_uvloop_too():
    async def break_off(request, writer):
        writer.write(STREAM_HEAD + event(b"1"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    async def walk() -> None:
        async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
            for _ in range(3):
                assert (await post(gate))[:2] == (200, GOOD)
            assert engine.connections == 1
            engine.script = break_off
            with pytest.raises(aiohttp.ClientPayloadError):
                await post(gate)

    uvloop.run(walk())
