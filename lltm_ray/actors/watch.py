"""Following the directory: every table it publishes, whatever happens to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import ray

from lltm_ray.actors import names
from lltm_ray.records import FleetStatus

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""Engines and gateways speak this often."""
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0


def get_directory(fleet: str) -> Any:
    """The fleet's directory, by name: a handle passed as an argument could be lost before a restart needs it.

    Raises:
        ValueError: no such fleet on this Ray cluster.
    """
    return ray.get_actor(names.directory(fleet), namespace=names.NAMESPACE)


async def watch_fleet(fleet: str) -> AsyncGenerator[FleetStatus, None]:
    """Every new table of a fleet, for ever; while its directory is away the last one stays true.

    The directory is looked up by name after every failure: a fleet that was started anew has another one.
    """
    version, pause_s = 0, RETRY_FIRST_S
    while True:
        try:
            status: FleetStatus = await get_directory(fleet).watch.remote(version)
        except (ray.exceptions.RayError, ValueError) as error:
            log.warning("no word from the directory of %s, going on with the last table: %s", fleet, error)
            await asyncio.sleep(pause_s)
            version, pause_s = 0, min(RETRY_MAX_S, pause_s * 2)
            continue
        pause_s = RETRY_FIRST_S
        if status.version != version:
            version = status.version
            yield status
