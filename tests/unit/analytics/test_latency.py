import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings

from lltm_ray.analytics.answer import Answer
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.latency import BUCKETS, analyze, judge, self_times
from tests.fleet_rows import Plan, fleet_rows
from tests.unit.analytics.oracles import MS, PANDAS, Node, forests, trace_of
from tests.unit.analytics.oracles import self_times as plain_self_times


@settings(deadline=None)
@given(forests(jitter=(0,)))
def test_self_time_is_what_no_child_shares(nodes):
    trace, rows = trace_of(nodes)
    own = np.rint(self_times(trace)["self_s"].to_numpy() * 1e9 / MS).astype(int)
    assert [int(own[row]) for row in rows] == plain_self_times(nodes, MS)


@pytest.fixture(scope="module")
def fleet():
    return build_trace(fleet_rows(Plan(seed=2, seconds=60, cascade="engine-1")), PANDAS)


def test_self_times_of_a_tree_without_overlap_sum_to_its_root(fleet):
    selves = self_times(fleet)
    r = fleet.spans["r"].to_numpy()
    of_requests = np.bincount(r[r >= 0], selves["self_s"][r >= 0], minlength=len(fleet.requests))
    assert of_requests == pytest.approx(fleet.requests["total_s"].to_numpy(), abs=1e-9)


def test_the_table_tells_each_name_once(fleet):
    found = analyze(fleet).tables["self_time"]
    selves = self_times(fleet)
    decode = selves[selves["name"] == 5]
    row = found.set_index("span").loc["decode"]
    assert found["span"].is_unique
    assert found["self_share"].sum() == pytest.approx(1)
    assert (row["count"], row["p95_s"]) == (len(decode), pytest.approx(decode["self_s"].quantile(0.95)))
    assert found["self_s"].sum() == pytest.approx(selves["self_s"].sum())


def test_calls_go_from_parents_to_children(fleet):
    calls = analyze(fleet).tables["calls"]
    found = {(row.parent, row.child): row.count_ for row in calls.rename(columns={"count": "count_"}).itertuples()}
    assert found["", "request"] == len(fleet.requests)
    assert found["request", "attempt"] == (fleet.spans["name"] == 2).sum()
    assert found["attempt", "decode"] == (fleet.spans["name"] == 5).sum()
    assert sum(found.values()) == len(fleet.spans)


def test_the_timeline_counts_every_request_once_in_all_and_once_in_its_engine(fleet):
    timeline = analyze(fleet).tables["timeline"]
    everything = timeline[timeline["engine"] == ""]
    requests = fleet.requests
    assert everything["requests"].sum() == len(requests)
    assert everything["errors"].sum() == (requests["error"] >= 0).sum() > 0
    assert everything["generated"].sum() == requests["generated"].sum()
    engines = timeline[timeline["engine"] != ""]
    assert engines["requests"].sum() == (requests["engine"] >= 0).sum()
    assert len(everything) <= BUCKETS
    assert timeline["at_unix_nano"].min() >= fleet.start_unix_nano
    first = everything.iloc[0]
    inside = requests[requests["ended_s"] < fleet.length_s / BUCKETS * (first["at_s"] / fleet.length_s * BUCKETS + 1)]
    assert first["p95_s"] == pytest.approx(inside["total_s"].quantile(0.95))
    assert first["ttft_p95_s"] == pytest.approx(inside["ttft_s"].quantile(0.95))


def test_the_timeline_shows_the_busiest_engines():
    trace = build_trace(fleet_rows(Plan(seed=0, seconds=40, engines=20, slots=1, gpus=0, rate=20)), PANDAS)
    answer = analyze(trace)
    shown = set(answer.tables["timeline"]["engine"]) - {""}
    busy = trace.requests[trace.requests["engine"] >= 0].groupby("engine").size()
    hidden = [trace.names.engine[code] for code in busy.index if trace.names.engine[code] not in shown]
    assert (len(shown), answer.figures["engines_left_out"]) == (16, len(busy) - 16)
    least = min(busy[trace.names.engine.index(name)] for name in shown)
    assert max(busy[trace.names.engine.index(name)] for name in hidden) <= least


def with_slow_gateway(plan, seconds):
    """Each request waits so long at the gateway's door before a slot is asked for."""
    rows = fleet_rows(plan)
    for kind, columns in (("requests", ("total_s", "ttft_s")), ("attempts", ("asked_s", "sent_s", "headers_s"))):
        more = columns if kind == "requests" else (*columns, "first_s", "ended_s")
        for name in more:
            at = rows[kind].column_names.index(name)
            rows[kind] = rows[kind].set_column(at, name, pc.add(rows[kind][name], pa.scalar(seconds)))
    return build_trace(rows, PANDAS)


def test_a_gateway_that_takes_a_third_of_each_request_is_told():
    trace = with_slow_gateway(Plan(seed=4, seconds=60), 0.4)
    answer = analyze(trace)
    (found,) = judge(answer)
    assert found.kind == "gateway overhead"
    assert found.impact_s == pytest.approx(0.4 * len(trace.requests), rel=0.03)
    assert "gateway.processes" in found.advice
    assert len(found.evidence) == 5
    for figure, value in (("gateway_p50_s", 0.019), ("gateway_share_p50", 0.19), ("gateway_requests", 49.0)):
        assert judge(Answer(answer.tables, {**answer.figures, figure: value})) == []


def test_a_gateway_that_takes_little_or_of_few_requests_is_not():
    assert judge(analyze(with_slow_gateway(Plan(seed=4, seconds=60), 0.015))) == []
    few = with_slow_gateway(Plan(seed=4, seconds=2), 0.4)
    assert 0 < len(few.requests) < 50
    assert judge(analyze(few)) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_clean_fleet_gives_no_alarm(seed):
    answer = analyze(build_trace(fleet_rows(Plan(seed=seed, seconds=60)), PANDAS))
    assert answer.figures["gateway_requests"] > 100
    assert judge(answer) == []


def test_nothing_in_nothing_out():
    answer = analyze(build_trace({}, PANDAS))
    assert {name: len(found) for name, found in answer.tables.items()} == {"self_time": 0, "calls": 0, "timeline": 0}
    assert "ttft_p95_s" in answer.tables["timeline"]
    assert judge(answer) == []


def test_overlapping_children_count_once():
    nodes = [
        Node(-1, 0, 10 * MS, is_request=True),
        Node(0, MS, 6 * MS),
        Node(0, 4 * MS, 8 * MS),
        Node(0, 5 * MS, 6 * MS),
    ]
    trace, rows = trace_of(nodes)
    assert self_times(trace)["self_s"].iloc[rows[0]] == pytest.approx(0.003)
