"""What routers are told: who has shared beginnings."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pyarrow as pa
import pytest

from lltm_ray._prefix import END_BYTES, HASH_BYTES
from lltm_ray.analytics.hints import MOST_FAMILIES, MOST_HOLDERS, make_hints
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.service import HINTS_VALID, AnalyticsService
from lltm_ray.analytics.trace import Trace
from lltm_ray.config import AnalyticsConfig
from lltm_ray.records import Hints
from tests.fleet_rows import START_UNIX_NANO, Plan, family_hashes, fleet_rows
from tests.unit.analytics.made_rows import PANDAS

WINDOW_S = 60.0


@cache
def rows_of(plan: Plan) -> dict[str, pa.Table]:
    return fleet_rows(plan)


def window(plan: Plan, end_s: float, length_s: float = WINDOW_S, rows: dict[str, pa.Table] | None = None) -> Trace:
    start, end = (START_UNIX_NANO + round(at * 1e9) for at in (end_s - length_s, end_s))
    return build_trace(rows or rows_of(plan), PANDAS, start_unix_nano=start, end_unix_nano=end)


def hints_at(plan: Plan, end_s: float, **more: Any) -> Hints:
    return make_hints(window(plan, end_s, **more), now_unix_nano=7, valid_s=15.0)


def test_nothing_is_told_of_an_empty_window():
    hints = make_hints(build_trace({}, PANDAS), now_unix_nano=7, valid_s=15.0)
    assert not hints
    assert (hints.made_unix_nano, hints.valid_s) == (7, 15.0)


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


def test_the_service_makes_hints_of_its_last_minute():
    plan = Plan(seed=3, seconds=90)
    service = AnalyticsService(AnalyticsConfig(enabled=True, hints=True, hints_every_s=2.0), PANDAS)
    service.add(rows_of(plan))
    now = START_UNIX_NANO + 90 * 10**9
    told = service.hints(now)
    assert told.families
    assert told == make_hints(service.trace(WINDOW_S), now_unix_nano=now, valid_s=HINTS_VALID * 2.0)
    assert not service.hints(now + 200 * 10**9)
