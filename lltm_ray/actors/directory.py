"""The directory: which engines and gateways exist, for everyone who routes or asks.

`Table` is the plain object; `Directory` the actor around it. Engines and gateways heartbeat into it; routers long-poll
`watch`. It persists its table, and after a restart its first watchers see that table until heartbeats renew it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray._shelf import Shelf
from lltm_ray.actors.launch import adapters_of
from lltm_ray.actors.node import NodeActor
from lltm_ray.actors.remote import actor
from lltm_ray.actors.watch import keep_going
from lltm_ray.config import FleetConfig, read_environment
from lltm_ray.records import (
    Adapter,
    EngineInfo,
    EngineState,
    FleetStatus,
    GatewayInfo,
    Hints,
    ModelDemand,
    ModelInfo,
    ModelState,
    ServerCounters,
)
from lltm_ray.routing.gossip import Board, SlotDigest, SlotSample

log = logging.getLogger(__name__)

EXPIRE_AFTER_S = 6.0
"""Six missed heartbeats."""
FORGET_AFTER_S = 600.0
"""A silent gateway without an address is one of Ray Serve's replicas, each of which has another name."""
WAKE_EVERY_S = 0.5
"""Every gateway wakes a model for every request; the news is told this often."""
REMEMBERED = 1000
"""Removed engines; a heartbeat that is still under way is of one of the last."""
LATE = "no heartbeat"
"""How the detail of such an engine begins: it may come back any moment, unlike one that failed."""


