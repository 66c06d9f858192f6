"""A request's place in a trace, and its clock readings while it runs: an id and a reading for each phase, no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan

from lltm_ray.gateway.headers import find
from lltm_ray.gateway.upstream import Headers
from lltm_ray.records import Timings
from lltm_ray.telemetry.context import SAMPLED, new_span_id, new_trace_id, read_traceparent, write_traceparent
from lltm_ray.telemetry.rows import NEVER


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

    @property
    def has_begun(self) -> bool:
        """Whether text came."""
        return not isnan(self.first_at)

    @property
    def is_open(self) -> bool:
        """Whether its end has not been noted."""
        return isnan(self.ended_at)


@dataclass(slots=True)
class RequestTrace:
    """A request's identity and its attempts'."""

    trace_id: str
    span_id: str
    parent_span_id: str = ""
    flags: int = SAMPLED
    state: str = ""
    error_type: str = ""
    attempts: list[AttemptTrace] = field(default_factory=list)

    def attempt(self, asked_at: float) -> AttemptTrace:
        """A further attempt begins."""
        self.attempts.append(AttemptTrace(new_span_id(), asked_at))
        return self.attempts[-1]

    @property
    def running(self) -> AttemptTrace:
        """The attempt under way."""
        return self.attempts[-1]

    def headers(self) -> Headers:
        """What makes the engine's own spans, once it has some, children of the attempt under way."""
        parent = write_traceparent(self.trace_id, self.attempts[-1].span_id, self.flags)
        pairs = [(b"traceparent", parent.encode("ascii"))]
        return [*pairs, (b"tracestate", self.state.encode("latin-1"))] if self.state else pairs


def begin_trace(headers: Headers) -> RequestTrace:
    """Join the caller's trace, or begin one."""
    given = find(headers, b"traceparent")
    if given is not None:
        state = find(headers, b"tracestate") or b""
        parent = read_traceparent(given.decode("latin-1"), state.decode("latin-1"))
        if parent is not None:
            return RequestTrace(parent.trace_id, new_span_id(), parent.span_id, parent.flags, parent.state)
    return RequestTrace(new_trace_id(), new_span_id())
