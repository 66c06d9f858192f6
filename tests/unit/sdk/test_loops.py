"""The loop under the blocking faces: what waits on it always gets an answer."""

import asyncio
import threading

import pytest

from lltm_ray._loop import Loop
from lltm_ray.errors import FleetError


@pytest.fixture
def loop():
    loop = Loop("Cluster", "start another one")
    yield loop
    loop.stop()


def test_a_call_that_waits_is_told_when_its_object_is_closed(loop):
    begun, errors = threading.Event(), []

    async def endless():
        begun.set()
        await asyncio.sleep(3600)

    def wait():
        try:
            loop.run(endless())
        except FleetError as error:
            errors.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert begun.wait(60)
    loop.stop()
    waiter.join(60)
    assert errors == ["this Cluster object was closed while the call ran"]


def test_a_loop_may_be_stopped_twice_and_then_refuses_work(loop):
    assert not loop.is_closed
    loop.stop()
    loop.stop()
    assert loop.is_closed
    with pytest.raises(FleetError, match="start another one"):
        loop.run(asyncio.sleep(0))


def test_work_that_its_own_thread_asks_for_is_done_without_waiting(loop):
    done = threading.Event()

    async def work():
        done.set()

    async def within():
        return loop.run(work())

    assert loop.run(within()) is None
    assert done.wait(60)


def test_a_generator_that_is_left_open_is_closed_with_its_loop(loop):
    closed = []

    async def numbers():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    async def first(values):
        return await anext(values)

    values = numbers()
    assert loop.run(first(values)) == 1
    loop.stop()
    assert closed == [True]
