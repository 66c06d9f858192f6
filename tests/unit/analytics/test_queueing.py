"""Queueing: formulas against a solved chain, a simulated M/M/c queue, Little's law by hand, and what is said of it."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from lltm_ray.analytics import queueing
from lltm_ray.analytics.answer import Answer
from lltm_ray.analytics.erlang import KNEE_UTILIZATION, expected_wait, knee, slots_for, waiting_probability
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.occupancy import in_system, read_held
from tests.fleet_rows import START_UNIX_NANO, Plan, fleet_rows

ENGINE = choose_engine("pandas")


def solved_chain(arrivals, service, servers, most=3000):
    """Mean wait and share of waiting arrivals, from the chain's balance equations."""
    weights = [1.0]
    for n in range(1, most):
        weights.append(weights[-1] * arrivals * service / min(n, servers))
    total = sum(weights)
    waiting = sum((n - servers) * weight for n, weight in enumerate(weights) if n > servers) / total
    return waiting / arrivals, sum(weights[servers:]) / total


def mmc(arrivals, service, servers, count, seed=0):
    """An M/M/c queue: arrival, start and end of each customer."""
    dice = random.Random(seed)
    free, now, found = [0.0] * servers, 0.0, []
    for _ in range(count):
        now += dice.expovariate(arrivals)
        start = max(now, heapq.heappop(free))
        end = start + dice.expovariate(1 / service)
        heapq.heappush(free, end)
        found.append((now, start, end))
    return found


def window(courses, *, slots, samples=(), seconds=None):
    """A trace of requests on one engine that waited in the gateway; samples: (at, processing)."""
    ids = [f"{i + 1:016x}" for i in range(len(courses))]
    times = np.array(courses).reshape(-1, 3)
    requests = {
        "span_id": ids,
        "trace_id": [f"{i + 1:032x}" for i in range(len(courses))],
        "request_id": ids,
        "model": ["m"] * len(courses),
        "status": [200] * len(courses),
        "arrived_unix_nano": START_UNIX_NANO + np.rint(times[:, 0] * 1e9).astype(np.int64),
        "total_s": times[:, 2] - times[:, 0],
    }
    attempts = {
        "request_span_id": ids,
        "span_id": [f"{i + 1:015x}f" for i in range(len(courses))],
        "engine": ["e"] * len(courses),
        "asked_s": np.zeros(len(courses)),
        "sent_s": times[:, 1] - times[:, 0],
        "ended_s": times[:, 2] - times[:, 0],
        "outcome": ["ok"] * len(courses),
    }
    servers = {
        "at_unix_nano": [START_UNIX_NANO + round(at * 1e9) for at, _ in samples],
        "engine": ["e"] * len(samples),
        "model": ["m"] * len(samples),
        "slots_total": [slots] * len(samples),
        "processing": [float(number) for _, number in samples],
        "deferred": [0.0] * len(samples),
    }
    tables = {"requests": pa.table(requests), "attempts": pa.table(attempts)}
    if samples:
        tables["servers"] = pa.table(servers)
    end = None if seconds is None else START_UNIX_NANO + round(seconds * 1e9)
    return build_trace(tables, ENGINE, start_unix_nano=START_UNIX_NANO, end_unix_nano=end)


def row_of(answer, name="engines", at=0):
    return answer.tables[name].to_dict("records")[at]


def in_service(courses, at):
    return sum(start <= at < end for _, start, end in courses)


# --- formulas


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (2, 1.2), (4, 3.1), (16, 12.0), (64, 60.0)])
def test_erlang_s_formula_equals_the_solved_chain(servers, load):
    service = 0.7
    wait, share = solved_chain(load / service, service, servers)
    assert waiting_probability(load, servers) == pytest.approx(share, rel=1e-6)
    assert expected_wait(load / service, service, servers) == pytest.approx(wait, rel=1e-6)


def test_one_and_two_servers_wait_as_their_closed_forms_say():
    assert expected_wait(0.6, 1.0, 1) == pytest.approx(0.6 / (1 - 0.6))
    rho = 0.75
    assert expected_wait(2 * rho, 1.0, 2) == pytest.approx(rho**2 / (1 - rho**2))


