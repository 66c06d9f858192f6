from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from lltm_ray.analytics.answer import Answer
from lltm_ray.analytics.critical_path import TOUCH_NS, analyze, judge, walk
from lltm_ray.analytics.ingest import build_trace
from tests.fleet_rows import Plan, fleet_rows
from tests.unit.analytics.oracles import MS, PANDAS, Node, critical_path, forests, trace_of


def on_path(nodes):
    """Node -> nanoseconds of its own on the path."""
    trace, rows = trace_of(nodes)
    walked = walk(trace)
    path = walked[walked["is_on"] == 1]
    own = dict(zip(path["s"], np.rint(path["own_s"] * 1e9).astype(int), strict=True))
    return {node: int(own[row]) for node, row in enumerate(rows) if row in own}


def slack_of(nodes):
    """Node -> nanoseconds."""
    trace, rows = trace_of(nodes)
    walked = walk(trace)
    slack = dict(zip(walked["s"], np.rint(walked["slack_s"] * 1e9).astype(int), strict=True))
    return {node: int(slack[row]) for node, row in enumerate(rows) if row in slack}


@settings(deadline=None)
@given(forests())
def test_the_walk_of_all_trees_at_once_is_that_of_each_alone(nodes):
    assert on_path(nodes) == critical_path(nodes, TOUCH_NS)


@settings(deadline=None)
@given(forests())
def test_the_parts_of_each_request_sum_to_its_latency_to_the_nanosecond(nodes):
    trace, rows = trace_of(nodes)
    walked = walk(trace)
    path = walked[walked["is_on"] == 1]
    r = trace.spans["r"].to_numpy()
    for node, row in zip(nodes, rows, strict=True):
        if node.is_request:
            parts = path[path["r"] == r[row]]["own_s"]
            assert np.rint(parts * 1e9).sum() == node.end - node.begin


def last_end(nodes, node):
    """Of the spans above: no child reaches further."""
    above = nodes[nodes[node].parent]
    return above.end if above.is_request else min(above.end, last_end(nodes, nodes[node].parent))


@settings(deadline=None, max_examples=60)
@given(forests(jitter=(0,)))
def test_a_span_joins_the_path_once_it_takes_longer_than_its_slack(nodes):
    before, slack = on_path(nodes), slack_of(nodes)
    assert all(slack[node] == 0 for node in before)
    for node in [node for node, room in slack.items() if room and nodes[node].parent in before][:2]:
        end = nodes[node].end + slack[node]
        assert on_path(changed(nodes, node, end - 1)) == before
        if end < last_end(nodes, node):
            assert node in on_path(changed(nodes, node, end + 1))


def changed(nodes, node, end):
    return [replace(each, end=end) if i == node else each for i, each in enumerate(nodes)]


def test_slack_adds_up_from_the_path_down():
    nodes = [
        Node(-1, 0, 10 * MS, is_request=True),
        Node(0, 0, 10 * MS),
        Node(0, 0, 7 * MS),
        Node(2, 0, 7 * MS),
        Node(2, 1 * MS, 5 * MS),
    ]
    assert slack_of(nodes) == {0: 0, 1: 0, 2: 3 * MS, 3: 3 * MS, 4: 5 * MS}
    assert on_path(nodes) == {0: 0, 1: 10 * MS}


@pytest.mark.parametrize(("late", "expected"), [(700, {0: 0, 1: 3 * MS, 2: 6 * MS}), (1500, {0: 3 * MS, 2: 6 * MS})])
def test_spans_that_meet_within_a_microsecond_follow_one_another(late, expected):
    nodes = [Node(-1, 0, 9 * MS, is_request=True), Node(0, 0, 3 * MS + late), Node(0, 3 * MS, 9 * MS)]
    assert on_path(nodes) == expected


def test_trees_may_be_deep_and_wide():
    deep = [Node(i - 1, i, 4000 - i, is_request=i == 0) for i in range(1500)]
    assert on_path(deep) == {i: 2 if i < 1499 else 4000 - 2 * 1499 for i in range(1500)}
    wide = [Node(-1, 0, 3000 * MS, is_request=True)]
    wide += [Node(0, i * MS, (i + 1) * MS - TOUCH_NS * 10) for i in range(3000)]
    assert on_path(wide)[0] == 3000 * TOUCH_NS * 10


def test_spans_that_call_each_other_in_a_ring_are_on_no_path():
    nodes = [Node(-1, 0, 9 * MS, is_request=True), Node(2, 0, 5 * MS), Node(1, 0, 5 * MS), Node(3, 0, MS)]
    assert on_path(nodes) == {0: 9 * MS}


def test_a_request_that_a_span_called_has_a_path_of_its_own():
    nodes = [Node(-1, 0, 9 * MS, is_request=True), Node(0, MS, 8 * MS), Node(1, 2 * MS, 7 * MS, is_request=True)]
    assert on_path(nodes) == {0: 2 * MS, 1: 7 * MS, 2: 5 * MS}


