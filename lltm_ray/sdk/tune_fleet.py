"""Candidates measured on fleets: started one after the other, warmed up, and loaded as the workload says.

Fleets without a GPU stay until the end, where the host has room for all, so that rounds cost no starts; idle engines
use no cores. On GPUs each is ended before the next starts, for it needs the same memory.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import uvloop

from lltm_ray.config import FleetConfig, GatewayConfig
from lltm_ray.driver import Cluster, join_ray, leave_ray
from lltm_ray.errors import CancelledError, LltmRayError
from lltm_ray.llamacpp.tuning.plan import Candidate, Facts, Workload
from lltm_ray.load.conversations import Shape
from lltm_ray.load.result import LoadPlan
from lltm_ray.load.window import Look, Window, run_window
from lltm_ray.records import FleetStatus
from lltm_ray.sdk.tune import Visit

RATE_RATIO = 0.7
"""Of the default's requests/s in a closed loop: busy, and no queue that grows."""
LEAST_ARRIVALS = 40
"""In a window, for a 95th percentile that means something."""
LONGEST = 4
"""Times the usual window."""
FLEET_BYTES = 2**30
"""What a fleet's own actors take, beside its engines."""
_IDLE_CPUS = 0.01
_SIZING_SEED = 10**5
_PATIENCE_S = 10**6
"""A slow candidate is to be slow, not to refuse."""


