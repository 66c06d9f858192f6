from __future__ import annotations

import json
import stat
import time
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.records import EngineInfo, EngineState, Timings
from lltm_ray.routing.choice import Ask, Choice
from lltm_ray.routing.policy import POLICIES
from lltm_ray.routing.replay import Fleet, Replay
from lltm_ray.routing.replay.measure import Ideal, Result, Spread, deep_bytes
from lltm_ray.routing.replay.recorder import KEY_BYTES, TraceRecorder
from lltm_ray.routing.replay.simulated import EngineSpec, SimulatedEngine, Task, common_blocks
from lltm_ray.routing.replay.synthetic import KINDS, request_rate, shape_of, synthetic
from lltm_ray.routing.replay.trace import HEADER, Arrival, read_trace, trace_lines
from lltm_ray.routing.router import Router, Served

SLOW = EngineSpec(prefill_tokens_s=1000.0, prefill_overhead_s=0.0, decode_first_s=0.01, decode_step_s=0.0)
"""1 ms a prompt token, 10 ms a generated one."""
FOUR = Fleet(engines=4)
WORK = ("decision_us", "decision_cpu_us", "settle_us", "settle_cpu_us", "release_us", "release_cpu_us")
WALL = (*WORK, "state_peak_bytes")


def blocks(text: str) -> bytes:
    """One block for each letter."""
    return b"".join(letter.encode() * 8 for letter in text)


def task(text: str, output_tokens: int = 1, reply: str = "", slot: int = -1) -> Task[str]:
    return Task(text, blocks(text), blocks(reply), 16 * len(text), output_tokens, slot)


def play_alone(engine: SimulatedEngine[str], each: Task[str]) -> Task[str]:
    now_s = engine.next_s if engine.next_s < inf else each.ended_s
    engine.start(each, now_s)
    while not each.has_ended:
        engine.advance(engine.next_s)
    return each


def arrival(at_s: float, text: str, session: str = "", reply: str = "", **more: object) -> Arrival:
    fields: dict[str, object] = {"prompt_tokens": 16 * len(text), "output_tokens": 16 * len(reply) + 1} | more
    return Arrival(arrived_s=at_s, key=blocks(text), reply=blocks(reply), session=session, **fields)  # type: ignore[arg-type]


def compare(result: Result) -> dict[str, object]:
    """All of a result that is simulated, and nothing that this machine's speed is in."""
    return {name: getattr(result, name) for name in Result.__slots__ if name not in WALL}


def play(
    kind: str, policy: str, requests: int = 400, *, seed: int = 1, load: float = 0.5, fleet: Fleet = FOUR
) -> Result:
    shape = shape_of(kind, load=load)
    rate = request_rate(shape, fleet.engines, fleet.spec)
    return Replay(policy, fleet).run(synthetic(shape, requests=requests, requests_s=rate, seed=seed))


# --- one engine


def test_common_blocks_are_counted_in_whole_blocks() -> None:
    assert common_blocks(blocks("abcd"), blocks("abxd")) == 2
    assert common_blocks(blocks("ab"), blocks("abcd")) == 2
    assert common_blocks(blocks("abcd"), blocks("xbcd")) == 0
    assert common_blocks(b"", blocks("a")) == 0
    # the ids differ only in their last byte
    assert common_blocks(blocks("ab")[:-1] + b"x", blocks("ab")) == 1


def test_a_prompt_and_its_tokens_take_the_time_that_the_rates_say() -> None:
    alone = play_alone(SimulatedEngine("e", SLOW), task("abcd", output_tokens=11))
    assert alone.began_s == pytest.approx(0.064)
    assert alone.ended_s == pytest.approx(0.164)


def test_a_long_prompt_stalls_the_one_that_decodes_to_one_token_a_batch() -> None:
    spec = replace(SLOW, batch_tokens=100)
    engine, first, second = SimulatedEngine[str]("e", spec), task("a", output_tokens=11), task("b" * 100)
    engine.start(first, 0.0)
    engine.advance(engine.next_s)
    engine.start(second, 0.016)
    # 1.6 s of prompt are 16 batches of 0.1 s; the first needs 10 tokens
    engine.advance(engine.next_s)
    assert first.ended_s == pytest.approx(1.016)
    while not second.has_ended:
        engine.advance(engine.next_s)
    assert second.began_s == pytest.approx(1.616)


