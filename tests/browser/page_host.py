"""The real gateway on its real server, with a made fleet's telemetry and no engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lltm_ray.config import GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.records import FleetStatus
from lltm_ray.routing.router import Router
from tests.browser.fleet_made import MadeFleet


class Host:
    """A gateway; without `telemetry` its fleet runs without."""

    def __init__(self, telemetry: MadeFleet | None) -> None:
        self.config = GatewayConfig(port=0, drain_timeout_s=5.0)
        self.app = GatewayApp(
            router=Router(self.config.queue_limit, self.config.queue_timeout_s),
            config=self.config,
            keys=ApiKeys(),
            status=lambda: FleetStatus(name="made", engines=()),
            telemetry=telemetry,
        )
        self.url = ""

    def lock(self, key: str) -> None:
        """Only this key opens it from now on."""
        self.app._keys = ApiKeys([key])

    def end_streams(self) -> None:
        """As when the gateway goes."""
        self.app._dashboard_routes.close()


class FleetHost(Host):
    """One whose fleet has telemetry."""

    def __init__(self, fleet: MadeFleet) -> None:
        super().__init__(fleet)
        self.fleet = fleet


@asynccontextmanager
async def serving(host: Host) -> AsyncIterator[None]:
    """Serve it on a free port while the block runs."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    running = asyncio.create_task(serve(host.app, host.config, ready=port.set_result, stop=stop))
    host.url = f"http://127.0.0.1:{await port}"
    try:
        yield
    finally:
        host.end_streams()
        stop.set()
        await running
