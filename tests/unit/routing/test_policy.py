import heapq
import random
import subprocess
import sys
from collections import Counter
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError
from lltm_ray.records import Timings
from lltm_ray.routing.policy import POLICIES, Ask, EngineView, estimate, make_policy
from lltm_ray.routing.rates import Rates
from lltm_ray.routing.table import Table


def view(name: str, busy: int = 0, total: int = 4, *, last_used: int = 0, **more) -> EngineView:
    return EngineView(name, "m", total, busy, last_used, **more)


def ask(prompt_tokens: int = 1000, **more) -> Ask:
    return Ask(model="m", prompt_tokens=prompt_tokens, **more)


def taught(engines="abcd", service_s: float = 4.0) -> Rates:
    """Rates of a fleet: 1,000 prompt tokens a second, 20 ms a token, 1 ms more for each further slot."""
    rates = Rates()
    for turn in range(40):
        for name in engines:
            busy = turn % 4 + 1
            token_ms = 19 + busy
            timings = Timings(prompt_n=1000, prompt_ms=1010, predicted_n=101, predicted_ms=100 * token_ms)
            rates.learn(name, timings, busy=busy, held_s=service_s)
    return rates


every_policy = pytest.mark.parametrize("name", POLICIES)

# --- what holds for all


@every_policy
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 9), st.booleans()), max_size=9),
    banned=st.frozensets(st.integers(0, 8)),
    matched=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 900)), max_size=8, unique_by=lambda each: each[0]),
    affinity=st.sampled_from(["", "s1", "s2"]),
)
def test_a_choice_has_a_free_slot_and_excluded_engines_come_only_when_nobody_else_has(
    name, rows, banned, matched, affinity
):
    views = [view(str(i), *row[:2], last_used=row[2], is_suspect=row[3]) for i, row in enumerate(rows)]
    free = {row.name for row in views if row.busy < row.slots_total and not row.is_suspect}
    exclude = frozenset(map(str, banned))
    asked = ask(key=b"k", affinity=affinity, exclude=exclude)
    policy = make_policy(name)
    choices = [policy.choose(asked, Table(views), Rates(), [(str(i), n) for i, n in matched]) for _ in range(2)]
    assert choices[0] == choices[1]
    if not free:
        assert choices[0] is None
        return
    assert choices[0].engine in (free - exclude or free)
    assert choices[0].considered[0].engine == choices[0].engine
    assert len(choices[0].considered) <= 8


@every_policy
def test_a_pinned_request_goes_nowhere_else_even_if_that_engine_is_to_be_avoided(name):
    table, policy = Table([view("a", 3), view("b")]), make_policy(name)
    assert policy.choose(ask(only="a"), table, Rates(), (), {"a"}).engine == "a"
    table.claim("a")
    assert policy.choose(ask(only="a"), table, Rates()) is None
    assert policy.choose(ask(only="ghost"), table, Rates()) is None
    table.suspect("b", is_suspect=True)
    assert policy.choose(ask(only="b"), table, Rates()) is None


@every_policy
def test_engines_without_the_adapter_are_no_candidates(name):
    policy, wanted = make_policy(name), ask(key=b"k", adapter="lora")
    rows = [view("a"), view("b", 3, adapters=frozenset({"lora"})), view("c")]
    table = Table(rows)
    assert policy.choose(wanted, table, Rates(), [("a", 900)]).engine == "b"
    table.claim("b")
    assert policy.choose(wanted, table, Rates(), [("a", 900)]) is None
    table.remove("b")
    assert policy.choose(wanted, table, Rates(), [("a", 900)]) is None


@every_policy
def test_every_choice_can_be_told_to_people(name):
    table = Table([view("a", 1), view("b", 4)])
    why = make_policy(name).choose(ask(2040, key=b"k"), table, Rates(), [("a", 1912)]).why
    assert "1,912 of 2,040 prompt tokens cached; 1 of 4 slots busy" in why
    assert "\n" not in why


