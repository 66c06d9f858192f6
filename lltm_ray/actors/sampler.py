"""What a node's sampler reads: llama-servers' slots and counters, their processes, the GPUs and the machine itself."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

from lltm_ray.actors.remote import node_ip
from lltm_ray.errors import LltmRayError
from lltm_ray.gpu import nvml
from lltm_ray.gpu.meters import GpuSample, read_samples
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.llamacpp.metrics import ServerMetrics, read_metrics
from lltm_ray.records import EngineInfo, EngineState, ServerCounters, SlotState
from lltm_ray.routing.gossip import SlotSample
from lltm_ray.telemetry.rows import GpuRow, NodeRow, ServerRow, SlotRow

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
REPEAT_S = 3.0
"""How long a change is told: a router believes no sample that was taken just when it used the slot itself."""
_NOTHING = ServerMetrics()


class Servers:
    """This node's llama-servers: one HTTP client each, and the only one that asks for their counters.

    Args:
        node_id: Ray's name of this node.
    """

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._engines: dict[str, EngineInfo] = {}
        self._clients: dict[str, AsyncLlamaClient] = {}
        self._slots: dict[str, Sequence[SlotState]] = {}
        self._asked: tuple[int, tuple[EngineInfo, ...]] = 0, ()

    def update(self, engines: tuple[EngineInfo, ...]) -> None:
        """Take the directory's table."""
        self._engines = {
            engine.name: engine
            for engine in engines
            if engine.node_id == self._node_id and engine.state in (EngineState.READY, EngineState.DRAINING)
        }

    @property
    def engines(self) -> tuple[EngineInfo, ...]:
        """Those that can be asked."""
        return tuple(self._engines.values())

    async def read_slots(self) -> list[SlotRow]:
        """Slots of every server that answers in time."""
        await self._drop_dead_clients()
        engines = self.engines
        self._asked = time.time_ns(), engines
        found = await asyncio.gather(*(self._read_slots(engine) for engine in engines))
        self._slots = {engine.name: slots for engine, slots in zip(engines, found, strict=True) if slots is not None}
        now = time.time_ns()
        return [_slot_row(name, slot, now) for name, slots in self._slots.items() for slot in slots]

    def samples(self) -> list[SlotSample]:
        """The last reading as routers are told of it."""
        asked, engines = self._asked
        return [
            SlotSample(
                engine=engine.name,
                server_pid=engine.server_pid,
                slot=slot.id,
                at_unix_nano=asked,
                is_busy=slot.is_processing,
                tokens=slot.prompt_tokens,
                task_id=slot.task_id,
            )
            for engine in engines
            for slot in self._slots.get(engine.name, ())
        ]

    @property
    def busy(self) -> dict[str, int]:
        """Busy slots by engine at the last reading."""
        return {name: sum(slot.is_processing for slot in slots) for name, slots in self._slots.items()}

    async def read_counters(self) -> dict[str, tuple[int, ServerMetrics]]:
        """Every answering server's counters, and when it was asked; each reading resets llama.cpp's rate gauges."""
        engines = self.engines
        read = await asyncio.gather(*(self._read_counters(engine) for engine in engines))
        return {engine.name: each for engine, each in zip(engines, read, strict=True) if each is not None}

    def rows(self, told: dict[str, tuple[int, ServerMetrics]], gpus: Iterable[GpuSample]) -> list[ServerRow]:
        """Servers, their processes and their share of the GPUs' memory. Asks the kernel: some 0.1 ms a server."""
        by_index = {gpu.index: gpu for gpu in gpus}
        rows = []
        for engine in self.engines:
            at, metrics = told.get(engine.name, (time.time_ns(), _NOTHING))
            homes = [by_index[index] for index in engine.gpu_ids if index in by_index]
            rows.append(_server_row(engine, at, metrics, self._slots.get(engine.name, ()), homes))
        return rows

    async def _read_slots(self, engine: EngineInfo) -> list[SlotState] | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return list(await self._client(engine).slots())
        except (LltmRayError, TimeoutError) as error:
            log.debug("%s gave no slots: %s", engine.name, error)
            return None

    async def _read_counters(self, engine: EngineInfo) -> tuple[int, ServerMetrics] | None:
        asked = time.time_ns()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return asked, read_metrics(await self._client(engine).metrics())
        except (LltmRayError, TimeoutError) as error:
            log.debug("%s gave no counters: %s", engine.name, error)
            return None

    def _client(self, engine: EngineInfo) -> AsyncLlamaClient:
        client = self._clients.get(engine.url)
        if client is None:
            client = self._clients[engine.url] = AsyncLlamaClient(engine.url, api_key=engine.api_key)
        return client

    async def _drop_dead_clients(self) -> None:
        live = {engine.url for engine in self._engines.values()}
        for url in [url for url in self._clients if url not in live]:
            await self._clients.pop(url).aclose()


