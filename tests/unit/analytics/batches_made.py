"""Engines that do as llama-server does: all slots' next tokens, and pieces of prompts, in one batch after the other."""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

START_UNIX_NANO = 1_790_000_000_000_000_000
ENGINES, PIECE = 2, 512
_GENERATED, _START_S = 40, 0.002


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What batches take."""

    step_s: Callable[[int], float]
    """Of so many slots' next tokens."""
    prefill_s: float = 0.0001
    """More, for each token of a prompt."""
    slots: int = 8
    """Of each engine."""
    noise: float = 0.05
    """Spread of requests' pace (sigma of its logarithm)."""


@dataclass(eq=False)
class _Job:
    arrived: float
    prompt: int
    generate: int
    pace: float
    engine: int = -1
    sent: float = 0.0
    left: int = 0
    done: int = 0
    first: float = 0.0
    ended: float = 0.0


@dataclass
class _Engine:
    jobs: list[_Job] = field(default_factory=list)
    batch: list[tuple[_Job, int]] = field(default_factory=list)
    is_idle: bool = True


def serve(machine: Machine, per_s: float, number: int, *, seed: int = 0, is_alike: bool = False) -> list[_Job]:
    """Requests that come at a rate, as they were served.

    Args:
        machine: each engine's.
        per_s: infinite: all come at once.
        number: how many.
        seed: of the dice.
        is_alike: prompts are nearly of one length, and so are answers.
    """
    dice, now, found = random.Random(seed), 0.0, []
    engines, waiting = [_Engine() for _ in range(ENGINES)], deque()
    events: list[tuple[float, int, int | None]] = []
    for _ in range(number):
        now += dice.expovariate(per_s) if per_s < math.inf else 0.0
        prompt = int(100 * math.exp(dice.gauss(0, 0.05 if is_alike else 0.6))) + 4
        generate = _GENERATED if is_alike else 1 + int(dice.expovariate(1 / _GENERATED))
        waiting.append(_Job(now, prompt, generate, math.exp(dice.gauss(0, machine.noise))))
        events.append((now, len(events), None))
    order = len(events)
    while events:
        now, _, code = heapq.heappop(events)
        if code is not None:
            _end_batch(engines[code], now, found)
        while waiting and waiting[0].arrived <= now:
            engine = min(range(ENGINES), key=lambda each: (len(engines[each].jobs), dice.random()))
            if len(engines[engine].jobs) == machine.slots:
                break
            job = waiting.popleft()
            job.engine, job.sent, job.left = engine, now, job.prompt
            engines[engine].jobs.append(job)
        for each, engine in enumerate(engines):
            if engine.jobs and (each == code or engine.is_idle):
                order += 1
                heapq.heappush(events, (now + _begin_batch(engine, machine), order, each))
            engine.is_idle = not engine.jobs
    return sorted(found, key=lambda job: job.arrived)


def _begin_batch(engine: _Engine, machine: Machine) -> float:
    """Returns what it takes."""
    room, is_new = PIECE, any(not job.done and job.left == job.prompt for job in engine.jobs)
    for job in engine.jobs:
        piece = min(job.left, room)
        room -= piece
        if piece or not job.left:
            engine.batch.append((job, piece))
    decoding = sum(not piece for _, piece in engine.batch)
    pace = sum(job.pace for job, _ in engine.batch) / len(engine.batch)
    took = machine.step_s(max(decoding, 1)) + (PIECE - room) * machine.prefill_s
    return took * pace + _START_S * is_new


def _end_batch(engine: _Engine, now: float, found: list[_Job]) -> None:
    for job, piece in engine.batch:
        job.left -= piece
        if not job.left:
            job.done, job.first = job.done + 1, job.first or now
        if job.done >= job.generate:
            job.ended = now
            engine.jobs.remove(job)
            found.append(job)
    engine.batch.clear()


@functools.cache
def most_per_s(machine: Machine, *, is_alike: bool = False) -> float:
    """Requests a second of a fleet whose slots are all held."""
    ended = np.sort([job.ended for job in serve(machine, math.inf, 2000, seed=99, is_alike=is_alike)])
    return float(1500 / (ended[1700] - ended[200]))


def tables_of(jobs: list[_Job], machine: Machine) -> dict[str, pa.Table]:
    """As telemetry tells of them."""
    ids = [f"{i + 1:016x}" for i in range(len(jobs))]
    arrived, sent, first, ended = (
        np.array([getattr(job, name) for job in jobs]) for name in ("arrived", "sent", "first", "ended")
    )
    requests = {
        "span_id": ids,
        "trace_id": [each * 2 for each in ids],
        "request_id": ids,
        "model": ["m"] * len(jobs),
        "status": [200] * len(jobs),
        "arrived_unix_nano": START_UNIX_NANO + np.rint(arrived * 1e9).astype(np.int64),
        "total_s": ended - arrived,
    }
    attempts = {
        "request_span_id": ids,
        "span_id": [f"f{each[1:]}" for each in ids],
        "engine": [f"e{job.engine}" for job in jobs],
        "asked_s": np.zeros(len(jobs)),
        "sent_s": sent - arrived,
        "headers_s": sent - arrived,
        "first_s": first - arrived,
        "ended_s": ended - arrived,
        "computed_tokens": [job.prompt for job in jobs],
        "generated_tokens": [job.generate for job in jobs],
        "outcome": ["ok"] * len(jobs),
    }
    servers = {
        "at_unix_nano": [START_UNIX_NANO] * ENGINES,
        "engine": [f"e{each}" for each in range(ENGINES)],
        "model": ["m"] * ENGINES,
        "slots_total": [machine.slots] * ENGINES,
        "processing": [0.0] * ENGINES,
        "deferred": [0.0] * ENGINES,
    }
    return {"requests": pa.table(requests), "attempts": pa.table(attempts), "servers": pa.table(servers)}
