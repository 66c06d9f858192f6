from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError, PlacementError
from lltm_ray.gpu.shares import NodeCapacity, ShareDemand, default_cpu_share, memory_budget, plan_shares

GIB = 2**30


def demands(count: int, gpus: float, cpus: float = 0.0) -> list[ShareDemand]:
    return [ShareDemand(engine=f"e{number}", gpus=gpus, cpus=cpus) for number in range(count)]


def test_two_halves_share_one_gpu_and_the_other_stays_free() -> None:
    node = NodeCapacity(node_id="n", cpus=4, gpus=(1.0, 1.0))
    assert [plan.gpu_ids for plan in plan_shares(demands(2, 0.5), [node])] == [(0,), (0,)]


def test_a_fraction_goes_to_the_gpu_that_is_shared_already() -> None:
    node = NodeCapacity(node_id="n", cpus=4, gpus=(1.0, 0.5, 0.3))
    assert plan_shares(demands(1, 0.4), [node])[0].gpu_ids == (1,)


def test_wide_engines_are_placed_before_narrow_ones_break_their_gpus() -> None:
    wide = ShareDemand(engine="wide", gpus=2)
    nodes = [NodeCapacity(node_id="a", cpus=1, gpus=(1.0, 1.0)), NodeCapacity(node_id="b", cpus=1, gpus=(1.0,))]
    plans = plan_shares([*demands(2, 0.5), wide], nodes)
    assert [(plan.engine, plan.node_id, plan.gpu_ids) for plan in plans] == [
        ("e0", "b", (0,)),
        ("e1", "b", (0,)),
        ("wide", "a", (0, 1)),
    ]


def test_whole_gpus_never_come_from_two_nodes() -> None:
    nodes = [NodeCapacity(node_id=name, cpus=8, gpus=(1.0,)) for name in ("a", "b")]
    with pytest.raises(PlacementError) as caught:
        plan_shares(demands(1, 2, cpus=1), nodes)
    assert caught.value.need == "2 whole GPUs and 1 CPU (e0)"
    assert caught.value.largest_free == "1 whole GPU and 8 CPUs on node a"


def test_a_partly_used_gpu_is_not_whole() -> None:
    with pytest.raises(PlacementError, match=r"the largest free share is 0\.9999 of a GPU and 1 CPU on node n"):
        plan_shares(demands(1, 1), [NodeCapacity(node_id="n", cpus=1, gpus=(0.9999,))])


def test_engines_without_a_gpu_go_where_most_cpus_are_free() -> None:
    nodes = [NodeCapacity(node_id="small", cpus=2), NodeCapacity(node_id="large", cpus=3)]
    plans = plan_shares(demands(4, 0, cpus=1), nodes)
    assert sorted(plan.node_id for plan in plans) == ["large", "large", "small", "small"]
    assert plans[0].node_id == "large"
    assert all(plan.gpu_ids == () for plan in plans)


def test_a_gpu_without_cpus_beside_it_is_no_room() -> None:
    with pytest.raises(PlacementError) as caught:
        plan_shares(demands(1, 0.5, cpus=2), [NodeCapacity(node_id="n", cpus=1, gpus=(1.0,))])
    assert str(caught.value) == (
        "no room for an engine that needs 0.5 of a GPU and 2 CPUs (e0); "
        "the largest free share is 1 whole GPU and 1 CPU on node n"
    )


def test_one_engine_too_many_places_none_and_names_what_is_left() -> None:
    with pytest.raises(PlacementError) as caught:
        plan_shares(demands(3, 0.4), [NodeCapacity(node_id="n", cpus=1, gpus=(1.0,))])
    assert caught.value.largest_free == "0.2 of a GPU and 1 CPU on node n"


def test_a_cpu_engine_is_refused_without_a_word_on_gpus() -> None:
    with pytest.raises(PlacementError) as caught:
        plan_shares(demands(1, 0, cpus=4), [NodeCapacity(node_id="n", cpus=2, gpus=(1.0,))])
    assert (caught.value.need, caught.value.largest_free) == ("4 CPUs (e0)", "2 CPUs on node n")


def test_no_nodes_is_said_so() -> None:
    with pytest.raises(PlacementError, match="there are no nodes"):
        plan_shares(demands(1, 0), [])


def test_ten_tenths_fill_one_gpu_despite_binary_fractions() -> None:
    plans = plan_shares(demands(10, 0.1), [NodeCapacity(node_id="n", cpus=0, gpus=(1.0,))])
    assert {plan.gpu_ids for plan in plans} == {(0,)}


def test_the_same_demand_object_may_appear_twice() -> None:
    same = ShareDemand(engine="e", gpus=1)
    plans = plan_shares([same, same], [NodeCapacity(node_id="n", cpus=0, gpus=(1.0, 1.0))])
    assert [plan.gpu_ids for plan in plans] == [(0,), (1,)]


@pytest.mark.parametrize("gpus", [-0.5, 1.5, float("nan"), float("inf"), 1e-5])
def test_an_impossible_share_is_refused_by_its_name(gpus: float) -> None:
    with pytest.raises(ConfigError, match="gpu_share"):
        ShareDemand(engine="e", gpus=gpus)


