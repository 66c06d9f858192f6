"""GPUs: integrals and joules against sums by hand, and throttling that is found exactly where it costs something."""

from __future__ import annotations

import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from lltm_ray.analytics import hardware
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.readings import GAP_S, POINTS, THROTTLES, Readings
from lltm_ray.analytics.report import make_report
from lltm_ray.analytics.text import to_text
from tests.fleet_rows import START_UNIX_NANO, Plan, fleet_rows, many_spans

ENGINE = choose_engine("pandas")


def window(readings, *, attempts=(), engines=(("e", "g"),), seconds=101.0):
    """A trace of GPU readings and of attempts: engine, slot begins, first token, end, generated; engine -> its GPUs."""
    gpus = pa.Table.from_pylist(
        [each | {"at_unix_nano": START_UNIX_NANO + round(each["at"] * 1e9), "node": "n"} for each in readings]
    )
    ids = [f"{i + 1:016x}" for i in range(len(attempts))]
    slots = [each[1] for each in attempts]
    requests = {
        "span_id": ids,
        "trace_id": [each * 2 for each in ids],
        "route": ["/v1/completions"] * len(ids),
        "arrived_unix_nano": [START_UNIX_NANO + round(at * 1e9) for at in slots],
        "total_s": [each[3] - each[1] for each in attempts],
    }
    rows = {
        "request_span_id": ids,
        "engine": [each[0] for each in attempts],
        **{name: [0.0] * len(ids) for name in ("asked_s", "sent_s", "headers_s")},
        "first_s": [each[2] - each[1] for each in attempts],
        "ended_s": [each[3] - each[1] for each in attempts],
        "generated_tokens": [each[4] for each in attempts],
        "outcome": ["ok"] * len(ids),
    }
    servers = [{"engine": name, "gpu_uuids": gpus, "at_unix_nano": START_UNIX_NANO} for name, gpus in engines]
    tables = {"gpus": gpus} | ({"servers": pa.Table.from_pylist(servers)} if servers else {})
    if ids:
        tables |= {"requests": pa.table(requests), "attempts": pa.table(rows)}
    end = START_UNIX_NANO + round(seconds * 1e9)
    return build_trace(tables, ENGINE, start_unix_nano=START_UNIX_NANO, end_unix_nano=end)


def readings_of(gpu="g", count=101, **meters):
    """A reading a second; meters: a value, or a function of the second."""
    return [
        {"uuid": gpu, "at": float(at)} | {name: each(at) if callable(each) else each for name, each in meters.items()}
        for at in range(count)
    ]


def gpus_of(trace):
    return {row["gpu"]: row for row in hardware.analyze(trace).tables["gpus"].to_dict("records")}


