"""Faults planted in a simulated fleet are found and named first of their kind; a clean fleet gives no finding, and
whatever part of a run is looked at, no analysis fails."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import cache
from typing import Any

import pytest

from lltm_ray._prefix import HASH_BYTES
from lltm_ray.analytics.answer import MOST_EVIDENCE, Finding
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.report import Analysis, load_analyses, make_report
from lltm_ray.analytics.shared_text import block_name
from lltm_ray.analytics.trace import Trace
from tests.fleet_rows import FAMILY_TOKENS, START_UNIX_NANO, Plan, family_blocks, family_hashes, fleet_rows

SEEDS = range(2)
CLEAN_SEEDS = range(20)
PLANTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a straggler": ({"straggler": "engine-2"}, "anomalies", "straggler", "engine-2"),
    "a slight straggler": ({"straggler": "engine-0", "factor": 1.5, "gpus": 0}, "anomalies", "straggler", "engine-0"),
    "a throttled GPU": ({"throttle": "GPU-1"}, "GPU and energy", "throttling", "GPU-1"),
    "an aggressor": ({"aggressor": "greedy"}, "interference", "interference", "greedy"),
    "scattered turns": ({"scatter": True}, "conversations", "affinity", "conversations"),
    "a dying engine": ({"cascade": "engine-1"}, "failures", "errors", "engine-1"),
    "too much load": ({"overload": 3.2, "seconds": 90.0}, "critical path", "waiting", "slots"),
    "a full queue": ({"overload": 3.2, "seconds": 90.0}, "failures", "rejections", "tiny"),
}
"""What is planted -> how, the analysis that must tell, and the kind and subject of its finding."""
NO_FAULTS: dict[str, dict[str, Any]] = {
    "long conversations on one engine": {"long_talks": "engine-3", "context_drag": 0.03, "rate": 8.0},
    "the same without a GPU": {"long_talks": "engine-0", "context_drag": 0.03, "rate": 8.0, "gpus": 0},
    "two GPUs, one of them of a slower product": {"lesser": "GPU-1"},
    "four GPUs, one of them of a slower product": {"lesser": "GPU-3", "gpus": 4, "rate": 10.0},
}
MIXED: dict[str, dict[str, Any]] = {
    "all faults": {"straggler": "engine-0", "throttle": "GPU-1", "cascade": "engine-1", "aggressor": "greedy"},
    "too much load": {"overload": 4.0, "scatter": True},
    "all sorts of requests": {"late_share": 0.1, "embeddings": 3.0, "skew_s": 20.0, "spread_prefix": True},
    "one engine": {"engines": 1, "gpus": 0, "rate": 3.0, "straggler": "engine-0", "stamped": True},
}
WINDOWS = ((50, 90), (0, 1), (-20, 3))
"""Begins and ends in seconds of a run of 100."""
EMPTY = ((20, 20), (200, 300), (0, 1e-9))
"""With no requests, or hardly any: what a run was then like makes no difference, but for its GPUs."""


@cache
def trace_of(plan: Plan) -> Trace:
    return build_trace(fleet_rows(plan), choose_engine("pandas"))


def findings_of(plan: Plan, analysis: str = "") -> list[Finding]:
    """Of one analysis, or all of them; the worst first."""
    trace = trace_of(plan)
    wanted = [each for each in load_analyses() if analysis in ("", each.NAME)]
    found = [finding for each in wanted for finding in each.judge(each.analyze(trace))]
    return sorted(found, key=lambda each: -each.impact_s)


def clean_plan(seed: int) -> Plan:
    """Ordinary loads up to about 40 % of the slots, and fleets of several sizes."""
    rate = (5.0, 8.0, 11.0, 14.0)[seed % 4]
    engines = (4, 4, 4, 2, 6)[seed % 5]
    return Plan(seed=seed, rate=rate * engines / 4, engines=engines, noise=(0.03, 0.1)[seed % 2])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_comes_first_of_its_kind(plant: str, seed: int) -> None:
    fields, analysis, kind, subject = PLANTS[plant]
    found = [each.subject for each in findings_of(Plan(seed=seed, **fields), analysis) if each.kind == kind]
    assert found[:1] == [subject], found


@pytest.mark.parametrize("seed", SEEDS)
def test_forgotten_system_prompts_are_found_as_wasted_prefill(seed: int) -> None:
    plan = Plan(seed=seed, spread_prefix=True, rate=9.0)
    costly = family_hashes(_costliest_family(plan))
    found = [each for each in findings_of(plan, "prefixes") if each.kind == "wasted prefill"]
    assert [each.subject.removeprefix("prefix ") for each in found][:1] == [costly[-1][:8]]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stamp_before_the_system_prompt_is_found_as_text_that_no_cache_finds(seed: int) -> None:
    found = [each for each in findings_of(Plan(seed=seed, stamped=True, rate=9.0)) if each.kind == "uncacheable text"]
    names = [{block_name(block) for block in family_blocks(family)} for family in range(6)]
    assert found[0].subject.removeprefix("text ") in names[0]  # the most used one
    assert all(any(each.subject.removeprefix("text ") in own for own in names) for each in found)
    assert found[0].impact_s > 20


def _costliest_family(plan: Plan) -> int:
    """Whose system prompt was computed most, in tokens."""
    rows = fleet_rows(plan)
    cached = dict(zip(*(rows["attempts"][name].to_pylist() for name in ("trace_id", "cached_tokens")), strict=True))
    known = {family_hashes(family)[0]: family for family in range(plan.families)}
    spent: Counter[int] = Counter()
    for trace_id, prefix in zip(*(rows["requests"][name].to_pylist() for name in ("trace_id", "prefix")), strict=True):
        family = known[prefix[:HASH_BYTES].hex()]
        spent[family] += max(FAMILY_TOKENS[family] - cached[trace_id], 0)
    return spent.most_common(1)[0][0]


@pytest.mark.parametrize("seed", CLEAN_SEEDS)
def test_a_clean_fleet_gives_no_finding(seed: int) -> None:
    assert findings_of(clean_plan(seed)) == []


@pytest.mark.parametrize(("seed", "plan"), list(enumerate(NO_FAULTS)))
def test_engines_that_are_slower_for_a_good_reason_are_not_blamed(seed: int, plan: str) -> None:
    assert findings_of(Plan(seed=seed, **NO_FAULTS[plan])) == []


@pytest.mark.parametrize("plan", MIXED)
@pytest.mark.parametrize("analysis", load_analyses(), ids=lambda each: each.NAME)
def test_any_part_of_a_run_can_be_analysed(analysis: Analysis, plan: str) -> None:
    for trace in windows_of(plan):
        for finding in analysis.judge(analysis.analyze(trace)):
            assert 0 <= finding.impact_s < math.inf, finding
            assert set(finding.evidence) <= set(trace.trace_ids.to_pylist()), finding


@cache
def windows_of(plan: str) -> list[Trace]:
    """Of a run, and such that begin and end with a request's arrival or end."""
    rows, engine = fleet_rows(Plan(seconds=100.0, **MIXED[plan])), choose_engine("pandas")
    dice, requests = random.Random(plan), rows["requests"]
    arrived = requests["arrived_unix_nano"].to_pylist()
    ended = [at + round(s * 1e9) for at, s in zip(arrived, requests["total_s"].to_pylist(), strict=True)]
    wanted = WINDOWS + EMPTY * (plan in ("all sorts of requests", "one engine"))
    windows = [tuple(START_UNIX_NANO + round(at * 1e9) for at in each) for each in wanted]
    windows += [tuple(sorted(dice.sample(arrived + ended, 2))) for _ in range(2)]
    return [build_trace(rows, engine, start_unix_nano=start, end_unix_nano=end) for start, end in windows]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_straggler_is_dated_to_its_start(seed: int) -> None:
    plan = Plan(seed=seed, straggler="engine-2")
    answer = next(each for each in load_analyses() if each.NAME == "anomalies").analyze(trace_of(plan))
    engines = answer.tables["engines"]
    row = engines[engines["engine"] == "engine-2"].iloc[0]
    assert row["since_unix_nano"] == pytest.approx(START_UNIX_NANO + 54 * 10**9, abs=10 * 10**9)
    assert row["ratio"] == pytest.approx(1.8, rel=0.12)


def test_findings_of_many_faults_at_once_can_be_read_checked_and_acted_on() -> None:
    many: dict[str, Any] = {"straggler": "engine-0", "throttle": "GPU-1", "cascade": "engine-1", "scatter": True}
    plan = Plan(rate=7.0, aggressor="greedy", aggressor_rate=0.3, **many)
    traces, found = set(trace_of(plan).trace_ids.to_pylist()), findings_of(plan)
    rows = fleet_rows(plan)["requests"]
    ids = dict(zip(rows["trace_id"].to_pylist(), rows["request_id"].to_pylist(), strict=True))
    told = make_report(trace_of(plan)).request_ids
    assert told == {trace: ids[trace] for finding in found for trace in finding.evidence}
    assert {"straggler", "throttling", "interference", "affinity", "errors"} <= {each.kind for each in found}
    for finding in found:
        assert finding.text, finding
        assert finding.advice, finding
        assert 0 < len(finding.evidence) <= MOST_EVIDENCE, finding
        assert set(finding.evidence) <= traces, finding
        assert 0 <= finding.impact_s < math.inf, finding
