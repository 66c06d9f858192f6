"""GatewayActor: the HTTP front of a fleet as a process of its own.

`front` is all there is to it; the actor serves it on uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import ray

from lltm_ray.actors.front import Front
from lltm_ray.actors.remote import is_revived, node_ip
from lltm_ray.actors.watch import HEARTBEAT_S, get_directory, keep_going, watch_fleet
from lltm_ray.config import GatewayConfig, TelemetryConfig
from lltm_ray.errors import ConfigError
from lltm_ray.gateway.moves import MoveReport
from lltm_ray.gateway.server import serve
from lltm_ray.records import GatewayInfo

log = logging.getLogger(__name__)

RETRY_S = 5.0
REBIND_S = 15.0
"""After a kill, how long the actor waits for its own port to come free."""


class GatewayActor:
    """On the node of whoever started the fleet; several of them share the port."""

    def __init__(self, name: str, fleet: str, config: GatewayConfig, telemetry: TelemetryConfig | None = None) -> None:
        context = ray.get_runtime_context()
        self._name, self._fleet, self._config, self._directory = name, fleet, config, get_directory(fleet)
        self._telemetry = telemetry
        self._node_id, self._is_revived = context.get_node_id(), is_revived()
        self._info = GatewayInfo(name=name, url="", state="starting", node_id=self._node_id, pid=os.getpid())
        self._up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._front: Front | None = None
        self._tasks = [asyncio.create_task(work) for work in (self._run(), keep_going("beat", self._beat))]

    async def ready(self) -> GatewayInfo:
        """Once connections are accepted; raises what kept the gateway from it."""
        await asyncio.shield(self._up)
        return self._info

    async def snapshot(self) -> dict[str, Any]:
        """Claims and queues of its router: `{"waiting", "rejected", "engines"}`."""
        return self._front.snapshot() if self._front else {}

    async def move_caches(self, engine: str, deadline_s: float) -> MoveReport:
        """Close an engine here, and move the conversations that this gateway knows of to engines that stay."""
        await asyncio.shield(self._up)
        assert self._front is not None  # noqa: S101 - it serves
        return await self._front.app.migrator.drain(engine, deadline_s)

    async def open_engine(self, engine: str) -> None:
        """Send requests to a drained engine again."""
        if self._front is not None:
            self._front.app.migrator.undrain(engine)

    async def rescale(self, engine: str, scales: dict[int, float]) -> None:
        """Another gateway gave an engine's adapters other scales."""
        if self._front is not None:
            self._front.rescale(engine, scales)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish for up to `timeout_s`, close the socket."""
        if self._front is not None:
            await self._front.app.drain(timeout_s)
            await asyncio.to_thread(self._front.close)
        self._stop.set()

    async def _run(self) -> None:
        """Serve; before the first time a failure is the starter's to hear, later ones are tried again for ever."""
        while not self._stop.is_set():
            try:
                self._config = await self._last_port() if self._is_revived else self._config
                self._front = self._front or self._follow()
                await self._front.has_table()
                await self._serve(self._front)
            except Exception as error:  # the actor's border: whoever awaits ready() gets it
                log.exception("gateway %s does not serve", self._name)
                self._tell(state="failed")
                if not (self._is_revived or self._up.done()):
                    self._up.set_exception(error)
                    return
                await asyncio.sleep(RETRY_S)

    def _follow(self) -> Front:
        front = Front(self._config, self._fleet, self._name, self._telemetry)
        self._tasks.append(asyncio.create_task(front.follow()))
        return front

    async def _serve(self, front: Front) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (REBIND_S if self._is_revived else 0.0)
        while True:
            try:
                await serve(front.app, self._config, ready=self._serving, stop=self._stop)
                return
            except ConfigError:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(0.1)

    async def _last_port(self) -> GatewayConfig:
        """Clients know the address: a revived gateway comes back to it, also where port 0 once chose it."""
        async with aclosing(watch_fleet(self._fleet)) as tables:
            status = await anext(tables)
        before = [gateway.url for gateway in status.gateways if gateway.name == self._name and gateway.url]
        return replace(self._config, port=port_of(before[0])) if before else self._config

    def _serving(self, port: int) -> None:
        host = self._config.host
        shown = {"0.0.0.0": node_ip(), "::": node_ip()}.get(host, host)  # noqa: S104
        self._tell(state="ready", url=f"http://{f'[{shown}]' if ':' in shown else shown}:{port}")
        if not self._up.done():
            self._up.set_result(None)

    def _tell(self, **changes: Any) -> None:
        self._info = replace(self._info, **changes)
        self._directory.register_gateway.remote(self._info)

    async def _beat(self) -> None:
        while True:
            self._tell(**(self._front.word() if self._front else {}))
            await asyncio.sleep(HEARTBEAT_S)


def port_of(url: str) -> int:
    """The port in a gateway's URL."""
    return int(url.rpartition(":")[2])
