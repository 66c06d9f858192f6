"""Lines of our own logs as rows, with the ids of the request they are about."""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from lltm_ray.telemetry.rows import LogRow

ROOT = "lltm_ray"
"""Loggers below it are heard; those of other packages are their owners' business."""
_OF_SENDING = ("lltm_ray.telemetry.outbox", "lltm_ray.actors.sender")
"""A line about rows that cannot be sent would be a row again."""
_MOST_CHARS, _MOST_TRACE_CHARS = 2048, 4096
MOST_LINES, EVERY_S = 10, 10.0
"""So many lines from one place of the code in so many seconds; the next one after that says how many were left out."""
_SECRETS = re.compile(
    r"(//)[^/@\s]+(?=@)"
    r"|(\b(?:bearer|basic)\s+)[^\s'\",]+"
    r"|(\b(?:x-)?(?:api[-_]?key|authorization|password|secret)['\"]?\s*[=:]\s*['\"]?)(?!bearer\s|basic\s)[^\s'\",]+",
    re.IGNORECASE,
)
_OWN = ("lltm.", "gen_ai.")
"""Beginnings of the names that a line may bring by `extra`."""


class Identity(Protocol):
    """Whose work is being done: a request at the gateway, or a call on an engine."""

    @property
    def trace_id(self) -> str:
        """32 hex digits."""

    @property
    def span_id(self) -> str:
        """16 hex digits."""


at_work: ContextVar[Identity | None] = ContextVar("lltm_at_work", default=None)
"""What lines logged in this context are about."""


@dataclass(slots=True)
class _Place:
    """A line of code that logs."""

    since: float
    lines: int = 0
    left_out: int = 0


class LogHandler(logging.Handler):
    """Appends rows; bounded, and silent about its own faults.

    Args:
        add: takes a kind and a row, as `Outbox.add`.
        process: its name, as attribute `lltm.process`.
        clock: monotonic seconds.
    """

    def __init__(
        self, add: Callable[[str, tuple[Any, ...]], None], process: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._add, self._process, self._clock = add, process, clock
        self._places: dict[tuple[str, int], _Place] = {}
        self.faults = 0
        """Lines that could not be told: their arguments do not fit their text."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hears our loggers; what they let pass is up to their levels, as ever."""
        logger = logging.getLogger(ROOT)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`; never raises."""
        if record.name in _OF_SENDING:
            return
        try:
            left_out = self._admit(record)
            if left_out is not None:
                self._add("logs", self._row(record, left_out))
        except Exception:  # noqa: BLE001 - border: a line that cannot be told must not reach whoever logged it
            self.faults += 1

    def _admit(self, record: logging.LogRecord) -> int | None:
        """Lines of the same place that were left out since the last one; None: this one is, too."""
        now = self._clock()
        place = self._places.setdefault((record.pathname, record.lineno), _Place(now))
        if now - place.since >= EVERY_S:
            place.since, place.lines = now, 0
        place.lines += 1
        if place.lines > MOST_LINES:
            place.left_out += 1
            return None
        left_out, place.left_out = place.left_out, 0
        return left_out

    def _row(self, record: logging.LogRecord, left_out: int) -> LogRow:
        identity = at_work.get()
        attributes = {name: value for name, value in record.__dict__.items() if name.startswith(_OWN)}
        attributes |= {
            "code.function.name": f"{record.name}.{record.funcName}",
            "code.line.number": record.lineno,
            "lltm.process": self._process,
        }
        if left_out:
            attributes["lltm.log.left_out"] = left_out
        return LogRow(
            at_unix_nano=int(record.created * 1e9),
            trace_id=identity.trace_id if identity else "",
            span_id=identity.span_id if identity else "",
            severity=record.levelname,
            logger=record.name,
            message=clean(record.getMessage())[:_MOST_CHARS],
            attributes=json.dumps(attributes | _exception(record), default=str),
        )


def clean(text: str) -> str:
    """A text without credentials, in characters that can be sent."""
    return sendable(_SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3]}***", text))


def sendable(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can say and no encoding can: they would cost the row."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _exception(record: logging.LogRecord) -> dict[str, str]:
    if not record.exc_info or record.exc_info[0] is None:
        return {}
    kind, error, _ = record.exc_info
    lines = clean("".join(traceback.format_exception(*record.exc_info)))
    return {
        "exception.type": f"{kind.__module__}.{kind.__qualname__}",
        "exception.message": clean(str(error))[:_MOST_CHARS],
        "exception.stacktrace": lines[-_MOST_TRACE_CHARS:],
    }
