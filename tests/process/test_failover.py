"""Broken streams go on at another real server: every cut gives the text and the counts of the undisturbed run."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import STREAM_HEAD, Engine, FakeEngine, engine_info, event, real_engine

from lltm_ray.errors import EngineExitedError
from lltm_ray.gateway.failover import Continuation
from lltm_ray.gateway.headers import build_request
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.tap import StreamTap, ask_details, is_eligible, is_exact
from lltm_ray.gateway.upstream import ConnectFailedError, UpstreamBrokenError
from lltm_ray.records import EngineInfo, EngineState

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NATIVE = "/completion"
ROUTES = (CHAT, TEXT, NATIVE)
GREEDY = {"stream": True, "temperature": 0, "seed": 1}


@pytest.fixture
async def pool() -> AsyncIterator[UpstreamPool]:
    """Connections of one test."""
    made = UpstreamPool()
    yield made
    made.close()


def request(path: str, limit: int | None = 12, prompt: str = "hello", **more: Any) -> dict[str, Any]:
    """A greedy stream on any route."""
    asked = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    limits = {} if limit is None else {"n_predict" if path == NATIVE else "max_tokens": limit}
    return asked | limits | GREEDY | more


async def ask(pool: UpstreamPool, engine: EngineInfo, path: str, data: bytes) -> AsyncIterator[bytes]:
    """A stream's parts as the engine sends them."""
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer " + engine.api_key.encode())]
    connection = await pool.open(engine.url, build_request(b"POST", path.encode(), engine.url, headers, data))
    try:
        assert connection.status == 200, await connection.read_all(10**6)
        while part := await connection.read():
            yield part
    finally:
        pool.release(connection)


async def events_of(
    pool: UpstreamPool, engine: EngineInfo, path: str, body: dict[str, Any], *, details: bool
) -> list[bytes]:
    """A whole stream, cut at its events."""
    data = json.dumps(body).encode()
    data = ask_details(path, body, data) if details else data
    whole = b"".join([part async for part in ask(pool, engine, path, data)])
    return [each + b"\n\n" for each in whole.split(b"\n\n") if each.strip()]


def read(path: str, data: bytes) -> dict[str, Any]:
    """What a client makes of a stream: everything that must not depend on where it was cut."""
    told: dict[str, Any] = {"text": "", "roles": 0, "ends": [], "heads": set()}
    for line in data.split(b"\n\n"):
        if line == b"data: [DONE]":
            told["ends"].append("[DONE]")
        elif line.strip():
            assert line.startswith(b"data: "), line
            (read_native if path == NATIVE else read_openai)(told, json.loads(line[6:]))
    assert len(told["heads"]) <= 1, told["heads"]
    told["heads"] = {head[1:] for head in told["heads"]}
    return told


def read_counts(told: dict[str, Any], found: dict[str, Any]) -> None:
    """Counts of an event's timings."""
    timings = found.get("timings")
    if timings is not None:
        told["counts"] = (timings["cache_n"] + timings["prompt_n"], timings["predicted_n"])


def read_native(told: dict[str, Any], found: dict[str, Any]) -> None:
    """An event of /completion."""
    read_counts(told, found)
    told["text"] += found["content"]
    if found["stop"]:
        names = ("tokens_predicted", "tokens_evaluated", "stop_type", "stopping_word", "prompt", "truncated")
        names += ("has_new_line", "tokens_cached", "generation_settings")
        told["ends"].append({name: found[name] for name in names})


def read_openai(told: dict[str, Any], found: dict[str, Any]) -> None:
    """An event of a chat or of /v1/completions."""
    assert "__verbose" not in found
    read_counts(told, found)
    told["heads"].add(tuple(str(found[key]) for key in ("id", "object", "model", "system_fingerprint")))
    if "usage" in found:
        told["usage"] = {key: value for key, value in found["usage"].items() if not key.endswith("details")}
    for choice in found["choices"]:
        assert not choice.get("logprobs")
        delta = choice.get("delta", {})
        told["roles"] += "role" in delta
        told["text"] += choice.get("text") or delta.get("content") or ""
        if choice["finish_reason"]:
            told["ends"].append(choice["finish_reason"])


async def go_on(
    pool: UpstreamPool, path: str, body: dict[str, Any], sent: bytes, survivor: EngineInfo, *, details: bool = True
) -> tuple[bytes, Continuation, StreamTap]:
    """What the client has of a stream that broke after these bytes and went on elsewhere."""
    tap = StreamTap(path, body, details=details)
    client = tap.feed(sent) if sent else b""
    if tap.is_finished:
        return client + tap.ending(), Continuation(path, body, tap, pool), tap
    continuation = Continuation(path, body, tap, pool)
    async for part in continuation.on(survivor):
        client += part
    return client, continuation, tap


