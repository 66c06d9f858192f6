"""Tuning on real fleets: two candidates in rounds, one that cannot start, and nothing left behind."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from lltm_ray.config import FleetConfig
from lltm_ray.errors import CancelledError
from lltm_ray.llamacpp.tuning.plan import WORKLOADS, plan
from lltm_ray.sdk.tune import LEAST_ROUNDS, tune
from lltm_ray.sdk.tune_facts import read_facts
from lltm_ray.sdk.tune_fleet import FleetBench


@pytest.mark.timeout(600)
def test_fleets_are_measured_in_rounds_and_a_bad_one_is_a_row(ray_cluster):
    fleet, stop = FleetConfig(model="tiny"), threading.Event()
    facts = read_facts(fleet, gpus=0)
    asked = replace(WORKLOADS["chat"], concurrency=2, answer_tokens=8, question_tokens=8, shared_tokens=16)
    default, guess, *_ = plan(asked, facts)
    too_large = replace(guess, name="too large", changes={**guess.changes, "n_ctx": 2**28})
    with FleetBench(fleet, asked, facts, slice_s=1.5, stop=stop) as bench:
        bench.admit([default, guess])
        found = tune([default, too_large, guess], bench.measure, seconds=1, higher_is_better=False)
        stop.set()
        with pytest.raises(CancelledError):
            bench.measure(guess, 99)
    assert bench.rate > 0
    by_name = {row.candidate.name: row for row in found.rows}
    assert by_name["too large"].state.startswith("failed: ")
    assert "n_ctx" in by_name["too large"].state
    assert found.rounds >= LEAST_ROUNDS
    assert len(by_name["default"].figures) == found.rounds
    assert all(0 < figure < 600 for row in found.rows for figure in row.figures)
    assert found.chosen.name in {"default", "guess"}
    assert by_name["guess"].gain.low < by_name["guess"].gain.ratio < by_name["guess"].gain.high