def test_what_cannot_be_served_waits_forever_and_what_is_not_known_is_not_told():
    assert expected_wait(4.0, 1.0, 4) == math.inf
    assert waiting_probability(9.0, 4) == 1.0
    assert math.isnan(expected_wait(math.nan, 1.0, 4))
    assert math.isnan(knee(1.0, 0))
    assert expected_wait(100.0, 1.0, 2000) == pytest.approx(0.0)


@pytest.mark.parametrize("servers", [1, 2, 3, 4, 8, 200])
def test_at_the_knee_waits_double_the_latency_or_four_fifths_of_slots_are_held(servers):
    at = knee(0.5, servers)
    utilization = at * 0.5 / servers
    if servers <= 3:
        assert expected_wait(at, 0.5, servers) == pytest.approx(0.5, rel=1e-6)
        assert utilization < KNEE_UTILIZATION
    else:
        assert utilization == pytest.approx(KNEE_UTILIZATION)
        assert expected_wait(at, 0.5, servers) <= 0.5


@pytest.mark.parametrize("arrivals", [0.1, 3.0, 27.0, 400.0])
def test_advised_slots_are_the_fewest_that_leave_the_headroom(arrivals):
    slots = slots_for(arrivals, 0.8, 0.3)
    assert knee(0.8, slots) / arrivals - 1 >= 0.3 - 1e-6
    assert slots == 1 or knee(0.8, slots - 1) / arrivals - 1 < 0.3


# --- tables


@pytest.mark.parametrize(("servers", "load"), [(1, 0.6), (4, 3.2)])
def test_a_simulated_queue_waits_as_long_as_expected(servers, load):
    courses = mmc(load, 1.0, servers, 24_000, seed=servers)
    row = row_of(queueing.analyze(window(courses, slots=servers, samples=[(0.0, 0)])))
    waits = np.array([start - arrived for arrived, start, _ in courses])
    means = waits.reshape(24, -1).mean(axis=1)
    error = 4 * means.std(ddof=1) / math.sqrt(len(means))
    assert row["wait_s"] == pytest.approx(waits.mean())
    assert row["slots"] == servers
    assert abs(row["expected_wait_s"] - row["wait_s"]) < error
    assert row["utilization"] == pytest.approx(load / servers, rel=0.05)


def test_occupancy_and_little_s_law_equal_a_count_by_hand():
    courses = mmc(3.0, 1.0, 4, 600, seed=5)
    length = 150.0
    samples = [(float(at), in_service(courses, at) + at % 2) for at in range(150)]
    row = row_of(queueing.analyze(window(courses, slots=4, samples=samples, seconds=length)))
    known = [each for each in courses if each[2] < length]
    held = sum(max(min(end, length) - max(start, 0), 0) for _, start, end in known)
    assert row["utilization"] == pytest.approx(held / (4 * length))
    assert row["arrivals_per_s"] == pytest.approx(sum(start < length for _, start, _ in known) / length)
    stays = sorted(end - start for _, start, end in known)
    last = math.floor(length - np.quantile(stays, 0.99))
    told = sum((samples[i][1] + samples[i + 1][1]) / 2 for i in range(last)) / last
    counted = sum(max(min(end, last) - max(start, 0), 0) for _, start, end in known) / last
    assert row["in_system"] == pytest.approx(told)
    assert row["little_in_system"] == pytest.approx(counted)
    assert row["little_error"] == pytest.approx((told - counted) / max(told, counted))
    assert row["samples"] == last + 1


def test_a_queue_that_is_counted_in_full_agrees_with_its_samples_to_the_request():
    courses = mmc(3.0, 1.0, 4, 900, seed=8)
    samples = [(at + 0.5, in_service(courses, at + 0.5)) for at in range(200)]
    trace = window(courses, slots=4, samples=samples, seconds=200)
    counted = in_system(trace, read_held(trace))
    assert counted.told[0] == counted.counted[0] > 0
    assert queueing.judge(queueing.analyze(trace)) == []


