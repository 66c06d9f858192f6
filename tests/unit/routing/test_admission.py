"""The waiting room: its order against a specification, its bounds, its predictions, and a minute of overload."""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter, defaultdict
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError
from lltm_ray.routing.admission import Admission, Capacity, Reason, Ticket, fairness

CAPACITY = Capacity(slots=4, tokens_s=100.0, service_s=4.0, service_dev_s=0.0)
UNKNOWN = Capacity(slots=0, tokens_s=0.0, service_s=0.0, service_dev_s=0.0)


def ticket(tenant="", cost=10.0, **fields):
    return Ticket(payload=None, arrived_s=fields.pop("arrived_s", 0.0), tenant=tenant, cost_tokens=cost, **fields)


def room(*tickets, limit=100, **options):
    admission = Admission(limit, **options)
    for each in tickets:
        assert admission.push(each, 0.0, UNKNOWN) is None
    return admission


def drain(admission, n=10**9):
    taken = []
    while len(taken) < n and (first := next(admission.order(), None)):
        admission.take(first, 0.0)
        taken.append(first)
    return taken


def served(tickets, tenant):
    return sum(each.cost_tokens for each in tickets if each.tenant == tenant)


# --- the order


class Spec:
    """What the order is, in as few words as possible and at any cost."""

    def __init__(self, limit, weights):
        self.limit, self.weights = limit, weights
        self.waiting, self.counter, self.lifted, self.since, self.last = [], {}, {}, {}, {}
        self.serial = 0

    def active(self, priority, waiting):
        return {each.tenant for each in waiting if each.priority == priority}

    def order(self):
        waiting, counter, result = list(self.waiting), dict(self.counter), []
        while waiting:
            priority = max(each.priority for each in waiting)
            tenant = min(self.active(priority, waiting), key=lambda t: (counter[priority, t], self.since[priority, t]))
            mine = [each for each in waiting if (each.priority, each.tenant) == (priority, tenant)]
            first = min(mine, key=lambda each: (each.deadline_s, each.arrived_s, each.payload))
            counter[priority, tenant] += first.cost_tokens / self.weights.get(tenant, 1.0)
            waiting.remove(first)
            result.append(first)
        return result

    def push(self, new):
        self.serial += 1
        key = new.priority, new.tenant
        active = self.active(new.priority, self.waiting)
        if new.tenant not in active:
            others = [self.counter[new.priority, tenant] for tenant in active]
            level = min(others) if others else self.counter.get(self.last.get(new.priority), 0.0)
            self.lifted[key] = self.counter[key] = max(self.counter.get(key, 0.0), level)
            self.since[key] = self.serial
        self.waiting.append(new)
        if len(self.waiting) > self.limit:
            last = self.order()[-1]
            self.remove(last)
            return last
        return None

    def remove(self, old):
        self.waiting.remove(old)
        if old.tenant not in self.active(old.priority, self.waiting):
            self.last[old.priority] = (old.priority, old.tenant)

    def take(self, old):
        self.counter[old.priority, old.tenant] += old.cost_tokens / self.weights.get(old.tenant, 1.0)
        self.remove(old)

    def settle(self, old, actual):
        key = old.priority, old.tenant
        counter = self.counter[key] + (actual - old.cost_tokens) / self.weights.get(old.tenant, 1.0)
        self.counter[key] = max(counter, min(self.counter[key], self.lifted[key]))


