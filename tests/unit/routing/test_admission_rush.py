"""Hurried requests at engines whose pace is rough: stalls, slow spells, first bytes that take ten times as usual."""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest

from lltm_ray.records import Timings
from lltm_ray.routing.admission import Admission, Capacity, Ticket
from lltm_ray.routing.admission.lead import Lead
from lltm_ray.routing.rates import Rates

ENGINES, SLOTS = 2, 4
SECONDS, WARM_S = 150.0, 20.0
GRID_S = 0.01
TOKENS_S = 500.0
"""What one slot does of a request in a second at full pace."""
PREFILL_TOKENS_S = 2000.0


@dataclass(frozen=True)
class Tenant:
    """Requests a second, their prompts and outputs in tokens, and how patient they are."""

    rate: float
    prompt: tuple[int, int]
    output: tuple[int, int]
    patience_s: tuple[float, ...]


CROWD = {
    "flood": Tenant(18.0, (40, 240), (12, 36), (3.0,)),
    "steady": Tenant(10.0, (40, 240), (12, 36), (1.5, 4.0)),
    "long": Tenant(2.6, (200, 480), (24, 64), (3.0, 6.0)),
    "short": Tenant(16.0, (20, 80), (6, 18), (2.0,)),
    "small": Tenant(2.0, (20, 80), (6, 18), (1.0,)),
}
"""About twice what the engines do; all but the small one want more than their share."""


class Pace:
    """One engine's progress: it halts for up to 0.6 s every few seconds, and half of the time it runs at half speed."""

    def __init__(self, dice, *, rough):
        halts, at_s = [], 0.0
        while rough and at_s < 2 * SECONDS:
            at_s += dice.expovariate(1 / 4.0)
            halts.append((at_s, at_s + dice.uniform(0.1, 0.6)))
        speeds = []
        for step in range(round(2 * SECONDS / GRID_S)):
            now_s = step * GRID_S
            halted = any(begin <= now_s < end for begin, end in halts[max(0, bisect_left(halts, (now_s,)) - 3) :][:3])
            speeds.append(0.0 if halted else 0.5 if rough and now_s % 60 > 30 else 1.0)
        self.done = [0.0, *accumulate(speed * GRID_S for speed in speeds)]

    def end(self, from_s, work_s):
        """When so many seconds of work at full pace are done."""
        at = from_s / GRID_S
        low = int(at)
        done = self.done[low] + (self.done[low + 1] - self.done[low]) * (at - low) + work_s
        index = bisect_left(self.done, done, lo=low)
        before, after = self.done[index - 1], self.done[index]
        return max(from_s, (index - 1 + (done - before) / (after - before)) * GRID_S)


