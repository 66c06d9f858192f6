"""The directory's table: the latest word of every engine, gateway and model, kept in a file over restarts."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lltm_ray._shelf import Shelf
from lltm_ray.actors.runstate import write_private
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
)

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

    def expire(self, now_s: float, stood_s: float = 0.0) -> bool:
        """Mark those whose heartbeats ended; by the monotonic clock, which neither jumps nor runs while we sleep.

        Args:
            now_s: the present.
            stood_s: how long this process stood still before, and heard nobody: that is no silence of theirs. Who was
                heard since then gets no credit for it.
        """
        self._heard_s = {name: min(now_s, heard_s + stood_s) for name, heard_s in self._heard_s.items()}
        late = f"{LATE} for {EXPIRE_AFTER_S:.0f} s"
        limit = now_s - EXPIRE_AFTER_S
        changed = False
        for name, engine in self._engines.items():
            if self._heard_s[name] < limit and not is_silent(engine) and engine.state is not EngineState.STOPPED:
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

    def explain(self, name: str, detail: str) -> bool:
        """Say more of a failed engine."""
        engine = self._engines.get(name)
        if engine is None or engine.state is not EngineState.FAILED:
            return False
        self._engines[name] = engine.with_(detail=detail)
        return self._changed(engine, self._engines[name])

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

    def note_adapters(self, model: str, before: tuple[Adapter, ...], after: tuple[Adapter, ...]) -> bool:
        """What a model's engines shall have of adapters from their next start on; not if `before` is no longer true."""
        if (known := self._models.get(model)) is None or known.adapters != before:
            return False
        self._models[model] = replace(known, adapters=after)
        return self._changed(known, self._models[model])

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
        """Private, for it holds the servers' keys."""
        if self.is_closed:
            return
        table = {
            "engines": [asdict(engine) for engine in self._engines.values()],
            "gateways": [asdict(gateway) for gateway in self._gateways.values()],
            "adapters": {name: [asdict(each) for each in model.adapters] for name, model in self._models.items()},
            "retired": list(self._retired),
            "removed": list(self._removed),
            "newest": self._newest,
        }
        try:
            write_private(self._path, table)
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
                    adapters=_adapters(raw["adapters"]),
                )
                self._engines[raw["name"]] = EngineInfo(**raw)
            for raw in table["gateways"]:
                raw.update(demand=tuple(ModelDemand(**each) for each in raw["demand"]), closed=tuple(raw["closed"]))
                self._gateways[raw["name"]] = GatewayInfo(**raw)
            for name, model in self._models.items():
                self._models[name] = replace(model, adapters=_adapters(table["adapters"][name]))
            self._retired.update(table["retired"])
            self._removed.extend(table["removed"])
            self._newest = table["newest"]
        except FileNotFoundError:
            log.debug("%s does not exist yet", self._path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read, engines will register anew: %s", self._path, error)
        self._heard_s = dict.fromkeys((*self._engines, *self._gateways), time.monotonic())


def is_silent(engine: EngineInfo) -> bool:
    """Whether nothing is heard of it, which is all that is known here of an engine on a lost node."""
    return engine.state is EngineState.FAILED and engine.detail.startswith(LATE)


def _adapters(listed: list[dict[str, Any]]) -> tuple[Adapter, ...]:
    return tuple(Adapter(**each) for each in listed)


def _lasting(info: Any) -> Any:
    """Without what every heartbeat changes."""
    if isinstance(info, EngineInfo):
        return info.with_(updated_unix_nano=0, slots_busy=0)
    return replace(info, updated_unix_nano=0, demand=()) if isinstance(info, GatewayInfo) else info
