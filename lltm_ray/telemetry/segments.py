"""Segments: the store's rows on disk, as Parquet files that analysis tools read without us.

A segment `{kind}-{first sequence number}.parquet` is written again with each flush, whole and under its final name by
an atomic rename, until it holds enough rows. So a kill takes only what came since the last flush, files stay few, and
no reader sees half of one. Written without fsync: after a power cut the newest may be torn, which reading allows for.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry.batch import SCHEMAS

_log = logging.getLogger(__name__)
SEQUENCE = "seq"
"""Column of sequence numbers, beside a kind's own."""
_NAME = re.compile(r"([a-z]+)-(\d{20})\.parquet\Z")
_QUIET_S = 60.0
"""Between two log lines about a disk that refuses."""
_OPEN_S = 900.0
"""Longest a segment stays open: what it holds is written again with each flush."""
_SEGMENT_BYTES = 64 * 2**20
"""In memory; as much of each kind may wait for a flush, and as much for a disk that refuses."""
_MOST_NEW_ROWS = 100_000
"""Of each kind that wait for a flush, which a disk may hold up."""


def read_folder(
    folder: Path, *, columns: Mapping[str, Collection[str]] | None = None, back_s: float = math.inf
) -> dict[str, pa.Table]:
    """Rows of a folder of segments, in order; for analysis, also while telemetry writes there.

    Args:
        folder: what `telemetry.segment_dir` names.
        columns: kind -> the columns that are wanted of it; None: all of all kinds.
        back_s: segments that were last written longer before the newest one hold no row that is wanted.

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.is_dir():
        raise ConfigError("segments", str(folder), "is no folder; by default it is <cache>/telemetry/<fleet>")
    wanted = SCHEMAS if columns is None else {kind: _some(SCHEMAS[kind], names) for kind, names in columns.items()}
    files = [(path, status) for path, status in _files(folder) if _kind(path) in wanted]
    newest = max((status.st_mtime for _, status in files), default=0.0)
    recent = (path for path, status in files if status.st_mtime >= newest - back_s - _OPEN_S)
    found: dict[str, list[pa.Table]] = defaultdict(list)
    for path in sorted(recent):
        rows = _read_columns(path, wanted[_kind(path)])
        if rows is not None:
            found[_kind(path)].append(rows)
    return {kind: pa.concat_tables(tables, promote_options="default") for kind, tables in found.items()}


def _some(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names])


def _kind(path: Path) -> str:
    return path.name.partition("-")[0]


def _first(path: Path) -> int:
    """Its first row's sequence number."""
    return int(path.stem.partition("-")[2])


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.glob("*.parquet"):
        if _NAME.match(path.name):
            with suppress(FileNotFoundError):
                found.append((path, path.stat()))
    return found


def _read_columns(path: Path, schema: pa.Schema, *, is_whole: bool = False) -> pa.Table | None:
    """The columns of a schema that a segment has; None where that is none, or not the `is_whole` schema."""
    try:
        with pq.ParquetFile(path) as file:
            rows = file.read([name for name in schema.names if name in file.schema_arrow.names])
    except (OSError, pa.ArrowException) as error:
        _log.warning("a torn telemetry segment is left out: %s: %s", path, error)
        return None
    is_known = rows.num_columns > 0 and all(schema.field(column.name).equals(column) for column in rows.schema)
    if not is_known or (is_whole and len(rows.schema) < len(schema)):
        _log.warning("a telemetry segment of other columns is left out: %s", path)
        return None
    return rows


