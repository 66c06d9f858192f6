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
from lltm_ray.actors.remote import actor, find, get_named, near, options
from lltm_ray.actors.watch import keep_going, reach_directory
from lltm_ray.config import AnalyticsConfig, FleetConfig
from lltm_ray.errors import FleetError, PlacementError
from lltm_ray.gpu.nvml import read_inventory, visible
from lltm_ray.gpu.shares import memory_budget

if TYPE_CHECKING:  # who only starts or asks the actor does without pandas
    from lltm_ray.analytics.compare import Comparison
    from lltm_ray.analytics.report import Report
    from lltm_ray.analytics.service import AnalyticsService
    from lltm_ray.telemetry.store import Page

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_NICENESS = 19
"""Engines and gateways on this machine come first: a report may take what CPU they leave."""
_PAGE_ROWS = 20_000
_TELEMETRY_S = 30.0
START_S = 60.0
"""To import cuDF and make its memory pool on a cold machine."""
_MOST_ASKED = 2
"""One question is at work, one waits for its turn: who has given up waiting must not leave a pile of work behind."""


class AnalyticsActor:
    """Named `lltm:<fleet>:analytics`.

    Questions are worked on in one thread, rows and hints in another, so that a long report lets no hint expire.
    """

    def __init__(self, fleet: str, config: AnalyticsConfig) -> None:
        os.nice(_NICENESS)
        self._fleet, self._config = fleet, config
        self._telemetry: Any | None = None
        self._cursor, self._is_level, self._asked = 0, False, 0
        self._service: AnalyticsService | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="analytics")
        self._questions = ThreadPoolExecutor(1, thread_name_prefix="questions")
        self._reading, self._turn = asyncio.Lock(), asyncio.Lock()
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
            FleetError: telemetry does not answer; or one question is at work and another one waits.
        """
        return await self._answer(lambda service: service.report(window_s, until_unix_s))

    async def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        """As `AnalyticsService.compare`; raises `FleetError` as `report`."""
        return await self._answer(lambda service: service.compare(before, after))

    async def status(self) -> dict[str, object]:
        """Engine, reason, rows kept."""
        return await self._do(lambda: self._ensure_service().status())

    async def _answer(self, work: Callable[[AnalyticsService], _T]) -> _T:
        if self._asked >= _MOST_ASKED:
            why = f"analytics of fleet {self._fleet!r} is busy: one report is being made and another one waits"
            raise FleetError(f"{why}; ask again later, or for a shorter window")
        self._asked += 1
        try:
            async with self._turn:
                await self._catch_up()
                service = await self._do(self._ensure_service)
                return await asyncio.get_running_loop().run_in_executor(self._questions, work, service)
        finally:
            self._asked -= 1

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
            is_first, rows = True, _PAGE_ROWS
            while rows >= _PAGE_ROWS:
                page = await self._read()
                # what went before we looked is not of our window; what a later page misses, the first one has counted
                missed = page.missed_rows if self._is_level and is_first else 0
                rows = await self._do(self._take, page, missed)
                self._cursor, is_first = page.cursor, False
            self._is_level = True

    def _take(self, page: Page, missed_rows: int) -> int:
        from lltm_ray.analytics.window import own

        self._ensure_service().add(own(page.tables), missed_rows, is_gap=page.missed_rows > 0)
        return sum(table.num_rows for table in page.tables.values())

    async def _read(self) -> Page:
        from lltm_ray.analytics.service import COLUMNS

        try:
            if self._telemetry is None:
                self._telemetry = await asyncio.to_thread(get_named, names.telemetry(self._fleet))
            telemetry: Any = self._telemetry
            async with asyncio.timeout(_TELEMETRY_S):
                page: Page = await telemetry.read_since.remote(self._cursor, tuple(COLUMNS), _PAGE_ROWS, COLUMNS)
                return page
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


def make_analytics(config: FleetConfig, *, detached: bool, is_shared: bool = False) -> Any:
    """The actor; it may be pending for want of a GPU, see `wait_for_analytics`.

    Args:
        config: the fleet's.
        detached: it outlives the process that makes it.
        is_shared: take one of this name that somebody else has made meanwhile. A fleet that starts must not: it would
            be an earlier fleet's.
    """
    settings = config.analytics
    place = {"num_gpus": settings.gpu_share} if settings.gpu_share else near()
    own = options(detached=detached) | {"name": names.analytics(config.name), "get_if_exists": is_shared} | place
    return actor(AnalyticsActor).options(**own).remote(config.name, settings)


def wait_for_analytics(handle: Any, config: AnalyticsConfig) -> None:
    """Return once it works.

    Raises:
        PlacementError: no GPU is free for it within `START_S`.
        FleetError: it died, or it needs no GPU and has not started within `START_S`.
        ConfigError, MissingExtraError: as `AnalyticsActor.ready`.
    """
    try:
        ray.get(handle.ready.remote(), timeout=START_S)
    except ray.exceptions.RayActorError as error:
        raise FleetError(f"analytics died while it started: {type(error).__name__}") from None
    except ray.exceptions.GetTimeoutError:
        if not config.gpu_share:
            raise FleetError(f"analytics has not started within {START_S:g} s") from None
        free = ray.available_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        raise PlacementError(f"{config.gpu_share:g} GPUs (analytics.gpu_share)", f"{free:g}") from None
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None


def find_analytics(name: str) -> Any | None:
    """A running fleet's, or None."""
    return find(names.analytics(name))
