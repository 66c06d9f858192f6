"""Saved slots from one node's disk to another's, through Ray's object store.

    gateway: RayFiles.carry ──> Porter on the source: read ── 16 MiB objects ──> Porter on the target: write

The gateway only passes references on: the bytes go from node to node, a few pieces at a time, so that no process ever
holds a file whole. A Porter is started on a node when it is first needed there, and ends with the gateway.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray.actors.remote import actor
from lltm_ray.gateway.slot_files import SHOWN, LocalFiles, take
from lltm_ray.llamacpp.slot_folder import CHUNK_BYTES, SlotFolder
from lltm_ray.records import EngineInfo

log = logging.getLogger(__name__)

PIECES_IN_FLIGHT = 4
"""Read, on their way, or being written: 64 MiB of object store."""
_TOLD_APART = (FileNotFoundError, FileExistsError)


class Porter:
    """Hands of one node: reads and writes files of slot folders, nothing else."""

    async def size(self, folder: str, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        return await asyncio.to_thread(SlotFolder(folder).size, name)

    async def read(self, folder: str, name: str, offset: int, size: int) -> tuple[bytes, bytes]:
        """A piece of a file and its digest."""
        data = await asyncio.to_thread(SlotFolder(folder).read, name, offset, size)
        return data, await asyncio.to_thread(digest, data)

    async def create(self, folder: str, name: str) -> None:
        """An empty private file."""
        await asyncio.to_thread(SlotFolder(folder).create, name)

    async def write(self, folder: str, name: str, offset: int, data: bytes, expected: bytes) -> int:
        """Put a piece where it belongs; its size. Raises OSError for one that is not what was read."""
        if await asyncio.to_thread(digest, data) != expected:
            raise OSError(f"{name[:SHOWN]}: the piece at byte {offset} was damaged on its way")
        await asyncio.to_thread(SlotFolder(folder).write, name, offset, data)
        return len(data)

    async def take(self, folder: str, copy: str, source: str, name: str) -> None:
        """A file of another folder of this node."""
        await asyncio.to_thread(take, SlotFolder(source), SlotFolder(folder), name, copy)

    async def remove(self, folder: str, name: str) -> None:
        """Remove a file if it is there."""
        await asyncio.to_thread(SlotFolder(folder).remove, name)


def digest(data: bytes) -> bytes:
    """32 bytes that tell one piece from another."""
    return hashlib.sha256(data).digest()


class RayFiles:
    """`SlotFiles` for a whole cluster.

    Args:
        node_id: of this process; its own folders need no Porter.
    """

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._local = LocalFiles()
        self._porters: dict[str, Any] = {}

    async def carry(self, source: EngineInfo, target: EngineInfo, filename: str, copy: str = "") -> None:
        """See `SlotFiles`."""
        copy = copy or filename
        is_one_node = source.node_id == target.node_id
        if is_one_node and source.slot_folder == target.slot_folder:
            return
        if is_one_node and source.node_id == self._node_id:
            await self._local.carry(source, target, filename, copy)
        elif is_one_node:
            async with self._undone(target, copy):
                await self._call(target, "take", copy, source.slot_folder, filename)
        else:
            await self._send(source, target, filename, copy)

    async def remove(self, engine: EngineInfo, filename: str) -> None:
        """See `SlotFiles`."""
        if engine.node_id == self._node_id:
            await self._local.remove(engine, filename)
        else:
            await self._call(engine, "remove", filename)

    async def _send(self, source: EngineInfo, target: EngineInfo, filename: str, copy: str) -> None:
        size = await self._call(source, "size", filename)
        if size is None:
            raise FileNotFoundError(f"{filename[:SHOWN]} is not in the folder of {source.name}")
        if copy == filename and await self._call(target, "size", filename) == size:
            return  # nobody guesses such a name: the folder is shared between the nodes
        async with self._undone(target, copy):
            await self._call(target, "create", copy)
            offsets = iter(range(0, size, CHUNK_BYTES))
            pieces = (source, filename, target, copy, offsets)
            await _together([self._pass_on(*pieces) for _ in range(PIECES_IN_FLIGHT)])
            written = await self._call(target, "size", copy)
            if written != size:
                raise OSError(f"{filename[:SHOWN]}: {written} of {size} bytes arrived")

    async def _pass_on(self, source: EngineInfo, filename: str, target: EngineInfo, copy: str, offsets: Any) -> None:
        for offset in offsets:
            read = self._porter(source).read.options(num_returns=2)
            data, expected = read.remote(source.slot_folder, filename, offset, CHUNK_BYTES)
            await self._call(target, "write", copy, offset, data, expected)

    @asynccontextmanager
    async def _undone(self, target: EngineInfo, filename: str) -> AsyncIterator[None]:
        """Remove what has arrived when the rest does not."""
        try:
            yield
        except FileExistsError:  # what is there came from somebody else
            raise
        except BaseException:
            try:
                await self.remove(target, filename)
            except OSError as error:
                log.warning("part of %s is left with %s: %s", filename[:SHOWN], target.name, error)
            raise

    async def _call(self, engine: EngineInfo, method: str, filename: str, *args: Any) -> Any:
        try:
            return await getattr(self._porter(engine), method).remote(engine.slot_folder, filename, *args)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            kind = next((each for each in _TOLD_APART if isinstance(cause, each)), OSError)
            why = getattr(cause, "strerror", None) or cause  # without the file's name
            raise kind(f"node of {engine.name}: {why}") from error
        except ray.exceptions.RayError as error:
            self._porters.pop(engine.node_id, None)  # the next call starts another one
            raise OSError(f"node of {engine.name}: {error}") from error

    def _porter(self, engine: EngineInfo) -> Any:
        porter = self._porters.get(engine.node_id)
        if porter is None:
            there = NodeAffinitySchedulingStrategy(engine.node_id, soft=False)
            porter = actor(Porter).options(max_restarts=0, scheduling_strategy=there).remote()
            self._porters[engine.node_id] = porter
        return porter


async def _together(works: list[Any]) -> None:
    """All of them; when one fails, the others are over too before that is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
