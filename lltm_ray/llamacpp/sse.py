"""Server-sent events in, `StreamEvent` records and a `Completion` out. Pure: bytes and elapsed seconds, no clock.

Flow: `SseParser` (bytes -> messages) -> a decoder of `replies` (JSON -> `StreamEvent`) -> `StreamReader` (holds the
closing parts back until the stream has really ended, adds the times the client saw) -> `collect` (-> `Completion`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lltm_ray.errors import EngineExitedError, UpstreamError
from lltm_ray.records import Completion, StreamEvent, Timings, TokenLogprob, ToolCall, Usage

Decoder = Callable[[dict[str, Any]], tuple[StreamEvent, bool]]
"""One JSON message -> its event, and whether the message itself says that the stream is complete."""


@dataclass(frozen=True, slots=True)
class SseMessage:
    """One server-sent event: `event` is its type (`""` unless named), `data` its text, lines joined by line feeds."""

    event: str
    data: str


class SseParser:
    """Incremental parser: `feed` takes any piece of the byte stream and returns the messages it completes.

    Lines end in LF or CRLF. Comments (llama.cpp's keep-alive pings) and unknown fields are skipped. A line
    `error: {...}`, which llama.cpp sent before September 2025, is a message of type `error`.
    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
    """

    def __init__(self) -> None:
        self._tail = b""
        self._event = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[SseMessage]:
        """The messages that `piece` completes, in order."""
        *lines, self._tail = (self._tail + piece).split(b"\n")
        return [message for line in lines if (message := self._take(line.removesuffix(b"\r")))]

    def _take(self, line: bytes) -> SseMessage | None:
        if not line:
            return self._dispatch()
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._event = value
        elif name == "error":
            self._event = "error"
            self._data.append(value)
        elif name == "data":
            self._data.append(value)
        return None

    def _dispatch(self) -> SseMessage | None:
        message = SseMessage(self._event, "\n".join(self._data)) if self._data else None
        self._event, self._data = "", []
        return message


class StreamReader:
    """Turns the body of one streamed answer into events; `elapsed_s` counts from sending the request.

    Finish reason, usage and timings arrive in one to three messages, depending on the route; they are merged into one
    last event, handed out only when the server has said that the stream is complete.
    """

    def __init__(self, decode: Decoder, *, queue_s: float) -> None:
        self._decode = decode
        self._parser = SseParser()
        self._queue_s = queue_s
        self._ttft_s: float | None = None
        self._last: StreamEvent | None = None
        self.done = False
        """Whether the server has ended the stream properly."""

    def feed(self, piece: bytes, *, elapsed_s: float) -> Iterator[StreamEvent]:
        """The events that `piece` completes.

        Raises:
            UpstreamError: the server reports an error in mid-stream, or sends what is not JSON.
        """
        for message in self._parser.feed(piece):
            if self.done:
                return
            yield from self._read(message, elapsed_s)

    def finish(self) -> None:
        """Call at the end of the body.

        Raises:
            EngineExitedError: the body ended before the stream did.
        """
        if not self.done:
            raise EngineExitedError("")

    def _read(self, message: SseMessage, elapsed_s: float) -> Iterator[StreamEvent]:
        if message.data == "[DONE]":
            yield self._end(elapsed_s)
            return
        raw = _object(message)
        if raw is None:
            return
        try:
            event, complete = self._decode(raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UpstreamError(502, message.data) from error
        generated = bool(event.text or event.reasoning or event.tool_calls)
        if generated and self._ttft_s is None:
            self._ttft_s = elapsed_s
        if complete or event.finish_reason or not (generated or event.tokens or event.logprobs):
            self._last = _merge(self._last, event)
        else:
            yield event
        if complete:
            yield self._end(elapsed_s)

    def _end(self, elapsed_s: float) -> StreamEvent:
        self.done = True
        last = self._last or StreamEvent()
        timings = last.timings or Timings()
        timings = replace(timings, queue_s=self._queue_s, ttft_s=self._ttft_s, total_s=elapsed_s)
        return replace(last, timings=timings, usage=last.usage or _usage(timings))


def _object(message: SseMessage) -> dict[str, Any] | None:
    """The message's JSON object; None for an empty one or `null`, which llama.cpp sends where a part is empty."""
    try:
        raw = json.loads(message.data or "null")
    except ValueError as error:
        raise UpstreamError(500 if message.event == "error" else 502, message.data) from error
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise UpstreamError(502, message.data)
    if message.event in ("error", "response.failed") or raw.get("error"):
        raise UpstreamError(_status(raw), message.data)
    return raw


def _status(raw: dict[str, Any]) -> int:
    inner = raw.get("error")
    code = (inner if isinstance(inner, dict) else raw).get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _usage(timings: Timings) -> Usage:
    """Usage from timings: `prompt_n` counts computed prompt tokens only, `cache_n` the reused ones."""
    return Usage(
        input_tokens=timings.cache_n + timings.prompt_n,
        output_tokens=timings.predicted_n,
        cached_tokens=timings.cache_n,
    )


def _merge(first: StreamEvent | None, then: StreamEvent) -> StreamEvent:
    if first is None:
        return then
    joined = ("text", "reasoning", "tool_calls", "logprobs", "tokens")
    changes: dict[str, Any] = {name: getattr(first, name) + getattr(then, name) for name in joined}
    for name in ("finish_reason", "timings", "model", "id", "slot_id"):
        value = getattr(then, name)
        changes[name] = getattr(first, name) if value in (None, "") else value
    return replace(first, usage=_larger(first.usage, then.usage), **changes)


def _larger(first: Usage | None, then: Usage | None) -> Usage | None:
    """Counts only grow in a stream, and a message may carry some of them only."""
    if first is None or then is None:
        return then or first
    return Usage(
        input_tokens=max(first.input_tokens, then.input_tokens),
        output_tokens=max(first.output_tokens, then.output_tokens),
        cached_tokens=max(first.cached_tokens, then.cached_tokens),
    )


@dataclass(slots=True)
class Collector:
    """Adds events up to a `Completion`; tool-call deltas are joined by their `index`."""

    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: dict[int, list[ToolCall]] = field(default_factory=dict)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _last: StreamEvent = field(default_factory=StreamEvent)

    def add(self, event: StreamEvent) -> None:
        """Take one event."""
        self._text.append(event.text)
        self._reasoning.append(event.reasoning)
        for call in event.tool_calls:
            self._calls.setdefault(call.index, []).append(call)
        self._logprobs.extend(event.logprobs)
        self._tokens.extend(event.tokens)
        self._last = event

    def result(self) -> Completion:
        """The answer so far; usage, timings and finish reason are those of the last event."""
        last = self._last
        return Completion(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(_join_calls(parts) for _, parts in sorted(self._calls.items())),
            logprobs=tuple(self._logprobs),
            tokens=tuple(self._tokens),
            finish_reason=last.finish_reason,
            usage=last.usage or Usage(),
            timings=last.timings or Timings(),
            model=last.model,
            id=last.id,
            engine=last.engine,
            slot_id=last.slot_id,
        )


def _join_calls(parts: list[ToolCall]) -> ToolCall:
    return ToolCall(
        index=parts[0].index,
        id=next((part.id for part in parts if part.id), ""),
        name=next((part.name for part in parts if part.name), ""),
        arguments="".join(part.arguments for part in parts),
    )


def collect(events: Iterable[StreamEvent]) -> Completion:
    """Read a whole stream into one answer."""
    collector = Collector()
    for event in events:
        collector.add(event)
    return collector.result()