NEW = st.tuples(
    st.just("push"),
    st.sampled_from("abcd"),
    st.sampled_from([-10, 0, 0, 0, 10]),
    st.sampled_from([5.0, 9.0, inf]),
    st.integers(1, 50),
)
STEPS = st.lists(
    st.one_of(
        NEW,
        NEW,
        st.tuples(st.sampled_from(["take", "leave"]), st.integers(0, 20)),
        st.tuples(st.just("settle"), st.integers(0, 60)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 12), st.sampled_from([{}, {"a": 2.0, "b": 0.5}]))
def test_the_order_and_who_is_put_out_are_those_of_the_specification(steps, limit, weights):
    admission, spec, taken = Admission(limit, weights=weights), Spec(limit, weights), []
    for number, (word, *values) in enumerate(steps):
        if word == "push":
            tenant, priority, deadline_s, cost = values
            new = ticket(tenant, float(cost), priority=priority, deadline_s=deadline_s)
            new.payload = number
            refused, gone = admission.push(new, 0.0, UNKNOWN), spec.push(new)
            assert (refused and refused.ticket) is gone
            assert refused is None or refused.reason is (Reason.FULL if gone is new else Reason.EVICTED)
        elif word == "settle" and taken:
            old = taken.pop(0)
            admission.settle(old.tenant, old.cost_tokens, values[0], priority=old.priority)
            spec.settle(old, values[0])
        elif word in ("take", "leave") and spec.waiting:
            old = spec.order()[values[0] % len(spec.waiting)]
            getattr(admission, word)(old, *([0.0] if word == "take" else []))
            getattr(spec, "take" if word == "take" else "remove")(old)
            taken += [old] if word == "take" else []
        assert list(admission.order()) == spec.order()
        assert admission.count == len(spec.waiting) == sum(map(admission.count_of, "abcd")) <= limit
        assert all(each.queued for each in spec.waiting)
        assert bool(admission) == bool(spec.waiting)


def test_a_higher_priority_goes_first_whatever_was_served():
    low, high = ticket("a", 1.0), ticket("b", 1000.0, priority=1)
    admission = room(low, high)
    assert drain(admission) == [high, low]


def test_within_a_tenant_the_earliest_deadline_goes_first_then_the_earliest_arrival():
    late = ticket(deadline_s=20.0, arrived_s=0.0)
    second = ticket(deadline_s=10.0, arrived_s=2.0)
    first = ticket(deadline_s=10.0, arrived_s=1.0)
    never = ticket(arrived_s=0.0)
    assert drain(room(never, late, second, first)) == [first, second, late, never]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=40, max_size=40), st.sampled_from([1.0, 2.0, 4.0]), st.data())
def test_two_tenants_that_always_wait_never_differ_by_more_than_one_request(costs, weight, data):
    tenants = ["a", "b"] * 20
    admission = room(*[ticket(t, float(c)) for t, c in zip(tenants, costs, strict=True)], weights={"a": weight})
    total = Counter()
    while admission.count_of("a") and admission.count_of("b"):
        (taken,) = drain(admission, 1)
        actual = data.draw(st.integers(1, 100))
        admission.settle(taken.tenant, taken.cost_tokens, actual)
        total[taken.tenant] += actual
        assert abs(total["a"] / weight - total["b"]) <= 100


def test_weights_share_in_their_proportion():
    admission = room(*[ticket(t) for t in "ab" * 40], weights={"a": 3.0})
    taken = drain(admission, 40)
    assert served(taken, "a") == 300.0
    assert served(taken, "b") == 100.0


def test_a_tenant_that_returns_from_idle_gets_no_credit():
    admission = room(ticket("idle"), *[ticket("busy") for _ in range(60)])
    drain(admission, 31)
    for _ in range(20):
        admission.push(ticket("idle"), 0.0, UNKNOWN)
    taken = drain(admission, 20)
    assert served(taken, "idle") == served(taken, "busy") == 100.0


def test_a_refund_of_what_was_charged_before_idling_is_no_credit_either():
    admission = room(ticket("idle", 50.0), *[ticket("busy") for _ in range(60)])
    drain(admission, 31)
    for _ in range(20):
        admission.push(ticket("idle"), 0.0, UNKNOWN)
    admission.settle("idle", 50.0, 1.0)
    taken = drain(admission, 20)
    assert served(taken, "idle") == served(taken, "busy") == 100.0


def test_a_reply_that_was_longer_than_planned_is_charged():
    admission = room(*[ticket(t) for t in "ab" * 20])
    (first,) = drain(admission, 1)
    admission.settle(first.tenant, 10.0, 60.0)
    assert served(drain(admission, 6), first.tenant) == 0.0


def test_requests_that_never_waited_are_charged_as_well():
    admission = room(*[ticket(t) for t in "ab" * 20])
    admission.take(ticket("a", 100.0), 0.0)
    assert served(drain(admission, 10), "a") == 0.0


