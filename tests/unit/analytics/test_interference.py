"""Who stalled whom."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pyarrow as pa
import pytest

from lltm_ray.analytics import interference
from lltm_ray.analytics.answer import Answer
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.overlaps import Timeline, count_overlaps
from tests.fleet_rows import PREFILL_DRAG, Plan, fleet_rows
from tests.unit.analytics.made_rows import PANDAS, Asked, Try, trace_of

ANSWER = {"engines": {"engine", "gpu", "stalled_s", "decode_s", "share"}} | {
    "aggressors": {"trace_id", "request_id", "tenant", "engine", "prefill_tokens", "prefill_s", "victims", "stalled_s"},
    "tenants": {"tenant", "stalled_s", "requests"},
}


def intervals(dice, count, groups=3):
    start = dice.integers(0, 30, count) / 2
    return dice.integers(0, groups, count), start, start + dice.integers(0, 12, count) / 2


def pairs(of, among):
    """Seconds that each of `of` shares with each of `among`, one pair after the other."""
    found = np.zeros((len(of[0]), len(among[0])))
    for i, (group, start, end) in enumerate(zip(*of, strict=True)):
        for j, (other, begin, stop) in enumerate(zip(*among, strict=True)):
            found[i, j] = max(min(end, stop) - max(start, begin), 0.0) if group == other else 0.0
    return found


@pytest.mark.parametrize("seed", range(20))
def test_integrals_of_levels_are_sums_over_all_pairs(seed):
    dice = np.random.default_rng(seed)
    some, others = intervals(dice, 40), intervals(dice, int(dice.integers(0, 30)))
    weight = dice.random(len(others[0]))
    line = Timeline(np, {"some": some, "others": others})
    seconds = pairs(some, others)
    assert line.within(line.level("others"), *some) == pytest.approx(seconds.sum(axis=1))
    assert line.within(line.level("others", weight), *some) == pytest.approx(seconds @ weight)
    assert count_overlaps(np, others, some)[others[2] > others[1]].tolist() == [
        sum(
            group == other and begin < stop and end > start
            for other, start, stop in zip(*some, strict=True)
            if stop > start or begin < start < end
        )
        for group, begin, end in zip(*others, strict=True)
        if end > begin
    ]


def test_a_timeline_of_nothing_has_no_seconds():
    none = (np.empty(0, np.int64), np.empty(0), np.empty(0))
    line = Timeline(np, {"none": none})
    assert line.within(line.level("none"), np.array([0]), np.array([1.0]), np.array([2.0])).tolist() == [0.0]


@pytest.mark.parametrize("seed", range(5))
def test_time_outside_all_layers_is_no_other_groups(seed):
    dice = np.random.default_rng(seed)
    some = intervals(dice, 20)
    line = Timeline(np, {"some": some})
    group = np.array([0, 1, 2, 0, 1])
    start, end = np.array([-90.0, -5, 28, 500, -70]), np.array([400.0, 55, 31, 900, -60])
    seconds = pairs((group, start, end), some).sum(axis=1)
    assert line.within(line.level("some"), group, start, end) == pytest.approx(seconds)
    assert line.mean(line.level("some"), group, start, end) == pytest.approx(seconds / (end - start))
    assert seconds[:2].min() > 0 == seconds[3:].max()


def by_hand(stalls):
    """Stalled seconds of each prefill, summed over slices of time in which nothing begins or ends."""
    decodes, prefills, engines = stalls.decodes, stalls.prefills, stalls.engines
    found = np.zeros(len(prefills))
    for engine in engines["engine"]:
        lost = decodes[decodes["engine"] == engine]
        took = prefills[prefills["engine"] == engine]
        ratio = float(engines["beside_ratio"][engine])
        moments = sorted({*lost["start_s"], *lost["end_s"], *took["start_s"], *took["end_s"]})
        for begin, end in itertools.pairwise(moments):
            running = took[(took["start_s"] <= begin) & (took["end_s"] >= end)]
            waiting = ((lost["start_s"] <= begin) & (lost["end_s"] >= end)).sum()
            found[running.index] += ratio * waiting * (end - begin) / max(len(running), 1)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_what_prefills_took_is_what_decodes_lost_as_counted_by_hand(seed):
    plan = Plan(seed=seed, seconds=40, aggressor="batch", gpus=0)
    stalls = interference.find_stalls(build_trace(fleet_rows(plan), PANDAS))
    assert stalls.decodes["stalled_s"].sum() > 10
    assert stalls.prefills["stalled_s"].to_numpy() == pytest.approx(by_hand(stalls), abs=1e-6)
    assert stalls.prefills["stalled_s"].sum() == pytest.approx(stalls.decodes["stalled_s"].sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_ratio_is_what_a_prefill_takes_from_its_neighbours(seed):
    trace = build_trace(fleet_rows(Plan(seed=seed, aggressor="batch")), PANDAS)
    ratio = interference.find_stalls(trace).engines["beside_ratio"]
    assert ratio.to_numpy() == pytest.approx(1 - 1 / PREFILL_DRAG, rel=0.15)


@pytest.mark.parametrize("seed", range(3))
def test_the_tenant_with_long_prompts_is_named_with_what_it_cost(seed):
    answer = interference.analyze(build_trace(fleet_rows(Plan(seed=seed, aggressor="batch")), PANDAS))
    (finding,) = interference.judge(answer)
    assert (finding.kind, finding.subject) == ("interference", "batch")
    assert "p50 6,000 tokens" in finding.text
    assert "engine.n_batch" in finding.advice
    assert 100 < finding.impact_s < answer.figures["stalled_s"]
    assert len(finding.evidence) == 5
    worst = answer.tables["aggressors"]
    assert set(finding.evidence) <= set(worst["trace_id"][worst["tenant"] == "batch"])
    assert (worst["victims"] > 0).all()
    for name, columns in ANSWER.items():
        assert columns <= set(answer.tables[name].columns)


def given(tenant_of, **plan):
    """A fleet whose requests are given to tenants anew, by those they had."""
    tables = fleet_rows(Plan(**plan))
    requests = tables["requests"]
    told = pa.array([tenant_of(name) for name in requests["tenant"].to_pylist()], pa.string())
    tables["requests"] = requests.set_column(requests.column_names.index("tenant"), "tenant", told)
    return tables


@pytest.mark.parametrize(("share", "subject"), [(0.24, "greedy"), (0.15, None)])
def test_whoever_stalls_few_answers_for_long_is_named_where_it_is_a_large_part_of_all(share, subject):
    """On real engines a router kept long prompts away from all but two answers, which lost most of their time."""
    answer = interference.analyze(build_trace(fleet_rows(Plan(aggressor="greedy")), PANDAS))
    tenants = answer.tables["tenants"]
    few = Answer(
        answer.tables | {"tenants": tenants.assign(victims=tenants["victims"].clip(upper=2))},
        answer.figures | {"share": share},
    )
    assert [each.subject for each in interference.judge(few)] == ([subject] if subject else [])


def test_a_tenant_with_most_of_the_requests_is_named_if_the_long_prompts_are_its_own():
    own = ("batch", "tenant-0", "tenant-1", "tenant-2")
    tables = given(lambda name: "big" if name in own else name, aggressor="batch")
    answer = interference.analyze(build_trace(tables, PANDAS))
    row = answer.tables["tenants"].set_index("tenant").loc["big"]
    assert row["request_part"] > 0.5
    (finding,) = interference.judge(answer)
    assert finding.subject == "big"


def test_a_tenant_with_most_of_the_requests_is_no_aggressor_for_its_part_of_the_load():
    tables = given(lambda name: "other" if name == "tenant-0" else "big", spread_prefix=True)
    answer = interference.analyze(build_trace(tables, PANDAS))
    (finding,) = interference.judge(answer)
    assert finding.subject == "long prefills"
    assert "tenant big sends" in finding.text


def test_a_fleet_without_tenants_is_told_that_its_load_stalls_itself():
    answer = interference.analyze(build_trace(given(lambda _: "", spread_prefix=True), PANDAS))
    assert answer.tables["tenants"]["stalled_s"].sum() == 0
    (finding,) = interference.judge(answer)
    assert (finding.subject, "requests name no tenant" in finding.text) == ("long prefills", True), finding.text


def test_only_answers_of_others_count_as_held_up():
    tables = given(lambda name: "batch" if name in ("batch", "tenant-0") else "rest", aggressor="batch")
    trace = build_trace(tables, PANDAS)
    stalls = interference.find_stalls(trace)
    whose = trace.requests["tenant"].to_numpy()
    batch = trace.names.tenant.index("batch")
    all_of = stalls.prefills["stalled_s"][whose[stalls.prefills["r"]] == batch].sum()
    row = interference.analyze(trace).tables["tenants"].set_index("tenant").loc["batch"]
    assert 0.3 * all_of < row["stalled_s"] < 0.95 * all_of
    others = stalls.decodes[(whose[stalls.decodes["r"]] != batch) & (stalls.decodes["stalled_s"] > 0)]
    assert row["victims"] <= len(others)
    assert row["stalled_s"] <= others["stalled_s"].sum() + 1e-6


def test_prefills_that_stalled_next_to_nothing_are_no_rows():
    answer = interference.analyze(build_trace(fleet_rows(Plan(seed=1, aggressor="batch", aggressor_rate=0.1)), PANDAS))
    assert len(answer.tables["aggressors"]) > 0
    assert (answer.tables["aggressors"]["stalled_s"] >= 1e-3).all()
    ratios = answer.tables["engines"][["beside_ratio", "elsewhere_ratio"]].to_numpy()
    assert ((ratios == 0) | (ratios >= 1e-3)).all()


def test_long_prefills_of_all_tenants_are_the_load_and_no_tenants_fault():
    answer = interference.analyze(build_trace(fleet_rows(Plan(spread_prefix=True)), PANDAS))
    (finding,) = interference.judge(answer)
    assert finding.subject == "long prefills"
    assert "no one tenant" in finding.text


@pytest.mark.parametrize("seed", range(2))
def test_a_clean_fleet_has_no_interference(seed):
    answer = interference.analyze(build_trace(fleet_rows(Plan(seed=seed)), PANDAS))
    assert interference.judge(answer) == []


def neighbours(gpus):
    """Engine b decodes at 10 ms a token, and at half the pace while engine a reads a prompt."""
    dice, requests = random.Random(0), []
    for i in range(200):
        begin, tokens = i * 3.0, dice.randint(40, 80)
        stalled = dice.random() < 0.5
        length = tokens * 0.010 * dice.lognormvariate(0, 0.02)
        overlap = 0.4 if stalled else 0.0
        first = begin + 0.1
        victim = Try(engine="b", asked=begin, headers=begin, first=first, ended=first + length + overlap / 2)
        requests.append(Asked(tries=(Try(**{**_fields(victim), "computed": 20, "generated": tokens}),)))
        if stalled:
            told = {"asked": first + 0.1, "headers": first + 0.1, "first": first + 0.5, "ended": first + 0.5}
            requests.append(Asked(tries=(Try(engine="a", computed=4000, generated=1, **told),), tenant="long"))
    return trace_of(requests, gpus)


def _fields(each):
    return {name: getattr(each, name) for name in ("engine", "asked", "headers", "first", "ended")}


def test_a_prefill_stalls_an_engine_that_shares_its_gpu():
    answer = interference.analyze(neighbours({"a": "GPU-0", "b": "GPU-0"}))
    engines = answer.tables["engines"].set_index("engine")
    assert engines["elsewhere_ratio"]["b"] == pytest.approx(0.5, rel=0.1)
    stalled = answer.tables["aggressors"]
    assert set(stalled["engine"]) == {"a"}
    assert stalled["stalled_s"].to_numpy() == pytest.approx(0.2, rel=0.1)
    (finding,) = interference.judge(answer)
    assert (finding.subject, "answers of others on b for" in finding.text) == ("long", True), finding.text


def test_engines_on_gpus_of_their_own_stall_nobody_else():
    answer = interference.analyze(neighbours({"a": "GPU-0", "b": "GPU-1"}))
    assert answer.figures["stalled_s"] == 0
    assert interference.judge(answer) == []


@pytest.mark.parametrize(
    "tables",
    [
        {},
        fleet_rows(Plan(rate=0.0001)),
        {"servers": fleet_rows(Plan(seconds=5))["servers"]},
    ],
)
def test_without_requests_its_tables_are_empty_and_whole(tables):
    answer = interference.analyze(build_trace(tables, PANDAS))
    for name, columns in ANSWER.items():
        assert columns <= set(answer.tables[name].columns)
        assert len(answer.tables[name]) == 0
    assert interference.judge(answer) == []


def test_one_request_stalls_nobody():
    told = {"headers": 0.1, "first": 2.0, "ended": 3.0, "computed": 4000, "generated": 50}
    answer = interference.analyze(trace_of([Asked(tries=(Try(**told),))]))
    assert answer.figures["long_prefills"] == 1
    assert answer.figures["stalled_s"] == 0
    assert interference.judge(answer) == []