async def sweep(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str, body: dict[str, Any], *, details: bool = True
) -> dict[str, Any]:
    """Cut a stream at each of its events; returns what the undisturbed one told."""
    assert is_eligible(path, body) == (True, "")
    first, second = (engine.info for engine in pair)
    undisturbed = read(path, b"".join(await events_of(pool, first, path, body, details=False)))
    events = await events_of(pool, first, path, body, details=details)
    for cut in range(len(events)):
        sent = b"".join(events[:cut]) + events[cut][: len(events[cut]) // 2]
        client, continuation, tap = await go_on(pool, path, body, sent, second, details=details)
        assert read(path, client) == undisturbed, (cut, sent[-300:], client[-600:])
        assert tap.text == undisturbed["text"]
        assert continuation.is_exact
        assert all(attempt.is_whole for attempt in continuation.attempts)
    return undisturbed


@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_cut_at_any_event_ends_as_the_undisturbed_one(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str
) -> None:
    told = await sweep(pool, pair, path, request(path, 12))
    assert len(told["text"]) >= 10


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("details", [True, False])
async def test_usage_is_that_of_the_whole_reply(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str, details: bool
) -> None:
    body = request(path, 9, stream_options={"include_usage": True}, timings_per_token=True)
    told = await sweep(pool, pair, path, body, details=details)
    assert told["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_a_reply_at_its_limit_is_not_longer(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str, limit: int
) -> None:
    await sweep(pool, pair, path, request(path, limit))


@pytest.mark.parametrize("path", ROUTES)
async def test_text_of_several_bytes_a_character_is_whole(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str
) -> None:
    bias = [[3 + byte, 60] for byte in "é€".encode()]  # the random model's byte tokens follow three special ones
    told = await sweep(pool, pair, path, request(path, 24, logit_bias=bias, repeat_penalty=1.3))
    assert any(ord(character) > 127 for character in told["text"])


@pytest.mark.parametrize("path", ROUTES)
async def test_stop_strings_across_the_cut_are_found(pool: UpstreamPool, pair: tuple[Engine, ...], path: str) -> None:
    text = (await sweep(pool, pair, path, request(path, 10)))["text"]
    for start, length in ((3, 1), (2, 3), (4, 4)):
        stop = text[start : start + length]
        told = await sweep(pool, pair, path, request(path, 10, stop=[stop, text[5:7] + "\x00"]))
        assert told["text"] == text[: text.index(stop)]


@pytest.mark.parametrize("path", ROUTES)
async def test_penalties_see_the_replayed_tokens(pool: UpstreamPool, pair: tuple[Engine, ...], path: str) -> None:
    plain = await sweep(pool, pair, path, request(path, 16))
    body = request(path, 16, repeat_penalty=1.9, repeat_last_n=64, presence_penalty=1.5, dry_multiplier=0.8)
    assert (await sweep(pool, pair, path, body))["text"] != plain["text"]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_reply_that_ends_itself_ends_there(pool: UpstreamPool, pair: tuple[Engine, ...], path: str) -> None:
    told = await sweep(pool, pair, path, request(path, 12, logit_bias=[[2, 8.5]]))
    assert "limit" not in str(told["ends"])


@pytest.mark.parametrize("path", [TEXT, NATIVE])
async def test_a_prompt_of_token_ids_is_taken_as_it_is(pool: UpstreamPool, pair: tuple[Engine, ...], path: str) -> None:
    await sweep(pool, pair, path, request(path, 8) | {"prompt": [1, 300, 310, 320]})


async def test_a_chat_without_details_is_said_again_and_checked(pool: UpstreamPool, pair: tuple[Engine, ...]) -> None:
    await sweep(pool, pair, CHAT, request(CHAT, 8), details=False)
    await sweep(pool, pair, CHAT, request(CHAT, 8, samplers=["temperature"]))


@pytest.mark.parametrize("path", ROUTES)
async def test_a_continuation_that_breaks_is_continued(pool: UpstreamPool, pair: tuple[Engine, ...], path: str) -> None:
    body = request(path, 14)
    first, second = (engine.info for engine in pair)
    undisturbed = read(path, b"".join(await events_of(pool, first, path, body, details=False)))
    events = await events_of(pool, first, path, body, details=True)
    for cut in range(0, len(events) - 2, 3):
        for parts in (1, 3):
            tap = StreamTap(path, body)
            client = tap.feed(b"".join(events[:cut])) if cut else b""
            continuation = Continuation(path, body, tap, pool)
            async with broken_after(pool, second, parts) as fake:
                client += await until_broken(continuation.on(fake))
            async for part in continuation.on(second):
                client += part
            assert read(path, client) == undisturbed, (cut, parts)
            assert [attempt.is_whole for attempt in continuation.attempts] == [False, True]


async def until_broken(parts: AsyncIterator[bytes]) -> bytes:
    """What comes before the stream breaks, as it must."""
    client = b""
    try:
        async for part in parts:
            client += part
    except UpstreamBrokenError:
        return client
    raise AssertionError("the stream did not break")


class broken_after:  # noqa: N801 - reads as what it is
    """An engine that passes a real one's answers on, and hangs up after a number of a stream's events."""

    def __init__(self, pool: UpstreamPool, real: EngineInfo, events: int) -> None:
        self._pool, self._real, self._events = pool, real, events

    async def __aenter__(self) -> EngineInfo:
        self._fake = await FakeEngine(self._script).__aenter__()
        return engine_info("fake", self._fake.url)

    async def __aexit__(self, *exc_info: object) -> None:
        await self._fake.__aexit__(*exc_info)

    async def _script(self, asked: bytes, writer: asyncio.StreamWriter) -> None:
        path = asked.split(b" ", 2)[1].decode()
        data = asked.partition(b"\r\n\r\n")[2]
        answer = b"".join([part async for part in ask(self._pool, self._real, path, data)])
        if path == "/apply-template":
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer)
            writer.write(head + answer)
            return
        writer.write(STREAM_HEAD)
        for each in answer.split(b"\n\n")[: self._events]:
            writer.write(event(each.removeprefix(b"data: ")))
        await writer.drain()
        writer.close()


