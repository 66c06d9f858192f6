"""Bottlenecks: centrality against NetworkX and linear algebra, lost waiting against a walk in small steps."""

from __future__ import annotations

import heapq
import random

import networkx as nx
import numpy as np
import pyarrow as pa
import pytest

from lltm_ray.analytics import bottlenecks, graph
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.load_share import loads
from tests.fleet_rows import Plan, fleet_rows

ENGINE = choose_engine("pandas")
PREFILL_S, DECODE_S = 0.001, 0.02


def served(shares, *, seed=0, requests=400, slots=2, rate=4.0, slow=1.0, cached=0, policy="round-robin"):
    """Engines with a queue each, an engine drawn by `shares`; `slow`: the first one's pace. Gives rows' tables."""
    dice = random.Random(seed)
    free = [[0.0] * slots for _ in shares]
    now, arrived, attempts = 0.0, [], []
    for _ in range(requests):
        now += dice.expovariate(rate)
        at = dice.choices(range(len(shares)), shares)[0]
        computed, generated = dice.randint(50, 300), dice.randint(10, 60)
        start = max(heapq.heappop(free[at]), now)
        prefill = computed * PREFILL_S * (1 if at else slow)
        end = start + prefill + generated * DECODE_S * (1 if at else slow)
        heapq.heappush(free[at], end)
        arrived.append(now)
        times = [moment - now for moment in (start, start, start + prefill, end)]
        attempts.append((f"engine-{at}", 0.0, *times, cached, computed, generated, "ok"))
    return tables(arrived, attempts, policy=policy, slots=slots, engines=len(shares))


def tables(arrived, attempts, *, policy="residency", slots=2, engines=2):
    names = ("engine", "asked_s", "sent_s", "headers_s", "first_s", "ended_s")
    names += ("cached_tokens", "computed_tokens", "generated_tokens", "outcome")
    columns = dict(zip(names, map(list, zip(*attempts, strict=True)), strict=True))
    spans = [f"{i + 1:016x}" for i in range(len(arrived))]
    requests = {
        "span_id": spans,
        "trace_id": [f"{i:032x}" for i in range(len(arrived))],
        "arrived_unix_nano": [10**18 + round(each * 1e9) for each in arrived],
        "total_s": columns["ended_s"],
        "route": ["/v1/chat/completions"] * len(arrived),
        "model": ["tiny"] * len(arrived),
        "policy": [policy] * len(arrived),
    }
    servers = {
        "at_unix_nano": [10**18] * engines,
        "engine": [f"engine-{i}" for i in range(engines)],
        "slots_total": [slots] * engines,
    }
    told = {"requests": requests, "attempts": {"request_span_id": spans} | columns, "servers": servers}
    return {kind: pa.table(rows) for kind, rows in told.items()}


def findings(rows):
    return bottlenecks.judge(bottlenecks.analyze(build_trace(rows, ENGINE)))


# --- centrality


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_networkx_and_of_linear_algebra(seed):
    plan = Plan(seed=seed, seconds=15, engines=2 + seed, slots=1 + seed, gpus=min(seed, 2), cascade="engine-0")
    trace = build_trace(fleet_rows(plan), ENGINE)
    every = graph.edges(trace)
    scores, links = bottlenecks.centrality(trace, every)
    oracle = nx.DiGraph()
    for source, target, weight in every[["source", "target", "critical_s"]].itertuples(index=False):
        oracle.add_edge(int(source), int(target), weight=max(weight, 1e-9))
    between, through = nx.betweenness_centrality(oracle), nx.edge_betweenness_centrality(oracle)
    rank = _pagerank(oracle)
    assert set(scores["node"]) == set(oracle)
    for row in scores.itertuples():
        assert row.pagerank == pytest.approx(rank[row.node], abs=1e-5)
        assert row.betweenness == pytest.approx(between[row.node], abs=1e-5)
    assert len(links) == oracle.number_of_edges()
    for row in links.itertuples():
        assert row.score == pytest.approx(through[row.source, row.target], abs=1e-5)


