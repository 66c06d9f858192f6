"""The dependency graph, against the same counted row by row."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from lltm_ray.analytics import graph
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from tests.fleet_rows import Plan, fleet_rows

ENGINE = choose_engine("pandas")


def small(requests, attempts, **more):
    """A trace of few columns: requests (tenant, total_s, error_type), attempts (request, engine, slot, sent_s, ended_s,
    outcome)."""
    requests = {
        "span_id": [f"{i + 1:016x}" for i in range(len(requests))],
        "arrived_unix_nano": [10**18 + 10**9 * i for i in range(len(requests))],
        "tenant": [each[0] for each in requests],
        "total_s": [each[1] for each in requests],
        "error_type": [each[2] for each in requests],
        "route": ["/v1/chat/completions"] * len(requests),
    }
    names = ("request_span_id", "engine", "slot", "sent_s", "ended_s", "outcome")
    columns = {name: [each[i] for each in attempts] for i, name in enumerate(names)}
    columns["request_span_id"] = [f"{r + 1:016x}" for r in columns["request_span_id"]]
    columns |= {"asked_s": [0.0] * len(attempts), "headers_s": columns["sent_s"], "first_s": columns["sent_s"]}
    return build_trace({"requests": pa.table(requests), "attempts": pa.table(columns), **more}, ENGINE)


def pairs(answer):
    table = answer.tables["edges"]
    return dict(zip(zip(table["source"], table["target"], strict=True), table.itertuples(index=False), strict=True))


def by_hand(tables):
    """Edge -> calls' seconds and errors, one row after the other."""
    found = defaultdict(list)
    gpu_of = {row["engine"]: row["gpu_uuids"] for row in tables["servers"].to_pylist()}
    for row in tables["requests"].to_pylist():
        is_wrong = row["error_type"] not in ("", "client_gone")
        found[f"tenant {row['tenant']}", "gateway"].append((row["total_s"], is_wrong))
    for row in tables["attempts"].to_pylist():
        if not row["engine"]:
            continue
        engine, slot = f"engine {row['engine']}", f"slot {row['engine']}/{row['slot']}"
        is_wrong = row["outcome"] not in ("ok", "client gone")
        taken = row["ended_s"] - row["sent_s"]
        queued = (row["ended_s"] if math.isnan(row["headers_s"]) else row["headers_s"]) - row["sent_s"]
        taken, queued = (0.0 if math.isnan(each) else each for each in (taken, queued))
        found["gateway", engine].append((taken, is_wrong))
        if row["slot"] >= 0:
            found[engine, slot].append((taken - queued, is_wrong))
        if gpu_of[row["engine"]]:
            above = slot if row["slot"] >= 0 else engine
            found[above, f"gpu {gpu_of[row['engine']]}"].append((taken - queued, is_wrong))
    return found


@pytest.mark.parametrize(
    "plan",
    [
        Plan(seed=1, seconds=30),
        Plan(seed=2, seconds=60, cascade="engine-1", gone_share=0.1),
        Plan(seed=3, seconds=30, gpus=0, overload=3, queue_limit=4),
    ],
    ids=["clean", "an engine fails", "refusals, no GPU"],
)
def test_edges_are_what_counting_row_by_row_gives(plan):
    tables = fleet_rows(plan)
    answer = graph.analyze(build_trace(tables, ENGINE))
    wanted, found = by_hand(tables), pairs(answer)
    assert set(found) == set(wanted)
    for ends, told in wanted.items():
        seconds = [each[0] for each in told]
        row = found[ends]
        assert (row.calls, row.errors) == (len(told), sum(each[1] for each in told))
        assert row.error_ratio == pytest.approx(row.errors / row.calls)
        assert row.seconds == pytest.approx(sum(seconds), abs=1e-6)
        assert (row.p50_s, row.p95_s) == pytest.approx(tuple(np.quantile(seconds, (0.5, 0.95))), abs=1e-6)


def test_what_gateway_and_engines_add_is_the_time_of_all_requests():
    trace = build_trace(fleet_rows(Plan(seed=4, seconds=60, cascade="engine-0")), ENGINE)
    edges, starts = graph.edges(trace), graph.nodes_of(trace).starts
    is_added = (edges["target"] >= starts[1]) & (edges["target"] < starts[3])
    assert edges["critical_s"][is_added].sum() == pytest.approx(trace.requests["total_s"].sum(), rel=1e-9)