@pytest.mark.parametrize("path", ROUTES)
async def test_kill_9_in_mid_stream_loses_and_doubles_nothing(
    pool: UpstreamPool, pair: tuple[Engine, ...], tiny: Path, tmp_path: Path, path: str
) -> None:
    body = request(path, 300, ignore_eos=True)
    undisturbed = read(path, b"".join(await events_of(pool, pair[0].info, path, body, details=False)))
    for _ in range(5):  # where the machine stands still, the answer may end before the kill
        tap, client = StreamTap(path, body), b""
        with real_engine("victim", tiny, tmp_path) as victim:
            try:
                async for part in ask(pool, victim.info, path, ask_details(path, body, json.dumps(body).encode())):
                    client += tap.feed(part)
                    if tap.delivered_tokens >= 100:
                        os.kill(victim.info.server_pid, signal.SIGKILL)
            except UpstreamBrokenError:
                break
        assert tap.is_finished, "it ended as if it were whole"
    delivered = tap.delivered_tokens
    assert 100 <= delivered < 300
    continuation = Continuation(path, body, tap, pool)
    async for part in continuation.on(pair[1].info):
        client += part
    assert read(path, client) == undisturbed
    (attempt,) = continuation.attempts
    assert attempt.is_resumed
    assert attempt.delivered_tokens == 300 - delivered
    assert attempt.wasted_tokens <= 5
    assert attempt.prompt_tokens >= delivered - 5


@pytest.mark.parametrize("path", ROUTES)
async def test_a_sampled_reply_goes_on_after_what_the_client_has(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str
) -> None:
    body = request(path, 20, ignore_eos=True, temperature=1.5)
    assert not is_exact(body)
    for details in (True, False):
        events = await events_of(pool, pair[0].info, path, body, details=details)
        sent = b"".join(events[:8])
        tap = StreamTap(path, body, details=details)
        had = read(path, tap.feed(sent))["text"]
        client, continuation, tap = await go_on(pool, path, body, sent, pair[1].info, details=details)
        told = read(path, client)
        assert told["text"].startswith(had)
        assert not continuation.is_exact
        assert tap.delivered_tokens == 20
        assert continuation.attempts[0].wasted_tokens == 0


@pytest.mark.parametrize("path", ROUTES)
async def test_a_reply_that_another_engine_says_otherwise_goes_on_from_its_text_and_is_not_called_exact(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str
) -> None:
    body = request(path, 12)
    events = await events_of(pool, pair[0].info, path, body, details=True)
    letter = read(path, StreamTap(path, body).feed(events[5]))["text"]
    assert letter not in ("", "#")
    events[5] = events[5].replace(json.dumps(letter).encode(), b'"#"')
    tap = StreamTap(path, body)
    client = tap.feed(b"".join(events[:6]))
    had = read(path, client)["text"]
    continuation = Continuation(path, body, tap, pool)
    async for part in continuation.on(pair[1].info):
        client += part
    assert read(path, client)["text"].startswith(had)
    assert tap.is_finished
    assert tap.delivered_tokens == 12
    assert not continuation.is_exact