def test_unknown_policies_and_options_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="residency, least-loaded, round-robin, consistent-hash, prefix-hash"):
        make_policy("magic")
    with pytest.raises(ConfigError, match="bound, key_bytes"):
        make_policy("prefix-hash", bounds=2)
    with pytest.raises(ConfigError, match="none"):
        make_policy("round-robin", bound=2)
    with pytest.raises(ConfigError, match="must be from 1"):
        make_policy("consistent-hash", bound=0.5)


# --- least loaded, round robin


def test_least_loaded_takes_the_smallest_share_and_among_equals_the_one_used_longest_ago():
    policy = make_policy("least-loaded")
    assert policy.choose(ask(), Table([view("small", 1, 2), view("large", 3, 8)]), Rates()).engine == "large"
    equals = [view("a", last_used=5), view("b", last_used=3), view("c", last_used=4)]
    assert policy.choose(ask(), Table(equals), Rates()).engine == "b"


def test_round_robin_visits_all_in_turn_and_passes_over_the_full():
    table, policy = Table([view("a"), view("b", 4), view("c"), view("d")]), make_policy("round-robin")
    seen = ""
    for _ in range(6):
        choice = policy.choose(ask(), table, Rates())
        policy.placed(ask(), choice.engine)
        seen += choice.engine
    assert seen == "acdacd"


def test_round_robin_finds_the_one_free_engine_of_many():
    table = Table([view(f"e{i:03}", 4 if i != 150 else 0) for i in range(300)])
    assert make_policy("round-robin").choose(ask(), table, Rates()).engine == "e150"


# --- residency


def test_a_cached_prompt_beats_an_idle_engine():
    table = Table([view("a", 2, decoding=2), view("b")])
    choice = make_policy("residency").choose(ask(2000, max_tokens=100), table, taught(), [("a", 1900)])
    assert (choice.engine, choice.cached_tokens, choice.uncached_tokens) == ("a", 1900, 100)
    assert choice.expected_s < choice.considered[1].expected_s


def test_a_few_cached_tokens_do_not_beat_an_idle_engine():
    table = Table([view("a", 3, decoding=3), view("b")])
    assert make_policy("residency").choose(ask(2000), table, taught(), [("a", 50)]).engine == "b"


def test_among_equals_the_one_used_longest_ago_wins_then_the_name():
    policy = make_policy("residency")
    assert policy.choose(ask(), Table([view("a", last_used=2), view("b", last_used=1)]), taught()).engine == "b"
    assert policy.choose(ask(), Table([view("b"), view("a")]), taught()).engine == "a"


def test_a_long_prompt_keeps_away_from_those_who_decode():
    table = Table([view("a", 1, decoding=1), view("b", 1, prefilling_tokens=10, last_used=1)])
    assert make_policy("residency").choose(ask(4000), table, taught()).engine == "b"


def test_a_short_prompt_keeps_away_from_a_long_prefill():
    table = Table([view("a", 1, prefilling_tokens=8000, long_prefills=1), view("b", 2, decoding=2)])
    assert make_policy("residency").choose(ask(20, max_tokens=10), table, taught()).engine == "b"


def test_a_slow_engine_gets_less_until_the_fast_ones_are_busy():
    rates = taught("abc")
    for _ in range(40):
        timings = Timings(prompt_n=1000, prompt_ms=5000, predicted_n=101, predicted_ms=10_000)
        rates.learn("slow", timings, busy=1)
    table, policy = Table([view("a", 1), view("b", 1), view("c", 1), view("slow")]), make_policy("residency")
    assert policy.choose(ask(), table, rates).engine != "slow"


