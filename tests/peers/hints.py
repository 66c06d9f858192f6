"""Whether hints pay: 4 real engines on CPUs, routers that follow analytics' hints against routers that do not.

`python -m tests.peers.hints [--rounds 4] [--seconds 38] [--workloads straggler,prefix,aggressor] [--json FILE]`. Each
round plays a workload twice on the same engines, with hints and without, in turns first: the same arrivals, lengths
and order, other words, so that neither finds the other's prompts cached; gateways are fresh. Hints are made by another
process, whose CPU time the engines lack, as on a node without a GPU. Figures are of requests after the warm-up; ratios
are on over off, with 95 % intervals from a bootstrap over rounds, then over pairs of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lltm_ray.analytics.frames import Engine, choose_engine
from lltm_ray.analytics.hints import make_hints
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.config import GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.gateway.trace import Tracing
from lltm_ray.models.tiny import TinyShape
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, Hints
from lltm_ray.routing.router import Router
from lltm_ray.routing.served import SlotShare
from lltm_ray.telemetry.batch import pack

from .client import Client, Reply
from .engines import ENGINES, SLOT_TOKENS, SLOTS, Server, servers
from .processes import running
from .workloads import filler

SHAPE = TinyShape(n_embd=128, n_head=2, n_head_kv=2, n_layer=2, n_ff=384)
SALT = b"of the hints' bench"
EVERY_S, WINDOW_S = 3.0, 45.0
WARM_SHARE, FAULT_SHARE = 0.5, 0.1
"""Of a play: before it is measured, by when hints are there; and before the fault begins."""
STOP_S, GO_S, SLOW_FACTOR = 0.02, 0.01, 4
"""Every engine is stopped for so long, then runs for so long, so that four of them leave time to all else on two cores
and a wait for a core hardly tells; a slowed one's stops are longer."""
DRAWS = 4000
KINDS = ("off", "on")
_STUTTER = """
import os, signal, sys, time
pid, stop_s, go_s, factor = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), [1]
signal.signal(signal.SIGUSR1, lambda *_: factor.__setitem__(0, float(sys.argv[4])))
signal.signal(signal.SIGUSR2, lambda *_: factor.__setitem__(0, 1))
print("ready", flush=True)
while True:
    os.kill(pid, signal.SIGSTOP); time.sleep(stop_s * factor[0])
    os.kill(pid, signal.SIGCONT); time.sleep(go_s)
"""


# --- what is asked


