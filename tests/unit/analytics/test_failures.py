"""Where errors began, whom they hit, and what followed."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pyarrow.compute as pc
import pytest

from lltm_ray.analytics import failures
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.routing.ledger.entry import Outcome
from tests.fleet_rows import Plan, fleet_rows
from tests.unit.analytics.made_rows import PANDAS, Asked, Try, trace_of

ANSWER = {
    "origins": {"span", "engine", "error", "errors", "requests", "failed_requests", "lost_s", "evidence"}
    | {"first_unix_nano", "last_unix_nano"},
    "engines": {"engine", "attempts", "failed", "ratio"},
}


def random_forest(seed, most=60):
    """Parents, as rows in any order, -1 for roots; and which spans are marked."""
    dice = np.random.default_rng(seed)
    nodes = int(dice.integers(1, most))
    parent = np.array([dice.integers(-1, i) if i else -1 for i in range(nodes)])
    place = dice.permutation(nodes)
    moved = np.full(nodes, -1)
    moved[place] = np.where(parent >= 0, place[parent], -1)
    return moved, dice.random(nodes) < dice.random()


@pytest.mark.parametrize("seed", range(40))
def test_effects_are_the_spans_with_an_error_below_them_as_a_walk_finds_them(seed):
    parent, is_error = random_forest(seed)
    tree = nx.DiGraph((p, i) for i, p in enumerate(parent.tolist()) if p >= 0)
    tree.add_nodes_from(range(len(parent)))
    by_walk = [any(is_error[each] for each in nx.descendants(tree, node)) for node in range(len(parent))]
    assert failures.has_below(np, parent, is_error).tolist() == by_walk


@pytest.mark.parametrize("seed", range(20))
def test_a_span_belongs_to_the_nearest_request_above_it(seed):
    parent, is_request = random_forest(seed)
    r = np.where(is_request, np.arange(len(parent)), -1)

    def walk(node):
        while node >= 0 and r[node] < 0:
            node = parent[node]
        return -1 if node < 0 else r[node]

    rows = np.arange(len(parent))
    assert failures.find_owners(np, parent, r, rows).tolist() == [walk(node) for node in rows]


def test_parents_that_go_round_in_a_circle_end_the_search():
    parent, nothing = np.array([2, 0, 1, -1]), np.full(4, -1)
    assert failures.has_below(np, parent, np.array([False, True, False, False])).tolist() == [True, True, True, False]
    assert failures.find_owners(np, parent, nothing, np.arange(4)).tolist() == [-1] * 4


@pytest.mark.parametrize("seed", range(3))
def test_a_dying_engine_is_named_with_all_that_it_broke(seed):
    tables = fleet_rows(Plan(seed=seed, cascade="engine-1"))
    answer = failures.analyze(build_trace(tables, PANDAS))
    (finding,) = failures.judge(answer)
    assert (finding.kind, finding.subject) == ("errors", "engine-1")
    broken = tables["attempts"].filter(pc.is_in(tables["attempts"]["outcome"], pc.cast(_BROKEN, "string")))
    failed = pc.sum(pc.is_in(tables["requests"]["error_type"], pc.cast(_FAILED, "string"))).as_py()
    assert finding.figures["errors"] == broken.num_rows == answer.tables["origins"]["errors"].sum()
    assert finding.figures["failed_requests"] == failed == answer.figures["failed"]
    assert finding.figures["requests"] == len(pc.unique(broken["request_span_id"]))
    assert f"engine-1 broke {broken.num_rows} attempts between 14:14:14 and 14:14:3" in finding.text
    assert f"{failed} failed" in finding.text
    assert "lltm-ray drain engine-1" in finding.advice
    ids = tables["attempts"]["trace_id"]
    assert set(finding.evidence) <= set(ids.filter(pc.equal(tables["attempts"]["engine"], "engine-1")).to_pylist())
    engines = answer.tables["engines"].set_index("engine")
    assert engines["failed"].to_dict() == {"engine-0": 0, "engine-1": broken.num_rows, "engine-2": 0, "engine-3": 0}
    for name, columns in ANSWER.items():
        assert columns <= set(answer.tables[name].columns)


_BROKEN = np.array(["retried", "failed", "continued"])
_FAILED = np.array(["stream_broken", "unavailable_error"])


@pytest.mark.parametrize("seed", range(2))
def test_a_clean_fleet_has_no_failures(seed):
    answer = failures.analyze(build_trace(fleet_rows(Plan(seed=seed)), PANDAS))
    assert answer.figures["gone"] > 0
    assert failures.judge(answer) == []


def test_refused_requests_are_load_and_no_errors():
    tables = fleet_rows(Plan(overload=3.2))
    answer = failures.analyze(build_trace(tables, PANDAS))
    (finding,) = failures.judge(answer)
    refused = pc.sum(pc.equal(tables["requests"]["status"], 429)).as_py()
    assert finding.kind == "rejections"
    assert finding.figures["rejected"] == refused == answer.figures["rejected"]
    assert len(answer.tables["origins"]) == 0


@pytest.mark.parametrize("error", ["client_gone", "invalid_request_error", "404", "model_not_found"])
def test_what_clients_do_is_no_failure_of_ours(error):
    gone = [Asked(tries=(Try(headers=0.1, first=0.2, ended=1.0, generated=9),), error=error) for _ in range(50)]
    answer = failures.analyze(trace_of(gone))
    assert answer.figures["error_ratio"] == 0
    assert len(answer.tables["origins"]) == 0
    assert failures.judge(answer) == []


@pytest.mark.parametrize("error", ["timeout_error", ""])
def test_attempts_that_their_deadline_cut_are_not_the_engines_fault(error):
    asked = [
        Asked(
            tries=(told(engine=f"engine-{i % 4}", asked=i * 0.5, ended=i * 0.5 + 2, outcome=_cut(i)),),
            error=error if _cut(i) == "deadline" else "",
        )
        for i in range(2000)
    ]
    answer = failures.analyze(trace_of(asked))
    assert len(answer.tables["origins"]) == 0
    assert answer.tables["engines"]["failed"].sum() == 0
    assert answer.figures["error_ratio"] == 0
    found = failures.judge(answer)
    assert [each.kind for each in found] == (["deadlines"] if error else [])
    for finding in found:
        assert "40 of 2,000 requests for m were cut at their deadline" in finding.text
        assert "x-lltm-deadline-ms" in finding.advice
        assert "far more than its part" not in finding.text
        assert finding.impact_s == pytest.approx(80)


def _cut(i):
    return "deadline" if i % 50 == i // 50 % 50 else "ok"


def test_an_engine_on_which_most_deadlines_pass_is_named():
    asked = [
        Asked(tries=(told(engine=f"engine-{i % 4}", asked=i * 0.5, ended=i * 0.5 + 2),), error=_late(i))
        for i in range(400)
    ]
    (finding,) = failures.judge(failures.analyze(trace_of(asked)))
    assert finding.kind == "deadlines"
    assert "on engine-2, far more than its part" in finding.text


def _late(i):
    return "timeout_error" if i % 12 == 2 else ""


@pytest.mark.parametrize("seed", range(5))
def test_errors_that_come_by_chance_do_not_follow_each_other(seed):
    dice = np.random.default_rng(seed)
    asked = []
    for i in range(7200):
        engine, at = f"engine-{dice.integers(4)}", i * 0.5
        outcome = "failed" if dice.random() < 0.015 else "ok"
        asked.append(Asked(tries=(told(engine=engine, asked=at, ended=at + 1, outcome=outcome),)))
    found = failures.judge(failures.analyze(trace_of(asked)))
    assert {each.subject for each in found} <= {f"engine-{i}" for i in range(4)}
    assert len(found) >= 2
    assert not any("others" in each.text for each in found)


def test_refused_requests_of_which_no_model_is_known_are_those_of_the_only_one():
    refused = [Asked(tries=(Try(engine="", asked=i, ended=i),), model="", error="overloaded_error") for i in range(30)]
    fine = [Asked(tries=(told(asked=i, ended=i + 1),)) for i in range(70)]
    (finding,) = failures.judge(failures.analyze(trace_of(refused + fine)))
    assert (finding.subject, "30 of 100 requests for m were refused" in finding.text) == ("m", True), finding.text
    others = [Asked(tries=(told(asked=i, ended=i + 1),), model="n") for i in range(50)]
    (finding,) = failures.judge(failures.analyze(trace_of(refused + fine + others)))
    assert finding.text.startswith("30 of 150 requests were refused")
    assert "unknown" not in finding.text


def told(*, engine="engine-0", asked=0.0, ended=1.0, outcome="ok", **more):
    return Try(engine=engine, asked=asked, headers=asked + 0.1, first=asked + 0.3, ended=ended, outcome=outcome, **more)


def test_a_saved_request_lost_what_its_failed_attempts_took():
    asked = Asked(tries=(told(ended=0.8, outcome="retried"), told(engine="engine-1", asked=0.9, ended=2.0)))
    (row,) = failures.analyze(trace_of([asked])).tables["origins"].itertuples()
    assert (row.span, row.engine, row.error, row.errors) == ("attempt", "engine-0", "retried", 1)
    assert (row.requests, row.failed_requests) == (1, 0)
    assert row.lost_s == pytest.approx(0.8)


def test_a_continued_answer_lost_only_the_way_back_to_where_it_was():
    again = told(engine="engine-1", asked=5.0, ended=9.0, is_continued=True)
    asked = Asked(tries=(told(ended=5.0, outcome="continued"), again))
    (row,) = failures.analyze(trace_of([asked])).tables["origins"].itertuples()
    assert row.lost_s == pytest.approx(0.3)


def test_a_request_that_failed_for_good_lost_all_of_its_time():
    tries = (told(ended=0.8, outcome="retried"), told(engine="engine-1", asked=0.9, ended=2.0, outcome="failed"))
    answer = failures.analyze(trace_of([Asked(tries=tries, error="unavailable_error")]))
    origins = answer.tables["origins"].set_index("engine")
    assert origins["errors"].to_dict() == {"engine-0": 1, "engine-1": 1}
    assert origins["requests"].to_dict() == {"engine-0": 1, "engine-1": 0}
    assert origins["failed_requests"]["engine-0"] == 1
    assert origins["lost_s"].to_dict() == pytest.approx({"engine-0": 2.0, "engine-1": 0.0})


def test_an_error_of_a_request_whose_attempts_were_fine_is_blamed_on_its_last_engine():
    fine = [Asked(tries=(told(engine="engine-3"),), error="500") for _ in range(6)]
    answer = failures.analyze(trace_of(fine))
    (row,) = answer.tables["origins"].itertuples()
    assert (row.span, row.engine, row.error, row.failed_requests) == ("request", "engine-3", "500", 6)
    assert failures.judge(answer)[0].subject == "engine-3"


def cascade():
    """Engine a breaks for two seconds; afterwards all wait a second for engine b, where two attempts break, too."""
    calm = [Asked(tries=(told(engine="ab"[i % 2], asked=i * 0.1, ended=i * 0.1 + 1),)) for i in range(200)]
    broken = []
    for i in range(20):
        at = 20 + i * 0.1
        after = Try(engine="b", asked=at + 0.2, headers=at + 1.4, first=at + 1.6, ended=at + 2.2)
        broken.append(Asked(tries=(told(engine="a", asked=at, ended=at + 0.2, outcome="retried"), after)))
    later = [Asked(tries=(told(engine="b", asked=23.0, ended=24.0, outcome="failed"),), error="500") for _ in range(2)]
    return trace_of(calm + broken + later)


def test_what_follows_on_other_engines_is_told():
    answer = failures.analyze(cascade())
    row = answer.tables["cascades"].set_index("engine").loc["a"]
    assert (row["errors_elsewhere"], row["requests"]) == (2, 22)
    assert row["chance_elsewhere"] + 3 * row["spread_elsewhere"] < 2
    assert row["after_s"] == pytest.approx(24.0 - 20.2)
    assert (row["wait_before_s"], row["wait_during_s"]) == pytest.approx((0.1, 1.2))
    finding = failures.judge(answer)[0]
    assert finding.subject == "a"
    assert "2 attempts on others broke, too, from 3.8 s later on" in finding.text
    assert "median waiting on the others rose from 0.10 s to 1.20 s" in finding.text
    assert finding.impact_s == pytest.approx(20 * 0.2 + 20 * 1.1)


def test_one_lost_connection_is_not_worth_a_word():
    fine = [Asked(tries=(told(),)) for _ in range(50)]
    answer = failures.analyze(trace_of([*fine, Asked(tries=(told(outcome="retried"), told(engine="engine-1")))]))
    assert answer.tables["origins"]["errors"].sum() == 1
    assert failures.judge(answer) == []


@pytest.mark.parametrize("tables", [{}, {"servers": fleet_rows(Plan(seconds=5))["servers"]}])
def test_without_requests_its_tables_are_empty_and_whole(tables):
    answer = failures.analyze(build_trace(tables, PANDAS))
    for name, columns in ANSWER.items():
        assert columns <= set(answer.tables[name].columns)
        assert len(answer.tables[name]) == 0
    assert answer.figures["error_ratio"] == 0
    assert failures.judge(answer) == []


@pytest.mark.parametrize(("outcome", "is_error"), [("ok", 0), ("client gone", 0), ("engine refused", 0), ("failed", 1)])
def test_what_no_engine_is_to_blame_for_is_no_error_of_an_attempt(outcome, is_error):
    trace = trace_of([Asked(tries=(Try(headers=0.1, ended=0.2, outcome=outcome),), error="invalid_request_error")])
    assert [trace.names.of("error", code) for code in trace.attempts["error"]] == [outcome * is_error]
    assert failures.analyze(trace).figures["failed"] == 0


@pytest.mark.parametrize("error", ["not_supported_error", "501"])
def test_no_engine_is_to_be_drained_for_what_its_model_cannot_do(error):
    def ends(status):
        tries = (Try(headers=0.1, ended=0.2, outcome=str(Outcome.of_status(status))),)
        return failures.judge(failures.analyze(trace_of([Asked(tries=tries, error=error) for _ in range(60)])))

    assert ends(501) == []
    (finding,) = ends(500)
    assert (finding.subject, finding.figures["errors"]) == ("engine-0", 60)
