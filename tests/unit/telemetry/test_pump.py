"""Queues in front of exporters: bounded, apart from each other, quiet, and over their trouble by themselves."""

import logging
import threading
import time

import pytest

from lltm_ray.telemetry import pump as pumps
from lltm_ray.telemetry.pump import Pump, Reporter, overhear


class Destination:
    """Takes batches; refuses while `is_down`, hangs while `hang` is set."""

    def __init__(self):
        self.items, self.is_down, self.closed = [], False, 0
        self.may_go = threading.Event()
        self.may_go.set()

    def send(self, batch):
        self.may_go.wait(60)
        if self.is_down:
            raise ConnectionError("nobody at //user:secret@host")
        self.items += batch

    def close(self):
        self.closed += 1
        self.may_go.set()


@pytest.fixture
def destination():
    return Destination()


@pytest.fixture
def make(destination, monkeypatch):
    monkeypatch.setattr(pumps, "_SHORTEST_PAUSE_S", 0.01)
    monkeypatch.setattr(pumps, "_LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(pumps, "_LINGER_S", 0.02)
    made = []

    def make(capacity=1000, to=destination):
        made.append(Pump("there", to.send, capacity, to.close))
        return made[-1]

    yield make
    destination.may_go.set()
    for each in made:
        each.shutdown(0.0)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_items_arrive_in_order_without_a_flush(make, destination):
    pump = make()
    for number in range(100):
        pump.put([number])
    wait_for(lambda: pump.counts().sent == 100)
    assert destination.items == list(range(100))
    assert pump.counts() == (0, 100, 0, 0, "")


def test_a_destination_that_hangs_costs_the_oldest_and_the_sender_nothing(make, destination):
    pump = make(capacity=100)
    destination.may_go.clear()
    pump.put([-1])
    wait_for(lambda: pump.counts().queued == 1 and not pump._items)
    began = time.thread_time()
    for number in range(10_000):
        pump.put([number])
    assert (time.thread_time() - began) / 10_000 < 100e-6
    assert pump.counts()[:3] == (100, 0, 9901)
    destination.may_go.set()
    assert pump.flush(10)
    assert destination.items == [-1, *range(9901, 10_000)]


def test_a_destination_that_comes_back_gets_what_waited(make, destination, caplog):
    caplog.set_level(logging.INFO)
    pump = make()
    destination.is_down = True
    pump.put([1, 2])
    wait_for(lambda: pump.counts().failures >= 3)
    assert pump.counts().error == "ConnectionError: nobody at //***@host"
    destination.is_down = False
    pump.put([3])
    assert pump.flush(10)
    assert destination.items == [1, 2, 3]
    assert pump.counts().error == ""
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "secret" not in caplog.text


def test_a_batch_that_is_never_taken_does_not_block_the_next_for_ever(make, destination, monkeypatch):
    monkeypatch.setattr(pumps, "_TRIES", 3)
    pump = make()
    destination.is_down = True
    pump.put(["poison"])
    wait_for(lambda: pump.counts().dropped == 1)
    destination.is_down = False
    pump.put(["good"])
    assert pump.flush(10)
    assert destination.items == ["good"]


def test_a_batch_that_is_too_large_is_sent_in_parts(make):
    class Narrow(Destination):
        def send(self, batch):
            if len(batch) > 40:
                return False
            return super().send(batch)

    narrow = Narrow()
    pump = make(to=narrow)
    pump.put(range(900))
    assert pump.flush(20)
    assert narrow.items == list(range(900))
    assert pump.counts()[:3] == (0, 900, 0)


def test_credentials_in_a_failures_url_are_not_told(make, destination):
    reporter = Reporter("x")

    def fail():
        raise OSError("cannot reach http://u:secret@h:1/v1?token=secret (is it up?)")

    assert not reporter.attempt(fail)
    assert reporter.error == "OSError: cannot reach http://***@h:1/v1?*** (is it up?)"


def test_shutdown_flushes_and_closes_once(make, destination):
    pump = make(capacity=1000)
    destination.may_go.clear()
    pump.put(range(5000))
    destination.may_go.set()
    pump.shutdown(10)
    pump.put([1])
    assert len(destination.items) == 1000
    assert pump.counts() == (0, 1000, 4001, 0, "")
    assert destination.closed == 1
    assert not pump._thread.is_alive()


def test_shutdown_keeps_its_deadline_though_the_destination_hangs(make, destination):
    pump = make()
    destination.may_go.clear()
    pump.put([1, 2])
    began = time.monotonic()
    pump.shutdown(0.2)
    assert time.monotonic() - began < 20.0
    assert pump.counts().dropped == 2


def test_lines_of_an_exporter_are_overheard_in_our_threads_only(make, caplog):
    overhear()
    noisy = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")

    class Noisy(Destination):
        def send(self, batch):
            noisy.warning("Transient error, %s", "retrying")
            return False

    pump = make(to=Noisy())
    pump.put([1])
    wait_for(lambda: pump.counts().failures >= 5)
    noisy.warning("another program's")
    told = [record.getMessage() for record in caplog.records]
    assert told == ["telemetry exporter there fails (1 times so far): Transient error, retrying", "another program's"]
