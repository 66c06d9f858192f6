"""Engines by demand: bounds, rest, eviction, calm; on chosen cases, on random ones, and over simulated time."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.records import EngineInfo, EngineState, ModelDemand
from lltm_ray.routing.rows import LATE_DETAIL
from lltm_ray.routing.scaling import (
    Evict,
    Look,
    ModelRules,
    ScalingSettings,
    ScalingState,
    Start,
    Stop,
    after_failure,
    after_success,
    plan,
)

SETTINGS = ScalingSettings()
READY, STARTING, DRAINING, FAILED = (
    EngineState.READY,
    EngineState.STARTING,
    EngineState.DRAINING,
    EngineState.FAILED,
)


def engine(name, model="a", state=READY, busy=0, slots=4, detail=""):
    return EngineInfo(
        name=name, model=model, state=state, slots_busy=busy, slots_total=slots, node_id="n", detail=detail
    )


def asked(model="a", **demand):
    return ModelDemand(model=model, **{"waiting": 1, **demand})


def run(looks, state=None):
    """All actions of several looks in a row, and the state after them."""
    state, done = state or ScalingState(), []
    for look in looks:
        state, actions = plan(look, state, SETTINGS)
        done.append(actions)
    return state, done


def last(*looks):
    return run(looks)[1][-1]


def look(rules, engines=(), demand=(), now_s=0.0, **more):
    rules = rules if isinstance(rules, tuple) else (rules,)
    return Look(rules=rules, engines=tuple(engines), demand=tuple(demand), now_s=now_s, **more)


A, B = ModelRules(name="a"), ModelRules(name="b")


def test_a_cold_model_starts_when_a_request_waits_or_woke_it_and_not_before():
    assert last(look(A)) == ()
    assert last(look(A, demand=[asked()])) == (Start("a"),)
    assert last(look(A, woken=frozenset("a"))) == (Start("a"),)
    assert last(look(A, [engine("e", state=STARTING)], [asked()])) == ()
    assert last(look(A, [engine("e", state=DRAINING)], [asked()])) == (Start("a"),), "it does not come back"


def test_the_floor_is_filled_without_demand_one_at_a_time():
    rules = ModelRules(name="a", floor=2, ceiling=3)
    assert last(look(rules, [engine("e")])) == (Start("a"),)
    assert last(look(rules, [engine("e"), engine("f", state=STARTING)])) == ()
    assert last(look(rules, [engine("e"), engine("f")])) == ()


def test_an_engine_is_added_only_after_the_wait_was_long_for_a_while():
    rules = ModelRules(name="a", ceiling=2)
    demand = [asked(running=4, predicted_wait_s=3.0)]
    _, done = run([look(rules, [engine("e", busy=4)], demand, now_s) for now_s in (0.0, 0.1, 0.2, 1.9, 2.0)])
    assert done == [(), (), (), (), (Start("a"),)]
    short = [asked(running=4, predicted_wait_s=1.9)]
    assert not any(run([look(rules, [engine("e", busy=4)], short, float(now_s)) for now_s in range(20)])[1])


def test_refused_requests_count_as_a_long_wait():
    rules = ModelRules(name="a", ceiling=2)
    looks = [look(rules, [engine("e", busy=4)], [asked(waiting=0, rejected=n)], float(n)) for n in range(4)]
    assert run(looks)[1][-1] == (Start("a"),)


def test_an_engine_goes_when_the_others_would_do_but_not_below_what_is_kept():
    rules = ModelRules(name="a", keep=1, ceiling=3)
    demand = [asked(waiting=0, running=1)]
    two = [engine("engine-9"), engine("engine-10")]
    assert last(look(rules, two, demand, 0.0), look(rules, two, demand, 60.0)) == (Stop("engine-10", "the others do"),)
    one = [engine("e")]
    assert last(look(rules, one, demand, 0.0), look(rules, one, demand, 600.0)) == ()
    kept = replace(rules, keep=2)
    assert last(look(kept, two, demand, 0.0), look(kept, two, demand, 600.0)) == ()


def test_idling_takes_all_down_to_the_floor_whatever_is_kept():
    rules = ModelRules(name="a", keep=2, ceiling=2, idle_timeout_s=30.0)
    two = [engine("e"), engine("f")]
    assert last(look(rules, two, (), 0.0), look(rules, two, (), 29.0)) == ()
    assert last(look(rules, two, (), 0.0), look(rules, two, (), 30.0)) == (Stop("f", "no request for 30 s"),)
    assert last(look(rules, two[:1], (), 0.0), look(rules, two[:1], (), 30.0)) == (Stop("e", "no request for 30 s"),)
    floor = replace(rules, floor=1)
    assert last(look(floor, two[:1], (), 0.0), look(floor, two[:1], (), 99.0)) == ()
    again = [asked(waiting=0, last_request_unix_nano=7)]
    assert last(look(rules, two, (), 0.0), look(rules, two, again, 29.0), look(rules, two, again, 31.0)) == ()


def evicting(*rules, engines, stuck="s", need=1, **more):
    """A start of `a` that fits once `need` engines are gone, seen twice with ten seconds between."""
    engines = [engine(stuck, "a", STARTING).with_(node_id=""), *engines]
    more = {"stuck": frozenset({stuck}), "fits": lambda _name, victims: len(victims) >= need, **more}
    looks = [look((A, *rules), engines, [asked()], now_s, **more) for now_s in (0.0, 10.0)]
    return last(*looks)


def test_room_is_made_by_the_lowest_priority_then_the_longest_idle_then_the_quickest_to_load():
    b, c = B, ModelRules(name="c")
    assert evicting(replace(b, priority=1), c, engines=[engine("x", "b"), engine("y", "c")]) == (Evict("y", "a"),)
    both = [engine("x", "b"), engine("y", "c")]
    assert evicting(b, c, engines=both, load_s={"b": 9.0, "c": 1.0}) == (Evict("y", "a"),)
    assert evicting(b, c, engines=both, need=2) == (Evict("x", "a"), Evict("y", "a"))
    assert evicting(b, c, engines=both, need=3) == (), "in vain"


@pytest.mark.parametrize(
    ("rules", "victim"),
    [
        (replace(B, pinned=True), engine("x", "b")),
        (replace(B, floor=1), engine("x", "b")),
        (B, engine("x", "b", busy=1)),
        (B, engine("x", "b", state=STARTING)),
    ],
)
def test_what_is_pinned_busy_or_the_least_that_must_be_makes_no_room(rules, victim):
    assert evicting(rules, engines=[victim]) == ()


def test_nobody_is_evicted_while_others_go_or_what_is_free_is_not_known():
    assert evicting(B, engines=[engine("x", "b"), engine("y", "b", DRAINING)]) == ()
    assert evicting(B, engines=[engine("x", "b")], may_evict=False) == ()


def test_only_what_is_needed_is_evicted():
    small, large = engine("x", "b"), engine("y", "c")
    rules = (B, replace(B, name="c", priority=1))
    assert evicting(*rules, engines=[small, large], fits=lambda _name, victims: "y" in victims) == (Evict("y", "a"),)


def test_a_start_that_waits_for_room_is_given_up_when_nobody_asks_any_more():
    stuck = [engine("s", state=STARTING).with_(node_id="")]
    more = {"stuck": frozenset("s")}
    assert last(look(A, stuck, [asked()], 0.0, **more), look(A, stuck, (), 9.0, **more)) == ()
    assert last(look(A, stuck, [asked()], 0.0, **more), look(A, stuck, (), 10.0, **more)) == (
        Stop("s", "nobody asks for it any more"),
    )


def test_failed_starts_are_tried_again_ever_more_slowly():
    state, pauses = ScalingState(), []
    for _ in range(9):
        state = after_failure(state, "a", 0.0, SETTINGS)
        pauses.append(state.models["a"].retry_at_s)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert plan(look(A, (), [asked()], 299.0), state, SETTINGS)[1] == ()
    assert plan(look(A, (), [asked()], 300.0), state, SETTINGS)[1] == (Start("a"),)
    assert plan(look(A, (), [asked()], 1.0), after_success(state, "a"), SETTINGS)[1] == (Start("a"),)


def test_what_failed_is_replaced_and_what_is_late_gets_its_time():
    failed, late = engine("e", state=FAILED, detail="exit code 1"), engine("e", state=FAILED, detail=LATE_DETAIL)
    assert last(look(A, [failed], [asked()])) == (Stop("e", "it did not come back: exit code 1"), Start("a"))
    assert last(look(A, [failed])) == ()
    assert last(look(A, [late], [asked()])) == ()
    gone = last(look(A, [late], [asked()], 0.0), look(A, [late], [asked()], 60.0))
    assert gone[0] == Stop("e", f"it did not come back: {LATE_DETAIL}")


# --- any situation

names = st.sampled_from("abc")
rules_ = st.builds(
    lambda name, floor, keep, more, idle, pinned, priority: ModelRules(
        name=name, floor=floor, keep=keep, ceiling=max(1, floor + more), idle_timeout_s=idle, pinned=pinned,
        priority=priority,
    ),
    names, st.integers(0, 2), st.integers(0, 3), st.integers(0, 2), st.none() | st.floats(1, 100), st.booleans(),
    st.integers(-1, 1),
)  # fmt: skip
engines_ = st.lists(
    st.builds(
        lambda model, state, busy, detail, placed: engine("", model, state, busy, detail=detail).with_(
            node_id="n" if placed else ""
        ),
        names, st.sampled_from([READY, READY, STARTING, DRAINING, FAILED]), st.integers(0, 4),
        st.sampled_from(["", LATE_DETAIL]), st.booleans(),
    ),
    max_size=8,
).map(lambda found: tuple(each.with_(name=f"engine-{at}") for at, each in enumerate(found)))  # fmt: skip
demand_ = st.lists(
    st.builds(
        ModelDemand, model=names, waiting=st.integers(0, 3), running=st.integers(0, 9),
        predicted_wait_s=st.floats(0, 9), last_request_unix_nano=st.integers(0, 3), rejected=st.integers(0, 5),
    ),
    max_size=3, unique_by=lambda each: each.model,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    rules=st.lists(rules_, min_size=1, max_size=3, unique_by=lambda each: each.name),
    looks=st.lists(st.tuples(engines_, demand_, st.floats(0, 90)), min_size=1, max_size=5),
    woken=st.frozensets(names),
    need=st.integers(0, 3),
)
def test_no_decision_breaks_a_bound_or_takes_a_busy_engine(rules, looks, woken, need):
    state, now_s = ScalingState(), 0.0
    for engines, demand, passed_s in looks:
        now_s += passed_s
        stuck = frozenset(each.name for each in engines if each.state is STARTING and not each.node_id)
        seen = look(tuple(rules), engines, demand, now_s, woken=woken, stuck=stuck,
                    fits=lambda _name, victims: len(victims) >= need)  # fmt: skip
        state, actions = plan(seen, state, SETTINGS)
        check_bounds(seen, actions)
        check_cold_models(seen, actions)


def check_bounds(seen, actions):
    by_name = {each.name: each for each in seen.engines}
    taken = [action.engine for action in actions if isinstance(action, Stop | Evict)]
    assert len(taken) == len(set(taken))
    for name in taken:
        one = by_name[name]
        assert one.state in (READY, STARTING, FAILED)
        assert one.state is not READY or one.slots_busy == 0, "never a busy one"
    for rules in seen.rules:
        own = [each for each in seen.engines if each.model == rules.name]
        live = [e for e in own if e.state in (READY, STARTING) or (e.state is FAILED and e.detail)]
        starts = actions.count(Start(rules.name))
        gone = sum(by_name[name].state in (READY, STARTING) for name in taken if by_name[name].model == rules.name)
        assert starts <= 1
        assert not starts or len(live) + 1 <= rules.ceiling
        assert not gone or len(live) - gone >= rules.floor
        assert not (starts and gone), "one change at a time"
        evicted = [a for a in actions if isinstance(a, Evict) and by_name[a.engine].model == rules.name]
        assert not (rules.pinned and evicted)


def check_cold_models(seen, actions):
    """A request that waits for a cold model leads to a start, and to evictions where they help."""
    waiting = {each.model for each in seen.demand if each.waiting} | set(seen.woken)
    for rules in seen.rules:
        own = [each for each in seen.engines if each.model == rules.name]
        live = [e for e in own if e.state in (READY, STARTING) or (e.state is FAILED and e.detail)]
        if rules.name in waiting and not live:
            assert Start(rules.name) in actions


@settings(max_examples=40, deadline=None)
@given(
    load=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    slots=st.integers(1, 4),
    ceiling=st.integers(1, 6),
    keep=st.integers(0, 3),
)
def test_a_constant_load_settles_on_one_number_of_engines(load, slots, ceiling, keep):
    """Simulated seconds: first one load, then another; at the end of each nothing changes any more."""
    rules = ModelRules(name="a", keep=min(keep, ceiling), ceiling=ceiling)
    sim = Simulation(rules, slots)
    for level in load:
        for _ in range(60 * (ceiling + 2)):
            sim.second(level)
        before = len(sim.engines)
        assert not any(sim.second(level) for _ in range(200)), "flapping"
        assert before == len(sim.engines)
        assert before * slots >= min(level, ceiling * slots), "what waits for ever gets an engine"


class Simulation:
    """Engines that start in 3 s and stop in 1 s under a constant number of requests."""

    def __init__(self, rules, slots):
        self.rules, self.slots, self.state, self.now_s, self.engines, self.due = (
            rules,
            slots,
            ScalingState(),
            0.0,
            {},
            {},
        )
        self.serial, self.last = 0, ()

    def second(self, level):
        self.now_s += 1.0
        for name in [name for name, at_s in self.due.items() if at_s <= self.now_s]:
            del self.due[name]
            if self.engines[name].state is STARTING:
                self.engines[name] = self.engines[name].with_(state=READY)
            else:
                del self.engines[name]
        self._serve(level)
        running = sum(each.slots_busy for each in self.engines.values())
        waiting = level - running
        demand = ModelDemand(
            model="a", waiting=waiting, running=running, predicted_wait_s=9.0 if waiting else 0.0,
            last_request_unix_nano=int(self.now_s) if level else 0,
        )  # fmt: skip
        seen = look(self.rules, self.engines.values(), [demand], self.now_s)
        self.state, self.last = plan(seen, self.state, SETTINGS)
        check_bounds(seen, self.last)
        for action in self.last:
            self._carry_out(action)
        return self.last

    def _serve(self, level):
        for name, each in self.engines.items():
            if each.state is READY:
                busy = min(level, self.slots)
                level -= busy
                self.engines[name] = each.with_(slots_busy=busy)

    def _carry_out(self, action):
        if isinstance(action, Start):
            self.serial += 1
            name = f"engine-{self.serial}"
            self.engines[name], self.due[name] = engine(name, state=STARTING, slots=self.slots), self.now_s + 3
        else:
            self.engines[action.engine] = self.engines[action.engine].with_(state=DRAINING, slots_busy=0)
            self.due[action.engine] = self.now_s + 1
