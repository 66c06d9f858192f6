"""What prompts share, against plain loops over their bytes; and when an operator hears that it was computed again."""

from __future__ import annotations

import itertools

import pytest
from prompts_made import TOKEN_S, Told, id_of, random_fleet, shared_bytes, trace_of

from lltm_ray.analytics import conversations, prefix
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.prefix import analyze, build_trie, families, judge, reuse
from lltm_ray.analytics.turns import SLACK_TOKENS, turns
from tests.fleet_rows import Plan, fleet_rows


def done_s(told: Told) -> float:
    return told.at_s + min((told.tokens - told.cached) * TOKEN_S, told.ended_s - told.at_s)


def reusable_of(told: list[Told]) -> list[tuple[int, bool]]:
    """Tokens, and whether the request's own engine had had them all."""
    found = []
    for new in told:
        before = [old for old in told if old.engine and old.model == new.model and done_s(old) < new.at_s - 1e-9]
        size = max((shared_bytes(old, new) for old in before if new.engine), default=0)
        here = any(old.engine == new.engine and shared_bytes(old, new) >= size for old in before)
        found.append((max(min(size * new.tokens // max(len(new.prompt), 1), new.tokens - 1), 0), here))
    return found


@pytest.mark.parametrize("seed", range(25))
def test_reusable_and_wasted_tokens_are_those_that_a_plain_loop_finds(seed):
    told = random_fleet(seed)
    trace = trace_of(told)
    found, lost = reuse(trace, build_trie(trace)), turns(trace)["lost"].tolist()
    wanted = reusable_of(told)
    assert found["reusable"].tolist() == [tokens for tokens, _ in wanted]
    for each, moved, (tokens, here), row in zip(told, lost, wanted, found.itertuples(), strict=True):
        wasted = max(tokens - each.cached, 0)
        wasted -= min(wasted, moved)
        assert row.wasted == (wasted if wasted > SLACK_TOKENS else 0)
        assert row.is_forgotten == (here and row.wasted > 0)
    assert sum(found["reusable"] > 0) > 10


@pytest.mark.parametrize("seed", range(25))
def test_families_are_the_beginnings_at_which_conversations_part(seed):
    told = random_fleet(seed)
    trace = trace_of(told)
    trie = build_trie(trace)
    found = reuse(trace, trie)
    family, above = families(trace, trie, found)
    sharing: dict[tuple[str, bytes], set[int]] = {}
    below: dict[tuple[str, bytes], set[tuple[str, bytes]]] = {}
    for each, label in zip(told, found["conversation"].tolist(), strict=True):
        nodes = [(each.model, one) for one in each.hashes] if each.engine else []
        for one, longer in zip(nodes, [*nodes[1:], None], strict=False):
            sharing.setdefault(one, set()).add(label)
            below.setdefault(one, set()).update([longer] if longer else [])
    wanted = {
        one
        for one, who in sharing.items()
        if len(who) > 1 and all(len(sharing[each]) < len(who) for each in below[one])
    }
    assert len(wanted) == int((above > -2).sum()) > 0
    named = [f"{int(value) % 2**64:016x}" for value in trie.hash]
    for r, each in enumerate(told):
        mine = [one.hex() for one in each.hashes if each.engine and (each.model, one) in wanted]
        assert (named[family[r]] if family[r] >= 0 else None) == (mine[-1] if mine else None)
        for shorter, longer in itertools.pairwise(mine):
            nodes = [n for n in range(len(named)) if named[n] == longer and above[n] > -2]
            assert shorter in {named[above[n]] for n in nodes}


def singles(count: int, engines: int, *, cached: int, system: bytes = bytes(2048)) -> list[Told]:
    """Requests that share a system prompt of 512 tokens and nothing else, two seconds apart."""
    prompts = [system + number.to_bytes(4, "big") * 75 for number in range(count)]
    return [
        Told(prompt=prompt, at_s=2.0 * at, engine=f"engine-{at % engines}", cached=cached if at >= engines else 0)
        for at, prompt in enumerate(prompts)
    ]


def test_a_system_prompt_that_is_computed_again_and_again_is_told_with_its_family():
    told = singles(60, 3, cached=0)
    answer = analyze(trace_of(told))
    (finding,) = judge(answer)
    (family,) = answer.tables["families"].itertuples()
    assert finding.kind == "wasted prefill"
    assert finding.subject == f"prefix {family.family}" == f"prefix {told[0].hashes[7].hex()[:8]}"
    assert (family.requests, family.depth_tokens, family.engines) == (60, 512, 3)
    assert family.wasted_tokens == family.reusable_tokens == 59 * 512
    assert finding.impact_s == pytest.approx(59 * 512 * TOKEN_S)
    assert "engine.cache_ram_mib" in finding.advice
    assert len(finding.evidence) == 5
    assert set(finding.evidence) <= {id_of(at) for at in range(1, 60)}
    assert conversations.judge(conversations.analyze(trace_of(told))) == []


def test_a_prompt_that_every_engine_computes_once_is_no_waste_worth_telling():
    answer = analyze(trace_of(singles(60, 3, cached=512)))
    assert answer.figures["wasted_tokens"] == 2 * 512
    assert answer.tables["families"]["best_engine"].tolist() == ["engine-0"]
    assert judge(answer) == []


@pytest.mark.parametrize(("policy", "words"), [("round-robin", "gateway.policy"), ("residency", "Fewer engines")])
def test_prompts_that_only_other_engines_have_are_a_matter_of_routing(policy, words):
    told = []
    for number in range(20):
        pair = singles(2, 2, cached=0, system=bytes([number]) * 2048)
        told += [Told(prompt=each.prompt, at_s=20.0 * number + each.at_s, engine=each.engine) for each in pair]
    for each in told:
        each.policy = policy
    (finding,) = judge(analyze(trace_of(told)))
    assert finding.figures["forgotten_ratio"] == 0
    assert words in finding.advice


def test_turns_that_stay_and_find_nothing_are_wasted_prefill_and_no_affinity():
    told = [
        Told(prompt=bytes([talk]) * 2000 * turn, at_s=100.0 * turn + 3 * talk, name=f"c{talk}")
        for turn in (1, 2, 3)
        for talk in range(12)
    ]
    answer = analyze(trace_of(told))
    (finding,) = judge(answer)
    assert (finding.subject, finding.figures["requests"]) == ("later turns", 24)
    assert "engine.n_parallel" in finding.advice
    assert conversations.judge(conversations.analyze(trace_of(told))) == []


def test_links_go_from_a_shared_prompt_to_those_that_go_on_from_it():
    base = bytes(1024)
    told = [
        Told(prompt=base + bytes([1 + at % 2]) * 1024 + at.to_bytes(4, "big") * 100, at_s=float(at)) for at in range(8)
    ]
    told += [Told(prompt=base + bytes([9]) * 300, at_s=9.0)]
    (first, second) = analyze(trace_of(told)).tables["links"].itertuples()
    root, longer = told[0].hashes[3].hex()[:8], {told[at].hashes[7].hex()[:8] for at in (0, 1)}
    assert {first.parent, second.parent} == {root}
    assert {first.child, second.child} == longer
    assert (first.requests, second.requests) == (4, 4)


def test_models_share_nothing_and_two_requests_at_once_cannot_share():
    told = singles(30, 1, cached=0)
    for at, each in enumerate(told):
        each.model = f"model-{at}"
    assert analyze(trace_of(told)).figures["reusable_tokens"] == 0
    together = [Told(prompt=each.prompt, at_s=at / 1e4) for at, each in enumerate(singles(30, 1, cached=0))]
    assert analyze(trace_of(together)).figures["reusable_tokens"] == 0


def test_families_add_up_to_what_the_fleet_did():
    told = random_fleet(3, 120)
    answer = analyze(trace_of(told))
    table, wasted = answer.tables["families"], answer.tables["wasted"]
    assert wasted["wasted_tokens"].sum() == answer.figures["wasted_tokens"]
    assert wasted["reusable_tokens"].sum() == answer.figures["reusable_tokens"] >= table["reusable_tokens"].sum() > 0
    assert table["requests"].sum() <= len(told)
    assert answer.figures["reused_ratio"] == pytest.approx(
        sum(each.cached for each in told if each.engine) / sum(each.tokens for each in told if each.engine)
    )


@pytest.mark.parametrize("seed", range(3))
def test_engines_that_forget_shared_prompts_are_found_and_it_is_no_affinity(seed):
    trace = build_trace(fleet_rows(Plan(seed=seed, spread_prefix=True)), choose_engine("pandas"))
    finding = judge(analyze(trace))[0]
    assert (finding.kind, finding.subject[:7]) == ("wasted prefill", "prefix ")
    assert finding.figures["forgotten_ratio"] > 0.9
    assert conversations.judge(conversations.analyze(trace)) == []


@pytest.mark.parametrize(
    "told", [[], [Told(prompt=b"x" * 600, at_s=0.0)], [Told(prompt=b"x" * 600, at_s=0.0, engine="")]]
)
def test_next_to_no_requests_give_tables_with_their_columns_and_no_finding(told):
    answer = prefix.analyze(trace_of(told))
    names = "family depth_tokens requests prompt_tokens shared_tokens cached_tokens reusable_tokens wasted_tokens"
    assert {*names.split(), "wasted_s", "best_engine", "engines", "evidence"} <= set(answer.tables["families"].columns)
    assert {"parent", "child", "requests"} <= set(answer.tables["links"].columns)
    assert judge(answer) == []
