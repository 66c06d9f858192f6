"""Saved slots on their way from one engine's folder to another's: the gateway's side, which knows no Ray."""

from __future__ import annotations

import asyncio
from typing import Protocol

from lltm_ray.llamacpp.slot_folder import SlotFolder
from lltm_ray.records import EngineInfo


class SlotFiles(Protocol):
    """Carries files between the `slot_folder`s of engines, wherever those are."""

    async def carry(self, source: EngineInfo, target: EngineInfo, filename: str) -> None:
        """The file is in the target's folder too when this returns; nothing of it is there when it raises.

        Raises:
            OSError: it could not be read, sent or written.
        """

    async def remove(self, engine: EngineInfo, filename: str) -> None:
        """The file is not in the engine's folder any more, whether or not it was.

        Raises:
            OSError: it could not be removed.
        """


class LocalFiles:
    """For engines on this machine only."""

    async def carry(self, source: EngineInfo, target: EngineInfo, filename: str) -> None:
        """See `SlotFiles`; a hard link where the file system allows it."""
        if source.slot_folder == target.slot_folder:
            return
        folder = SlotFolder(target.slot_folder)
        try:
            await asyncio.to_thread(folder.take, filename, SlotFolder(source.slot_folder))
        except OSError:
            folder.remove(filename)
            raise

    async def remove(self, engine: EngineInfo, filename: str) -> None:
        """See `SlotFiles`."""
        await asyncio.to_thread(SlotFolder(engine.slot_folder).remove, filename)
