"""What engines hold that are stopped: it moves to others of the model, or is saved. The controller keeps the book.

    controller: Book.part ── directory, long poll ──> every gateway: Clerk ──> gateway.shelf saves
               <── shelved(files) ── Clerk            Book ── directory ──> every gateway: what there is to restore
               <── used(file) ── Clerk

Files lie in a private folder on the node where their engine was. Whoever made the folder, the controller or on another
node a Keeper of its, holds its lock: what a dead one left is swept when the next engine starts on that node.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray._shelf import Parting, SavedSlot, Shelf
from lltm_ray.actors import names
from lltm_ray.actors.remote import actor, find
from lltm_ray.config import FleetConfig, read_environment
from lltm_ray.gateway.shelf import Shelf as GatewayShelf
from lltm_ray.gateway.slot_files import SHOWN
from lltm_ray.llamacpp.slot_folder import OwnedFolder, SlotFolder, own_folder
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, GatewayInfo

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_FILES = 128
"""Every router is told of each."""
ANSWER_S = 3.0
"""Beyond the deadline, for the order to reach the gateways and their answers to come back."""
KEEPER_S = 10.0
"""A Keeper's time for an answer."""


class Keeper:
    """Holds the folder of saved slots on one node; the folder ends with it."""

    def __init__(self) -> None:
        self._folder: OwnedFolder | None = None

    async def folder(self, fleet: str, run_id: str) -> str:
        """The folder of this run of a fleet, made when it is first asked for."""
        if self._folder is None:
            parent = read_environment().run_dir(fleet, run_id) / "slots"
            self._folder = await asyncio.to_thread(own_folder, parent, "shelf")
        return str(self._folder.path)

    async def remove(self, filename: str) -> None:
        """Remove a file if it is there."""
        if self._folder is not None:
            await asyncio.to_thread(SlotFolder(self._folder.path).remove, filename)

    async def close(self) -> None:
        """Remove everything."""
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)


class RemoteKeeper:
    """A Keeper on another node."""

    def __init__(self, node_id: str) -> None:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        self._actor = actor(Keeper).options(max_restarts=0, scheduling_strategy=there).remote()

    async def folder(self, fleet: str, run_id: str) -> str:
        """As there."""
        return str(await self._actor.folder.remote(fleet, run_id))

    async def remove(self, filename: str) -> None:
        """As there."""
        await self._actor.remove.remote(filename)

    async def close(self) -> None:
        """As there."""
        await self._actor.close.remote()


def keeper_on(node_id: str) -> Keeper | RemoteKeeper:
    """Our own node needs no other actor."""
    is_here = node_id == ray.get_runtime_context().get_node_id()
    return Keeper() if is_here else RemoteKeeper(node_id)


