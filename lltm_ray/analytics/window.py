"""A rolling window of telemetry's rows: what comes is added at its end, what is too old or too much goes at its start.

Rows stay in the chunks they came in, so a report over ten minutes of an hour reads those that hold ten minutes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lltm_ray.analytics.columns import request_ends

_SLACK_NANO = 60 * 10**9
"""Rows of one moment come in different batches; and a request is told when it has ended, its samples at once."""


class _Chunk(NamedTuple):
    first_unix_nano: int
    last_unix_nano: int
    tables: Mapping[str, pa.Table]
    rows: int


class Window:
    """Rows of the last `window_s` seconds, at most `max_rows`.

    Args:
        window_s: counted back from the newest row.
        max_rows: of all kinds together.
    """

    def __init__(self, window_s: float, max_rows: int) -> None:
        self._window_nano = round(window_s * 1e9)
        self._max_rows = max_rows
        self._chunks: deque[_Chunk] = deque()
        self.rows = self.dropped_rows = 0
        """`dropped_rows`: that went because there were too many, not because they were too old."""
        self.newest_unix_nano = 0

    def add(self, tables: Mapping[str, pa.Table]) -> None:
        """Take in rows that came together."""
        rows = sum(table.num_rows for table in tables.values())
        if not rows:
            return
        first, last = _span_of(tables, self.newest_unix_nano)
        self.newest_unix_nano = max(self.newest_unix_nano, last)
        self._chunks.append(_Chunk(first, last, tables, rows))
        self.rows += rows
        self._forget()

    def _forget(self) -> None:
        while len(self._chunks) > 1:
            oldest = self._chunks[0]
            is_old = oldest.last_unix_nano < self.newest_unix_nano - self._window_nano - _SLACK_NANO
            if not is_old and self.rows <= self._max_rows:
                return
            self._chunks.popleft()
            self.rows -= oldest.rows
            self.dropped_rows += 0 if is_old else oldest.rows

    def since(self, start_unix_nano: int, end_unix_nano: int | None = None) -> dict[str, pa.Table]:
        """Kind -> rows of all chunks that reach into this time; rows before and after it are among them."""
        end = self.newest_unix_nano if end_unix_nano is None else end_unix_nano
        chunks = [
            chunk.tables
            for chunk in self._chunks
            if chunk.last_unix_nano >= start_unix_nano - _SLACK_NANO and chunk.first_unix_nano <= end + _SLACK_NANO
        ]
        kinds = dict.fromkeys(kind for tables in chunks for kind in tables)
        return {kind: pa.concat_tables([tables[kind] for tables in chunks if kind in tables]) for kind in kinds}


def _span_of(tables: Mapping[str, pa.Table], default: int) -> tuple[int, int]:
    """First and last moment of rows. Attempts have none of their own: they come with their requests."""
    found: list[int] = []
    for kind, rows in tables.items():
        column = "end_unix_nano" if kind == "spans" else "at_unix_nano"
        if kind == "requests" and rows.num_rows:
            ends = request_ends(rows)
            found += int(ends.min()), int(ends.max())
        elif rows.num_rows and column in rows.column_names:
            seen = pc.min_max(rows[column]).as_py()
            found += seen["min"], seen["max"]
    return min(found, default=default), max(found, default=default)
