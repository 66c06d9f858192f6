"""Routes that empty an engine of its conversations, and open it again; `migrate` does the moving."""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from lltm_ray.errors import ConfigError
from lltm_ray.gateway.headers import find
from lltm_ray.gateway.migrate import Migrator
from lltm_ray.gateway.moves import MoveReport
from lltm_ray.gateway.request import Handler, Request, read_pin
from lltm_ray.gateway.timeline import read_caller
from lltm_ray.telemetry.logs import at_work

DRAIN_PATH, UNDRAIN_PATH = "/lltm/drain", "/lltm/undrain"
DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 86_400.0


class Peers(Protocol):
    """The fleet's other gateways: each has its own part of the slots."""

    async def move_caches(self, engine: str, deadline_s: float) -> list[MoveReport]:
        """The same drain at each of them."""

    async def open_engine(self, engine: str) -> None:
        """The same at each of them."""

    async def rescale(self, engine: str, scales: dict[int, float]) -> None:
        """Tell each of them an engine's new adapter scales, by id."""


class DrainRoutes:
    """Handlers of /lltm/drain and /lltm/undrain."""

    def __init__(self, migrator: Migrator, peers: Peers | None = None) -> None:
        self._migrator = migrator
        self._peers = peers

    def build(self) -> dict[tuple[str, str], Handler]:
        """Handlers by method and path."""
        return {("POST", DRAIN_PATH): self._drain, ("POST", UNDRAIN_PATH): self._undrain}

    async def _drain(self, request: Request) -> None:
        """`POST /lltm/drain?engine=X[&timeout_s=30]`: the report; goes on to its end if the client leaves."""
        name, timeout_s = _engine(request), _timeout_s(request)
        at_work.set(read_caller(request.headers))
        if self._peers is None:
            report = await self._migrator.drain(name, timeout_s)
        else:
            own, theirs = self._migrator.drain(name, timeout_s), self._peers.move_caches(name, timeout_s)
            report, others = await asyncio.gather(own, theirs)
            report = sum(others, report)
        await request.reply_json(report.public())

    async def _undrain(self, request: Request) -> None:
        """`POST /lltm/undrain?engine=X`."""
        name = _engine(request)
        self._migrator.undrain(name)
        if self._peers is not None:
            await self._peers.open_engine(name)
        await request.reply_json({"engine": name, "is_closed": False})


def _engine(request: Request) -> str:
    if find(request.headers, b"origin") is not None:
        raise ConfigError("origin", "a web page", "pages may not move engines' caches; use lltm-ray drain")
    name = read_pin(request)
    if not name:
        raise ConfigError("engine", name, "name one with ?engine=")
    return name


def _timeout_s(request: Request) -> float:
    given = request.param("timeout_s")
    try:
        value = DEFAULT_TIMEOUT_S if given is None else float(given)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_TIMEOUT_S:
        raise ConfigError("timeout_s", given, f"must be seconds from 0 to {MAX_TIMEOUT_S:g}")
    return value