def test_the_time_expected_is_the_sum_of_its_parts():
    rates = taught()
    speed = rates.speed("a")
    score = estimate(ask(1000, max_tokens=10), view("a", 2, decoding=1, prefilling_tokens=400), rates, 600, 10)
    own = speed.prefill_s(400) + 200 * speed.prefill_token_s + 10 * rates.decode_s("a", 3)
    assert score.expected_s == pytest.approx(own)
    assert score.others_s == pytest.approx(400 * speed.prefill_token_s + 2 * 10 * speed.decode_step_s)
    assert score.cost_s == score.expected_s + score.others_s


def test_matches_of_engines_that_left_or_are_suspect_are_passed_over():
    table = Table([view("a", is_suspect=True), view("b")])
    assert make_policy("residency").choose(ask(), table, taught(), [("a", 900), ("ghost", 900)]).engine == "b"


# --- affinity


def test_a_session_comes_back_to_its_engine_though_another_was_used_longer_ago():
    table, policy = Table([view("a", last_used=9), view("b")]), make_policy("residency")
    policy.placed(ask(affinity="s"), "a")
    choice = policy.choose(ask(affinity="s"), table, taught())
    assert (choice.engine, choice.why.split(":")[0]) == ("a", "same session")
    assert policy.choose(ask(affinity="other"), table, taught()).engine == "b"


def test_a_session_follows_its_cached_tokens_rather_than_its_last_engine():
    table, policy = Table([view("a"), view("b")]), make_policy("residency")
    policy.placed(ask(affinity="s"), "a")
    assert policy.choose(ask(affinity="s"), table, taught(), [("b", 990), ("a", 10)]).engine == "b"


@given(st.integers(2, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 99)), min_size=1, max_size=60))
def test_sessions_of_one_engine_never_stack_on_it(engines, steps):
    table, policy, rates = Table([view(f"e{i}") for i in range(engines)]), make_policy("residency"), Rates()
    asked = ask(8000, affinity="s", max_tokens=1)
    held = []
    policy.placed(asked, "e0")
    for is_arrival, number in steps:
        if not is_arrival and held:
            table.release(held.pop(number % len(held)))
            continue
        choice = policy.choose(asked, table, rates)
        if choice is None:
            continue
        least = min(row.busy for row in table)
        table.claim(choice.engine)
        held.append(choice.engine)
        assert table.get(choice.engine).busy <= least + 1
        policy.placed(asked, "e0")


def test_a_restarted_engine_is_nobodys_home_any_more_and_memory_is_bounded():
    table, policy = Table([view("a", last_used=9), view("b")]), make_policy("residency", sessions=2)
    policy.placed(ask(affinity="s"), "a")
    policy.forget("a")
    assert policy.choose(ask(affinity="s"), table, taught()).engine == "b"
    for session in ("x", "y", "z"):
        policy.placed(ask(affinity=session), "a")
    assert policy.choose(ask(affinity="x"), table, taught()).engine == "b"
    assert policy.choose(ask(affinity="z"), table, taught()).engine == "a"


# --- conversations of a busy fleet


@pytest.mark.parametrize(("busy_elsewhere", "engine"), [(4, "home"), (0, "idle")])
def test_a_conversation_stays_where_an_engine_is_idle_for_a_moment_only(busy_elsewhere, engine):
    others = [view(f"other-{i}", busy_elsewhere, decoding=busy_elsewhere) for i in range(6)]
    table = Table([view("home", 3, decoding=3), view("idle"), *others])
    choice = make_policy("residency").choose(ask(650, max_tokens=100), table, taught(service_s=2.0), [("home", 550)])
    assert choice.engine == engine


def test_an_engine_whose_conversations_return_takes_new_ones_all_the_same():
    others = [view(f"other-{i}", 4, decoding=4) for i in range(6)]
    table = Table([view("busy", 3, decoding=3), view("idle"), *others])
    new = ask(900, max_tokens=100, shared_tokens=800)
    assert make_policy("residency").choose(new, table, taught(), [("busy", 800)]).engine == "idle"


# --- waiting for a better engine


