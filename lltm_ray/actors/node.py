"""NodeActor: the only one on its node that asks llama-servers, the GPUs' driver and the kernel for figures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from lltm_ray.actors.sampler import Gpus, Servers, SlotChanges, counters_of, gpu_rows, read_node
from lltm_ray.actors.watch import keep_going, reach_directory, watch_fleet
from lltm_ray.records import ServerCounters
from lltm_ray.routing.gossip import SlotSample

if TYPE_CHECKING:
    from lltm_ray.actors.sender import Sender

log = logging.getLogger(__name__)

SLOTS_EVERY_S = 0.5
SLOTS_IDLE_S = 2.0
"""While no slot of the node is busy."""
METERS_EVERY_S = 1.0
"""Counters, processes, GPUs: one pass for all."""


class NodeActor:
    """One per node that holds engines.

    Args:
        fleet: whose engines.
        sends: whether rows go to the telemetry actor; the directory is told of busy slots and counters in any case.
    """

    def __init__(self, fleet: str, *, sends: bool = True) -> None:
        self._fleet = fleet
        self._node_id = ray.get_runtime_context().get_node_id()
        self._servers = Servers(self._node_id)
        self._changes = SlotChanges()
        self._gpus = Gpus()
        self._sender = _make_sender(fleet, f"node-{self._node_id[:8]}") if sends else None
        works = {"follow the directory": self._follow, "read slots": self._read_slots, "read meters": self._read_meters}
        works |= {"send telemetry": self._sender.run} if self._sender is not None else {}
        self._tasks = [asyncio.create_task(keep_going(what, work)) for what, work in works.items()]

    async def _follow(self) -> None:
        async for status in watch_fleet(self._fleet):
            self._servers.update(status.engines)

    async def _read_slots(self) -> None:
        while True:
            rows = await self._servers.read_slots()
            busy = self._servers.busy
            await self._tell(busy=busy, samples=self._changes.of(self._servers.samples()))
            self._note("slots", rows)
            await asyncio.sleep(SLOTS_EVERY_S if any(busy.values()) else SLOTS_IDLE_S)

    async def _read_meters(self) -> None:
        while True:
            told = await self._servers.read_counters()
            await self._tell(counters=counters_of(self._servers.engines, told))
            if self._sender is not None:
                samples = await asyncio.to_thread(self._gpus.read)
                self._note("gpus", gpu_rows(samples, self._node_id))
                self._note("servers", self._servers.rows(told, samples))
                self._note("nodes", [read_node(self._node_id, self._gpus.reason)])
            await asyncio.sleep(METERS_EVERY_S)

    def _note(self, kind: str, rows: list[Any]) -> None:
        if self._sender is not None:
            for row in rows:
                self._sender.outbox.add(kind, row)

    async def _tell(
        self,
        *,
        busy: dict[str, int] | None = None,
        samples: Sequence[SlotSample] = (),
        counters: list[ServerCounters] | None = None,
    ) -> None:
        try:
            directory = await reach_directory(self._fleet)
        except ValueError as error:  # it is being restarted
            log.debug("no directory to report to: %s", error)
            return
        if busy:
            directory.report_slots.remote(busy, samples)
        if counters:
            directory.report_counters.remote(counters)


def _make_sender(fleet: str, name: str) -> Sender:
    from lltm_ray.actors.sender import Sender  # with telemetry off a process does without pyarrow

    return Sender(fleet, name)
