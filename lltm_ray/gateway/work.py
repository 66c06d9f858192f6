"""Work that is no request, as spans: slots saved, carried, restored."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from lltm_ray.telemetry.context import new_span_id, new_trace_id
from lltm_ray.telemetry.logs import Identity, at_work, sendable
from lltm_ray.telemetry.rows import SpanRow


@dataclass(slots=True)
class Work:
    """One piece of it, from its start on."""

    name: str
    engine: str = ""
    kind: str = "internal"
    parent: Identity | None = field(default_factory=at_work.get)
    """What it is a part of; None: it begins a trace."""
    attributes: dict[str, Any] = field(default_factory=dict)
    error_type: str = ""
    error: str = ""
    trace_id: str = ""
    span_id: str = field(default_factory=new_span_id)
    start_unix_nano: int = field(default_factory=time.time_ns)
    _began_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.trace_id = self.parent.trace_id if self.parent else new_trace_id()

    def fail(self, error: BaseException) -> None:
        """It ends with this."""
        self.error_type = getattr(error, "code", type(error).__name__.lstrip("_"))
        self.error = str(error)

    def row(self) -> SpanRow:
        """What it was, now that it is over; as long as the monotonic clock says."""
        took_s = time.perf_counter() - self._began_s
        return SpanRow(
            trace_id=self.trace_id,
            span_id=self.span_id,
            parent_span_id=self.parent.span_id if self.parent else "",
            name=self.name,
            kind=self.kind,
            start_unix_nano=self.start_unix_nano,
            end_unix_nano=self.start_unix_nano + round(took_s * 1e9),
            error_type=self.error_type,
            error=sendable(self.error),
            engine=self.engine,
            attributes=json.dumps(self.attributes),
        )


class Notes(Protocol):
    """Takes work that is over; `trace.Tracing`."""

    def span(self, work: Work) -> None:
        """Tell of it; never raises."""


@contextmanager
def working(notes: Notes | None, work: Work) -> Iterator[Work]:
    """Work while it goes on: what begins inside is a part of it, what is logged is about it.

    Args:
        notes: told at its end; None: nobody is.
        work: for the caller to complete.
    """
    before = at_work.set(work)
    try:
        yield work
    except BaseException as error:
        work.fail(error)
        raise
    finally:
        at_work.reset(before)
        if notes is not None:
            notes.span(work)
