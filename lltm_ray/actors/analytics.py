"""AnalyticsActor: one per fleet, on a GPU of its own or on none; a thin face of `analytics.service`.

It only reads what telemetry keeps. Nothing waits for it: a fleet serves the same while it works, is killed, or is not
there at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from lltm_ray._optional import load
from lltm_ray.actors import names
from lltm_ray.actors.crew import cause_of
from lltm_ray.actors.remote import actor, find, near, options
from lltm_ray.actors.watch import keep_going, reach_directory
from lltm_ray.config import AnalyticsConfig, FleetConfig
from lltm_ray.errors import FleetError, PlacementError
from lltm_ray.gpu.nvml import read_inventory, visible
from lltm_ray.gpu.shares import memory_budget

if TYPE_CHECKING:  # who only starts or asks the actor does without pandas
    from lltm_ray.analytics.compare import Comparison
    from lltm_ray.analytics.report import Report
    from lltm_ray.analytics.service import AnalyticsService

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_PAGE_ROWS = 20_000
_TELEMETRY_S = 30.0
START_S = 60.0
"""To import cuDF and make its memory pool on a cold machine."""


class AnalyticsActor:
    """Named `lltm:<fleet>:analytics`. All work is done in one thread, so that the event loop always answers."""

    def __init__(self, fleet: str, config: AnalyticsConfig) -> None:
        self._fleet, self._config = fleet, config
        self._telemetry: Any | None = None
        self._cursor = 0
        self._service: AnalyticsService | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="analytics")
        self._reading = asyncio.Lock()
        works = {"follow telemetry": self._follow} if config.enabled else {}
        works |= {"make hints": self._advise} if config.hints else {}
        self._tasks = [asyncio.create_task(keep_going(*each)) for each in works.items()]

    async def ready(self) -> None:
        """Once it works.

        Raises:
            ConfigError: the engine that was asked for is not usable.
            MissingExtraError: pandas or NetworkX is not installed.
        """
        await self._do(self._ensure_service)

    async def report(self, window_s: float | None = None, until_unix_s: float | None = None) -> Report:
        """As `AnalyticsService.report`, over all that telemetry has by now.

        Raises:
            FleetError: telemetry does not answer.
        """
        await self._catch_up()
        return await self._do(lambda: self._ensure_service().report(window_s, until_unix_s))

    async def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        """As `AnalyticsService.compare`; raises `FleetError` as `report`."""
        await self._catch_up()
        return await self._do(lambda: self._ensure_service().compare(before, after))

    async def status(self) -> dict[str, object]:
        """Engine, reason, rows kept."""
        return await self._do(lambda: self._ensure_service().status())

    def _ensure_service(self) -> AnalyticsService:
        if self._service is None:
            service = load("lltm_ray.analytics.service:AnalyticsService", extra="analytics", feature="analytics")
            self._service = service(self._config, _make_engine(self._config), self._fleet)
        return self._service

    async def _follow(self) -> None:
        while True:
            try:
                await self._catch_up()
            except FleetError as error:
                log.warning("analytics goes on with what it has: %s", error.message)
            await asyncio.sleep(self._config.read_every_s)

    async def _advise(self) -> None:
        """Tell routers, through the directory, as long as there is anything to tell."""
        is_told = is_away = False
        while True:
            await asyncio.sleep(self._config.hints_every_s)
            hints = await self._do(lambda: self._ensure_service().hints(time.time_ns()))
            if not (hints or is_told):
                continue
            try:
                await (await reach_directory(self._fleet)).hint.remote(hints)
                is_told, is_away = bool(hints), False
            except (ray.exceptions.RayError, ValueError) as error:
                if not is_away:
                    log.warning("no directory of %s to give hints to, trying again: %s", self._fleet, error)
                is_away = True

    async def _catch_up(self) -> None:
        """Read what telemetry has, page by page."""
        async with self._reading:
            while True:
                page = await self._read()
                rows = sum(table.num_rows for table in page.tables.values())
                missed = page.missed_rows if self._cursor else 0  # what went before we looked is not of our window
                self._cursor = page.cursor
                await self._do(lambda tables, missed: self._ensure_service().add(tables, missed), page.tables, missed)
                if rows < _PAGE_ROWS:
                    return

    async def _read(self) -> Any:
        from lltm_ray.analytics.service import KINDS

        try:
            if self._telemetry is None:
                self._telemetry = await asyncio.to_thread(ray.get_actor, names.telemetry(self._fleet), names.NAMESPACE)
            telemetry: Any = self._telemetry
            async with asyncio.timeout(_TELEMETRY_S):
                return await telemetry.read_since.remote(self._cursor, KINDS, _PAGE_ROWS)
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            self._telemetry = None
            why = f"telemetry of fleet {self._fleet!r} does not answer ({type(error).__name__})"
            raise FleetError(f"{why}; it must run with telemetry.enabled = true") from error

    async def _do(self, work: Callable[..., _T], *given: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)


def _make_engine(config: AnalyticsConfig) -> Any:
    """The share decides: without one, a GPU that is visible all the same belongs to others."""
    choose = load("lltm_ray.analytics.frames:choose_engine", extra="analytics", feature="analytics")
    if not config.gpu_share:
        return choose("pandas", reason="it has no share of a GPU (analytics.gpu_share = 0)")
    gpus = visible(read_inventory(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        return choose(config.engine)
    total = gpus[0].total_bytes
    return choose(config.engine, memory_bytes=memory_budget(total, total, config.gpu_share))


def make_analytics(config: FleetConfig, *, detached: bool) -> Any:
    """The actor; it may be pending for want of a GPU, see `wait_for_analytics`."""
    settings = config.analytics
    place = {"num_gpus": settings.gpu_share} if settings.gpu_share else near()
    own = options(detached=detached) | {"name": names.analytics(config.name), "get_if_exists": True} | place
    return actor(AnalyticsActor).options(**own).remote(config.name, settings)


def wait_for_analytics(handle: Any, config: AnalyticsConfig) -> None:
    """Return once it works.

    Raises:
        PlacementError: no GPU is free for it within `START_S`.
        ConfigError, MissingExtraError: as `AnalyticsActor.ready`.
    """
    try:
        ray.get(handle.ready.remote(), timeout=START_S)
    except ray.exceptions.GetTimeoutError:
        free = ray.available_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        raise PlacementError(f"{config.gpu_share:g} GPUs (analytics.gpu_share)", f"{free:g} of {START_S:g} s") from None
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None


def find_analytics(name: str) -> Any | None:
    """A running fleet's, or None."""
    return find(names.analytics(name))