def test_a_pinned_ticket_can_be_passed_over():
    pinned, other = ticket(only="engine-1"), ticket()
    admission = room(pinned, other)
    admission.take(next(each for each in admission.order() if each.only is None), 0.0)
    assert list(admission.order()) == [pinned]
    assert not other.queued


def test_who_leaves_is_not_charged_and_may_leave_twice():
    gone, stays = ticket("a", 500.0), ticket("a")
    admission = room(gone, stays, ticket("b"))
    admission.leave(gone)
    admission.leave(gone)
    assert drain(admission, 1) == [stays]
    assert admission.count == 1


# --- the bounds


def test_a_full_queue_makes_room_for_a_tenant_with_less_service():
    crowd = [ticket("crowd", arrived_s=float(at)) for at in range(8)]
    admission = room(*crowd, limit=8)
    newcomer = ticket("new")
    refused = admission.push(newcomer, 0.0, CAPACITY)
    assert (refused.ticket, refused.reason) == (crowd[-1], Reason.EVICTED)
    assert newcomer.queued
    assert not crowd[-1].queued
    assert refused.retry_after_s >= 1.0
    assert "queue is full" in refused.why


def test_a_full_queue_refuses_who_would_be_last():
    admission = room(*[ticket("crowd") for _ in range(8)], limit=8)
    one_more = ticket("crowd")
    refused = admission.push(one_more, 0.0, CAPACITY)
    assert (refused.ticket, refused.reason) == (one_more, Reason.FULL)
    assert not one_more.queued
    assert admission.count == 8


def test_a_full_queue_prefers_the_higher_priority():
    admission = room(*[ticket("a", priority=1) for _ in range(3)], ticket("b"), limit=4)
    assert admission.push(ticket("a", priority=1), 0.0, CAPACITY).ticket.tenant == "b"
    assert admission.push(ticket("c"), 0.0, CAPACITY).reason is Reason.FULL


def test_a_room_without_places_refuses_everybody():
    assert Admission(0).push(ticket(), 0.0, CAPACITY).reason is Reason.FULL


def test_a_herd_is_told_to_come_back_one_after_the_other():
    admission = room(ticket("a"), limit=1)
    advice = [admission.push(ticket("a"), 0.0, CAPACITY).retry_after_s for _ in range(3)]
    assert advice == [1.0, 2.0, 3.0]  # a slot comes free each second
    drain(admission)
    assert admission.push(ticket("a"), 0.0, CAPACITY) is None
    assert admission.push(ticket("a"), 0.0, CAPACITY).retry_after_s == 3.0
    crowd = [admission.push(ticket("a"), 0.0, CAPACITY).retry_after_s for _ in range(1000)]
    assert max(crowd) == 600.0


def test_a_herd_that_never_came_back_is_forgotten_when_slots_are_free_again():
    admission = room(ticket("a"), limit=1)
    for _ in range(1000):
        admission.push(ticket("a"), 0.0, CAPACITY)
    drain(admission)
    admission.take(ticket("a"), 100.0)
    assert admission.push(ticket("a"), 200.0, CAPACITY) is None
    assert admission.push(ticket("a"), 200.0, CAPACITY).retry_after_s == 1.0


def test_who_cannot_begin_in_time_is_refused_and_told_when_it_could():
    admission = room(*[ticket(cost=100.0, deadline_s=5.5) for _ in range(10)])
    late = ticket(deadline_s=6.0, lead_s=1.0)
    refused = admission.push(late, 0.0, CAPACITY)
    assert refused.reason is Reason.DEADLINE
    assert refused.predicted_wait_s == pytest.approx(11.0)  # 1,000 tokens at 100 a second, and a slot each second
    assert refused.retry_after_s == pytest.approx(11.0 - 5.0)
    assert not late.queued
    assert admission.count == 10


