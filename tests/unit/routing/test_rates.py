import random

import pytest

from lltm_ray.records import Timings
from lltm_ray.routing.rates import Rates, Speed


def reply(computed=1000, prefill_tokens_s=2000.0, overhead_s=0.02, generated=101, token_s=0.01) -> Timings:
    return Timings(
        prompt_n=computed,
        prompt_ms=(overhead_s + computed / prefill_tokens_s) * 1e3,
        predicted_n=generated,
        predicted_ms=(generated - 1) * token_s * 1e3,
    )


def test_a_prefill_rate_is_found_through_the_constant_overhead():
    rates = Rates()
    for _ in range(60):
        rates.learn("a", reply(computed=4), busy=1)
        rates.learn("a", reply(computed=1000), busy=1)
    assert rates.prefill_tokens_s("a") == pytest.approx(2000, rel=0.05)
    assert rates.prefill_s("a", 0) == pytest.approx(0.02, rel=0.1)


def test_tiny_prefills_alone_say_nothing_of_the_rate():
    rates = Rates()
    before = rates.prefill_tokens_s("a")
    for _ in range(50):
        rates.learn("a", reply(computed=3, overhead_s=0.5), busy=1)
    assert rates.prefill_tokens_s("a") == before
    assert rates.prefill_s("a", 0) > 0.4


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_a_decode_line_is_found_whatever_its_scale(scale):
    rates, rng = Rates(), random.Random(1)
    for _ in range(200):
        busy = rng.randint(1, 4)
        noise = rng.uniform(0.9, 1.1)
        rates.learn("a", reply(token_s=(0.01 + 0.003 * (busy - 1)) * scale * noise), busy=busy)
    assert rates.decode_s("a", 1) == pytest.approx(0.01 * scale, rel=0.1)
    assert rates.decode_s("a", 4) == pytest.approx(0.019 * scale, rel=0.1)


def test_one_reply_is_enough_to_get_the_scale_right():
    rates = Rates()
    rates.learn("a", reply(prefill_tokens_s=20_000, token_s=0.001, overhead_s=0.0), busy=1)
    assert 8_000 < rates.prefill_tokens_s("a") < 25_000
    assert 0.0005 < rates.decode_s("a", 1) < 0.003
    assert rates.decode_s("a", 4) < 0.006


def test_more_busy_slots_are_never_expected_to_decode_faster():
    rates = Rates()
    for _ in range(100):
        rates.learn("a", reply(token_s=0.02), busy=1)
        rates.learn("a", reply(token_s=0.005), busy=4)
    assert rates.decode_s("a", 4) >= rates.decode_s("a", 1) > 0


def test_one_stalled_reply_does_not_change_the_picture():
    rates = Rates()
    for _ in range(50):
        rates.learn("a", reply(), busy=1)
    rate, decode = rates.prefill_tokens_s("a"), rates.decode_s("a", 1)
    rates.learn("a", reply(prefill_tokens_s=2, token_s=10), busy=1)
    assert rates.prefill_tokens_s("a") > rate * 0.8
    assert rates.decode_s("a", 1) < decode * 1.3


def test_an_engine_that_became_slower_is_seen_as_slower():
    rates = Rates()
    for _ in range(100):
        rates.learn("a", reply(), busy=1)
    for _ in range(150):
        rates.learn("a", reply(prefill_tokens_s=100, token_s=0.2), busy=1)
    assert rates.prefill_tokens_s("a") == pytest.approx(100, rel=0.2)
    assert rates.decode_s("a", 1) == pytest.approx(0.2, rel=0.2)


def test_an_unknown_engine_is_taken_for_the_mean_of_the_others():
    rates = Rates()
    for _ in range(40):
        rates.learn("a", reply(prefill_tokens_s=5000), busy=1)
    assert rates.prefill_tokens_s("new") == pytest.approx(5000, rel=0.1)
    rates.forget("a")
    assert rates.speed("a") is rates.speed("new")


def test_like_engines_have_the_very_same_speed_and_a_slow_one_has_its_own():
    rates, rng = Rates(), random.Random(2)
    for _ in range(100):
        for name in "abcd":
            rates.learn(name, reply(token_s=0.01 * rng.uniform(0.95, 1.05)), busy=1)
    assert rates.speed("a") is rates.speed("b")
    for _ in range(100):
        for name in "abcd":
            rates.learn(name, reply(token_s=0.03 if name == "d" else 0.01), busy=1)
    assert rates.decode_s("d", 1) > 2 * rates.decode_s("a", 1)


def test_a_reply_without_timings_teaches_nothing():
    rates = Rates()
    rates.learn("a", Timings(), busy=1)
    assert rates.requests == 0
    assert rates.speed("a") == Speed()


