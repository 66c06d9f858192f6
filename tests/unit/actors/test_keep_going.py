"""What an actor does for ever goes on after an exception that nobody expected; no Ray."""

import asyncio
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lltm_ray.actors import calls as driver_calls
from lltm_ray.actors import controller as controllers
from lltm_ray.actors import directory as directories
from lltm_ray.actors import front as fronts
from lltm_ray.actors import orphan, watch
from lltm_ray.actors.calls import Calls
from lltm_ray.actors.controller import Controller, ControllerSpec, Move
from lltm_ray.actors.crew import Crew
from lltm_ray.actors.directory import Directory
from lltm_ray.actors.fleet import Fleet
from lltm_ray.actors.front import Front
from lltm_ray.actors.watch import keep_going
from lltm_ray.config import FleetConfig
from lltm_ray.records import EngineInfo, EngineState, FleetStatus
from lltm_ray.routing.router import Router

READY = EngineInfo(name="engine-0", model="tiny", state=EngineState.READY, url="http://127.0.0.1:1", slots_total=2)
TABLE = FleetStatus(name="f", engines=(READY,), version=7)


class Flaky:
    """Does what it wraps, but only from the second time on."""

    def __init__(self, work):
        self.work, self.calls = work, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 1:
            raise ZeroDivisionError("nobody expected this")
        return self.work(*args)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_each_try_waits_longer_up_to_a_limit_and_everything_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(watch, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(watch, "RETRY_MAX_S", 0.04)
    began = []

    async def work():
        began.append(time.monotonic())
        if len(began) < 6:
            raise ZeroDivisionError("nobody expected this")

    await keep_going("divide", work)
    pauses = [after - before for before, after in itertools.pairwise(began)]
    assert all(pause >= wanted for pause, wanted in zip(pauses, (0.01, 0.02, 0.04, 0.04, 0.04), strict=True)), pauses
    assert caplog.text.count("could not go on to divide") == 5
    assert caplog.text.count("ZeroDivisionError: nobody expected this") == 5


async def test_a_cancelled_work_is_not_taken_up_again():
    task = asyncio.create_task(keep_going("wait", lambda: asyncio.sleep(60)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_front_that_trips_over_a_table_takes_it_again(monkeypatch, caplog):
    async def tables(_fleet):
        yield TABLE
        await asyncio.Event().wait()

    monkeypatch.setattr(fronts, "watch_fleet", tables)
    front, router = Front.__new__(Front), Router(1, 1.0)
    front._fleet, front._name, front._ledger, front._others = "f", "g", None, SimpleNamespace(names=())
    front._sender = front._tracing = None
    front._router = SimpleNamespace(update=Flaky(router.update), hint=router.hint)
    front.app = SimpleNamespace(leveller=SimpleNamespace(run=asyncio.Event().wait))
    following = asyncio.create_task(front.follow())
    await until(router.ready)
    following.cancel()
    assert [engine.name for engine in router.ready()] == ["engine-0"]
    assert "nobody expected this" in caplog.text


async def test_a_driver_that_trips_over_a_table_takes_it_again_and_says_so(monkeypatch, caplog):
    async def tables(_fleet):
        yield TABLE
        await asyncio.Event().wait()

    async def status():
        return replace(TABLE, engines=())

    monkeypatch.setattr(driver_calls, "watch_fleet", tables)
    directory = SimpleNamespace(status=SimpleNamespace(remote=status), wake=SimpleNamespace(remote=None))
    calls = Calls(Fleet(config=FleetConfig(name="f"), run_id="r", directory=directory))
    await calls.open()
    monkeypatch.setattr(calls, "_learn", Flaky(calls._learn))
    await until(calls._router.ready)
    await calls.close()
    assert [engine.name for engine in calls._router.ready()] == ["engine-0"]
    assert "could not go on to follow the directory" in caplog.text
    assert "nobody expected this" in caplog.text


async def test_a_directory_tells_how_long_it_stood_still(monkeypatch):
    monkeypatch.setattr(directories, "LOOK_EVERY_S", 0.1)
    one, stood = Directory.__new__(Directory), []
    one._table = SimpleNamespace(expire=lambda _now_s, stood_s: stood.append(stood_s))
    looking = asyncio.create_task(one._expire())
    await asyncio.sleep(0)
    time.sleep(0.5)  # as a whole process that is stopped
    await until(lambda: len(stood) > 5)
    looking.cancel()
    assert 0.35 <= stood[0] < 60
    assert min(stood[1:]) < 0.3, "it stood still once"


async def test_an_engine_that_stood_still_looks_for_its_directory_before_it_ends_itself(monkeypatch):
    monkeypatch.setattr(orphan, "ORPHANED_AFTER_S", 0.3)
    monkeypatch.setattr(orphan, "LOOK_EVERY_S", 0.1)
    looks, run_id = [], "r"

    async def describe():
        looks.append(run_id)
        return None, run_id, ()

    directory = SimpleNamespace(describe=SimpleNamespace(remote=describe))
    monkeypatch.setattr(orphan, "get_directory", lambda _fleet: directory)
    alone = asyncio.create_task(orphan.until_orphaned("f", "r"))
    await until(lambda: looks)
    time.sleep(0.5)  # as a whole process that is stopped
    before = len(looks)
    await until(lambda: alone.done() or len(looks) > before + 1)
    assert not alone.done()
    run_id = "another"
    await asyncio.wait_for(alone, 60)


def controller():
    crew = Crew(config=FleetConfig(name="f"), run_id="r", gateway_node_id=None)
    return Controller(ControllerSpec(crew=crew, models=crew.config.served()))


async def test_a_controller_that_trips_over_a_table_looks_again(monkeypatch, caplog):
    looked, one = asyncio.Event(), controller()

    async def word(_version, _timeout_s):
        return TABLE

    async def look(status):
        assert status is TABLE
        looked.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(
        controllers, "get_directory", lambda _fleet: SimpleNamespace(watch=SimpleNamespace(remote=word))
    )
    monkeypatch.setattr(one, "_sweep", lambda: None)
    monkeypatch.setattr(one, "_look", Flaky(look))
    life = asyncio.create_task(one.run())
    await asyncio.wait_for(looked.wait(), 60)
    life.cancel()
    assert "could not go on to look after fleet f" in caplog.text


async def test_a_start_that_breaks_off_gives_its_share_back_and_the_next_one_waits(monkeypatch, caplog):
    one, ended = controller(), []

    async def bring_up(_move):
        raise OSError("nobody expected this")

    async def end(name):
        ended.append(name)

    monkeypatch.setattr(one, "_bring_up", bring_up)
    monkeypatch.setattr(one, "_end", end)
    move = Move(engine="engine-1", model="tiny", is_start=True)
    one._run(move, one._start(move))
    await move.task
    assert ended == ["engine-1"]
    assert one.snapshot()["models"]["tiny"]["failures"] == 1
    assert not one.snapshot()["moves"]
    assert "nobody expected this" in caplog.text