def test_engines_that_idle_at_the_end_are_not_mixed_up():
    tables = fleet_rows(Plan(seed=2, seconds=40))
    cut = START_UNIX_NANO + 15 * 10**9
    tables["requests"] = tables["requests"].filter(pc.less(tables["requests"]["arrived_unix_nano"], cut))
    late = pc.greater(tables["servers"]["at_unix_nano"], cut + 8 * 10**9)
    place = tables["servers"].column_names.index("processing")
    told = pc.if_else(late, 0.0, tables["servers"]["processing"])
    tables["servers"] = tables["servers"].set_column(place, "processing", told)
    trace = build_trace(tables, ENGINE, start_unix_nano=START_UNIX_NANO, end_unix_nano=START_UNIX_NANO + 40 * 10**9)
    table = queueing.analyze(trace).tables["engines"]
    for code, row in enumerate(table.to_dict("records")):
        mine = trace.attempts[trace.attempts["engine"] == code]
        assert row["little_in_system"] * row["known_s"] == pytest.approx((mine["ended_s"] - mine["sent_s"]).sum())


def test_requests_still_in_hand_count_as_arrived_once():
    tables = fleet_rows(Plan(seed=4, seconds=40, overload=3.0))
    whole = row_of(queueing.analyze(build_trace(tables, ENGINE)), "models")
    end = START_UNIX_NANO + 30 * 10**9
    cut = build_trace(tables, ENGINE, start_unix_nano=START_UNIX_NANO, end_unix_nano=end)
    told = row_of(queueing.analyze(cut), "models")
    arrived = pc.sum(pc.less(tables["requests"]["arrived_unix_nano"], end)).as_py() / 30
    assert len(cut.requests) / 30 < 0.92 * arrived
    assert told["arrivals_per_s"] == pytest.approx(arrived, rel=0.04)  # the last sample is a second old
    assert whole["requests"] == tables["requests"].num_rows
    assert whole["rejected"] == pc.sum(pc.equal(tables["requests"]["status"], 429)).as_py() > 0


def test_capacity_that_is_read_from_a_quiet_fleet_is_near_what_a_full_one_serves():
    quiet = row_of(queueing.analyze(build_trace(fleet_rows(Plan(seed=6, seconds=90)), ENGINE)), "models")
    full = build_trace(fleet_rows(Plan(seed=6, seconds=90, overload=4.0)), ENGINE)
    served = full.requests[full.requests["status"] == 200]
    rate = ((served["ended_s"] > 10) & (served["ended_s"] < 85)).sum() / 75
    loaded = row_of(queueing.analyze(full), "models")
    assert loaded["served_per_s"] <= loaded["capacity_per_s"] == pytest.approx(rate, rel=0.2)
    assert quiet["utilization"] < 0.5
    assert rate < quiet["capacity_per_s"] < 1.4 * rate
    assert quiet["headroom_ratio"] == pytest.approx(quiet["knee_per_s"] / quiet["busiest_per_s"] - 1)


def test_an_engine_that_joined_late_is_measured_while_it_was_there():
    tables = fleet_rows(Plan(seed=1, seconds=60, engines=2, rate=6.0))
    late, cut = tables["servers"], START_UNIX_NANO + 30 * 10**9
    is_early = pc.and_(pc.equal(late["engine"], "engine-1"), pc.less(late["at_unix_nano"], cut))
    early = pc.less(tables["requests"]["arrived_unix_nano"], cut)
    gone = tables["requests"].filter(early)["span_id"].combine_chunks()
    one = pc.and_(
        pc.equal(tables["attempts"]["engine"], "engine-1"), pc.is_in(tables["attempts"]["request_span_id"], gone)
    )
    tables["attempts"] = tables["attempts"].filter(pc.invert(one))
    tables["servers"] = late.filter(pc.invert(is_early))
    trace = build_trace(tables, ENGINE)
    row = row_of(queueing.analyze(trace), at=1)
    mine = trace.attempts[trace.attempts["engine"] == trace.names.engine.index("engine-1")]
    held = (mine["ended_s"] - mine["headers_s"]).sum()
    assert row["utilization"] == pytest.approx(held / (4 * 30), rel=0.05)
    assert row["arrivals_per_s"] == pytest.approx(len(mine) / 30, rel=0.05)


@pytest.mark.parametrize(("arrivals", "slots"), [(145.0, 16), (560.0, 60)])
def test_what_a_fleet_serves_without_long_waits_is_below_no_knee(arrivals, slots):
    courses = mmc(arrivals, 0.1, slots, 4000, seed=3)
    row = row_of(queueing.analyze(window(courses, slots=slots, samples=[(0.0, 0)])), "models")
    assert knee(0.1, slots) < arrivals
    assert row["knee_per_s"] >= arrivals * 0.95
    assert row["capacity_per_s"] >= row["knee_per_s"] > row["served_per_s"] * 0.99


