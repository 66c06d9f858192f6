"""A fleet that is not there: rows as its processes would send them, through the real telemetry service."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import Any

from lltm_ray.config import TelemetryConfig
from lltm_ray.gateway.dashboard.feed import TelemetryUnavailableError
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.rows import AttemptRow, RequestRow
from lltm_ray.telemetry.service import TelemetryService
from lltm_ray.telemetry.spans import Place
from tests.unit.telemetry.rows_made import (
    attempt_row,
    gpu_row,
    node_row,
    queue_row,
    request_row,
    server_row,
    slot_row,
)

ENGINES = ("engine-0", "engine-1", "engine-2")
NODES = ("node-a", "node-b")
N_CTX = 8192
SLOTS = 4
_ERRORS = (
    (429, "overloaded_error", "every slot is busy"),
    (504, "timeout", "the request took longer than 600 s"),
    (0, "client_gone", "the client left"),
    (502, "engine_exited", "engine-1: its server ended with signal 9"),
)
_SAMPLE_S = 1.0


class MadeFleet:
    """Telemetry with a script: `DashboardRoutes` asks it as it would ask the actor.

    Args:
        gpus: how many; 0: machines tell why they have none.
        seed: of all that is random.
    """

    def __init__(self, gpus: int = 3, seed: int = 1) -> None:
        self.service = TelemetryService(TelemetryConfig(exporters=()), None, {"lltm.fleet": "made"})
        self.away = ""
        """Why it does not answer; empty: it does."""
        self.looks: dict[float, dict[str, Any]] = {}
        """Every look that was given, by its time."""
        self.busy = 0.0
        self._gpus = [f"GPU-{number}" for number in range(gpus)]
        self._random = random.Random(seed)
        self._count = 0
        self._energy = dict.fromkeys(self._gpus, 1e6)
        self._counters = {engine: [1e4, 5e4, 100.0] for engine in ENGINES}
        self._held: dict[tuple[str, int], int] = {}
        self.service.place(
            {engine: Place("127.0.0.1", 9000 + at, self._home(at), NODES[at % 2]) for at, engine in enumerate(ENGINES)}
        )

    # --- what the gateway asks

    async def look(self) -> dict[str, Any]:
        if self.away:
            raise TelemetryUnavailableError(self.away)
        found = self.service.look()
        self.looks[float(found["at_unix_nano"])] = found
        return found

    async def timeline(self, request_id: str) -> dict[str, Any] | None:
        if self.away:
            raise TelemetryUnavailableError(self.away)
        return self.service.timeline(request_id)

    async def metrics(self, *, is_open: bool) -> bytes:
        return self.service.metrics(is_open=is_open)

    def close(self) -> None:
        self.service.close()

    # --- what happens

    async def keep_sampling(self) -> None:
        """A tick each second, as busy as `busy` says."""
        while True:
            self.sample(busy=self.busy)
            await asyncio.sleep(_SAMPLE_S)

    def sample(self, at_s: float | None = None, busy: float = 0.0) -> None:
        """One tick of every sampler; `busy` is the part of slots that work."""
        at = time.time_ns() if at_s is None else int(at_s * 1e9)
        rows: dict[str, list[Any]] = {"servers": [], "slots": []}
        for number, engine in enumerate(ENGINES):
            self._sample_engine(rows, number, engine, at, busy)
        rows["gpus"] = [self._gpu(number, uuid, at, busy) for number, uuid in enumerate(self._gpus)]
        reason = "" if self._gpus else "no NVIDIA driver is loaded (libnvidia-ml.so.1 was not found)"
        rows["nodes"] = [
            node_row(at_unix_nano=at, node=node, address=f"10.0.0.{number + 1}", cpus=16, cpu_ratio=0.06 + 0.5 * busy,
                     memory_total_bytes=128 * 2**30, memory_used_bytes=int((31 + 9 * busy) * 2**30), gpu_reason=reason)
            for number, node in enumerate(NODES)
        ]  # fmt: skip
        waiting = round(7 * busy**4)
        rows["queues"] = [queue_row(at_unix_nano=at, model="qwen3-8b", waiting=waiting, running=round(12 * busy))]
        self._put({kind: some for kind, some in rows.items() if some})

    def lose_gpus(self) -> None:
        """Machines have none from now on."""
        self._gpus = []

    def serve(self, ended_s: float | None = None, **changes: Any) -> str:
        """One request that has just ended; returns its id."""
        ended = time.time() if ended_s is None else ended_s
        row, attempts = self._request(ended)
        row = row._replace(**changes)
        self._put({"requests": [row], "attempts": attempts})
        return row.request_id

    def fail(self, ended_s: float | None = None) -> str:
        """One that ended badly."""
        status, kind, error = self._random.choice(_ERRORS)
        return self.serve(ended_s, status=status, error_type=kind, error=error, finish_reasons="")

    def fail_over(self) -> str:
        """One that a second engine took over in the middle."""
        row, (first,) = self._request(time.time())
        at = row.total_s
        first = first._replace(ended_s=0.45 * at, outcome="continued", is_estimate=True, engine=ENGINES[1])
        second = first._replace(
            span_id=f"{self._count:015x}f", number=2, engine=ENGINES[2], asked_s=0.45 * at, sent_s=0.5 * at,
            headers_s=0.52 * at, first_s=0.66 * at, ended_s=0.995 * at, cached_tokens=96, computed_tokens=1480,
            outcome="ok", is_continued=True, is_estimate=False,
        )  # fmt: skip
        self._put({"requests": [row], "attempts": [first, second]})
        return row.request_id

    def run(self, seconds: int, per_s: float, errors: float = 0.02) -> None:
        """So many last seconds of load, at once."""
        now = time.time()
        for ago in range(seconds, 0, -1):
            rate = per_s * (1 + 0.35 * math.sin(ago / 17)) * self._random.uniform(0.7, 1.3)
            for _ in range(round(rate)):
                self._count += 1
                ended = now - ago + self._random.random()
                self.fail(ended) if self._random.random() < errors else self.serve(ended)
            if ago <= 8:
                self.sample(now - ago, busy=0.8)

    def _put(self, rows: dict[str, list[Any]]) -> None:
        self.service.put("made", {kind: pack(kind, some) for kind, some in rows.items() if some}, {})

    def _home(self, number: int) -> tuple[str, ...]:
        return (self._gpus[number % len(self._gpus)],) if self._gpus else ()

    def _request(self, ended_s: float) -> tuple[RequestRow, list[AttemptRow]]:
        self._count += 1
        draw = self._random
        prompt = int(draw.lognormvariate(6.8, 0.6)) + 40
        cached = int(prompt * draw.choice((0.0, 0.6, 0.9, 0.97)))
        wait_s, prefill_s = draw.expovariate(12), 0.02 + (prompt - cached) / 4200
        out = int(draw.lognormvariate(4.6, 0.5)) + 5
        first_s = 0.003 + wait_s + 0.004 + prefill_s
        total_s = first_s + out / 62
        busy = draw.randrange(SLOTS)
        row = request_row(
            trace_id=f"{draw.getrandbits(128):032x}", span_id=f"{self._count:015x}0", model="qwen3-8b",
            request_id=f"req-{self._count:06d}-{draw.getrandbits(32):08x}", ttft_s=first_s, total_s=total_s,
            arrived_unix_nano=int((ended_s - total_s) * 1e9),
            delivered_tokens=out, response_model="qwen3-8b", finish_reasons="stop",
            why=f"{cached:,} of {prompt:,} prompt tokens cached; {busy} of {SLOTS} slots busy",
        )  # fmt: skip
        engine, slot = draw.choice(ENGINES), draw.randrange(SLOTS)
        attempt = attempt_row(
            trace_id=row.trace_id, request_span_id=row.span_id, span_id=f"{self._count:015x}a", engine=engine,
            slot=slot, asked_s=0.001, sent_s=0.003 + wait_s, headers_s=0.007 + wait_s, first_s=first_s,
            ended_s=total_s - 0.001, predicted_cached_tokens=cached, cached_tokens=cached,
            computed_tokens=prompt - cached, generated_tokens=out, delivered_tokens=out,
            prompt_ms=1000 * prefill_s, predicted_ms=1000 * out / 62,
        )  # fmt: skip
        self._held[engine, slot] = prompt + out
        return row, [attempt]

    def _sample_engine(self, rows: dict[str, list[Any]], number: int, engine: str, at: int, busy: float) -> None:
        counters = self._counters[engine]
        for place, (most, least) in enumerate(((2600, 0), (610, 0), (1.4, 0.01))):
            counters[place] += least + most * busy * self._random.uniform(0.8, 1.2) * _SAMPLE_S
        working = [self._random.random() < busy for _ in range(SLOTS)]
        held = [self._held.get((engine, slot), 0) for slot in range(SLOTS)]
        rows["slots"] += [
            slot_row(at_unix_nano=at, engine=engine, slot=slot, is_processing=working[slot], n_ctx=N_CTX,
                     prompt_tokens=held[slot], decoded_tokens=self._random.randrange(200) if working[slot] else 0)
            for slot in range(SLOTS)
        ]  # fmt: skip
        home = self._home(number)
        rows["servers"].append(
            server_row(at_unix_nano=at, node=NODES[number % 2], engine=engine, model="qwen3-8b",
                       server_pid=4100 + number, gpu_uuids=",".join(home), share=0.5 if home else 0.0,
                       gpu_memory_bytes=int(9.4 * 2**30) if home else None, prompt_tokens=counters[0],
                       predicted_tokens=counters[1], cpu_s=counters[2], slots_total=SLOTS,
                       slots_busy=sum(working), context_tokens=SLOTS * N_CTX,
                       context_used_tokens=sum(held), memory_bytes=int(2.1 * 2**30), deferred=0.0)
        )  # fmt: skip

    def _gpu(self, number: int, uuid: str, at: int, busy: float) -> Any:
        power = 68 + 540 * busy * self._random.uniform(0.9, 1.05)
        self._energy[uuid] += power * _SAMPLE_S
        return gpu_row(
            at_unix_nano=at, node=NODES[number % 2], gpu=number // 2, uuid=uuid, name="NVIDIA H200", driver="580.65.06",
            utilization_ratio=min(1.0, 0.02 + busy * self._random.uniform(0.9, 1.1)), memory_total_bytes=141 * 2**30,
            memory_used_bytes=int((18 + 3 * number) * 2**30), power_w=power, power_limit_w=700.0,
            energy_j=self._energy[uuid], temperature_c=34 + 40 * busy,
            throttle=0x4 if busy > 0.7 and number == 2 else 0,
        )  # fmt: skip
