"""One token is one byte in most of these tests: replies say so, and predictions must follow exactly."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.routing.residency import Held, Residency
from lltm_ray.routing.residency import index as residency_module
from lltm_ray.routing.residency import slots as slots_module


@pytest.fixture(autouse=True, scope="module")
def every_token_counts():
    """The rules are shown with prompts of a few tokens, which in earnest are not worth a look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots_module, "LEAST_TOKENS", 1)
        patch.setattr(residency_module, "LEAST_SEQUENCE_TOKENS", 0)
        yield


def fleet(
    *names: str, slots: int = 2, ram: int = 0, limit_bytes: int = 2**26, similarity_ratio: float = 0.1
) -> Residency:
    residency = Residency(limit_bytes)
    for name in names:
        residency.set_engine(name, slots=slots, ram_tokens=ram, similarity_ratio=similarity_ratio)
    return residency


def serve(residency, engine, slot, key, reply=b"", *, cached=None, output=None, predicted=None, tokens=None):
    """One request from its start to its end, with one token a byte unless told otherwise."""
    match = residency.match(key)
    choice = residency.choose_slot(engine, match, [slot])
    residency.begin(engine, slot, match)
    expected = choice.cached_tokens if predicted is None else predicted
    residency.finish(
        engine,
        slot,
        key,
        reply=reply,
        prompt_tokens=len(key) if tokens is None else tokens,
        cached_tokens=expected if cached is None else cached,
        output_tokens=len(reply) + 1 if output is None else output,
        predicted_tokens=expected,
    )
    return expected


def test_the_next_turn_of_a_chat_is_predicted_exactly_and_goes_back_to_its_slot():
    residency = fleet("a", "b")
    key = b"system " * 20 + b"first question"
    serve(residency, "a", 1, key, b"first answer")
    for turn in range(20):
        held = len(key) + len(b"first answer")
        key = key + b"first answer" + b"and then %d?" % turn
        match = residency.match(key)
        assert match.engines == (("a", held),)
        choice = residency.choose_slot("a", match, {0, 1})
        assert (choice.slot, choice.cached_tokens, choice.source) == (1, held, "slot")
        serve(residency, "a", 1, key, b"first answer")
    counted = residency.calibration()
    assert (counted["n"], counted["median_error_ratio"], counted["nodes"]) == (21, 0.0, 1)
    assert counted["predicted_tokens"] == counted["actual_tokens"] > 0


def test_a_prompt_that_is_held_whole_still_computes_one_token():
    residency = fleet("a")
    serve(residency, "a", 0, b"x" * 40)
    assert residency.match(b"x" * 40).engines == (("a", 39),)
    assert residency.match(b"x" * 20).engines == (("a", 19),)


def test_the_last_sampled_token_is_not_in_the_slot():
    residency = fleet("a")
    serve(residency, "a", 0, b"p" * 50, b"r" * 9, output=10)
    assert residency.held("a") == (Held(0, 59, 59),)


def test_tokens_between_told_positions_are_interpolated_and_beyond_extrapolated():
    residency = fleet("a")
    serve(residency, "a", 0, b"x" * 400, tokens=100)
    assert residency.estimate_tokens(b"x" * 400) == 100
    assert residency.estimate_tokens(b"x" * 200) == 50
    assert residency.estimate_tokens(b"x" * 400 + b"y" * 40) == 110
    assert residency.match(b"x" * 200 + b"y" * 200).engines == (("a", 50),)


def test_content_in_use_is_not_offered_and_comes_back_with_the_end():
    residency = fleet("a")
    serve(residency, "a", 0, b"x" * 40)
    match = residency.match(b"x" * 60)
    residency.begin("a", 0, match)
    assert residency.match(b"x" * 60).engines == ()
    assert residency.choose_slot("a", match, [0]).slot == -1
    residency.abort("a", 0)
    assert residency.match(b"x" * 60).engines == ()
    assert residency.choose_slot("a", residency.match(b"x" * 60), [0]).slot == 0


