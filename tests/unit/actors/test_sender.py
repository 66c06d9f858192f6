"""A process's rows go to the telemetry actor in steps that the event loop hardly feels."""

import asyncio
import subprocess
import sys
import time

import ray

from lltm_ray.actors import sender as module
from lltm_ray.actors.sender import MOST_IN_FLIGHT, Sender
from lltm_ray.telemetry.outbox import BATCH_ROWS
from tests.unit.telemetry.rows_made import slot_row


class Remote:
    """As an actor's handle, in this process; answers when told to."""

    def __init__(self):
        self.taken, self.senders, self.may_answer = [], [], asyncio.Event()
        self.put = self

    async def remote(self, sender, parcel, dropped):
        self.senders.append(sender)
        if parcel:
            self.taken.append(parcel["slots"].rows)
            await self.may_answer.wait()


def fill(sender, batches):
    for _ in range(batches * BATCH_ROWS):
        sender.outbox.add("slots", slot_row())


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def sending(sender, check):
    task = asyncio.create_task(sender.run())
    try:
        await check
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_one_batch_a_step_and_few_in_flight(monkeypatch):
    async def run():
        remote, steps = Remote(), 0
        monkeypatch.setattr(module, "find", lambda _name: remote)
        sender = Sender("f", "gateway")
        at_step = []
        take = sender.outbox.take

        def noting():
            at_step.append(steps)
            return take()

        sender.outbox.take = noting

        async def count():
            nonlocal steps
            while True:
                steps += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        fill(sender, MOST_IN_FLIGHT + 2)
        await sending(sender, until(lambda: len(remote.taken) == MOST_IN_FLIGHT))
        counting.cancel()
        return remote, at_step

    remote, at_step = asyncio.run(run())
    assert remote.taken == [BATCH_ROWS] * MOST_IN_FLIGHT
    assert len(set(at_step)) == len(at_step) == MOST_IN_FLIGHT
    assert {name.partition("/")[0] for name in remote.senders} == {"gateway"}
    assert len(set(remote.senders)) == 1


def test_every_start_of_a_process_has_a_name_of_its_own(monkeypatch):
    async def run():
        remote = Remote()
        monkeypatch.setattr(module, "find", lambda _name: remote)
        for _ in range(2):
            sender = Sender("f", "gateway")
            fill(sender, 1)
            await sending(sender, until(lambda: remote.taken))
            remote.taken.clear()
        return remote.senders

    assert len(set(asyncio.run(run()))) == 2


def test_rays_head_may_be_away_for_a_while(monkeypatch):
    async def run():
        remote, asked = Remote(), []

        def find(_name):
            asked.append(time.monotonic())
            if len(asked) < 3:
                raise ray.exceptions.RaySystemError("no head")
            return remote

        monkeypatch.setattr(module, "find", find)
        sender = Sender("f", "gateway")
        fill(sender, 1)
        await sending(sender, until(lambda: remote.taken))
        return remote.taken

    assert asyncio.run(run()) == [BATCH_ROWS]


def test_a_process_without_telemetry_loads_neither_pyarrow_nor_opentelemetrys_sdk():
    program = """
import importlib, sys
for name in ("actors.engine", "actors.fleet", "actors.gateway", "actors.node", "driver"):
    importlib.import_module(f"lltm_ray.{name}")
    print(name, {"pyarrow", "opentelemetry.sdk"} & set(sys.modules))
"""
    done = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if not line.endswith(" set()")] == []
    assert len(done.stdout.splitlines()) == 5


def test_a_process_that_sends_loads_no_pandas():
    program = """
import sys
from lltm_ray.actors.sender import Sender
outbox = Sender("f", "serve").outbox
outbox.add("slots", (1, "e", 0, True, 7, 3, 2, 64))
print(outbox.take()["slots"].rows, "pandas" in sys.modules)
"""
    done = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"