def test_what_is_served_after_long_waits_is_capacity_and_no_knee():
    courses = mmc(80.0, 0.1, 4, 3000, seed=3)
    row = row_of(queueing.analyze(window(courses, slots=4, samples=[(0.0, 0)])), "models")
    assert row["capacity_per_s"] >= row["served_per_s"] == pytest.approx(40, rel=0.1)
    assert row["knee_per_s"] < 36


@pytest.mark.parametrize("begin_s", [0.0, 1700.0, 3500.0])
def test_a_busy_minute_of_an_idle_hour_is_found(begin_s):
    idle = [(float(at), at + 0.0, at + 0.1) for at in range(0, 3600, 60)]
    busy = [tuple(begin_s + at for at in each) for each in mmc(60.0, 0.1, 4, 1200, seed=4)]
    answer = queueing.analyze(window(sorted(idle + busy), slots=4, samples=[(0.0, 0)], seconds=3600.0))
    row = row_of(answer, "models")
    assert row["utilization"] < 0.05
    assert row["arrivals_per_s"] < row["knee_per_s"]
    assert row["busiest_per_s"] == pytest.approx(60, rel=0.15)
    assert START_UNIX_NANO / 1e9 + begin_s - 1 < row["busiest_unix_nano"] / 1e9 < START_UNIX_NANO / 1e9 + begin_s + 20
    assert row["headroom_ratio"] < -0.3
    assert [each.kind for each in queueing.judge(answer)] == ["saturation"]


def test_slots_of_the_busiest_time_are_those_that_were_there_then():
    tables = fleet_rows(Plan(seed=5, seconds=40, engines=2))
    end = START_UNIX_NANO + 400 * 10**9
    trace = build_trace(tables, ENGINE, start_unix_nano=START_UNIX_NANO - 100 * 10**9, end_unix_nano=end)
    row = row_of(queueing.analyze(trace), "models")
    assert row["slots"] == 8
    assert 0 < (row["busiest_unix_nano"] - START_UNIX_NANO) / 1e9 < 40


def evenly(number, until_s, took_s=0.1, from_s=0.0):
    """Requests that come one after the other and do not wait."""
    step = (until_s - from_s) / number
    return [(from_s + i * step, from_s + i * step, from_s + i * step + took_s) for i in range(number)]


@pytest.mark.parametrize("number", [1, 12, 30])
def test_of_few_requests_no_busiest_time_and_no_headroom_is_told(number):
    burst = evenly(number, 1812.0, took_s=2.0, from_s=1800.0)
    answer = queueing.analyze(window(burst, slots=1, samples=[(0.0, 0)], seconds=3600.0))
    row = row_of(answer, "models")
    assert row["requests"] == number
    assert row["arrivals_per_s"] == pytest.approx(number / 3600)
    assert row["knee_per_s"] > number / 3600
    of_slots = ("lasting_slots", "lasting_service_s", "lasting_capacity_per_s", "lasting_knee_per_s")
    untold = [name for name in row if name.startswith(("busiest_", "headroom_", "lasting_")) and name not in of_slots]
    assert len(untold) == 15
    assert all(math.isnan(row[name]) for name in untold)
    assert queueing.judge(answer) == []


def test_a_burst_is_not_diluted_by_the_silence_around_it():
    dice = random.Random(5)
    at = sorted([dice.uniform(0.0, 53.0) for _ in range(30)] + [dice.uniform(20.0, 21.3) for _ in range(75)])
    waits = [0.05 * (20.0 <= t <= 21.3) for t in at]
    courses = [(t, t + wait, t + wait + 0.17) for t, wait in zip(at, waits, strict=True)]
    answer = queueing.analyze(window(courses, slots=8, samples=[(0.0, 0)], seconds=60.0))
    row = row_of(answer, "models")
    assert row["busiest_wait_s"] == pytest.approx(0.05, rel=1e-6)
    assert row["lasting_wait_s"] < 0.04
    assert row["busiest_per_s"] == pytest.approx(75 / 1.3, rel=0.15)
    assert 1.0 <= row["busiest_s"] <= 1.4
    assert 20.0 <= (row["busiest_unix_nano"] - START_UNIX_NANO) / 1e9 <= 20.4
    assert row["busiest_low_per_s"] < 75 / 1.3 < row["busiest_high_per_s"] < 2 * row["busiest_low_per_s"]
    assert row["headroom_ratio"] == pytest.approx(row["knee_per_s"] / row["busiest_per_s"] - 1)
    ends = [row["knee_per_s"] / row[f"busiest_{end}_per_s"] - 1 for end in ("high", "low")]
    assert [row["headroom_low_ratio"], row["headroom_high_ratio"]] == pytest.approx(ends)  # all took the same time
    assert row["lasting_per_s"] < 3
    assert queueing.judge(answer) == []