def test_only_what_goes_before_a_ticket_is_waited_for():
    admission = room(*[ticket("a", 100.0) for _ in range(10)], ticket("low", 1000.0, priority=-1))
    newcomer = ticket("b", deadline_s=3.0)
    assert admission.predict(newcomer, CAPACITY) == pytest.approx(2.0)  # one request of the other, and a slot
    assert admission.predict(ticket("b", priority=1), CAPACITY) == pytest.approx(1.0)
    assert admission.predict(ticket("b", priority=-1), CAPACITY) == pytest.approx(21.0)
    assert admission.push(newcomer, 0.0, CAPACITY) is None


def test_without_engines_nobody_is_judged_but_those_whose_time_is_over():
    admission = room(ticket(deadline_s=0.5))
    assert admission.predict(ticket(), UNKNOWN) == inf
    refused = admission.push(ticket(deadline_s=0.5), 0.5, UNKNOWN)
    assert refused.reason is Reason.DEADLINE
    assert refused.retry_after_s == 1.0


def test_who_can_no_longer_begin_in_time_goes_at_once_and_not_at_its_deadline():
    soon, later, never = ticket(deadline_s=9.0, lead_s=4.0), ticket(deadline_s=6.0), ticket()
    admission = room(soon, later, never)
    assert admission.next_expiry() == 5.0
    assert admission.expire(4.9) == ()
    (gone,) = admission.expire(5.0)
    assert (gone.ticket, gone.reason) == (soon, Reason.EXPIRED)
    assert not soon.queued
    assert gone.retry_after_s >= 1.0
    admission.leave(later)
    assert admission.next_expiry() == inf
    assert list(admission.order()) == [never]


def test_a_ticket_pushed_again_expires_by_its_new_deadline():
    again = ticket(deadline_s=5.0)
    admission = room(again)
    admission.leave(again)
    again.deadline_s = 8.0
    assert admission.push(again, 1.0, UNKNOWN) is None
    assert admission.expire(6.0) == ()
    assert [each.ticket for each in admission.expire(8.0)] == [again]


def test_memory_stays_bounded_whoever_comes(monkeypatch):
    monkeypatch.setattr(fairness, "MAX_TENANTS", 500)
    admission = room(ticket("waits", deadline_s=1e9))
    for number in range(3000):
        new = ticket(f"tenant-{number}", 10.0 + number % 7, deadline_s=1e9)
        admission.push(new, 0.0, UNKNOWN)
        admission.take(new, 0.0)
        assert admission.snapshot()["tenants_known"] <= 500
    assert admission.count_of("waits") == 1
    assert len(admission._expiry) < 200


def test_tenants_that_owe_nothing_are_forgotten():
    admission = Admission(10)
    for number in range(1000):
        admission.take(ticket(f"tenant-{number}"), 0.0)
    assert admission.snapshot()["tenants_known"] <= 128


@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", 11), ("priority", -11), ("deadline_s", nan), ("cost_tokens", inf), ("lead_s", nan)],
)
def test_what_no_order_can_be_made_of_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        Ticket(payload=None, arrived_s=0.0, **{field: value})


def test_a_weight_must_be_above_0():
    with pytest.raises(ConfigError, match="'a'"):
        Admission(1, weights={"a": 0.0})


# --- what is learnt


def wait_and_take(admission, waited_s, times):
    for at in range(times):
        each = ticket(deadline_s=at + 1000.0)
        assert admission.push(each, float(at), CAPACITY) is None
        admission.take(each, at + waited_s)


def test_predictions_follow_what_waits_really_are():
    admission = Admission(10)
    assert admission.predict(ticket(), CAPACITY) == pytest.approx(1.0)
    wait_and_take(admission, 3.0, 200)
    assert admission.predict(ticket(), CAPACITY) == pytest.approx(3.0, rel=0.05)
    wait_and_take(admission, 0.5, 300)
    assert admission.predict(ticket(), CAPACITY) == pytest.approx(0.5, rel=0.05)


def test_a_wide_spread_of_waits_is_allowed_for():
    admission = Admission(10)
    for _ in range(100):
        wait_and_take(admission, 0.5, 1)
        wait_and_take(admission, 1.5, 1)
    assert admission.predict(ticket(), CAPACITY) > 2.0


def test_misses_widen_the_margin():
    admission = room()
    before = admission.snapshot()["wait_margin"]
    admission.push(ticket(deadline_s=900.0), 0.0, CAPACITY)
    admission.expire(900.0)
    assert admission.snapshot()["wait_margin"] > before


