"""Who may wait for a slot of one model, and who is told at once to come back later.

llama-server takes every request and lets it wait in a queue without bounds, order or fairness. So requests wait here
instead (in the order of `routing.fairness`), and an engine gets no more of them than it has slots. The room is bounded
in places and in time: a ticket that cannot begin before its deadline is refused when it comes, by a predicted wait
with a margin learnt from how wrong such predictions were, or as soon as it shows. A low priority may be overtaken for
ever by design; its deadlines end that.

The margin costs a tenant with much to wait for nothing, as its next request is let in instead. It would shut out one
that asks for little in a hurry, whose turn is next. So who has little of what waits is let in without a margin as long
as misses are rare: what is promised leaves room for one in a hundred, and those who wait with a margin hardly use it.

Pure: no clock, no I/O; all times are monotonic seconds that are passed in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from heapq import heapify, heappop, heappush
from math import inf, isfinite, sqrt
from typing import Any, Generic, TypeVar

from lltm_ray.routing.admission.fairness import PRIORITIES, FairQueue, Ticket

__all__ = ["PRIORITIES", "Admission", "Capacity", "Overload", "Reason", "Ticket"]

RETRY_S = (1.0, 600.0)
"""Least and longest advice to come back."""
_MARGINS = (3.0, 5.0, 10.0)
"""Mean absolute deviations above the predicted wait: least, first, most. Of a normal distribution the 99th percentile
is at 2.9, but waits have longer tails, so it is learnt."""
_MISSES = 0.0025
"""Share of admitted tickets that may turn out too late; a quarter of what is promised, as the learning lags. Caution
costs no throughput: it shortens a queue that is never empty under load."""
_MARGIN_STEP = 0.5
"""What the margin gains by a miss; it loses `_MISSES` of that by each wait that ends in time."""
_WEIGHT = 0.05
"""Weight of the newest wait in what is learnt: the last 40 or so decide."""
_RATIOS = (0.1, 10.0)
"""Bounds of actual / predicted, so that one stalled engine does not close the door for hours."""
_MOST_DEVIATION = 10.0
"""What one wait may stray at most, for the same reason."""
_CREDIT = (-0.5, 2.0)
"""Bounds of the misses that tickets without a margin may still cause. A stall causes many at once, which shall not shut
them out for long."""
_EARNED = 0.0075
"""What each ticket with a deadline adds to it by getting its slot, so that late answers stay below one in a hundred."""
_EXPIRY_COST = 0.5
"""What an expiry takes from it; a late answer, which is worse than a late refusal, takes 1."""

T = TypeVar("T")


class Reason(StrEnum):
    """Why a ticket has to go."""

    FULL = "full"
    DEADLINE = "deadline"
    EVICTED = "evicted"
    EXPIRED = "expired"


_WHY = {
    Reason.FULL: "every slot is busy and the queue is full",
    Reason.DEADLINE: "the answer could not begin before its deadline",
    Reason.EVICTED: "the queue is full and requests with a better claim came",
    Reason.EXPIRED: "the answer can no longer begin before its deadline",
}


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a model's ready engines can do together. Without slots or a rate, waits are unknown and nobody is judged."""

    slots: int
    tokens_s: float
    """Tokens per second, as `cost_tokens` counts them, when all slots are busy."""
    service_s: float
    """Mean seconds that a request holds a slot."""
    service_dev_s: float
    """Mean absolute deviation of the same; the margin starts from it."""
    free_slots: int = 0

    @property
    def unit_s(self) -> float:
        """Seconds until the next slot comes free when all are busy."""
        return self.service_s / max(1, self.slots)


@dataclass(frozen=True, slots=True)
class Overload(Generic[T]):
    """One ticket that has to be refused now; it is not in the queue, or no longer."""

    ticket: Ticket[T]
    reason: Reason
    retry_after_s: float
    predicted_wait_s: float
    """With its margin; infinite when no engine is ready."""

    @property
    def why(self) -> str:
        """For people."""
        return _WHY[self.reason]