class FleetBench:
    """Measures candidates; a context manager that leaves no fleet, and no Ray of its own, behind.

    Args:
        fleet: settings that all candidates share.
        workload: what is sent.
        facts: of model and machine.
        slice_s: seconds of load in one visit, up to `LONGEST` times as many where requests take long; beside it warming
            up takes a third.
        stop: when set, the current visit ends with `CancelledError`.
    """

    def __init__(
        self, fleet: FleetConfig, workload: Workload, facts: Facts, *, slice_s: float, stop: threading.Event
    ) -> None:
        self._fleet = replace(fleet, name=f"tune-{secrets.token_hex(3)}").with_absolute_paths()
        self._workload = workload.fitted(facts.n_ctx_train)
        self._slice_s, self._stop = slice_s, stop
        self._facts, self._keeps = facts, False
        self._clusters: dict[str, Cluster] = {}
        self._owns_ray = False
        self._window_s = 0.0
        self.rate: float | None = None
        """Requests per second at which times to the first token are measured; found with the first candidate."""

    def admit(self, candidates: Sequence[Candidate]) -> None:
        """Say who will come: it decides whether all of them can stay."""
        needed = sum(each.engines * each.bytes_needed(self._facts) + FLEET_BYTES for each in candidates)
        self._keeps = not self._facts.gpus and needed < self._facts.budget_bytes // 2

    def measure(self, candidate: Candidate, number: int) -> Visit:
        """Tokens per second, or the 95th percentile of seconds to the first token.

        Raises:
            CancelledError: stopped.
            LltmRayError: it does not start, or requests failed.
        """
        began = time.monotonic()
        url = self._endpoint(candidate)
        prepare_s = time.monotonic() - began if self._keeps else 0.0
        try:
            if not self._window_s:
                prepare_s += self._size_up(url)
            grace_s = self._window_s if self.rate else 0.0
            look = Look(window_s=self._window_s, warmup_s=max(1.0, self._window_s / 3), grace_s=grace_s)
            seen = self._look(url, look, seed=number, rate=self.rate)
        finally:
            if not self._keeps:
                self._end(candidate.name)
        return Visit(figure=self._figure(seen), prepare_s=prepare_s)

    def _size_up(self, url: str) -> float:
        """From the first candidate: how long a window must be for some requests to end in it, and the rate.

        Returns the seconds that it took.
        """
        asked = self._workload.concurrency
        seen = self._look(url, Look(window_s=2 * LONGEST * self._slice_s, enough=2 * asked), seed=_SIZING_SEED)
        if not seen.ended:
            why = f"no request ended in {seen.seconds:.0f} s; give fewer --concurrency or more --minutes"
            raise LltmRayError(why)
        wanted = asked / seen.requests_per_s
        if self._workload.goal == "ttft":
            self.rate = RATE_RATIO * seen.requests_per_s
            wanted = LEAST_ARRIVALS / self.rate
        self._window_s = min(max(self._slice_s, wanted), LONGEST * self._slice_s)
        return seen.seconds

    def _figure(self, seen: Window) -> float:
        if self._workload.goal == "throughput":
            figure = seen.tokens_per_s
        else:
            waits = sorted(seen.waits_s)
            figure = waits[min(len(waits) - 1, int(0.95 * len(waits)))] if waits else 0.0
        if figure <= 0:
            raise LltmRayError("no request brought a token in a visit; give fewer --concurrency or more --minutes")
        return figure

    def _endpoint(self, candidate: Candidate) -> str:
        """Of the candidate's fleet, which is started if it does not run."""
        if self._stop.is_set():
            raise CancelledError("stopped")
        if candidate.name not in self._clusters:
            self._clusters[candidate.name] = Cluster.start(self.config_of(candidate), on_progress=self._check)
        return self._clusters[candidate.name].endpoint or ""

    def config_of(self, candidate: Candidate) -> FleetConfig:
        """The fleet that a candidate is measured as."""
        words = "".join(character if character.isalnum() else "-" for character in candidate.name)
        return replace(
            self._fleet,
            name=f"{self._fleet.name}-{words}"[:63],
            engines=candidate.engines,
            gpu_share=candidate.gpu_share,
            cpu_share=_IDLE_CPUS if self._keeps else self._fleet.cpu_share,
            engine=candidate.engine,
            gateway=GatewayConfig(port=0, queue_timeout_s=_PATIENCE_S, queue_limit=10**6),
            telemetry=None,
            drain_timeout_s=1.0,
        )

    def _check(self, _status: FleetStatus) -> None:
        if self._stop.is_set():
            raise CancelledError("stopped")

    def _look(self, url: str, look: Look, *, seed: int, rate: float | None = None) -> Window:
        answer_tokens = max(1, self._workload.answer_tokens)
        plan = LoadPlan(url=url, concurrency=self._workload.concurrency, rate=rate, max_tokens=answer_tokens, seed=seed)
        stop = asyncio.Event()
        work = run_window(plan, self._shape(), look, stop=stop)
        seen = uvloop.run(_until_stopped(work, stop, self._stop))
        if seen.stopped:
            raise CancelledError("stopped")
        if seen.errors:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in seen.errors.items())
            raise LltmRayError(f"requests failed: {kinds}: {seen.error_example[:120]}")
        return seen

    def _shape(self) -> Shape:
        asked = self._workload
        return Shape(
            shared_tokens=asked.shared_tokens,
            question_tokens=asked.question_tokens,
            grown_tokens=asked.question_tokens + asked.answer_tokens,
            turns=asked.turns,
            sessions=2 * asked.concurrency,
        )

    def _end(self, name: str) -> None:
        cluster = self._clusters.pop(name, None)
        if cluster is not None:
            cluster.stop()

    def __enter__(self) -> Self:
        self._owns_ray = join_ray()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as ends:  # each is ended, whatever the others' ends bring
            if self._owns_ray:
                ends.callback(leave_ray)
            for name in list(self._clusters):
                ends.callback(self._end, name)


async def _until_stopped(work: Coroutine[Any, Any, Window], stop: asyncio.Event, stopped: threading.Event) -> Window:
    """Pass a signal's wish on to the event loop."""

    async def watch() -> None:
        while not stopped.is_set():  # noqa: ASYNC110 - a signal's handler sets it, which knows no event loop
            await asyncio.sleep(0.1)
        stop.set()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    finally:
        watcher.cancel()