def test_a_shared_system_prompt_is_found_on_few_engines_however_many_hold_it():
    residency = fleet(*(str(i) for i in range(300)), slots=1)
    system = b"You are helpful. " * 10
    for i in range(300):
        serve(residency, str(i), 0, system + b"%d" % (i + 1000))
    match = residency.match(system + b"other", limit=8)
    assert [tokens for _, tokens in match.engines] == [len(system)] * 8
    assert [name for name, _ in match.engines] == [str(i) for i in range(299, 291, -1)]
    own = residency.match(system + b"1007 more", limit=8)
    assert own.engines[0] == ("7", len(system) + 4)


def test_an_empty_slot_is_taken_before_content_is_destroyed_and_then_the_least_loss():
    residency = fleet("a", slots=3)
    serve(residency, "a", 0, b"x" * 300)
    serve(residency, "a", 1, b"y" * 100)
    fresh = residency.match(b"z" * 50)
    assert residency.choose_slot("a", fresh, {0, 1, 2}).slot == 2
    choice = residency.choose_slot("a", fresh, {0, 1})
    assert (choice.slot, choice.lost_tokens, choice.source) == (1, 100, "none")


def test_idle_slots_are_published_to_ram_and_loaded_through_another_slot():
    residency = fleet("a", slots=2, ram=10_000)
    serve(residency, "a", 0, b"x" * 300)
    serve(residency, "a", 1, b"y" * 300)
    serve(residency, "a", 0, b"z" * 300)
    match = residency.match(b"x" * 310)
    assert match.engines == (("a", 300),)
    choice = residency.choose_slot("a", match, {0, 1})
    assert (choice.cached_tokens, choice.source, choice.lost_tokens) == (300, "ram", 0)
    residency.begin("a", choice.slot, match)
    assert residency.match(b"x" * 310).engines == ()


def test_a_pinned_empty_slot_would_skip_ram_so_llama_cpp_chooses():
    residency = fleet("a", slots=2, ram=10_000)
    serve(residency, "a", 0, b"x" * 300)
    serve(residency, "a", 0, b"z" * 300)
    match = residency.match(b"x" * 310)
    choice = residency.choose_slot("a", match, {1})
    assert (choice.slot, choice.cached_tokens, choice.source) == (-1, 300, "ram")
    assert residency.choose_slot("a", match, {0, 1}).cached_tokens == 300


@pytest.mark.parametrize(("ratio", "found", "source"), [(0.0, 240, "ram"), (0.1, 200, "slot"), (0.9, 240, "ram")])
def test_a_session_finds_its_own_turn_in_ram_though_every_slot_shares_the_system_prompt(ratio, found, source):
    residency = fleet("a", slots=2, ram=10_000, similarity_ratio=ratio)
    system = b"s" * 200
    for slot, letter in ((0, b"a"), (1, b"b"), (0, b"c"), (1, b"d"), (0, b"e")):
        serve(residency, "a", slot, system + letter * 40)
    choice = residency.choose_slot("a", residency.match(system + b"b" * 40 + b"?" * 20), {0, 1})
    assert (choice.cached_tokens, choice.source, choice.lost_tokens) == (found, source, 0)


def test_what_another_session_has_in_ram_is_not_taken_where_a_slot_has_as_much():
    residency = fleet("a", slots=2, ram=10_000, similarity_ratio=0.9)
    system = b"s" * 200
    for letter in (b"a", b"b"):
        serve(residency, "a", 0, system + letter * 40)
    match = residency.match(system + b"c" * 40)
    choice = residency.choose_slot("a", match, {0, 1})
    assert (choice.slot, choice.cached_tokens, choice.source) == (0, 200, "slot")
    forced = residency.choose_slot("a", match, {1})
    assert (forced.slot, forced.cached_tokens, forced.source, forced.lost_tokens) == (-1, 200, "ram", 40)


def test_ram_keeps_no_entry_twice_and_evicts_the_oldest_first():
    residency = fleet("a", slots=1, ram=700)
    for letter in (b"a", b"b", b"c", b"d"):
        serve(residency, "a", 0, letter * 300)
    assert residency.calibration()["ram_sequences"] == 2
    assert [bool(residency.match(each * 310).engines) for each in (b"a", b"b", b"c", b"d")] == [False, True, True, True]