def test_decoding_together_slows_each_step() -> None:
    spec = EngineSpec(prefill_tokens_s=1e12, prefill_overhead_s=0, decode_first_s=0.01, decode_step_s=0.002)
    engine = SimulatedEngine[str]("e", spec)
    both = [task("a", 11), task("b", 11)]
    for each in both:
        engine.start(each, 0.0)
    while not all(each.has_ended for each in both):
        engine.advance(engine.next_s)
    assert [each.ended_s for each in both] == pytest.approx([0.12, 0.12], rel=1e-3)


def test_a_slot_keeps_prompt_and_reply_for_the_next_turn() -> None:
    engine = SimulatedEngine[str]("e", SLOW)
    play_alone(engine, task("abcd", output_tokens=33, reply="rs"))
    assert play_alone(engine, task("abcdrsX")).cached_tokens == 96


def test_the_whole_prompt_is_never_cached_its_last_token_is_computed() -> None:
    engine = SimulatedEngine[str]("e", SLOW)
    play_alone(engine, task("abcd"))
    assert play_alone(engine, task("abcd")).cached_tokens == 63


def test_what_a_slot_loses_comes_back_from_the_prompt_cache_in_memory() -> None:
    engine = SimulatedEngine[str]("e", replace(SLOW, slots=1))
    play_alone(engine, task("abcd"))
    assert play_alone(engine, task("wxyz")).cached_tokens == 0
    assert play_alone(engine, task("abcde")).cached_tokens == 64
    without = SimulatedEngine[str]("e", replace(SLOW, slots=1, ram_tokens=0))
    for text in ("abcd", "wxyz"):
        play_alone(without, task(text))
    assert play_alone(without, task("abcde")).cached_tokens == 0


def test_the_prompt_cache_forgets_the_oldest_first() -> None:
    engine = SimulatedEngine[str]("e", replace(SLOW, slots=1, ram_tokens=130))
    for text in ("abcd", "efgh", "ijkl", "mnop"):
        play_alone(engine, task(text))
    assert play_alone(engine, task("abcd")).cached_tokens == 0
    assert play_alone(engine, task("mnopq")).cached_tokens == 64


def test_pinning_an_empty_slot_skips_the_prompt_cache() -> None:
    def second_turn(slot: int) -> int:
        engine = SimulatedEngine[str]("e", replace(SLOW, slots=3))
        play_alone(engine, task("abcd", slot=0))
        play_alone(engine, task("wxyz", slot=1))  # publishes slot 0
        play_alone(engine, task("klmn", slot=0))
        return play_alone(engine, task("abcde", slot=slot)).cached_tokens

    assert second_turn(slot=2) == 0
    assert second_turn(slot=1) == 64


@pytest.mark.parametrize(("ratio", "found"), [(0.0, 128), (0.1, 128), (0.9, 144)])
def test_a_pinned_slot_that_shares_the_beginning_is_exchanged_only_above_the_similarity(ratio, found) -> None:
    engine = SimulatedEngine[str]("e", replace(SLOW, slots=2, similarity_ratio=ratio))
    for slot, letter in ((0, "x"), (1, "y"), (0, "z")):
        play_alone(engine, task("abcdefgh" + letter, slot=slot))
    assert play_alone(engine, task("abcdefghxX", slot=1)).cached_tokens == found


