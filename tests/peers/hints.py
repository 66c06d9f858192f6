"""Whether hints pay: 4 real engines on CPUs, routers that follow analytics' hints against routers that do not.

`python -m tests.peers.hints [--rounds 4] [--seconds 38] [--json FILE]`. Each round plays a workload twice on the same
engines, with hints and without, in turns first: the same arrivals, lengths and order, other words, so that neither
finds the other's prompts cached; gateways are fresh. Two of them get requests below 12 system prompts by chance, and
know nothing of each other's index. Hints are made by another process, whose CPU time the engines lack, as on a node
without a GPU. Ratios are on over off, with 95 % intervals from a bootstrap over rounds, then over pairs of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
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
from lltm_ray.models.random_weights import RandomShape
from lltm_ray.records import EngineInfo, EngineState, FleetStatus, Hints
from lltm_ray.routing.router import Router
from lltm_ray.routing.served import SlotShare
from lltm_ray.telemetry.batch import pack

from .client import Client, Reply
from .engines import SLOT_TOKENS, SLOTS, Server, servers
from .stutter import stutter
from .workloads import filler

SHAPE = RandomShape(n_embd=128, n_head=2, n_head_kv=2, n_layer=2, n_ff=384)
SALT = b"of the hints' bench"
EVERY_S, WINDOW_S = 3.0, 45.0
DRAWS = 4000
GATEWAYS, SYSTEMS, SYSTEM_TOKENS, RATE = 2, 12, 1500, 1.5
KINDS = ("off", "on")


# --- what is asked


@dataclass(frozen=True)
class Asked:
    """One request of a plan; its words are made when it is played."""

    at_s: float
    gateway: int
    system: int
    """Which shared system prompt."""
    tokens: int
    max_tokens: int


def plan(seed: int, seconds: float) -> list[Asked]:
    """Single requests below shared system prompts, to gateways by chance."""
    dice, found, now = random.Random(seed), [], 0.0
    while (now := now + dice.expovariate(RATE)) < seconds:
        lengths = dice.randint(30, 80), dice.randint(8, 24)
        found.append(Asked(now, dice.randrange(GATEWAYS), dice.randrange(SYSTEMS), *lengths))
    return found


# --- hints


@cache
def _engine() -> Engine:
    return choose_engine("pandas")


def think(tables: Mapping[str, pa.Table], now_unix_nano: int) -> tuple[Hints, float]:
    """Hints of the last `WINDOW_S`, and the CPU seconds they took; runs in a process of its own."""
    began, start = time.process_time(), now_unix_nano - round(WINDOW_S * 1e9)
    trace = build_trace(tables, _engine(), start_unix_nano=start, end_unix_nano=now_unix_nano)
    hints = make_hints(trace, now_unix_nano=now_unix_nano, valid_s=3 * EVERY_S)
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
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(EVERY_S)
            tables = {kind: pa.Table.from_batches([pack(kind, self.rows[kind])]) for kind in ("requests", "attempts")}
            hints, cpu_s = await loop.run_in_executor(pool, think, tables, time.time_ns())
            self.told.append(hints)
            self.cpu_s.append(cpu_s)
            for router in self.routers:
                router.hint(hints, SALT)


# --- a play


@contextlib.contextmanager
def engines() -> Iterator[tuple[Server, ...]]:
    """Fresh ones that have answered once: the first request of a server's life is slower. All stutter."""
    with (
        tempfile.TemporaryDirectory(prefix="hints-") as name,
        servers(Path(name), shape=SHAPE) as behind,
        contextlib.ExitStack() as stack,
    ):
        for i, server in enumerate(behind):
            server.get("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8})
            stack.enter_context(stutter(server.pid, Path(name) / f"stutter-{i}.log"))
        yield behind


@dataclass
class Play:
    """What came of one: by place in the plan."""

    replies: list[Reply]
    advisor: Advisor


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
        keys=ApiKeys(),
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


async def play(asked: Sequence[Asked], behind: Sequence[Server], words: random.Random, pool: Any) -> Play:
    """A plan once; `pool` makes hints, None: there are none."""
    advisor = Advisor()
    systems = [filler(words, SYSTEM_TOKENS) for _ in range(SYSTEMS)]
    async with contextlib.AsyncExitStack() as stack:
        ports = [
            await stack.enter_async_context(gateway(behind, advisor, SlotShare(i, GATEWAYS))) for i in range(GATEWAYS)
        ]
        clients = [Client((port,)) for port in ports]
        replies = [Reply(i, 0, _messages(each, systems, words), each.max_tokens) for i, each in enumerate(asked)]
        helpers = [asyncio.create_task(advisor.advise(pool))] if pool else []
        began = time.monotonic()

        async def ask(each: Asked, reply: Reply) -> None:
            await asyncio.sleep(began + each.at_s - time.monotonic())
            await clients[each.gateway].chat(reply)

        await asyncio.gather(*map(ask, asked, replies))
        for task in helpers:
            task.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        for client in clients:
            client.close()
    return Play(replies, advisor)


def _messages(each: Asked, systems: Sequence[str], words: random.Random) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": systems[each.system]},
        {"role": "user", "content": filler(words, each.tokens)},
    ]


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


def rows_of(done: Play) -> Rows:
    """What failed is NaN in all figures."""
    found: list[tuple[float, ...]] = []
    for reply in done.replies:
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


async def measure(rounds: int, seconds: float, pool: ProcessPoolExecutor, seed: int) -> dict[str, Any]:
    """Fresh engines each round."""
    sample: Sample = {kind: [] for kind in KINDS}
    notes = []
    for number in range(rounds):
        asked = plan(seed + number, seconds)
        with engines() as behind:
            for kind in KINDS if number % 2 else KINDS[::-1]:
                words = random.Random(f"{seed} {number} {kind}")
                done = await play(asked, behind, words, pool if kind == "on" else None)
                sample[kind].append(rows_of(done))
                notes.append(_note(number, kind, done))
                print(f"  {notes[-1]}", flush=True)
    return {"notes": notes, "figures": compare(sample)}


def _note(number: int, kind: str, done: Play) -> str:
    failed = sum(not reply.ok for reply in done.replies)
    note = f"round {number} {kind}: {len(done.replies)} requests, {failed} failed"
    if told := done.advisor.told:
        families = np.mean([len(each.families) for each in told])
        note += f"; {len(told)} hints of {families:.1f} families"
        note += f", {np.median(done.advisor.cpu_s) * 1e3:.0f} ms of CPU each; load {os.getloadavg()[0]:.1f}"
    return note


def show(figures: Mapping[str, Any]) -> None:
    """The table."""
    print(f"\n{verdict(figures)}")
    print(f"  {'':24}{'off':>10}{'on':>10}{'on/off':>8}   95 %")
    for figure, (off, on, ratio, low, high) in figures.items():
        print(f"  {figure:24}{off:10.1f}{on:10.1f}{ratio:8.3f}   {low:.3f} to {high:.3f}")


def main() -> int:
    """0 once all is played."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=38.0, help="of one play")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    chosen = parser.parse_args()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_engine).exception()  # imports
        found = asyncio.run(measure(chosen.rounds, chosen.seconds, pool, chosen.seed))
    show(found["figures"])
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
