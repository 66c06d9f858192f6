"""The order in which those who wait for one model are served: by priority, fair between tenants, by deadline.

1. Higher priority first, strictly.
2. Between tenants of a priority, fair by tokens: the Virtual Token Counter of Sheng et al., "Fairness in Serving Large
   Language Models" (OSDI 2024). A tenant's counter grows by the tokens served to it over its weight; the least counter
   is next; a tenant that comes back from idle is lifted to the least counter of those who wait, so nobody saves up.
   Tokens are charged when a ticket is taken, as planned, and put right when the reply tells the actual ones: of two
   tenants that always wait, neither gets ahead by more than one request.
3. Within a tenant the earliest deadline first, then the earliest arrival.

Pure: no clock, no I/O.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace, nsmallest
from math import exp, inf, isfinite, isnan
from typing import Any, Generic, TypeVar

from lltm_ray.errors import ConfigError

__all__ = ["PRIORITIES", "FairQueue", "Lane", "Ticket"]

PRIORITIES = range(-10, 11)
MAX_TENANTS = 10_000
"""Tenants remembered at most, those who wait apart; who is forgotten starts again at the least counter."""
RATE_S = 3.0
"""Seconds over which a tenant's arrivals are averaged."""

PASSES = 2
"""Of the wait and who will have come by its end; a third changes little."""

T = TypeVar("T")
Key = tuple[float, float, int]
"""Deadline, arrival, serial number: the order within a tenant."""


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket(Generic[T]):
    """A request that wants a slot.

    Raises:
        ConfigError: a field that no order can be made of.
    """

    payload: T
    arrived_s: float
    tenant: str = ""
    """Anonymous clients are one tenant, the empty one."""
    priority: int = 0
    """-10 to 10, higher first."""
    deadline_s: float = inf
    """When its answer must have begun."""
    lead_s: float = 0.0
    """Seconds from the slot to the first byte, on the safe side."""
    mean_lead_s: float = inf
    """The same on average, at most `lead_s`."""
    cost_tokens: float = 1.0
    """Uncached prompt tokens + expected output tokens; less than one counts as one."""
    only: str | None = None
    """Name of the engine it is pinned to."""
    queued: bool = field(default=False, init=False)
    # What the waiting room notes on it:
    key: Key = field(default=(inf, inf, 0), init=False, repr=False)
    pushed_s: float = field(default=0.0, init=False, repr=False)
    raw_s: float = field(default=0.0, init=False, repr=False)
    unit_s: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.priority not in PRIORITIES:
            raise ConfigError("priority", self.priority, f"must be from {PRIORITIES[0]} to {PRIORITIES[-1]}")
        if isnan(self.deadline_s):
            raise ConfigError("deadline_s", self.deadline_s, "must be a time, or infinite for none")
        if not (isfinite(self.cost_tokens) and isfinite(self.lead_s) and isfinite(self.arrived_s)):
            values = (self.cost_tokens, self.lead_s, self.arrived_s)
            raise ConfigError("cost_tokens, lead_s, arrived_s", values, "must be finite")
        self.cost_tokens = max(1.0, self.cost_tokens)
        self.mean_lead_s = min(self.lead_s, self.mean_lead_s)

    @property
    def latest_s(self) -> float:
        """When it must have its slot."""
        return self.deadline_s - max(0.0, self.lead_s)


