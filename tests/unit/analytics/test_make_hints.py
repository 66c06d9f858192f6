"""What routers are told: engines that are slow now, who has shared beginnings, tenants that hold others up."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pyarrow as pa
import pytest

from lltm_ray._prefix import END_BYTES, HASH_BYTES
from lltm_ray.analytics.hints import LEAST_LONG, MOST_FAMILIES, MOST_HOLDERS, make_hints
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.service import HINTS_VALID, AnalyticsService
from lltm_ray.analytics.trace import Trace
from lltm_ray.config import AnalyticsConfig
from lltm_ray.records import Hints
from tests.fleet_rows import START_UNIX_NANO, Plan, family_hashes, fleet_rows
from tests.unit.analytics.made_rows import PANDAS

WINDOW_S = 60.0
NONE = Hints()


@cache
def rows_of(plan: Plan) -> dict[str, pa.Table]:
    return fleet_rows(plan)


def window(plan: Plan, end_s: float, length_s: float = WINDOW_S, rows: dict[str, pa.Table] | None = None) -> Trace:
    start, end = (START_UNIX_NANO + round(at * 1e9) for at in (end_s - length_s, end_s))
    return build_trace(rows or rows_of(plan), PANDAS, start_unix_nano=start, end_unix_nano=end)


def hints_at(plan: Plan, end_s: float, previous: Hints = NONE, **more: Any) -> Hints:
    return make_hints(window(plan, end_s, **more), previous, now_unix_nano=7, valid_s=15.0)


def of_clean(seed: int) -> Plan:
    return Plan(seed=seed, seconds=120, rate=(6.0, 10.0, 14.0)[seed % 3], engines=(4, 6, 3)[seed // 3 % 3])


@pytest.mark.parametrize("seed", range(12))
def test_a_clean_fleet_gives_no_engine_to_spare_and_no_tenant_to_keep_apart(seed):
    for end_s in (60, 90, 120):
        hints = hints_at(of_clean(seed), end_s)
        assert (hints.slow, hints.apart) == ({}, {})


def test_nothing_is_told_of_an_empty_window():
    hints = make_hints(build_trace({}, PANDAS), NONE, now_unix_nano=7, valid_s=15.0)
    assert not hints
    assert (hints.made_unix_nano, hints.valid_s) == (7, 15.0)


# --- engines to spare


@pytest.mark.parametrize("seed", range(3))
def test_a_straggler_is_told_within_half_a_minute_and_nobody_before(seed):
    plan = Plan(seed=seed, seconds=120, fault_from=0.5, straggler="engine-2", factor=2.2)
    assert hints_at(plan, 60).slow == {}
    told = hints_at(plan, 90).slow
    assert set(told) == {"engine-2"}
    assert told["engine-2"] == pytest.approx(2.2, rel=0.15)


def test_a_straggler_is_found_though_its_gateway_reads_every_other_answer_late():
    plan = Plan(seed=1, seconds=120, fault_from=0.2, straggler="engine-1", factor=2.2)
    rows = dict(rows_of(plan))
    attempts = rows["attempts"]
    first, ended = (attempts[name].to_numpy().copy() for name in ("first_s", "ended_s"))
    first[::2] = ended[::2] - 1e-4
    place = attempts.column_names.index("first_s")
    rows["attempts"] = attempts.set_column(place, "first_s", pa.array(first))
    assert set(hints_at(plan, 120, rows=rows).slow) == {"engine-1"}


def test_an_engine_that_is_as_fast_as_its_peers_again_is_let_back_in():
    before = Hints(slow={"engine-2": 2.2})
    assert hints_at(Plan(seed=4, seconds=90), 90, before).slow == {}


def test_what_was_slow_in_the_windows_beginning_only_is_not_told():
    plan, clean = Plan(seed=2, seconds=90, fault_from=0, straggler="engine-2", factor=2.2), Plan(seed=2, seconds=90)
    shift = 40 * 10**9  # the slow part ends where the clean one begins
    parts = []
    for rows, by in ((rows_of(plan), -90 * 10**9 + shift), (rows_of(clean), shift)):
        moved = dict(rows)
        requests = rows["requests"]
        place = requests.column_names.index("arrived_unix_nano")
        at = requests["arrived_unix_nano"].to_numpy() + by
        moved["requests"] = requests.set_column(place, "arrived_unix_nano", pa.array(at))
        for kind, prefix in (("requests", "a"), ("attempts", "a")):
            if by < 0:  # its spans must be others
                for name in ("span_id", "request_span_id"):
                    if name in moved[kind].column_names:
                        ids = [prefix + each[1:] for each in moved[kind][name].to_pylist()]
                        moved[kind] = moved[kind].set_column(moved[kind].column_names.index(name), name, pa.array(ids))
        parts.append(moved)
    joined = {kind: pa.concat_tables([each[kind] for each in parts]) for kind in ("requests", "attempts")}
    assert set(hints_at(plan, 39, rows=joined).slow) == {"engine-2"}
    assert hints_at(plan, 75, rows=joined, previous=Hints(slow={"engine-2": 2.2})).slow == {}
    assert hints_at(plan, 75, rows=joined).slow == {}


def test_an_engine_that_is_a_little_slow_stays_where_it_was():
    plan = Plan(seed=3, seconds=90, fault_from=0, straggler="engine-0", factor=1.35)
    assert hints_at(plan, 90).slow == {}
    assert set(hints_at(plan, 90, Hints(slow={"engine-0": 2.0})).slow) == {"engine-0"}


@pytest.mark.parametrize(("last", "is_spared"), [(0, False), (2, False), (5, True)])
def test_a_spared_engine_is_let_back_in_when_too_little_is_known_of_it(last, is_spared):
    plan = Plan(seed=3, seconds=90, fault_from=0, straggler="engine-0", factor=2.2)
    rows = dict(rows_of(plan))
    ended = {
        each["span_id"]: each["arrived_unix_nano"] / 1e9 + each["total_s"] for each in rows["requests"].to_pylist()
    }
    tries = rows["attempts"].to_pylist()
    own = [each for each in tries if each["engine"] == "engine-0" and each["generated_tokens"] >= 30]
    own = [each for each in own if ended[each["request_span_id"]] < START_UNIX_NANO / 1e9 + 90]
    own.sort(key=lambda each: ended[each["request_span_id"]])
    kept = {each["span_id"] for each in own[len(own) - last :]}
    keep = [each["engine"] != "engine-0" or each["span_id"] in kept for each in tries]
    rows["attempts"] = rows["attempts"].filter(pa.array(keep))
    assert ("engine-0" in hints_at(plan, 90, Hints(slow={"engine-0": 2.0}), rows=rows).slow) == is_spared


@pytest.mark.parametrize(("engines", "most"), [(2, 0), (4, 1), (6, 2)])
def test_at_most_a_third_of_the_engines_is_spared(engines, most):
    plan = Plan(seed=1, seconds=90, fault_from=0, throttle="GPU-1", factor=2.5, engines=engines, rate=3.0 * engines)
    everyone = {f"engine-{i}": 2.0 for i in range(engines)}
    assert len(hints_at(plan, 90).slow) <= most
    assert len(hints_at(plan, 90, Hints(slow=everyone)).slow) <= most


# --- beginnings


def held(plan: Plan, end_s: float, length_s: float) -> dict[tuple[int, bytes], dict[str, int]]:
    """Beginning -> engine -> tokens of it, request by request."""
    rows = rows_of(plan)
    start, end = (START_UNIX_NANO + round(at * 1e9) for at in (end_s - length_s, end_s))
    last = {each["request_span_id"]: each for each in rows["attempts"].to_pylist()}
    found: defaultdict[tuple[int, bytes], dict[str, int]] = defaultdict(dict)
    for each in rows["requests"].to_pylist():
        ended, served = each["arrived_unix_nano"] + round(each["total_s"] * 1e9), last[each["span_id"]]
        prompt = served["cached_tokens"] + served["computed_tokens"]
        if not (start <= ended < end and prompt):
            continue
        hashes = each["prefix"]
        for depth in range(len(hashes) // HASH_BYTES):
            key = END_BYTES[depth], hashes[depth * HASH_BYTES : (depth + 1) * HASH_BYTES]
            tokens = END_BYTES[depth] * prompt // each["prompt_bytes"]
            found[key][served["engine"]] = min(tokens, found[key].get(served["engine"], tokens))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_families_name_the_engines_that_computed_them_and_how_many_tokens(seed):
    plan = Plan(seed=seed, seconds=60, engines=8, rate=5.0, families=12)
    families = hints_at(plan, 60, length_s=20.0).families
    known = held(plan, 60, 20.0)
    assert 3 <= len(families) <= MOST_FAMILIES
    assert any(len(family.engines) < 8 for family in families)
    for family in families:
        assert dict(family.engines) == known[family.end_bytes, family.hash]
        assert len(family.engines) <= MOST_HOLDERS


def test_the_families_are_the_shared_system_prompts_with_the_dearest_first():
    plan = Plan(seed=5, seconds=60, families=4)
    families = hints_at(plan, 60).families
    systems = {each for number in range(4) for each in family_hashes(number)}
    assert {family.hash.hex() for family in families} <= systems
    uses = {"": 0.0}
    for each in rows_of(plan)["requests"].to_pylist():
        for family in families:
            uses.setdefault(family.hash.hex(), 0.0)
            uses[family.hash.hex()] += family.end_bytes * (family.hash in each["prefix"])
    told = [uses[family.hash.hex()] for family in families]
    assert told == sorted(told, reverse=True)


def with_two_models(rows: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """What engine-2 and engine-3 served was of another model."""
    requests, tries = rows["requests"], rows["attempts"]
    served = dict(zip(tries["request_span_id"].to_pylist(), tries["engine"].to_pylist(), strict=True))
    models = ["b" if served[each] in ("engine-2", "engine-3") else "a" for each in requests["span_id"].to_pylist()]
    requests = requests.set_column(requests.column_names.index("model"), "model", pa.array(models))
    return {"requests": requests, "attempts": tries}


def test_a_text_that_begins_the_prompts_of_two_models_is_one_family():
    plan = Plan(seed=5, seconds=60, families=1, engines=4)
    rows = dict(rows_of(plan))
    served = {each["request_span_id"]: each["engine"] for each in rows["attempts"].to_pylist()}
    models = [
        "b" if served[each] in ("engine-2", "engine-3") else "a" for each in rows["requests"]["span_id"].to_pylist()
    ]
    place = rows["requests"].column_names.index("model")
    rows["requests"] = rows["requests"].set_column(place, "model", pa.array(models))
    families = hints_at(plan, 60, rows=rows).families
    assert len({(family.end_bytes, family.hash) for family in families}) == len(families)
    assert {name for family in families for name, _ in family.engines} == {f"engine-{i}" for i in range(4)}


# --- tenants to keep apart


@pytest.mark.parametrize("seed", range(3))
def test_an_aggressor_is_kept_to_the_engine_that_runs_most_of_its_prompts(seed):
    plan = Plan(seed=seed, seconds=120, fault_from=0, aggressor="greedy", aggressor_rate=0.8)
    apart = hints_at(plan, 120).apart
    assert set(apart) == {"greedy"}
    assert len(apart["greedy"]) == 1
    trace = window(plan, 120)
    mine = trace.attempts.merge(trace.requests[["r", "tenant"]], on="r")
    mine = mine[mine["tenant"] == trace.names.tenant.index("greedy")]
    counts = mine["engine"].value_counts()
    assert counts[trace.names.engine.index(apart["greedy"][0])] == counts.max()


def test_a_tenant_stays_where_it_is_kept_as_long_as_it_sends_long_prompts():
    plan = Plan(seed=6, seconds=90, fault_from=0, aggressor="greedy", aggressor_rate=0.1)
    trace = window(plan, 90)
    assert len(trace.requests[trace.requests["tenant"] == trace.names.tenant.index("greedy")]) >= LEAST_LONG
    assert hints_at(plan, 90).apart == {}
    assert hints_at(plan, 90, Hints(apart={"greedy": ("engine-3",)})).apart == {"greedy": ("engine-3",)}
    assert hints_at(Plan(seed=1, seconds=90), 90, Hints(apart={"greedy": ("engine-3",)})).apart == {}


def test_a_tenant_is_kept_to_engines_of_the_models_that_it_uses_alone():
    plan = Plan(seed=1, seconds=90, fault_from=0, aggressor="greedy", aggressor_rate=0.5)
    rows = with_two_models(rows_of(plan))
    is_b = dict(zip(rows["requests"]["span_id"].to_pylist(), rows["requests"]["model"].to_pylist(), strict=True))
    tenant = rows["requests"]["tenant"].to_pylist()
    is_mine = [not (who == "greedy" and is_b[span] == "b") for who, span in zip(tenant, is_b, strict=True)]
    rows["requests"] = rows["requests"].filter(pa.array(is_mine))
    before = Hints(apart={"greedy": ("engine-3",)})
    assert set(hints_at(plan, 90, before, rows=rows).apart["greedy"]) <= {"engine-0", "engine-1"}


# --- the service


def test_the_service_makes_hints_of_its_last_minute_and_remembers_them():
    plan = Plan(seed=3, seconds=90, fault_from=0, straggler="engine-0", factor=1.35)
    service = AnalyticsService(AnalyticsConfig(enabled=True, hints=True, hints_every_s=2.0), PANDAS)
    service.add(rows_of(plan))
    now = START_UNIX_NANO + 90 * 10**9
    told = service.hints(now)
    assert (told.made_unix_nano, told.valid_s) == (now, HINTS_VALID * 2.0)
    assert told == hints_of(service, now)
    assert not service.hints(now + 200 * 10**9)


def hints_of(service: AnalyticsService, now: int) -> Hints:
    return make_hints(service.trace(WINDOW_S), NONE, now_unix_nano=now, valid_s=HINTS_VALID * 2.0)
