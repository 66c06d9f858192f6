"""Engines slower than their peers, and requests slower than their size explains."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from lltm_ray.analytics import anomaly
from lltm_ray.analytics.fit import fit_groups, fit_on_base, fit_positive
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.stragglers import Run, _began_well, _Buckets, find_busy
from tests.fleet_rows import DECODE_S, PREFILL_S, START_UNIX_NANO, Plan, fleet_rows
from tests.unit.analytics.made_rows import PANDAS, ZERO, Asked, Try, trace_of

ANSWER = {
    "engines": {"engine", "model", "requests", "decode_ms_token", "peers_ms_token", "ratio", "z", "residual_ratio"}
    | {"since_unix_nano", "lost_s", "evidence"},
    "requests": {"trace_id", "request_id", "engine", "seconds", "expected_s", "z", "why"},
    "model": {"term", "seconds_per_unit"},
}


@pytest.mark.parametrize("groups", [1, 3])
def test_the_fit_is_least_squares_of_each_group_and_a_tenth_of_gross_errors_does_not_move_it(groups):
    dice = np.random.default_rng(groups)
    group, columns = dice.integers(0, groups, 3000), [dice.random(3000) * 100, np.ones(3000), dice.random(3000)]
    truth = dice.random((groups, 3)) + 0.5
    y = sum(truth[group, i] * column for i, column in enumerate(columns)) + dice.normal(0, 0.05, 3000)
    scale = np.ones(3000)
    fit = fit_groups(np, group, groups, columns, y, scale)
    for each in range(groups):
        mine = group == each
        plain, *_ = np.linalg.lstsq(np.stack(columns, axis=1)[mine], y[mine], rcond=None)
        assert fit.terms[each] == pytest.approx(plain, abs=0.01)
        assert (np.abs(fit.terms[each] - truth[each]) < 5 * fit.errors[each]).all()
    assert fit.sigma == pytest.approx(0.05, rel=0.1)
    broken = np.where(dice.random(3000) < 0.1, y + 50, y)
    robust = fit_groups(np, group, groups, columns, broken, scale)
    assert robust.terms == pytest.approx(truth, abs=0.05)


def test_terms_that_come_out_negative_are_left_out_for_their_group_alone():
    dice = np.random.default_rng(1)
    group, columns = np.arange(2000) % 2, [np.ones(2000), dice.random(2000)]
    y = 5.0 + np.where(group == 0, -2.0, 3.0) * columns[1] + dice.normal(0, 0.1, 2000)
    fit = fit_positive(np, group, 2, columns, y, np.ones(2000))
    assert fit.terms == pytest.approx(np.array([[np.median(y[group == 0]), 0], [5, 3]]), abs=0.05)


def test_a_base_stays_where_what_looks_like_it_would_push_it_below_zero():
    dice = np.random.default_rng(3)
    tokens = dice.integers(40, 160, 600) * 1.0
    alike = tokens * (dice.random(600) < 0.05)  # nearly always absent, then all of it
    y = tokens * 0.01 * dice.lognormal(0, 0.6, 600)
    group = np.arange(600) % 2
    fit = fit_on_base(np, group, 2, [tokens, alike, tokens * tokens], y, 1 / y)
    assert (fit.terms[:, 0] > 0).all()
    assert (fit.terms >= 0).all()
    alone = fit_on_base(np, group, 2, [tokens, np.ones(600)], 0.001 * tokens * tokens, 1 / tokens)
    assert (alone.terms[:, 0] > 0).all()


def test_a_fit_of_no_rows_has_terms_of_zero():
    none = np.empty(0)
    assert fit_groups(np, np.empty(0, np.int64), 2, [none, none], none, none).terms.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_busy_slots_are_the_mean_of_what_ran_beside_a_decode(seed):
    trace = build_trace(fleet_rows(Plan(seed=seed, seconds=20)), PANDAS)
    held, busy, beside = find_busy(trace)
    rows = list(held.itertuples())
    for i, row in enumerate(rows[:60]):
        others = [each for each in rows if each.engine == row.engine]
        slots = [_shared(row, each.headers_s, each.ended_s) for each in others]
        assert busy[i] * (row.ended_s - row.first_s) == pytest.approx(sum(slots))
        grid = np.linspace(row.first_s, row.ended_s, 2001)
        reads = np.any([(each.headers_s <= grid) & (grid < each.first_s) for each in others], axis=0)
        assert beside[i] == pytest.approx(reads.mean() * (row.ended_s - row.first_s), abs=0.02)


def _shared(row, start, end):
    return max(min(row.ended_s, end) - max(row.first_s, start), 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_latency_model_finds_what_a_token_costs(seed):
    answer = anomaly.analyze(build_trace(fleet_rows(Plan(seed=seed, overload=1.8)), PANDAS))
    model = answer.tables["model"].set_index("term")["seconds_per_unit"]
    assert model["generated token"] == pytest.approx(DECODE_S, rel=0.1)
    assert model["computed token"] == pytest.approx(PREFILL_S, rel=0.3)
    assert model["second of waiting"] == pytest.approx(1.0, abs=0.1)
    assert answer.figures["sigma_ratio"] < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_the_latency_model_finds_what_a_long_conversation_costs(seed):
    plan = Plan(seed=seed, long_talks="engine-3", context_drag=0.03, rate=8.0)
    answer = anomaly.analyze(build_trace(fleet_rows(plan), PANDAS))
    model = answer.tables["model"].set_index("term")["seconds_per_unit"]
    assert model["generated token, each 1,000 before it"] == pytest.approx(0.03 * DECODE_S, rel=0.2)
    row = answer.tables["engines"].set_index("engine").loc["engine-3"]
    assert row["decode_ms_token"] > 1.4 * answer.tables["engines"]["decode_ms_token"].median()
    assert (row["ratio"], row["prefill_ratio"]) == pytest.approx((1.0, 1.0), abs=0.08)


def test_each_product_of_gpu_has_a_latency_model_of_its_own():
    answer = anomaly.analyze(build_trace(fleet_rows(Plan(lesser="GPU-1")), PANDAS))
    token = answer.tables["model"].set_index(["term", "device"])["seconds_per_unit"]["generated token"]
    assert token["NVIDIA Test"] == pytest.approx(DECODE_S, rel=0.1)
    assert token["NVIDIA Test Lite"] == pytest.approx(1.8 * DECODE_S, rel=0.1)
    assert answer.tables["engines"]["peers"].tolist() == [1] * 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [1.4, 2.5])
def test_a_straggler_is_found_with_its_factor_and_its_beginning(seed, factor):
    answer = anomaly.analyze(build_trace(fleet_rows(Plan(seed=seed, straggler="engine-2", factor=factor)), PANDAS))
    (finding,) = anomaly.judge(answer)
    row = answer.tables["engines"].set_index("engine").loc["engine-2"]
    assert (finding.kind, finding.subject) == ("straggler", "engine-2")
    assert (row["ratio"], row["prefill_ratio"]) == pytest.approx((factor, factor), rel=0.07)
    assert row["decode_ms_token"] / row["peers_ms_token"] == pytest.approx(row["ratio"])
    assert row["since_unix_nano"] == pytest.approx(START_UNIX_NANO + 54 * 10**9, abs=8 * 10**9)
    assert f"decode {row['ratio']:.1f}x its peers" in finding.text
    assert "since 14:14:1" in finding.text
    assert "lltm-ray drain engine-2" in finding.advice
    assert len(finding.evidence) == 5
    for name, columns in ANSWER.items():
        assert columns <= set(answer.tables[name].columns)


@pytest.mark.parametrize("seed", range(2))
def test_a_clean_fleet_has_no_stragglers_and_no_slow_requests(seed):
    answer = anomaly.analyze(build_trace(fleet_rows(Plan(seed=seed, noise=0.1)), PANDAS))
    assert anomaly.judge(answer) == []


@pytest.mark.parametrize("seed", range(3))
def test_engines_that_read_long_prompts_are_no_stragglers(seed):
    answer = anomaly.analyze(build_trace(fleet_rows(Plan(seed=seed, aggressor="batch")), PANDAS))
    assert [finding for finding in anomaly.judge(answer) if finding.kind == "straggler"] == []


def fleet(slow, models=("m", "m", "m", "m"), seconds=600, window=None):
    """Engines that each serve two requests a second, at 10 ms a token times `slow(engine, at_s, dice)`."""
    dice, requests = random.Random(7), []
    for engine, model in enumerate(models):
        for at in (i / 2 for i in range(2 * seconds)):
            tokens, factor = dice.randint(20, 80), slow(engine, at, dice) * dice.lognormvariate(0, 0.05)
            first = at + 0.1 * dice.lognormvariate(0, 0.05)
            moments = {
                "asked": at,
                "headers": at,
                "first": first,
                "ended": first + tokens * 0.01 * factor,
            }
            one = Try(engine=f"engine-{engine}", computed=200, generated=tokens, **moments)
            requests.append(Asked(tries=(one,), model=model))
    since_s, until_s = window or (0, seconds + 10)
    return anomaly.analyze(trace_of(requests, length_s=float(until_s), since_s=since_s))


def test_a_straggler_that_recovered_is_told_from_when_to_when():
    answer = fleet(lambda engine, at, _: 2.0 if engine == 1 and 100 <= at < 200 else 1.0)
    (finding,) = anomaly.judge(answer)
    row = answer.tables["engines"].set_index("engine").loc["engine-1"]
    assert row["since_unix_nano"] == pytest.approx(ZERO + 100 * 10**9, abs=11 * 10**9)
    assert row["until_unix_nano"] == pytest.approx(ZERO + 200 * 10**9, abs=11 * 10**9)
    assert "was a straggler" in finding.text
    assert "drain" not in finding.advice
    assert finding.impact_s == pytest.approx(200 * 50 * 0.01, rel=0.15)


def test_an_engine_that_was_never_faster_on_hardware_nobody_knows_is_not_to_be_drained():
    (finding,) = anomaly.judge(fleet(lambda engine, *_: 1.8 if engine == 2 else 1.0))
    assert (finding.kind, finding.subject) == ("slower engine", "engine-2")
    assert "engine-2 is a slower engine: decode 1.8x its peers" in finding.text
    assert "drain" not in finding.advice
    (known,) = anomaly.judge(anomaly.analyze(build_trace(fleet_rows(STRAGGLER_EVER), PANDAS)))
    assert (known.kind, known.subject) == ("straggler", "engine-2")


def test_an_engine_that_became_slow_in_a_short_window_began_well():
    answer = fleet(lambda engine, at, _: 2.5 if engine == 1 and at >= 2 else 1.0, seconds=20)
    (finding,) = anomaly.judge(answer)
    row = answer.tables["engines"].set_index("engine").loc["engine-1"]
    assert (finding.kind, finding.subject) == ("straggler", "engine-1")
    assert row["since_unix_nano"] == pytest.approx(ZERO + 2 * 10**9, abs=2 * 10**9)


def test_a_slow_time_never_begins_after_its_end():
    """Too few attempts in its finer buckets to show it, and a slow one after it that is another."""
    run = Run(since_s=0.0, until_s=4.0, requests=9, ratio=2.0, z=9.0, lost_s=1.0, ms_token=9.0, is_since_ever=True)
    pace, unknown = np.array([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.7, 0.7]]), np.zeros((1, 8))
    fine = _Buckets(1.0, np.full((1, 8), 9.0), pace, unknown, unknown, unknown, 0.1)
    assert _began_well(run, fine, 0) == run
    pace[0, 2] = 0.7
    began = _began_well(run, fine, 0)
    assert (began.since_s, began.until_s, began.is_since_ever) == (2.0, 4.0, False)


STRAGGLER_EVER = Plan(straggler="engine-2", fault_from=0.0)


def overlapping(factor, seed, lasts_s=200.0):
    """engine-2 alone has several answers at once: 10 ms a token and 4 ms for each other one, all times `factor`."""
    dice, requests = random.Random(seed), []
    for engine in ("engine-0", "engine-1"):
        now = 0.0
        while now < lasts_s:
            tokens, first = dice.randint(40, 160), now + 0.05
            ended = first + tokens * 0.01 * dice.lognormvariate(0, 0.05)
            moments = {"asked": now, "headers": now, "first": first, "ended": ended}
            requests.append(Asked(tries=(Try(engine=engine, computed=100, generated=tokens, **moments),)))
            now = ended + dice.expovariate(4.0)
    arrivals, left = np.cumsum([dice.expovariate(0.8) for _ in range(round(0.8 * lasts_s))]), {}
    for tick in range(round(100 * lasts_s)):
        now = tick / 100
        left |= {at: [dice.randint(40, 160)] * 2 for at in arrivals if now <= at < now + 0.01}
        pace_s = (0.01 + 0.004 * (len(left) - 1)) * factor
        for at, (tokens, rest) in list(left.items()):
            left[at][1] = rest - 0.01 / pace_s
            if left[at][1] <= 0:
                del left[at]
                moments = {"asked": at, "headers": at, "first": at + 0.001, "ended": now}
                requests.append(Asked(tries=(Try(engine="engine-2", computed=10, generated=tokens, **moments),)))
    return anomaly.analyze(trace_of(requests))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("factor", [1.0, 1.4, 1.8])
def test_a_straggler_that_alone_has_several_answers_at_once_is_told_with_its_factor(factor, seed):
    row = overlapping(factor, seed).tables["engines"].set_index("engine").loc["engine-2"]
    assert row["ratio"] == pytest.approx(factor, rel=0.15)


def test_chance_needs_less_to_be_ruled_out_where_less_was_looked_at():
    short, long = (fleet(lambda *_: 1.0, seconds=seconds).tables["engines"]["least_z"] for seconds in (10, 600))
    assert 4 < short.max() < long.min() < 6
    assert anomaly.judge(fleet(lambda engine, *_: 2.0 if engine == 2 else 1.0, seconds=12)) != []


@pytest.mark.parametrize("seed", range(3))
def test_answers_that_seem_to_have_taken_no_time_are_not_what_others_are_held_against(seed):
    """Of real engines on a full machine: paces vary by a third, and now and then all of an answer is read at once."""
    noise = {number: random.Random(f"{seed} {number}") for number in range(4)}

    def slow(engine, at, _):
        dice = noise[engine]
        factor = 2.5 if engine == 2 and at >= 100 else 1.0
        return 1e-4 if dice.random() < 0.08 else 0.2 * factor * dice.lognormvariate(0, 0.35)

    row = fleet(slow, seconds=200).tables["engines"].set_index("engine").loc["engine-2"]
    assert row["ratio"] == pytest.approx(2.5, rel=0.3)
    assert row["since_unix_nano"] == pytest.approx(ZERO + 100 * 10**9, abs=11 * 10**9)


def test_phases_are_those_that_the_server_told_where_a_gateway_read_late():
    rows = fleet_rows(Plan(seed=1, seconds=120, fault_from=0.2, straggler="engine-1", factor=2.2))
    attempts = rows["attempts"]
    first, ended = (attempts[name].to_numpy().copy() for name in ("first_s", "ended_s"))
    first[::2] = ended[::2] - 1e-4
    late = attempts.set_column(attempts.column_names.index("first_s"), "first_s", pa.array(first))
    (finding,) = anomaly.judge(anomaly.analyze(build_trace(dict(rows) | {"attempts": late}, PANDAS)))
    assert (finding.kind, finding.subject) == ("straggler", "engine-1")
    assert finding.figures["ratio"] == pytest.approx(2.2, rel=0.1)


def test_of_two_engines_the_slower_is_blamed_only_if_the_gap_is_large():
    assert anomaly.judge(fleet(lambda engine, *_: 1.3 if engine else 1.0, models="mm")) == []
    (finding,) = anomaly.judge(fleet(lambda engine, *_: 1.7 if engine else 1.0, models="mm"))
    assert finding.subject == "engine-1"


def test_engines_of_another_model_are_no_peers():
    answer = fleet(lambda engine, *_: 3.0 if engine == 3 else 1.0, models=("m", "m", "m", "large"))
    assert anomaly.judge(answer) == []
    assert "engine-3" not in set(answer.tables["engines"]["engine"])


def test_engines_that_all_slow_down_at_once_are_no_stragglers():
    assert anomaly.judge(fleet(lambda _, at, __: 2.0 if at > 300 else 1.0)) == []


def test_slow_requests_of_an_engine_that_is_no_straggler_are_found_with_the_phase_that_is_long():
    answer = fleet(lambda engine, at, dice: 4.0 if engine == 2 and 200 <= at < 300 and dice.random() < 0.4 else 1.0)
    (finding,) = anomaly.judge(answer)
    assert (finding.kind, finding.subject) == ("slow requests", "engine-2")
    assert finding.impact_s == pytest.approx(80 * 1.5, rel=0.4)
    worst = answer.tables["requests"]
    assert len(worst) == 20
    assert set(worst["engine"]) == {"engine-2"}
    assert worst["why"].str.startswith("decode: ").all()
    assert set(finding.evidence) <= set(worst["trace_id"]) | set(finding.evidence[3:])
    assert f"lltm-ray explain r-{int(finding.evidence[0], 16) - 1} " in finding.advice


@pytest.mark.parametrize("since_s", [150, 270, 285])
def test_slow_requests_that_arrived_long_before_the_window_are_counted_at_its_begin(since_s):
    def slow(engine, at, dice):
        return 9.0 if engine == 2 and at < 300 and dice.random() < 0.4 else 1.0

    (row,) = fleet(slow, window=(since_s, since_s + 30)).tables["clusters"].itertuples()
    assert row.engine == "engine-2"
    assert ZERO + since_s * 10**9 == row.since_unix_nano < row.until_unix_nano <= ZERO + (since_s + 30) * 10**9
    assert row.requests >= row.outliers > 0


def test_embeddings_beside_a_decode_are_known_as_what_slows_it():
    answer = anomaly.analyze(build_trace(fleet_rows(Plan(embeddings=4.0, rate=8.0)), PANDAS))
    assert answer.tables["engines"]["ratio"].tolist() == pytest.approx([1.0] * 4, abs=0.1)


def test_waiting_that_a_failed_attempt_caused_is_the_reason_told():
    moments = [(at, at + 0.1, at + 0.1 + 0.01 * (20 + at % 50)) for at in range(100)]
    fine = [
        Asked(tries=(Try(asked=a, headers=a, first=f, ended=e, computed=200, generated=20 + int(a) % 50),))
        for a, f, e in moments
    ]
    lost = Try(engine="engine-1", asked=10.0, headers=10.0, ended=15.0, outcome="retried")
    again = Try(asked=15.0, headers=15.0, first=15.1, ended=15.5, computed=200, generated=40)
    worst = anomaly.analyze(trace_of([*fine, Asked(tries=(lost, again))])).tables["requests"]
    assert worst["why"].tolist() == ["1 failed attempts: 5.00 s, expected 0.00"]


@pytest.mark.parametrize("tables", [{}, {"servers": fleet_rows(Plan(seconds=5))["servers"]}])
def test_without_requests_its_tables_are_empty_and_whole(tables):
    answer = anomaly.analyze(build_trace(tables, PANDAS))
    for name, columns in ANSWER.items():
        assert columns <= set(answer.tables[name].columns)
        assert len(answer.tables[name]) == 0
    assert anomaly.judge(answer) == []


def test_requests_that_never_got_an_engine_are_left_out():
    nowhere = [Asked(tries=(Try(engine="", ended=5.0, outcome="refused"),), error="overloaded_error")] * 60
    answer = anomaly.analyze(trace_of(nowhere))
    assert len(answer.tables["engines"]) == len(answer.tables["requests"]) == 0
    assert anomaly.judge(answer) == []
