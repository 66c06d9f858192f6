"""Relief of hot engines: idle conversations leave an engine that has been much busier than the others for a while.

New requests go where it is quickest anyway; what keeps an engine hot is the conversations it holds, whose next turns
come back to it. Only idle ones move, the coldest first, and only to slots that are free.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from lltm_ray.errors import LltmRayError
from lltm_ray.gateway.migrate import Migrator
from lltm_ray.gateway.moves import Load, MoveReport, plan_relief

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
PATIENCE = 3
"""Looks in a row that must find the same engine hot: a burst is over sooner than its caches are moved."""
REST_LOOKS = 15
"""Looks without relief for a model after one, for its effect to show."""


class Loads(Protocol):
    """What of a router is looked at."""

    def models(self) -> tuple[str, ...]:
        """Served names."""

    def loads(self, model: str) -> dict[str, tuple[int, int]]:
        """Claimed and all slots by engine."""


class Leveller:
    """Looks at the engines' loads now and then, and relieves one at a time.

    Args:
        router: knows the loads.
        migrator: moves the conversations.
    """

    def __init__(self, router: Loads, migrator: Migrator) -> None:
        self._router = router
        self._migrator = migrator
        self._hot: dict[str, tuple[str, int]] = {}
        self._rest: dict[str, int] = {}

    async def run(self) -> None:
        """Keep the level, for ever; for the owner of the gateway to start as a task and cancel at its end."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for model in self._router.models():
                await self.look(model)

    async def look(self, model: str) -> MoveReport | None:
        """One look at one model; the report of a relief if it came to one."""
        if self._rest.get(model, 0):
            self._rest[model] -= 1
            return None
        loads = {name: Load(busy=busy, slots=slots) for name, (busy, slots) in self._router.loads(model).items()}
        plan = None if self._migrator.is_off(model) else plan_relief(loads)
        if plan is None:
            self._hot.pop(model, None)
            return None
        name, share = plan
        before, seen = self._hot.get(model, ("", 0))
        seen = seen + 1 if before == name else 1
        self._hot[model] = (name, seen)
        if seen < PATIENCE:
            return None
        del self._hot[model]
        self._rest[model] = REST_LOOKS
        return await self._relieve(name, share)

    async def _relieve(self, name: str, share: float) -> MoveReport | None:
        try:
            return await self._migrator.relieve(name, share)
        except LltmRayError as error:  # it left the fleet meanwhile
            _log.warning("no relief for %s: %s", name, error)
            return None