class Table:
    """Latest word of every engine and gateway, with a version that grows with every change that matters to routers."""

    def __init__(self, fleet: str, path: Path, models: tuple[ModelInfo, ...] = (), salt: bytes = b"") -> None:
        self._fleet = fleet
        self._salt = salt
        self._hints = Hints()
        self._shelf = Shelf()
        self._models = {model.name: model for model in models}
        self._notes: dict[str, tuple[ModelState, str]] = {}
        self._woken: dict[str, int] = {}
        self._retired: set[str] = set()
        self._removed: deque[str] = deque(maxlen=REMEMBERED)
        self._newest = -1
        self._path = path
        self._engines: dict[str, EngineInfo] = {}
        self._gateways: dict[str, GatewayInfo] = {}
        self._heard_s: dict[str, float] = {}
        self.is_closed = False
        self.version = time.time_ns()  # grows across restarts too, so no watcher waits for a number that never comes
        self._load()

    def register(self, info: EngineInfo, now_s: float) -> bool:
        """Take an engine's word; true when routers should hear of it."""
        if info.name in self._removed:  # its last heartbeat was under way
            return False
        if info.name in self._retired and info.state in (EngineState.READY, EngineState.STARTING):
            info = info.with_(state=EngineState.DRAINING)
        if info.state is EngineState.READY:
            self._woken.pop(info.model, None)
        old = self._engines.get(info.name)
        restarts = old.restarts if old else 0
        if old and old.server_pid and info.server_pid and old.server_pid != info.server_pid:
            restarts += 1
        self._heard_s[info.name] = now_s
        pid = info.server_pid or (old.server_pid if old and info.state is EngineState.STARTING else None)
        busy = old.slots_busy if old and old.url == info.url else 0
        new = info.with_(restarts=restarts, server_pid=pid, slots_busy=busy, updated_unix_nano=time.time_ns())
        self._engines[info.name] = new
        return self._changed(old, new)

    def register_gateway(self, info: GatewayInfo, now_s: float) -> bool:
        """Take a gateway's word."""
        old = self._gateways.get(info.name)
        self._heard_s[info.name] = now_s
        restarts = (old.restarts + (old.pid != info.pid)) if old else 0
        url = info.url or (old.url if old else "")  # a revived gateway asks us where it was
        new = replace(info, url=url, restarts=restarts, updated_unix_nano=time.time_ns())
        self._gateways[info.name] = new
        return self._changed(old, new)

    def report_busy(self, busy: dict[str, int]) -> None:
        """Busy slots as sampled on a node; read by `status`, not a change for routers."""
        for name, count in busy.items():
            if name in self._engines:
                self._engines[name] = self._engines[name].with_(slots_busy=count)

    def remove(self, name: str) -> bool:
        """Forget an engine or gateway that was stopped on purpose; its name is not used again."""
        self._removed.append(name)
        self._retired.discard(name)
        gone = self._engines.pop(name, None) or self._gateways.pop(name, None)
        self._heard_s.pop(name, None)
        self.version += gone is not None
        self._save()
        return gone is not None

    def expire(self, now_s: float) -> bool:
        """Mark those whose heartbeats ended; by the monotonic clock, which neither jumps nor runs while we sleep."""
        late = f"{LATE} for {EXPIRE_AFTER_S:.0f} s"
        limit = now_s - EXPIRE_AFTER_S
        changed = False
        for name, engine in self._engines.items():
            if self._heard_s[name] < limit and engine.state not in (EngineState.FAILED, EngineState.STOPPED):
                self._engines[name] = engine.with_(state=EngineState.FAILED, detail=late)
                changed = True
        for name, gateway in list(self._gateways.items()):
            if self._heard_s[name] < limit and gateway.state != "failed":
                self._gateways[name] = replace(gateway, state="failed")
                changed = True
            elif self._heard_s[name] < now_s - FORGET_AFTER_S and not gateway.url:
                del self._gateways[name], self._heard_s[name]
                changed = True
        return changed and self._changed(None, self)

    def retire(self, name: str) -> bool:
        """From here on an engine takes no more requests, whatever its heartbeats say."""
        self._retired.add(name)
        self._save()
        engine = self._engines.get(name)
        return engine is not None and self.register(engine, self._heard_s[name])

    def new_name(self, taken: Collection[str]) -> str:
        """For an engine that is about to be made; not one that was ever given out, nor `taken`."""
        used = {*self._engines, *self._removed, *taken}
        numbers = [int(name.removeprefix("engine-")) for name in used if re.fullmatch(r"engine-\d+", name)]
        self._newest = max(self._newest, *numbers, -1) + 1
        self._save()  # its engine is unknown here until its first heartbeat
        return f"engine-{self._newest}"

    def wake(self, model: str) -> bool:
        """A request asks for a model; news unless it can be served, or was told a moment ago."""
        now, last = time.time_ns(), self._woken.get(model, 0)
        if model not in self._models or self._model(self._models[model]).engines:
            return False
        if now - last < WAKE_EVERY_S * 1e9:
            return False
        self._woken[model] = now
        self.version += 1
        return True

    def hint(self, hints: Hints) -> None:
        """What analytics tells routers; always news, for hints end unless they are renewed."""
        self._hints = hints
        self.version += 1

    def note_shelf(self, shelf: Shelf) -> bool:
        """What the controller says is saved, and to be saved; after a restart of ours it says so again."""
        self.version += shelf != self._shelf
        is_news, self._shelf = shelf != self._shelf, shelf
        return is_news

    def note_models(self, notes: dict[str, tuple[ModelState, str]]) -> bool:
        """What the controller knows of models beyond their engines: why one does not start, or waits."""
        if notes == self._notes:
            return False
        self._notes = notes
        for model, (state, _detail) in notes.items():
            if state is ModelState.FAILED:  # those who asked are told
                self._woken.pop(model, None)
        self.version += 1
        return True

    def _model(self, model: ModelInfo) -> ModelInfo:
        states = [engine.state for engine in self._engines.values() if engine.model == model.name]
        state, detail = self._notes.get(model.name, (ModelState.COLD, ""))
        ready = states.count(EngineState.READY)
        if ready or EngineState.STARTING in states:
            state = ModelState.READY if ready else ModelState.STARTING
        woken = self._woken.get(model.name, 0)
        return replace(model, state=state, engines=ready, detail=detail, woken_unix_nano=woken)

    def status(self) -> FleetStatus:
        """Everything, in name order."""
        engines = tuple(self._engines[name] for name in sorted(self._engines))
        gateways = tuple(self._gateways[name] for name in sorted(self._gateways))
        models = tuple(self._model(model) for model in self._models.values())
        return FleetStatus(
            name=self._fleet,
            engines=engines,
            gateways=gateways,
            models=models,
            version=self.version,
            salt=self._salt,
            hints=self._hints,
            shelf=self._shelf,
        )

    def _changed(self, old: Any, new: Any) -> bool:
        if _lasting(old) == _lasting(new):
            return False
        self.version += 1
        self._save()
        return True

    def _save(self) -> None:
        """Whole and private (it holds the servers' keys): a new file, then a rename."""
        if self.is_closed:
            return
        table = {
            "engines": [asdict(engine) for engine in self._engines.values()],
            "gateways": [asdict(gateway) for gateway in self._gateways.values()],
            "retired": list(self._retired),
            "removed": list(self._removed),
            "newest": self._newest,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = self._path.with_suffix(".new")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                json.dump(table, stream)
            fresh.replace(self._path)
        except OSError as error:
            log.warning("%s cannot be written, a restart would start from heartbeats alone: %s", self._path, error)

    def _load(self) -> None:
        try:
            table = json.loads(self._path.read_text(encoding="utf-8"))
            for raw in table["engines"]:
                raw.update(
                    state=EngineState(raw["state"]),
                    gpu_ids=tuple(raw["gpu_ids"]),
                    capabilities=tuple(raw["capabilities"]),
                    adapters=tuple(Adapter(**each) for each in raw["adapters"]),
                )
                self._engines[raw["name"]] = EngineInfo(**raw)
            for raw in table["gateways"]:
                raw.update(demand=tuple(ModelDemand(**each) for each in raw["demand"]), closed=tuple(raw["closed"]))
                self._gateways[raw["name"]] = GatewayInfo(**raw)
            self._retired.update(table["retired"])
            self._removed.extend(table["removed"])
            self._newest = table["newest"]
        except FileNotFoundError:
            log.debug("%s does not exist yet", self._path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read, engines will register anew: %s", self._path, error)
        self._heard_s = dict.fromkeys((*self._engines, *self._gateways), time.monotonic())


def _lasting(info: Any) -> Any:
    """Without what every heartbeat changes."""
    if isinstance(info, EngineInfo):
        return info.with_(updated_unix_nano=0, slots_busy=0)
    return replace(info, updated_unix_nano=0, demand=()) if isinstance(info, GatewayInfo) else info


def models_of(config: FleetConfig) -> tuple[ModelInfo, ...]:
    """What the table lists of each model before anything is known of its engines."""
    return tuple(
        ModelInfo(
            name=model.name,
            state=ModelState.COLD,
            min_engines=model.min_engines or 0,
            max_engines=model.max_engines or model.engines,
            is_elastic=config.is_elastic,
            adapters=adapters_of(model.engine or config.engine),
        )
        for model in config.served()
    )


class Directory:
    """One per fleet, named `lltm:<fleet>:directory`."""

    def __init__(self, config: FleetConfig, run_id: str, engines: tuple[str, ...], salt: bytes) -> None:
        self._plan = (config, run_id, engines)
        self._run_dir = read_environment().run_dir(config.name, run_id)
        self._table = Table(config.name, self._run_dir / "directory.json", models_of(config), salt)
        self._news = asyncio.Condition()
        self._board = Board()
        self._samplers: dict[str, Any] = {}
        self._counters: dict[str, ServerCounters] = {}
        self._expiry = asyncio.create_task(keep_going("look for missed heartbeats", self._expire))

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

    async def close(self) -> None:
        """Last words before the actor is killed: the run's files go."""
        self._expiry.cancel()
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
            await asyncio.sleep(0.5)
            await self._tell(self._table.expire(time.monotonic()))
