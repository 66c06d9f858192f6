"""Saved slots on their way from one engine's folder to another's: the gateway's side, which knows no Ray."""

from __future__ import annotations

import asyncio
from typing import Protocol

from lltm_ray.llamacpp.slot_folder import SlotFolder
from lltm_ray.records import EngineInfo

SHOWN = 8
"""Characters of a file's name that logs and errors show; the whole name is a secret."""


class SlotFiles(Protocol):
    """Carries files between the `slot_folder`s of engines, wherever those are."""

    async def carry(self, source: EngineInfo, target: EngineInfo, filename: str, copy: str = "") -> None:
        """The file is in the target's folder too when this returns; nothing came there when it raises.

        Args:
            source: whose folder has it.
            target: whose folder gets it.
            filename: in the source's folder.
            copy: name in the target's folder; empty: the same.

        Raises:
            FileNotFoundError: the source has no such file.
            FileExistsError: the target has one; it stays.
            OSError: it could not be read, sent or written.
        """

    async def remove(self, engine: EngineInfo, filename: str) -> None:
        """The file is not in the engine's folder any more, whether or not it was.

        Raises:
            OSError: it could not be removed.
        """


class LocalFiles:
    """For engines on this machine only."""

    async def carry(self, source: EngineInfo, target: EngineInfo, filename: str, copy: str = "") -> None:
        """See `SlotFiles`; a hard link where the file system allows it."""
        if source.slot_folder != target.slot_folder:
            folders = SlotFolder(source.slot_folder), SlotFolder(target.slot_folder)
            await asyncio.to_thread(take, *folders, filename, copy or filename)

    async def remove(self, engine: EngineInfo, filename: str) -> None:
        """See `SlotFiles`."""
        await asyncio.to_thread(SlotFolder(engine.slot_folder).remove, filename)


def take(source: SlotFolder, target: SlotFolder, filename: str, copy: str) -> None:
    """Bring a file from one folder of this machine into another; as `SlotFiles.carry` in what it raises and leaves."""
    try:
        target.take(filename, source, copy)
    except FileExistsError:
        raise
    except OSError as error:
        target.remove(copy)
        if isinstance(error, FileNotFoundError) and source.size(filename) is not None:
            raise OSError(f"{target.path} is gone") from error
        raise
