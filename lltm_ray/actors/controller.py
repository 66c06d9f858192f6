"""ControllerActor: starts and stops engines with demand. One for each fleet whose number of engines may change.

It follows the directory, decides by `routing.scaling.plan`, and carries out: reserve a share, make the actor, wait
until it is ready; or drain, stop, give the share back. All it must know after a restart is in the directory and in Ray:
moves that were under way are finished (stops) or undone (shares without an engine).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from lltm_ray._shelf import SavedSlot
from lltm_ray.actors import names
from lltm_ray.actors.crew import Crew, cause_of, end_engine, engine_names, find_engines
from lltm_ray.actors.directory_table import is_silent
from lltm_ray.actors.mender import LostShares
from lltm_ray.actors.placement import (
    Reservation,
    demand_of,
    engines_beside,
    give_back,
    plan_share,
    read_nodes,
    release,
    reserve_one,
    reserved,
)
from lltm_ray.actors.remote import find, is_revived
from lltm_ray.actors.shelf import Book
from lltm_ray.actors.watch import PROPAGATE_S, get_directory, keep_going
from lltm_ray.config import FleetConfig, ModelConfig
from lltm_ray.errors import LltmRayError, PlacementError
from lltm_ray.gpu.shares import NodeCapacity
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, GatewayInfo, ModelDemand, ModelState
from lltm_ray.routing.scaling import (
    Action,
    Look,
    ModelRules,
    ScalingSettings,
    ScalingState,
    Start,
    after_failure,
    after_success,
    plan,
)

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
RETRY_S = 0.5
ROOM_LOOK_S = 0.5
VIEW_LAG_S = 1.5
"""How long Ray's count of what is free may trail a share that was given back."""
WOKEN_FOR_S = 60.0
"""How long a wake counts when nobody repeats it."""
LAST_WORDS_S = 30.0
MOVING = (EngineState.DRAINING, EngineState.STOPPING, EngineState.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSpec:
    """What a controller is told; the same after every restart."""

    crew: Crew
    models: tuple[ModelConfig, ...]
    """With their shares in numbers."""


@dataclass(slots=True, kw_only=True)
class Move:
    """A start or stop under way."""

    engine: str
    model: str
    is_start: bool
    stuck: bool = False
    """Waits for room."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Controller:
    """Looks, plans, carries out. Lives on one event loop."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._crew, self._fleet = spec.crew, spec.crew.config.name
        self.book = Book(spec.crew.config, spec.crew.run_id, self.tell_shelf)
        self._models = {model.name: model for model in spec.models}
        self._rules = tuple(rules_of(model) for model in spec.models)
        self._settings = settings_of(spec.crew.config)
        self._state = ScalingState()
        self._moves: dict[str, Move] = {}
        self._load_s: dict[str, float] = {}
        self._places: dict[str, set[str]] = {}
        self._trouble: dict[str, str] = {}
        self._released_at_s = float("-inf")
        self._status = FleetStatus(name=self._fleet)
        self._done: deque[str] = deque(maxlen=64)
        self._lost = LostShares()
        self._is_swept = False

    def snapshot(self) -> dict[str, Any]:
        """What is under way, what was decided last, what is remembered of each model."""
        moves = {move.engine: ("start" if move.is_start else "stop", move.stuck) for move in self._moves.values()}
        memories = {name: asdict(memory) for name, memory in self._state.models.items()}
        return {"moves": moves, "decisions": list(self._done), "models": memories, "load_s": self._load_s}

    async def run(self) -> None:
        """For ever; while the directory is away nothing is decided."""
        await keep_going(f"look after fleet {self._fleet}", self._run_on)

    async def _run_on(self) -> None:
        version = 0
        while True:
            try:
                if not self._is_swept:
                    await asyncio.to_thread(self._sweep)
                    self._is_swept = True
                status: FleetStatus = await get_directory(self._fleet).watch.remote(version, LOOK_EVERY_S)
                version = status.version
                await self._look(status)
            except (ray.exceptions.RayError, ValueError) as error:
                log.warning("fleet %s is not looked after for the moment: %s", self._fleet, error)
                await asyncio.sleep(RETRY_S)

    def _sweep(self) -> None:
        """What an earlier life of this controller left: shares with nobody on them, engines not yet told to start."""
        manned = engine_names(self._fleet)
        for name, _share in list(reserved(self._fleet)):
            if name not in manned:
                release(self._fleet, name)
        if is_revived():
            for handle in find_engines(self._fleet).values():
                handle.ensure_ready.remote()  # our word to a new actor waits with us, and was lost with us

    async def _look(self, status: FleetStatus) -> None:
        self._status = status
        for engine in status.engines:
            if engine.state is EngineState.READY:
                self._places.setdefault(engine.model, set()).add(engine.node_id)
            if engine.state in MOVING and engine.name not in self._moves:
                self._begin_stop(engine, "its stop was interrupted")
        await self._bury_lost(status)
        now_s, engines = time.monotonic(), self._engines(status)
        stuck = frozenset(name for name, move in self._moves.items() if move.stuck)
        nodes = await asyncio.to_thread(read_nodes) if stuck else ()
        look = Look(
            rules=self._rules,
            demand=merge_demand(status.gateways),
            engines=tuple(engines.values()),
            now_s=now_s,
            woken=_woken(status),
            stuck=stuck,
            fits=lambda name, victims: self._fits(name, [engines[victim] for victim in victims], nodes),
            may_evict=now_s - self._released_at_s >= VIEW_LAG_S,
            load_s=self._load_s,
        )
        self._state, actions = plan(look, self._state, self._settings)
        for action in actions:
            await self._begin(action, engines)
        await self._tell()
        await self.book.trim()
        if status.shelf != self.book.shelf:  # or the directory was restarted
            await self.tell_shelf()

    async def _bury_lost(self, status: FleetStatus) -> None:
        """End engines that were lost with their node and that Ray cannot place: others can be made instead."""
        is_any = any(is_silent(engine) for engine in status.engines)
        held = await asyncio.to_thread(lambda: dict(reserved(self._fleet))) if is_any else {}
        models = {engine.name: engine.model for engine in status.engines}
        for name in self._lost.overdue(held, time.monotonic()):
            if name in models and name not in self._moves:
                log.warning("%s of fleet %s was lost with its node", name, self._fleet)
                self._run(Move(engine=name, model=models[name], is_start=False), self._end(name))

    def _engines(self, status: FleetStatus) -> dict[str, EngineInfo]:
        """The directory's table with what is under way. That a start failed, and why, is its own task's to say."""
        seen = {engine.name: engine for engine in status.engines}
        for name, move in self._moves.items():
            if move.is_start:
                known = seen.get(name) or EngineInfo(name=name, model=move.model, state=EngineState.STARTING)
                seen[name] = known.with_(state=EngineState.STARTING) if known.state is EngineState.FAILED else known
            elif name in seen:
                seen[name] = seen[name].with_(state=EngineState.DRAINING)
        return seen

    def _fits(self, name: str, victims: list[EngineInfo], nodes: tuple[NodeCapacity, ...]) -> bool:
        shares = [(each.node_id, demand_of(self._models[each.model], each.name)) for each in victims]
        demand = demand_of(self._models[self._moves[name].model], name)
        return bool(plan_share(demand, give_back(nodes, shares)).node_id)

    # carrying out -----------------------------------------------------------------------------------------------

    async def _begin(self, action: Action, engines: dict[str, EngineInfo]) -> None:
        log.info("fleet %s: %s", self._fleet, action)
        self._done.append(str(action))
        if isinstance(action, Start):
            name = await get_directory(self._fleet).new_name.remote(tuple(self._moves))
            move = Move(engine=name, model=action.model, is_start=True)
            self._run(move, self._start(move))
            return
        under_way = self._moves.get(action.engine)
        if under_way is None:
            why = getattr(action, "why", "") or f"to make room for {getattr(action, 'for_model', '')}"
            self._begin_stop(engines[action.engine], why)
        elif under_way.is_start and under_way.task is not None:
            under_way.is_start = under_way.stuck = False  # once: its undoing must not be cut short by the next look
            under_way.task.cancel()

    def _begin_stop(self, engine: EngineInfo, why: str) -> None:
        log.info("stopping %s of fleet %s: %s", engine.name, self._fleet, why)
        move = Move(engine=engine.name, model=engine.model, is_start=False)
        self._run(move, self._stop(engine))

    def _run(self, move: Move, work: Any) -> None:
        async def live() -> None:
            try:
                await work
            except Exception:  # nobody waits for this task; the next look plans with what there is then
                log.exception("a move of %s of fleet %s broke off", move.engine, self._fleet)
            finally:
                self._moves.pop(move.engine, None)

        self._moves[move.engine] = move
        move.task = asyncio.get_running_loop().create_task(live())

    async def _start(self, move: Move) -> None:
        began_s = time.monotonic()
        try:
            await self._bring_up(move)
        except asyncio.CancelledError:  # withdrawn: nobody asks for it any more
            await self._end(move.engine)
            raise
        except Exception as error:  # whatever it was, the share must be given back, and the next try wait
            cause = cause_of(error)
            is_expected = isinstance(error, LltmRayError | ray.exceptions.RayError | ValueError)
            log.warning("%s of fleet %s does not start: %s", move.engine, self._fleet, cause, exc_info=not is_expected)
            self._state = after_failure(self._state, move.model, time.monotonic(), self._settings)
            self._trouble[move.model] = getattr(cause, "message", str(cause))
            await self._end(move.engine)
        else:
            self._load_s[move.model] = time.monotonic() - began_s
            self._trouble.pop(move.model, None)
            self._state = after_success(self._state, move.model)

    async def _bring_up(self, move: Move) -> None:
        model = self._models[move.model]
        nodes = await asyncio.to_thread(read_nodes)
        used_before = [node for node in nodes if node.node_id in self._places.get(move.model, ())]
        demand = demand_of(model, move.engine)
        chosen = plan_share(demand, used_before)  # its file is there already
        chosen = chosen if chosen.node_id else plan_share(demand, nodes)
        share = await asyncio.to_thread(reserve_one, self._fleet, chosen, detached=True)
        move.stuck = not chosen.node_id
        await self._await_room(move, share)
        beside = sum(engine.node_id == chosen.node_id for engine in self._status.engines) + 1
        crowd = engines_beside(tuple(self._models.values()), len(nodes), beside)
        engine = await asyncio.to_thread(self._crew.make, model, share, engines_on_node=crowd, detached=True)
        await engine.ensure_ready.remote()

    async def _await_room(self, move: Move, share: Reservation) -> None:
        limit_s = self._crew.config.room_timeout_s
        deadline = time.monotonic() + limit_s
        await self._tell()
        while not await asyncio.to_thread(share.group.wait, ROOM_LOOK_S):
            if any(not each.is_start for each in self._moves.values()):  # room is being made
                deadline = time.monotonic() + limit_s
            if time.monotonic() > max(deadline, self._released_at_s + limit_s):
                raise PlacementError(share.plan.need, f"smaller, and stayed so for room_timeout_s={limit_s:g} s")
            move.stuck = True
            await self._tell()
        move.stuck = False

    async def _stop(self, engine: EngineInfo) -> None:
        drain_s = self._crew.config.drain_timeout_s
        try:
            if self._others(engine):
                await self.book.part(engine, self._status.gateways, drain_s, is_last=False)
            await get_directory(self._fleet).retire.remote(engine.name)
            if not self._others(engine):
                await self.book.part(engine, self._status.gateways, drain_s, is_last=True)
            handle = None if engine.state is EngineState.FAILED else find(names.engine(self._fleet, engine.name))
            if handle is not None:
                await asyncio.sleep(PROPAGATE_S)
                await asyncio.wait_for(handle.stop.remote(drain_s), drain_s + LAST_WORDS_S)
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            log.warning("%s of fleet %s is ended without its last words: %s", engine.name, self._fleet, error)
        finally:
            await self._end(engine.name)

    def _others(self, engine: EngineInfo) -> bool:
        """Whether another engine of its model stays, or comes."""
        coming = (EngineState.READY, EngineState.STARTING)
        others = (each for each in self._engines(self._status).values() if each.name != engine.name)
        return any(each.model == engine.model and each.state in coming for each in others)

    async def _end(self, name: str) -> None:
        await asyncio.to_thread(end_engine, self._fleet, name)
        self._released_at_s = time.monotonic()
        try:
            await get_directory(self._fleet).remove.remote(name)
        except (ray.exceptions.RayError, ValueError) as error:
            log.warning("%s stays in the table of fleet %s for the moment: %s", name, self._fleet, error)

    # telling ----------------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        await get_directory(self._fleet).note_models.remote(self._notes())

    async def tell_shelf(self) -> None:
        """Let routers know what is saved."""
        await get_directory(self._fleet).note_shelf.remote(self.book.shelf)

    def _notes(self) -> dict[str, tuple[ModelState, str]]:
        notes: dict[str, tuple[ModelState, str]] = {}
        for name, memory in self._state.models.items():
            if memory.failures and time.monotonic() < memory.retry_at_s:
                notes[name] = ModelState.FAILED, self._trouble.get(name, "")
        for move in self._moves.values():
            if move.is_start:
                state = ModelState.WAITING if move.stuck else ModelState.STARTING
                notes[move.model] = state, f"{move.engine} is {state}"
        return notes


class ControllerActor:
    """One per elastic fleet, named `lltm:<fleet>:controller`."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._controller = Controller(spec)
        self._life = asyncio.get_running_loop().create_task(self._controller.run())

    async def snapshot(self) -> dict[str, Any]:
        """As `Controller.snapshot`."""
        return self._controller.snapshot()

    async def shelved(self, gateway: str, engine: str, folder: str, files: tuple[SavedSlot, ...]) -> None:
        """A gateway has saved what it knew of an engine that ends."""
        self._controller.book.answer(gateway, engine, folder, files)

    async def used(self, filename: str) -> None:
        """A gateway has restored a saved slot, or could not."""
        await self._controller.book.drop(filename)
        await self._controller.tell_shelf()

    async def close(self) -> None:
        """Last words before the actor is killed: nothing is started or stopped any more, saved slots go."""
        self._life.cancel()
        await self._controller.book.close()


def rules_of(model: ModelConfig) -> ModelRules:
    """A model's settings as the planner takes them."""
    return ModelRules(
        name=model.name,
        floor=model.min_engines or 0,
        keep=model.engines if model.min_engines is None else model.min_engines,
        ceiling=model.max_engines or model.engines,
        idle_timeout_s=model.idle_timeout_s,
        pinned=model.pinned,
        priority=model.priority,
    )


def settings_of(config: FleetConfig) -> ScalingSettings:
    """A fleet's thresholds."""
    return ScalingSettings(scale_up_wait_s=config.scale_up_wait_s, scale_down_after_s=config.scale_down_after_s)


def merge_demand(gateways: tuple[GatewayInfo, ...]) -> tuple[ModelDemand, ...]:
    """What all living gateways report, one record for each model."""
    merged: dict[str, ModelDemand] = {}
    for one in (demand for gateway in gateways if gateway.state != "failed" for demand in gateway.demand):
        sum_ = merged.get(one.model, ModelDemand(model=one.model))
        merged[one.model] = ModelDemand(
            model=one.model,
            waiting=sum_.waiting + one.waiting,
            running=sum_.running + one.running,
            predicted_wait_s=max(sum_.predicted_wait_s, one.predicted_wait_s),
            last_request_unix_nano=max(sum_.last_request_unix_nano, one.last_request_unix_nano),
            rejected=sum_.rejected + one.rejected,
        )
    return tuple(merged.values())


def _woken(status: FleetStatus) -> frozenset[str]:
    since = time.time_ns() - int(WOKEN_FOR_S * 1e9)
    return frozenset(model.name for model in status.models if model.woken_unix_nano > since)
