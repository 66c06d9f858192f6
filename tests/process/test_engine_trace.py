"""Calls by handle tell telemetry how they ended, and no word of what was said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from gateway_harness import Engine, engine_info, gateway, until
from test_gateway_telemetry import PATH, post

from lltm_ray._prefix import hash_prefixes
from lltm_ray.actors.engine_trace import Carrier, EngineTrace, _key
from lltm_ray.errors import ConfigError, DeadlineError, UpstreamError
from lltm_ray.gateway.trace import Tracing
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.records import Adapter, EngineInfo, StreamEvent
from lltm_ray.routing.adapters import choose, lora_field
from lltm_ray.routing.prompt import prompt_key
from lltm_ray.telemetry.rows import AttemptRow, RequestRow

SALT = b"s" * 32
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAID = "the-heron-at-dusk"
MESSAGES = [{"role": "user", "content": SAID}]
SHAPE = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "description": SAID}}}


class Handle:
    """An engine's calls as its actor makes them, on a real server, and what was told of them."""

    def __init__(self, info: EngineInfo, *, is_told: bool = True) -> None:
        self.info = info
        self.outbox = self
        self.told: list[tuple[str, Any]] = []
        # an engine and a sender, as far as it asks
        self._trace = EngineTrace(self, self if is_told else None)  # type: ignore[arg-type]
        self._trace.salt = SALT

    def add(self, kind: str, row: Any) -> None:
        self.told.append((kind, row))

    @asynccontextmanager
    async def slot(self, timeout_s: float) -> AsyncIterator[AsyncLlamaClient]:
        async with asyncio.timeout(timeout_s), AsyncLlamaClient(self.info.url, api_key=self.info.api_key) as client:
            yield client

    async def chat(self, messages: Any, carrier: Carrier | None = None, **params: Any) -> str:
        asked = {"messages": messages, **params}
        async with self._trace.call("/v1/chat/completions", 30.0, asked, carrier) as (client, seen):
            seen.see(done := await client.chat(messages, **params))
            return done.text

    async def stream(self, messages: Any, **params: Any) -> AsyncIterator[StreamEvent]:
        async with (
            self._trace.call("/v1/chat/completions", 30.0, params, None, is_stream=True) as (client, seen),
            aclosing(client.chat_stream(messages, **params)) as events,
        ):
            async for event in events:
                seen.see(event)
                yield event

    async def infill(self, before: str, after: str) -> str:
        async with self._trace.call("/infill", 30.0, {}, None) as (client, seen):
            seen.see(done := await client.infill(before, after, max_tokens=2))
            return done.text

    def rows(self) -> tuple[RequestRow, AttemptRow]:
        (attempt,) = [row for kind, row in self.told if kind == "attempts"]
        (request,) = [row for kind, row in self.told if kind == "requests"]
        return request, attempt


@pytest.fixture
def handle(pair: list[Engine]) -> Handle:
    return Handle(pair[0].info)


async def test_no_row_of_a_call_by_handle_has_a_word_of_prompt_or_answer(handle: Handle) -> None:
    note = {"metadata": {"note": SAID}}
    text = await handle.chat(MESSAGES, max_tokens=40, ignore_eos=True, **note)
    for wrong in ({"role": SAID}, [SAID], [{"role": [SAID], "content": "x"}]):
        with pytest.raises(ConfigError, match=SAID):
            await handle.chat(wrong)
    with pytest.raises(UpstreamError):
        await handle.chat([{"role": "user", "content": {"x": SAID}}])
    with pytest.raises(UpstreamError, match=SAID):
        await handle.chat(MESSAGES, response_format=SHAPE | {"type": SAID})
    await handle.chat(MESSAGES, max_tokens=4, response_format=SHAPE)
    rows = [row for kind, row in handle.told if kind == "requests"]
    assert len(text) > 8
    assert [row.status for row in rows] == [200, 400, 400, 400, 400, 400, 200]
    assert {row.error_type for row in rows if row.status == 400} == {"invalid_request_error"}
    attempts = [row for kind, row in handle.told if kind == "attempts"]
    refused = ["engine refused"] * 5
    assert [row.outcome for row in attempts] == ["ok", *refused, "ok"], "no engine is to blame for what it is asked"
    assert rows[1].error.startswith("messages: is of type dict")
    assert rows[4].error == rows[5].error == "llama-server answered 400"
    assert not {said for said in (SAID, text) if said in repr(handle.told)}