def test_requests_without_a_slot_get_the_one_used_longest_ago_where_similarity_is_off() -> None:
    def second_turn(ratio: float) -> int:
        engine = SimulatedEngine[str]("e", replace(SLOW, slots=2, similarity_ratio=ratio))
        play_alone(engine, task("abcd", slot=0))
        return play_alone(engine, task("abcdX")).cached_tokens

    assert (second_turn(0.1), second_turn(0.0), second_turn(0.9)) == (64, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_engines_take_their_slots_as_in_a_fleet_with_that_policy(policy: str) -> None:
    assert EngineSpec().under(policy).slot_ratio == (0.9 if policy == "residency" else 0.1)
    assert EngineSpec(ram_tokens=0).under(policy).slot_ratio == 0.1
    assert EngineSpec(similarity_ratio=0.3).under(policy).slot_ratio == 0.3


def test_a_request_pinned_to_a_busy_slot_waits_for_it() -> None:
    engine = SimulatedEngine[str]("e", SLOW)
    first, second = task("abcd", output_tokens=11, slot=0), task("abcd", slot=0)
    engine.start(first, 0.0)
    engine.start(second, 0.001)
    while not second.has_ended:
        engine.advance(engine.next_s)
    assert second.begin_s == first.ended_s
    assert second.cached_tokens == 63


@pytest.mark.parametrize("field", ["slots", "prefill_tokens_s", "decode_first_s", "batch_tokens"])
def test_an_engine_without_speed_or_slots_is_refused_by_the_fields_name(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineSpec(**{field: 0})


# --- the ideal


def test_the_ideal_of_two_turns_is_what_one_counts_by_hand() -> None:
    ideal = Ideal()
    for each in (arrival(0, "abcd", reply="rs"), arrival(1, "abcdrsX"), arrival(2, "abYY"), arrival(3, "zzzz")):
        ideal.take(each)
    assert ideal.cached_tokens == 0 + 96 + 32 + 0
    assert ideal.prompt_tokens == 16 * (4 + 7 + 4 + 4)


def test_the_ideal_never_counts_the_last_token_nor_the_own_reply() -> None:
    ideal = Ideal()
    for _ in range(2):
        ideal.take(arrival(0, "ab", reply="r"))
    assert ideal.cached_tokens == 31


def test_percentiles_are_nearest_ranks() -> None:
    assert Spread.of(range(101)) == Spread(50, 95, 99, 100)
    assert Spread.of([]) == Spread()


def test_memory_counts_each_object_once() -> None:
    shared = b"x" * 100_000
    assert 100_000 < deep_bytes([shared, [shared], {"a": shared}]) < 102_000


# --- policies


def test_one_engine_with_room_for_all_reaches_the_ideal_exactly() -> None:
    turns = [arrival(0, "abcd", "s", "rs"), arrival(9, "abcdrsX", "s", "t"), arrival(18, "abcdrsXtY", "s")]
    result = Replay("residency", Fleet(engines=1, spec=SLOW)).run(turns)
    ideal = Ideal()
    for each in turns:
        ideal.take(each)
    assert result.cached_tokens == ideal.cached_tokens == 96 + 128
    assert result.computed_tokens == 64 + 16 + 16
    assert result.ttft_s.p50 == pytest.approx(0.016)
    assert result.prediction_error_ratio == 0


def test_residency_computes_far_less_than_least_loaded_on_conversations() -> None:
    spec = EngineSpec(prefill_tokens_s=1500, decode_first_s=0.02, decode_step_s=0.002)
    fleet = Fleet(engines=4, spec=spec)
    residency, least = (play("multi-turn", name, load=0.3, fleet=fleet) for name in ("residency", "least-loaded"))
    assert residency.computed_tokens < 0.6 * least.computed_tokens
    assert residency.ttft_s.p50 < least.ttft_s.p50


def test_unique_prompts_cost_every_policy_the_same() -> None:
    results = [play("unique", policy, 200) for policy in POLICIES]
    assert {each.computed_tokens for each in results} == {results[0].prompt_tokens}
    assert {each.cached_tokens for each in results} == {0}


def test_a_seed_makes_the_same_result_another_seed_another_one() -> None:
    first, again, other = (play("multi-turn", "residency", 200, seed=seed) for seed in (5, 5, 6))
    assert compare(first) == compare(again)
    assert compare(first) != compare(other)


@pytest.mark.parametrize("policy", POLICIES)
def test_overload_serves_or_refuses_everyone_and_breaks_few_promises(policy: str) -> None:
    result = play("overload", policy, 3000, load=2.0)
    assert result.served + sum(result.rejected.values()) == result.requests == 3000
    assert sum(result.rejected.values()) > 500
    assert result.good >= 0.97 * result.served
    assert result.goodput_ratio == result.good / 3000


def test_a_full_queue_refuses_and_a_deadline_expires() -> None:
    fleet = Fleet(engines=1, spec=replace(SLOW, slots=1), queue_limit=1, queue_timeout_s=0.5)
    result = Replay("least-loaded", fleet).run([arrival(0, "a" * 100), arrival(0.1, "b"), arrival(0.2, "c")])
    assert result.rejected == {"expired": 1, "full": 1}
    assert result.served == 1


def test_a_turn_waits_for_the_end_of_the_last_one_and_its_pause() -> None:
    turns = [arrival(0, "a" * 100, "s"), arrival(0.1, "a" * 101, "s", pause_s=2.0)]
    result = Replay("residency", Fleet(engines=1, spec=SLOW)).run(turns)
    assert result.cached_tokens == 1600
    assert result.simulated_s == pytest.approx(1.6 + 2.0 + 0.016)


def test_the_clock_of_a_result_stops_with_the_last_request() -> None:
    fleet = Fleet(engines=1, spec=replace(SLOW, slots=1), queue_timeout_s=60.0)
    result = Replay("residency", fleet).run([arrival(0, "a" * 100), arrival(0.1, "b" * 100)])
    assert result.served == 2
    assert result.simulated_s == pytest.approx(2 * 1.6)


def test_a_replay_tells_the_policy_what_the_router_does() -> None:
    seen = []
    replay = Replay("residency", Fleet(engines=1, spec=SLOW))
    choose = replay.served.choose
    replay.served.choose = lambda ask, *more: seen.append(ask) or choose(ask, *more)  # type: ignore[assignment]
    replay.run([arrival(number * 10, "a" * 100 + last) for number, last in enumerate("bcd")])
    assert [ask.shared_tokens for ask in seen] == [0, 1600, 1600]


def test_turns_never_overtake_one_another() -> None:
    turns = [arrival(0.01 * size, "a" * (size + 100), "s", pause_s=1.0 if size else None) for size in range(5)]
    result = Replay("residency", Fleet(engines=2, spec=SLOW)).run(turns)
    assert result.computed_tokens == 1600 + 4 * 16
    assert result.simulated_s == pytest.approx(1.6 + 4 * 1.016)


def test_the_index_of_caches_stays_in_its_bounds() -> None:
    fleet = Fleet(engines=8, residency_bytes=2**17)
    shape = shape_of("unique")
    rate = request_rate(shape, 8, fleet.spec)
    result = Replay("residency", fleet).run(synthetic(shape, requests=1000, requests_s=rate, seed=1))
    assert result.residency_peak_bytes <= 2**17
    assert result.served == 1000


# --- synthetic traces


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_requests_come_in_order_and_streaming_and_whole(kind: str) -> None:
    shape = shape_of(kind)
    made = list(synthetic(shape, requests=300, requests_s=50.0, seed=3))
    assert len(made) == 300
    assert all(one.arrived_s <= two.arrived_s for one, two in pairwise(made))
    assert made == list(synthetic(shape, requests=300, requests_s=50.0, seed=3))
    # nothing is made before it is asked for
    assert next(synthetic(shape, requests=10**12, requests_s=50.0, seed=3)) == made[0]
    assert made[-1].arrived_s == pytest.approx(6.0, rel=0.7)


def test_turns_go_on_from_the_prompt_and_reply_before_them() -> None:
    made = synthetic(shape_of("multi-turn", turns=3), requests=60, requests_s=5.0, seed=1)
    last: dict[str, Arrival] = {}
    seen = 0
    for each in made:
        if each.session in last:
            before = last[each.session]
            assert each.key.startswith(before.key + before.reply)
            seen += 1
        last[each.session] = each
    assert seen > 20


def test_shared_prompts_share_the_system_prompt_and_unique_ones_nothing() -> None:
    shared, other = list(synthetic(shape_of("shared-prompt", turns=1), requests=2, requests_s=1.0, seed=1))
    assert common_blocks(shared.key, other.key) == 2048 // 16
    one, two = list(synthetic(shape_of("unique"), requests=2, requests_s=1.0, seed=1))
    assert common_blocks(one.key, two.key) == 0


def test_a_wrong_kind_or_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"synthetic='chat'.*multi-turn"):
        shape_of("chat")
    with pytest.raises(ConfigError, match="turns=0"):
        shape_of("unique", turns=0)
    with pytest.raises(ConfigError, match="engines=0"):
        Fleet(engines=0)


# --- recorded traces


def test_a_trace_comes_back_from_its_lines_as_it_was(tmp_path: Path) -> None:
    made = list(synthetic(shape_of("multi-turn", allowance_s=3.5), requests=100, requests_s=5.0, seed=1))
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(trace_lines(made)))
    back = list(read_trace(path))
    assert [replace(each, arrived_s=0, pause_s=None) for each in back] == [
        replace(each, arrived_s=0, pause_s=None) for each in made
    ]
    assert [each.arrived_s for each in back] == pytest.approx([each.arrived_s for each in made], abs=1e-6)
    assert path.stat().st_size < 0.6 * sum(2 * len(each.key + each.reply) for each in made)