def _pagerank(oracle, damping=0.85):
    """Solved, not iterated."""
    nodes, size = list(oracle), len(oracle)
    step = nx.to_numpy_array(oracle, nodes, weight="weight").T
    out = step.sum(axis=0)
    step = np.where(out > 0, step / np.where(out > 0, out, 1), 1 / size)
    solved = np.linalg.solve(np.eye(size) - damping * step, np.full(size, (1 - damping) / size))
    return dict(zip(nodes, solved, strict=True))


def test_critical_seconds_of_a_kind_add_up():
    trace = build_trace(fleet_rows(Plan(seed=5, seconds=40, cascade="engine-1")), ENGINE)
    nodes = bottlenecks.analyze(trace).tables["nodes"]
    by_kind = nodes.groupby("kind")["critical_s"].sum()
    total = trace.requests["total_s"].sum()
    assert by_kind["client"] == 0, "it waits"
    assert by_kind["gateway"] + by_kind["engine"] == pytest.approx(total)
    assert by_kind["slot"] == pytest.approx(by_kind["gpu"])
    assert nodes["critical_share"].max() <= 1
    assert list(nodes["critical_s"]) == sorted(nodes["critical_s"], reverse=True)


def test_only_the_heaviest_edges_of_a_huge_graph_are_scored(monkeypatch):
    trace = build_trace(fleet_rows(Plan(seconds=20)), ENGINE)
    every = graph.edges(trace)
    monkeypatch.setattr(bottlenecks, "MOST_CENTRAL", 10)
    _, links = bottlenecks.centrality(trace, every)
    assert sorted(links["critical_s"]) == pytest.approx(sorted(every["critical_s"])[-10:])
    answer = bottlenecks.analyze(trace)
    assert answer.figures["edges_left_out"] == len(every) - 10
    assert answer.figures["nodes_left_out"] == 0


# --- load


@pytest.mark.parametrize("seed", range(3))
def test_lost_waiting_is_what_a_walk_in_small_steps_finds(seed):
    rows = served([0.6, 0.2, 0.2], seed=seed, requests=60, cached=40)
    found = loads(build_trace(rows, ENGINE))
    tries = rows["attempts"].to_pandas()
    arrived = (rows["requests"]["arrived_unix_nano"].to_numpy() - 10**18) / 1e9
    begin, end = arrived + tries["headers_s"].to_numpy(), arrived + tries["ended_s"].to_numpy()
    step_s = 0.002
    moments = np.arange(arrived[0], end.max(), step_s) + step_s / 2
    has_room = {}
    for name, rows_of in tries.groupby("engine").groups.items():
        busy = ((begin[rows_of][:, None] <= moments) & (moments < end[rows_of][:, None])).sum(axis=0)
        was_there = (begin[rows_of].min() <= moments) & (moments < end[rows_of].max())
        has_room[name] = (busy < 2) & was_there
    per_token = (tries["first_s"] - tries["headers_s"]).sum() / tries["computed_tokens"].sum()
    for i, name in enumerate(tries["engine"]):
        is_waiting = (arrived[i] <= moments) & (moments < begin[i])
        elsewhere = np.any([room for other, room in has_room.items() if other != name], axis=0)
        expected = (is_waiting & elsewhere & ~has_room[name]).sum() * step_s
        assert found["avoidable_s"].iloc[i] == pytest.approx(expected, abs=0.05)
        assert found["lost_s"].iloc[i] == pytest.approx(max(expected - 40 * per_token, 0), abs=0.05)
        assert found["wait_s"].iloc[i] == pytest.approx(begin[i] - arrived[i], abs=1e-6)
    assert found["avoidable_s"].sum() > 1


def test_work_is_what_tokens_cost_the_fleet_however_slow_their_engine_is():
    rows = served([0.25] * 4, slow=3.0, rate=1.0)
    each = loads(build_trace(rows, ENGINE))
    assert each["work_s"].sum() == pytest.approx(each["taken_s"].sum())
    table = bottlenecks.analyze(build_trace(rows, ENGINE)).tables["engines"].set_index("engine")
    assert table.loc["engine-0", "pace_ratio"] == pytest.approx(3.0, rel=0.01)
    assert table["ratio"].max() < 1.3


