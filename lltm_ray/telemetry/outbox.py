"""The bounded heap of rows that wait to be sent. Appending never blocks and never raises; what is lost is counted."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from operator import itemgetter
from sys import getsizeof
from typing import Any

import pyarrow as pa

from lltm_ray.telemetry.batch import KINDS, SCHEMAS, Batch, pack

_log = logging.getLogger(__name__)

BATCH_ROWS = 1000
"""Rows of one kind in a batch at most."""
_ATTEMPTS_EACH = 8
"""A request's attempts travel with it or before it, so that many of them at most for each request in a batch."""
_BATCH_BYTES = 2**20
"""Of one kind that has texts, as Python holds them: with captured content a thousand rows are tens of megabytes."""
_MOST_LATER = 32
"""Makers of rows that wait; what they hold is in memory, and more at once would hold up the event loop."""
_OWN_BYTES = 960
"""What a request's row costs besides its long texts: the tuple, its numbers, names and ids, which are cut."""
_LONG = ("error", "parameters", "content")
"""A request's texts that may be long; of other kinds that are weighed any may."""


def _texts(kind: str) -> Callable[[tuple[Any, ...]], tuple[str, ...]]:
    names = _LONG if kind == "requests" else [each.name for each in SCHEMAS[kind] if each.type == pa.string()]
    return itemgetter(*map(SCHEMAS[kind].get_field_index, names))


_WEIGHED = {"requests": (_OWN_BYTES, _texts("requests")), "spans": (0, _texts("spans")), "logs": (0, _texts("logs"))}
"""Kinds that have texts of any length: what a row costs without them, and what takes them."""


class Outbox:
    """For one thread.

    Args:
        limit_rows: of each kind; beyond it the oldest are dropped.
        limit_bytes: of all kinds that have texts; beyond it the oldest of the kind that has most of them are dropped.
    """

    def __init__(self, limit_rows: int = 20_000, limit_bytes: int = 64 * 2**20) -> None:
        self._limit_rows, self._limit_bytes = limit_rows, limit_bytes
        self._later: list[Callable[[], None]] = []
        self._bytes = dict.fromkeys(_WEIGHED, 0)
        self._all_bytes = 0
        self._rows: dict[str, deque[tuple[int, tuple[Any, ...]]]] = {kind: deque() for kind in KINDS}
        self.dropped: Counter[str] = Counter()
        """Rows lost here, by kind: no room, not sent in time, or not of their kind's types."""

    def __len__(self) -> int:
        return len(self._later) + sum(map(len, self._rows.values()))

    def later(self, make: Callable[[], None]) -> None:
        """Have rows made with others in one go, which costs less than each at its own moment.

        Args:
            make: adds them; called before the next batch at the latest, and must not raise.
        """
        self._later.append(make)
        if len(self._later) >= _MOST_LATER:
            self._make()

    def add(self, kind: str, row: tuple[Any, ...]) -> None:
        """Note a row."""
        rows = self._rows[kind]
        if len(rows) >= self._limit_rows:
            self._drop(kind)
        weighed = _WEIGHED.get(kind)
        if weighed is None:
            rows.append((0, row))
            return
        size = _weigh(*weighed, row)
        rows.append((size, row))
        self._weigh_in(kind, size)
        while self._all_bytes > self._limit_bytes:
            self._drop(max(self._bytes, key=self._bytes.__getitem__))

    def _make(self) -> None:
        making, self._later = self._later, []
        for make in making:
            make()

    def _weigh_in(self, kind: str, size: int) -> None:
        if size:
            self._bytes[kind] += size
            self._all_bytes += size

    def _drop(self, kind: str) -> None:
        self._weigh_in(kind, -self._rows[kind].popleft()[0])
        self.dropped[kind] += 1

    def take(self) -> Batch:
        """The oldest rows, at most `BATCH_ROWS` and some 1 MiB of each kind; empty when there are none."""
        self._make()
        return {kind: self._pack(kind) for kind, rows in self._rows.items() if rows}

    def lose(self, batch: Batch) -> None:
        """A batch that was taken did not arrive."""
        self.dropped.update({kind: columns.num_rows for kind, columns in batch.items()})

    def _take(self, kind: str) -> list[tuple[Any, ...]]:
        rows, size = self._rows[kind], 0
        taken: list[tuple[Any, ...]] = []
        most = BATCH_ROWS * _ATTEMPTS_EACH if kind == "attempts" else BATCH_ROWS
        while rows and len(taken) < most and size <= _BATCH_BYTES:
            weight, row = rows.popleft()
            taken.append(row)
            size += weight
        self._weigh_in(kind, -size)
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


def _weigh(own_bytes: int, texts: Callable[[tuple[Any, ...]], tuple[str, ...]], row: tuple[Any, ...]) -> int:
    try:
        return sum(map(str.__sizeof__, texts(row)), own_bytes)
    except (TypeError, IndexError):  # it will be found when it is packed
        return sum(map(getsizeof, row))
