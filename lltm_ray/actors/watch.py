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


def get_directory(fleet: str) -> Any:
    """The fleet's directory, by name: a handle passed as an argument could be lost before a restart needs it.

    Raises:
        ValueError: no such fleet on this Ray cluster.
    """
    return ray.get_actor(names.directory(fleet), namespace=names.NAMESPACE)


async def watch_fleet(directory: Any) -> AsyncGenerator[FleetStatus, None]:
    """Every new table, for ever; while the directory is away the last one stays true."""
    version = 0
    while True:
        try:
            status: FleetStatus = await directory.watch.remote(version)
        except ray.exceptions.RayError as error:
            log.warning("the directory does not answer, going on with the last table: %s", type(error).__name__)
            await asyncio.sleep(0.25)
            continue
        if status.version != version:
            version = status.version
            yield status