def test_peers_that_fail_offer_nothing():
    waits = [(0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 1.0, 3.0)]
    rows = [("engine-0", *each, 3.0, 0, 100, 10, "ok") for each in waits]
    rows += [("engine-1", 0.0, 0.0, 0.0, 0.1, 0.2, 0, 100, 10, how) for how in ("ok", "ok", "refused", "refused")]
    arrived = [0.0, 0.5, -1.0, 5.0, -0.9, 5.1]
    healthy = [(*row[:-1], "ok") for row in rows]
    for told, expected in ((healthy, 1.0), (rows, 0.0)):
        found = loads(build_trace(tables(arrived, told, slots=1), ENGINE))
        assert found["avoidable_s"].max() == pytest.approx(expected, abs=1e-6)


# --- judgement


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_that_gets_most_of_the_work_while_others_idle_is_a_bottleneck(seed):
    (finding,) = findings(served([0.61, 0.13, 0.13, 0.13], seed=seed))
    assert (finding.kind, finding.subject) == ("bottleneck", "engine-0")
    assert 2.0 < finding.figures["ratio"] < 2.8
    assert finding.figures["pace_ratio"] == pytest.approx(1.0, abs=0.01)
    assert "of the work of tiny on 4 engines" in finding.text
    assert finding.impact_s > 10
    assert len(finding.evidence) == 5
    assert 'gateway.policy = "residency"' in finding.advice


def test_advice_is_another_policy_than_the_one_that_did_it():
    advice = {
        name: findings(served([0.61, 0.13, 0.13, 0.13], policy=name))[0].advice
        for name in ("residency", "least-loaded", "consistent-hash")
    }
    assert len(set(advice.values())) == 3
    assert "lltm-ray replay" in advice["residency"]
    assert "gateway.processes = 1" in advice["least-loaded"]


def test_the_evidence_is_what_lost_most():
    rows = served([0.61, 0.13, 0.13, 0.13])
    (finding,) = findings(rows)
    each = loads(build_trace(rows, ENGINE))
    worst = each[each["engine"] == 0].sort_values("lost_s", ascending=False)["r"].head(5)
    assert finding.evidence == tuple(f"{r:032x}" for r in worst)


@pytest.mark.parametrize("seed", range(3))
def test_a_straggler_with_its_share_of_the_requests_is_none(seed):
    assert findings(served([0.25] * 4, seed=seed, slow=2.0)) == []


@pytest.mark.parametrize("seed", range(3))
def test_even_load_is_none_however_high(seed):
    assert findings(served([0.25] * 4, seed=seed, rate=12.0)) == []


def test_more_work_than_its_share_is_none_while_nobody_waits():
    assert findings(served([0.61, 0.13, 0.13, 0.13], rate=0.5)) == []


def test_waiting_for_a_cache_that_saves_more_is_none():
    assert findings(served([0.61, 0.13, 0.13, 0.13], cached=10**5)) == []


def test_few_requests_are_none():
    assert findings(served([0.61, 0.13, 0.13, 0.13], requests=40)) == []


def test_one_engine_has_no_peer_to_share_with():
    assert findings(served([1.0])) == []


@pytest.mark.parametrize("fault", [{}, {"overload": 2.0}, {"straggler": "engine-2"}, {"cascade": "engine-1"}], ids=str)
def test_a_simulated_fleet_that_is_routed_well_has_none(fault):
    rows = fleet_rows(Plan(seed=11, seconds=60, **fault))
    assert len(bottlenecks.analyze(build_trace(rows, ENGINE)).tables["engines"]) == 4
    assert findings(rows) == []


def test_an_empty_window_gives_empty_tables_and_no_finding():
    answer = bottlenecks.analyze(build_trace({}, ENGINE))
    assert all(len(table) == 0 and len(table.columns) for table in answer.tables.values())
    assert bottlenecks.judge(answer) == []


def test_requests_that_no_engine_got_leave_only_the_gateway():
    rows = tables([0.0], [("", 0.0, None, None, None, 2.0, 0, 0, 0, "timeout")], engines=1)
    answer = bottlenecks.analyze(build_trace(rows, ENGINE))
    critical = dict(zip(answer.tables["nodes"]["node"], answer.tables["nodes"]["critical_s"], strict=True))
    assert critical["gateway"] == pytest.approx(2.0)
    assert len(answer.tables["engines"]) == 0
    assert bottlenecks.judge(answer) == []