def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(trace_lines([arrival(3, "c"), arrival(1, "a"), arrival(2, "b")])))
    assert [each.arrived_s for each in read_trace(path)] == [1, 2, 3]


GOOD = {"arrived_s": 1, "prompt_tokens": 16, "output_tokens": 1, "blocks": "00" * 8}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arrived_s": -1}, "line 2, arrived_s=-1"),
        ({"arrived_s": None}, "line 2, arrived_s=None"),
        ({"prompt_tokens": 0}, "line 2, prompt_tokens=0"),
        ({"blocks": "abc"}, "line 2, blocks='abc'"),
        ({"blocks": "00"}, "line 2, blocks='00'"),
        ({"keep": 1}, "line 2, keep=1"),
        ({"tenant": 7}, "line 2, tenant=7"),
        ({"priority": 11}, "line 2, priority=11"),
        ({"output_tokens": float("nan")}, "line 2, output_tokens=nan"),
        ({"allowance_s": True}, "line 2, allowance_s=True"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_field_and_value(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(ConfigError, match=named):
        list(read_trace(path))


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", '{"trace": "lltm-ray", "version": 2}\n', "no json\n"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="trace"):
        list(read_trace(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_trace(tmp_path / "missing"))


# --- recording


def ask_of(key: bytes, session: str = "s", **more: object) -> Ask:
    return Ask(model="m", key=key, affinity=session, tenant="grace", deadline_s=70.0, **more)  # type: ignore[arg-type]


def recorded(path: Path, *requests: tuple[Ask, float, bytes | None]) -> list[Arrival]:
    choice = Choice("e7", 32, 0.1, ())
    with TraceRecorder(path, clock=lambda: 10.0) as recorder:
        for ask, at_s, reply in requests:
            recorder.record(ask, at_s, 100, 20, choice, reply)
    assert (recorder.written, recorder.dropped) == (len(requests), 0)
    return list(read_trace(path))


def test_a_recorded_conversation_shares_what_its_keys_share(tmp_path: Path) -> None:
    first, reply = b"q" * 5 * KEY_BYTES + b"tail", b"r" * 3 * KEY_BYTES
    second = first + reply + b"more" * KEY_BYTES
    one, two = recorded(tmp_path / "t", (ask_of(first, max_tokens=9), 12.5, reply), (ask_of(second), 60.0, None))
    assert len(one.key) == 5 * 8
    assert len(one.key + one.reply) == 8 * 8
    assert common_blocks(one.key + one.reply, two.key) == 8
    assert (one.arrived_s, one.prompt_tokens, one.output_tokens, one.max_tokens) == (2.5, 100, 20, 9)
    assert (one.engine, one.predicted_tokens, one.allowance_s) == ("e7", 32, 57.5)
    assert one.session == two.session != "s"


def test_a_trace_shows_no_text_no_names_and_another_salt_each_time(tmp_path: Path) -> None:
    request = (ask_of(b"a secret of grace " * 40, "grace's chat"), 11.0, b"the answer" * 20)
    (one,), (two,) = recorded(tmp_path / "1", request), recorded(tmp_path / "2", request)
    text = (tmp_path / "1").read_text()
    assert "secret" not in text
    assert "grace" not in text  # no hex digits spell it
    assert b"secret".hex() not in text
    assert one.key != two.key
    assert one.tenant != two.tenant
    assert stat.S_IMODE((tmp_path / "1").stat().st_mode) == 0o600


def test_a_recorder_that_cannot_keep_up_drops_and_counts(tmp_path: Path) -> None:
    with TraceRecorder(tmp_path / "t", clock=lambda: 0.0, max_pending_bytes=1000, flush_s=60) as recorder:
        for _ in range(5):
            recorder.record(ask_of(b"x" * 400), 0.0, 100, 1, None)
    assert (recorder.written, recorder.dropped) == (2, 3)
    recorder.record(ask_of(b""), 0.0, 1, 1, None)
    assert recorder.dropped == 4


def test_a_recorder_stops_at_its_limit_and_what_is_there_can_be_read(tmp_path: Path) -> None:
    with TraceRecorder(tmp_path / "t", clock=lambda: 0.0, limit_bytes=2000) as recorder:
        for number in range(100):
            recorder.record(ask_of(b"%04d" % number * 100), 0.0, 100, 1, None)
    assert recorder.written + recorder.dropped == 100
    assert 0 < recorder.written < 20
    assert len(list(read_trace(tmp_path / "t"))) == recorder.written


def test_a_file_that_cannot_be_made_is_named_and_a_full_disk_is_no_error_of_the_request(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        TraceRecorder(tmp_path / "no" / "t")
    with TraceRecorder("/dev/full", clock=lambda: 0.0, flush_s=0.001) as recorder:
        recorder.record(ask_of(b"x" * 64), 0.0, 4, 1, None)
    assert (recorder.written, recorder.dropped) == (0, 1)


def test_recording_costs_the_request_path_microseconds(tmp_path: Path) -> None:
    ask, choice, taken = ask_of(b"k" * 8000), Choice("e", 0, 0.1, ()), []
    with TraceRecorder(tmp_path / "t", max_pending_bytes=2**30, flush_s=60) as recorder:
        for _ in range(2000):
            began = time.thread_time_ns()
            recorder.record(ask, 0.0, 100, 10, choice)
            taken.append(time.thread_time_ns() - began)
    assert sorted(taken)[1000] < 15_000


def test_what_a_client_may_write_never_makes_a_trace_unreadable(tmp_path: Path) -> None:
    limits = (-1, 0, 7, 10**400)
    asks = [ask_of(b"x" * KEY_BYTES, max_tokens=each) for each in limits]
    arrivals = recorded(tmp_path / "trace", *((ask, 80.0, None) for ask in asks))
    assert [each.max_tokens for each in arrivals] == [None, None, 7, None]
    assert all(0 < each.allowance_s < 1e-3 for each in arrivals)


async def test_what_the_router_records_can_be_replayed(tmp_path):
    path = tmp_path / "trace.jsonl"
    recorder = TraceRecorder(path)
    router = Router(8, 5.0, record=recorder.record_lease)
    router.update(
        [EngineInfo(name="a", model="m", state=EngineState.READY, url="http://a", slots_total=1, server_pid=1)]
    )
    for turn in range(3):
        lease = await router.acquire(Ask(model="m", key=b"x" * 640 * (turn + 1)))
        router.release(lease, Served(timings=Timings(prompt_n=160 * (turn + 1), predicted_n=5, prompt_ms=1.0)))
    recorder.close()
    arrivals = list(read_trace(path))
    assert [arrival.output_tokens for arrival in arrivals] == [5, 5, 5]
    assert b"xxx" not in path.read_bytes()