class Admission(Generic[T]):
    """The waiting room of one model.

    Args:
        limit: most tickets that wait; 0 lets nobody wait.
        weights: shares of tenants relative to 1, which is everybody else's.

    Raises:
        ConfigError: a weight that is not above 0.
    """

    def __init__(self, limit: int, *, weights: Mapping[str, float] | None = None) -> None:
        self._limit = limit
        self._queue: FairQueue[T] = FairQueue(weights or {})
        self._expiry: list[tuple[float, int, Ticket[T]]] = []
        self._correction = _Correction()
        self._capacity = Capacity(0, 0.0, 0.0, 0.0)
        self._credit = 1.0
        self._rejected: Counter[Reason] = Counter()
        self._returning = 0
        """Who was told to come back for a place, less the places that came free since: a herd is spread by it.
        It is over when somebody gets a slot at once while nobody waits."""

    # --- coming and going

    def push(self, ticket: Ticket[T], now_s: float, capacity: Capacity) -> Overload[T] | None:
        """Let a ticket wait, or say who has to go for it.

        A full queue takes a newcomer whose turn is not the last one, and puts out who is last; so no tenant can lock
        the others out.

        Args:
            ticket: one that does not wait yet.
            now_s: the time.
            capacity: of all ready engines of the model.

        Returns:
            None; or the newcomer's refusal (`Reason.DEADLINE`, `Reason.FULL`; it is not queued); or that of another
            ticket, which made room (`Reason.EVICTED`; the newcomer is queued).
        """
        self._capacity = capacity
        ticket.pushed_s, ticket.unit_s, ticket.raw_s = now_s, capacity.unit_s, self._raw(ticket)
        wait_s, allowance_s = self._bound(ticket.raw_s), ticket.latest_s - now_s
        if (allowance_s <= 0 or allowance_s < wait_s < inf) and not self._may_try(ticket, now_s):
            if not self:
                self._correction.doubt()
            return self._refuse(ticket, Reason.DEADLINE, wait_s, wait_s - allowance_s)
        self._queue.add(ticket)
        last = self._queue.last() if self.count > self._limit else None
        if last is None:
            self._watch(ticket)
            return None
        self._queue.remove(last)
        if last is ticket:
            return self._refuse(last, Reason.FULL, wait_s, self._place_s())
        self._watch(ticket)
        self._correction.cut_short(last, now_s - last.pushed_s, missed=False)
        return self._refuse(last, Reason.EVICTED, self.predict(last, capacity), self._place_s())

    def take(self, ticket: Ticket[T], now_s: float) -> None:
        """A ticket gets its slot: charge its tenant. Also for one that never had to wait."""
        has_waited = ticket.queued
        if has_waited:
            self._correction.took(ticket, now_s - ticket.pushed_s)
        else:
            ticket.pushed_s = now_s
            self._queue.add(ticket)
        self._queue.charge(ticket)
        if ticket.deadline_s < inf:
            self._change_credit(_EARNED)
        is_calm = not has_waited and not self and self._limit > 0
        self._returning = 0 if is_calm else max(0, self._returning - 1)

    def began_late(self) -> None:
        """The answer to a ticket that got its slot began after its deadline."""
        self._change_credit(-1.0)

    def leave(self, ticket: Ticket[T]) -> None:
        """Its client is gone; a second time does nothing. Nothing is charged."""
        if ticket.queued:
            self._queue.remove(ticket)

    def settle(self, tenant: str, planned_tokens: float, actual_tokens: float, *, priority: int = 0) -> None:
        """Put a charge right once the reply tells what it was.

        Args:
            tenant: whose.
            planned_tokens: the ticket's `cost_tokens`.
            actual_tokens: what was really computed and generated; 0 if it failed before anything was.
            priority: the ticket's.
        """
        self._queue.settle(tenant, actual_tokens - planned_tokens, priority)

    def expire(self, now_s: float) -> tuple[Overload[T], ...]:
        """Take out who could not begin in time even with a slot at once; each must be rejected now."""
        gone = []
        while self.next_expiry() <= now_s:
            ticket = heappop(self._expiry)[2]
            wait_s = self.predict(ticket, self._capacity)
            self._queue.remove(ticket)
            self._correction.cut_short(ticket, now_s - ticket.pushed_s, missed=True)
            self._change_credit(-_EXPIRY_COST)
            late_s = wait_s - (ticket.latest_s - ticket.pushed_s)
            gone.append(self._refuse(ticket, Reason.EXPIRED, wait_s, late_s))
        return tuple(gone)

    # --- reading

    def __bool__(self) -> bool:
        return self._queue.count > 0

    @property
    def count(self) -> int:
        """How many wait."""
        return self._queue.count

    def count_of(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return self._queue.count_of(tenant)

    def order(self) -> Iterator[Ticket[T]]:
        """Who waits, in order of service; good until the first change. The first costs O(tenants that wait)."""
        return self._queue.order()

    def next_expiry(self) -> float:
        """When to call `expire`; infinite if nobody who waits has a deadline."""
        while self._expiry and not _is_current(self._expiry[0]):
            heappop(self._expiry)
        return self._expiry[0][0] if self._expiry else inf

    def predict(self, ticket: Ticket[T], capacity: Capacity) -> float:
        """Seconds that a ticket, queued or not, still waits at most, 99 times of 100; infinite if unknown."""
        self._capacity = capacity
        return self._bound(self._raw(ticket))

    def snapshot(self) -> dict[str, Any]:
        """The state as JSON; counters are relative to the least of their class, `predicted_wait_s` a newcomer's."""
        newcomer: Ticket[Any] = Ticket(payload=None, arrived_s=0.0)
        wait_s = self._bound(self._raw(newcomer))
        return {
            "waiting": self.count,
            "tenants": [
                {
                    "tenant": lane.tenant,
                    "priority": priority,
                    "waiting": len(lane.entries),
                    "waiting_tokens": lane.tokens,
                    "counter_tokens": lane.counter - level,
                }
                for priority, level, lane in self._queue.lanes()
            ],
            "tenants_known": self._queue.known,
            "predicted_wait_s": wait_s if isfinite(wait_s) else None,
            "wait_ratio": self._correction.ratio,
            "wait_deviation": self._correction.deviation,
            "wait_margin": self._correction.margin,
            "miss_credit": self._credit,
            "rejected": {str(reason): self._rejected[reason] for reason in Reason if reason is not Reason.EVICTED},
            "evicted": self._rejected[Reason.EVICTED],
        }

    # --- inside

    def _raw(self, ticket: Ticket[T]) -> float:
        """Seconds until the tokens before a ticket are served and a slot is free, uncorrected."""
        capacity = self._capacity
        if capacity.slots <= 0 or capacity.tokens_s <= 0:
            return inf
        slot_s = 0.0 if capacity.free_slots else capacity.unit_s
        return self._queue.wait_s(ticket, capacity.tokens_s) + slot_s

    def _bound(self, raw_s: float) -> float:
        return self._correction.bound(raw_s, self._capacity) if raw_s < inf else inf

    def _may_try(self, ticket: Ticket[T], now_s: float) -> bool:
        """Whether to let one in that should begin in time, but not surely; it then waits as long as that holds."""
        if ticket.raw_s == inf or not self._queue.is_modest(ticket):
            return False
        expected_s = self._correction.ratio * ticket.raw_s + ticket.mean_lead_s
        if ticket.deadline_s - now_s <= expected_s:
            return False
        if self._credit <= 0:
            self._change_credit(_EARNED)  # where nobody else waits, nothing else would ever end this
            return False
        ticket.lead_s = ticket.mean_lead_s
        return True

    def _change_credit(self, change: float) -> None:
        self._credit = min(max(self._credit + change, _CREDIT[0]), _CREDIT[1])

    def _place_s(self) -> float:
        """When there is a place for the next one that a full queue turns away: each is told of another one."""
        self._returning += 1
        return self._returning * self._correction.ratio * self._capacity.unit_s

    def _refuse(self, ticket: Ticket[T], reason: Reason, wait_s: float, retry_s: float) -> Overload[T]:
        self._rejected[reason] += 1
        retry_s = retry_s if isfinite(retry_s) else self._capacity.unit_s
        return Overload(ticket, reason, min(max(retry_s, RETRY_S[0]), RETRY_S[1]), wait_s)

    def _watch(self, ticket: Ticket[T]) -> None:
        if ticket.deadline_s == inf:
            return
        if len(self._expiry) > 2 * self.count + 64:  # most are long gone
            self._expiry = [entry for entry in self._expiry if _is_current(entry)]
            heapify(self._expiry)
        heappush(self._expiry, (ticket.latest_s, ticket.key[2], ticket))


class _Correction:
    """How true predictions are: actual / predicted, how far the rest strays, and how much of that to allow for.

    The wait for k completions strays as sqrt(k), so deviations are measured in `sqrt(raw * unit)`: for independent
    services that is the standard deviation of a sum of raw / unit gaps between completions. The margin, in deviations,
    follows the misses themselves so that their share comes to `_MISSES` whatever the distribution is (Gibbs and Candès,
    "Adaptive Conformal Inference Under Distribution Shift", NeurIPS 2021).
    """

    def __init__(self) -> None:
        self.ratio = 1.0
        self.deviation: float | None = None
        self.margin = _MARGINS[1]

    def bound(self, raw_s: float, capacity: Capacity) -> float:
        """The wait that 99 of 100 stay below."""
        if self.deviation is None:
            self.deviation = capacity.service_dev_s / capacity.service_s if capacity.service_s > 0 else 1.0
        return self.ratio * raw_s + self.margin * self.deviation * sqrt(raw_s * capacity.unit_s)

    def took(self, ticket: Ticket[Any], waited_s: float) -> None:
        """A wait ended as it should. Pinned ones teach nothing: they wait for one engine, predictions are for all."""
        if ticket.only is None:
            self._learn(ticket, waited_s)
            if ticket.deadline_s < inf:
                self.margin = max(_MARGINS[0], self.margin - _MARGIN_STEP * _MISSES)

    def cut_short(self, ticket: Ticket[Any], waited_s: float, *, missed: bool) -> None:
        """A wait was given up; it tells something only if it was too long already, or `missed` its deadline."""
        if ticket.only is None:
            if waited_s > self.ratio * ticket.raw_s:
                self._learn(ticket, waited_s)
            if missed:
                self.margin = min(_MARGINS[2], self.margin + _MARGIN_STEP)

    def _learn(self, ticket: Ticket[Any], waited_s: float) -> None:
        raw_s, unit_s = ticket.raw_s, ticket.unit_s
        if not 0 < raw_s < inf or unit_s <= 0:
            return
        deviation = min(abs(waited_s - self.ratio * raw_s) / sqrt(raw_s * unit_s), _MOST_DEVIATION)
        self.deviation = deviation if self.deviation is None else _blend(self.deviation, deviation)
        self.ratio = _blend(self.ratio, min(max(waited_s / raw_s, _RATIOS[0]), _RATIOS[1]))

    def doubt(self) -> None:
        """Forget a little. For when even an empty queue would refuse: nobody will wait and teach us better."""
        self.ratio = _blend(self.ratio, min(1.0, self.ratio))
        self.margin = _blend(self.margin, _MARGINS[0])
        self.deviation = None if self.deviation is None else _blend(self.deviation, 0.0)


def _is_current(entry: tuple[float, int, Ticket[Any]]) -> bool:
    """Whether an expiry is of a ticket that still waits, and since the same push."""
    _, serial, ticket = entry
    return ticket.queued and ticket.key[2] == serial


def _blend(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
