"""Joules of requests add up to what the GPU's counter says."""

import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.telemetry.energy import PATIENCE_S, SETTLE_S, Energy
from lltm_ray.telemetry.joules import Joules
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


def look(energy: Energy, second: float, busy: int, engine: str = "engine-0") -> None:
    at = int((BASE_S + second) * 1e9)
    energy.add_slots(
        [slot_row(at_unix_nano=at, slot=each, is_processing=each < busy, engine=engine) for each in (0, 1)]
    )


def read(energy: Energy, seconds: range, watts: float = 100.0, uuid: str = "GPU-1") -> None:
    energy.add_gpus([gpu_row(at_unix_nano=(BASE_S + at) * 10**9, energy_j=watts * at, uuid=uuid) for at in seconds])


def test_a_whole_answer_works_from_when_it_was_sent_though_its_headers_come_last(energy: Energy) -> None:
    ticks(energy, [100.0] * 4, busy=[0, 1, 1, 0, 0])
    request(energy, 1.0, 3.0, span_id="whole", headers_s=1.995)
    assert settle(energy, 5 + SETTLE_S) == pytest.approx({"whole": 200.0})
    assert energy.balances["GPU-1"].idle_j == pytest.approx(200.0)


def test_a_request_after_a_pause_gets_its_joules_though_idle_slots_are_seldom_looked_at(energy: Energy) -> None:
    looks = {-1.9: 0, 0.0: 0, 2.0: 1} | {2.0 + half / 2: 1 for half in range(1, 37)} | {20.5: 0, 22.5: 0, 24.5: 0}
    told: dict[str, float] = {}
    for second in range(30):
        read(energy, range(second, second + 1))
        for at in [at for at in looks if second - 1 < at <= second]:
            look(energy, at, looks[at])
        if second == 21:
            request(energy, 0.1, 20.1, first=1.0, span_id="long")
        told |= settle(energy, second)
    assert told == pytest.approx({"long": 2000.0})


def test_an_interval_waits_for_a_look_at_its_slots_unless_nobody_looks_any_more(energy: Energy) -> None:
    read(energy, range(3))
    look(energy, -0.5, 0)
    assert settle(energy, 2 + SETTLE_S) == {}
    assert energy.balances["GPU-1"].total_j == 0
    settle(energy, 20)
    assert energy.balances["GPU-1"].idle_j == pytest.approx(200.0)


def test_ten_minutes_of_one_busy_slot_and_20000_users_settle_in_two_seconds_of_cpu(energy: Energy) -> None:
    read(energy, range(601))
    for half in range(1202):
        look(energy, half / 2, 2 if half < 1200 else 0)
    for number in range(20_000):
        start = number * 598 / 20_000
        request(energy, start, start + 2.0, span_id=f"{number}", request_span_id=f"{number}")
    request(energy, 0.0, 600.0, span_id="long")
    begun = time.process_time()
    told: dict[str, float] = {}
    for second in range(10):
        told |= settle(energy, 602 + second)
    assert time.process_time() - begun < 2.0
    assert len(told) == 20_001
    assert sum(told.values()) == pytest.approx(60_000.0)


def test_a_settle_that_has_to_wait_costs_the_same_however_much_waits(energy: Energy) -> None:
    read(energy, range(500))
    look(energy, 0.5, 2)
    look(energy, 499.5, 2)
    for number in range(15_000):
        request(energy, 1 + number / 40, 2 + number / 40, span_id=f"{number}")
    begun = time.process_time()
    for _ in range(200):
        assert settle(energy, 500) == {}
    assert time.process_time() - begun < 1.0


def test_what_waits_is_bounded_and_the_oldest_is_settled_with_what_is_known(energy: Energy) -> None:
    read(energy, range(600))
    for half in range(1200):
        look(energy, half / 2, 2)
    for number in range(25_000):
        request(energy, 500 + number / 300, 500.01 + number / 300, span_id=f"{number}")
    for _ in range(5):
        settle(energy, 599 + SETTLE_S)
    assert energy.balances["GPU-1"].unattributed_j == pytest.approx(50_000.0, rel=0.01)
    assert len(energy._gpus["GPU-1"].coming) <= 20_000


def test_users_of_a_gpu_whose_counter_is_never_read_are_dropped(energy: Energy) -> None:
    request(energy, 0.0, 1.0, span_id="a")
    settle(energy, 5)
    assert energy._gpus["GPU-1"].coming
    settle(energy, 60)
    energy.forget(BASE_S + 60)
    assert energy._gpus == {}


def test_engines_that_are_gone_are_forgotten(energy: Energy) -> None:
    for number in range(100):
        energy.add_servers([server_row(at_unix_nano=BASE_S * 10**9, engine=f"e{number}", gpu_uuids="GPU-1")])
        look(energy, 0.0, 1, f"e{number}")
    energy.forget(BASE_S + 10)
    assert len(energy._looks) == 100
    energy.forget(BASE_S + 2 * PATIENCE_S)
    assert (energy._homes, dict(energy._looks)) == ({}, {})


class Readers:
    """Of metrics, as OpenTelemetry's reader calls them."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[None], Iterable[object]]] = []

    def observe(self, name: str, kind: str, unit: str, text: str, read: Callable[[Any], Iterable[Any]]) -> None:
        self.callbacks.append(read)


def test_metrics_are_read_while_gpus_come(energy: Energy) -> None:
    readers, over = Readers(), threading.Event()
    errors: list[Exception] = []
    Joules(energy, readers)

    def scrape() -> None:
        while not over.is_set():
            try:
                for callback in readers.callbacks:
                    list(callback(None))
            except Exception as error:
                errors.append(error)

    thread, interval_s = threading.Thread(target=scrape), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    for number in range(2000):
        energy.add_gpus([gpu_row(uuid=f"GPU-{number}", energy_j=1.0)])
    over.set()
    thread.join()
    sys.setswitchinterval(interval_s)
    assert errors == []


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
