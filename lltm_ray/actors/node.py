"""NodeActor: the only one on its node that asks llama-servers for their slots and counters."""

from __future__ import annotations

import asyncio
import logging
import time

import ray

from lltm_ray.actors.watch import get_directory, watch_fleet
from lltm_ray.errors import LltmRayError
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.llamacpp.metrics import read_metrics
from lltm_ray.records import EngineInfo, EngineState, ServerCounters

log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 1.0
SAMPLE_TIMEOUT_S = 2.0
COUNTERS_EVERY = 3
"""Samples from one reading of the counters to the next; each reading resets llama.cpp's rate gauges."""


class Sampler:
    """Keeps one HTTP client per live server on this node, counts busy slots and reads counters."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._engines: dict[str, EngineInfo] = {}
        self._clients: dict[str, AsyncLlamaClient] = {}

    def update(self, engines: tuple[EngineInfo, ...]) -> None:
        """Take the directory's table."""
        self._engines = {
            engine.name: engine
            for engine in engines
            if engine.node_id == self._node_id and engine.state in (EngineState.READY, EngineState.DRAINING)
        }

    async def sample(self) -> dict[str, int]:
        """Busy slots by engine; engines that do not answer in time are left out."""
        await self._drop_dead_clients()
        names = list(self._engines)
        counts = await asyncio.gather(*(self._busy(self._engines[name]) for name in names))
        return {name: count for name, count in zip(names, counts, strict=True) if count is not None}

    async def counters(self) -> list[ServerCounters]:
        """Every answering server's counters."""
        read = await asyncio.gather(*(self._counters(engine) for engine in list(self._engines.values())))
        return [each for each in read if each is not None]

    def _client(self, engine: EngineInfo) -> AsyncLlamaClient:
        client = self._clients.get(engine.url)
        if client is None:
            client = self._clients[engine.url] = AsyncLlamaClient(engine.url, api_key=engine.api_key)
        return client

    async def _counters(self, engine: EngineInfo) -> ServerCounters | None:
        asked = time.time_ns()
        try:
            async with asyncio.timeout(SAMPLE_TIMEOUT_S):
                told = read_metrics(await self._client(engine).metrics())
        except (LltmRayError, TimeoutError) as error:
            log.debug("%s gave no counters: %s", engine.name, error)
            return None
        if told.prompt_tokens_total is None or told.tokens_predicted_total is None:
            return None
        return ServerCounters(
            engine=engine.name,
            server_pid=engine.server_pid or 0,
            prompt_tokens=told.prompt_tokens_total,
            generated_tokens=told.tokens_predicted_total,
            busy=told.busy,
            asked_unix_nano=asked,
        )

    async def _busy(self, engine: EngineInfo) -> int | None:
        try:
            async with asyncio.timeout(SAMPLE_TIMEOUT_S):
                return sum(slot.is_processing for slot in await self._client(engine).slots())
        except (LltmRayError, TimeoutError) as error:
            log.debug("%s gave no slots: %s", engine.name, error)
            return None

    async def _drop_dead_clients(self) -> None:
        live = {engine.url for engine in self._engines.values()}
        for url in [url for url in self._clients if url not in live]:
            await self._clients.pop(url).aclose()


class NodeActor:
    """One per node that holds engines."""

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet
        self._sampler = Sampler(ray.get_runtime_context().get_node_id())
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._follow()), loop.create_task(self._report())]

    async def _follow(self) -> None:
        async for status in watch_fleet(self._fleet):
            self._sampler.update(status.engines)

    async def _report(self) -> None:
        turn = 0
        while True:
            busy = await self._sampler.sample()
            counters = await self._sampler.counters() if turn % COUNTERS_EVERY == 0 else []
            turn += 1
            try:
                directory = get_directory(self._fleet)
                directory.report_busy.remote(busy)
                if counters:
                    directory.report_counters.remote(counters)
            except ValueError as error:  # it is being restarted
                log.debug("no directory to report to: %s", error)
            await asyncio.sleep(SAMPLE_EVERY_S)
