"""What the analytics actor does, as a plain object: keeps a window, answers for any part of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pyarrow as pa

from lltm_ray.analytics import ingest, units
from lltm_ray.analytics.frames import Engine, choose_engine
from lltm_ray.analytics.hints import make_hints
from lltm_ray.analytics.report import Report, make_report
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.window import SLACK_NANO, Window
from lltm_ray.config import AnalyticsConfig
from lltm_ray.errors import ConfigError
from lltm_ray.records import Hints

if TYPE_CHECKING:
    from lltm_ray.analytics.compare import Comparison

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
COLUMNS = {kind: tuple(columns) for kind, columns in ingest.COLUMNS.items()}
"""Kind of rows -> its columns: all that it asks telemetry for. What was said, and why, is not among them."""
HINTS_VALID = 3
"""Hints end when so many later ones have not come."""
LEAST_COVERED = 0.5
"""Share of a window to compare of which there must be rows: of less, its rates say little."""
_LEAST_NANO = 10**9
"""The shortest window that a first row makes: the rates of one request that has just come would be absurd."""


class _Part(NamedTuple):
    """A part of the window: its rows, and others beside them."""

    tables: Mapping[str, pa.Table]
    start_unix_nano: int
    end_unix_nano: int

    def trace(self, engine: Engine) -> Trace:
        start, end = self.start_unix_nano, self.end_unix_nano
        return ingest.build_trace(self.tables, engine, start_unix_nano=start, end_unix_nano=end)


class AnalyticsService:
    """One fleet's window. Safe for several threads, of which one may make hints.

    Where the engine is a GPU without memory left for it, an answer is made anew on pandas, and its engine says so.

    Args:
        config: how much is kept.
        engine: what analyses run on.
        fleet: its name, for the reader.
        clock: nanoseconds since the epoch.
    """

    def __init__(
        self, config: AnalyticsConfig, engine: Engine, fleet: str = "", *, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self._window = Window(config.window_s, config.max_bytes, clock)
        self._lock = threading.Lock()
        self._config, self._engine, self._fleet = config, engine, fleet
        self._missed_rows = 0

    def add(self, tables: Mapping[str, pa.Table], missed_rows: int = 0, *, is_gap: bool = False) -> None:
        """Take in rows.

        Args:
            tables: as telemetry gives them; other columns than `COLUMNS` are let go.
            missed_rows: how many it had dropped since the last ones.
            is_gap: whether it had dropped any at all.
        """
        kept = {
            kind: rows.select([name for name in COLUMNS[kind] if name in rows.column_names])
            for kind, rows in tables.items()
            if kind in COLUMNS
        }
        with self._lock:
            self._window.add(kept, is_gap=is_gap or missed_rows > 0)
            self._missed_rows += missed_rows

    @property
    def newest_unix_nano(self) -> int:
        """The newest row; see `Window`."""
        return self._window.newest_unix_nano

    def answer(
        self, work: Callable[[Trace], _T], window_s: float | None = None, until_unix_s: float | None = None
    ) -> _T:
        """What `work` makes of a part of the window, which begins with the first row where that is later.

        Args:
            work: is given its trace; once more on pandas where a GPU has no memory left.
            window_s: so many seconds; None: `AnalyticsConfig.window_s`.
            until_unix_s: their end; None: the newest row.

        Raises:
            ConfigError: a window that is no number or not positive, an end that is no number.
        """
        if not isinstance(until_unix_s, Real | None):
            raise ConfigError("until_unix_s", until_unix_s, "must be seconds since the epoch")
        part = self._part(window_s, None if until_unix_s is None else round(float(until_unix_s) * 1e9))
        return self._on_engine(lambda engine: work(part.trace(engine)))

    def trace(self, window_s: float | None = None, until_unix_s: float | None = None) -> Trace:
        """As `answer`."""
        return self.answer(lambda trace: trace, window_s, until_unix_s)

    def report(self, window_s: float | None = None, until_unix_s: float | None = None) -> Report:
        """All analyses over a part of the window; see `answer`."""
        missed = self._missed_rows + self._window.dropped_rows
        return self.answer(partial(make_report, fleet=self._fleet, missed_rows=missed), window_s, until_unix_s)

    def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        """Two windows, each as its start and end in seconds since the epoch.

        Raises:
            ConfigError: one of them has no requests, or the rows of less than half of it are kept; they are not two
                moments each, overlap, or come in the wrong order.
        """
        from lltm_ray.analytics.compare import compare

        _check_order(before, after)
        parts = [self._covered(name, *each) for name, each in (("before", before), ("after", after))]
        return self._on_engine(lambda engine: compare(*(part.trace(engine) for part in parts)))

    def hints(self, now_unix_nano: int) -> Hints:
        """What routers should know, by the last `hints_window_s`.

        They end with the newest row, as reports do, unless that is long ago.
        """
        until = max(self.newest_unix_nano + 1, now_unix_nano - SLACK_NANO)
        part = self._part(self._config.hints_window_s, until)
        valid_s = HINTS_VALID * self._config.hints_every_s
        return self._on_engine(
            lambda engine: make_hints(part.trace(engine), now_unix_nano=now_unix_nano, valid_s=valid_s)
        )

    def status(self) -> dict[str, object]:
        """For people: plain values."""
        with self._lock:
            window = self._window
            return {
                "engine": self._engine.name,
                "reason": self._engine.reason,
                "rows": window.rows,
                "bytes": window.bytes,
                "first_unix_nano": window.first_unix_nano,
                "newest_unix_nano": window.newest_unix_nano,
                "missed_rows": self._missed_rows + window.dropped_rows,
            }

    def _part(self, window_s: float | None, until_unix_nano: int | None) -> _Part:
        if window_s is not None and not (isinstance(window_s, Real) and window_s > 0):
            raise ConfigError("window_s", window_s, "must be a number of seconds above 0")
        with self._lock:
            end = self._window.newest_unix_nano + 1 if until_unix_nano is None else until_unix_nano
            first = self._window.first_unix_nano
            asked = end - round((self._config.window_s if window_s is None else window_s) * 1e9)
            start = asked if first is None else max(asked, min(first, end - _LEAST_NANO))
            return _Part(self._window.since(start, end), start, end)

    def _covered(self, name: str, start_s: float, end_s: float) -> _Part:
        start, end = round(start_s * 1e9), round(end_s * 1e9)
        part = self._part(end_s - start_s, end)
        with self._lock:
            first = self._window.first_unix_nano
        if first is None or end - max(start, first) < LEAST_COVERED * (end - start):
            exist = "there are no rows" if first is None else f"rows exist from {units.moment(first):%F %T} UTC on"
            why = f"{exist}; take a later window, or have more kept (analytics.window_s)"
            raise ConfigError(name, units.window(start, end), why)
        return part

    def _on_engine(self, work: Callable[[Engine], _T]) -> _T:
        try:
            return work(self._engine)
        except Exception as error:
            if not self._engine.is_out_of_memory(error):
                raise
            why = f"{self._engine.name} had no memory left for it ({self._engine.reason})"
        _log.warning("%s; it is done with pandas", why)
        return work(choose_engine("pandas", reason=why))


def _check_order(before: tuple[float, float], after: tuple[float, float]) -> None:
    for name, window in (("before", before), ("after", after)):
        is_pair = isinstance(window, Sequence) and len(window) == 2 and all(isinstance(each, Real) for each in window)
        if not is_pair or not window[0] < window[1]:
            raise ConfigError(name, window, "must be start and end, in seconds since the epoch, the earlier first")
    if before[1] > after[0]:
        shown = units.window(*(round(each * 1e9) for each in after))
        raise ConfigError("after", shown, "must begin when the window before it has ended: a change lies between them")
