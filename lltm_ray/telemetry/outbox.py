"""The bounded heap of rows that wait to be sent. Appending never blocks and never raises; what is lost is counted."""

from __future__ import annotations

import logging
from collections import Counter, deque
from typing import Any

import pyarrow as pa

from lltm_ray.telemetry.batch import KINDS, Batch, pack

_log = logging.getLogger(__name__)

BATCH_ROWS = 1000
"""Rows of one kind in a batch at most."""
_ATTEMPTS_EACH = 8
"""A request's attempts travel with it or before it, so that many of them at most for each request in a batch."""


class Outbox:
    """For one thread.

    Args:
        limit_rows: of each kind; beyond it the oldest are dropped.
    """

    def __init__(self, limit_rows: int = 20_000) -> None:
        self._limit_rows = limit_rows
        self._rows: dict[str, deque[tuple[Any, ...]]] = {kind: deque() for kind in KINDS}
        self.dropped: Counter[str] = Counter()
        """Rows lost here, by kind: no room, not sent in time, or not of their kind's types."""

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def add(self, kind: str, row: tuple[Any, ...]) -> None:
        """Note a row."""
        rows = self._rows[kind]
        if len(rows) >= self._limit_rows:
            rows.popleft()
            self.dropped[kind] += 1
        rows.append(row)

    def take(self) -> Batch:
        """The oldest rows, at most `BATCH_ROWS` of each kind; empty when there are none."""
        return {kind: self._pack(kind, rows) for kind, rows in self._rows.items() if rows}

    def lose(self, batch: Batch) -> None:
        """A batch that was taken did not arrive."""
        self.dropped.update({kind: columns.num_rows for kind, columns in batch.items()})

    def _pack(self, kind: str, rows: deque[tuple[Any, ...]]) -> pa.RecordBatch:
        most = BATCH_ROWS * _ATTEMPTS_EACH if kind == "attempts" else BATCH_ROWS
        taken = [rows.popleft() for _ in range(min(len(rows), most))]
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