def test_a_ram_entry_of_which_too_little_would_be_kept_is_not_promised():
    residency = fleet("a", slots=1, ram=10_000)
    serve(residency, "a", 0, b"s" * 100 + b"x" * 900)
    serve(residency, "a", 0, b"y" * 100)
    assert residency.match(b"s" * 100 + b"z" * 50).engines == ()
    assert residency.match(b"s" * 100 + b"x" * 200).engines == (("a", 299),)


def test_a_ram_copy_that_was_not_there_is_forgotten_with_all_older_ones_and_trust_falls():
    residency = fleet("a", slots=1, ram=10_000)
    for letter in (b"a", b"b", b"c"):
        serve(residency, "a", 0, letter * 300)
    assert residency.match(b"a" * 310).engines
    assert serve(residency, "a", 0, b"b" * 310, cached=0) == 300
    assert residency.match(b"a" * 310).engines == ()
    assert residency.calibration()["ram_trust"] == pytest.approx(0.8)
    assert residency.match(b"c" * 310).engines == (("a", 240),)


def test_without_a_pin_llama_cpp_takes_the_most_similar_slot_and_the_end_settles_there():
    residency = fleet("a", slots=3)
    serve(residency, "a", 0, b"x" * 100)
    serve(residency, "a", 1, b"y" * 100)
    key = b"y" * 100 + b"?"
    match = residency.match(key)
    choice = residency.choose_slot("a", match, {0, 1, 2}, can_pin=False)
    assert (choice.slot, choice.cached_tokens) == (-1, 100)
    residency.begin("a", -1, match)
    assert residency.match(b"y" * 100).engines == ()
    numbers = {"prompt_tokens": 101, "cached_tokens": 100, "output_tokens": 1, "predicted_tokens": 100}
    residency.finish("a", -1, key, reply=b"", **numbers)
    assert {each.slot: each.tokens for each in residency.held("a")} == {0: 100, 1: 101}


def test_a_reply_that_names_another_slot_gives_the_guessed_one_its_content_back():
    residency = fleet("a", slots=2)
    serve(residency, "a", 0, b"x" * 100)
    serve(residency, "a", 1, b"y" * 100)
    key = b"y" * 100 + b"?"
    residency.begin("a", -1, residency.match(key))
    numbers = {"prompt_tokens": 101, "cached_tokens": 0, "output_tokens": 1, "predicted_tokens": 100}
    residency.finish("a", 0, key, reply=b"", **numbers)
    assert {each.slot: each.tokens for each in residency.held("a")} == {0: 101, 1: 100}


def end(residency, slot, key):
    """A request in flight ends, with one token a byte and none of it cached."""
    numbers = {"prompt_tokens": len(key), "cached_tokens": 0, "output_tokens": 1, "predicted_tokens": 0}
    residency.finish("a", slot, key, reply=b"", **numbers)


def test_the_end_of_a_request_for_which_no_idle_slot_was_known_is_not_taken_for_that_of_another():
    residency = fleet("a", slots=2)
    x, y, z = b"x" * 100, b"y" * 110, b"z" * 120
    for key in (x, y, z):
        residency.begin("a", -1, residency.match(key))
    for key in (z, x, y):
        end(residency, -1, key)
    assert sorted(each.tokens for each in residency.held("a")) == [100, 110]
    assert residency.match(z).engines == ()


def test_the_end_of_a_request_whose_guessed_slot_another_got_is_not_taken_for_that_of_a_third():
    residency = fleet("a", slots=2)
    x, y, z = b"x" * 100, b"y" * 110, b"z" * 120
    for key, slot in ((x, -1), (y, -1), (z, 1)):  # of two that are equally idle llama.cpp takes the last
        residency.begin("a", slot, residency.match(key))
    for key, slot in ((x, -1), (y, -1), (z, 1)):
        end(residency, slot, key)
    assert {each.slot: each.tokens for each in residency.held("a")} == {0: 110, 1: 120}