@dataclass(frozen=True)
class Asked:
    """One request of a plan; its words are made when it is played."""

    at_s: float
    group: str
    gateway: int
    system: int
    """Which shared system prompt; -1: none."""
    tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests of a play, and what surrounds them."""

    plan: tuple[Asked, ...]
    gateways: int = 1
    slowed: int = -1
    """An engine."""
    is_warm: bool = True
    """Whether the first part is not measured."""
    system_tokens: int = 0


def straggler(seed: int, seconds: float) -> Workload:
    """Requests to two gateways by chance; one engine is slowed."""
    dice = random.Random(seed)
    plan = [
        Asked(at, "all", dice.randrange(2), -1, dice.randint(60, 200), dice.randint(150, 300))
        for at in _times(dice, 2.5, seconds)
    ]
    return Workload(tuple(plan), gateways=2, slowed=seed % ENGINES)


def prefix(seed: int, seconds: float) -> Workload:
    """Single requests below 12 system prompts, to two gateways by chance."""
    dice = random.Random(seed)
    plan = [
        Asked(at, "all", dice.randrange(2), dice.randrange(12), dice.randint(30, 80), dice.randint(8, 24))
        for at in _times(dice, 1.5, seconds)
    ]
    return Workload(tuple(plan), gateways=2, is_warm=False, system_tokens=1500)


def aggressor(seed: int, seconds: float) -> Workload:
    """Short prompts with longer answers, and a tenant with long prompts that nobody has cached."""
    dice = random.Random(seed)
    plan = [Asked(at, "others", 0, -1, dice.randint(40, 120), 500) for at in _times(dice, 2.2, seconds)]
    plan += [Asked(at, "greedy", 0, -1, 2500, 4) for at in _times(dice, 0.4, seconds)]
    return Workload(tuple(sorted(plan, key=lambda each: each.at_s)))


WORKLOADS = {"straggler": straggler, "prefix": prefix, "aggressor": aggressor}


def _times(dice: random.Random, rate: float, seconds: float) -> list[float]:
    found, now = [], 0.0
    while (now := now + dice.expovariate(rate)) < seconds:
        found.append(now)
    return found


# --- hints


@cache
def _engine() -> Engine:
    return choose_engine("pandas")


def think(tables: Mapping[str, pa.Table], previous: Hints, now_unix_nano: int) -> tuple[Hints, float]:
    """Hints of the last `WINDOW_S`, and the CPU seconds they took; runs in a process of its own."""
    began, start = time.process_time(), now_unix_nano - round(WINDOW_S * 1e9)
    trace = build_trace(tables, _engine(), start_unix_nano=start, end_unix_nano=now_unix_nano)
    hints = make_hints(trace, previous, now_unix_nano=now_unix_nano, valid_s=3 * EVERY_S)
    return hints, time.process_time() - began


@dataclass
class Advisor:
    """Keeps a play's rows, and tells routers what they show."""

    routers: list[Router] = field(default_factory=list)
    rows: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    told: list[Hints] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def add(self, kind: str, row: Any) -> None:
        """As `Tracing.add`."""
        self.rows[kind].append(row)

    async def advise(self, pool: ProcessPoolExecutor) -> None:
        """For ever."""
        loop, hints = asyncio.get_running_loop(), Hints()
        while True:
            await asyncio.sleep(EVERY_S)
            tables = {kind: pa.Table.from_batches([pack(kind, self.rows[kind])]) for kind in ("requests", "attempts")}
            hints, cpu_s = await loop.run_in_executor(pool, think, tables, hints, time.time_ns())
            self.told.append(hints)
            self.cpu_s.append(cpu_s)
            for router in self.routers:
                router.hint(hints, SALT)


# --- a play


class TenantClient(Client):
    """Says which tenant asks."""

    tenant = ""

    def _request(self, port: int, reply: Reply) -> bytes:
        head, end, body = super()._request(port, reply).partition(b"\r\nHost:")
        return head + b"\r\nAuthorization: Bearer key-of-%s" % self.tenant.encode() + end + body


@dataclass(frozen=True)
class Engines:
    """Servers, and the pid of what slows each."""

    servers: tuple[Server, ...]
    stutters: tuple[int, ...]