def test_a_users_span_called_request_is_none():
    assert on_path([Node(-1, 0, 9 * MS, name="request")]) == {}


@pytest.fixture(scope="module")
def cascade():
    return build_trace(fleet_rows(Plan(seed=1, seconds=60, cascade="engine-1")), PANDAS)


def test_tries_that_failed_are_on_the_path_with_their_engines(cascade):
    walked = walk(cascade)
    path = walked[walked["is_on"] == 1]
    total = cascade.requests["total_s"].to_numpy()
    parts = np.bincount(path["r"], path["own_s"], minlength=len(total))
    assert parts == pytest.approx(total, abs=2e-9)
    retried = cascade.requests[cascade.requests["attempts"] > 1]["r"]
    tries = path[path["r"].isin(retried) & (path["engine"] >= 0)].groupby("r")["engine"].nunique()
    assert len(retried) > 0
    assert (tries > 1).mean() > 0.9
    assert path.groupby("r")["name"].nunique().max() >= 4


def test_phases_are_named_and_sum_to_all_time(cascade):
    answer = analyze(cascade)
    phases = answer.tables["phases"]
    assert {"gateway", "route", "queue", "prefill", "decode"} <= set(phases["phase"])
    assert phases["seconds"].sum() == pytest.approx(cascade.requests["total_s"].sum())
    assert phases["share"].sum() == pytest.approx(1)
    assert list(phases["seconds"]) == sorted(phases["seconds"], reverse=True)
    engines = answer.tables["engines"]
    assert set(engines["engine"]) == {f"engine-{i}" for i in range(4)}
    below = phases[phases["phase"] != "gateway"]["seconds"].sum()
    assert engines["seconds"].sum() == pytest.approx(below)


def test_the_requests_of_a_phase_are_those_that_it_took_the_longest(cascade):
    answer = analyze(cascade)
    decode = answer.tables["phases"].set_index("phase").loc["decode"]
    walked = walk(cascade)
    parts = walked[(walked["is_on"] == 1) & (walked["name"] == 5)].groupby("r")["own_s"].sum()
    longest = parts.sort_values(ascending=False).index[:5]
    assert decode["evidence"] == cascade.evidence(longest)
    assert (decode["p50_s"], decode["p95_s"]) == pytest.approx((parts.quantile(0.5), parts.quantile(0.95)))
    assert decode["requests"] == len(parts)


def test_too_few_slots_are_told_as_waiting():
    trace = build_trace(fleet_rows(Plan(seed=3, seconds=60, overload=3.0)), PANDAS)
    answer = analyze(trace)
    (found,) = judge(answer)
    assert (found.kind, found.subject) == ("waiting", "slots")
    assert found.impact_s == pytest.approx(trace.requests["queue_s"].sum(), rel=0.01)
    assert "at the gateway" in found.text
    assert len(found.evidence) == 5
    work_s = (answer.figures["path_s"] - answer.figures["wait_s"]) / answer.figures["requests"]
    for figure, value in (("wait_share", 0.29), ("wait_p95_s", 0.9 * work_s), ("requests", 49.0)):
        assert judge(Answer(answer.tables, {**answer.figures, figure: value})) == []


def test_waits_count_by_what_requests_take_besides():
    answer = analyze(build_trace(fleet_rows(Plan(seed=3, seconds=60, overload=3.0)), PANDAS))
    seconds = ("path_s", "wait_s", "wait_p50_s", "wait_p95_s")
    for scale, kinds in ((0.3 / answer.figures["wait_p95_s"], ["waiting"]), (0.09 / answer.figures["wait_p95_s"], [])):
        quick = answer.figures | {name: answer.figures[name] * scale for name in seconds}
        assert [each.kind for each in judge(Answer(answer.tables, quick))] == kinds


@pytest.mark.parametrize("seed", range(4))
def test_a_fleet_with_room_gives_no_alarm(seed):
    answer = analyze(build_trace(fleet_rows(Plan(seed=seed, seconds=60)), PANDAS))
    assert answer.figures["wait_share"] < 0.1
    assert judge(answer) == []


def test_nothing_in_nothing_out():
    answer = analyze(build_trace({}, PANDAS))
    assert {name: len(found) for name, found in answer.tables.items()} == {"phases": 0, "engines": 0, "slack": 0}
    assert "evidence" in answer.tables["phases"]
    assert judge(answer) == []


def test_a_request_without_a_try_is_the_gateways():
    rows = fleet_rows(Plan(seed=0, seconds=5))
    alone = {"requests": rows["requests"].slice(0, 1)}
    phases = analyze(build_trace(alone, PANDAS)).tables["phases"]
    assert list(phases["phase"]) == ["gateway"]
    assert list(phases["share"]) == [1.0]