@pytest.mark.parametrize("path", ROUTES)
async def test_what_was_asked_for_in_addition_never_reaches_the_client(
    pool: UpstreamPool, pair: tuple[Engine, ...], path: str
) -> None:
    for more in ({}, {"stop": ["zz"]}, {"stream_options": {"include_usage": True}}, {"timings_per_token": True}):
        body = request(path, 10, **more)
        plain = await events_of(pool, pair[0].info, path, body, details=False)
        asked = await events_of(pool, pair[0].info, path, body, details=True)
        tap = StreamTap(path, body)
        passed = tap.feed(b"".join(asked)).split(b"\n\n")[:-1]
        assert [without_chance(each) for each in passed] == [without_chance(each[:-2]) for each in plain]
        assert tap.is_finished
        assert tap.delivered_tokens == 10


def without_chance(event: bytes) -> bytes:
    """An event without what differs from run to run, its other bytes as they are."""
    if not event.startswith(b"data: {"):
        return event
    found = json.loads(event[6:])
    for name in ("id", "created", "timings", "id_slot"):
        if name in found:
            value = json.dumps(found[name], separators=(",", ":")).encode()
            if name == "timings":
                start = event.index(b'"timings":')
                event = (
                    event[:start]
                    + b'"timings":{'
                    + b",".join(sorted(str(k).encode() for k in found[name]))
                    + (event[event.index(b"}", start) :])
                )
            else:
                event = event.replace(b'"%b":%b' % (name.encode(), value), b"")
    start = event.find(b'"prompt_tokens_details":')
    return event if start < 0 else event[:start] + event[event.index(b"}", start) :]


async def test_an_engine_that_refuses_or_is_not_up_is_told_apart(pool: UpstreamPool, pair: tuple[Engine, ...]) -> None:
    body = request(CHAT, 8)
    events = await events_of(pool, pair[0].info, CHAT, body, details=True)
    tap = StreamTap(CHAT, body)
    client = tap.feed(b"".join(events[:4]))
    continuation = Continuation(CHAT, body, tap, pool)
    stranger = EngineInfo(name="x", model="tiny", state=EngineState.READY, url=pair[1].info.url, api_key="wrong")
    with pytest.raises(EngineExitedError, match="engine x: it answered 401") as caught:
        await anext(aiter(continuation.on(stranger)))
    assert pickle.loads(pickle.dumps(caught.value)).why == caught.value.why
    with pytest.raises(ConnectFailedError):
        await anext(aiter(continuation.on(engine_info("gone", "http://127.0.0.1:9"))))
    async for part in continuation.on(pair[1].info):
        client += part
    assert (
        read(CHAT, client)["text"] == read(CHAT, b"".join(StreamTap(CHAT, body).feed(each) for each in events))["text"]
    )
    assert [attempt.wasted_tokens for attempt in continuation.attempts] == [0, 0, 1]


@pytest.mark.parametrize(("kind", "told"), [("server_error", "server_error"), ("hello", "an error")])
async def test_an_error_event_of_a_survivor_is_told_by_its_type_and_quotes_nothing(
    pool: UpstreamPool, pair: tuple[Engine, ...], kind: str, told: str
) -> None:
    async def quote(_request: bytes, writer: asyncio.StreamWriter) -> None:
        error = {"code": 500, "type": kind, "message": "failed to decode hello"}
        writer.write(STREAM_HEAD + event(json.dumps({"error": error}).encode()))

    body = request(NATIVE, 8)
    tap = StreamTap(NATIVE, body)
    tap.feed(b"".join((await events_of(pool, pair[0].info, NATIVE, body, details=True))[:5]))
    async with FakeEngine(quote) as fake:
        with pytest.raises(UpstreamBrokenError) as caught:
            await anext(aiter(Continuation(NATIVE, body, tap, pool).on(engine_info("x", fake.url))))
    assert str(caught.value) == f"the engine answered {told}"


async def test_a_reply_with_reasoning_is_refused_in_words(pool: UpstreamPool, pair: tuple[Engine, ...]) -> None:
    body = request(CHAT, 8)
    tap = StreamTap(CHAT, body)
    tap.feed(b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"reasoning_content":"hm"}}]}\n\n')
    with pytest.raises(EngineExitedError, match="reasoning or tool calls"):
        await anext(aiter(Continuation(CHAT, body, tap, pool).on(pair[1].info)))
