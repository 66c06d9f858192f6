"""Calls by handle tell telemetry how they ended, and no word of what was said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from gateway_harness import Engine

from lltm_ray.actors.engine_trace import EngineTrace
from lltm_ray.errors import ConfigError, DeadlineError, UpstreamError
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.records import EngineInfo, StreamEvent
from lltm_ray.telemetry.rows import AttemptRow, RequestRow

SAID = "the-heron-at-dusk"
MESSAGES = [{"role": "user", "content": SAID}]
SHAPE = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "description": SAID}}}


class Handle:
    """An engine's calls as its actor makes them, on a real server, and what was told of them."""

    def __init__(self, engine: Engine) -> None:
        self.info: EngineInfo = engine.info
        self.outbox = self
        self.told: list[tuple[str, Any]] = []
        self._trace = EngineTrace(self, self)  # type: ignore[arg-type] # an engine and a sender, as far as it asks

    def add(self, kind: str, row: Any) -> None:
        self.told.append((kind, row))

    @asynccontextmanager
    async def slot(self, timeout_s: float) -> AsyncIterator[AsyncLlamaClient]:
        async with asyncio.timeout(timeout_s), AsyncLlamaClient(self.info.url, api_key=self.info.api_key) as client:
            yield client

    async def chat(self, messages: Any, **params: Any) -> str:
        async with self._trace.call("/v1/chat/completions", 30.0, params, None) as (client, seen):
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

    def rows(self) -> tuple[RequestRow, AttemptRow]:
        (attempt,) = [row for kind, row in self.told if kind == "attempts"]
        (request,) = [row for kind, row in self.told if kind == "requests"]
        return request, attempt


@pytest.fixture
def handle(pair: list[Engine]) -> Handle:
    return Handle(pair[0])


async def test_no_row_of_a_call_by_handle_has_a_word_of_prompt_or_answer(handle: Handle) -> None:
    note = {"metadata": {"note": SAID}}
    text = await handle.chat(MESSAGES, max_tokens=40, ignore_eos=True, **note)
    for wrong in (SAID, [SAID], [{"role": [SAID], "content": "x"}]):
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
    assert rows[1].error.startswith("messages: must be")
    assert rows[4].error == rows[5].error == "llama-server answered 400"
    assert not {said for said in (SAID, text) if said in repr(handle.told)}


async def close(events: Any, got: list[StreamEvent]) -> None:
    while len(got) < 5:
        got.append(await anext(events))
    await events.aclose()


async def cancel(events: Any, got: list[StreamEvent]) -> None:
    async def read() -> None:
        async for event in events:
            got.append(event)  # noqa: PERF401 - what it has when it is cancelled counts

    task = asyncio.create_task(read())
    while len(got) < 5:
        await asyncio.sleep(0.001)
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
