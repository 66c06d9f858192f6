"""A request's place in a trace, and its clock readings while it runs: an id and a reading for each phase, no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isnan

from lltm_ray.errors import LltmRayError
from lltm_ray.gateway.headers import find
from lltm_ray.gateway.upstream import Headers
from lltm_ray.records import Timings
from lltm_ray.telemetry.context import (
    MOST_STATE_BYTES,
    SAMPLED,
    TraceContext,
    new_ids,
    new_span_id,
    read_traceparent,
    write_traceparent,
)
from lltm_ray.telemetry.rows import NEVER
from lltm_ray.telemetry.telling import tell_error


@dataclass(slots=True)
class AttemptTrace:
    """One attempt's clock readings, monotonic seconds."""

    span_id: str
    asked_at: float
    sent_at: float = NEVER
    headers_at: float = NEVER
    first_at: float = NEVER
    ended_at: float = NEVER
    timings: Timings | None = None
    is_continued: bool = False
    """It took up another engine's broken answer."""


@dataclass(slots=True)
class RequestTrace:
    """A request's identity and its attempts'."""

    trace_id: str
    span_id: str
    parent_span_id: str = ""
    flags: int = SAMPLED
    state: str = ""
    error_type: str = ""
    error: str = ""
    clock: Callable[[], float] = time.monotonic
    attempts: list[AttemptTrace] = field(default_factory=list)
    first_id: str = ""
    """Of its first attempt's span, if one was made with its own."""

    def attempt(self, asked_at: float) -> AttemptTrace:
        """A further attempt begins."""
        begun = AttemptTrace(self.first_id if self.first_id and not self.attempts else new_span_id(), asked_at)
        self.attempts.append(begun)
        return begun

    @property
    def running(self) -> AttemptTrace:
        """The attempt under way."""
        return self.attempts[-1]

    def saw_head(self) -> None:
        """The engine under way has answered; its slot has started."""
        running = self.attempts[-1]
        if isnan(running.headers_at):
            running.headers_at = self.clock()

    def saw_text(self) -> None:
        """The engine under way has given text."""
        if isnan(self.running.first_at):
            self.running.first_at = self.clock()

    def end(self) -> None:
        """The attempt under way is over, unless that was noted."""
        running = self.attempts[-1]
        if isnan(running.ended_at):
            running.ended_at = self.clock()

    def refuse(self, error: LltmRayError) -> None:
        """The gateway itself says no. A wrong field's value is left out: it may be the prompt."""
        self.error_type = error.code
        self.error = tell_error(error)

    def headers(self) -> Headers:
        """What makes the engine's own spans, once it has some, children of the attempt under way."""
        parent = write_traceparent(self.trace_id, self.attempts[-1].span_id, self.flags)
        pairs = [(b"traceparent", parent.encode())]
        return [*pairs, (b"tracestate", self.state.encode("latin-1"))] if self.state else pairs


def begin_trace(headers: Headers, clock: Callable[[], float] = time.monotonic) -> RequestTrace:
    """Join the caller's trace, or begin one."""
    caller = read_caller(headers)
    trace_id, span_id, first_id = new_ids()
    if caller is None:
        return RequestTrace(trace_id, span_id, clock=clock, first_id=first_id)
    asked = caller.span_id, caller.flags, caller.state
    return RequestTrace(caller.trace_id, span_id, *asked, clock=clock, first_id=first_id)


def read_caller(headers: Headers) -> TraceContext | None:
    """Who asks, as far as they tell."""
    given = find(headers, b"traceparent")
    if given is None:
        return None
    state = b",".join(value for name, value in headers if name == b"tracestate")
    kept = state.decode("latin-1") if len(state) <= MOST_STATE_BYTES else ""
    return read_traceparent(given.decode("latin-1"), kept)
