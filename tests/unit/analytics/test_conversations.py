"""Turns of conversations, against a plain loop; moves and what they cost; and when an operator hears of it."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest
from prompts_made import TOKEN_S, Told, id_of, random_fleet, trace_of

from lltm_ray.analytics import conversations, prefix
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.turns import LEAST_STAYED, MOST_BRANCHES, SLACK_TOKENS, turns
from tests.fleet_rows import Plan, fleet_rows


def previous_of(told: list[Told]) -> list[int]:
    """As `turns` defines it, by looking at all pairs."""
    usable = [each.engine != "" and each.tokens > 0 for each in told]
    found = []
    for b, new in enumerate(told):
        fit = [
            a for a, old in enumerate(told) if a != b and usable[a] and usable[b] and goes_on(old, new, told, usable)
        ]
        found.append(max(fit, key=lambda a: (len(told[a].hashes), told[a].ended_s), default=-1))
    fans = Counter(found)
    return [a if a < 0 or told[a].name or fans[a] <= MOST_BRANCHES else -1 for a in found]


def goes_on(old: Told, new: Told, told: list[Told], usable: list[bool]) -> bool:
    if (old.model, old.tenant, old.name) != (new.model, new.tenant, new.name) or old.ended_s > new.at_s:
        return False
    if new.hashes[: len(old.hashes)] != old.hashes:
        return False
    return bool(new.name) or (bool(old.hashes) and is_line(old, told, usable))


def is_line(old: Told, told: list[Told], usable: list[bool]) -> bool:
    """Those that end in the same block, in the order of their ends."""
    same = [
        each
        for each, is_usable in zip(told, usable, strict=True)
        if is_usable and (each.model, each.tenant, each.name) == (old.model, old.tenant, old.name)
        if each.hashes and each.hashes[-1] == old.hashes[-1]
    ]
    same.sort(key=lambda each: each.ended_s)
    pairs = itertools.pairwise(same)
    return all(b.at_s >= a.ended_s and len(b.prompt) > len(a.prompt) for a, b in pairs)


def lost_of(told: list[Told], previous: list[int]) -> list[float]:
    moved = [a >= 0 and told[a].engine != each.engine for a, each in zip(previous, told, strict=True)]
    expected = []
    for a, each in zip(previous, told, strict=True):
        old = told[a]
        left = old.tokens + (old.generated if each.tokens > old.tokens + old.generated else 0)
        expected.append(max(min(left, each.tokens - 1), 0) if a >= 0 else 0)
    stayed = [
        min(each.cached / want, 1)
        for each, want, a, is_moved in zip(told, expected, previous, moved, strict=True)
        if a >= 0 and want and not is_moved
    ]
    kept = median(stayed) if len(stayed) >= LEAST_STAYED else 1.0
    lost = [int(want * kept) - each.cached for each, want in zip(told, expected, strict=True)]
    return [each if is_moved and each > SLACK_TOKENS else 0 for each, is_moved in zip(lost, moved, strict=True)]


@pytest.mark.parametrize("seed", range(25))
def test_turns_and_what_they_lost_are_those_that_a_plain_loop_finds(seed):
    told = random_fleet(seed, named=(0.0, 0.5, 1.0)[seed % 3])
    found = turns(trace_of(told))
    previous = previous_of(told)
    assert found["previous"].tolist() == previous
    assert found["lost"].tolist() == lost_of(told, previous)
    assert found["r"].tolist() == list(range(len(told)))


def test_random_fleets_have_turns_of_both_sorts_and_some_that_moved():
    found = [(told, turns(trace_of(told))) for told in (random_fleet(seed) for seed in range(10))]
    named = sum(bool(told[r].name) for told, each in found for r in each[each["previous"] >= 0]["r"])
    every = sum(int((each["previous"] >= 0).sum()) for _, each in found)
    assert named > 50
    assert every - named > 30
    assert sum(int((each["lost"] > 0).sum()) for _, each in found) > 50


def test_a_conversation_is_one_whether_it_has_a_name_or_not():
    told = [Told(prompt=bytes([talk]) * 1000 * turn, at_s=10 * turn + talk) for turn in (1, 2, 3) for talk in range(4)]
    for each in told[::4]:
        each.name = "mine"
    labels = turns(trace_of(told))["conversation"].tolist()
    assert [labels[at::4] == [labels[at]] * 3 for at in range(4)] == [True] * 4
    assert len(set(labels)) == 4


def test_single_requests_that_share_a_system_prompt_are_no_conversation():
    system = bytes(2048)
    told = [Told(prompt=system + bytes([n]) * (20 + n * 7 % 50), at_s=float(n)) for n in range(1, 30)]
    told += [Told(prompt=system + bytes([n]) * 700, at_s=float(n)) for n in range(31, 60)]
    assert (turns(trace_of(told))["previous"] == -1).all()


def dialogue(engines: list[str], *, cached: bool, count: int = 12, busy: str = "") -> list[Told]:
    """`count` conversations of as many turns as there are engines, one after the other on these."""
    told = []
    for turn, engine in enumerate(engines):
        for talk in range(count):
            prompt = bytes([talk]) * 2000 * (turn + 1)
            have = (2000 * turn // 4) if turn and (cached or engines[turn - 1] == engine) else 0
            told.append(Told(prompt=prompt, at_s=100.0 * turn + 3 * talk, engine=engine, cached=have, name=f"c{talk}"))
            if busy:
                told.append(Told(prompt=b"", at_s=100.0 * turn + 3 * talk - 1, engine=busy, took_s=2.0))
    told += [Told(prompt=b"", at_s=1000.0, engine=engine) for engine in set(engines)]
    return sorted(told, key=lambda each: each.at_s)


def test_turns_that_move_without_need_are_told_with_tokens_seconds_and_evidence():
    told = dialogue(["engine-0", "engine-1", "engine-0"], cached=False)
    answer = conversations.analyze(trace_of(told))
    (finding,) = conversations.judge(answer)
    assert finding.kind == "affinity"
    lost = 12 * (500 + 20) + 12 * (1000 + 20)
    assert answer.figures["lost_tokens"] == finding.figures["needless_lost_tokens"] == lost
    assert finding.impact_s == pytest.approx(lost * TOKEN_S)
    assert "24 of 24 later turns" in finding.text
    assert "X-Session-ID" not in finding.advice
    moves = answer.tables["moves"]
    pairs = zip(moves["from_engine"], moves["to_engine"], moves["turns"], strict=True)
    assert sorted(pairs) == [("engine-0", "engine-1", 12), ("engine-1", "engine-0", 12)]
    table = answer.tables["conversations"]
    assert set(table["conversation"]) == {f"c{n}" for n in range(12)}
    assert (table["turns"].tolist(), table["moves"].tolist()) == ([3] * 12, [2] * 12)
    assert len(finding.evidence) == 5
    assert set(finding.evidence) <= {id_of(r) for r, each in enumerate(told) if each.name and each.at_s >= 200}


@pytest.mark.parametrize(
    ("policy", "name", "words"), [("random", "x", "gateway.policy"), ("residency", "", "X-Session")]
)
def test_the_advice_is_what_is_not_done_yet(policy, name, words):
    told = dialogue(["engine-0", "engine-1", "engine-0"], cached=False)
    told = [replace(each, policy=policy, name=each.name and name and each.name) for each in told]
    (finding,) = conversations.judge(conversations.analyze(trace_of(told)))
    assert words in finding.advice


def test_moves_that_lose_nothing_are_silent():
    answer = conversations.analyze(trace_of(dialogue(["engine-0", "engine-1", "engine-0"], cached=True)))
    assert answer.figures["moves"] == 24
    assert answer.figures["lost_tokens"] <= 24 * 20
    assert conversations.judge(answer) == []


def test_a_move_away_from_a_busier_engine_is_counted_and_not_judged():
    told = dialogue(["engine-0", "engine-1"], cached=False, busy="engine-0")
    answer = conversations.analyze(trace_of(told))
    assert (answer.figures["costly_moves"], answer.figures["needless_moves"]) == (12, 0)
    assert conversations.judge(answer) == []


def test_a_move_away_from_an_engine_that_serves_no_more_is_no_fault():
    told = [each for each in dialogue(["engine-0", "engine-1"], cached=False) if each.at_s < 1000]
    answer = conversations.analyze(trace_of(told))
    assert (answer.figures["costly_moves"], answer.figures["needless_moves"]) == (12, 0)


def test_what_a_moved_turn_lost_is_not_told_again_as_wasted_prefill():
    trace = trace_of(dialogue(["engine-0", "engine-1", "engine-0"], cached=False))
    assert [each.kind for each in conversations.judge(conversations.analyze(trace))] == ["affinity"]
    told = prefix.analyze(trace)
    assert told.figures["wasted_tokens"] == 0
    assert told.figures["reusable_tokens"] > 10_000
    assert prefix.judge(told) == []


def test_another_slot_of_the_same_engine_is_counted_and_is_no_move():
    told = dialogue(["engine-0", "engine-0"], cached=True)
    for at, each in enumerate(told):
        each.slot = at % 5
    figures = conversations.analyze(trace_of(told)).figures
    assert figures["slot_moves"] > 5
    assert figures["moves"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_clean_fleet_gives_no_alarm(seed):
    trace = build_trace(fleet_rows(Plan(seed=seed, seconds=90)), choose_engine("pandas"))
    answer, other = conversations.analyze(trace), prefix.analyze(trace)
    assert answer.figures["turns"] > 300
    assert conversations.judge(answer) + prefix.judge(other) == []


@pytest.mark.parametrize("seed", range(3))
def test_turns_scattered_over_engines_are_found_and_are_affinity_only(seed):
    trace = build_trace(fleet_rows(Plan(seed=seed, scatter=True)), choose_engine("pandas"))
    (finding,) = conversations.judge(conversations.analyze(trace))
    assert finding.kind == "affinity"
    assert "gateway.policy" in finding.advice
    assert prefix.judge(prefix.analyze(trace)) == []


@pytest.mark.parametrize(
    "told", [[], [Told(prompt=b"x" * 600, at_s=0.0)], [Told(prompt=b"x" * 600, at_s=0.0, engine="")]]
)
def test_next_to_no_requests_give_tables_with_their_columns_and_no_finding(told):
    answer = conversations.analyze(trace_of(told))
    names = {"conversation", "turns", "moves", "lost_tokens", "lost_s", "evidence"}
    assert names <= set(answer.tables["conversations"].columns)
    assert {"from_engine", "to_engine", "turns", "lost_tokens", "lost_s"} <= set(answer.tables["moves"].columns)
    assert conversations.judge(answer) == []
