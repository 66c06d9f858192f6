"""The knee that is told at a light load, against that of the same simulated engines with all slots held."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lltm_ray.analytics import queueing
from lltm_ray.analytics.answer import Answer
from lltm_ray.analytics.erlang import knee
from lltm_ray.analytics.fit import fit_groups
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.occupancy import read_engines, read_held
from lltm_ray.analytics.slowing import at_full_load
from tests.unit.analytics.batches_made import ENGINES, START_UNIX_NANO, Machine, most_per_s, serve, tables_of

PANDAS = choose_engine("pandas")
STEP = Machine(step_s=lambda n: 0.006 if n == 1 else 0.0095 + 0.0002 * n)
"""A second slot costs as much as a dozen more do: other kernels are used from there on."""
LINE = Machine(step_s=lambda n: 0.0008 + 0.0004 * n, slots=4, noise=0.3)
FLAT = Machine(step_s=lambda n: 0.008 + 0.0004 * (n - 1), slots=4)
MACHINES = pytest.mark.parametrize("machine", [STEP, LINE, FLAT], ids=["step", "line", "flat"])


def told(machine, share, number=400, *, seed=0, is_alike=False):
    """A row of a fleet at a share of the load that it can carry, and its true knee."""
    most = most_per_s(machine, is_alike=is_alike)
    jobs = serve(machine, share * most, number, seed=seed, is_alike=is_alike)
    trace = build_trace(tables_of(jobs, machine), PANDAS, start_unix_nano=START_UNIX_NANO)
    slots = ENGINES * machine.slots
    return queueing.analyze(trace).tables["models"].to_dict("records")[0], knee(slots / most, slots)


@MACHINES
@pytest.mark.parametrize("is_alike", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_a_knee_is_told_near_the_true_one_at_every_load(machine, share, is_alike):
    ratios = []
    for seed in range(3):
        row, true = told(machine, share, seed=seed, is_alike=is_alike)
        ratios.append(row["knee_per_s"] / true)
        assert row["knee_low_per_s"] <= row["knee_per_s"] <= row["knee_high_per_s"]
        assert row["knee_low_per_s"] < 1.25 * true
        assert row["knee_high_per_s"] > 0.75 * true
    assert 0.68 < np.median(ratios) < 1.45


def test_a_second_slot_that_costs_much_is_not_taken_for_what_all_slots_cost():
    row, true = told(STEP, 0.2, 800)
    assert 0.8 < row["knee_per_s"] / true < 1.2
    assert row["knee_high_per_s"] < 1.4 * row["knee_low_per_s"]


def test_a_load_too_light_to_tell_a_knee_leaves_more_open_than_a_heavy_one():
    light, heavy = (told(STEP, share)[0] for share in (0.03, 0.6))
    assert light["knee_high_per_s"] > 2 * light["knee_low_per_s"]
    assert heavy["knee_high_per_s"] < 1.3 * heavy["knee_low_per_s"]
    assert light["headroom_low_ratio"] + 1 < (light["headroom_ratio"] + 1) / 1.4


@pytest.mark.parametrize("machine", [STEP, FLAT], ids=["step", "flat"])
@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("number", [1, 2, 3, 6, 14])
def test_few_requests_leave_open_where_the_knee_is(machine, share, number):
    for seed in range(6):
        row, true = told(machine, share, number, seed=seed, is_alike=True)
        assert row["knee_low_per_s"] <= 1.05 * true
        assert row["knee_high_per_s"] >= 0.95 * true
        if number < 3:
            assert row["knee_high_per_s"] > 2 * row["knee_low_per_s"]


@pytest.mark.parametrize("rows", [8, 10, 16, 400])
def test_the_errors_of_a_fit_are_those_of_chance_however_few_its_rows(rows):
    dice, true = np.random.default_rng(rows), np.array([1.0, -2.0, 0.5, 3.0, 0.0])
    off = []
    for _ in range(200):
        columns = [dice.normal(size=rows) for _ in true]
        y = sum(each * column for each, column in zip(true, columns, strict=True)) + dice.normal(size=rows)
        fit = fit_groups(np, np.zeros(rows, dtype=int), 1, columns, y, np.ones(rows))
        off.append(np.abs(fit.terms[0] - true) / fit.errors[0])
    assert 0.5 < np.median(off) < 1.15  # of a normal distribution: 0.67


def test_slots_are_never_expected_to_need_longer_together_than_one_after_the_other():
    jobs = serve(STEP, 3.0, 300)
    trace = build_trace(tables_of(jobs, STEP), PANDAS, start_unix_nano=START_UNIX_NANO)
    slowing = at_full_load(trace, read_held(trace), read_engines(trace))
    assert bool((slowing.now_s <= slowing.least_s).all())
    assert bool((slowing.least_s <= slowing.most_s).all())
    assert bool((slowing.most_s <= STEP.slots * slowing.now_s * (1 + 1e-9)).all())
    lone = build_trace(tables_of(jobs, Machine(step_s=STEP.step_s, slots=1)), PANDAS, start_unix_nano=START_UNIX_NANO)
    alone = at_full_load(lone, read_held(lone), read_engines(lone))
    assert alone.most_s == pytest.approx(alone.now_s)


@pytest.mark.parametrize("seconds", [6.0, 20.0, 60.0])
def test_a_knee_is_never_below_what_was_served_without_long_waits_however_short_that_was(seconds):
    at = np.arange(0.0, seconds, 1 / 41.0)
    jobs = serve(STEP, math.inf, len(at))
    for number, (job, begin) in enumerate(zip(jobs, 300.0 + at, strict=True)):
        job.arrived = job.sent = float(begin)
        job.first, job.ended, job.engine = job.sent + 0.1, job.sent + 0.3 + 0.2 * (number % 2), number % 2
    end = START_UNIX_NANO + 600 * 10**9
    trace = build_trace(tables_of(jobs, STEP), PANDAS, start_unix_nano=START_UNIX_NANO, end_unix_nano=end)
    row = queueing.analyze(trace).tables["models"].to_dict("records")[0]
    assert knee(row["service_s"], 16) < 40
    assert row["seen_per_s"] == pytest.approx(41, rel=0.03)
    assert row["knee_per_s"] >= row["busiest_per_s"] * 0.999
    assert row["headroom_ratio"] > -0.001


def test_how_many_slots_are_needed_is_of_the_stretch_that_lasts():
    jobs = serve(STEP, 1.6 * most_per_s(STEP), 1500, seed=4)
    answer = queueing.analyze(build_trace(tables_of(jobs, STEP), PANDAS, start_unix_nano=START_UNIX_NANO))
    models = answer.tables["models"]
    (finding,) = queueing.judge(answer)
    assert finding.kind == "saturation"
    slower = Answer(answer.tables | {"models": models.assign(service_s=9 * models["service_s"])})
    assert queueing.judge(slower) == [finding]