def test_no_engine_is_advised_for_a_burst_of_a_second_however_long_it_waits():
    burst = [tuple(30.0 + at for at in each) for each in mmc(250.0, 0.1, 4, 200, seed=3)]
    answer = queueing.analyze(window(sorted(evenly(60, 60.0) + burst), slots=4, samples=[(0.0, 0)], seconds=60.0))
    row = row_of(answer, "models")
    assert row["headroom_high_ratio"] < -0.7
    assert row["wait_s"] * row["waited"] > 200
    assert row["lasting_per_s"] < row["lasting_knee_per_s"] == row["knee_per_s"]
    assert queueing.judge(answer) == []


def test_a_headroom_s_range_is_wider_where_service_times_differ():
    even, uneven = [], []
    for number, (at, _, _) in enumerate(evenly(400, 200.0)):
        even.append((at, at, at + 1.0))
        uneven.append((at, at, at + (3.7 if number % 4 == 0 else 0.1)))
    ranges = []
    for courses in (even, uneven):
        row = row_of(queueing.analyze(window(courses, slots=8, samples=[(0.0, 0)])), "models")
        ranges.append(((1 + row["headroom_high_ratio"]) / (1 + row["headroom_low_ratio"])) ** 0.5 - 1)
    arrivals = math.log1p(ranges[0])
    spread = 1.96 * 2.7 * math.sqrt(1 / 4 * 3 / 4) * 3.6 / 2.7 / 20  # of a mean of 400, relative to it
    assert arrivals == pytest.approx(1.96 / 20, rel=0.05)
    assert math.log1p(ranges[1]) == pytest.approx(math.hypot(arrivals, spread), rel=0.05)


@pytest.mark.parametrize(("slots", "is_told"), [(4, True), (40, False), (2000, True)])
def test_a_clump_whose_rate_is_not_sure_is_told_where_it_is_clear_which_side_of_the_knee_it_is_on(slots, is_told):
    courses = sorted(
        evenly(200, 3600.0, took_s=1.0) + [(1800.0 + i / 100, 1800.0 + i / 100, 1801.0 + i / 100) for i in range(30)]
    )
    row = row_of(queueing.analyze(window(courses, slots=slots, samples=[(0.0, 0)], seconds=3600.0)), "models")
    assert math.isfinite(row["headroom_ratio"]) == math.isfinite(row["busiest_per_s"]) == is_told
    if is_told:
        assert row["busiest_high_per_s"] > 2.5 * row["busiest_low_per_s"]
        assert row["headroom_low_ratio"] > 0 or row["headroom_high_ratio"] < 0


def test_few_rows_of_a_model_that_refuses_many_are_past_the_knee_for_certain():
    served = mmc(0.6, 1.0, 1, 60, seed=2)
    trace = window(served, slots=1, samples=[(0.0, 0)], seconds=110.0)
    refusals = trace.engine.frame(
        {
            "model": np.zeros(2, np.int64),
            "gateway": np.zeros(2, np.int64),
            "at_s": np.array([0.0, 100.0]),
            "rejected": np.array([0.0, 600.0]),
            "waiting": np.zeros(2),
            "running": np.zeros(2),
        }
    )
    answer = queueing.analyze(replace(trace, queues=refusals))
    row = row_of(answer, "models")
    assert row["requests"] == 660
    assert row["headroom_ratio"] < 0
    assert [each.kind for each in queueing.judge(answer)] == ["saturation"]