def test_waiting_is_better_when_a_slot_comes_free_much_sooner_than_the_prompt_is_computed_elsewhere():
    table = Table([view("a", 4, decoding=4), view("b")])
    choice = make_policy("residency").choose(ask(30_000, max_tokens=50), table, taught(), [("a", 29_900)])
    assert (choice.engine, choice.wait_for) == ("b", "a")
    assert 15 < choice.wait_gain_s < 30
    assert 0.5 < choice.wait_s < 3
    assert choice.considered[-1].engine == "a"
    assert "would save" in choice.why


def test_nobody_waits_to_save_less_than_the_wait_costs():
    table = Table([view("a", 4, decoding=4), view("b")])
    assert make_policy("residency").choose(ask(1000), table, taught(), [("a", 900)]).wait_for is None


def test_those_who_wait_already_make_waiting_worse_until_nobody_more_waits():
    table = Table([view("a", 4, decoding=4), view("b")])
    policy, rates, waiting = make_policy("residency"), taught(), 0
    while policy.choose(ask(10_000, max_tokens=50), table, rates, [("a", 9900)]).wait_for == "a":
        waiting += 1
        table.get("a").waiting = waiting
        assert waiting < 20
    assert waiting >= 1


def test_service_times_that_nobody_has_seen_are_not_waited_for():
    table = Table([view("a", 4), view("b")])
    assert make_policy("residency").choose(ask(90_000), table, Rates(), [("a", 89_000)]).wait_for is None


# --- one system prompt for all


