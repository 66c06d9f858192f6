"""The dashboard's real routes on the gateway's own ASGI host, with nothing else behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from lltm_ray.config import GatewayConfig
from lltm_ray.errors import AuthenticationError
from lltm_ray.gateway.accounting import RequestRecord
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.dashboard.routes import PUBLIC, TIMELINE_PATH, DashboardRoutes
from lltm_ray.gateway.replies import NOT_FOUND, Receive, Scope, Send, send_error
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.server import bind
from tests.browser.fleet_made import MadeFleet


class Host:
    """An ASGI app; `fleet` None: a fleet without telemetry."""

    def __init__(self, fleet: MadeFleet | None) -> None:
        self.fleet = fleet
        self.routes = DashboardRoutes(fleet)
        self.keys = ApiKeys()
        self.url = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        request = Request(
            method=scope["method"], path=path, query=scope["query_string"], headers=scope["headers"], receive=receive,
            send=send, link=None, id="r", arrived_at=0.0, record=RequestRecord(request_id="r", route=path),
        )  # fmt: skip
        try:
            if path not in PUBLIC:
                self.keys.check(request.headers)
        except AuthenticationError as error:
            await send_error(send, error, [])
            return
        handler: Any = self.routes.build().get((request.method, path))
        if handler is None and path.startswith(TIMELINE_PATH + "/"):
            handler = self.routes.timeline_path
        if handler is None:
            await request.reply(404, NOT_FOUND)
        else:
            await handler(request)


@asynccontextmanager
async def serving(host: Host) -> AsyncIterator[Host]:
    """Serve it on a free port while the block runs."""
    listener = bind(GatewayConfig(port=0))
    host.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(host, lifespan="off", log_level="warning", timeout_graceful_shutdown=2))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield host
    finally:
        host.routes.close()
        server.should_exit = True
        await running
