"""Replacing engines whose node is lost.

Ray places a lost node's placement groups anew by itself, where they fit. Those that do not fit now, though another node
is big enough, it tries again without any pause, which keeps the only thread of its head busy until they do (Ray 2.60).
A share that is asked for anew waits without that: so such groups are given back, and their engines made again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from math import inf

from lltm_ray.actors.crew import Crew, end_engine, engine_names
from lltm_ray.actors.directory_table import LATE, Table, is_silent
from lltm_ray.actors.placement import (
    Held,
    Reservation,
    demand_of,
    engines_beside,
    read_nodes,
    reserve_one,
    reserved,
)
from lltm_ray.actors.remote import is_revived
from lltm_ray.config import ModelConfig
from lltm_ray.gpu.shares import SharePlan
from lltm_ray.records import EngineInfo

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
SPEAK_S = 60.0
"""How long engines may take to be heard by a directory that Ray has restarted; the fleet may just be starting."""
PATIENCE_S = 3.0
"""How long Ray may look for another place; where there is one, it takes less than a second."""


class LostShares:
    """Which engines' shares Ray has been looking for another place for, and for too long."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def overdue(self, held: Mapping[str, Held], now_s: float) -> list[str]:
        """Engines whose share has been lost for `PATIENCE_S`, looked at often."""
        lost = {name for name, share in held.items() if share.is_lost}
        self._since_s = {name: self._since_s.get(name, now_s) for name in sorted(lost)}
        return [name for name, since_s in self._since_s.items() if now_s - since_s >= PATIENCE_S]


class Mender:
    """Replaces a fleet's lost engines. The directory's, for it outlives every node but its own.

    Args:
        crew: makes engines.
        engines: those that the fleet shall have, and their models with shares in numbers.
        table: knows which are silent; shows what they wait for.
        tell: makes a change of the table news.
    """

    def __init__(
        self, crew: Crew, engines: Mapping[str, ModelConfig], table: Table, tell: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._crew, self._engines, self._table, self._tell = crew, engines, table, tell
        self._fleet = crew.config.name
        self._lost = LostShares()
        self._wanted: set[str] = set()
        self._waiting: dict[str, Reservation] = {}
        self._at_work = asyncio.Lock()
        self._is_closed = False

    async def run(self) -> None:
        """Until it is closed. As long as every engine is heard, Ray is asked nothing."""
        revived_s = time.monotonic() if is_revived() else inf
        while not self._is_closed:
            await asyncio.sleep(LOOK_EVERY_S)
            engines = self._table.status().engines
            silent = {engine.name for engine in engines if is_silent(engine)}
            unheard: set[str] = set()
            if time.monotonic() - revived_s > SPEAK_S:
                unheard = {*self._engines} - {engine.name for engine in engines} | silent
            if silent or unheard or self._wanted or self._waiting:
                await self._mend(engines, unheard)
            else:
                self._lost = LostShares()

    async def _mend(self, engines: tuple[EngineInfo, ...], unheard: set[str]) -> None:
        async with self._at_work:
            if not self._is_closed:
                await asyncio.to_thread(self._look, engines, unheard)
        for name, share in self._waiting.items():
            await self._tell(self._table.explain(name, f"{LATE}: its node is lost; waits for {share.plan.need}"))

    async def close(self) -> None:
        """Make no engine any more; one that is being made is there when this returns."""
        self._is_closed = True
        async with self._at_work:
            log.debug("engines of fleet %s are not replaced any more", self._fleet)

    def _look(self, engines: tuple[EngineInfo, ...], unheard: set[str]) -> None:
        held = dict(reserved(self._fleet))
        self._wanted.update(self._lost.overdue(held, time.monotonic()))
        if unheard:  # what an earlier life of ours had given back, and not made again
            self._wanted.update(unheard - engine_names(self._fleet) - self._waiting.keys())
        for name in sorted(self._wanted):
            self._ask_anew(name)
        crowd = Counter(engine.node_id for engine in engines if not is_silent(engine))
        for name in list(self._waiting):
            node_id = held[name].node_id if name in held else ""
            if node_id:
                crowd[node_id] += 1
                self._make(name, crowd[node_id])

    def _ask_anew(self, name: str) -> None:
        """Whatever Ray raises on the way, the next look does it again."""
        log.warning("%s of fleet %s was lost with its node and finds no place elsewhere", name, self._fleet)
        demand = demand_of(self._engines[name], name)
        end_engine(self._fleet, name)
        plan = SharePlan(engine=name, node_id="", gpus=demand.gpus, cpus=demand.cpus)
        self._waiting[name] = reserve_one(self._fleet, plan, detached=False)
        self._wanted.discard(name)

    def _make(self, name: str, beside: int) -> None:
        """The actor of an engine whose share has come; detached, as it is to outlive a restart of the directory."""
        models = tuple(dict.fromkeys(self._engines.values()))
        crowd = engines_beside(models, len(read_nodes()), beside)
        share = self._waiting[name]
        try:
            self._crew.make(self._engines[name], share, engines_on_node=crowd, detached=True, starts_itself=True)
        except ValueError as error:  # Ray has not buried the old one yet: the next look tries again
            log.info("%s of fleet %s is not made yet: %s", name, self._fleet, error)
            return
        del self._waiting[name]
