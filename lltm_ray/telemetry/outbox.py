"""The bounded heap of rows that wait to be sent. Appending never blocks and never raises; what is lost is counted.

Rows wait as they travel, pickled in small groups: objects that wait slow everything else down, for they fall out of the
processor's caches, and of bytes it is known how many there are.
"""

from __future__ import annotations

import logging
import pickle
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lltm_ray.telemetry.batch import Parcel, Sealed, seal
from lltm_ray.telemetry.rows import KINDS

_log = logging.getLogger(__name__)

BATCH_ROWS = 1000
"""Rows of one kind in a batch at most."""
_ATTEMPTS_EACH = 8
"""A request's attempts travel with it or before it, so that many of them at most for each request in a batch."""
_BATCH_BYTES = 2**20
"""Of one kind: with captured content a thousand rows are tens of megabytes."""
_MOST_LATER = 32
"""Makers of rows that wait; what they hold is in memory, and more at once would hold up the event loop."""


class _Group(NamedTuple):
    """Rows that were made together."""

    rows: int
    pickled: bytes


class Outbox:
    """For one thread.

    Args:
        limit_rows: of each kind; beyond it the oldest are dropped.
        limit_bytes: of all kinds; beyond it the oldest of the kind that has most of them are dropped.
    """

    def __init__(self, limit_rows: int = 20_000, limit_bytes: int = 64 * 2**20) -> None:
        self._limit_rows, self._limit_bytes = limit_rows, limit_bytes
        self._later: list[Callable[[], None]] = []
        self._made: dict[str, list[tuple[Any, ...]]] | None = None
        self._groups: dict[str, deque[_Group]] = {kind: deque() for kind in KINDS}
        self._rows, self._bytes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        self._all_bytes = 0
        self.dropped: Counter[str] = Counter()
        """Rows lost here, by kind: no room, not sent in time, or nothing that can be sent."""

    def __len__(self) -> int:
        return len(self._later) + sum(self._rows.values())

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
        if self._made is None:
            self._keep(kind, (row,))
        else:
            self._made.setdefault(kind, []).append(row)

    def _make(self) -> None:
        making, self._later, self._made = self._later, [], {}
        for make in making:
            make()
        made, self._made = self._made, None
        for kind, rows in made.items():
            self._keep(kind, rows)

    def _keep(self, kind: str, rows: Sequence[tuple[Any, ...]]) -> None:
        try:
            group = _Group(len(rows), pickle.dumps([tuple(row) for row in rows], pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # noqa: BLE001 - border: a value of any type
            if len(rows) > 1:
                for row in rows:
                    self._keep(kind, (row,))
                return
            self.dropped[kind] += 1
            _log.warning("a row of %s is dropped: %s", kind, type(error).__name__)
            return
        self._groups[kind].append(group)
        self._weigh_in(kind, group, 1)
        while self._rows[kind] > self._limit_rows:
            self._drop(kind)
        while self._all_bytes > self._limit_bytes:
            self._drop(max(self._bytes, key=self._bytes.__getitem__))

    def _weigh_in(self, kind: str, group: _Group, sign: int) -> None:
        size = sign * len(group.pickled)
        self._rows[kind] += sign * group.rows
        self._bytes[kind] += size
        self._all_bytes += size

    def _pop(self, kind: str) -> _Group:
        group = self._groups[kind].popleft()
        self._weigh_in(kind, group, -1)
        return group

    def _drop(self, kind: str) -> None:
        self.dropped[kind] += self._pop(kind).rows

    def take(self) -> Parcel:
        """The oldest rows, some `BATCH_ROWS` and 1 MiB of each kind at most; empty when there are none."""
        self._make()
        return {kind: self._take(kind) for kind, groups in self._groups.items() if groups}

    def lose(self, parcel: Parcel) -> None:
        """A parcel that was taken did not arrive."""
        self.dropped.update({kind: part.rows for kind, part in parcel.items()})

    def _take(self, kind: str) -> Sealed:
        groups, count, size = self._groups[kind], 0, 0
        taken: list[bytes] = []
        most = BATCH_ROWS * _ATTEMPTS_EACH if kind == "attempts" else BATCH_ROWS
        while groups and size <= _BATCH_BYTES and (not count or count + groups[0].rows <= most):
            group = self._pop(kind)
            taken.append(group.pickled)
            count, size = count + group.rows, size + len(group.pickled)
        return seal(count, taken)
