"""Text behind beginnings that differ, against plain loops over blocks; and when an operator hears of it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from prompts_made import BYTES_A_TOKEN, SALT, TOKEN_S, Told, id_of, random_fleet, trace_of

from lltm_ray._prefix import HASH_BYTES, hash_blocks
from lltm_ray.analytics import prefix, sections
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.sections import alike_pairs, find_sections
from lltm_ray.analytics.shared_text import analyze, block_name, judge
from tests.fleet_rows import many_spans

SYSTEM = random.Random(0).randbytes(8000)


def blocks_of(told: Told) -> list[tuple[int, bytes]]:
    """Start and hash of each."""
    joined, start, found = hash_blocks(told.prompt, SALT), 0, []
    for at in range(0, len(joined), HASH_BYTES):
        block = joined[at : at + HASH_BYTES]
        found.append((start, block))
        start += int.from_bytes(block[6:], "big")
    return found


def lost_of(told: list[Told]) -> list[int]:
    """Of each request: tokens of blocks that somebody had computed, and nobody behind the same beginning."""
    found, blocks = [], [blocks_of(each) for each in told]
    for new, mine in zip(told, blocks, strict=True):
        rows = [
            [block for _, block in theirs]
            for old, theirs in zip(told, blocks, strict=True)
            if old.engine and old.model == new.model and done_s(old) < new.at_s - 1e-9
        ]
        known, lost, token_bytes = {block for row in rows for block in row}, 0, len(new.prompt) / max(new.tokens, 1)
        for place, (start, block) in enumerate(mine):
            chain = [each for _, each in mine[: place + 1]]
            if new.engine and block in known and not any(row[: place + 1] == chain for row in rows):
                end = start + int.from_bytes(block[6:], "big")
                lost += max(int((end - max(start, new.cached * token_bytes)) / token_bytes), 0)
        found.append(lost)
    return found


def done_s(told: Told) -> float:
    return told.at_s + min((told.tokens - told.cached) * TOKEN_S, told.ended_s - told.at_s)


def shuffled_fleet(seed: int) -> list[Told]:
    """As `random_fleet`, with heads of their own before a part of the prompts."""
    dice, told = random.Random(seed), random_fleet(seed)
    for each in told:
        if dice.random() < 0.5:
            each.prompt = dice.randbytes(dice.choice((8, 50, 300))) + each.prompt
            each.cached = min(each.cached, max(each.tokens - 1, 0))
    return told


@pytest.mark.parametrize("seed", range(6))
def test_lost_tokens_are_those_that_a_plain_loop_finds(seed):
    told = shuffled_fleet(seed)
    wanted = sum(lost_of(told))
    assert analyze(trace_of(told)).figures["lost_tokens"] == pytest.approx(wanted, abs=len(told))
    assert wanted > 500


@pytest.mark.parametrize("seed", range(5))
def test_alike_pairs_are_all_pairs_that_a_plain_loop_finds(seed, monkeypatch):
    monkeypatch.setattr(sections, "_TILE", 7)
    dice = np.random.default_rng(seed)
    groups = dice.random((6, 40)) < 0.5
    has = (groups[dice.integers(0, 6, 50)] ^ (dice.random((50, 40)) < 0.04)).astype(np.float32)
    first, second = alike_pairs(np, has)
    sets = [set(np.flatnonzero(row)) for row in has]
    wanted = {
        (a, b)
        for a in range(50)
        for b in range(a + 1, 50)
        if 100 * len(sets[a] & sets[b]) ** 2 >= 81 * len(sets[a]) * len(sets[b])
    }
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == sorted(wanted)
    assert len(wanted) > 10


def stamped(count: int, engines: int = 1, *, system: bytes = SYSTEM, at_end: bool = False) -> list[Told]:
    """Single requests, ten seconds apart, with one system prompt, a date, and a question of their own each."""
    told = []
    for number in range(count):
        date = f"It is {number // 60:02}:{number % 60:02}, said at the {'end' if at_end else 'head'}. ".encode()
        question = random.Random(number).randbytes(400)
        prompt = system + date + question if at_end else date + system + question
        cached = len(system) // BYTES_A_TOKEN if at_end and number >= engines else 0
        told.append(Told(prompt=prompt, at_s=10.0 * number, engine=f"engine-{number % engines}", cached=cached))
    return told


def test_a_date_before_the_system_prompt_is_told_with_what_it_costs_and_what_to_do():
    told = stamped(60)
    trace = trace_of(told)
    answer = analyze(trace)
    (finding,) = judge(answer)
    (text,) = answer.tables["texts"].itertuples()
    assert (finding.kind, finding.subject) == ("uncacheable text", f"text {text.text}")
    assert (text.model, text.requests, text.heads, text.lost_requests) == ("tiny", 60, 60, 59)
    assert 1400 < text.tokens <= 2000
    assert text.head_tokens < 300
    assert text.lost_tokens == pytest.approx(59 * text.tokens, rel=0.01)
    assert finding.impact_s == pytest.approx(text.lost_tokens * TOKEN_S, rel=1e-6)
    assert "60 prompts of tiny hold the same" in finding.text
    assert "60 different beginnings" in finding.text
    assert "to the end of the system prompt" in finding.advice
    assert f"{text.lost_tokens:,.0f} tokens could then be reused" in finding.advice
    assert len(finding.evidence) == 5
    assert set(finding.evidence) <= {id_of(at) for at in range(1, 60)}
    assert prefix.judge(prefix.analyze(trace)) == [], "a trie cannot see it"


def test_the_same_prompts_with_the_date_at_the_end_give_no_finding():
    answer = analyze(trace_of(stamped(60, at_end=True)))
    assert judge(answer) == []
    assert answer.figures["lost_tokens"] == 0


def test_what_an_engine_forgot_behind_an_equal_beginning_is_left_to_prefixes():
    told = stamped(60, at_end=True)
    for each in told:
        each.cached = 0
    assert analyze(trace_of(told)).figures["lost_tokens"] == 0
    assert [each.kind for each in prefix.judge(prefix.analyze(trace_of(told)))] == ["wasted prefill"]


def test_a_document_that_all_ask_about_is_found_beside_their_own_long_texts():
    told = stamped(40)
    for number, each in enumerate(told):
        each.prompt += random.Random(-number).randbytes(40_000)
    (finding,) = judge(analyze(trace_of(told)))
    assert finding.figures["requests"] == 40
    assert 1400 < finding.figures["tokens"] <= 2000


def test_two_texts_of_the_same_prompts_and_of_others_are_told_apart():
    shared = random.Random(7).randbytes(6000)
    told = stamped(80)
    for number, each in enumerate(told):
        each.prompt = each.prompt if number % 2 else shared + each.prompt
    found = judge(analyze(trace_of(told)))
    assert [each.figures["requests"] for each in found] == [80.0]


def test_other_models_and_prompts_that_come_at_once_can_reuse_nothing():
    told = stamped(40)
    for number, each in enumerate(told):
        each.model = f"model-{number}"
    assert analyze(trace_of(told)).figures["lost_tokens"] == 0
    together = [Told(prompt=each.prompt, at_s=at / 1e4) for at, each in enumerate(stamped(40))]
    assert analyze(trace_of(together)).figures["lost_tokens"] == 0


def test_of_too_many_prompts_some_are_compared_and_all_are_counted(monkeypatch):
    whole = judge(analyze(trace_of(stamped(60))))[0]
    monkeypatch.setattr(sections, "MOST_PROMPTS", 16)
    answer = analyze(trace_of(stamped(60)))
    (finding,) = judge(answer)
    assert (answer.figures["compared"], answer.figures["prompts"]) == (16, 60)
    assert "Found in 16 of 60 prompts, counted in all." in finding.text
    assert finding.figures == pytest.approx(whole.figures)


def test_of_prompts_whose_blocks_were_not_told_nothing_is_claimed():
    told = stamped(60)
    for at, each in enumerate(told):
        each.has_blocks = at % 2 == 0
    answer = analyze(trace_of(told))
    (finding,) = judge(answer)
    assert (answer.figures["told"], answer.figures["prompts"]) == (30, 60)
    assert "30 prompts of tiny hold the same" in finding.text
    assert "Found in 30 of 60 prompts, counted in the 30 whose text was hashed." in finding.text


def test_blocks_that_are_left_out_are_counted_and_are_those_with_fewest_bytes(monkeypatch):
    given = made_blocks()
    found = find_sections(*given)
    monkeypatch.setattr(sections, "MOST_BLOCKS", 2)
    fewer = find_sections(*given)
    assert (found.left_out, len(found.key)) == (0, 3)
    assert (fewer.left_out, fewer.size.tolist()) == (1, [300, 200])


def made_blocks():
    """Ten prompts that have three blocks each, and one of their own."""
    trace = trace_of([])
    r, key = np.repeat(np.arange(10), 4), np.tile([1, 2, 3, 0], 10)
    key[3::4] = 100 + np.arange(10)
    size = np.tile([300, 200, 100, 900], 10)
    return trace, trace.engine.frame({"r": r, "key": key, "size": size})


@pytest.mark.parametrize(
    "told", [[], [Told(prompt=b"x" * 600, at_s=0.0)], [Told(prompt=SYSTEM, at_s=0.0, engine="")], stamped(2)]
)
def test_next_to_no_requests_give_a_table_with_its_columns_and_no_finding(told):
    answer = analyze(trace_of(told))
    names = "text model tokens requests heads head_tokens lost_requests lost_tokens lost_s evidence"
    assert set(names.split()) == set(answer.tables["texts"].columns)
    assert judge(answer) == []


def test_a_large_clean_fleet_gives_no_finding():
    answer = analyze(build_trace(many_spans(30_000), choose_engine("pandas")))
    assert answer.figures["compared"] < answer.figures["prompts"]
    assert judge(answer) == []


def test_names_of_blocks_are_the_begin_of_what_rows_tell():
    assert block_name(-1) == "ffffffff"
    assert block_name(0x0123456789ABCDEF) == "01234567"