class Segments:
    """One folder of them, for one process at a time; `add` is cheap and everything else is for the thread."""

    def __init__(self, folder: Path, max_bytes: int, max_age_s: float, segment_rows: int) -> None:
        self._folder, self._segment_rows = folder, segment_rows
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._new: dict[str, deque[pa.RecordBatch]] = defaultdict(deque)
        self._new_rows: Counter[str] = Counter()
        self._new_bytes: Counter[str] = Counter()
        self._open: dict[str, pa.Table] = {}
        self._opened: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._refused: set[str] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.rows_written = self.write_errors = self.rows_lost = 0
        self._said_at = -_QUIET_S

    def start(self, flush_s: float) -> None:
        """Flush every so often, until `stop`."""

        def run() -> None:
            while not self._stop.wait(flush_s):
                self.flush()

        self._thread = threading.Thread(target=run, name="lltm-segments", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write the rest and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def add(self, kind: str, rows: pa.RecordBatch) -> None:
        """Have rows written with the next flush; nothing after `stop`."""
        with self._lock:
            if not self._stop.is_set():
                self._new[kind].append(rows)
                self._new_rows[kind] += len(rows)
                self._new_bytes[kind] += rows.nbytes
                self._shrink(kind)

    def _shrink(self, kind: str) -> None:
        new = self._new[kind]
        while len(new) > 1 and (self._new_rows[kind] > _MOST_NEW_ROWS or self._new_bytes[kind] > _SEGMENT_BYTES):
            oldest = new.popleft()
            self._new_rows[kind] -= len(oldest)
            self._new_bytes[kind] -= oldest.nbytes
            self.rows_lost += len(oldest)

    def flush(self) -> None:
        """Write what is new, then delete what is too old or too much. A disk that refuses is tried again next time."""
        with self._writing:
            self._attempt(self._prepare)
            for kind in SCHEMAS:
                self._take_in(kind)
                if self._attempt(partial(self._flush, kind)):
                    self._refused.discard(kind)
                else:
                    self._refused.add(kind)
            self._attempt(self._retain)

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Each on its own: what the disk refuses of one kind must not keep the others in memory."""
        try:
            work()
        except (OSError, pa.ArrowException) as error:
            self._complain(error)
            return False
        return True

    def _prepare(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._refused:  # it may be full
            self._retain()

    def _take_in(self, kind: str) -> None:
        with self._lock:
            new = self._new.pop(kind, ())
            self._new_rows[kind] = self._new_bytes[kind] = 0
        if new:
            old = self._open[kind].to_batches() if kind in self._open else []
            # combined by a copy: small batches, and shared memory that they came in, are let go
            self._open[kind] = pa.Table.from_batches([*old, *new]).combine_chunks()
            self._waiting[kind] += sum(map(len, new))
            self._opened.setdefault(kind, time.monotonic())
        if kind in self._refused:
            self._bound(kind)

    def _flush(self, kind: str) -> None:
        if self._waiting[kind]:
            self._write(kind, self._open[kind])
            self.rows_written += self._waiting.pop(kind)
        if kind in self._open and self._is_full(kind):
            del self._open[kind], self._opened[kind]

    def _bound(self, kind: str) -> None:
        """Keep only so much of what a refusing disk has not taken; what it has taken is in a segment of its own."""
        rows, waiting = self._open[kind], self._waiting[kind]
        if len(rows) > 2 * self._segment_rows or rows.nbytes > 2 * _SEGMENT_BYTES:
            kept = min(waiting, self._segment_rows, len(rows) * _SEGMENT_BYTES // rows.nbytes)
            self._open[kind], self._waiting[kind] = rows.slice(len(rows) - kept), kept
            with self._lock:
                self.rows_lost += waiting - kept

    def _is_full(self, kind: str) -> bool:
        rows, open_s = self._open[kind], time.monotonic() - self._opened[kind]
        return len(rows) >= self._segment_rows or rows.nbytes >= _SEGMENT_BYTES or open_s > _OPEN_S

    def _path(self, kind: str, rows: pa.Table) -> Path:
        return self._folder / f"{kind}-{rows.column(SEQUENCE)[0].as_py():020d}.parquet"

    def _write(self, kind: str, rows: pa.Table) -> None:
        path = self._path(kind, rows)
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                pq.write_table(rows, file, compression="zstd")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)  # half of one on a full disk

    def _complain(self, error: Exception) -> None:
        self.write_errors += 1
        if time.monotonic() - self._said_at >= _QUIET_S:
            self._said_at = time.monotonic()
            _log.warning("telemetry cannot write to %s: %s", self._folder, error)

    def _retain(self) -> None:
        still_open = {self._path(kind, rows) for kind, rows in self._open.items()}
        oldest_first = sorted((status.st_mtime, status.st_size, path) for path, status in _files(self._folder))
        total = sum(size for _, size, _ in oldest_first)
        for written_at, size, path in oldest_first:
            is_old = written_at < time.time() - self._max_age_s
            if (is_old or total > self._max_bytes) and path not in still_open:
                path.unlink(missing_ok=True)
                total -= size

    def read_newest(self, max_rows: int) -> dict[str, list[pa.RecordBatch]]:
        """What an earlier process wrote: of each kind the newest segments that make up `max_rows`, in order."""
        try:
            for draft in self._folder.glob("*.draft"):
                if _NAME.match(draft.with_suffix(".parquet").name):  # what a kill left
                    draft.unlink()
            newest_first = sorted((path for path, _ in _files(self._folder)), reverse=True)
        except OSError as error:
            self._complain(error)
            return {}
        found: dict[str, list[pa.RecordBatch]] = defaultdict(list)
        for path in newest_first:
            kind = _kind(path)
            if kind in SCHEMAS and sum(map(len, found[kind])) < max_rows:
                found[kind][:0] = self._read(path, SCHEMAS[kind].append(pa.field(SEQUENCE, pa.int64())))
        return found

    def _read(self, path: Path, schema: pa.Schema) -> list[pa.RecordBatch]:
        rows = _read_columns(path, schema, is_whole=True)
        batches: list[pa.RecordBatch] = [] if rows is None else rows.combine_chunks().to_batches()
        return batches

    def find(self, kind: str, column: str, value: str, within: range, until_s: float) -> Iterator[pa.RecordBatch]:
        """Rows of a kind that have a value, the newest segment's first; of any thread.

        Args:
            kind: name as in `batch.KINDS`.
            column: of text.
            value: in that column.
            within: sequence numbers; segments that hold none of them are not read.
            until_s: when to give up, as `time.monotonic` tells it.
        """
        newest_first = sorted((path for path, _ in _files(self._folder) if _kind(path) == kind), reverse=True)
        ends = [within.stop, *map(_first, newest_first)]
        for path, end in zip(newest_first, ends, strict=False):
            if time.monotonic() > until_s:
                return
            if _first(path) < within.stop and end > within.start:
                yield from self._read_where(path, SCHEMAS[kind], column, value)

    def _read_where(self, path: Path, schema: pa.Schema, column: str, value: str) -> list[pa.RecordBatch]:
        """Its one column alone tells whether to read the others, which are most of it."""
        named = _read_columns(path, pa.schema([schema.field(column)]))
        if named is None or not pc.any(pc.equal(named.column(0), value)).as_py():
            return []
        rows = self._read(path, schema.append(pa.field(SEQUENCE, pa.int64())))
        return [batch.filter(pc.equal(batch.column(column), value)) for batch in rows]

    def counts(self) -> dict[str, int]:
        """Rows written and given up, and how often the disk refused."""
        return {"written": self.rows_written, "lost": self.rows_lost, "write_errors": self.write_errors}