def simulate(policy_name: str, *, concurrent: int, has_sessions: bool) -> tuple[Counter, int]:
    """400 sessions that share 2,000 tokens, which at first only engine a has. Four engines of four slots.

    Returns:
        Requests of each engine, and how often the shared tokens were computed.
    """
    rng, policy, rates = random.Random(7), make_policy(policy_name), taught()
    table = Table([view(name) for name in "abcd"])
    has_prompt, placed, ends, computed, now = {"a"}, Counter(), [], 0, 0.0
    for i in range(400):
        if len(ends) >= min(concurrent, i // 4 + 1):
            now, engine = heapq.heappop(ends)
            table.release(engine, is_decoding=True)
            has_prompt.add(engine)
        session = f"s{i}" if has_sessions else ""
        key = b"system" * 300 + str(i).encode()
        asked = ask(2100, key=key, affinity=session, max_tokens=100, shared_tokens=2000)
        choice = policy.choose(asked, table, rates, [(name, 2000) for name in sorted(has_prompt)])
        table.claim(choice.engine)
        table.began(choice.engine)
        policy.placed(asked, choice.engine)
        computed += choice.cached_tokens == 0
        placed[choice.engine] += 1
        heapq.heappush(ends, (now + choice.expected_s * rng.uniform(0.5, 1.5), choice.engine))
    return placed, computed


@pytest.mark.parametrize(
    ("concurrent", "has_sessions"), [(4, True), (8, True), (16, True), (6, False), (8, False), (16, False)]
)
def test_a_shared_system_prompt_spreads_over_the_engines_instead_of_collapsing_on_one(concurrent, has_sessions):
    placed, computed = simulate("residency", concurrent=concurrent, has_sessions=has_sessions)
    assert min(placed[name] for name in "abcd") > 400 / 8
    assert max(placed.values()) < 0.4 * 400
    assert computed <= 12


def test_a_shared_system_prompt_stays_where_it_is_as_long_as_one_slot_is_enough():
    assert simulate("residency", concurrent=1, has_sessions=True) == ({"a": 400}, 0)


def test_a_new_session_does_not_queue_for_a_full_engine_that_has_the_system_prompt():
    table, policy = Table([view("a", 4, decoding=4), view("b")]), make_policy("residency")
    matches, prompt = [("a", 9900)], 10_000
    new = ask(prompt, affinity="new", max_tokens=50, shared_tokens=9900)
    assert policy.choose(new, table, taught(), matches).wait_for is None
    policy.placed(ask(affinity="old"), "a")
    assert policy.choose(ask(prompt, affinity="old", max_tokens=50), table, taught(), matches).wait_for == "a"


def test_a_running_session_is_not_taken_from_its_own_history_for_a_little_less_load():
    table, policy = Table([view("a", 3, decoding=3), view("b")]), make_policy("residency")
    asked = ask(4000, affinity="s", max_tokens=100)
    policy.placed(asked, "a")
    assert policy.choose(asked, table, taught(), [("a", 3900)]).engine == "a"


# --- hashes


def test_the_same_session_meets_the_same_engine_in_every_process():
    code = (
        "from lltm_ray.routing.policy import *; from lltm_ray.routing.table import *;"
        "from lltm_ray.routing.rates import *;"
        "t = Table([EngineView(f'e{i}', 'm', 4) for i in range(9)]); p = make_policy('consistent-hash');"
        "print([p.choose(Ask(model='m', affinity=f's{i}'), t, Rates()).engine for i in range(20)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in "12"
    }
    assert len(runs) == 1
    assert len(set(eval(runs.pop()))) > 3


def homes(policy, table: Table, count: int = 600) -> dict[int, str]:
    return {i: policy.choose(ask(key=b"prompt %d" % i), table, Rates()).engine for i in range(count)}


@pytest.mark.parametrize("name", ["consistent-hash", "prefix-hash"])
def test_when_an_engine_leaves_or_comes_back_only_its_own_keys_move(name):
    policy, table = make_policy(name), Table([view(f"e{i}") for i in range(8)])
    before = homes(policy, table)
    table.remove("e3")
    without = homes(policy, table)
    assert {i for i in before if before[i] != without[i]} == {i for i in before if before[i] == "e3"}
    table.add(view("e3"))
    assert homes(policy, table) == before
    shares = Counter(before.values())
    assert len(shares) == 8
    assert max(shares.values()) < 3 * 600 / 8


@pytest.mark.parametrize("name", ["consistent-hash", "prefix-hash"])
@pytest.mark.parametrize("sessions", [1, 3, 1000])
def test_no_engine_gets_more_than_its_bounded_share_however_hot_a_key_is(name, sessions):
    policy, rng = make_policy(name), random.Random(3)
    table = Table([view(f"e{i}", total=8) for i in range(10)])
    held = []
    for _ in range(400):
        if held and (len(held) >= 70 or rng.random() < 0.3):
            table.release(held.pop(rng.randrange(len(held))))
            continue
        choice = policy.choose(ask(key=b"hot %d" % rng.randrange(sessions)), table, Rates())
        if choice.why.startswith(name):
            assert table.get(choice.engine).busy + 1 <= ceil(1.25 * (len(held) + 1) / 10)
        table.claim(choice.engine)
        held.append(choice.engine)


def test_only_the_session_hash_looks_at_the_session():
    table, rates = Table([view(f"e{i}") for i in range(9)]), Rates()
    prompts = [ask(key=b"p%d" % i, affinity="s") for i in range(20)]
    by_session, by_prefix = make_policy("consistent-hash"), make_policy("prefix-hash", key_bytes=8)
    assert len({by_session.choose(each, table, rates).engine for each in prompts}) == 1
    assert len({by_prefix.choose(each, table, rates).engine for each in prompts}) > 3
    tails = [ask(key=b"8 bytes " + bytes([i])) for i in range(20)]
    assert len({by_prefix.choose(each, table, rates).engine for each in tails}) == 1


def test_requests_without_a_key_are_spread_by_load():
    table, policy = Table([view("a"), view("b")]), make_policy("consistent-hash")
    first = policy.choose(ask(), table, Rates()).engine
    table.claim(first)
    assert policy.choose(ask(), table, Rates()).engine != first