@pytest.mark.parametrize("busy_s", [2.0, 5.0, 9.0])
def test_a_burst_that_the_window_ends_in_is_found(busy_s):
    idle, burst = evenly(60, 3590.0), evenly(300, 3600.0, took_s=0.001, from_s=3600.0 - busy_s)
    row = row_of(queueing.analyze(window(sorted(idle + burst), slots=4, samples=[(0.0, 0)], seconds=3600.0)), "models")
    assert row["busiest_per_s"] == pytest.approx(300 / busy_s, rel=0.02)
    assert busy_s / 1.2 <= row["busiest_s"] <= busy_s
    assert 0 <= row["busiest_unix_nano"] / 1e9 - START_UNIX_NANO / 1e9 - (3600 - busy_s) <= busy_s / 5
    assert row["lasting_per_s"] == pytest.approx(30, rel=0.02)
    assert row["lasting_s"] == pytest.approx(10)
    assert row["lasting_unix_nano"] == START_UNIX_NANO + 3590 * 10**9


# --- findings


def test_waits_count_by_what_service_takes():
    fast, slow = (
        queueing.analyze(window(mmc(1.15 * 4 / service, service, 4, 600, seed=7), slots=4, samples=[(0.0, 0)]))
        for service in (0.025, 2.5)
    )
    (finding,), (same,) = queueing.judge(fast), queueing.judge(slow)
    assert row_of(fast, "models")["wait_p95_s"] < 1.0
    assert finding.kind == same.kind == "saturation"
    assert same.impact_s == pytest.approx(100 * finding.impact_s, rel=0.2)


@pytest.mark.parametrize("overload", [2.0, 3.0])
def test_a_fleet_past_its_knee_is_told_how_many_engines_it_needs(overload):
    answer = queueing.analyze(build_trace(fleet_rows(Plan(seed=2, seconds=90, overload=overload)), ENGINE))
    (finding,) = queueing.judge(answer)
    row = row_of(answer, "models")
    assert (finding.kind, finding.subject) == ("saturation", "tiny")
    assert row["headroom_ratio"] < 0
    slots = finding.figures["slots_needed"]
    assert knee(row["service_s"], int(slots)) >= 1.3 * row["lasting_per_s"] * (1 - 1e-6)
    assert f"--engines {math.ceil(slots / 4)}`" in finding.advice
    assert finding.impact_s == pytest.approx(row["wait_s"] * (row["requests"] - row["rejected"]), rel=0.05)
    assert 1 <= len(finding.evidence) <= 5


def test_refused_requests_of_unknown_model_count_as_the_only_ones_and_never_as_waiting():
    tables = fleet_rows(Plan(seed=2, seconds=90, overload=3.2))
    requests = tables["requests"]
    names = pc.if_else(pc.equal(requests["status"], 429), "", pc.cast(requests["model"], "string"))
    unnamed = requests.set_column(requests.column_names.index("model"), "model", names)
    want, found = (queueing.analyze(build_trace(tables | {"requests": each}, ENGINE)) for each in (requests, unnamed))
    (row,), (same,) = (answer.tables["models"].to_dict("records") for answer in (want, found))
    assert row == same
    assert row["requests"] == requests.num_rows == row["waited"] + row["rejected"]


def test_saturation_is_judged_by_what_lasts():
    answer = queueing.analyze(window(mmc(23.0, 0.2, 4, 600, seed=7), slots=4, samples=[(0.0, 0)]))
    models = answer.tables["models"]
    untold = dict.fromkeys([name for name in models if name.startswith(("busiest_", "headroom_"))], math.nan)
    bare = Answer(answer.tables | {"models": models.assign(**untold)})
    assert queueing.judge(bare) == queueing.judge(answer) != []


def test_what_saturation_costs_is_never_less_than_nothing():
    answer = queueing.analyze(build_trace(fleet_rows(Plan(seed=2, seconds=90, overload=3.2)), ENGINE))
    models = answer.tables["models"]
    many = Answer(answer.tables | {"models": models.assign(rejected=models["requests"] * 9)})
    (finding,), (alike,) = queueing.judge(answer), queueing.judge(many)
    assert finding.impact_s == alike.impact_s > 0
    assert ("waiting", "slots") in finding.explains
    none = Answer(answer.tables | {"models": models.assign(wait_s=0.0)})
    assert [each.impact_s for each in queueing.judge(none)] == [0.0]