def test_a_retried_request_is_one_call_of_the_gateway_and_two_of_engines():
    trace = small([("a", 5.0, "")], [(0, "engine-0", 1, 1.0, 2.0, "refused"), (0, "engine-1", 0, 2.5, 4.5, "ok")])
    found = pairs(graph.analyze(trace))
    assert found["tenant a", "gateway"].calls == 1
    assert found["tenant a", "gateway"].errors == 0
    assert found["gateway", "engine engine-0"].error_ratio == 1.0
    assert found["gateway", "engine engine-1"].seconds == pytest.approx(2.0)
    assert found["engine engine-0", "slot engine-0/1"].errors == 1
    edges = graph.edges(trace)
    assert edges["critical_s"][edges["source"] == 1].iloc[0] == pytest.approx(2.0), "what no engine had"


def test_without_tenant_slot_or_engine_the_chain_is_shorter():
    servers = pa.table({"at_unix_nano": [10**18], "engine": ["engine-0"], "gpu_uuids": ["GPU-7"]})
    attempts = [(0, "engine-0", -1, 0.5, 1.0, "ok"), (1, "", -1, math.nan, 1.0, "timeout")]
    trace = small([("", 1.0, ""), ("", 1.0, "timeout")], attempts, servers=servers)
    found = pairs(graph.analyze(trace))
    assert set(found) == {("client", "gateway"), ("gateway", "engine engine-0"), ("engine engine-0", "gpu GPU-7")}
    assert found["client", "gateway"].errors == 1


def test_a_client_that_left_is_no_error():
    trace = small([("a", 1.0, "client_gone")], [(0, "engine-0", 0, 0.5, 1.0, "client gone")])
    assert graph.analyze(trace).tables["edges"]["errors"].sum() == 0


def test_engines_and_gpus_that_nobody_called_are_shown():
    names = ["engine-0", "engine-1"]
    servers = pa.table({"at_unix_nano": [10**18] * 2, "engine": names, "gpu_uuids": ["GPU-0", "GPU-1"]})
    answer = graph.analyze(small([("a", 1.0, "")], [(0, "engine-0", 0, 0.5, 1.0, "ok")], servers=servers))
    requests = dict(zip(answer.tables["nodes"]["node"], answer.tables["nodes"]["requests"], strict=True))
    assert requests["engine engine-1"] == requests["gpu GPU-1"] == 0
    assert requests["gpu GPU-0"] == requests["gateway"] == requests["tenant a"] == 1


def test_nodes_tell_their_kind_and_come_in_the_order_of_a_requests_way():
    nodes = graph.analyze(build_trace(fleet_rows(Plan(seconds=20)), ENGINE)).tables["nodes"]
    places = [graph.KINDS.index(kind) for kind in nodes["kind"]]
    assert places == sorted(places)
    for name, kind in zip(nodes["node"], nodes["kind"], strict=True):
        assert name.startswith({"client": "tenant", "gateway": "gateway"}.get(kind, f"{kind} "))
    assert set(nodes["kind"]) == set(graph.KINDS)


def test_tables_are_cut_to_what_was_called_most_and_say_so():
    many = graph.MOST_NODES + 50
    requests = [(f"t{i:04}", 1.0, "") for i in range(many)] + [("t0000", 1.0, "")]
    answer = graph.analyze(small(requests, [(0, "engine-0", 0, 0.5, 1.0, "ok")]))
    nodes, edges = answer.tables["nodes"], answer.tables["edges"]
    assert len(nodes) == graph.MOST_NODES
    assert answer.figures["nodes_left_out"] == many + 3 - graph.MOST_NODES
    assert answer.figures["edges_left_out"] == many + 2 - len(edges)
    assert {*edges["source"], *edges["target"]} <= set(nodes["node"])
    assert nodes["requests"].max() == many + 1


def test_an_empty_window_gives_empty_tables_and_no_finding():
    answer = graph.analyze(build_trace({}, ENGINE))
    assert [len(table) for table in answer.tables.values()] == [0, 0]
    assert "error_ratio" in answer.tables["edges"]
    assert graph.judge(answer) == []
