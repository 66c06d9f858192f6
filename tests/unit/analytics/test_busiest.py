"""Busiest stretches: steady streams have none, bursts keep their rate, and no part is told to be slower than it was."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from lltm_ray.analytics.busiest import Stretches, densest

STEADY = [(200, 1.0, 1000), (200, 40.0, 1000), (2000, 10.0, 400), (20_000, 50.0, 100)]
"""Events on average, a second, and how many such streams."""
WITHIN = 1.25
"""Factor between the rate that is told of a steady stream and its true one, in 99 of 100 streams."""
BURSTS = [(30 / 53, 53.0, 75 / 1.3, 1.3), (0.05, 3600.0, 41.0, 5.0), (5.0, 600.0, 40.0, 5.0), (5.0, 600.0, 10.0, 60.0)]
"""Events a second outside of the burst, seconds of the window, and of the burst both."""


def steady(dice, per_s, length_s):
    """Poisson events of one rate."""
    return np.sort(dice.random(dice.poisson(per_s * length_s)) * length_s)


def with_burst(dice, per_s, length_s, burst_per_s, burst_s):
    """The same with a burst, and when that begins."""
    begin = dice.random() * (length_s - burst_s)
    burst = begin + dice.random(dice.poisson((burst_per_s - per_s) * burst_s)) * burst_s
    return np.sort(np.concatenate([steady(dice, per_s, length_s), burst])), begin


# --- the densest


@pytest.mark.parametrize(("events", "per_s", "streams"), STEADY)
def test_a_clump_of_a_steady_stream_is_no_burst_and_its_rate_is_told(events, per_s, streams):
    dice, length_s = np.random.default_rng(events), events / per_s
    told = [densest(np, steady(dice, per_s, length_s), length_s, 0.2) for _ in range(streams)]
    alarms = sum((each.from_s, each.until_s) != (0.0, length_s) for each in told)
    outside = sum(not 1 / WITHIN < each.per_s / per_s < WITHIN for each in told)
    covered = sum(each.low_per_s <= per_s <= each.high_per_s for each in told)
    assert alarms <= 0.01 * streams + 2 * math.sqrt(0.01 * streams)
    assert outside <= 0.01 * streams
    assert covered >= 0.94 * streams - 3 * math.sqrt(0.06 * streams)


@pytest.mark.parametrize(("per_s", "length_s", "burst_per_s", "burst_s"), BURSTS)
def test_a_burst_is_told_at_its_rate(per_s, length_s, burst_per_s, burst_s):
    dice, ratios, covered, streams = np.random.default_rng(7), [], 0, 150
    for _ in range(streams):
        at, begin = with_burst(dice, per_s, length_s, burst_per_s, burst_s)
        told = densest(np, at, length_s, 0.2)
        assert told.from_s < begin + burst_s
        assert told.until_s > begin
        ratios.append(told.per_s / burst_per_s)
        covered += told.low_per_s <= burst_per_s <= told.high_per_s
    low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    assert 0.75 < low < high < 1.4
    assert middle == pytest.approx(1.03, abs=0.07)
    assert covered >= 0.92 * streams


@pytest.mark.parametrize("seed", range(12))
def test_no_stretch_was_faster_than_what_is_told_but_by_chance(seed):
    dice = np.random.default_rng(seed)
    length_s = 60.0
    at, _ = with_burst(dice, dice.uniform(0.5, 4), length_s, dice.uniform(5, 60), dice.uniform(1, 20))
    told = densest(np, at, length_s, 0.2)
    first, last = np.triu_indices(len(at), 8)
    span, number = at[last] - at[first], last - first
    span, number = span[span >= 1.0], number[span >= 1.0]
    deviations = np.sqrt(2 * np.log(math.e * len(at) / number)) + 1.6
    bounds = stats.gamma.ppf(stats.norm.cdf(-deviations), number) / span
    assert told.per_s >= bounds.max() * 0.99  # lengths are looked at in steps
    assert 0.9 * bounds.max() < told.low_per_s < 1.01 * bounds.max()


def test_a_longer_stretch_is_told_only_where_it_is_as_fast_as_is_sure_of_the_densest():
    at = np.concatenate([np.arange(0, 1000, 1 / 95), np.arange(1000, 2000, 1 / 100)])
    told = densest(np, at, 4000.0, 0.2)
    assert 95 < told.low_per_s < 99 <= told.per_s <= 100
    assert told.from_s > 400


def test_what_chance_leaves_open_is_what_poisson_s_law_says():
    for number in (1, 9, 74, 1200):
        told = densest(np, np.linspace(0.1, 99.9, number), 100.0, 0.2)
        exact = stats.gamma.ppf(0.025, number), stats.gamma.ppf(0.975, number + 1)
        assert (told.low_per_s * 100, told.high_per_s * 100) == pytest.approx(exact, rel=0.01, abs=0.15)
    burst = densest(np, np.concatenate([50 + np.arange(301) / 60, [90.0]]), 100.0, 0.2)
    deviations = math.sqrt(2 * math.log(math.e * 302 / 300)) + 1.6
    exact = stats.gamma.ppf(stats.norm.cdf(-deviations), 300) / 5, stats.gamma.ppf(0.975, 301) / 5
    assert burst.per_s == pytest.approx(60)
    assert (burst.low_per_s, burst.high_per_s) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("service_s", "least_s"), [(0.01, 1.0), (4.0, 4.0)])
def test_requests_at_once_are_told_over_a_second_or_a_service_time(service_s, least_s):
    at = np.sort(np.concatenate([np.full(80, 30.0), np.arange(0, 100, 5.0)]))
    told = densest(np, at, 100.0, service_s)
    assert told.per_s * least_s == pytest.approx(80)  # after the first
    assert (told.from_s, told.until_s) == (30.0, 30.0 + least_s)
    at_the_end = densest(np, np.sort(np.append(at, np.full(200, 99.999))), 100.0, service_s)
    assert at_the_end[:2] == (100.0 - least_s, 100.0)
    assert at_the_end.per_s * least_s == pytest.approx(200)


@pytest.mark.parametrize("number", [40, 101, 1000])
def test_a_burst_without_anything_else_is_told_from_its_first_event_to_its_last(number):
    told = densest(np, np.linspace(50.0, 55.0, number), 600.0, 0.2)
    assert told[:3] == pytest.approx((50.0, 55.0, (number - 1) / 5))


@pytest.mark.parametrize("length_s", [0.0, 0.5, 1.0, 7.0])
def test_events_outside_of_the_window_do_not_count(length_s):
    at = np.sort(np.concatenate([np.linspace(-3, 0, 500, endpoint=False), np.linspace(length_s, 20, 500)]))
    assert densest(np, at, length_s, 0.2)[:4] == (0.0, length_s, 0.0, 0.0)
    assert densest(np, at[:0], length_s, 0.2)[:4] == (0.0, length_s, 0.0, 0.0)


# --- those that last


def test_the_fullest_stretch_that_lasts_is_never_slower_than_the_mean_and_has_its_events():
    dice = random.Random(5)
    for _ in range(200):
        length_s, number = dice.uniform(1, 400), dice.randrange(0, 1500)
        at = np.sort([length_s * dice.random() ** dice.choice([0.2, 1, 5]) for _ in range(number)])
        for is_lasting in (False, True):
            found = Stretches(np, at, length_s, 0.1, is_lasting=is_lasting).fullest()
            inside = ((at >= found.from_s) & (at <= found.until_s)).sum()
            assert found.is_told == (number > 100)
            assert 0 <= found.from_s < found.until_s <= length_s
            assert found.per_s * length_s >= number * 0.999
            assert found.per_s * (found.until_s - found.from_s) == pytest.approx(inside, abs=1.5)
            is_part = (found.from_s, found.until_s) != (0.0, length_s)
            assert not is_part or (inside > 100 and found.until_s - found.from_s > 9.999)
