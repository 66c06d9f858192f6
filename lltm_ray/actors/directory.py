"""The directory: which engines and gateways exist, for everyone who routes or asks.

Engines and gateways heartbeat into it; routers long-poll `watch`. It persists its table, and after a restart its first
watchers see that table until heartbeats renew it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray._shelf import Shelf
from lltm_ray.actors.crew import Crew
from lltm_ray.actors.directory_table import Table
from lltm_ray.actors.launch import models_of
from lltm_ray.actors.mender import Mender
from lltm_ray.actors.node import NodeActor
from lltm_ray.actors.placement import name_engines
from lltm_ray.actors.remote import actor
from lltm_ray.actors.watch import keep_going
from lltm_ray.config import FleetConfig, ModelConfig, read_environment
from lltm_ray.records import (
    Adapter,
    EngineInfo,
    EngineState,
    FleetStatus,
    GatewayInfo,
    Hints,
    ModelState,
    ServerCounters,
)
from lltm_ray.routing.gossip import Board, SlotDigest, SlotSample

LOOK_EVERY_S = 0.5
"""For missed heartbeats."""


class Directory:
    """One per fleet, named `lltm:<fleet>:directory`."""

    def __init__(self, crew: Crew, models: tuple[ModelConfig, ...], salt: bytes) -> None:
        config, engines = crew.config, name_engines(models)
        self._plan = (config, crew.run_id, tuple(engines))
        self._run_dir = read_environment().run_dir(config.name, crew.run_id)
        self._table = Table(config.name, self._run_dir / "directory.json", models_of(config), salt)
        self._news = asyncio.Condition()
        self._board = Board()
        self._samplers: dict[str, Any] = {}
        self._counters: dict[str, ServerCounters] = {}
        self._duties = [asyncio.create_task(keep_going("look for missed heartbeats", self._expire))]
        self._mender: Mender | None = None
        if not config.is_elastic:  # the controller's duty there
            self._mender = Mender(crew, engines, self._table, self._tell)
            self._duties.append(asyncio.create_task(keep_going("replace lost engines", self._mender.run)))

    async def register(self, info: EngineInfo) -> None:
        """An engine's heartbeat or change of state."""
        if info.state in (EngineState.READY, EngineState.DRAINING):  # before, it would slow their start
            self._ensure_sampler(info.node_id)
        await self._tell(self._table.register(info, time.monotonic()))

    async def register_gateway(self, info: GatewayInfo) -> None:
        """A gateway's heartbeat or change of state."""
        await self._tell(self._table.register_gateway(info, time.monotonic()))

    async def report_slots(self, busy: dict[str, int], samples: list[SlotSample]) -> None:
        """Busy slots per engine, and what changed in slots, from a node's sampler."""
        self._table.report_busy(busy)
        self._board.post("", samples)

    async def exchange_slots(self, gateway: str, told: list[SlotDigest], after: int) -> tuple[int, list[Any]]:
        """Take what a gateway did with slots; what others did, and samplers saw, since that version of the board."""
        self._board.post(gateway, told)
        return self._board.read(gateway, after)

    async def report_counters(self, counters: list[ServerCounters]) -> None:
        """Servers' own token counters, from a node's sampler."""
        self._counters |= {each.engine: each for each in counters}

    async def counters(self) -> list[ServerCounters]:
        """The latest counters of each engine that exists."""
        known = {engine.name for engine in self._table.status().engines}
        self._counters = {name: each for name, each in self._counters.items() if name in known}
        return list(self._counters.values())

    async def remove(self, name: str) -> None:
        """Forget what was stopped on purpose."""
        await self._tell(self._table.remove(name))

    async def retire(self, name: str) -> None:
        """Show an engine as draining from here on: routers give it no more requests."""
        await self._tell(self._table.retire(name))

    async def new_name(self, taken: tuple[str, ...]) -> str:
        """A name for one more engine."""
        return self._table.new_name({*self._plan[2], *taken})

    async def wake(self, model: str) -> None:
        """A request asks for a model that has no ready engine."""
        await self._tell(self._table.wake(model))

    async def note_models(self, notes: dict[str, tuple[ModelState, str]]) -> None:
        """The controller's words on models that do not start, or wait for room."""
        await self._tell(self._table.note_models(notes))

    async def note_adapters(self, model: str, before: tuple[Adapter, ...], after: tuple[Adapter, ...]) -> bool:
        """As `Table.note_adapters`."""
        await self._tell(done := self._table.note_adapters(model, before, after))
        return done

    async def note_shelf(self, shelf: Shelf) -> None:
        """The controller's words on saved slots."""
        await self._tell(self._table.note_shelf(shelf))

    async def hint(self, hints: Hints) -> None:
        """What analytics tells routers."""
        self._table.hint(hints)
        await self._tell(True)

    async def describe(self) -> tuple[FleetConfig, str, tuple[str, ...]]:
        """Settings, run id and engine names, for those who find the fleet by its name."""
        return self._plan

    async def status(self) -> FleetStatus:
        """The whole table now."""
        return self._table.status()

    async def watch(self, version: int, timeout_s: float = 10.0) -> FleetStatus:
        """The table as soon as it is newer than `version`, or as it is after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(lambda: self._table.version > version)
        return self._table.status()

    async def end_repairs(self) -> None:
        """Before the fleet is stopped: from here on no engine is made."""
        if self._mender is not None:
            await self._mender.close()

    async def close(self) -> None:
        """Last words before the actor is killed: the run's files go."""
        for duty in self._duties:
            duty.cancel()
        self._table.is_closed = True  # late heartbeats must not bring the files back
        await asyncio.to_thread(shutil.rmtree, self._run_dir, ignore_errors=True)

    def _ensure_sampler(self, node_id: str) -> None:
        """One sampler for each node that holds engines; they are this actor's children and end with it."""
        if node_id in self._samplers:
            return
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        config = self._plan[0]
        sends = config.telemetry is not None and config.telemetry.enabled
        self._samplers[node_id] = actor(NodeActor).options(scheduling_strategy=here).remote(config.name, sends=sends)

    async def _tell(self, changed: bool) -> None:
        if changed:
            async with self._news:
                self._news.notify_all()

    async def _expire(self) -> None:
        while True:
            due_s = time.monotonic() + LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)
            now_s = time.monotonic()
            await self._tell(self._table.expire(now_s, stood_s=max(0.0, now_s - due_s)))
