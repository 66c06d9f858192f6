"""A rolling window of telemetry's rows: what comes is added at its end, what is too old or too much goes at its start.

Rows stay in the chunks they came in, so a report over ten minutes of an hour reads those that hold ten minutes. Clocks
of other hosts may be wrong: a row from later than `SLACK_NANO` after now moves nothing but itself out of sight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lltm_ray.analytics.columns import Ints, ints, request_ends

SLACK_NANO = 60 * 10**9
"""Clocks differ, rows of one moment come in different batches, and a request is told when it has ended, its samples at
once."""


class _Moments(NamedTuple):
    """When rows began and ended, in nanoseconds since the epoch; and the ends of requests alone."""

    begins: Ints
    ends: Ints
    requests: Ints


class _Chunk(NamedTuple):
    tables: Mapping[str, pa.Table]
    rows: int
    bytes: int
    first: int
    last: int
    begin: int
    """The first begin that the window reaches back to."""
    whole_from: int
    """From when nothing is missing if what came before this chunk is gone."""
    stamp: int
    """The last end, at most `SLACK_NANO` after it came: what it ages by."""


class Window:
    """Rows of the last `window_s` seconds, at most `max_bytes`.

    Args:
        window_s: counted back from the newest row.
        max_bytes: of all rows in memory.
        clock: nanoseconds since the epoch.
    """

    def __init__(self, window_s: float, max_bytes: int, clock: Callable[[], int] = time.time_ns) -> None:
        self._window_nano, self._max_bytes, self._clock = round(window_s * 1e9), max_bytes, clock
        self._chunks: deque[_Chunk] = deque()
        self.rows = self.bytes = self.dropped_rows = 0
        """`dropped_rows`: that went because there were too many, not because they were too old."""
        self._stamp = self._newest = self._newest_ahead = self._whole_from = 0

    @property
    def newest_unix_nano(self) -> int:
        """The newest end of a row; of one from later than now only where all are, for then our own clock is behind."""
        return self._newest or self._newest_ahead

    @property
    def first_unix_nano(self) -> int | None:
        """From when on nothing is missing; None: there are no rows."""
        return max(min(chunk.begin for chunk in self._chunks), self._whole_from) if self._chunks else None

    def add(self, tables: Mapping[str, pa.Table], *, is_gap: bool = False) -> None:
        """Take in rows that came together.

        Args:
            tables: kind -> rows.
            is_gap: some that belong before them are lost.
        """
        rows = sum(table.num_rows for table in tables.values())
        if not rows:
            return
        chunk = self._chunk_of(tables, rows)
        self._chunks.append(chunk)
        self.rows, self.bytes = self.rows + rows, self.bytes + chunk.bytes
        if is_gap:
            self._whole_from = max(self._whole_from, chunk.whole_from)
        self._forget()

    def _chunk_of(self, tables: Mapping[str, pa.Table], rows: int) -> _Chunk:
        begins, ends, requests = _moments(tables)
        limit = self._clock() + SLACK_NANO
        newest = int(ends[ends <= limit].max(initial=0))
        self._newest = max(self._newest, newest)
        self._newest_ahead = max(self._newest_ahead, int(ends.max(initial=0)))
        stamp = newest or (limit if len(ends) else self._stamp or limit)
        self._stamp = max(self._stamp, stamp)
        oldest = stamp - self._window_nano - SLACK_NANO
        begin = _first(begins, oldest, stamp)
        return _Chunk(
            tables=tables,
            rows=rows,
            bytes=sum(table.nbytes for table in tables.values()),
            first=int(ends.min(initial=stamp)),
            last=int(ends.max(initial=0)) or stamp,
            begin=begin,
            whole_from=_first(requests if len(requests) else ends, oldest, stamp),
            stamp=stamp,
        )

    def _forget(self) -> None:
        while len(self._chunks) > 1:
            oldest = self._chunks[0]
            is_old = oldest.stamp < self._stamp - self._window_nano - SLACK_NANO
            if not is_old and self.bytes <= self._max_bytes:
                return
            self._chunks.popleft()
            self.rows, self.bytes = self.rows - oldest.rows, self.bytes - oldest.bytes
            self.dropped_rows += 0 if is_old else oldest.rows
            self._whole_from = max(self._whole_from, self._chunks[0].whole_from)

    def since(self, start_unix_nano: int, end_unix_nano: int) -> dict[str, pa.Table]:
        """Kind -> rows of all chunks that reach into this time; rows before and after it are among them."""
        chunks = [
            chunk.tables
            for chunk in self._chunks
            if chunk.last >= start_unix_nano - SLACK_NANO and chunk.first <= end_unix_nano + SLACK_NANO
        ]
        kinds = dict.fromkeys(kind for tables in chunks for kind in tables)
        return {kind: pa.concat_tables([tables[kind] for tables in chunks if kind in tables]) for kind in kinds}


def own(tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Copies: what they came in, such as shared memory, can be let go."""
    return {kind: _copy(table) for kind, table in tables.items() if table.num_rows}


def _copy(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def _moments(tables: Mapping[str, pa.Table]) -> _Moments:
    """Attempts have none of their own: they come with their requests."""
    begins, requests = [], np.empty(0, np.int64)
    ends = []
    for kind, rows in tables.items():
        column = "end_unix_nano" if kind == "spans" else "at_unix_nano"
        if kind == "requests":
            requests = request_ends(rows)
            begins.append(ints(rows["arrived_unix_nano"]))
            ends.append(requests)
        elif column in rows.column_names:
            begins.append(ints(rows[column]))
            ends.append(begins[-1])
    return _Moments(_joined(begins), _joined(ends), requests)


def _joined(parts: Iterable[Ints]) -> Ints:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _first(moments: Ints, oldest: int, newest: int) -> int:
    """The first one in between; else the newest."""
    inside = moments[(moments >= oldest) & (moments <= newest)]
    return int(inside.min(initial=newest))