@pytest.mark.parametrize("seed", range(8))
def test_a_fleet_with_room_gives_no_alarm(seed):
    answer = queueing.analyze(build_trace(fleet_rows(Plan(seed=seed, seconds=45)), ENGINE))
    assert queueing.judge(answer) == []
    assert row_of(answer, "models")["headroom_ratio"] > 0.3


def test_requests_that_telemetry_does_not_know_are_missed():
    tables = fleet_rows(Plan(seed=3, seconds=180))
    on_two = tables["attempts"].filter(pc.equal(tables["attempts"]["engine"], "engine-2"))["request_span_id"]
    lost = on_two.take(pa.array(range(0, len(on_two), 3)))
    tables["requests"] = tables["requests"].filter(
        pc.invert(pc.is_in(tables["requests"]["span_id"], lost.combine_chunks()))
    )
    (finding,) = queueing.judge(queueing.analyze(build_trace(tables, ENGINE)))
    assert (finding.kind, finding.subject) == ("little", "engine-2")
    assert finding.figures["little_error"] == pytest.approx(1 / 3, abs=0.1)
    assert finding.impact_s == 0


@pytest.mark.parametrize("ahead_s", [-30, -8, 0, 30])
def test_clocks_that_differ_make_no_requests_missing(ahead_s):
    tables = fleet_rows(Plan(seed=3, seconds=180))
    arrived = tables["requests"]["arrived_unix_nano"].to_numpy() - START_UNIX_NANO
    waves = (arrived / 40e9).astype(int) % 2 == 0  # load comes and goes: what is shifted does not fit
    tables["requests"] = tables["requests"].filter(pa.array(waves))
    servers, place = tables["servers"], tables["servers"].column_names.index("processing")
    trace = build_trace(tables, ENGINE)
    at, engine = servers["at_unix_nano"].to_numpy(), servers["engine"].to_pylist()
    held = {
        name: trace.attempts[trace.attempts["engine"] == code][["sent_s", "ended_s"]].to_numpy()
        for code, name in enumerate(trace.names.engine)
    }
    moments = (at - trace.start_unix_nano) / 1e9
    told = [
        float(((held[name][:, 0] <= now) & (held[name][:, 1] > now)).sum())
        for name, now in zip(engine, moments, strict=True)
    ]
    tables["servers"] = servers.set_column(place, "processing", pa.array(told))
    tables["servers"] = tables["servers"].set_column(
        tables["servers"].column_names.index("at_unix_nano"), "at_unix_nano", pa.array(at + ahead_s * 10**9)
    )
    answer = queueing.analyze(build_trace(tables, ENGINE))
    assert {each.kind for each in queueing.judge(answer)} <= {"saturation"}
    assert all(row["missing_ratio"] <= queueing.LITTLE_ERROR for row in answer.tables["engines"].to_dict("records"))


# --- little to go by


def test_an_empty_window_has_empty_tables():
    answer = queueing.analyze(build_trace({}, ENGINE))
    assert {name: len(table) for name, table in answer.tables.items()} == {"engines": 0, "models": 0}
    assert {"engine", "slots", "little_error", "expected_wait_s"} <= set(answer.tables["engines"].columns)
    assert {"model", "knee_per_s", "headroom_ratio", "rejected"} <= set(answer.tables["models"].columns)
    assert queueing.judge(answer) == []


def test_one_request_without_samples_says_nothing():
    answer = queueing.analyze(window([(0.0, 0.1, 1.0)], slots=1))
    row = row_of(answer)
    assert math.isnan(row["in_system"])
    assert row["service_s"] == pytest.approx(0.9)
    assert queueing.judge(answer) == []


def test_requests_that_never_got_an_engine_belong_to_their_model_alone():
    tables = fleet_rows(Plan(seed=3, seconds=20))
    nowhere = pa.array([""] * tables["attempts"].num_rows)
    names = tables["attempts"].column_names
    tables["attempts"] = tables["attempts"].set_column(names.index("engine"), "engine", nowhere)
    answer = queueing.analyze(build_trace(tables, ENGINE))
    assert set(answer.tables["engines"]["attempts"]) == {0}
    row = row_of(answer, "models")
    assert row["requests"] == tables["requests"].num_rows
    assert math.isfinite(row["busiest_per_s"])
    assert math.isnan(row["headroom_ratio"])
    assert queueing.judge(answer) == []
