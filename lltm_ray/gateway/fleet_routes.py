"""Routes that speak for the whole fleet; `fleet` does the asking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from lltm_ray.config import GatewayConfig
from lltm_ray.errors import DeadlineError
from lltm_ray.gateway.dashboard.feed import Telemetry, TelemetryUnavailableError
from lltm_ray.gateway.fleet import Fleet
from lltm_ray.gateway.headers import find
from lltm_ray.gateway.own_metrics import as_open_metrics, own_metrics
from lltm_ray.gateway.request import Handler, Request, read_body, read_model, read_pin
from lltm_ray.records import EngineInfo
from lltm_ray.routing.router import Router

PUBLIC = frozenset({"/health", "/v1/health"})
"""Open without a key, as in llama-server."""
STATUS_PATH = "/lltm/status"
MODEL_PATHS = ("/v1/models/", "/models/")
"""A model's name follows, with its own slashes."""
_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
_OPEN_METRICS = b"application/openmetrics-text"
_OPEN_TYPE = _OPEN_METRICS + b"; version=1.0.0; charset=utf-8"
_EOF = b"# EOF\n"
_UP = (
    b"# HELP lltm_telemetry_up Whether the fleet's telemetry answers; without it only the gateway's own are here.\n"
    b"# TYPE lltm_telemetry_up gauge\nlltm_telemetry_up %d\n"
)
_LOADING = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
_DRAINED = b'{"error":{"message":"All engines were drained","type":"unavailable_error","code":503}}'
"""To anybody, so it names none of them; requests are told which, and how to open it again."""


class FleetRoutes:
    """Handlers of /health, /models, /models/NAME, /props, /slots, /metrics, /lora-adapters and /lltm/status."""

    def __init__(
        self,
        router: Router,
        fleet: Fleet,
        config: GatewayConfig,
        look: Callable[[], Any],
        telemetry: Telemetry | None = None,
    ) -> None:
        self._router = router
        self._telemetry = telemetry
        self._fleet = fleet
        self._config = config
        self._look = look

    def build(self) -> dict[tuple[str, str], Handler]:
        """Handlers by method and path."""
        routes: dict[tuple[str, str], Handler] = {("GET", path): self._health for path in PUBLIC}
        routes |= {("GET", path): self._models for path in ("/models", "/v1/models")}
        return routes | {
            ("GET", "/props"): self._props,
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/lora-adapters"): self._lora_adapters,
            ("POST", "/lora-adapters"): self._set_lora_adapters,
            ("GET", STATUS_PATH): self._fleet_status,
        }

    def _engines_for(self, request: Request) -> tuple[EngineInfo, ...]:
        only, model = read_pin(request), request.param("model")
        name = None if only is None and model is None else self._router.resolve(model, only)
        return tuple(engine for engine in self._router.ready(name) if only in (None, engine.name))

    async def _health(self, request: Request) -> None:
        """200 if a request for some model is served or starts an engine, so that a balancer sends it here."""
        first = {engine.model: engine.name for engine in self._router.ready()}
        is_served = any(not self._router.unserved(name) for name in first.values())
        if is_served or any(map(self._comes_on_demand, self._router.models())):
            await request.reply(200, b'{"status":"ok"}')
        else:
            await request.reply(503, _DRAINED if first else _LOADING)

    def _comes_on_demand(self, model: str) -> bool:
        info = self._router.model_info(model)
        return info is not None and info.is_startable and not info.min_engines

    async def _models(self, request: Request) -> None:
        await request.reply_json(await self._fleet.models())

    async def model_path(self, request: Request) -> None:
        """`GET /v1/models/{name}`: one model, as it is listed."""
        name = next(request.path.removeprefix(start) for start in MODEL_PATHS if request.path.startswith(start))
        await request.reply_json(await self._fleet.model(name))

    async def _props(self, request: Request) -> None:
        await request.reply_json(await self._fleet.props(self._engines_for(request)))

    async def _slots(self, request: Request) -> None:
        slots = await self._fleet.slots(self._engines_for(request))
        if request.param("fail_on_no_slot") and all(slot.get("is_processing") for slot in slots):
            error = {"code": 503, "message": "no slot available", "type": "unavailable_error"}
            await request.reply_json({"error": error}, 503)
            return
        await request.reply_json(slots)

    async def _metrics(self, request: Request) -> None:
        """The fleet's figures, and this gateway's own; OpenMetrics, with exemplars, for who asks for it."""
        own = own_metrics(self._look()).encode("utf-8")
        if self._telemetry is None:
            text = await self._fleet.metrics(self._engines_for(request)) + own
            await request.reply(200, text, content_type=_TEXT)
            return
        is_open = _OPEN_METRICS in (find(request.headers, b"accept") or b"")
        try:
            text = await self._telemetry.metrics(is_open=is_open)
            own += _UP % 1
        except TelemetryUnavailableError:
            text = b""
            own += _UP % 0
        if is_open:
            text = text.removesuffix(_EOF) + as_open_metrics(own) + _EOF
        await request.reply(200, text if is_open else text + own, content_type=_OPEN_TYPE if is_open else _TEXT)

    async def _lora_adapters(self, request: Request) -> None:
        await request.reply_json(await self._fleet.lora_adapters(self._engines_for(request)))

    async def _set_lora_adapters(self, request: Request) -> None:
        limit_s = self._config.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                body = await read_body(request.receive, request.headers, self._config.max_body_bytes)
        except TimeoutError:
            raise DeadlineError("the request", limit_s) from None
        read_model(body)  # refuses what is not JSON; the list itself names no model
        only = read_pin(request)
        name = self._router.resolve(request.param("model"), only)
        listed = [engine for engine in self._router.engines(name) if only in (None, engine.name)]
        ready = set(self._router.ready(name))
        engines = [engine for engine in listed if engine in ready]
        if not engines:
            raise self._router.not_ready(name, only)
        # From here on to the end, even if the client leaves: half a fleet with other adapters helps nobody.
        absent = [engine for engine in listed if engine not in ready]
        status, answer = await self._fleet.set_lora_adapters(engines, body, absent=absent)
        await request.reply_json(answer, status)

    async def _fleet_status(self, request: Request) -> None:
        await request.reply_json(self._look())
