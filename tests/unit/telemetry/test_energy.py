"""Joules of requests add up to what the GPU's counter says."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.telemetry.energy import PATIENCE_S, SETTLE_S, Energy
from tests.unit.telemetry.rows_made import attempt_row, gpu_row, request_row, server_row, slot_row

BASE_S = 1_700_000_000


def ticks(energy: Energy, watts: list[float], *, busy: list[int] | None = None, uuid: str = "GPU-1") -> None:
    """A reading each second; `busy` slots of engine-0 at each."""
    joules = 0.0
    for second, power in enumerate([0.0, *watts]):
        joules += power
        at = (BASE_S + second) * 10**9
        energy.add_gpus([gpu_row(at_unix_nano=at, energy_j=joules, uuid=uuid)])
        slots = busy[second] if busy else 0
        looks = [slot_row(at_unix_nano=at + 5 * 10**8, slot=each, is_processing=each < slots) for each in range(4)]
        energy.add_slots(looks)


def home(energy: Energy, engine: str = "engine-0", uuids: str = "GPU-1") -> None:
    energy.add_servers([server_row(at_unix_nano=1, engine=engine, gpu_uuids=uuids)])


def request(energy: Energy, start: float, end: float, *, first: float = math.nan, **changes: object) -> None:
    """One attempt from `start` to `end`, seconds after the first reading."""
    row = request_row(arrived_unix_nano=int((BASE_S + start) * 1e9), total_s=end - start)
    told = {"sent_s": 0.0, "headers_s": 0.0, "first_s": first - start, "ended_s": end - start}
    energy.add_request(row, [attempt_row(**told | changes)])


def settle(energy: Energy, seconds: float) -> dict[str, float]:
    return {share.span_id: share.joules for share in energy.settle(BASE_S + seconds)}


@pytest.fixture
def energy() -> Energy:
    energy = Energy()
    home(energy)
    return energy


def test_one_request_alone_takes_all_of_its_time_and_none_of_the_idle(energy: Energy) -> None:
    ticks(energy, [10.0, 100.0, 100.0, 10.0])
    request(energy, 1.0, 3.0, span_id="a")
    assert settle(energy, 4 + SETTLE_S) == pytest.approx({"a": 200.0})
    balance = energy.balances["GPU-1"]
    assert (balance.attributed_j, balance.idle_j, balance.total_j) == pytest.approx((200.0, 20.0, 220.0))


def test_requests_at_the_same_time_share_by_their_tokens(energy: Energy) -> None:
    ticks(energy, [100.0])
    request(energy, 0.0, 1.0, span_id="a", computed_tokens=0, generated_tokens=30)
    request(energy, 0.0, 1.0, span_id="b", computed_tokens=10, generated_tokens=0)
    assert settle(energy, 1 + SETTLE_S) == pytest.approx({"a": 75.0, "b": 25.0})


def test_prefill_and_decode_take_what_was_used_while_they_ran(energy: Energy) -> None:
    ticks(energy, [300.0, 100.0, 100.0])
    request(energy, 0.0, 3.0, first=1.0, span_id="a", computed_tokens=50, generated_tokens=50)
    request(energy, 1.0, 3.0, span_id="b", computed_tokens=0, generated_tokens=50)
    assert settle(energy, 3 + SETTLE_S) == pytest.approx({"a": 400.0, "b": 100.0})


def test_an_engine_over_two_gpus_pays_for_both(energy: Energy) -> None:
    home(energy, "wide", "GPU-1,GPU-2")
    ticks(energy, [100.0])
    ticks(energy, [60.0], uuid="GPU-2")
    home(energy, "engine-0", "GPU-1")
    request(energy, 0.0, 1.0, span_id="a", engine="wide")
    assert settle(energy, 1 + SETTLE_S) == pytest.approx({"a": 160.0})


def test_an_interval_waits_for_the_requests_of_its_busy_slots(energy: Energy) -> None:
    ticks(energy, [100.0, 100.0, 100.0], busy=[2, 1, 1, 0])
    request(energy, 0.0, 1.5, span_id="short", computed_tokens=0, generated_tokens=15)
    assert settle(energy, 3 + SETTLE_S) == {}
    request(energy, 0.0, 3.0, span_id="long", computed_tokens=0, generated_tokens=30)
    shares = settle(energy, 4 + SETTLE_S)
    assert shares["short"] == pytest.approx(50 + 100 / 3)
    assert sum(shares.values()) == pytest.approx(300.0)


def test_what_never_becomes_known_is_told_as_unattributed(energy: Energy) -> None:
    ticks(energy, [100.0], busy=[2, 0])
    request(energy, 0.0, 1.0, span_id="a")
    assert settle(energy, 2 + SETTLE_S) == {}
    assert settle(energy, 2 + PATIENCE_S) != {}
    balance = energy.balances["GPU-1"]
    assert balance.unattributed_j > 0
    assert balance.total_j == pytest.approx(100.0)


def test_readings_far_apart_and_counters_that_fall_are_not_joined(energy: Energy) -> None:
    for at, joules in ((0, 0.0), (100, 9000.0), (101, 5.0), (102, 25.0)):
        energy.add_gpus([gpu_row(at_unix_nano=(BASE_S + at) * 10**9, energy_j=joules)])
    energy.settle(BASE_S + 200)
    assert energy.balances["GPU-1"].total_j == pytest.approx(20.0)


def test_what_ran_while_nobody_read_the_counter_costs_nothing_known(energy: Energy) -> None:
    request(energy, -2.0, 1.0, span_id="began before the first reading")
    ticks(energy, [100.0, 100.0])
    request(energy, 1.0, 2.0, span_id="seen")
    shares = settle(energy, 2 + SETTLE_S)
    assert set(shares) == {"seen"}


def test_a_device_without_a_counter_has_no_balance(energy: Energy) -> None:
    energy.add_gpus([gpu_row(energy_j=None)])
    energy.settle(BASE_S + 100)
    assert energy.balances == {}


def test_an_engine_on_no_gpu_costs_no_joules(energy: Energy) -> None:
    home(energy, "cpu", "")
    ticks(energy, [10.0])
    request(energy, 0.0, 1.0, span_id="a", engine="cpu")
    assert settle(energy, 1 + SETTLE_S) == {}
    assert energy.balances["GPU-1"].attributed_j == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_shares_and_idle_add_up_to_the_counter(seed: int) -> None:
    rng = random.Random(seed)
    energy = Energy()
    home(energy)
    watts = [rng.uniform(0, 700) for _ in range(21)]
    ticks(energy, watts)
    for number in range(rng.randrange(30)):
        start = rng.uniform(0, 18)
        end = min(20.0, start + rng.uniform(0.01, 6))
        tokens = {"computed_tokens": rng.randrange(500), "generated_tokens": rng.randrange(1, 200)}
        request(energy, start, end, first=rng.uniform(start, end), span_id=f"{number}", **tokens)
    shares = settle(energy, 22 + SETTLE_S)
    balance = energy.balances["GPU-1"]
    assert balance.total_j == pytest.approx(sum(watts))
    assert sum(shares.values()) == pytest.approx(balance.attributed_j)
    assert all(joules >= 0 for joules in shares.values())
