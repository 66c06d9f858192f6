"""What the analytics actor does, as a plain object: keeps a window, answers for any part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from lltm_ray.analytics.frames import Engine
from lltm_ray.analytics.hints import make_hints
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.report import Report, make_report
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.window import Window
from lltm_ray.config import AnalyticsConfig
from lltm_ray.errors import ConfigError
from lltm_ray.records import Hints

if TYPE_CHECKING:
    from lltm_ray.analytics.compare import Comparison

KINDS = ("requests", "attempts", "spans", "gpus", "servers", "slots", "queues")
"""Kinds of rows it asks telemetry for."""
HINTS_VALID = 3
"""Hints end when so many later ones have not come."""


class AnalyticsService:
    """One fleet's window. For one thread.

    Args:
        config: how much is kept.
        engine: what analyses run on.
        fleet: its name, for the reader.
    """

    def __init__(self, config: AnalyticsConfig, engine: Engine, fleet: str = "") -> None:
        self._window = Window(config.window_s, config.max_rows)
        self._config = config
        self._engine = engine
        self._fleet = fleet
        self._missed_rows = 0
        self._hints = Hints()

    def add(self, tables: Mapping[str, pa.Table], missed_rows: int = 0) -> None:
        """Rows as telemetry gives them, and how many it had dropped before."""
        self._window.add(tables)
        self._missed_rows += missed_rows

    def trace(self, window_s: float | None = None, until_unix_s: float | None = None) -> Trace:
        """Part of the window.

        Args:
            window_s: so many seconds; None: all that is kept.
            until_unix_s: their end; None: the newest row.

        Raises:
            ConfigError: a window that is not positive.
        """
        if window_s is not None and not window_s > 0:
            raise ConfigError("window_s", window_s, "must be more than 0")
        end = self._window.newest_unix_nano + 1 if until_unix_s is None else round(until_unix_s * 1e9)
        start = None if window_s is None else end - round(window_s * 1e9)
        return build_trace(self._window.since(start or 0, end), self._engine, start_unix_nano=start, end_unix_nano=end)

    def report(self, window_s: float | None = None, until_unix_s: float | None = None) -> Report:
        """All analyses over a part of the window; see `trace`."""
        missed = self._missed_rows + self._window.dropped_rows
        return make_report(self.trace(window_s, until_unix_s), fleet=self._fleet, missed_rows=missed)

    def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        """Two windows, each as its start and end in seconds since the epoch.

        Raises:
            ConfigError: one of them is empty.
        """
        from lltm_ray.analytics.compare import compare

        return compare(*(self.trace(end - start, end) for start, end in (before, after)))

    def hints(self, now_unix_nano: int) -> Hints:
        """What routers should know, by the last `hints_window_s` and by what they were told before."""
        trace = self.trace(self._config.hints_window_s, now_unix_nano / 1e9)
        valid_s = HINTS_VALID * self._config.hints_every_s
        self._hints = make_hints(trace, self._hints, now_unix_nano=now_unix_nano, valid_s=valid_s)
        return self._hints

    def status(self) -> dict[str, object]:
        """For people: plain values."""
        window = self._window
        return {
            "engine": self._engine.name,
            "reason": self._engine.reason,
            "rows": window.rows,
            "newest_unix_nano": window.newest_unix_nano,
            "missed_rows": self._missed_rows + window.dropped_rows,
        }
