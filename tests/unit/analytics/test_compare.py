"""Comparison of two windows: statistics against brute force, planted changes found, and none where there are none."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.stats import ks_2samp

from lltm_ray.analytics.bootstrap import (
    DRAWS,
    SLICES,
    cliffs_delta,
    design_effect,
    distance,
    draw_quantile,
    draw_slices,
    draw_whole,
)
from lltm_ray.analytics.compare import BETTER, LESS, MORE, NO_DIFFERENCE, NOT_MEASURED, WORSE, compare
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.report import make_report
from lltm_ray.analytics.text import to_json
from lltm_ray.errors import ConfigError
from tests.fleet_rows import Plan, fleet_rows

ENGINE = choose_engine("pandas")
SECONDS = 90.0


def trace(**plan):
    return build_trace(fleet_rows(Plan(**{"seconds": SECONDS} | plan)), ENGINE)


@pytest.fixture(scope="module")
def clean():
    return [trace(seed=seed) for seed in range(4)]


def row_of(found, metric, statistic="median", scope=""):
    (row,) = (each for each in found.rows if (each.metric, each.statistic, each.scope) == (metric, statistic, scope))
    return row


# --- statistics


@pytest.mark.parametrize(("q", "n"), [(0.5, 41), (0.95, 200), (0.5, 1000), (1.0, 30)])
def test_draws_of_a_quantile_are_spread_like_those_of_whole_samples(q, n):
    dice = np.random.default_rng(1)
    values = np.sort(dice.lognormal(0, 1, n))
    found, draws = draw_quantile(dice, values, np.arange(n) % SLICES, q)
    whole = np.sort(dice.choice(values, (4 * DRAWS, n)), axis=1)[:, math.ceil(q * n) - 1]
    assert found == np.quantile(values, q, method="inverted_cdf")
    assert len(draws) == DRAWS
    assert distance(np.sort(draws), np.sort(whole)) < 1.95 * math.sqrt(1 / DRAWS + 1 / (4 * DRAWS))


def test_values_that_come_in_waves_have_wider_intervals():
    dice = np.random.default_rng(2)
    n = 4000
    slices = np.repeat(np.arange(SLICES), n // SLICES)
    alone, waves = dice.normal(0, 1, n), dice.normal(0, 1, n) + dice.normal(0, 1, SLICES)[slices]
    spreads = []
    for values in (alone, waves):
        order = np.argsort(values)
        spreads.append(np.std(draw_quantile(dice, values[order], slices[order], 0.5)[1]))
    assert design_effect(alone < 0, slices) < 2
    assert design_effect(waves < 0, slices) > 10
    assert spreads[1] == pytest.approx(1 / math.sqrt(SLICES), rel=0.6)
    assert spreads[1] > 5 * spreads[0]


def test_intervals_of_a_median_hold_the_truth_as_often_as_they_say():
    dice = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        values = np.sort(dice.exponential(1.0, 150))
        low, high = np.quantile(draw_quantile(dice, values, dice.integers(0, SLICES, 150), 0.5)[1], (0.025, 0.975))
        held += low <= math.log(2) <= high
    assert 0.92 <= held / 400 <= 0.99


def test_a_whole_is_drawn_by_slices():
    dice = np.random.default_rng(4)
    part, whole = dice.poisson(5, SLICES) * 1.0, dice.poisson(50, SLICES) * 1.0
    found, draws = draw_whole(draw_slices(dice), part, whole)
    places = dice.integers(0, SLICES, (DRAWS, SLICES))
    assert found == part.sum() / whole.sum()
    assert np.mean(draws) == pytest.approx(found, rel=0.02)
    assert np.std(draws) == pytest.approx(np.std(part[places].sum(axis=1) / whole[places].sum(axis=1)), rel=0.1)
    assert math.isnan(draw_whole(draw_slices(dice), part, whole * 0)[0])


@pytest.mark.parametrize("seed", range(5))
def test_effect_and_distance_equal_brute_force(seed):
    dice = np.random.default_rng(seed)
    before, after = (np.sort(dice.integers(0, 30, int(dice.integers(1, 60)))) * 1.0 for _ in range(2))
    pairs = list(itertools.product(before, after))
    assert cliffs_delta(before, after) == pytest.approx(sum(np.sign(b - a) for a, b in pairs) / len(pairs))
    assert distance(before, after) == pytest.approx(ks_2samp(before, after).statistic)


# --- windows


def test_a_window_differs_in_nothing_from_itself(clean):
    found = compare(clean[0], clean[0])
    assert {row.verdict for row in found.rows if row.count_before >= 20} == {NO_DIFFERENCE}
    assert all(row.difference == 0 for row in found.rows)
    assert found.is_same_workload


def test_windows_of_one_fleet_differ_about_as_often_as_chance_says(clean):
    pairs = itertools.combinations(clean, 2)
    verdicts = [row.verdict for pair in pairs for row in compare(*pair).rows if row.verdict != NOT_MEASURED]
    differing = sum(verdict != NO_DIFFERENCE for verdict in verdicts) / len(verdicts)
    assert len(verdicts) > 300
    assert differing < 0.12


def test_a_slow_engine_is_worse_and_mending_it_is_better(clean):
    slow = trace(seed=9, straggler="engine-2", factor=1.8, fault_from=0.0)
    found, mended = compare(clean[0], slow), compare(slow, clean[0])
    row = row_of(found, "decode a token", scope="engine-2")
    assert row.verdict == WORSE
    assert row.ratio_low <= row.ratio <= row.ratio_high
    assert 1.6 < row.ratio_low < row.ratio_high < 2.1
    assert row.effect > 0.9
    assert row_of(mended, "decode a token", scope="engine-2").verdict == BETTER
    assert row_of(mended, "decode a token", scope="engine-2").ratio == pytest.approx(1 / row.ratio)
    assert row_of(found, "tokens", "whole", "engine-2").verdict == LESS
    others = [row_of(found, "decode a token", scope=f"engine-{i}").ratio for i in (0, 1, 3)]
    assert all(ratio == pytest.approx(1.0, abs=0.1) for ratio in others)  # they got more to do


def test_figures_are_those_of_the_windows(clean):
    found = compare(clean[0], clean[1])
    fine = clean[0].requests[clean[0].requests["error"] < 0]
    latency, reuse = row_of(found, "latency", "p95"), row_of(found, "reuse", "whole")
    assert latency.before == pytest.approx(np.quantile(fine["total_s"], 0.95, method="inverted_cdf"))
    assert latency.count_before == len(fine)
    assert latency.difference == latency.after - latency.before
    assert reuse.before == clean[0].requests["cached"].sum() / clean[0].requests["prompt"].sum()
    rate = row_of(found, "requests", "whole")
    assert rate.before == pytest.approx(len(clean[0].requests) / clean[0].length_s)
    energy = clean[0].gpus.sort_values("at_s").groupby("gpu")["energy_j"]
    joules = (energy.last() - energy.first()).sum()
    told = row_of(found, "energy a token", "whole")
    assert told.before == pytest.approx(joules / clean[0].requests["generated"].sum())


def test_failures_count_and_clients_that_left_do_not(clean):
    found = compare(clean[0], trace(seed=7, cascade="engine-1"))
    row = row_of(found, "errors", "whole")
    assert row.before == 0 < row.after
    assert (clean[0].requests["error"] >= 0).any()
    assert row.verdict == WORSE
    assert math.isnan(row.ratio)


def test_requests_that_were_refused_or_wrong_are_no_errors(clean):
    tables = fleet_rows(Plan(seed=0, seconds=SECONDS))
    requests = tables["requests"]
    half = np.arange(requests.num_rows) % 2 == 0
    for code, error, changed in ((400, "invalid_request_error", []), (429, "overloaded_error", ["refused"])):
        status = pa.array(np.where(half, code, 200), requests["status"].type)
        told = pa.array(np.where(half, error, ""), pa.string())
        columns = {"status": status, "error_type": told}
        other = requests.drop_columns(list(columns))
        for name, column in columns.items():
            other = other.append_column(name, column)
        found = compare(clean[0], build_trace(tables | {"requests": other}, ENGINE))
        assert row_of(found, "errors", "whole").after == 0
        assert [name for name in ("errors", "refused") if row_of(found, name, "whole").verdict == WORSE] == changed


def test_cut_at_their_deadline_they_are_errors(clean):
    tables = fleet_rows(Plan(seed=0, seconds=SECONDS))
    place = tables["requests"].column_names.index("error_type")
    cut = pa.array(["timeout_error"] * tables["requests"].num_rows)
    found = compare(
        clean[0], build_trace(tables | {"requests": tables["requests"].set_column(place, "error_type", cut)}, ENGINE)
    )
    assert row_of(found, "errors", "whole").after == 1


def test_more_requests_are_neither_better_nor_worse(clean):
    found, back = compare(clean[0], trace(seed=5, overload=1.5)), compare(trace(seed=5, overload=1.5), clean[0])
    assert {row_of(found, name, "whole").verdict for name in ("requests", "tokens")} == {MORE}
    assert {row_of(back, name, "whole").verdict for name in ("requests", "tokens")} == {LESS}


def test_other_work_is_told_of_before_figures(clean):
    found = compare(clean[0], trace(seed=5, aggressor="greedy", aggressor_rate=4.0, fault_from=0.0))
    changed = {each.feature for each in found.mix if not each.is_same}
    assert {"prompt tokens", "generated tokens"} <= changed
    assert "not the same workload" in found.text().split("verdict")[0]
    same = compare(clean[0], clean[1])
    assert same.is_same_workload
    assert "not the same workload" not in same.text()


def test_a_higher_rate_is_other_work_too(clean):
    found = compare(clean[0], trace(seed=5, overload=1.5))
    assert [each.feature for each in found.mix if not each.is_same] == ["requests a second"]


def test_it_can_be_written_as_json_and_read_by_people(clean):
    slow = trace(seed=9, straggler="engine-2", fault_from=0.0)
    found = compare(clean[0], slow, confidence=0.9)
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert len(told["rows"]) == len(found.rows)
    assert told["rows"][0] | {"verdict": ""} == dataclasses.asdict(found.rows[0]) | {"verdict": ""}
    assert told["is_same_workload"] is True
    lines = found.text().splitlines()
    assert any(line.startswith("engine-2") and "decode a token" in line and line.endswith("worse") for line in lines)
    assert not any(line.startswith("engine-") and line.endswith(NO_DIFFERENCE) for line in lines)
    assert max(map(len, lines)) <= 120
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.confidence = 0.5


def test_less_confidence_gives_narrower_intervals(clean):
    wide, narrow = (row_of(compare(*clean[:2], confidence=each), "latency") for each in (0.99, 0.8))
    assert wide.difference_low < narrow.difference_low < narrow.difference_high < wide.difference_high


# --- little to go by


def test_an_empty_window_is_refused_by_name(clean):
    nothing = build_trace({}, ENGINE)
    with pytest.raises(ConfigError, match="before=") as caught:
        compare(nothing, clean[0])
    assert caught.value.field == "before"
    with pytest.raises(ConfigError, match="after="):
        compare(clean[0], nothing)
    with pytest.raises(ConfigError, match="confidence"):
        compare(clean[0], clean[1], confidence=95)


def test_a_single_request_shows_no_difference(clean):
    tables = fleet_rows(Plan(seed=1, seconds=5, gpus=0))
    one = build_trace(tables | {"requests": tables["requests"].slice(0, 1)}, ENGINE)
    found = compare(clean[0], one)
    assert {row.verdict for row in found.rows} == {NOT_MEASURED}
    assert json.dumps(found.as_dict(), allow_nan=False)
    assert found.text()


def test_engines_of_one_window_alone_are_left_out(clean):
    tables = fleet_rows(Plan(seed=1, seconds=SECONDS))
    names = pc.replace_substring(tables["attempts"]["engine"], "engine-3", "engine-x")
    place = tables["attempts"].column_names.index("engine")
    tables["attempts"] = tables["attempts"].set_column(place, "engine", pa.chunked_array(names.chunks, pa.string()))
    found = compare(clean[0], build_trace(tables, ENGINE))
    assert {row.scope for row in found.rows} == {"", "engine-0", "engine-1", "engine-2"}


def test_a_comparison_is_part_of_the_reports_json():
    trace = build_trace(fleet_rows(Plan(seconds=40.0)), choose_engine("pandas"))
    told = json.loads(to_json(make_report(trace), compare(trace, trace)))
    assert told["comparison"]["rows"]
    assert "comparison" not in json.loads(to_json(make_report(trace)))