async def test_no_engine_is_to_blame_for_what_its_model_cannot_do(handle: Handle) -> None:
    with pytest.raises(UpstreamError):
        await handle.infill("a", "b")
    request, attempt = handle.rows()
    assert (request.status, request.error_type, attempt.outcome) == (501, "not_supported_error", "engine refused")


async def close(events: Any, got: list[StreamEvent]) -> None:
    while len(got) < 5:
        got.append(await anext(events))
    await events.aclose()


async def cancel(events: Any, got: list[StreamEvent]) -> None:
    async def read() -> None:
        async for event in events:
            got.append(event)  # noqa: PERF401 - what it has when it is cancelled counts

    task = asyncio.create_task(read())
    await until(lambda: len(got) >= 5, task)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("leave", [close, cancel])
async def test_a_caller_that_leaves_is_no_error_of_ours_and_what_it_got_is_counted(
    handle: Handle, leave: Callable[..., Any]
) -> None:
    got: list[StreamEvent] = []
    await leave(handle.stream(MESSAGES, max_tokens=6000, ignore_eos=True), got)
    tokens = sum(bool(event.text or event.reasoning) for event in got)
    request, attempt = handle.rows()
    assert tokens >= 4
    assert (request.status, request.error_type, attempt.outcome) == (0, "client_gone", "client gone")
    assert (request.delivered_tokens, attempt.delivered_tokens, attempt.generated_tokens) == (tokens,) * 3
    assert attempt.is_estimate


async def test_a_call_whose_parameters_cannot_be_told_keeps_its_own_ending(
    handle: Handle, caplog: pytest.LogCaptureFixture
) -> None:
    circle: list[Any] = [SAID]
    circle.append(circle)
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        await handle.chat(MESSAGES, stop=circle)
    assert "could not be told (ValueError)" in caplog.text
    assert SAID not in caplog.text


async def test_a_whole_stream_is_counted_as_its_server_counts_it(handle: Handle) -> None:
    events = [event async for event in handle.stream(MESSAGES, max_tokens=12, ignore_eos=True)]
    request, attempt = handle.rows()
    assert events[-1].usage is not None
    assert attempt.generated_tokens == request.delivered_tokens == events[-1].usage.output_tokens == 12
    assert (request.status, attempt.outcome, attempt.is_estimate) == (200, "ok", False)


async def test_a_call_that_its_caller_gave_too_little_time_is_no_fault_of_the_engine(handle: Handle) -> None:
    with pytest.raises(DeadlineError):
        async with handle._trace.call("/v1/chat/completions", 30.0, {}, None):
            raise DeadlineError("an answer", 0.1)
    request, attempt = handle.rows()
    assert (request.status, attempt.outcome) == (504, "deadline")