def test_a_stall_does_not_close_the_door_for_ever():
    admission = Admission(10)
    wait_and_take(admission, 500.0, 200)
    pushes = [admission.push(ticket(deadline_s=4.0), 0.0, CAPACITY) for _ in range(200)]
    assert pushes[0].reason is Reason.DEADLINE
    assert None in pushes


NOISY = Capacity(slots=4, tokens_s=100.0, service_s=4.0, service_dev_s=4.0)
"""A slot comes free each second; the margin is 5 s and more."""


def hurried(tenant, at_s=0.0, **fields):
    return ticket(tenant, arrived_s=at_s, deadline_s=at_s + 3.0, **fields)


def test_only_who_has_little_of_what_waits_is_let_in_without_a_margin():
    admission = room(ticket("much", 40.0), ticket("some", 10.0), ticket("some", 10.0))
    assert admission.push(hurried("none"), 0.0, NOISY) is None
    assert admission.push(hurried("none"), 0.0, NOISY) is None  # 10 of 70 tokens; a third is its share
    assert admission.push(hurried("much"), 0.0, NOISY).reason is Reason.DEADLINE
    assert admission.push(hurried("some"), 0.0, NOISY).reason is Reason.DEADLINE


def test_nobody_is_let_in_without_a_margin_who_should_be_late():
    admission = room(*[ticket("much", 50.0) for _ in range(10)])
    assert admission.push(hurried("a", lead_s=8.0, mean_lead_s=2.5), 0.0, NOISY).reason is Reason.DEADLINE
    each = hurried("a", lead_s=8.0, mean_lead_s=1.0)
    assert admission.push(each, 0.0, NOISY) is None
    assert admission.next_expiry() == 2.0


def test_after_misses_a_margin_is_asked_of_everybody_until_many_were_in_time_again():
    admission = room(*[ticket("much", 50.0) for _ in range(10)])
    admission.began_late()
    refused = hurried("a")
    assert admission.push(refused, 0.0, NOISY).reason is Reason.DEADLINE
    for _ in range(50):
        admission.take(ticket("much", deadline_s=9.0), 0.0)
    assert admission.push(hurried("a"), 0.0, NOISY) is None


def test_after_a_stall_one_who_is_in_a_hurry_is_let_in_now_and_then_although_nobody_else_comes():
    admission = room(*[ticket("much", 50.0) for _ in range(10)])
    for _ in range(100):
        admission.began_late()
    pushes = [admission.push(hurried("a"), 0.0, NOISY) for _ in range(100)]
    assert pushes[0].reason is Reason.DEADLINE
    assert None in pushes


def test_pinned_tickets_teach_nothing():
    admission = Admission(10)
    pinned = ticket(only="engine-1")
    admission.push(pinned, 0.0, CAPACITY)
    admission.take(pinned, 1000.0)
    assert admission.predict(ticket(), CAPACITY) == pytest.approx(1.0)


def test_the_snapshot_is_json_and_tells_who_waits_and_who_was_refused():
    admission = room(ticket("a", 30.0), ticket("b", priority=2), limit=2)
    admission.push(ticket("a"), 0.0, CAPACITY)
    admission.push(ticket("b", priority=2), 0.0, CAPACITY)
    shown = json.loads(json.dumps(admission.snapshot()))
    assert shown["waiting"] == 2
    assert [(row["tenant"], row["priority"], row["waiting"]) for row in shown["tenants"]] == [("b", 2, 2)]
    assert shown["rejected"] == {"full": 1, "deadline": 0, "expired": 0}
    assert shown["evicted"] == 1
    assert shown["predicted_wait_s"] == pytest.approx(1.2)
    assert room().snapshot()["predicted_wait_s"] is None


# --- a minute of overload


SLOTS, TOKENS_S, SECONDS = 16, 1600.0, 60.0


