"""Before an engine goes, the gateways are asked to close it and to move its conversations to engines that stay."""

from __future__ import annotations

import asyncio
import logging

import ray

from lltm_ray.actors import names
from lltm_ray.actors.remote import find
from lltm_ray.gateway.moves import MoveReport
from lltm_ray.records import GatewayInfo

log = logging.getLogger(__name__)

GRACE_S = 5.0


async def move_caches(fleet: str, gateways: tuple[GatewayInfo, ...], engine: str, deadline_s: float) -> None:
    """Ask every gateway that serves; one that cannot do it costs cached tokens, not requests."""
    serving = [gateway.name for gateway in gateways if gateway.state == "ready"]
    await asyncio.gather(*(_move(fleet, name, engine, deadline_s) for name in serving))


async def _move(fleet: str, gateway: str, engine: str, deadline_s: float) -> None:
    handle = find(names.gateway(fleet, gateway))
    if handle is None:  # one of Ray Serve's
        return
    try:
        async with asyncio.timeout(deadline_s + GRACE_S):
            report: MoveReport = await handle.move_caches.remote(engine, deadline_s)
        log.info("%s moved %d conversations of %s, %d tokens", gateway, report.moved, engine, report.tokens)
    except (ray.exceptions.RayError, TimeoutError) as error:
        log.warning("%s cannot move what %s has cached: %s", gateway, engine, error)