@asynccontextmanager
async def attentive_server() -> AsyncIterator[tuple[EngineInfo, list[Mapping[str, str]]]]:
    """A server that answers every chat with one word; and the headers that came."""
    seen: list[Mapping[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers)
        event = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
        body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
        return web.Response(text=body, content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield engine_info("e0", f"http://127.0.0.1:{runner.addresses[0][1]}"), seen
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("given", "state", "trace_id", "flags"),
    [
        (f"00-{TRACE_ID}-{PARENT_ID}-00", "a=1,b=2", TRACE_ID, 0),
        (f"00-{TRACE_ID}-{PARENT_ID}-03", "", TRACE_ID, 3),
        (f"00-{TRACE_ID}-{PARENT_ID}-01", "v=" + "x" * 9000, TRACE_ID, 1),
        (f"00-{TRACE_ID}-{PARENT_ID}-01", "v=1\r\nx-evil: 1", TRACE_ID, 1),
        ("nonsense", "v=x", None, 1),
    ],
)
async def test_the_server_gets_the_attempts_span_of_a_call_by_handle_as_of_a_gateways(
    given: str, state: str, trace_id: str | None, flags: int
) -> None:
    async with attentive_server() as (info, seen):
        handle = Handle(info)
        await handle.chat(MESSAGES, {"traceparent": given, "tracestate": state})
    request, attempt = handle.rows()
    (headers,) = seen
    assert trace_id in (request.trace_id, None)
    assert (request.parent_span_id, request.flags) == (PARENT_ID if trace_id else "", flags)
    assert headers["traceparent"] == f"00-{request.trace_id}-{attempt.span_id}-{flags:02x}"
    assert headers.get("tracestate", "") == (state if state == "a=1,b=2" else "")
    assert attempt.request_span_id == request.span_id != attempt.span_id
    assert "x-evil" not in headers


async def test_without_telemetry_the_callers_trace_goes_on_as_it_came() -> None:
    carrier = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-03", "tracestate": "v=x"}
    async with attentive_server() as (info, seen):
        handle = Handle(info, is_told=False)
        await handle.chat(MESSAGES, carrier)
        await handle.chat(MESSAGES)
    assert {name: seen[0][name] for name in carrier} == carrier
    assert not {"traceparent", "tracestate"} & seen[1].keys()


async def test_a_prompt_has_the_same_hashes_whether_it_came_by_handle_or_by_the_gateway(pair: list[Engine]) -> None:
    messages = [{"role": "user", "content": "The heron stands at dusk. " * 40}]
    handle, told = Handle(pair[0].info), []
    await handle.chat(messages, max_tokens=2)
    async with gateway(pair[0].info, tracing=Tracing(lambda kind, row: told.append((kind, row)), salt=SALT)) as gate:
        await post(gate, PATH, {"messages": messages, "max_tokens": 2})
    request, _ = handle.rows()
    (theirs,) = [RequestRow._make(row) for kind, row in told if kind == "requests"]
    assert len(request.prefix) == 8 * 4
    assert (request.prompt_bytes, request.prefix) == (theirs.prompt_bytes, theirs.prefix)
    assert request.blocks == theirs.blocks
    assert request.prefix == hash_prefixes(prompt_key(PATH, {"messages": messages}), SALT)


async def test_no_hash_is_told_before_the_fleets_salt_is_known(handle: Handle) -> None:
    handle._trace.salt = b""
    await handle.chat([{"role": "user", "content": "x" * 600}], max_tokens=1)
    request, _ = handle.rows()
    assert request.prompt_bytes > 600
    assert request.prefix == b""


@pytest.mark.parametrize("raw", [None, [{"id": 1, "scale": 1.0}], [{"id": 0, "scale": 0.5}], [{"id": 7}], "poet"])
def test_the_adapters_a_call_chooses_are_part_of_its_prompt_as_in_a_gateway(raw: Any) -> None:
    adapters = (Adapter(name="poet", scale=0.0), Adapter(name="clerk", scale=0.0))
    info = engine_info("e0", "http://127.0.0.1:1").with_(adapters=adapters)
    try:
        lora = choose("tiny", raw, "tiny", [info])
    except ConfigError:
        lora = None
        sent = {"lora": raw}
    else:
        sent = json.loads(b"{%b}" % lora_field(lora, adapters))
    fields = {"messages": MESSAGES}
    asked = fields if raw is None else fields | {"lora": raw}
    assert _key(PATH, fields | sent, adapters) == prompt_key(PATH, asked, lora)
