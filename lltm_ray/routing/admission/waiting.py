"""The waiting room of one model: admission's order, carried out on the event loop.

Who is served when a slot comes free: the first in admission's order that can use it, except that among the first few
one whose prompt is cached on that very engine goes before. Two kinds of waiters are passed over for a while although
a slot is free: those for whom waiting for their own engine costs less than computing their prompt anew, and those with
a long prompt while every slot they could have is on an engine that computes another long one and decodes for others.

Whenever a slot is free, nobody in the room wants it now: every event that could change that calls `dispatch`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from math import inf

from lltm_ray.records import ModelDemand
from lltm_ray.routing.admission import Overload, Ticket
from lltm_ray.routing.admission.lead import Lead
from lltm_ray.routing.admission.waiter import Hold, Later, Timer, Waiter, call_later, is_frozen
from lltm_ray.routing.policy import Choice
from lltm_ray.routing.residency import Match
from lltm_ray.routing.rows import Lease
from lltm_ray.routing.served import ServedModel
from lltm_ray.routing.table import LONG_PREFILL_TOKENS

__all__ = ["Waiter", "WaitingRoom"]

WINDOW = 8
"""How far from the head of the queue one may be served first because its prompt is cached where a slot came free."""
MAX_PASSED = 16
"""How often a waiter may be overtaken that way."""
CALM_TRIES = 3
"""Further engines that a long prompt is offered before it waits for a long prefill to end."""
CROWDED_S = 10.0
"""How long after somebody waited slots are still charged to tenants that got them at once."""
WAKE_S = 1.0
"""How often a model without engines is asked for while somebody waits."""


class WaitingRoom:
    """Claims slots for requests, now or when they come free.

    Args:
        served: the model.
        clock: monotonic seconds.
        refusal: makes the error for one that is turned away.
        wake: asks for engines; called again and again while somebody waits and there are none.
        later: sets timers, by default on the running event loop.
    """

    def __init__(
        self,
        served: ServedModel,
        clock: Callable[[], float],
        refusal: Callable[[ServedModel, Overload[Waiter]], Exception],
        wake: Callable[[], None] | None = None,
        later: Later = call_later,
    ) -> None:
        self._served = served
        self._clock = clock
        self._refusal = refusal
        self._wake = wake
        self._later = later
        self._lead = Lead(served.rates)
        self._timer: Timer | None = None
        self._timer_at = 0.0
        self._wake_timer: Timer | None = None
        self._crowded_until_s = -inf
        self.last_request_unix_nano = 0

    @property
    def count(self) -> int:
        """How many wait."""
        return self._served.admission.count

    def demand(self) -> ModelDemand:
        """What the fleet's controller scales by."""
        served = self._served
        return ModelDemand(
            model=served.name,
            waiting=self.count,
            running=served.table.busy_total,
            predicted_wait_s=self._predicted_wait_s(),
            last_request_unix_nano=self.last_request_unix_nano,
            rejected=served.counts.rejected,
        )

    def _predicted_wait_s(self) -> float:
        served, now_s = self._served, self._clock()
        if not self.count:
            return 0.0
        probe: Ticket[None] = Ticket(payload=None, arrived_s=now_s)
        return served.admission.predict(probe, served.capacity())

    # --- claiming

    def claim_now(self, waiter: Waiter, match: Match, now_s: float) -> Lease | None:
        """A slot at once, unless none is free that nobody waits for, or waiting is better than what is."""
        self.last_request_unix_nano = waiter.since_unix_nano
        waiter.meet(match)
        self.dispatch()
        return self._try(waiter, match, now_s, None)

    async def wait(self, waiter: Waiter, now_s: float) -> Lease:
        """Stand in the queue.

        Raises:
            OverloadedError: the queue is full, or no slot will come free in time.
            EngineNotReadyError: no engine was ready in time.
        """
        grant: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        waiter.grant = grant
        ticket = self.enter(waiter, now_s)
        try:
            return await grant
        except asyncio.CancelledError:
            self._give_back(grant)
            raise
        finally:
            waiter.end_hold()
            self._served.admission.leave(ticket)
            self._set_timers()

    def enter(self, waiter: Waiter, now_s: float) -> Ticket[Waiter]:
        """Take a place in the queue for one who has a `grant`, which tells what becomes of it, perhaps at once."""
        ticket = self._ticket(waiter, now_s)
        overload = self._served.admission.push(ticket, now_s, self._served.capacity())
        if overload is not None:
            mine = overload.ticket is ticket
            waiter.has_held = mine or waiter.has_held
            # no place, but perhaps a slot, as it would only rather have waited
            if not mine or self._try(waiter, self._match(waiter), now_s, None) is None:
                self._turn_away(overload)
        if ticket.queued:
            self._start_hold(waiter)
        self._crowded_until_s = now_s + CROWDED_S
        self._set_timers()
        return ticket

    def _ticket(self, waiter: Waiter, now_s: float) -> Ticket[Waiter]:
        served, ask = self._served, waiter.ask
        slots = served.table.slots_total // max(1, len(served.table))
        return Ticket(
            payload=waiter,
            arrived_s=now_s,
            tenant=ask.tenant,
            priority=ask.priority,
            deadline_s=ask.deadline_s,
            lead_s=self._lead.bound_s(waiter.uncached_tokens, slots),
            mean_lead_s=self._lead.mean_s(waiter.uncached_tokens, slots),
            cost_tokens=waiter.uncached_tokens + served.rates.output_tokens(ask.max_tokens),
            only=ask.only,
        )

    def _give_back(self, grant: asyncio.Future[Lease]) -> None:
        """Cancelled in the very step that granted: the slot is ours and nobody else will give it back."""
        if grant.done() and not grant.cancelled() and grant.exception() is None:
            lease = grant.result()
            lease.released = True
            self._served.release(lease, None, self._clock())
            self.dispatch(lease.engine.name)

    def began(self, lease: Lease) -> None:
        """The first byte of an answer came: a long prompt, or other adapters, that waited for it may go on."""
        if lease.began:
            return
        self._served.began(lease)
        now_s = self._clock()
        self._lead.learn(lease.uncached_tokens, lease.row.slots_total, now_s - lease.claimed_s)
        if lease.cost_tokens and now_s > lease.ask.deadline_s:
            self._served.admission.began_late()
        if lease.uncached_tokens >= LONG_PREFILL_TOKENS or lease.row.adapters:
            self.dispatch(lease.row.name)

    def dispatch(self, freed: str = "") -> None:
        """Give free slots to waiters.

        Args:
            freed: the engine where a slot came free or a prefill ended; empty: anywhere.
        """
        admission, table = self._served.admission, self._served.table
        while admission and table.free_slots > 0 and self._serve_one(freed):
            self._served.settle()

    def _serve_one(self, freed: str) -> bool:
        now_s = self._clock()
        wanting = self._wanting(freed)
        while window := list(islice(wanting, WINDOW)):
            for index in self._sequence(window, freed):
                ticket = window[index]
                lease = self._try(ticket.payload, self._match(ticket.payload), now_s, ticket)
                if lease is not None:
                    for overtaken in window[:index]:
                        overtaken.payload.passed += 1
                    return True
        return False

    def _wanting(self, freed: str) -> Iterator[Ticket[Waiter]]:
        """Those for whom something that is free may be, in order; good until the first claim."""
        row = self._served.rows.get(freed)
        for ticket in self._served.admission.order():
            waiter = ticket.payload
            if waiter.grant is None or waiter.grant.done():  # cancelled, and has not left yet
                continue
            if waiter.hold is not None and not waiter.hold.is_moot(row):
                continue
            if ticket.only is None or self._has_room(ticket.only):
                yield ticket

    def _has_room(self, engine: str) -> bool:
        row = self._served.table.get(engine)
        return row is not None and row.has_room and not row.is_suspect

    def _sequence(self, window: list[Ticket[Waiter]], freed: str) -> list[int]:
        """In which order the window is tried: those at home on the freed engine first."""
        order = list(range(len(window)))
        if not freed or window[0].payload.passed >= MAX_PASSED:
            return order
        head = window[0]
        return sorted(
            order,
            key=lambda index: window[index].payload.home != freed or window[index].priority != head.priority,
        )

    def _match(self, waiter: Waiter) -> Match:
        return self._served.match(waiter.ask)

    def _try(self, waiter: Waiter, match: Match, now_s: float, ticket: Ticket[Waiter] | None) -> Lease | None:
        """Claim a slot for one, who waits with a ticket or has just come, unless it had better wait."""
        choice = self._served.choose(waiter.ask, match, waiter.exclude)
        if choice is not None and not waiter.has_held:
            choice = self._or_hold(waiter, match, choice, now_s)
        if choice is None:
            if waiter.hold is not None and waiter.hold.timer is None and ticket is not None:
                self._start_hold(waiter)
            return None
        return self._claim(waiter, match, choice, now_s, ticket)

    def _claim(
        self, waiter: Waiter, match: Match, choice: Choice, now_s: float, ticket: Ticket[Waiter] | None
    ) -> Lease:
        lease = self._served.claim(waiter.ask, match, choice, now_s)
        if ticket is None and now_s < self._crowded_until_s:
            ticket = self._ticket(waiter, now_s)
        if ticket is not None:  # where nobody waits there is nothing to share out, and nobody is charged
            lease.cost_tokens = ticket.cost_tokens
            self._served.admission.take(ticket, now_s)
        if waiter.grant is not None:
            waiter.end_hold()
            waiter.grant.set_result(lease)
        return lease

    # --- waiting by choice

    def _or_hold(self, waiter: Waiter, match: Match, choice: Choice, now_s: float) -> Choice | None:
        """What to claim now; None: it holds back. That it does once at most, and for half of its time at most."""
        if choice.wait_for is not None:
            self._hold(waiter, choice.wait_for, now_s, choice.wait_s + choice.wait_gain_s)
            return None
        if self._freezes(choice):
            calm = self._calmer(waiter, match, choice)
            if calm is None:
                self._hold(waiter, choice.engine, now_s, inf, is_paced=True)
            return calm
        return choice

    def _hold(self, waiter: Waiter, engine: str, now_s: float, patience_s: float, *, is_paced: bool = False) -> None:
        if waiter.hold is None:
            seconds = max(0.0, min(patience_s, (waiter.ask.deadline_s - now_s) / 2))
            waiter.hold = Hold(self._served.rows[engine], seconds, is_paced)

    def _start_hold(self, waiter: Waiter) -> None:
        if waiter.hold is not None:
            waiter.hold.start(self._later, partial(self._hold_over, waiter))

    def _hold_over(self, waiter: Waiter) -> None:
        waiter.end_hold()
        self.dispatch()

    def _freezes(self, choice: Choice) -> bool:
        return choice.uncached_tokens >= LONG_PREFILL_TOKENS and is_frozen(self._served.rows[choice.engine])

    def _calmer(self, waiter: Waiter, match: Match, choice: Choice) -> Choice | None:
        """Another engine, if that is no slower than waiting for the prefills of the first choice."""
        behind_tokens = self._served.rows[choice.engine].prefilling_tokens
        most_s = choice.expected_s + self._served.rates.prefill_s(choice.engine, behind_tokens)
        avoid = set(waiter.exclude)
        for _ in range(CALM_TRIES):
            avoid.add(choice.engine)
            other = self._served.choose(waiter.ask, match, avoid)
            if other is None or other.engine in avoid:
                return None
            if not self._freezes(other):
                return other if other.expected_s <= most_s else None
            choice = other
        return None

    # --- refusing

    def dismiss(self, verdict: Callable[[str | None], Exception | None]) -> None:
        """Turn away those who wait in vain.

        Args:
            verdict: the error for those pinned to an engine (None: to none), or None if there is hope.
        """
        waiting = list(self._served.admission.order())
        verdicts = {only: verdict(only) for only in {ticket.only for ticket in waiting}}
        for ticket in waiting:
            error = verdicts[ticket.only]
            if error is not None:
                self._served.admission.leave(ticket)
                ticket.payload.reject(error)

    def _turn_away(self, overload: Overload[Waiter]) -> None:
        overload.ticket.payload.reject(self._refusal(self._served, overload))

    # --- timers

    def _expire(self) -> None:
        self._timer = None
        for overload in self._served.admission.expire(self._clock()):
            self._turn_away(overload)
        self._set_timers()

    def _set_timers(self) -> None:
        """One for the first deadline, one to ask for engines; none when nobody waits."""
        at_s = self._served.admission.next_expiry()
        if self._timer is not None and (at_s == inf or at_s < self._timer_at):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and at_s < inf:
            self._timer_at = at_s
            pause_s = max(0.0, at_s - self._clock()) + 0.001
            self._timer = self._later(pause_s, self._expire)
        self.keep_awake()

    def keep_awake(self) -> None:
        """Ask for engines every `WAKE_S` as long as somebody waits and there are none."""
        needs_it = self._wake is not None and self.count > 0 and self._is_asleep
        if needs_it and self._wake_timer is None:
            self._wake_timer = self._later(WAKE_S, self._wake_again)
        elif not needs_it and self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None

    @property
    def _is_asleep(self) -> bool:
        return self._served.is_startable and not self._served.table.slots_total

    def _wake_again(self) -> None:
        self._wake_timer = None
        if self._wake is not None and self.count and self._is_asleep:
            self._wake()
        self.keep_awake()