@contextlib.contextmanager
def engines() -> Iterator[Engines]:
    """Fresh ones that have answered once: the first request of a server's life is slower."""
    with (
        tempfile.TemporaryDirectory(prefix="hints-") as name,
        servers(Path(name), shape=SHAPE) as behind,
        contextlib.ExitStack() as stack,
    ):
        for server in behind:
            server.get("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8})
        logs = [Path(name) / f"stutter-{i}.log" for i in range(len(behind))]
        stutters = [
            stack.enter_context(_stutter(*each)) for each in zip((one.pid for one in behind), logs, strict=True)
        ]
        yield Engines(behind, tuple(stutters))


@dataclass
class Play:
    """What came of one: by place in the plan."""

    replies: list[Reply]
    advisor: Advisor
    slow_share: float


@contextlib.asynccontextmanager
async def gateway(behind: Sequence[Server], advisor: Advisor, share: SlotShare) -> AsyncIterator[int]:
    """One in this process, by its port."""
    config = GatewayConfig(port=0, drain_timeout_s=5.0)
    router = Router(config.queue_limit, config.queue_timeout_s)
    router.update([_info(i, server) for i, server in enumerate(behind)], (), share)
    advisor.routers.append(router)
    app = GatewayApp(
        router=router,
        config=config,
        keys=ApiKeys(("key-of-all all", "key-of-others others", "key-of-greedy greedy")),
        status=lambda: FleetStatus(name="bench", engines=router.engines()),
        tracing=Tracing(advisor.add, salt=SALT),
    )
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(serve(app, config, ready=port.set_result, stop=stop))
    try:
        yield await asyncio.wait_for(port, 30)
    finally:
        stop.set()
        await task


def _info(number: int, server: Server) -> EngineInfo:
    return EngineInfo(
        name=f"engine-{number}",
        model="bench",
        state=EngineState.READY,
        url=server.url,
        slots_total=SLOTS,
        server_pid=server.pid,
        n_ctx=SLOTS * SLOT_TOKENS,
        cache_ram_tokens=2**17,
    )


async def play(work: Workload, behind: Engines, words: random.Random, pool: Any, seconds: float) -> Play:
    """A workload once; `pool` makes hints, None: there are none."""
    advisor = Advisor()
    systems = [filler(words, work.system_tokens) for _ in range(12)] if work.system_tokens else []
    async with contextlib.AsyncExitStack() as stack:
        ports = [
            await stack.enter_async_context(gateway(behind.servers, advisor, SlotShare(i, work.gateways)))
            for i in range(work.gateways)
        ]
        clients: dict[tuple[int, str], TenantClient] = {}
        for each in work.plan:
            client = clients.setdefault((each.gateway, each.group), TenantClient((ports[each.gateway],)))
            client.tenant = each.group
        replies = [Reply(i, 0, _messages(each, systems, words), each.max_tokens) for i, each in enumerate(work.plan)]
        helpers = [asyncio.create_task(advisor.advise(pool))] if pool else []
        if work.slowed >= 0:
            fault = _slow_down(behind.stutters[work.slowed], seconds * FAULT_SHARE)
            helpers.append(asyncio.create_task(fault))
        began = time.monotonic()

        async def ask(each: Asked, reply: Reply) -> None:
            await asyncio.sleep(began + each.at_s - time.monotonic())
            await clients[each.gateway, each.group].chat(reply)

        await asyncio.gather(*map(ask, work.plan, replies))
        for task in helpers:
            task.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        for client in clients.values():
            client.close()
    engines = Counter(row.engine for row in advisor.rows["attempts"])
    return Play(replies, advisor, engines[f"engine-{work.slowed}"] / max(engines.total(), 1))


def _messages(each: Asked, systems: Sequence[str], words: random.Random) -> list[dict[str, str]]:
    system = [{"role": "system", "content": systems[each.system]}] if each.system >= 0 else []
    return [*system, {"role": "user", "content": filler(words, each.tokens)}]


async def _slow_down(stutter: int, after_s: float) -> None:
    await asyncio.sleep(after_s)
    os.kill(stutter, signal.SIGUSR1)
    try:
        await asyncio.Event().wait()
    finally:
        os.kill(stutter, signal.SIGUSR2)


@contextlib.contextmanager
def _stutter(pid: int, log: Path) -> Iterator[int]:
    """A process that stops and continues an engine; gives its own pid."""
    argv = [sys.executable, "-c", _STUTTER, *map(str, (pid, STOP_S, GO_S, SLOW_FACTOR))]
    try:
        with running(argv, log, talks=True) as process:
            process.first_line()
            yield process.pid
    finally:
        os.kill(pid, signal.SIGCONT)


# --- figures

Rows = np.ndarray[Any, np.dtype[np.float64]]
Sample = dict[str, list[Rows]]
"""Kind -> of each round, one row a request: TTFT, seconds and tokens of the answer's rest, computed tokens."""
FIGURES: dict[str, Callable[[Rows], float]] = {
    "TTFT p50, ms": lambda x: np.nanpercentile(x[:, 0], 50) * 1e3,
    "TTFT p95, ms": lambda x: np.nanpercentile(x[:, 0], 95) * 1e3,
    "tokens/s of an answer": lambda x: np.nansum(x[:, 2]) / np.nansum(x[:, 1]),
    "computed prompt tokens": lambda x: np.nansum(x[:, 3]) / len(x),
}
BETTER_HIGH = ("tokens/s of an answer",)


def rows_of(work: Workload, done: Play, group: str, from_s: float) -> Rows:
    """A group's measured requests; what failed is NaN in all figures."""
    found: list[tuple[float, ...]] = []
    for each, reply in zip(work.plan, done.replies, strict=True):
        if each.group == group and each.at_s >= from_s:
            if not reply.ok or reply.ttft_s is None or reply.prompt_tokens is None:
                found.append((np.nan,) * 4)
                continue
            computed = reply.prompt_tokens - (reply.cached_tokens or 0)
            found.append((reply.ttft_s, reply.took_s - reply.ttft_s, max(reply.pieces - 1, 0), computed))
    return np.array(found, float).reshape(-1, 4)


def compare(sample: Sample) -> dict[str, tuple[float, float, float, float, float]]:
    """Figure -> off, on, their ratio and its interval."""
    dice, rounds = np.random.default_rng(0), len(sample["on"])
    draws = defaultdict(list)
    for _ in range(DRAWS):
        picked = [
            (i, dice.integers(0, len(sample["on"][i]), len(sample["on"][i]))) for i in dice.integers(0, rounds, rounds)
        ]
        off, on = (np.concatenate([sample[kind][i][rows] for i, rows in picked]) for kind in KINDS)
        for name, of in FIGURES.items():
            draws[name].append(of(on) / of(off))
    off, on = (np.concatenate(sample[kind]) for kind in KINDS)
    return {
        name: (of(off), of(on), of(on) / of(off), *np.percentile(draws[name], [2.5, 97.5]))
        for name, of in FIGURES.items()
    }


def verdict(found: Mapping[str, Sequence[float]]) -> str:
    """In words, by the intervals alone."""
    better: list[str] = []
    worse: list[str] = []
    for name, (_, _, _, low, high) in found.items():
        is_up, is_down = low > 1, high < 1
        if is_up or is_down:
            (better if is_up == (name in BETTER_HIGH) else worse).append(name)
    parts = [f"better: {', '.join(better)}"] * bool(better) + [f"worse: {', '.join(worse)}"] * bool(worse)
    return "; ".join(parts) or "no difference that is clear"


# --- the run


async def measure(name: str, rounds: int, seconds: float, pool: ProcessPoolExecutor, seed: int) -> dict[str, Any]:
    """One workload; fresh engines each round."""
    samples: defaultdict[str, Sample] = defaultdict(lambda: {kind: [] for kind in KINDS})
    notes = []
    for number in range(rounds):
        work = WORKLOADS[name](seed + number, seconds)
        with engines() as behind:
            for kind in KINDS if number % 2 else KINDS[::-1]:
                words = random.Random(f"{seed} {number} {kind}")
                done = await play(work, behind, words, pool if kind == "on" else None, seconds)
                for group in dict.fromkeys(each.group for each in work.plan):
                    rows = rows_of(work, done, group, seconds * WARM_SHARE if work.is_warm else 0.0)
                    samples[group][kind].append(rows)
                notes.append(_note(number, kind, work, done))
                print(f"  {name} {notes[-1]}", flush=True)
    return {"notes": notes, "groups": {group: compare(sample) for group, sample in samples.items()}}


def _note(number: int, kind: str, work: Workload, done: Play) -> str:
    failed = sum(not reply.ok for reply in done.replies)
    note = f"round {number} {kind}: {len(done.replies)} requests, {failed} failed"
    if work.slowed >= 0:
        note += f", {done.slow_share:.0%} on the slowed engine-{work.slowed}"
    if told := done.advisor.told:
        slow = Counter(engine for each in told for engine in each.slow)
        apart = Counter(f"{tenant} -> {','.join(to)}" for each in told for tenant, to in each.apart.items())
        families = np.mean([len(each.families) for each in told])
        note += f"; of {len(told)} hints: slow {dict(slow)}, apart {dict(apart)}, {families:.1f} families"
        note += f", {np.median(done.advisor.cpu_s) * 1e3:.0f} ms of CPU each; load {os.getloadavg()[0]:.1f}"
    return note


def show(name: str, found: Mapping[str, Any]) -> None:
    """A table for each group."""
    for group, figures in found["groups"].items():
        print(f"\n{name}, {group}: {verdict(figures)}")
        print(f"  {'':24}{'off':>10}{'on':>10}{'on/off':>8}   95 %")
        for figure, (off, on, ratio, low, high) in figures.items():
            print(f"  {figure:24}{off:10.1f}{on:10.1f}{ratio:8.3f}   {low:.3f} to {high:.3f}")


def main() -> int:
    """0 once all is played."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=38.0, help="of one play")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    chosen = parser.parse_args()
    results = {}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_engine).exception()  # imports
        for name in chosen.workloads.split(","):
            results[name] = asyncio.run(measure(name, chosen.rounds, chosen.seconds, pool, chosen.seed))
            show(name, results[name])
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
