"""The bounded heap of rows that wait to be sent. Appending does no I/O and never raises; what is lost is counted.

Rows wait as they travel, pickled in small groups: objects that wait slow everything else down, for they fall out of the
processor's caches, and of bytes it is known how many there are.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from lltm_ray.telemetry.parcel import Group, Parcel, Row, Sealed, group, seal
from lltm_ray.telemetry.rows import KINDS

Make = Callable[[], Iterable[tuple[str, Row]]]
"""Rows and their kinds, made when they are asked for."""

_log = logging.getLogger(__name__)

BATCH_ROWS = 1000
"""Rows of one kind in a parcel at most; of attempts all, so that they travel with their request or before it."""
_BATCH_BYTES = 2**20
"""Of one kind: with captured content a thousand rows are tens of megabytes."""
_MOST_LATER = 32
"""Makers of rows that wait; what they hold is in memory, and more at once would hold up the event loop."""


class Outbox:
    """For any thread; makers are called in the one that takes, or asks for the last of a group.

    Args:
        limit_rows: of each kind; beyond it the oldest are dropped, with those that were noted together with them.
        limit_bytes: of all kinds; beyond it the oldest of the kind that has most of them are dropped.
    """

    def __init__(self, limit_rows: int = 20_000, limit_bytes: int = 64 * 2**20) -> None:
        self._limit_rows, self._limit_bytes = limit_rows, limit_bytes
        self._lock = threading.RLock()
        self._later: list[Make] = []
        self._groups: dict[str, deque[Group]] = {kind: deque() for kind in KINDS}
        self._rows, self._bytes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        self._all_bytes = 0
        self.dropped: Counter[str] = Counter()
        """Rows lost here, by kind: no room, not sent in time, or nothing that can be sent."""

    def __len__(self) -> int:
        return len(self._later) + sum(self._rows.values())

    def later(self, make: Make) -> None:
        """Have rows made with others in one go, which costs less than each at its own moment.

        Args:
            make: called before the next parcel at the latest; must not raise.
        """
        self._later.append(make)
        if len(self._later) >= _MOST_LATER:
            self._make()

    def add(self, kind: str, row: Row) -> None:
        """Note a row."""
        with self._lock:
            self._keep(kind, (row,))

    def _make(self) -> None:
        with self._lock:
            making, self._later = self._later, []
            made: dict[str, list[Row]] = {}
            try:
                for make in making:
                    for kind, row in make():
                        made.setdefault(kind, []).append(row)
            finally:
                for kind, rows in made.items():
                    self._keep(kind, rows)

    def _keep(self, kind: str, rows: Sequence[Row]) -> None:
        try:
            noted = group(rows)
        except Exception as error:  # noqa: BLE001 - border: a value of any type
            if len(rows) > 1:
                for row in rows:
                    self._keep(kind, (row,))
                return
            self.dropped[kind] += 1
            _log.warning("a row of %s is dropped: %s", kind, type(error).__name__)
            return
        if noted.rows > self._limit_rows or len(noted.pickled) > self._limit_bytes:
            self.dropped[kind] += noted.rows
            return
        self._groups[kind].append(noted)
        self._weigh_in(kind, noted, 1)
        while self._rows[kind] > self._limit_rows:
            self._drop(kind)
        while self._all_bytes > self._limit_bytes:
            self._drop(max(self._bytes, key=self._bytes.__getitem__))

    def _weigh_in(self, kind: str, noted: Group, sign: int) -> None:
        size = sign * len(noted.pickled)
        self._rows[kind] += sign * noted.rows
        self._bytes[kind] += size
        self._all_bytes += size

    def _pop(self, kind: str) -> Group:
        noted = self._groups[kind].popleft()
        self._weigh_in(kind, noted, -1)
        return noted

    def _drop(self, kind: str) -> None:
        self.dropped[kind] += self._pop(kind).rows

    def take(self) -> Parcel:
        """The oldest rows, some `BATCH_ROWS` and 1 MiB of each kind at most; empty when there are none."""
        with self._lock:
            self._make()
            return {kind: self._take(kind) for kind, groups in self._groups.items() if groups}

    def lose(self, parcel: Parcel) -> None:
        """A parcel that was taken did not arrive."""
        with self._lock:
            self.dropped.update({kind: part.rows for kind, part in parcel.items()})

    def _take(self, kind: str) -> Sealed:
        groups, is_all = self._groups[kind], kind == "attempts"
        taken = [self._pop(kind)]
        rows, size = taken[0].rows, len(taken[0].pickled)
        while groups and (is_all or (size <= _BATCH_BYTES and rows + groups[0].rows <= BATCH_ROWS)):
            taken.append(self._pop(kind))
            rows, size = rows + taken[-1].rows, size + len(taken[-1].pickled)
        return seal(taken)