def test_replies_that_templates_drop_teach_the_retention():
    residency = fleet("a", slots=1)
    key = b"q" * 100
    for _ in range(30):
        serve(residency, "a", 0, key, b"r" * 100, cached=0)
        following = key + b"r" * 100 + b"q" * 100
        match = residency.match(following)
        residency.begin("a", 0, match)
        numbers = {"prompt_tokens": 300, "cached_tokens": 100, "output_tokens": 1, "predicted_tokens": 100}
        residency.finish("a", 0, following, reply=None, **numbers)
    assert residency.calibration()["reply_retention"] < 0.01
    serve(residency, "a", 0, b"w" * 100, b"r" * 100)
    assert residency.match(b"w" * 100 + b"r" * 100 + b"q" * 10).engines == (("a", 100),)


@pytest.mark.parametrize(("engines", "failures"), [(("a", "b"), 5), (("a",), 8)])
def test_a_model_that_never_reuses_is_given_up_until_its_servers_restart(engines, failures):
    residency = fleet(*engines, slots=1)
    for i in range(failures):
        assert not residency.is_off
        serve(residency, engines[i % len(engines)], 0, b"x" * 200, cached=0, predicted=199)
    assert residency.is_off
    assert residency.match(b"x" * 200).engines == ()
    for name in engines:
        assert residency.is_off
        residency.set_engine(name, slots=1, ram_tokens=0)
    assert not residency.is_off


def test_a_probe_switches_predictions_on_again_when_reuse_is_back():
    residency = fleet("a", slots=1)
    for _ in range(8):
        serve(residency, "a", 0, b"x" * 200, cached=0, predicted=199)
    for _ in range(196):
        assert residency.match(b"x" * 200).engines == ()
        residency.begin("a", 0, residency.match(b""))
        residency.abort("a", 0)
    serve(residency, "a", 0, b"x" * 200, cached=0)
    assert serve(residency, "a", 0, b"x" * 200) == 199
    for _ in range(10):
        assert serve(residency, "a", 0, b"x" * 200) == 199


def test_moved_content_counts_where_it_went_and_erased_content_nowhere():
    residency = fleet("a", "b", slots=2)
    serve(residency, "a", 0, b"x" * 100)
    residency.moved("a", 0, "b", 1)
    assert residency.match(b"x" * 110).engines == (("b", 100),)
    assert (residency.held("a"), residency.held("b")) == ((), (Held(1, 100, 100),))
    residency.erase("b", 1)
    assert residency.match(b"x" * 110).engines == ()


def test_memory_stays_bounded_and_the_newest_content_survives():
    residency = fleet("a", slots=64, limit_bytes=100_000)
    for i in range(300):
        serve(residency, "a", i % 64, os.urandom(5000))
        assert residency.calibration()["bytes"] <= 100_000
    assert 5 < len(residency.held("a")) < 64


def test_odd_input_means_that_nothing_is_known():
    residency = fleet("a")
    nothing = residency.match(b"")
    assert (nothing.engines, nothing.prompt_tokens) == ((), 0)
    assert residency.choose_slot("nobody", nothing, {0}).slot == -1
    assert residency.choose_slot("a", nothing, {7}).slot == -1
    residency.begin("nobody", 0, nothing)
    residency.begin("a", 9, nothing)
    for slot in (9, -1, 0):
        serve(residency, "a", slot, b"", None, tokens=0, output=0)
        residency.abort("a", slot)
        residency.erase("nobody", slot)
        residency.moved("a", slot, "nobody", slot)
    residency.forget_engine("nobody")
    assert residency.held("nobody") == ()
    residency.forget_engine("a")
    assert (residency.calibration()["bytes"], residency.calibration()["nodes"]) == (0, 0)


KEYS = st.binary(max_size=0) | st.text("ab", min_size=1, max_size=24).map(str.encode)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "finish", "finish", "serve", "serve", "abort", "erase", "moved", "forget"]),
        st.integers(0, 3),
        st.integers(0, 2),
        KEYS,
        KEYS,
    ),
    max_size=40,
)


def common(one: bytes, two: bytes) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