class SlotChanges:
    """Which samples are news: slots that became busy, idle, or hold something else, for as long as `REPEAT_S`."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], tuple[tuple[object, ...], int]] = {}

    def of(self, samples: Iterable[SlotSample]) -> list[SlotSample]:
        """Those of a reading of all servers."""
        before, self._seen = self._seen, {}
        news = []
        for each in samples:
            state = each.server_pid, each.is_busy, each.task_id, 0 if each.is_busy else each.tokens
            old, since = before.get((each.engine, each.slot), ((), 0))
            since = since if state == old else each.at_unix_nano
            self._seen[each.engine, each.slot] = state, since
            if each.at_unix_nano - since <= REPEAT_S * 1e9:
                news.append(each)
        return news


def counters_of(engines: Iterable[EngineInfo], told: dict[str, tuple[int, ServerMetrics]]) -> list[ServerCounters]:
    """What the gateways' accounts are compared with."""
    found = []
    for engine in engines:
        at, metrics = told.get(engine.name, (0, _NOTHING))
        if metrics.prompt_tokens_total is not None and metrics.tokens_predicted_total is not None:
            counters = ServerCounters(
                engine=engine.name,
                server_pid=engine.server_pid or 0,
                prompt_tokens=metrics.prompt_tokens_total,
                generated_tokens=metrics.tokens_predicted_total,
                busy=metrics.busy,
                asked_unix_nano=at,
            )
            found.append(counters)
    return found


class Gpus:
    """This node's GPUs, through one NVML session that stays open; none is a reason, never zeros."""

    def __init__(self) -> None:
        self.reason = nvml.read_inventory().reason
        """Why there are none, in one sentence; empty where there are."""
        self._session = None if self.reason else nvml.session()
        if self._session is not None:
            self._session.__enter__()

    def read(self) -> tuple[GpuSample, ...]:
        """All meters of all devices, once. Blocks for milliseconds."""
        return read_samples() if self._session is not None else ()


def gpu_rows(samples: Iterable[GpuSample], node: str) -> list[GpuRow]:
    """Samples as rows."""
    return [
        GpuRow(
            at_unix_nano=each.at_unix_nano,
            node=node,
            gpu=each.index,
            uuid=each.uuid,
            name=each.name,
            driver=each.driver,
            utilization_ratio=each.utilization_ratio,
            encoder_ratio=each.encoder_ratio,
            decoder_ratio=each.decoder_ratio,
            memory_total_bytes=each.total_bytes,
            memory_used_bytes=each.used_bytes,
            power_w=each.power_w,
            power_limit_w=each.power_limit_w,
            energy_j=each.energy_j,
            temperature_c=each.temperature_c,
            throttle=each.throttle,
            pcie_sent_bytes=each.pcie_sent_bytes,
            pcie_received_bytes=each.pcie_received_bytes,
            ecc_corrected=each.ecc_corrected,
            ecc_uncorrected=each.ecc_uncorrected,
        )
        for each in samples
    ]


def read_node(node: str, gpu_reason: str) -> NodeRow:
    """This machine; the CPU's share is of the time since the last call in this process."""
    memory = psutil.virtual_memory()
    return NodeRow(
        at_unix_nano=time.time_ns(),
        node=node,
        address=node_ip(),
        cpus=os.cpu_count() or 0,
        cpu_ratio=psutil.cpu_percent() / 100,
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.total - memory.available,
        load_1m=os.getloadavg()[0],
        gpu_reason=gpu_reason,
    )


def _slot_row(engine: str, slot: SlotState, now: int) -> SlotRow:
    return SlotRow(
        at_unix_nano=now,
        engine=engine,
        slot=slot.id,
        is_processing=slot.is_processing,
        task=-1 if slot.task_id is None else slot.task_id,
        prompt_tokens=slot.prompt_tokens,
        decoded_tokens=slot.decoded_tokens,
        n_ctx=slot.n_ctx,
    )


def _server_row(
    engine: EngineInfo, at: int, told: ServerMetrics, slots: Sequence[SlotState], homes: Sequence[GpuSample]
) -> ServerRow:
    pid = engine.server_pid or 0
    process = _read_process(pid)
    own = [gpu.process_bytes[pid] for gpu in homes if pid in gpu.process_bytes]
    totals = [gpu.total_bytes for gpu in homes if gpu.total_bytes]
    share = min(engine.share, 1.0)
    return ServerRow(
        at_unix_nano=at,
        node=engine.node_id,
        engine=engine.name,
        model=engine.model,
        server_pid=pid,
        gpu_uuids=",".join(gpu.uuid for gpu in homes),
        share=engine.share,
        gpu_memory_bytes=sum(own) if own else None,
        gpu_memory_share_bytes=round(share * sum(totals)) if totals else None,
        prompt_tokens=told.prompt_tokens_total,
        prompt_tokens_cached=told.prompt_tokens_cached_total,
        prompt_seconds=told.prompt_seconds_total,
        predicted_tokens=told.tokens_predicted_total,
        predicted_seconds=told.tokens_predicted_seconds_total,
        decodes=told.n_decode_total,
        draft_tokens=told.spec_decode_num_draft_tokens_total,
        draft_accepted=told.spec_decode_num_accepted_tokens_total,
        busy_slots_per_decode=told.n_busy_slots_per_decode,
        processing=told.requests_processing,
        deferred=told.requests_deferred,
        slots_total=engine.slots_total,
        slots_busy=sum(slot.is_processing for slot in slots),
        context_tokens=sum(slot.n_ctx for slot in slots),
        context_used_tokens=sum(slot.prompt_tokens + slot.decoded_tokens for slot in slots),
        restarts=engine.restarts,
        **process,
    )


def _read_process(pid: int) -> dict[str, Any]:
    """CPU seconds, memory, threads and open files; all None where the process is gone or not ours to look at."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_info()
            return {
                "cpu_s": times.user + times.system,
                "memory_bytes": memory.rss,
                "virtual_bytes": memory.vms,
                "threads": process.num_threads(),
                "open_files": process.num_fds(),
            }
    except psutil.Error as error:
        log.debug("process %s cannot be read: %s", pid, error)
        return dict.fromkeys(("cpu_s", "memory_bytes", "virtual_bytes", "threads", "open_files"))
