"""`build_app`: settings in, a Ray Serve application out."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.serve import Application

from lltm_ray.config import FleetConfig, GatewayConfig, build
from lltm_ray.errors import ConfigError
from lltm_ray.serve.deployments import bind
from lltm_ray.telemetry.content import settle_content


def build_app(config: FleetConfig | Mapping[str, Any] | None = None) -> Application:
    """A fleet as a Serve application: its ingress is the gateway's ASGI app, its engines are the same actors.

    Args:
        config: a `FleetConfig`, or its fields. Values may be text and names dotted, as `serve run` passes them:
            `serve run lltm_ray.serve:app model=tiny engines=2 engine.n_parallel=8`.

    Who may reach the endpoint is Serve's to say (`http_options`); keys are checked when `gateway.api_key_file` is set.
    `gateway.processes` is the number of ingress replicas; each owns its part of every engine's slots, as gateways do.
    One that Serve ends finishes what runs for up to `gateway.drain_timeout_s`; then the others have its slots.

    Raises:
        ConfigError: an unknown or wrong setting, an address, which Serve binds, or a wrong word in the environment's
            choice of captured content.
    """
    fleet = config if isinstance(config, FleetConfig) else build(FleetConfig, _nested(config or {}))
    gateway = fleet.gateway or GatewayConfig()
    for name in ("host", "port"):
        if getattr(gateway, name) != getattr(GatewayConfig(), name):
            raise ConfigError(
                f"gateway.{name}", getattr(gateway, name), "Serve binds the address: use its http options"
            )
    fleet = replace(fleet, telemetry=settle_content(fleet.telemetry, os.environ))
    return bind(fleet, gateway)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *tables, name = dotted.split(".")
        table = nested
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(dotted, value, f"{part} is both a value and a table")
        table[name] = _parsed(value)
    return nested


def _parsed(value: Any) -> Any:
    """Text that is a TOML value is that value; other text stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