def test_service_time_and_length_of_replies_are_means_with_a_margin():
    rates = Rates()
    for i in range(400):
        rates.learn("a", reply(generated=50 if i % 2 else 150), busy=1, held_s=1.0 if i % 2 else 3.0)
    assert rates.service_s() == pytest.approx(2.0, abs=0.3)
    assert rates.service_dev_s == pytest.approx(1.0, abs=0.3)
    assert rates.service_s(2) == pytest.approx(rates.service_s() + 2 * rates.service_dev_s)
    assert rates.output_tokens() == pytest.approx(100, abs=15)
    assert rates.output_tokens(10) == 10
    assert rates.output_tokens(-1) == rates.output_tokens()


def test_a_wait_grows_with_those_ahead_and_shrinks_with_the_slots():
    rates = Rates()
    for _ in range(50):
        rates.learn("a", reply(), busy=1, held_s=2.0)
    assert rates.slot_wait_s(4, deviations=0) == pytest.approx(0.5)
    assert rates.slot_wait_s(4, ahead=3, deviations=0) == pytest.approx(2.0)
    assert rates.slot_wait_s(4) >= rates.slot_wait_s(4, deviations=0)


def test_throughput_is_what_a_busy_slot_computes_and_generates_in_a_second():
    rates = Rates()
    assert rates.throughput_tokens_s() > 0
    for _ in range(30):
        rates.learn("a", reply(computed=1000, generated=200), busy=1, held_s=4.0)
    assert rates.throughput_tokens_s() == pytest.approx(300)


def test_what_is_known_can_be_shown():
    rates = Rates()
    rates.learn("a", reply(), busy=2)
    shown = rates.snapshot()
    assert shown["requests"] == 1
    assert shown["engines"]["a"]["prefill_tokens_s"] > 0


def test_a_limit_that_no_float_can_hold_is_no_error():
    assert Rates(output_tokens=100.0).output_tokens(10**400) == 100.0
    assert Rates(output_tokens=100.0).output_tokens(0) == 0.0


@pytest.mark.parametrize("odd_ms", [float("nan"), float("inf"), -1e9])
def test_a_time_that_is_none_spoils_nothing(odd_ms):
    rates = Rates()
    rates.learn("a", Timings(prompt_n=100, prompt_ms=odd_ms, predicted_n=10, predicted_ms=10.0), busy=1)
    assert rates.requests == 0
    assert rates.speed("a") == Speed()


def test_replies_that_took_no_time_by_our_clock_tell_no_throughput():
    rates = Rates()
    rates.learn("a", reply(), busy=1, held_s=0.0)
    assert rates.throughput_tokens_s() == 0.0


def test_an_engine_that_is_passed_over_for_long_gets_another_chance():
    rates = Rates()
    for _ in range(20):
        rates.learn("quick", reply(), busy=1)
        rates.learn("slow", reply(token_s=0.04), busy=1)
    assert "slow" in rates.odd
    assert rates.decode_s("slow", 1) > 2 * rates.decode_s("quick", 1)
    for _ in range(70):
        rates.learn("quick", reply(), busy=1)
    assert "slow" not in rates.odd
    assert rates.decode_s("slow", 1) == rates.decode_s("unknown", 1)
    rates.learn("slow", reply(token_s=0.04), busy=1)
    assert rates.decode_s("slow", 1) > 1.5 * rates.decode_s("quick", 1), "it is as slow as before and nobody noticed"


def played(slowness: float, scatter: float, seed: int) -> Rates:
    """Four engines of four slots; what holds up a batch holds up all of its replies. Engine d is so much slower."""
    rates, rng = Rates(), random.Random(seed)
    for _ in range(40):
        for name in "abcd":
            held_up = rng.lognormvariate(0, scatter) * (slowness if name == "d" else 1.0)
            for _ in range(4):
                factor = held_up * rng.uniform(0.9, 1.1)
                told = reply(computed=150, prefill_tokens_s=2000 / factor, generated=32, token_s=0.01 * factor)
                rates.learn(name, told, busy=4)
    return rates


def test_engines_that_are_held_up_now_and_then_are_all_taken_for_the_mean():
    for rates in (played(1.0, 0.5, seed) for seed in range(10)):
        assert all(rates.speed(name) is rates.speed("new") for name in "abcd")


def test_an_engine_that_is_always_slower_stands_out_of_a_wide_scatter():
    found = [rates.decode_s("d", 4) / rates.decode_s("a", 4) for rates in (played(3.0, 0.4, seed) for seed in range(5))]
    assert min(found) > 2