@dataclass(slots=True)
class _Order:
    """A parting under way."""

    parting: Parting
    waits_for: set[str]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Book:
    """What is saved where; held to the settings' bounds. Lives in the controller, on its loop.

    Args:
        config: the fleet's.
        run_id: as engines are told.
        tell: has routers hear of `shelf`.
        keeper_on: makes the keeper of a node.
    """

    def __init__(
        self,
        config: FleetConfig,
        run_id: str,
        tell: Callable[[], Awaitable[None]],
        keeper_on: Callable[[str], Keeper | RemoteKeeper] = keeper_on,
    ) -> None:
        self._config, self._run_id, self._tell, self._keeper_on = config, run_id, tell, keeper_on
        self._files: dict[str, SavedSlot] = {}
        self._orders: dict[str, _Order] = {}
        self._keepers: dict[str, Keeper | RemoteKeeper] = {}

    @property
    def shelf(self) -> Shelf:
        """What routers are told."""
        partings = tuple(order.parting for order in self._orders.values())
        return Shelf(files=tuple(self._files.values()), partings=partings)

    async def part(
        self, engine: EngineInfo, gateways: tuple[GatewayInfo, ...], deadline_s: float, *, is_last: bool
    ) -> None:
        """Have the gateways that used an engine's slots move what they hold to others of its model, or save it.

        A gateway that cannot do it costs cached tokens, not requests.
        """
        known_by = {gateway.name for gateway in gateways if _knows(gateway, engine.model)}
        limit_bytes = self._config.shelf_mib * 2**20 if is_last else 0
        if (
            not known_by
            or engine.state is EngineState.FAILED
            or not engine.slot_folder
            or (is_last and not limit_bytes)
        ):
            return
        try:
            folder = await self._ask(engine.node_id, self._make_folder) if is_last else ""
        except OSError as error:
            log.warning("what %s holds is not saved: %s", engine.name, error)
            return
        parting = Parting(engine=engine.name, folder=folder, limit_bytes=limit_bytes, deadline_s=deadline_s)
        await self._carry_out(_Order(parting, known_by))

    async def _carry_out(self, order: _Order) -> None:
        engine, deadline_s = order.parting.engine, order.parting.deadline_s
        self._orders[engine] = order
        try:
            await self._say(engine)
            async with asyncio.timeout(deadline_s + ANSWER_S):
                await order.done.wait()
        except TimeoutError:
            log.warning("%s: %s did not say what they saved", engine, ", ".join(sorted(order.waits_for)))
        finally:
            del self._orders[engine]
        await self.trim()
        await self._say(engine)

    async def _say(self, engine: str) -> None:
        """What routers do not hear costs cached tokens; the engine must still be drained."""
        try:
            await self._tell()
        except (ray.exceptions.RayError, ValueError) as error:
            log.warning("routers are not told of what %s holds: %s", engine, error)

    def answer(self, gateway: str, engine: str, folder: str, files: tuple[SavedSlot, ...]) -> None:
        """A gateway has saved what it knew of; an engine may have had an earlier order, with another folder."""
        self._files |= {file.name: file for file in files}
        order = self._orders.get(engine)
        if order is not None and order.parting.folder == folder:
            order.waits_for.discard(gateway)
            if not order.waits_for:
                order.done.set()

    async def drop(self, *filenames: str) -> None:
        """Nobody needs them any more."""
        for filename in filenames:
            file = self._files.pop(filename, None)
            if file is not None:
                await self._remove(file)

    async def _remove(self, file: SavedSlot) -> None:
        try:
            await self._ask(file.node_id, lambda keeper: keeper.remove(file.name))
        except OSError as error:
            log.warning("%s is left behind: %s", file.name[:SHOWN], error.strerror or error)

    async def trim(self) -> None:
        """Drop what is too old, the oldest when there are too many, and on each node the oldest beyond the bound."""
        now, limit_bytes = time.time_ns(), self._config.shelf_mib * 2**20
        used_bytes: dict[str, int] = {}
        for number, file in enumerate(sorted(self._files.values(), key=lambda each: -each.saved_unix_nano)):
            used_bytes[file.node_id] = used_bytes.get(file.node_id, 0) + file.size_bytes
            is_old = now - file.saved_unix_nano > self._config.shelf_age_s * 1e9
            if is_old or number >= MOST_FILES or used_bytes[file.node_id] > limit_bytes:
                await self.drop(file.name)

    async def close(self) -> None:
        """Remove every file on every node."""
        self._files.clear()
        works = [self._ask(node_id, lambda keeper: keeper.close()) for node_id in self._keepers]
        for error in await asyncio.gather(*works, return_exceptions=True):
            if isinstance(error, Exception):
                log.warning("saved slots are left behind: %s", error)

    async def _ask(self, node_id: str, work: Callable[[Keeper | RemoteKeeper], Awaitable[T]]) -> T:
        """A node's Keeper does something. Raises OSError; what a dead or silent one keeps is lost."""
        if node_id not in self._keepers:
            self._keepers[node_id] = self._keeper_on(node_id)
        try:
            async with asyncio.timeout(KEEPER_S):
                return await work(self._keepers[node_id])
        except ray.exceptions.RayTaskError as error:  # it lives
            raise OSError(str(error.cause)) from error
        except ray.exceptions.RayError as error:
            self._keepers.pop(node_id, None)  # the next order starts another one
            self._forget(node_id)
            raise OSError(f"nobody keeps slots on node {node_id}: {error}") from error
        except TimeoutError:
            self._forget(node_id)
            raise

    def _make_folder(self, keeper: Keeper | RemoteKeeper) -> Awaitable[str]:
        return keeper.folder(self._config.name, self._run_id)

    def _forget(self, node_id: str) -> None:
        self._files = {name: file for name, file in self._files.items() if file.node_id != node_id}


def _knows(gateway: GatewayInfo, model: str) -> bool:
    """Whether requests for a model went through a gateway that lives."""
    return gateway.state == "ready" and any(
        each.model == model and each.last_request_unix_nano for each in gateway.demand
    )


class Clerk:
    """A gateway's end of the book: hears from the directory what to save and what there is, answers the controller.

    Args:
        fleet: whose.
        name: of the gateway.
        shelf: what it saves and restores with.
    """

    def __init__(self, fleet: str, name: str, shelf: GatewayShelf) -> None:
        self._fleet, self._name, self._shelf = fleet, name, shelf
        self._orders: dict[tuple[str, str], asyncio.Task[None]] = {}
        """By engine and folder: what cannot be moved may still be saved."""
        self._words: set[asyncio.Task[None]] = set()
        shelf.used = self._used

    def hear(self, status: FleetStatus) -> None:
        """A new table."""
        self._shelf.update(status.shelf.files, status.salt)
        partings = {(parting.engine, parting.folder): parting for parting in status.shelf.partings}
        self._orders = {key: task for key, task in self._orders.items() if key in partings or not task.done()}
        for key, parting in partings.items():
            if key not in self._orders:
                self._orders[key] = asyncio.create_task(self._obey(parting))

    async def _obey(self, parting: Parting) -> None:
        files: tuple[SavedSlot, ...] = ()
        try:
            files = await self._shelf.put_away(parting)
        finally:
            await self._tell("shelved", self._name, parting.engine, parting.folder, files)

    def _used(self, filename: str) -> None:
        task = asyncio.create_task(self._tell("used", filename))
        self._words.add(task)
        task.add_done_callback(self._words.discard)

    async def _tell(self, method: str, *args: Any) -> None:
        controller = await asyncio.to_thread(find, names.controller(self._fleet))
        if controller is not None:
            getattr(controller, method).remote(*args)