class Naive:
    """What idle slots hold, as a plain table."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, int], bytes] = {}
        self.busy: dict[tuple[str, int], bytes] = {}

    def engines(self, key: bytes) -> dict[str, int]:
        best: dict[str, int] = {}
        for (engine, _), held in self.content.items():
            best[engine] = max(best.get(engine, 0), common(held, key))
        capped = {engine: min(tokens, len(key) - 1) for engine, tokens in best.items()}
        return {engine: tokens for engine, tokens in capped.items() if tokens > 0}


def play(residency: Residency, naive: Naive, operation) -> None:
    verb, number, slot, key, reply = operation
    engine = f"e{number}"
    place, other = (engine, slot), (f"e{(number + 1) % 4}", slot)
    if verb == "forget":
        residency.set_engine(engine, slots=3, ram_tokens=0)
        naive.content = {each: held for each, held in naive.content.items() if each[0] != engine}
        naive.busy = {each: held for each, held in naive.busy.items() if each[0] != engine}
    elif verb == "moved":
        residency.moved(*place, *other)
        if place in naive.content and other not in naive.busy:
            naive.content[other] = naive.content.pop(place)
    elif verb in ("abort", "erase"):
        getattr(residency, verb)(*place)
        naive.content.pop(place, None)
        naive.busy.pop(place, None)
    else:
        if verb != "finish":
            residency.begin(*place, residency.match(key))
            naive.content.pop(place, None)
            naive.busy[place] = key
        if verb != "begin":
            key = naive.busy.pop(place, key)
            numbers = {"prompt_tokens": len(key), "cached_tokens": 1, "predicted_tokens": 1}
            residency.finish(*place, key, reply=reply, output_tokens=len(reply) + 1, **numbers)
            naive.content[place] = key + reply


@settings(max_examples=100, deadline=None)
@given(OPERATIONS, st.lists(KEYS, min_size=1, max_size=6))
def test_matches_are_those_of_a_plain_table_of_contents(operations, asked):
    residency, naive = fleet("e0", "e1", "e2", "e3", slots=3), Naive()
    serve(residency, "e0", 0, b"one token a byte", cached=0)
    residency.erase("e0", 0)
    for operation in operations:
        play(residency, naive, operation)
    for key in asked:
        match = residency.match(key)
        assert dict(match.engines) == naive.engines(key)
        assert match.prompt_tokens == len(key)
    held = {(f"e{i}", each.slot): each.key_bytes for i in range(4) for each in residency.held(f"e{i}")}
    assert held == {place: len(content) for place, content in naive.content.items()}
    for i in range(4):
        residency.forget_engine(f"e{i}")
    assert (residency.calibration()["nodes"], residency.calibration()["bytes"]) == (0, 0)


class NaiveServer:
    """llama.cpp's slot choice and RAM cache as its source tells them, over bytes and without any index."""

    def __init__(self, slots: int, ram_tokens: int, ratio: float) -> None:
        self.ratio = ratio
        self.slots = [b""] * slots
        self.used = [-1] * slots
        self.busy: set[int] = set()
        self.ram: list[bytes] = []
        self.ram_tokens = ram_tokens
        self.clock = 0

    def start(self, key: bytes, slot: int) -> tuple[int, int]:
        idle = [i for i in range(len(self.slots)) if i not in self.busy and slot in (-1, i)]
        best, most, update = slot, self.ratio * len(key), False
        for i in idle if self.ratio else ():
            if self.slots[i] and common(self.slots[i], key) > most:
                best, most = i, common(self.slots[i], key)
        if self.ratio and best >= 0 and self.slots[best]:
            similar = most if most > self.ratio * len(key) else 0
            update = similar < 0.5 * len(self.slots[best])
        if best < 0:
            best, update = min(idle, key=lambda i: (self.used[i], -i)), True
        if update and self.ram_tokens:
            self.save(best)
            self.load(best, key)
        cached = min(common(self.slots[best], key), len(key) - 1)
        self.busy.add(best)
        for i in range(len(self.slots)):
            if i not in self.busy and self.ram_tokens:
                self.save(i)
        return best, cached

    def save(self, slot: int) -> None:
        held = self.slots[slot]
        if not held or any(each.startswith(held) for each in self.ram) or len(held) > self.ram_tokens:
            return
        self.ram = [each for each in self.ram if not held.startswith(each)]
        while self.ram and sum(map(len, self.ram)) + len(held) > self.ram_tokens:
            del self.ram[0]
        self.ram.append(held)

    def load(self, slot: int, key: bytes) -> None:
        held, best = self.slots[slot], None
        lcp = common(held, key)
        keep = lcp / len(held) if held else -1.0
        for each in self.ram:
            shared = common(each, key)
            if shared >= 0.25 * len(each) and shared / len(each) > keep and shared > lcp:
                best, keep, lcp = each, shared / len(each), shared
        if best is not None:
            self.ram.remove(best)
            self.slots[slot] = best

    def end(self, slot: int, content: bytes) -> None:
        self.clock += 1
        self.slots[slot], self.used[slot] = content, self.clock
        self.busy.discard(slot)


