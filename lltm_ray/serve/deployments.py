"""The two deployments: `FleetHolder` keeps the engines alive, `Ingress` is the gateway's ASGI app in a replica."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application

from lltm_ray.actors.fleet import Fleet, find_directory, start_fleet
from lltm_ray.actors.front import Front
from lltm_ray.config import FleetConfig, GatewayConfig, TelemetryConfig
from lltm_ray.errors import EngineError

LOOK_S = 0.5
"""How often a replica that ends looks whether requests still run; in the first such time the last ones reach it."""
LAST_WORDS_S = 5.0
"""For account and telemetry, after the last request."""
HOLDER_GRACE_S = 60.0
"""For ending engines, beyond what their requests may take."""


class _FleetHolder:
    """Starts the engines (the same actors as everywhere) and ends them with the application."""

    def __init__(self, config: FleetConfig) -> None:
        until = time.monotonic() + config.drain_timeout_s + HOLDER_GRACE_S
        while find_directory(config.name) is not None and time.monotonic() < until:
            time.sleep(LOOK_S)  # at a redeployment the old fleet still drains, and Serve takes few failures
        self._fleet: Fleet = start_fleet(config, expose=True)

    def name(self) -> str:
        """The fleet's name; an answer means that its engines are ready."""
        return self._fleet.config.name

    def check_health(self) -> None:
        """Serve asks now and then; a fleet without its directory is started anew."""
        self._fleet.status()

    def __del__(self) -> None:
        if hasattr(self, "_fleet"):
            self._fleet.stop()


class _Ingress:
    """HTTP in, bytes from llama-server out; holds no logic of its own."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, config: GatewayConfig, holder: Any, telemetry: TelemetryConfig | None
    ) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        self._front = Front(config, await holder.name.remote(), f"serve-{replica}", telemetry)
        self._following = asyncio.create_task(self._front.serve_unseen())
        await self._front.has_table()

    def check_health(self) -> None:
        """Unhealthy when nobody keeps its table true any more."""
        if self._following.done():
            raise EngineError("the gateway follows its fleet no more")

    async def __del__(self) -> None:
        """Serve's last call, when what ran here has ended: the others get our slots at once."""
        if not hasattr(self, "_following"):  # it was never built
            return
        await self._front.app.drain(0.0)
        self._following.cancel()  # sends what telemetry has left
        await asyncio.gather(self._front.leave(), asyncio.wait({self._following}, timeout=LAST_WORDS_S))
        await asyncio.to_thread(self._front.close)

    def __serve_build_asgi_app__(self) -> Any:
        return self._front.app


_COMMON: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "logging_config": {"enable_access_log": False}}
_HOLDER: Any = serve.deployment(name="fleet", num_replicas=1, **_COMMON)(_FleetHolder)
_INGRESS: Any = serve.deployment(
    name="gateway", max_ongoing_requests=10_000, graceful_shutdown_wait_loop_s=LOOK_S, **_COMMON
)(serve.ingress()(_Ingress))


def bind(fleet: FleetConfig, gateway: GatewayConfig) -> Application:
    """Both deployments, with as much time to end as the settings give to what runs."""
    holder = _HOLDER.options(graceful_shutdown_timeout_s=fleet.drain_timeout_s + HOLDER_GRACE_S)
    ingress = _INGRESS.options(graceful_shutdown_timeout_s=gateway.drain_timeout_s + LAST_WORDS_S)
    if gateway.processes > 1:  # else their number is left to Serve's own settings
        ingress = ingress.options(num_replicas=gateway.processes)
    started = holder.bind(replace(fleet, gateway=None))
    app: Application = ingress.bind(replace(gateway, processes=1), started, fleet.telemetry)
    return app
