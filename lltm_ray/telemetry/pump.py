"""Pumps: each destination has a bounded queue and a thread, so that a dead or slow one costs the others nothing."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_LINGER_S = 1.0
"""Longest wait for a batch to fill."""
_BATCH = 512
_LAST_WORD_S = 0.5
_TRIES = 8
"""For one batch: an outage of a minute costs it five or so, and one that the receiver can never take must not block."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 4.0
_QUIET_S = 60.0
"""Between two log lines of one destination."""
_CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+(?=@)|(?<=\?)[^\s'\")]+")
"""In a URL: before its host, and in its query."""
_speaker: contextvars.ContextVar[Reporter | None] = contextvars.ContextVar("lltm_exporter", default=None)


class Counts(NamedTuple):
    """What became of what was put into a pump."""

    queued: int
    sent: int
    dropped: int
    """Pushed out by newer ones, given up, or left at shutdown."""
    failures: int
    """Attempts that failed."""
    error: str
    """Of the last attempt; empty: it went well."""


class Reporter:
    """Says that a destination fails, and that it is back: one line a minute, whatever its exporter logs meanwhile."""

    def __init__(self, name: str) -> None:
        self.name, self.error, self.failures = name, "", 0
        self._heard: list[str] = []
        self._said_at = -_QUIET_S
        self._has_complained = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Holds back, in this thread, what the exporter logs."""
        token = _speaker.set(self)
        try:
            yield
        finally:
            _speaker.reset(token)

    def attempt(self, send: Callable[[], Any]) -> bool:
        """Run an export; whether it went well: it did not return False and did not raise."""
        self._heard = []
        with self.listening():
            try:
                is_sent = send() is not False
            except Exception as error:  # noqa: BLE001 - border: an exporter's fault must not end its thread
                is_sent = False
                self.hear(f"{type(error).__name__}: {error}")
        self._conclude(is_sent)
        return is_sent

    def hear(self, line: str) -> None:
        """What the exporter would have logged. Its first line has the cause, the last one what it came to."""
        self._heard = [*self._heard[:1], _CREDENTIALS.sub("***", line)]

    def _conclude(self, is_sent: bool) -> None:
        self.error = "" if is_sent else "; ".join(dict.fromkeys(self._heard)) or "refused without a reason"
        if is_sent:
            if self._has_complained:
                _log.info("telemetry exporter %s works again", self.name)
            self._has_complained = False
            return
        self.failures += 1
        if time.monotonic() - self._said_at >= _QUIET_S:
            self._said_at, self._has_complained = time.monotonic(), True
            _log.warning("telemetry exporter %s fails (%d times so far): %s", self.name, self.failures, self.error)


class _Overhear(logging.Filter):
    """Keeps lines that OpenTelemetry's exporters write within an attempt of ours; other programs' pass as ever."""

    def filter(self, record: logging.LogRecord) -> bool:
        speaker = _speaker.get()
        if speaker is not None:
            speaker.hear(record.getMessage())
        return speaker is None


_OVERHEAR = _Overhear()
_LOUD = (
    "opentelemetry.exporter.otlp.common.http",
    "opentelemetry.exporter.otlp.proto.common._internal",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.http._log_exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
)


def overhear() -> None:
    """Have the exporters' log lines pass by `Reporter`; once or often is the same."""
    for name in _LOUD:
        logging.getLogger(name).addFilter(_OVERHEAR)


class Pump(Generic[_Item]):
    """Feeds one destination from a queue.

    Args:
        name: of the destination, for logs and counters.
        send: takes a batch; false or an exception: it did not go, and is tried again in its turn.
        capacity: items that may wait; beyond it the oldest are dropped.
        close: called once at the end; also where `send` is stuck, which it shall end.
    """

    def __init__(
        self, name: str, send: Callable[[list[_Item]], Any], capacity: int, close: Callable[[], Any] | None = None
    ) -> None:
        self.name, self._send, self._capacity, self._close = name, send, capacity, close
        self._most = self._size = max(1, min(_BATCH, capacity // 4))
        self._reporter = Reporter(name)
        self._items: deque[_Item] = deque()
        self._batch: list[_Item] = []
        self._changed = threading.Condition()
        self._is_urgent = self._is_ending = self._is_over = False
        self._sent = self._dropped = self._tries = 0
        self._thread = threading.Thread(target=self._run, name=f"lltm-{name}", daemon=True)
        self._thread.start()

    def put(self, items: Sequence[_Item]) -> None:
        """Queue items. Never blocks and never raises; after `shutdown` they are dropped."""
        with self._changed:
            if self._is_ending:
                self._dropped += len(items)
                return
            count = len(self._items)
            self._items.extend(items)
            self._shrink()
            if not count or count < self._size <= len(self._items):
                self._changed.notify_all()

    def _shrink(self) -> None:
        """Hold to the capacity, with what is being sent."""
        while self._items and len(self._items) + len(self._batch) > self._capacity:
            self._items.popleft()
            self._dropped += 1

    def counts(self) -> Counts:
        """So far."""
        with self._changed:
            queued = len(self._items) + len(self._batch)
            return Counts(queued, self._sent, self._dropped, self._reporter.failures, self._reporter.error)

    def flush(self, timeout_s: float) -> bool:
        """Send what is queued now; whether all went in time."""
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._items and not self._batch, timeout_s)

    def shutdown(self, timeout_s: float) -> None:
        """Send what is queued until the deadline, drop the rest, and close the destination."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._is_over = True
            self._dropped += len(self._items) + len(self._batch)
            self._items.clear()
            self._batch = []
            self._changed.notify_all()
        with self._reporter.listening():
            self._end()
        self._thread.join(_LAST_WORD_S)

    def _end(self) -> None:
        try:
            if self._close is not None:
                self._close()
        except Exception as error:  # noqa: BLE001 - border: as in Reporter.attempt
            _log.warning("telemetry exporter %s did not close: %s", self.name, error)

    def _run(self) -> None:
        while batch := self._take():
            self._settle(self._reporter.attempt(partial(self._send, batch)))

    def _take(self) -> list[_Item]:
        """Wait for a batch, or have the one that failed last time; empty: the end."""
        with self._changed:
            if not self._batch:
                self._changed.wait_for(lambda: bool(self._items) or self._is_ending)
                self._changed.wait_for(self._is_due, _LINGER_S)
                self._batch = [self._items.popleft() for _ in range(min(self._size, len(self._items)))]
            return self._batch

    def _is_due(self) -> bool:
        return len(self._items) >= self._size or self._is_urgent or self._is_ending

    def _settle(self, is_sent: bool) -> None:
        with self._changed:
            if self._is_over:
                return
            self._tries = 0 if is_sent else self._tries + 1
            if is_sent:
                self._sent += len(self._batch)
                self._size = min(self._most, self._size + max(1, self._most // 16))
            elif self._tries >= _TRIES:
                self._dropped += len(self._batch)
            elif self._tries > 1:
                self._halve()
            if is_sent or self._tries >= _TRIES:
                self._batch, self._tries = [], 0
            if not self._items and not self._batch:
                self._is_urgent = False
                self._changed.notify_all()
            if not is_sent:
                pause_s = min(_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S * 2**self._tries)
                self._changed.wait_for(lambda: self._is_over, pause_s)

    def _halve(self) -> None:
        """The batch may be too large for its receiver (4 MiB is gRPC's usual limit), or hold one item it refuses."""
        self._size = max(1, len(self._batch) // 2)
        self._items.extendleft(reversed(self._batch[self._size :]))
        del self._batch[self._size :]
