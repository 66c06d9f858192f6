"""An engine that outlives its driver must not outlive its fleet: it ends itself when the fleet's directory is gone.

Engines that are started later are detached, because Ray would end them with the controller that made them, at its every
restart. So nobody ends them when the driver is killed.
"""

from __future__ import annotations

import asyncio
import logging
import time

import ray
from ray.util.placement_group import remove_placement_group

from lltm_ray.actors.watch import get_directory

log = logging.getLogger(__name__)

ORPHANED_AFTER_S = 30.0
"""Ray needs a few seconds to restart a directory."""
LOOK_EVERY_S = 5.0


async def until_orphaned(fleet: str, run_id: str) -> None:
    """Return once this run of the fleet has had no directory for `ORPHANED_AFTER_S`, the last look included."""
    seen_s = time.monotonic()
    while True:
        try:
            _config, found, _engines = await asyncio.wait_for(get_directory(fleet).describe.remote(), LOOK_EVERY_S)
            if found == run_id:
                seen_s = time.monotonic()
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            log.info("no directory of fleet %r: %s", fleet, error)
        if time.monotonic() - seen_s >= ORPHANED_AFTER_S:
            return
        await asyncio.sleep(LOOK_EVERY_S)


def end_this_actor() -> None:
    """Give back the share of the actor we are in, and end it for good."""
    group = ray.util.get_current_placement_group()
    this = ray.get_runtime_context().current_actor
    if group is not None:
        remove_placement_group(group)
    ray.kill(this)