def replaced(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


# --- integrals


@pytest.mark.parametrize("seed", range(5))
def test_integrals_equal_a_walk_over_all_pairs_of_readings(seed):
    dice = random.Random(seed)
    rows, known = [], {}
    for gpu in ("a", "b", "c"):
        at = dice.uniform(0, 5)
        while at < 90:
            value = None if dice.random() < 0.2 else dice.random()
            rows.append({"uuid": gpu, "at": at, "utilization_ratio": value})
            known.setdefault(gpu, []).append((at, math.nan if value is None else value))
            at += dice.choice([0.5, 1.0, 3.0, GAP_S + 1])
    dice.shuffle(rows)
    readings = Readings(window(rows, engines=()))
    over = [(dice.randrange(3), *sorted(dice.uniform(-5, 110) for _ in range(2))) for _ in range(200)]
    group, start, end = (np.array(each) for each in zip(*over, strict=True))
    area, looked = readings.within(readings.meter("utilization"), (group, start, end))

    def walk(gpu, start, end):
        pairs = zip(known["abc"[gpu]], known["abc"[gpu]][1:], strict=False)
        parts = [(max(min(t, end) - max(s, start), 0), (x + y) / 2) for (s, x), (t, y) in pairs if t - s <= GAP_S]
        parts = [(length, mean) for length, mean in parts if not math.isnan(mean)]
        return sum(length * mean for length, mean in parts), sum(length for length, _ in parts)

    expected = np.array([walk(*each) for each in over])
    assert area == pytest.approx(expected[:, 0], abs=1e-8)
    assert looked == pytest.approx(expected[:, 1], abs=1e-8)
    whole, seen = readings.integral(readings.meter("utilization"))
    assert np.stack([whole, seen], axis=1) == pytest.approx(np.array([walk(g, -9, 200) for g in range(3)]), abs=1e-8)


def test_utilization_is_told_for_prefill_and_decode_by_themselves():
    trace = window(
        readings_of(utilization_ratio=lambda at: 0.9 if at <= 20 else 0.3),
        attempts=[("e", 10.0, 20.0, 40.0, 50), ("e", 5.0, 15.0, 20.0, 5)],
    )
    row = gpus_of(trace)["g"]
    assert row["utilization_prefill"] == pytest.approx(0.9)
    ramp = 0.6  # of the second between the two
    assert row["utilization_decode"] == pytest.approx((ramp + 19 * 0.3 + 5 * 0.9) / 25)


# --- joules


def test_joules_are_the_growth_of_the_counter_also_when_it_begins_anew():
    rows = readings_of(energy_j=lambda at: 5000.0 + 100 * at if at < 50 else 100.0 * (at - 50), power_w=1.0)
    row = gpus_of(window(rows, attempts=[("e", 1.0, 2.0, 52.0, 500)]))["g"]
    assert row["joules"] == pytest.approx(49 * 100 + 50 * 100)
    assert row["joules_per_token"] == pytest.approx(row["joules"] / 500)


def test_without_a_counter_joules_are_power_over_time():
    rows = [each for each in readings_of(power_w=lambda at: 100.0 + at) if not 40 < each["at"] < 80]
    row = gpus_of(window(rows, attempts=[("e", 0.0, 1.0, 2.0, 10)]))["g"]
    assert row["joules"] == pytest.approx(sum(100.5 + at for at in (*range(40), *range(80, 100))))


def test_tokens_of_an_engine_on_two_gpus_count_once_and_only_while_they_were_read():
    rows = readings_of("a", count=51, energy_j=lambda at: 10.0 * at) + readings_of("b", energy_j=lambda at: 20.0 * at)
    trace = window(rows, engines=[("e", "a,b"), ("f", "b")], attempts=[("e", 0, 40, 60, 80), ("f", 0, 10, 20, 7)])
    answer = hardware.analyze(trace)
    found = gpus_of(trace)
    assert (found["a"]["generated"], found["b"]["generated"]) == pytest.approx((20, 40 + 7))
    assert (found["a"]["engines"], found["b"]["engines"]) == ("e", "e, f")
    assert answer.figures["joules"] == pytest.approx(500 + 2000)
    assert answer.figures["joules_per_token"] == pytest.approx(2500 / 67)


# --- throttling


def test_seconds_are_told_by_reason_and_idling_or_chosen_clocks_are_none():
    bits = {10: 0x4, 11: 0x4, 12: 0x4 | 0x40, 30: 0x1, 31: 0x2, 32: 0x3, 50: None}
    row = gpus_of(window(readings_of(throttle=lambda at: bits.get(at, 0))))["g"]
    assert row["throttled_s"] == pytest.approx(3)
    assert row["throttled_share"] == pytest.approx(3 / 98)  # two seconds are next to an unknown
    assert row["reasons"] == "power cap 3 s, hardware thermal 1 s"
    assert row["since_unix_nano"] == START_UNIX_NANO + 10 * 10**9
    assert sum(THROTTLES.values()) == 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x100


@pytest.mark.parametrize(("fault_from", "compared"), [(0.7, "itself"), (0.0, "peers")])
def test_a_hot_gpu_is_found_with_what_it_costs(fault_from, compared):
    plan = Plan(seed=3, seconds=120, throttle="GPU-1", factor=1.8, fault_from=fault_from)
    trace = build_trace(fleet_rows(plan), ENGINE)
    answer = hardware.analyze(trace)
    (finding,) = hardware.judge(answer)
    row = gpus_of(trace)["GPU-1"]
    assert (finding.kind, finding.subject) == ("throttling", "GPU-1")
    assert row["compared_with"] == compared
    assert row["slowed_ratio"] == pytest.approx(1.8, abs=0.12)
    assert row["throttled_share"] == pytest.approx(1 - fault_from, abs=0.02)
    hot = trace.attempts[trace.attempts["engine"].isin([2, 3]) & (trace.attempts["sent_s"] > 120 * fault_from)]
    assert finding.impact_s == pytest.approx(hot["decode_s"].sum() * (1 - 1 / 1.8), rel=0.12)
    assert "engine-2, engine-3 decode" in finding.text
    assert "hardware thermal" in finding.text
    assert "nvidia-smi -i GPU-1 -pl" in finding.advice
    assert "`lltm-ray drain engine-2`" in finding.advice
    slow = {trace.trace_ids[int(t)].as_py() for t in trace.requests["trace"][trace.requests["engine"].isin([2, 3])]}
    assert 1 <= len(finding.evidence) <= 5
    assert set(finding.evidence) <= slow


@pytest.mark.parametrize(("bits", "is_found"), [(0x40, True), (0x44, True), (0x4, False)])
def test_a_gpu_that_is_always_at_its_power_cap_is_not_compared_with_others(bits, is_found):
    tables = fleet_rows(Plan(seed=3, seconds=120, throttle="GPU-1", factor=1.8, fault_from=0.0))
    told = [bits if each else 0 for each in tables["gpus"]["throttle"].to_pylist()]
    trace = build_trace(tables | {"gpus": replaced(tables["gpus"], "throttle", told)}, ENGINE)
    assert gpus_of(trace)["GPU-1"]["throttled_share"] == pytest.approx(1, abs=0.02)
    assert math.isnan(gpus_of(trace)["GPU-1"]["slowed_ratio"]) is not is_found
    assert [each.subject for each in hardware.judge(hardware.analyze(trace))] == ["GPU-1"] * is_found


@pytest.mark.parametrize("other", ["NVIDIA Small", ""])
def test_a_gpu_of_another_product_or_of_none_that_is_known_is_no_peer(other):
    tables = fleet_rows(Plan(seed=3, seconds=120, throttle="GPU-1", factor=1.8, fault_from=0.0))
    gpus = tables["gpus"]
    names = [other if uuid == "GPU-1" else "NVIDIA Big" for uuid in gpus["uuid"].to_pylist()]
    trace = build_trace(tables | {"gpus": replaced(gpus, "name", names)}, ENGINE)
    assert math.isnan(gpus_of(trace)["GPU-1"]["slowed_ratio"])
    assert hardware.judge(hardware.analyze(trace)) == []


def test_slots_of_all_engines_of_a_gpu_count_as_busy_beside_a_decode():
    attempts = [("e", 0.0, 10.0, 20.0, 50), ("f", 0.0, 10.0, 20.0, 50), ("f", 15.0, 15.0, 20.0, 50)]
    attempts += [("h", 0.0, 10.0, 20.0, 50)]
    trace = window(readings_of("a") + readings_of("b"), attempts=attempts, engines=[("e", "a"), ("f", "a"), ("h", "b")])
    found = hardware.paces(trace, Readings(trace), hardware.on_gpus(trace))
    assert found["beside"].to_list() == [2, 2, 3, 1]  # 2.5 rounds to 2


def test_stragglers_of_a_throttled_gpu_are_explained_by_it():
    trace = build_trace(fleet_rows(Plan(seed=1, throttle="GPU-1")), ENGINE)
    report = make_report(trace)
    kinds = [each.kind for each in report.findings]
    assert kinds[:3] == ["throttling", "straggler", "straggler"]
    throttling, *rest = report.findings
    assert report.lost_s == pytest.approx(sum(each.impact_s for each in (throttling, *rest[2:])))
    assert "explained by 1" in to_text(report)


def test_throttling_that_slows_nothing_is_no_finding():
    tables = fleet_rows(Plan(seed=3, seconds=120, throttle="GPU-1", factor=1.0))
    row = gpus_of(build_trace(tables, ENGINE))["GPU-1"]
    assert row["throttled_share"] > 0.6
    assert row["slowed_ratio"] == pytest.approx(1.0, abs=0.1)
    assert hardware.judge(hardware.analyze(build_trace(tables, ENGINE))) == []


def test_a_power_cap_that_comes_with_load_is_not_blamed_for_the_load():
    tables = fleet_rows(Plan(seed=3, seconds=120))
    busy = pc.greater(tables["gpus"]["power_w"], 205).to_pylist()
    tables["gpus"] = replaced(tables["gpus"], "throttle", [4 * each for each in busy])
    trace = build_trace(tables, ENGINE)
    assert all(row["throttled_share"] > 0.2 for row in gpus_of(trace).values())
    assert hardware.judge(hardware.analyze(trace)) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_clean_fleet_gives_no_alarm(seed):
    answer = hardware.analyze(build_trace(fleet_rows(Plan(seed=seed, seconds=45)), ENGINE))
    assert len(answer.tables["gpus"]) == 2
    assert hardware.judge(answer) == []


# --- the track


def test_the_track_is_short_and_holds_all_tokens():
    trace = build_trace(fleet_rows(Plan(seed=2, seconds=150)), ENGINE)
    answer = hardware.analyze(trace)
    track, length = answer.tables["track"], trace.length_s / POINTS
    assert track.groupby("gpu").size().max() <= POINTS
    generated = trace.attempts["generated"][trace.attempts["decode_s"].notna()].sum()
    assert track["tokens_per_s"].sum() * length == pytest.approx(generated, rel=0.01)
    mean = trace.gpus.groupby("gpu")["power_w"].mean().to_list()
    assert track.groupby("gpu")["power_w"].mean().to_list() == pytest.approx(mean, rel=0.02)
    assert list(track["at_unix_nano"]) == [trace.start_unix_nano + round(at * 1e9) for at in track["at_s"]]


def test_the_track_joins_the_bits_of_a_point_and_keeps_what_is_not_known():
    bits = {0: 0x4, 1: 0x40, 2: 0x1}
    rows = readings_of("a", throttle=lambda at: bits.get(at, 0)) + readings_of("b")
    track = hardware.analyze(window(rows, seconds=360.0)).tables["track"]
    assert track["throttle"][track["gpu"] == "a"].to_list()[0] == 0x44
    assert set(track["throttle"][track["gpu"] == "b"]) == {-1}
    assert track["power_w"].isna().all()


# --- little to go by


@pytest.mark.parametrize("tables", [{}, fleet_rows(Plan(seconds=5, gpus=0))], ids=["nothing", "no GPU"])
def test_without_gpus_tables_are_empty_and_have_their_columns(tables):
    answer = hardware.analyze(build_trace(tables, ENGINE))
    assert len(answer.tables["gpus"]) == len(answer.tables["track"]) == 0
    assert {"gpu", "joules_per_token", "slowed_ratio", "reasons", "evidence"} <= set(answer.tables["gpus"].columns)
    assert {"at_s", "gpu", "throttle", "tokens_per_s"} <= set(answer.tables["track"].columns)
    assert hardware.judge(answer) == []


def test_gpus_that_tell_nothing_and_serve_nobody_are_listed_without_figures():
    row = gpus_of(window(readings_of("g", count=1), engines=[]))["g"]
    assert (row["joules"], row["generated"], row["engines"]) == (0, 0, "")
    names = ("joules_per_token", "utilization_decode", "throttled_share", "slowed_ratio", "memory_high_bytes")
    assert all(math.isnan(row[name]) for name in names)


def test_a_large_window_makes_a_small_answer():
    answer = hardware.analyze(build_trace(many_spans(30_000), ENGINE))
    assert len(answer.tables["gpus"]) == 8
    assert len(answer.tables["track"]) <= 8 * POINTS
    assert answer.figures["joules_per_token"] > 0