class Rush:
    """The crowd at the engines, with what admission, first bytes and rates learn from them; all of one seed."""

    def __init__(self, seed, crowd=CROWD, *, rough=True):
        self.dice = random.Random(seed)
        self.admission, self.rates = Admission(256), Rates()
        self.lead = Lead(self.rates)
        self.paces = [Pace(self.dice, rough=rough) for _ in range(ENGINES)]
        self.free = [SLOTS] * ENGINES
        self.now_s, self.serial, self.events = 0.0, 0, []
        self.offered, self.served, self.outcomes = Counter(), Counter(), defaultdict(Counter)
        self.crowd = crowd
        for name, tenant in crowd.items():
            at_s = self.dice.expovariate(tenant.rate)
            while at_s < SECONDS:
                self.later(at_s, self.arrive, name)
                at_s += self.dice.expovariate(tenant.rate)
        while self.events:
            self.step()

    def later(self, at_s, what, *about):
        self.serial += 1
        heapq.heappush(self.events, (at_s, self.serial, what, about))

    def step(self):
        at_s, _, what, about = heapq.heappop(self.events)
        while self.admission.next_expiry() <= at_s:
            self.now_s = self.admission.next_expiry()
            for gone in self.admission.expire(self.now_s):
                self.count(gone.ticket, "expired")
        self.now_s = at_s
        what(*about)

    def capacity(self):
        service_s, slots = self.rates.service_s(), ENGINES * SLOTS
        tokens_s = self.rates.throughput_tokens_s() * slots if self.rates.requests >= 8 else 0.0
        return Capacity(slots, tokens_s, service_s, self.rates.service_s(1.0) - service_s, sum(self.free))

    def arrive(self, name):
        tenant = self.crowd[name]
        prompt, output = self.dice.randint(*tenant.prompt), self.dice.randint(*tenant.output)
        new = Ticket(
            payload=(prompt, output),
            arrived_s=self.now_s,
            tenant=name,
            deadline_s=self.now_s + self.dice.choice(tenant.patience_s),
            lead_s=self.lead.bound_s(prompt, SLOTS),
            mean_lead_s=self.lead.mean_s(prompt, SLOTS),
            cost_tokens=prompt + self.rates.output_tokens(output),
        )
        if self.now_s >= WARM_S:
            self.offered[name] += 1
        if any(self.free):
            self.start(new)
        elif (refused := self.admission.push(new, self.now_s, self.capacity())) is not None:
            self.count(refused.ticket, "refused")

    def start(self, each):
        self.admission.take(each, self.now_s)
        engine = max(range(ENGINES), key=lambda number: self.free[number])
        self.free[engine] -= 1
        prompt, output = each.payload
        work_s = prompt / PREFILL_TOKENS_S * self.dice.lognormvariate(0.0, 0.8)
        first_s = self.paces[engine].end(self.now_s, work_s)
        end_s = self.paces[engine].end(first_s, (prompt + output) / TOKENS_S)
        self.later(first_s, self.begin, each, self.now_s)
        self.later(end_s, self.end, each, engine, self.now_s, first_s)

    def begin(self, each, claimed_s):
        self.lead.learn(each.payload[0], SLOTS, self.now_s - claimed_s)
        is_late = self.now_s > each.deadline_s
        if is_late:
            self.admission.began_late()
        self.count(each, "late" if is_late else "began")

    def end(self, each, engine, claimed_s, first_s):
        prompt, output = each.payload
        prefill_ms, decode_ms = (first_s - claimed_s) * 1e3, (self.now_s - first_s) * 1e3
        told = Timings(prompt_n=prompt, prompt_ms=prefill_ms, predicted_n=output, predicted_ms=decode_ms)
        self.rates.learn(str(engine), told, busy=SLOTS, held_s=self.now_s - claimed_s)
        self.admission.settle(each.tenant, each.cost_tokens, prompt + output)
        self.served[each.tenant] += prompt + output if WARM_S <= claimed_s < SECONDS else 0
        self.free[engine] += 1
        if first := next(self.admission.order(), None):
            self.start(first)

    def count(self, each, outcome):
        if each.arrived_s >= WARM_S:
            self.outcomes[each.tenant][outcome] += 1

    def share(self, outcome, *names):
        """Part of what was offered, by these tenants or all."""
        names = names or tuple(self.crowd)
        return sum(self.outcomes[name][outcome] for name in names) / sum(self.offered[name] for name in names)


def jain(values):
    """Jain, Chiu and Hawe's fairness index."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def fairness(rush):
    """Among those who want more than their share."""
    return jain([tokens for name, tokens in rush.served.items() if name != "small"])


def goodput(rush):
    """Tokens a second."""
    return sum(rush.served.values()) / (SECONDS - WARM_S)


def late_ratio(rush):
    """Part of the answers that began too late."""
    return rush.share("late") / (rush.share("late") + rush.share("began"))


@pytest.fixture(scope="module")
def rough():
    return Rush(1)


def test_a_small_tenant_in_a_hurry_is_served_where_slots_come_free_in_time():
    even = Rush(1, rough=False)
    assert even.share("refused", "small") + even.share("expired", "small") < 0.05
    assert fairness(even) >= 0.95
    assert late_ratio(even) <= 0.01


def test_a_small_tenant_in_a_hurry_is_hardly_ever_refused_although_the_pace_is_rough(rough):
    assert rough.share("refused", "small") < 0.1
    assert rough.share("expired", "small") + rough.share("late", "small") < 0.02


def test_a_rough_pace_breaks_no_promise(rough):
    assert late_ratio(rough) <= 0.01
    assert rough.share("expired") <= 0.01
    assert fairness(rough) >= 0.95


def test_deadlines_cost_no_throughput(rough):
    patient = {name: replace(tenant, patience_s=(60.0,)) for name, tenant in CROWD.items()}
    assert goodput(rough) >= 0.97 * goodput(Rush(1, patient))


def test_tenants_who_all_are_in_too_much_of_a_hurry_do_not_use_up_what_was_promised():
    hurry = {f"tenant {number}": Tenant(4.5, (20, 80), (6, 18), (0.6,)) for number in range(12)}
    rush = Rush(1, hurry)
    assert late_ratio(rush) <= 0.01
    assert fairness(rush) >= 0.95


def test_the_lead_forgets_a_stall_with_the_next_few_dozens_of_first_bytes():
    rates = Rates()
    for _ in range(20):
        rates.learn("a", Timings(prompt_n=100, prompt_ms=100.0, predicted_n=10, predicted_ms=100.0), busy=1.0)
    lead, dice = Lead(rates), random.Random(1)

    def learn(count, slowness):
        for _ in range(count):
            lead.learn(100, 1, slowness * dice.uniform(0.1, 0.3))
        return lead.bound_s(100, 1)

    usual_s = learn(500, 1.0)
    assert learn(40, 20.0) > 4.0
    assert learn(150, 1.0) < 2 * usual_s
