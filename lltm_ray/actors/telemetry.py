"""TelemetryActor: one per fleet; a thin face of `telemetry.service`."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import ray

from lltm_ray.actors import names
from lltm_ray.actors.remote import actor, get_named, near, options
from lltm_ray.actors.watch import keep_going, watch_fleet
from lltm_ray.config import FleetConfig, TelemetryConfig, read_environment
from lltm_ray.errors import ConfigError
from lltm_ray.gateway.dashboard.feed import TelemetryUnavailableError
from lltm_ray.records import EngineInfo
from lltm_ray.telemetry.logs import LogHandler
from lltm_ray.telemetry.spans import Place

if TYPE_CHECKING:  # who only starts or asks the actor does without pyarrow and OpenTelemetry's SDK
    from lltm_ray.telemetry.parcel import Parcel
    from lltm_ray.telemetry.store import Page

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_ANSWER_S = 5.0
_OWN_LOG_EVERY_S = 1.0
_MOST_RECALLS = 4
"""Requests that are looked for on disk, or wait for it; more are not found, for most of them do not exist."""


class TelemetryActor:
    """Named `lltm:<fleet>:telemetry`. All work is done in one thread, so that the event loop always answers.

    Only old rows are read in another, for that takes seconds.
    """

    def __init__(self, fleet: str, config: TelemetryConfig, environ: Mapping[str, str]) -> None:
        from lltm_ray.telemetry.batch import forgo_pandas
        from lltm_ray.telemetry.service import TelemetryService

        self._fleet = fleet
        os.environ.update(environ)  # OpenTelemetry's exporters read theirs there
        default = read_environment().cache_dir / "telemetry" / fleet
        folder = Path(config.segment_dir) if config.segment_dir else default
        forgo_pandas()
        self._refusal: ConfigError | None = None
        try:
            self._service = TelemetryService(config, folder, {"lltm.fleet": fleet})
        except ConfigError as error:  # raised here it would reach nobody as itself
            self._refusal = error
            self._service = TelemetryService(replace(config, exporters=(), sample_ratio=1.0), folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="telemetry")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="recall")
        self._recalls = 0
        works = {"follow the directory": self._follow, "keep its own log": self._keep_log}
        self._tasks = [asyncio.create_task(keep_going(what, work)) for what, work in works.items()]

    async def ready(self) -> None:
        """Once it works.

        Raises:
            ConfigError: a setting, or a variable of the environment, that cannot be used.
        """
        if self._refusal is not None:
            raise self._refusal

    async def put(self, sender: str, parcel: Parcel, dropped: Mapping[str, int]) -> None:
        """Rows of one process, by `Outbox.take`; see `TelemetryService.put`."""
        await self._do(self._put, sender, parcel, dropped)

    def _put(self, sender: str, parcel: Parcel, dropped: Mapping[str, int]) -> None:
        from lltm_ray.telemetry.parcel import unseal

        batch, unsound = unseal(parcel)
        self._service.put(sender, batch, dropped, unsound)

    async def look(self) -> dict[str, Any]:
        """The fleet now."""
        return await self._do(self._service.look)

    async def timeline(self, request_id: str) -> dict[str, Any] | None:
        """A request's spans, or None. Older ones are looked for on disk, beside all other work, a few at a time."""
        asked_s = time.monotonic()
        found = await self._do(self._service.timeline, request_id)
        if found is not None or self._recalls >= _MOST_RECALLS:
            return found
        self._recalls += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._reader, self._service.recall, request_id, asked_s)
        finally:
            self._recalls -= 1

    async def metrics(self, *, is_open: bool = False) -> bytes:
        """Prometheus' or OpenMetrics' text."""
        return await self._do(lambda: self._service.metrics(is_open=is_open))

    async def read_since(
        self,
        cursor: int = 0,
        kinds: Sequence[str] | None = None,
        limit: int = 10_000,
        columns: Mapping[str, Collection[str]] | None = None,
    ) -> Page:
        """Rows after a cursor, as Arrow tables by kind; for analytics. See `Store.read_since`."""
        return await self._do(self._service.read_since, cursor, kinds, limit, columns)

    async def close(self) -> None:
        """Flush what is to be exported and stored; the actor is killed afterwards."""
        for task in self._tasks:
            task.cancel()
        await self._do(self._service.close)

    async def _follow(self) -> None:
        async for status in watch_fleet(self._fleet):
            await self._do(self._service.place, {engine.name: _place(engine) for engine in status.engines})

    async def _keep_log(self) -> None:
        from lltm_ray.telemetry.outbox import Outbox

        outbox = Outbox()
        with LogHandler(outbox.add, "telemetry").installed():
            while True:
                await asyncio.sleep(_OWN_LOG_EVERY_S)
                if parcel := outbox.take():
                    await self._do(self._put, "telemetry", parcel, dict(outbox.dropped))

    async def _do(self, work: Callable[..., _T], *given: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)


def make_telemetry(config: FleetConfig, *, detached: bool) -> Any | None:
    """The fleet's telemetry actor, with the starter's `OTEL_*` environment; None where it is off.

    On the starter's node as long as it lives, for its segments are there.
    """
    settings = config.telemetry
    if settings is None or not settings.enabled:
        return None
    environ = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    own = options(detached=detached) | {"name": names.telemetry(config.name)} | near()
    return actor(TelemetryActor).options(**own).remote(config.name, settings, environ)


class RemoteTelemetry:
    """A fleet's telemetry as the gateway asks for it.

    Args:
        fleet: whose.
    """

    def __init__(self, fleet: str) -> None:
        self._name = names.telemetry(fleet)
        self._actor: Any | None = None

    async def look(self) -> dict[str, Any]:
        """As `TelemetryActor.look`; `TelemetryUnavailableError` while it does not answer, as in the other two."""
        found: dict[str, Any] = await self._ask("look")
        return found

    async def timeline(self, request_id: str) -> dict[str, Any] | None:
        """As `TelemetryActor.timeline`."""
        found: dict[str, Any] | None = await self._ask("timeline", request_id)
        return found

    async def metrics(self, *, is_open: bool) -> bytes:
        """As `TelemetryActor.metrics`."""
        found: bytes = await self._ask("metrics", is_open=is_open)
        return found

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(get_named, self._name)
            async with asyncio.timeout(_ANSWER_S):
                return await getattr(self._actor, method).remote(*args, **options)
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            self._actor = None
            raise TelemetryUnavailableError(f"telemetry does not answer: {type(error).__name__}") from error


def _place(engine: EngineInfo) -> Place:
    url = urlsplit(engine.url)
    return Place(url.hostname or "", url.port or 0, (), engine.node_id, engine.model)
