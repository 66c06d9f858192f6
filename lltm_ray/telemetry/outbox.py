"""The bounded heap of rows that wait to be sent. Appending never blocks and never raises; what is lost is counted."""

from __future__ import annotations

import logging
from collections import Counter, deque
from sys import getsizeof
from typing import Any

import pyarrow as pa

from lltm_ray.telemetry.batch import KINDS, Batch, pack

_log = logging.getLogger(__name__)

BATCH_ROWS = 1000
"""Rows of one kind in a batch at most."""
_ATTEMPTS_EACH = 8
"""A request's attempts travel with it or before it, so that many of them at most for each request in a batch."""
_BATCH_BYTES = 2**20
"""Of one kind that has texts, as Python holds them: with captured content a thousand rows are tens of megabytes."""
_WEIGHED = ("requests", "spans", "logs")
"""Kinds that have texts of any length."""


class Outbox:
    """For one thread.

    Args:
        limit_rows: of each kind; beyond it the oldest are dropped.
        limit_bytes: of all kinds that have texts; beyond it the oldest of the kind that has most of them are dropped.
    """

    def __init__(self, limit_rows: int = 20_000, limit_bytes: int = 64 * 2**20) -> None:
        self._limit_rows, self._limit_bytes = limit_rows, limit_bytes
        self._sizes: dict[str, deque[int]] = {kind: deque() for kind in _WEIGHED}
        self._bytes = dict.fromkeys(_WEIGHED, 0)
        self._rows: dict[str, deque[tuple[Any, ...]]] = {kind: deque() for kind in KINDS}
        self.dropped: Counter[str] = Counter()
        """Rows lost here, by kind: no room, not sent in time, or not of their kind's types."""

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def add(self, kind: str, row: tuple[Any, ...]) -> None:
        """Note a row."""
        rows = self._rows[kind]
        if len(rows) >= self._limit_rows:
            self._drop(kind)
        rows.append(row)
        if kind in self._sizes:
            size = sum(map(getsizeof, row))
            self._sizes[kind].append(size)
            self._bytes[kind] += size
            while sum(self._bytes.values()) > self._limit_bytes:
                self._drop(max(_WEIGHED, key=self._bytes.__getitem__))

    def _drop(self, kind: str) -> None:
        self._pop(kind)
        self.dropped[kind] += 1

    def _pop(self, kind: str) -> tuple[Any, ...]:
        if kind in self._sizes:
            self._bytes[kind] -= self._sizes[kind].popleft()
        return self._rows[kind].popleft()

    def take(self) -> Batch:
        """The oldest rows, at most `BATCH_ROWS` and some 1 MiB of each kind; empty when there are none."""
        return {kind: self._pack(kind) for kind, rows in self._rows.items() if rows}

    def lose(self, batch: Batch) -> None:
        """A batch that was taken did not arrive."""
        self.dropped.update({kind: columns.num_rows for kind, columns in batch.items()})

    def _take(self, kind: str) -> list[tuple[Any, ...]]:
        most = BATCH_ROWS * _ATTEMPTS_EACH if kind == "attempts" else BATCH_ROWS
        least_left = self._bytes.get(kind, 0) - _BATCH_BYTES
        taken: list[tuple[Any, ...]] = []
        while self._rows[kind] and len(taken) < most and self._bytes.get(kind, 0) >= least_left:
            taken.append(self._pop(kind))
        return taken

    def _pack(self, kind: str) -> pa.RecordBatch:
        taken = self._take(kind)
        try:
            return pack(kind, taken)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError, ValueError) as error:
            _log.warning("some rows of %s are dropped: %s", kind, error)
        return pack(kind, [row for row in taken if self._is_sound(kind, row)])

    def _is_sound(self, kind: str, row: tuple[Any, ...]) -> bool:
        try:
            pack(kind, [row])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError, ValueError):
            self.dropped[kind] += 1
            return False
        return True
