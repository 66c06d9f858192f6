"""What the router's table and queues are made of: rows, claims on their slots, and those who wait for one.

Waiting is limited per model, so that a model that is down cannot take the places of a healthy one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.routing.policy import EngineView

LATE_DETAIL = "no heartbeat"
"""How the directory's `detail` of an engine begins that failed only by its silence: it may be back within seconds."""


@dataclass(slots=True)
class Row(EngineView):
    """One server's life in the table. A restarted server gets a new row, so old claims die with the old one."""

    info: EngineInfo = field(kw_only=True)
    suspicions: int = 0
    """Failed connections whose cool-down is not over."""
    listed: bool = True

    @property
    def identity(self) -> tuple[str, int | None]:
        """What a restart changes."""
        return identity(self.info)


@dataclass(slots=True, eq=False)
class Lease:
    """A claimed slot. Give it back with `Router.release`, in a `finally`."""

    engine: EngineInfo
    model: str
    claimed_at: float
    row: Row = field(repr=False)
    released: bool = False


@dataclass(slots=True, eq=False)
class Waiter:
    """A request in a queue; `exclude` is a preference, `only` a demand."""

    model: str
    only: str | None
    exclude: frozenset[str]
    grant: asyncio.Future[Lease]
    queued: bool = True


class Queues:
    """A FIFO queue for each model that has waiters.

    Args:
        limit: most waiters of one model.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queues: dict[str, deque[Waiter]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def models(self) -> tuple[str, ...]:
        """Models that somebody waits for."""
        return tuple(self._queues)

    def of(self, model: str) -> tuple[Waiter, ...]:
        """A model's waiters in the order they came; a copy, so they may leave meanwhile."""
        return tuple(self._queues.get(model, ()))

    def count(self, model: str) -> int:
        """How many wait for a model."""
        return len(self._queues.get(model, ()))

    def is_full(self, model: str) -> bool:
        """Whether a model takes no more waiters."""
        return self.count(model) >= self._limit

    def join(self, waiter: Waiter) -> None:
        """Stand at the end."""
        self._queues.setdefault(waiter.model, deque()).append(waiter)

    def leave(self, waiter: Waiter) -> None:
        """Wait no more; a second time does nothing."""
        if not waiter.queued:
            return
        waiter.queued = False
        queue = self._queues[waiter.model]
        queue.remove(waiter)
        if not queue:
            del self._queues[waiter.model]


def identity(info: EngineInfo) -> tuple[str, int | None]:
    """What tells one server's life from the next one's."""
    return info.url, info.server_pid


def is_hopeless(rows: Iterable[Row]) -> bool:
    """Whether waiting is in vain: there is no engine, or all failed, and not just by a missed heartbeat."""
    return all(row.info.state is EngineState.FAILED and not row.info.detail.startswith(LATE_DETAIL) for row in rows)


def describe(rows: Iterable[Row]) -> str:
    """Why none of these engines can be used now, for people."""
    return ", ".join(f"{row.name} is {_trouble(row)}" for row in rows) or "it left the fleet"


def _trouble(row: Row) -> str:
    if row.info.state is not EngineState.READY:
        return str(row.info.state)
    if row.suspicions:
        return "ready but did not answer just now"
    return "ready" if row.slots_total else "ready but has no slots"
