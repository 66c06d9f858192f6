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
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray.actors.node import NodeActor
from lltm_ray.actors.remote import actor
from lltm_ray.config import FleetConfig, read_environment
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, GatewayInfo

log = logging.getLogger(__name__)

EXPIRE_AFTER_S = 6.0
"""Six missed heartbeats."""
LATE = "no heartbeat"
"""How the detail of such an engine begins: it may come back any moment, unlike one that failed."""


class Table:
    """Latest word of every engine and gateway, with a version that grows with every change that matters to routers."""

    def __init__(self, fleet: str, path: Path) -> None:
        self._fleet = fleet
        self._path = path
        self._engines: dict[str, EngineInfo] = {}
        self._gateways: dict[str, GatewayInfo] = {}
        self._heard_s: dict[str, float] = {}
        self.is_closed = False
        self.version = time.time_ns()  # grows across restarts too, so no watcher waits for a number that never comes
        self._load()

    def register(self, info: EngineInfo, now_s: float) -> bool:
        """Take an engine's word; true when routers should hear of it."""
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
        """Forget an engine or gateway that was stopped on purpose."""
        gone = self._engines.pop(name, None) or self._gateways.pop(name, None)
        self._heard_s.pop(name, None)
        return self._changed(gone, None)

    def expire(self, now_s: float) -> bool:
        """Mark those whose heartbeats ended; by the monotonic clock, which neither jumps nor runs while we sleep."""
        late = f"{LATE} for {EXPIRE_AFTER_S:.0f} s"
        limit = now_s - EXPIRE_AFTER_S
        changed = False
        for name, engine in self._engines.items():
            if self._heard_s[name] < limit and engine.state not in (EngineState.FAILED, EngineState.STOPPED):
                self._engines[name] = engine.with_(state=EngineState.FAILED, detail=late)
                changed = True
        for name, gateway in self._gateways.items():
            if self._heard_s[name] < limit and gateway.state != "failed":
                self._gateways[name] = replace(gateway, state="failed")
                changed = True
        return changed and self._changed(None, self)

    def status(self) -> FleetStatus:
        """Everything, in name order."""
        engines = tuple(self._engines[name] for name in sorted(self._engines))
        gateways = tuple(self._gateways[name] for name in sorted(self._gateways))
        return FleetStatus(name=self._fleet, engines=engines, gateways=gateways, version=self.version)

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
                )
                self._engines[raw["name"]] = EngineInfo(**raw)
            for raw in table["gateways"]:
                self._gateways[raw["name"]] = GatewayInfo(**raw)
        except FileNotFoundError:
            log.debug("%s does not exist yet", self._path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read, engines will register anew: %s", self._path, error)
        self._heard_s = dict.fromkeys((*self._engines, *self._gateways), time.monotonic())


def _lasting(info: Any) -> Any:
    """Without what every heartbeat changes."""
    if isinstance(info, EngineInfo):
        return info.with_(updated_unix_nano=0, slots_busy=0)
    return replace(info, updated_unix_nano=0) if isinstance(info, GatewayInfo) else info


class Directory:
    """One per fleet, named `lltm:<fleet>:directory`."""

    def __init__(self, config: FleetConfig, run_id: str, engines: tuple[str, ...]) -> None:
        self._plan = (config, run_id, engines)
        self._run_dir = read_environment().run_dir(config.name, run_id)
        self._table = Table(config.name, self._run_dir / "directory.json")
        self._news = asyncio.Condition()
        self._samplers: dict[str, Any] = {}
        self._expiry = asyncio.get_running_loop().create_task(self._expire())

    async def register(self, info: EngineInfo) -> None:
        """An engine's heartbeat or change of state."""
        self._ensure_sampler(info.node_id)
        await self._tell(self._table.register(info, time.monotonic()))

    async def register_gateway(self, info: GatewayInfo) -> None:
        """A gateway's heartbeat or change of state."""
        await self._tell(self._table.register_gateway(info, time.monotonic()))

    async def report_busy(self, busy: dict[str, int]) -> None:
        """Busy slots per engine, from a node's sampler."""
        self._table.report_busy(busy)

    async def remove(self, name: str) -> None:
        """Forget what was stopped on purpose."""
        await self._tell(self._table.remove(name))

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
        self._samplers[node_id] = actor(NodeActor).options(scheduling_strategy=here).remote(self._plan[0].name)

    async def _tell(self, changed: bool) -> None:
        if changed:
            async with self._news:
                self._news.notify_all()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            await self._tell(self._table.expire(time.monotonic()))