class Lane(Generic[T]):
    """A tenant's tickets of one priority."""

    __slots__ = ("counter", "entries", "lifted", "rate", "rated_s", "serial", "tenant", "tokens", "weight")

    def __init__(self, tenant: str, weight: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.counter = 0.0
        self.lifted = 0.0
        """The counter it last came back with; refunds of earlier charges do not go below it."""
        self.serial = 0
        """Settles equal counters: who has waited longer without a break."""
        self.tokens = 0.0
        self.rate = 0.0
        """Tokens per second that came lately, as of `rated_s`."""
        self.rated_s = -inf
        self.entries: list[tuple[Key, Ticket[T]]] = []

    def before(self, key: Key) -> float:
        """Waiting tokens of this tenant that go before a key."""
        entries = self.entries
        at = bisect_left(entries, key, key=_key_of)
        if 2 * at > len(entries):
            return self.tokens - sum(ticket.cost_tokens for _, ticket in entries[at:])
        return sum(ticket.cost_tokens for _, ticket in entries[:at])

    def add(self, ticket: Ticket[T]) -> None:
        """Queue in order of deadline."""
        insort(self.entries, (ticket.key, ticket), key=_key_of)
        self.tokens += ticket.cost_tokens
        self.rate *= exp(min(0.0, self.rated_s - ticket.pushed_s) / RATE_S)
        self.rate += ticket.cost_tokens / RATE_S
        self.rated_s = ticket.pushed_s

    def remove(self, ticket: Ticket[T]) -> None:
        """Take one out, wherever it stands."""
        del self.entries[bisect_left(self.entries, ticket.key, key=_key_of)]
        self.tokens = self.tokens - ticket.cost_tokens if self.entries else 0.0

    @property
    def end(self) -> tuple[float, int]:
        """Where in the class's order its last ticket stands."""
        return self.counter + (self.tokens - self.entries[-1][1].cost_tokens) / self.weight, self.serial


class PriorityClass(Generic[T]):
    """The tenants of one priority: all that are remembered, and those who wait."""

    __slots__ = ("active", "lanes", "last")

    def __init__(self) -> None:
        self.lanes: dict[str, Lane[T]] = {}
        self.active: dict[str, Lane[T]] = {}
        self.last: Lane[T] | None = None

    def level(self) -> float:
        """Where who comes from idle starts: the least counter of those who wait, or that of the last who did."""
        if self.active:
            return min([lane.counter for lane in self.active.values()])
        return self.last.counter if self.last else 0.0

    def counter_of(self, tenant: str) -> float:
        """A tenant's counter if it pushed now."""
        lane = self.active.get(tenant)
        if lane is not None:
            return lane.counter
        lane = self.lanes.get(tenant)
        return max(self.level(), lane.counter if lane else 0.0)

    def rivals_s(self, own: Lane[T] | None, counter: float, tokens: float, tokens_s: float) -> float:
        """Seconds to serve what goes before a ticket: `tokens`, and what the other tenants get meanwhile.

        A rival gets about the gap between the counters and the request that crosses it, but not more than waits and
        will have come by then.

        Args:
            own: the ticket's lane, which is no rival.
            counter: at which the ticket is served.
            tokens: what goes before it for other reasons.
            tokens_s: how fast they are served.
        """
        growing = []
        for lane in self.active.values():
            gap = counter - lane.counter
            if gap >= 0 and lane is not own:
                share = gap * lane.weight + lane.tokens / len(lane.entries)
                if share > lane.tokens:
                    growing.append((share - lane.tokens, lane.rate))
                    share = lane.tokens
                tokens += share
        seconds = tokens / tokens_s
        for _ in range(PASSES):
            seconds = (tokens + sum([min(most, rate * seconds) for most, rate in growing])) / tokens_s
        return seconds

    def order(self) -> Iterator[Ticket[T]]:
        """Tickets in order of service: always the next of the least counter, which then grows by it."""
        heap = [(lane.counter, lane.serial, 0, lane) for lane in self.active.values()]
        heapify(heap)
        while heap:
            counter, serial, at, lane = heap[0]
            ticket = lane.entries[at][1]
            yield ticket
            if at + 1 < len(lane.entries):
                heapreplace(heap, (counter + ticket.cost_tokens / lane.weight, serial, at + 1, lane))
            else:
                heappop(heap)


class FairQueue(Generic[T]):
    """Tickets of one model in order of service, and the counters of its tenants.

    Args:
        weights: shares of tenants relative to 1, which is everybody else's.

    Raises:
        ConfigError: a weight that is not above 0.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        for tenant, weight in weights.items():
            if not (isfinite(weight) and weight > 0):
                raise ConfigError(f"weights[{tenant!r}]", weight, "must be above 0")
        self._weights = dict(weights)
        self._classes: dict[int, PriorityClass[T]] = {}
        self._serial = 0
        self._sweep_at = 64
        self.count = 0

    # --- who waits

    def add(self, ticket: Ticket[T]) -> None:
        """Queue a ticket at its place."""
        self._serial += 1
        ticket.key = (ticket.deadline_s, ticket.arrived_s, self._serial)
        each = self._classes.setdefault(ticket.priority, PriorityClass())
        lane = each.active.get(ticket.tenant)
        if lane is None:
            lane = each.lanes.get(ticket.tenant) or self._meet(each, ticket.tenant)
            lane.lifted = lane.counter = max(lane.counter, each.level())
            lane.serial = self._serial
            each.active[ticket.tenant] = lane
        lane.add(ticket)
        ticket.queued = True
        self.count += 1

    def remove(self, ticket: Ticket[T]) -> None:
        """Take a queued ticket out, wherever it stands; nothing is charged."""
        each = self._classes[ticket.priority]
        lane = each.active[ticket.tenant]
        lane.remove(ticket)
        ticket.queued = False
        self.count -= 1
        if not lane.entries:
            del each.active[ticket.tenant]
            each.last = lane

    def order(self) -> Iterator[Ticket[T]]:
        """In order of service; good until the first change. The first ticket costs O(tenants that wait)."""
        for priority in sorted(self._classes, reverse=True):
            yield from self._classes[priority].order()

    def last(self) -> Ticket[T]:
        """The one whose turn is last; somebody must wait."""
        lowest = min(priority for priority, each in self._classes.items() if each.active)
        return max(self._classes[lowest].active.values(), key=lambda lane: lane.end).entries[-1][1]

    def lanes(self) -> Iterator[tuple[int, float, Lane[T]]]:
        """Tenants that wait, as (priority, least counter of the class, lane), higher priorities first."""
        for priority in sorted(self._classes, reverse=True):
            each = self._classes[priority]
            yield from ((priority, each.level(), lane) for lane in each.active.values())

    def count_of(self, tenant: str) -> int:
        """How many tickets of a tenant wait."""
        return sum(len(each.active[tenant].entries) for each in self._classes.values() if tenant in each.active)

    def is_modest(self, ticket: Ticket[T]) -> bool:
        """Whether its tenant has less than half of its share of the tokens of its priority that wait."""
        mine = self._classes.get(ticket.priority)
        own = mine.active.get(ticket.tenant) if mine else None
        if mine is None or own is None:
            return True
        lanes = mine.active.values()
        share = own.weight / sum([lane.weight for lane in lanes])
        return own.tokens < share / 2 * sum([lane.tokens for lane in lanes])

    def wait_s(self, ticket: Ticket[T], tokens_s: float) -> float:
        """Seconds to serve what goes before a ticket, queued or as if it were queued now, at `tokens_s`.

        That is its tenant's earlier tokens, of each rival those that the counters put first, waiting or still to come,
        and all of higher classes.
        """
        tokens = 0.0
        for priority, each in self._classes.items():
            if priority > ticket.priority:
                tokens += sum([lane.tokens for lane in each.active.values()])
        mine = self._classes.get(ticket.priority)
        if mine is None:
            return tokens / tokens_s
        own = mine.active.get(ticket.tenant)
        key = ticket.key if ticket.queued else (ticket.deadline_s, ticket.arrived_s, self._serial + 1)
        before = own.before(key) if own else 0.0
        counter = mine.counter_of(ticket.tenant) + before / self._weights.get(ticket.tenant, 1.0)
        return mine.rivals_s(own, counter, tokens + before, tokens_s)

    # --- what tenants were served

    def charge(self, ticket: Ticket[T]) -> None:
        """A queued ticket is served: its tenant's counter grows by its planned tokens, and it waits no more."""
        lane = self._classes[ticket.priority].active[ticket.tenant]
        lane.counter += ticket.cost_tokens / lane.weight
        self.remove(ticket)

    def settle(self, tenant: str, more_tokens: float, priority: int) -> None:
        """Correct a charge by the tokens that it was too low; negative is a refund."""
        known = self._classes.get(priority)
        lane = known.lanes.get(tenant) if known else None
        if lane is not None:  # else forgotten because it was idle; it comes back at the least counter anyway
            lane.counter = max(lane.counter + more_tokens / lane.weight, min(lane.counter, lane.lifted))

    # --- bounded memory

    @property
    def known(self) -> int:
        """How many tenants are remembered, once for each priority they used."""
        return sum(len(each.lanes) for each in self._classes.values())

    def _meet(self, each: PriorityClass[T], tenant: str) -> Lane[T]:
        if self.known >= self._sweep_at:
            self._forget()
        lane = each.lanes[tenant] = Lane(tenant, self._weights.get(tenant, 1.0))
        return lane

    def _forget(self) -> None:
        """Drop who is idle and owes nothing; if too many are left, also those who owe least."""
        idle = []
        for each in self._classes.values():
            level = each.level()
            for lane in [lane for lane in each.lanes.values() if not lane.entries]:
                if lane.counter <= level:
                    del each.lanes[lane.tenant]
                else:
                    idle.append((lane.counter - level, lane.tenant, each))
        surplus = len(idle) - MAX_TENANTS // 2
        for _, tenant, each in nsmallest(surplus, idle, key=lambda entry: entry[0]):
            del each.lanes[tenant]
        # Twice as many before the next sweep, so that it costs O(1) a tenant.
        self._sweep_at = max(min(MAX_TENANTS, 2 * self.known), self.known + 64)


def _key_of(entry: tuple[Key, Ticket[Any]]) -> Key:
    return entry[0]
