"""The two deployments: `FleetHolder` keeps the engines alive, `Ingress` is the gateway's ASGI app in a replica."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

from lltm_ray.actors.fleet import Fleet, start_fleet
from lltm_ray.actors.front import Front
from lltm_ray.config import FleetConfig, GatewayConfig, TelemetryConfig
from lltm_ray.errors import EngineError


class _FleetHolder:
    """Starts the engines (the same actors as everywhere) and ends them with the application."""

    def __init__(self, config: FleetConfig) -> None:
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

    def __serve_build_asgi_app__(self) -> Any:
        return self._front.app


_COMMON: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "logging_config": {"enable_access_log": False}}
FleetHolder: Any = serve.deployment(name="fleet", num_replicas=1, **_COMMON)(_FleetHolder)
Ingress: Any = serve.deployment(name="gateway", max_ongoing_requests=10_000, **_COMMON)(serve.ingress()(_Ingress))
