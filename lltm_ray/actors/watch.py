"""Following the directory: every table it publishes, whatever happens to it, and to whoever follows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import ray

from lltm_ray.actors import names
from lltm_ray.actors.remote import get_named
from lltm_ray.records import FleetStatus

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""Engines and gateways speak this often."""
PROPAGATE_S = 0.3
"""From the directory's word to the last router that has heard it; requests sent meanwhile are waited for."""
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0
WELL_AFTER_S = 60.0
"""Work that went on for so long is not what failed a moment ago."""


def get_directory(fleet: str) -> Any:
    """The fleet's directory, by name: a handle passed as an argument could be lost before a restart needs it.

    Raises:
        ValueError: no such fleet on this Ray cluster.
    """
    return get_named(names.directory(fleet))


async def reach_directory(fleet: str) -> Any:
    """As `get_directory`, for event loops: the look-up asks Ray's head, which may take long while it is restarted."""
    return await asyncio.to_thread(get_directory, fleet)


async def keep_going(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` until it returns; an exception that it did not expect is logged, and the next try waits ever longer.

    For what an actor does for ever: Ray restarts an actor whose process ends, not one whose task has ended in silence.
    """
    pause_s = RETRY_FIRST_S
    while True:
        began_s = time.monotonic()
        try:
            await work()
            return
        except Exception:
            log.exception("could not go on to %s; trying again", what)
        if time.monotonic() - began_s > WELL_AFTER_S:
            pause_s = RETRY_FIRST_S
        await asyncio.sleep(pause_s)
        pause_s = min(RETRY_MAX_S, pause_s * 2)


async def watch_fleet(fleet: str) -> AsyncGenerator[FleetStatus, None]:
    """Every new table of a fleet, for ever; while its directory is away the last one stays true.

    The directory is looked up by name after every failure: a fleet that was started anew has another one.
    """
    version, pause_s = 0, RETRY_FIRST_S
    while True:
        try:
            status: FleetStatus = await (await reach_directory(fleet)).watch.remote(version)
        except (ray.exceptions.RayError, ValueError) as error:
            log.warning("no word from the directory of %s, going on with the last table: %s", fleet, error)
            await asyncio.sleep(pause_s)
            version, pause_s = 0, min(RETRY_MAX_S, pause_s * 2)
            continue
        pause_s = RETRY_FIRST_S
        if status.version != version:
            version = status.version
            yield status
