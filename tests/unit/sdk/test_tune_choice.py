"""A winner is named only beyond the noise, and stopping early does not lose the best."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lltm_ray.llamacpp.tuning import choice
from lltm_ray.llamacpp.tuning.choice import Measured, choose, survivors, weigh

RUNS = 120


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(choice, "DRAWS", 2000)


def simulate(seed, effects, *, noise, rounds, drift=0.5):
    """Rounds as `sdk.tune` makes them: all who are still in, each round at its own speed of the machine."""
    dice = np.random.default_rng(seed)
    alive, measured = [f"c{at}" for at in range(len(effects))], []
    for number in range(rounds):
        hour = dice.normal(0, drift)
        measured += [
            Measured(candidate=name, round=number, score=effects[int(name[1:])] + hour + dice.normal(0, noise))
            for name in alive
        ]
        if number:
            alive = survivors(measured, "c0", alive)
    return measured, alive


@pytest.mark.parametrize(("noise", "rounds"), [(0.02, 3), (0.2, 3), (0.2, 5)])
def test_among_alike_candidates_hardly_ever_one_is_named(noise, rounds):
    named = sum(
        choose(simulate(seed, [0.0] * 6, noise=noise, rounds=rounds)[0], "c0") is not None for seed in range(RUNS)
    )
    assert named / RUNS <= 0.06


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.3])
def test_stopping_early_keeps_the_best_in_95_of_100_runs(noise):
    effects = [0.0, 0.05, 0.1, 0.15, -0.1, -0.4]
    outcomes = [simulate(seed, effects, noise=noise, rounds=4) for seed in range(RUNS)]
    assert sum("c3" in alive for _, alive in outcomes) / RUNS >= 0.95
    visits = sum(len(measured) for measured, _ in outcomes) / RUNS
    assert visits < 24 if noise < 0.3 else visits <= 24


def test_a_clear_gain_is_named_with_its_interval():
    measured, _ = simulate(1, [0.0, math.log(1.5), -0.2], noise=0.02, rounds=4, drift=1.0)
    best = choose(measured, "c0")
    assert best is not None
    assert (best.candidate, best.rounds) == ("c1", 4)
    assert 1 < best.low < best.ratio < best.high
    assert best.ratio == pytest.approx(1.5, rel=0.1)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(RUNS):
        measured, _ = simulate(seed, [0.0, 0.3], noise=0.1, rounds=3)
        (gain,) = weigh(measured, "c0")
        inside += gain.low <= math.exp(0.3) <= gain.high
    assert inside / RUNS >= 0.9


def test_one_round_names_nobody_however_large_the_gain():
    measured = [Measured(candidate="c0", round=0, score=0.0), Measured(candidate="c1", round=0, score=5.0)]
    assert choose(measured, "c0") is None
    assert weigh(measured, "c0")[0].low is None
    assert survivors(measured, "c0", ["c0", "c1"]) == ["c0", "c1"]