TURNS = st.lists(
    st.tuples(
        st.sampled_from([b"sys" * 8, b"sys" * 8 + b"tools" * 4, b"other"]),
        st.text("abc", min_size=1, max_size=30).map(str.encode),
        st.integers(-1, 2),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(TURNS, st.sampled_from([0, 150, 10_000]), st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]))
def test_predictions_are_what_a_plain_model_of_llama_cpp_finds(turns, ram_tokens, ratio):
    residency, server = fleet("a"), NaiveServer(3, ram_tokens, ratio)
    serve(residency, "a", 0, b"one token a byte", cached=0)
    residency.set_engine("a", slots=3, ram_tokens=ram_tokens, similarity_ratio=ratio)
    running: list[tuple[int, bytes, int, int]] = []
    for head, tail, pin, limit, is_continued in turns:
        while len(running) > limit:
            slot, key, cached, predicted = running.pop(0)
            numbers = {"prompt_tokens": len(key), "cached_tokens": cached, "predicted_tokens": predicted}
            residency.finish("a", slot, key, reply=b"reply", output_tokens=6, **numbers)
            server.end(slot, key + b"reply")
        free = {0, 1, 2} - server.busy
        key = max(server.slots, key=len) + tail if is_continued and server.slots else head + tail
        match = residency.match(key)
        choice = residency.choose_slot("a", match, free, can_pin=pin >= 0)
        slot, cached = server.start(key, choice.slot)
        if ram_tokens != 150:
            assert choice.cached_tokens == cached
        residency.begin("a", choice.slot, match)
        running.append((slot, key, cached, cached))
    assert residency.calibration()["ram_sequences"] == len(server.ram)
    held = {each.slot: each.tokens for each in residency.held("a")}
    assert held == {i: len(each) for i, each in enumerate(server.slots) if each and i not in server.busy}


def test_idle_slots_are_published_in_the_order_of_their_ids():
    residency = fleet("a", slots=3, ram=100)
    for slot, letter in ((1, b"b"), (0, b"a")):
        residency.begin("a", slot, residency.match(letter * 40))
    for slot, letter in ((1, b"b"), (0, b"a")):
        done = {"prompt_tokens": 40, "cached_tokens": 0, "output_tokens": 1, "predicted_tokens": 0}
        residency.finish("a", slot, letter * 40, reply=None, **done)
    serve(residency, "a", 2, b"c" * 40)
    for slot in (0, 1):
        residency.erase("a", slot)
    serve(residency, "a", 2, b"d" * 40)  # RAM has room for two: the third drives out that of slot 0
    assert residency.match(b"a" * 40).engines == ()
    assert residency.match(b"b" * 40).engines == (("a", 39),)


def test_a_copy_in_memory_is_found_where_a_later_prompt_parts_from_it():
    residency = fleet("a", slots=1, ram=1000)
    serve(residency, "a", 0, b"s" * 60 + b"a" * 40)
    serve(residency, "a", 0, b"q" * 100)
    residency.set_engine("b", slots=1, ram_tokens=0)
    serve(residency, "b", 0, b"s" * 60 + b"b" * 40)
    residency.forget_engine("b")
    residency.set_engine("b", slots=1, ram_tokens=0)
    serve(residency, "b", 0, b"s" * 60 + b"c" * 40)
    assert ("a", 60) in residency.match(b"s" * 60 + b"d" * 40).engines