class Minute:
    """An exact simulation of one model's slots: Poisson arrivals, service times that nobody knows beforehand."""

    def __init__(self, seed, rates, allowances_s, limit=256):
        self.dice = random.Random(seed)
        self.admission = Admission(limit)
        self.free, self.now_s, self.serial, self.events = SLOTS, 0.0, 0, []
        self.outcomes, self.served, self.slack_s = defaultdict(Counter), Counter(), []
        self.allowances_s = allowances_s
        self.arrivals = Counter()
        for tenant, rate in rates.items():
            at_s = self.dice.expovariate(rate)
            while at_s < SECONDS:
                self.arrivals[tenant] += 1
                self.later(at_s, tenant)
                at_s += self.dice.expovariate(rate)
        while self.events:
            self.step()

    def later(self, at_s, what):
        self.serial += 1
        heapq.heappush(self.events, (at_s, self.serial, what))

    def step(self):
        at_s, _, what = heapq.heappop(self.events)
        while self.admission.next_expiry() <= at_s:
            self.now_s = self.admission.next_expiry()
            for gone in self.admission.expire(self.now_s):
                self.refuse(gone)
        self.now_s = at_s
        if isinstance(what, str):
            self.arrive(what)
        else:
            each, actual = what
            self.free += 1
            self.admission.settle(each.tenant, each.cost_tokens, actual)
            if first := next(self.admission.order(), None):
                self.start(first)
        assert 0 <= self.free <= SLOTS

    def arrive(self, tenant):
        deadline_s = self.now_s + self.dice.choice(self.allowances_s)
        cost = float(self.dice.randint(20, 180))
        new = ticket(tenant, cost, arrived_s=self.now_s, deadline_s=deadline_s, lead_s=cost / 1000)
        if self.free and not self.admission:
            self.start(new)
            return
        refused = self.admission.push(new, self.now_s, Capacity(SLOTS, TOKENS_S, 1.0, 0.5))
        if refused:
            self.refuse(refused)

    def refuse(self, refused):
        assert 1.0 <= refused.retry_after_s <= 600.0
        assert self.now_s <= refused.ticket.deadline_s
        self.outcomes[refused.ticket.tenant][str(refused.reason)] += 1

    def start(self, each):
        self.admission.take(each, self.now_s)
        self.free -= 1
        actual = each.cost_tokens * self.dice.lognormvariate(-0.125, 0.5)
        self.later(self.now_s + actual * SLOTS / TOKENS_S, (each, actual))
        self.outcomes[each.tenant]["began"] += 1
        self.slack_s.append(each.deadline_s - self.now_s - each.lead_s)
        if self.now_s < SECONDS:
            self.served[each.tenant] += actual

    def total(self, outcome):
        return sum(each[outcome] for each in self.outcomes.values())


def jain(values):
    """Jain, Chiu and Hawe's fairness index: 1 for equal shares, 1/n for one that has all."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


@pytest.mark.parametrize("limit", [256, 32])
@pytest.mark.parametrize("allowances_s", [(8.0,), (2.0,), (4.0, 15.0)])
def test_twice_the_load_for_a_minute_is_shared_fairly_and_who_is_let_in_begins_in_time(allowances_s, limit):
    rates = {"flood": 15.0, "b": 7.0, "c": 5.5, "d": 5.0}  # 32.5 requests a second, 16 can be served
    minute = Minute(7, rates, allowances_s, limit)
    assert {tenant: sum(each.values()) for tenant, each in minute.outcomes.items()} == minute.arrivals
    assert minute.admission.count == 0
    assert jain(list(minute.served.values())) >= 0.95
    began, expired = minute.total("began"), minute.total("expired")
    assert sum(slack_s >= 0 for slack_s in minute.slack_s) >= 0.99 * (began + expired)
    assert began >= 0.95 * SECONDS * TOKENS_S / 100  # and no slot was left idle to get there
    assert sum(minute.served.values()) >= 0.95 * SECONDS * TOKENS_S


def test_a_tenant_below_its_share_does_not_notice_a_flood():
    minute = Minute(3, {"flood": 40.0, "quiet": 2.0}, (6.0,))
    assert minute.outcomes["quiet"]["began"] >= 0.99 * minute.arrivals["quiet"]
    assert minute.outcomes["flood"]["deadline"] > 500
