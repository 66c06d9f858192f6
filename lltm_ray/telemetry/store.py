"""The store: the newest rows of each kind in memory, behind a cursor; `segments` keeps them on disk as well."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lltm_ray.telemetry.batch import SCHEMAS, unpack
from lltm_ray.telemetry.segments import SEQUENCE, Segments

_log = logging.getLogger(__name__)
_CHUNK_ROWS = 4096
_LARGEST_RING_BYTES = 128 * 2**20
"""Of one kind: rows with captured content are large."""
_REMEMBERED_CHUNKS = 64
_NEAR_ROWS = 200_000
"""Of all kinds, between rows of one request: seconds of a busy fleet."""
Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


class Page(NamedTuple):
    """What `read_since` found."""

    cursor: int
    """Where to go on."""
    tables: dict[str, pa.Table]
    """Kind -> rows in the order they came; every kind that was asked for."""
    missed_rows: int
    """Rows of these kinds that came after the cursor and are gone from memory; for a cursor older than the last 64
    chunks that went, all that ever went. Rows that a kill took before they were written are not counted."""


class Ring:
    """The newest rows of one kind, as chunks with a column of sequence numbers; the oldest chunks go first."""

    def __init__(self, kind: str, max_rows: int) -> None:
        self._max_rows = max_rows
        self._chunk_rows = max(1, min(_CHUNK_ROWS, max_rows // 8))
        self._chunks: deque[pa.RecordBatch] = deque()
        self.rows = self.dropped = self._bytes = 0
        self._gone: deque[tuple[Numbers, int]] = deque(maxlen=_REMEMBERED_CHUNKS)
        self._schema = SCHEMAS[kind]

    def add(self, chunk: pa.RecordBatch) -> None:
        """Append rows; neighbours of like size are merged, so each row is copied a few times and chunks stay few.

        The copy also lets go of shared memory that the rows came in.
        """
        few, count = [chunk], len(chunk)
        while self._chunks and len(self._chunks[-1]) <= min(count, self._chunk_rows - count):
            few.append(self._take(self._chunks.pop()))
            count += len(few[-1])
        self._put(pa.concat_batches(few[::-1]))
        while self.rows > self._max_rows or (self._bytes > _LARGEST_RING_BYTES and len(self._chunks) > 1):
            self._drop_oldest()

    def _put(self, chunk: pa.RecordBatch) -> None:
        self._chunks.append(chunk)
        self.rows += len(chunk)
        self._bytes += chunk.nbytes

    def _take(self, chunk: pa.RecordBatch) -> pa.RecordBatch:
        self.rows -= len(chunk)
        self._bytes -= chunk.nbytes
        return chunk

    def _drop_oldest(self) -> None:
        oldest = self._take(self._chunks.popleft())
        kept = self._max_rows if len(oldest) > self._max_rows else 0  # one batch larger than the ring: keep its end
        gone = oldest.slice(0, len(oldest) - kept)
        self._gone.append((_numbers(gone).copy(), self.dropped))
        self.dropped += len(gone)
        if kept:
            self._put(pa.concat_batches([oldest.slice(len(gone))]))

    def missed_since(self, cursor: int) -> int:
        """Rows that were dropped though they came at or after the cursor."""
        for numbers, dropped_before in reversed(self._gone):
            if numbers[0] <= cursor:
                return self.dropped - dropped_before - int(np.searchsorted(numbers, cursor))
        return self.dropped

    def since(self, cursor: int, limit: int) -> list[pa.RecordBatch]:
        """Rows from the cursor on; whole chunks, the first one cut, until there are `limit` rows or more."""
        found: list[pa.RecordBatch] = []
        for chunk in self._chunks:
            numbers = _numbers(chunk)
            if numbers[-1] >= cursor and limit > 0:
                found.append(chunk.slice(int(np.searchsorted(numbers, cursor))))
                limit -= len(found[-1])
        return found

    def chunks(self) -> list[pa.RecordBatch]:
        """All rows, the oldest first."""
        return list(self._chunks)

    def table(self, chunks: Iterable[pa.RecordBatch], end: int, columns: Collection[str] | None = None) -> pa.Table:
        """The rows before sequence number `end`, without their numbers; of some columns, or of all."""
        schema = self._schema if columns is None else pa.schema([self._schema.field(name) for name in columns])
        cut = [chunk.slice(0, int(np.searchsorted(_numbers(chunk), end))) for chunk in chunks]
        return pa.Table.from_batches([chunk.select(schema.names) for chunk in cut if len(chunk)], schema)


class Store:
    """Rows of every kind. Safe for several threads; nothing here raises into whoever adds rows.

    Sequence numbers grow with each row, over all kinds. They start at the clock's microseconds, so that they go on
    growing after a kill that took rows with it: fewer than a million rows a second come in.

    Args:
        folder: where segments are written and found again; None: memory only.
        max_rows: of each kind in memory.
        max_bytes: of all segments; the oldest are deleted.
        max_age_s: of a segment.
        segment_rows: rows after which a segment is closed.
        flush_s: how often new rows are written; a kill takes what came since.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        max_rows: int = 100_000,
        max_bytes: int = 2**30,
        max_age_s: float = 7 * 86_400.0,
        segment_rows: int = 20_000,
        flush_s: float = 5.0,
    ) -> None:
        self._rings = {kind: Ring(kind, max_rows) for kind in SCHEMAS}
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._segments: Segments | None = None
        self._next = time.time_ns() // 1000
        if folder is not None:
            self._segments = Segments(folder, max_bytes, max_age_s, segment_rows)
            self._reload(self._segments, max_rows)
            self._segments.start(flush_s)

    def _reload(self, segments: Segments, max_rows: int) -> None:
        for kind, chunks in segments.read_newest(max_rows).items():
            for chunk in chunks:
                self._rings[kind].add(chunk)
                self._next = max(self._next, int(_numbers(chunk)[-1]) + 1)

    def add(self, batch: Mapping[str, pa.RecordBatch]) -> int:
        """Take rows in; how many. What is not of its kind's schema is refused and counted."""
        sound = {kind: rows for kind, rows in batch.items() if len(rows) and self._is_sound(kind, rows)}
        with self._lock:
            for kind, rows in sound.items():
                numbers = pa.array(np.arange(self._next, self._next + len(rows)))
                chunk = rows.append_column(SEQUENCE, numbers)
                self._next += len(rows)
                self._rings[kind].add(chunk)
                if self._segments is not None:
                    self._segments.add(kind, chunk)
        return sum(map(len, sound.values()))

    def _is_sound(self, kind: str, rows: pa.RecordBatch) -> bool:
        if kind in SCHEMAS and rows.schema.equals(SCHEMAS[kind]):
            return True
        if not self._refused[kind]:
            _log.warning("rows of %r are refused: their sender has other columns for them than this process", kind)
        self._refused[kind] += len(rows)
        return False

    def read_since(
        self,
        cursor: int = 0,
        kinds: Iterable[str] | None = None,
        limit: int = 10_000,
        columns: Mapping[str, Collection[str]] | None = None,
    ) -> Page:
        """Rows that came at or after the cursor, in order; at most `limit` of all kinds together.

        Args:
            cursor: from the page before; 0: from the oldest kept.
            kinds: names as in `batch.KINDS`; None: all.
            limit: rows at most.
            columns: kind -> the columns that are wanted of it; all of a kind that is not there.

        Raises:
            KeyError: no such kind, or no such column.
        """
        with self._lock:
            rings = {kind: self._rings[kind] for kind in (SCHEMAS if kinds is None else kinds)}
            found = {kind: ring.since(cursor, limit + 1) for kind, ring in rings.items()}
            missed = sum(ring.missed_since(cursor) for ring in rings.values())
            end = self._next
        numbers = [_numbers(chunk) for chunks in found.values() for chunk in chunks]
        if sum(map(len, numbers)) > limit:
            end = int(np.partition(np.concatenate(numbers), limit)[limit])
        wanted = columns or {}
        return Page(end, {kind: rings[kind].table(found[kind], end, wanted.get(kind)) for kind in rings}, missed)

    def find(
        self, kind: str, column: str, value: str, *, near: int | None = None, until_s: float = math.inf
    ) -> list[tuple[int, Any]]:
        """Rows that have a value, with their sequence numbers, in order: from memory, and of before from segments.

        Args:
            kind: name as in `batch.KINDS`.
            column: of text.
            value: in that column.
            near: sequence number of a row that these came within 200,000 rows of. None: wherever they are, but only
                those of the newest segment that has some, and of none if some are in memory.
            until_s: when to read no further segment, as `time.monotonic` tells it.
        """
        with self._lock:
            kept, end = self._rings[kind].chunks(), self._next
        oldest = int(_numbers(kept[0])[0]) if kept else end
        found = [_where(chunk, column, value) for chunk in kept]
        before = range(oldest) if near is None else range(near - _NEAR_ROWS, min(near + _NEAR_ROWS, oldest))
        if self._segments is not None and (near is not None or not any(map(len, found))):
            for batch in self._segments.find(kind, column, value, before, until_s):
                found.insert(0, batch.slice(0, int(np.searchsorted(_numbers(batch), oldest))))
                if near is None and len(found[0]):
                    break
        return [row for batch in found if len(batch) for row in _numbered(kind, batch)]

    def counts(self) -> dict[str, int]:
        """Rows kept and dropped from memory, refused; of segments see `Segments.counts`."""
        with self._lock:
            rings = list(self._rings.values())
            kept, dropped = sum(ring.rows for ring in rings), sum(ring.dropped for ring in rings)
        written = {} if self._segments is None else self._segments.counts()
        return {"kept": kept, "dropped": dropped, "refused": self._refused.total(), **written}

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._segments is not None:
            self._segments.flush()

    def close(self) -> None:
        """Write the rest and end the thread."""
        if self._segments is not None:
            self._segments.stop()


def _where(chunk: pa.RecordBatch, column: str, value: str) -> pa.RecordBatch:
    return chunk.filter(pc.equal(chunk.column(column), value))


def _numbered(kind: str, batch: pa.RecordBatch) -> Iterator[tuple[int, Any]]:
    return zip(_numbers(batch).tolist(), unpack(kind, batch.select(SCHEMAS[kind].names)), strict=True)


def _numbers(chunk: pa.RecordBatch) -> Numbers:
    numbers: Numbers = chunk.column(SEQUENCE).to_numpy()
    return numbers