@pytest.mark.parametrize("cpus", [-1.0, float("nan")])
def test_impossible_cpus_are_refused_by_their_name(cpus: float) -> None:
    with pytest.raises(ConfigError, match="cpu_share"):
        ShareDemand(engine="e", cpus=cpus)


shares = st.one_of(st.just(0.0), st.integers(1, 10_000).map(lambda n: n / 10_000), st.integers(1, 4).map(float))
cpus = st.integers(0, 400).map(lambda n: n / 100)
fleets = st.lists(st.tuples(shares, cpus), max_size=12).map(
    lambda pairs: [ShareDemand(engine=f"e{at}", gpus=gpus, cpus=cpu) for at, (gpus, cpu) in enumerate(pairs)]
)
gpu_lists = st.lists(st.one_of(st.just(1.0), st.integers(0, 10_000).map(lambda n: n / 10_000)), max_size=5)
clusters = st.lists(st.tuples(cpus, gpu_lists), max_size=4).map(
    lambda pairs: [NodeCapacity(node_id=f"n{at}", cpus=cpu, gpus=tuple(gpus)) for at, (cpu, gpus) in enumerate(pairs)]
)


@given(fleet=fleets, cluster=clusters)
def test_no_plan_is_ever_over_capacity(fleet: list[ShareDemand], cluster: list[NodeCapacity]) -> None:
    try:
        plans = plan_shares(fleet, cluster)
    except PlacementError:
        return
    assert [(plan.engine, plan.gpus, plan.cpus) for plan in plans] == [(d.engine, d.gpus, d.cpus) for d in fleet]
    for node in cluster:
        here = [plan for plan in plans if plan.node_id == node.node_id]
        assert sum(plan.cpus for plan in here) <= node.cpus + 1e-6
        for gpu_id, free in enumerate(node.gpus):
            assert sum(min(plan.gpus, 1) for plan in here if gpu_id in plan.gpu_ids) <= free + 1e-6
        for plan in here:
            assert len(set(plan.gpu_ids)) == len(plan.gpu_ids) == (0 if plan.gpus == 0 else max(1, int(plan.gpus)))


@given(fleet=fleets, cluster=clusters, seed=st.integers())
def test_the_order_of_the_demands_changes_nothing(
    fleet: list[ShareDemand], cluster: list[NodeCapacity], seed: int
) -> None:
    shuffled = random.Random(seed).sample(fleet, len(fleet))
    assert outcome(fleet, cluster) == outcome(shuffled, cluster) == outcome(fleet, cluster)


@given(cluster=clusters, count=st.integers(1, 12), share=shares, cpu=cpus)
def test_a_fleet_of_equals_that_fits_also_fits_with_one_engine_less(
    cluster: list[NodeCapacity], count: int, share: float, cpu: float
) -> None:
    if isinstance(outcome(demands(count, share, cpu), cluster), set):
        assert isinstance(outcome(demands(count - 1, share, cpu), cluster), set)


@given(
    count=st.integers(0, 12),
    share=st.integers(1, 100).map(lambda n: n / 100),
    gpus=st.integers(1, 4).map(lambda n: (1.0,) * n),
)
def test_equal_fractions_on_whole_gpus_fit_exactly_when_arithmetic_says_so(
    count: int, share: float, gpus: tuple[float, ...]
) -> None:
    room = len(gpus) * (10_000 // round(share * 10_000))
    fits = isinstance(outcome(demands(count, share), [NodeCapacity(node_id="n", cpus=0, gpus=gpus)]), set)
    assert fits == (count <= room)


def outcome(fleet: list[ShareDemand], cluster: list[NodeCapacity]) -> object:
    try:
        return set(plan_shares(fleet, cluster))
    except PlacementError as error:
        return str(error)


@pytest.mark.parametrize(
    ("engines", "cpus_total", "share"),
    [(2, 2, 1.0), (1, 64, 1.0), (3, 2, 0.66), (4, 2, 0.5), (7, 1, 0.14), (3, 0, 0.0), (0, 0, 1.0)],
)
def test_engines_without_a_gpu_take_a_cpu_each_or_divide_them(engines: int, cpus_total: float, share: float) -> None:
    assert default_cpu_share(engines, cpus_total) == share


@given(engines=st.integers(1, 1000), cpus_total=st.floats(0, 512))
def test_default_cpu_shares_never_add_up_to_more_than_there_is(engines: int, cpus_total: float) -> None:
    assert engines * default_cpu_share(engines, cpus_total) <= cpus_total + 1e-6


def test_half_a_gpu_may_plan_with_half_less_a_margin() -> None:
    assert memory_budget(100 * GIB, 100 * GIB, 0.5) == 49 * GIB


def test_what_others_hold_already_is_not_planned_with() -> None:
    assert memory_budget(200 * GIB, 50 * GIB, 0.5) == 49 * GIB


@given(total=st.integers(0, 2**40), used=st.floats(0, 1), share=st.floats(0, 8))
def test_a_memory_budget_is_within_its_share_and_what_is_free(total: int, used: float, share: float) -> None:
    free = int(total * used)
    budget = memory_budget(total, free, share)
    assert 0 <= budget <= min(free, total * share)
    assert budget >= min(free, int(total * min(share, 1))) * 0.97 - 1
