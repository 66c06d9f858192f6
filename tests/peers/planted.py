"""Whether a report finds on real engines what was planted there, and nothing where nothing was.

`python -m tests.peers.planted [--only straggler,clean,...] [--seconds 40] [--seed 1] [--keep FOLDER]`, and
`python -m tests.peers.planted --again FOLDER` to judge anew the rows that such a run has kept.

A fleet of three engines on CPUs under Ray serves some load, one fault planted at a time, and the report of that time
is read: the finding of the fault's class must be there, the first of its kind, and about the right engine, tenant or
GPU. There is no GPU: the node's actor is given made samples, and passes them on its ordinary way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.feather
import ray

from lltm_ray import Cluster
from lltm_ray.actors import names
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import COLUMNS, build_trace
from lltm_ray.analytics.report import Report, make_report
from lltm_ray.analytics.text import to_text
from lltm_ray.gpu.meters import GpuSample
from lltm_ray.models.random_weights import RandomShape
from lltm_ray.records import EngineState

from .client import Client, Reply
from .engines import SETTINGS, Server, model
from .stutter import Stutter, stutter
from .workloads import Messages, filler

NAME, ENGINES = "planted", 3
SHAPE = RandomShape(n_embd=128, n_head=2, n_head_kv=2, n_layer=6, n_ff=768)
"""Some 1 ms a token: a duty cycle of 20 ms slows an answer evenly."""
TENANTS = ("ann", "ben", "cid", "greedy")
RATE, LASTING_RATE, SLOWED, KILLS, LONG_PROMPT, LONG_PAUSE_S = 3.5, 2.5, 3.0, 3, 2200, 1.5
SHORT, LASTING = (60, 160), (300, 600)
"""Tokens of answers; lasting ones are for what can only hit an answer that runs."""
STRUCK = 2
"""Slots at work on an engine when it is killed."""
FAULT_SHARE = 0.3
"""Of a play: before a fault begins."""
THERMAL, COOL_W, HOT_W = 0x40, 300.0, 180.0
SETTLE_S = 1.5
"""Until the last rows have come to telemetry."""


# --- the fleet


@dataclass
class Fleet:
    """What plays have."""

    cluster: Cluster
    folder: Path
    seed: int
    seconds: float
    stack: contextlib.ExitStack
    stutters: dict[int, Stutter] = field(default_factory=dict)
    """By the server's pid."""
    keep: Path | None = None
    """Folder for rows."""
    told_from_s: float | None = None
    """When what is to be reported began, if not with the play."""
    hot: str = ""
    """File that names the engine whose GPU is throttled."""

    def pid(self, engine: int) -> int:
        """Of an engine's server, once it is ready."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            info = next(each for each in self.cluster.status().engines if each.name == f"engine-{engine}")
            if info.state is EngineState.READY and info.server_pid:
                return int(info.server_pid)
            time.sleep(0.2)
        raise TimeoutError(f"engine-{engine} is not ready")

    def settle(self) -> None:
        """Every server is ready, and as slow as all."""
        for pid in (self.pid(number) for number in range(ENGINES)):
            if pid not in self.stutters:
                log = self.folder / f"stutter-{pid}.log"
                self.stutters[pid] = self.stack.enter_context(stutter(pid, log, stop_s=0.0))

    def counters(self) -> list[tuple[float, float]]:
        """Seconds of decoding and tokens of each engine, as its server counts them."""
        engines = sorted(self.cluster.status().engines, key=lambda each: each.name)
        told = [Server(each.url, 0, each.api_key).counters() for each in engines]
        return [(each["tokens_predicted_seconds_total"], each["tokens_predicted_total"]) for each in told]

    async def amid(self, load: asyncio.Task[None], engines: Sequence[int], least: int) -> int | None:
        """The first of these engines that has so many slots at work; None: the load ended before."""
        while not load.done():
            told = {int(each.name[-1]): each for each in self.cluster.status().engines}
            for engine in engines:
                info = told[engine]
                is_ready = info.state is EngineState.READY
                if is_ready and await asyncio.to_thread(Server(info.url, 0, info.api_key).busy) >= least:
                    return engine
            await asyncio.sleep(0.02)
        return None

    @contextlib.asynccontextmanager
    async def slowed(self, engine: int, notes: list[str]) -> AsyncIterator[None]:
        """While it is; notes by how much it was slower than the others, as servers count."""
        own = self.stutters[self.pid(engine)]
        before = await asyncio.to_thread(self.counters)
        own.slow_down(SLOWED)
        try:
            yield
        finally:
            own.slow_down(1.0)
        after = await asyncio.to_thread(self.counters)
        seconds, tokens = (np.array(each) for each in zip(*_less(after, before), strict=True))
        others = np.delete(seconds, engine).sum() / np.delete(tokens, engine).sum()
        notes.append(f"{seconds[engine] / tokens[engine] / others:.2f}x by servers' counters")


def _less(after: list[tuple[float, float]], before: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(one[0] - other[0], one[1] - other[1]) for one, other in zip(after, before, strict=True)]


@contextlib.contextmanager
def fleet(seed: int, seconds: float) -> Iterator[Fleet]:
    """A fresh one, all of whose tenants have keys."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name, contextlib.ExitStack() as stack:
        keys, hot = Path(name) / "keys", Path(name) / "hot"
        keys.write_text("".join(f"key-of-{each} {each}\n" for each in TENANTS), encoding="ascii")
        keys.chmod(0o600)
        hot.write_text("", encoding="ascii")
        gateway = {"port": 0, "api_key_file": str(keys)}
        settings: dict[str, Any] = {"gpu_share": 0.0, "cpu_share": 1 / (2 * ENGINES), "drain_timeout_s": 0.0}
        settings |= {"gateway": gateway, "engine": SETTINGS, "analytics": {"enabled": True, "read_every_s": 1.0}}
        started = Cluster.start(name=NAME, served_name="bench", model=str(model(SHAPE)), engines=ENGINES, **settings)
        with started as cluster:
            yield Fleet(cluster, Path(name), seed, seconds, stack, hot=str(hot))
            stack.close()


# --- clients


class Asker(Client):
    """Asks for one tenant, and one engine if it is named."""

    tenant = ""
    engine = ""

    def _request(self, port: int, reply: Reply) -> bytes:
        head, end, body = super()._request(port, reply).partition(b"\r\nHost:")
        more = f"\r\nAuthorization: Bearer key-of-{self.tenant}" + f"\r\nX-LLTM-Engine: {self.engine}" * bool(
            self.engine
        )
        return head + more.encode() + end + body


@dataclass
class Office:
    """People at work: who asks what, and what came of it."""

    fleet: Fleet
    dice: random.Random
    replies: list[Reply] = field(default_factory=list)
    _clients: dict[tuple[str, str], Asker] = field(default_factory=dict)

    async def ask(self, tenant: str, messages: Messages, tokens: int, engine: str = "", session: int = 0) -> Reply:
        """One request."""
        client = self._clients.get((tenant, engine))
        if client is None:
            client = Asker((urlsplit(str(self.fleet.cluster.endpoint)).port or 0,))
            client.tenant, client.engine = tenant, engine
            self._clients[tenant, engine] = client
        reply = Reply(session, 0, messages, tokens, kind=tenant)
        self.replies.append(reply)
        return await client.chat(reply)

    async def chats(
        self, rate: float, seconds: float, engines: Callable[[], str] = lambda: "", lengths: tuple[int, int] = SHORT
    ) -> None:
        """Single questions, as they come; `engines` names where the next one goes."""
        async with asyncio.TaskGroup() as group:
            for at_s in times(self.dice, rate, seconds):
                text, tokens = filler(self.dice, self.dice.randint(60, 200)), self.dice.randint(*lengths)
                tenant, messages = self.dice.choice(TENANTS[:3]), [{"role": "user", "content": text}]
                group.create_task(later(at_s, self.ask, tenant, messages, tokens, engines()))

    async def talks(self, sessions: int, seconds: float, engines: Callable[[], str] = lambda: "") -> None:
        """Conversations of some turns; `engines` names where the next turn goes."""
        async with asyncio.TaskGroup() as group:
            for number in range(sessions):
                begin_s = self.dice.uniform(0.0, seconds / 3)
                group.create_task(self._talk(number, begin_s, seconds, engines, random.Random(self.dice.random())))

    async def _talk(
        self, number: int, begin_s: float, seconds: float, engines: Callable[[], str], dice: random.Random
    ) -> None:
        ends, messages = time.monotonic() + seconds, [{"role": "user", "content": filler(dice, 500)}]
        await asyncio.sleep(begin_s)
        while time.monotonic() < ends:
            reply = await self.ask(TENANTS[number % 3], messages, 40, engines(), number)
            if not reply.ok:
                return
            more = [{"role": "assistant", "content": reply.text}, {"role": "user", "content": filler(dice, 150)}]
            messages = [*messages, *more]
            await asyncio.sleep(dice.uniform(0.3, 1.2))

    def close(self) -> None:
        """Everybody leaves."""
        for client in self._clients.values():
            client.close()


def in_turn() -> Callable[[], str]:
    """Names engines, one after the other."""
    places = itertools.cycle(f"engine-{number}" for number in range(ENGINES))
    return lambda: next(places)


def times(dice: random.Random, rate: float, seconds: float) -> list[float]:
    """Arrivals, by Poisson."""
    found, now = [], 0.0
    while (now := now + dice.expovariate(rate)) < seconds:
        found.append(now)
    return found


async def later(after_s: float, work: Callable[..., Awaitable[Any]], *given: Any) -> None:
    """Then do it."""
    await asyncio.sleep(after_s)
    await work(*given)


def token_ms(replies: Sequence[Reply], tenants: Sequence[str] = TENANTS[:3]) -> float:
    """Median milliseconds a token of answers, as clients saw them."""
    known = [each for each in replies if each.ok and each.kind in tenants and each.ttft_s and each.pieces > 8]
    paces = [(each.took_s - (each.ttft_s or 0.0)) / (each.pieces - 1) for each in known]
    return float(np.median(paces)) * 1e3 if paces else float("nan")


# --- plays: each plants something, and says what


CALM = (
    *((2.0, 3, SHORT, False), (RATE, 0, SHORT, True), (2.5, 4, SHORT, False), (LASTING_RATE, 0, LASTING, False)),
    *((1.0, 6, SHORT, False), (3.0, 2, SHORT, False), (0.5, 1, SHORT, False), (4.0, 0, SHORT, False)),
)
"""Chats a second, conversations, tokens of a chat's answer, whether chats name engines in turn."""


async def clean(office: Office, number: int) -> str:
    """Nothing: another load each time, some of them those of the plays below without their faults."""
    seconds, (rate, sessions, lengths, is_pinned) = office.fleet.seconds, CALM[number % len(CALM)]
    async with asyncio.TaskGroup() as group:
        group.create_task(office.chats(rate, seconds, in_turn() if is_pinned else lambda: "", lengths))
        group.create_task(office.talks(sessions, seconds))
    return f"{rate:g} chats/s, {sessions} conversations, {token_ms(office.replies):.2f} ms a token"


async def straggler(office: Office, number: int) -> str:
    """One engine is slowed; clients name engines in turn, for a router would leave it before much is seen."""
    seconds, which = office.fleet.seconds, number % ENGINES
    task, notes = asyncio.create_task(office.chats(RATE, seconds, in_turn())), list[str]()
    await asyncio.sleep(FAULT_SHARE * seconds)
    async with office.fleet.slowed(which, notes):
        await task
    return f"{SLOWED:g}x ({notes[0]}) from {FAULT_SHARE * seconds:.0f} s on"


async def aggressor(office: Office, number: int) -> str:
    """A tenant sends long prompts to engines that are at answers of others; a router would choose idle ones."""
    seconds, asked, last = office.fleet.seconds, list[asyncio.Task[Reply]](), 0
    task = asyncio.create_task(office.chats(LASTING_RATE, seconds, in_turn(), LASTING))
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await asyncio.wait([task], timeout=office.dice.expovariate(1 / LONG_PAUSE_S))
        others = [(last + each) % ENGINES for each in range(1, ENGINES + 1)]
        if (which := await office.fleet.amid(task, others, 1)) is None:
            break
        last, messages = which, [{"role": "user", "content": filler(office.dice, LONG_PROMPT)}]
        asked.append(asyncio.create_task(office.ask("greedy", messages, 4, f"engine-{which}")))
    await asyncio.gather(task, *asked)
    return f"{len(asked)} prompts of {LONG_PROMPT:,}; others {token_ms(office.replies):.2f} ms a token"


async def scatter(office: Office, number: int) -> str:
    """Each turn goes to the next engine."""
    await office.talks(8, office.fleet.seconds, in_turn())
    later_turns = [each for each in office.replies if len(each.messages) > 1]
    computed = sum((each.prompt_tokens or 0) - (each.cached_tokens or 0) for each in later_turns)
    fresh = 160 * len(later_turns)
    return f"{len(later_turns)} later turns, about {computed - fresh:,} tokens computed again"


async def cascade(office: Office, number: int) -> str:
    """One engine is killed again and again, in the middle of answers."""
    seconds, which, kills = office.fleet.seconds, number % ENGINES, 0
    task = asyncio.create_task(office.chats(LASTING_RATE, seconds, lengths=LASTING))
    while not task.done() and kills < KILLS:
        await asyncio.wait([task], timeout=seconds / 8)
        if await office.fleet.amid(task, [which], STRUCK) is not None:
            os.kill(await asyncio.to_thread(office.fleet.pid, which), signal.SIGKILL)
            kills += 1
    await task
    return f"{kills} kills; {sum(not each.ok for each in office.replies)} of {len(office.replies)} failed"


async def throttle(office: Office, number: int) -> str:
    """A GPU is throttled, and its engine slowed; engines as for a straggler."""
    seconds, which = office.fleet.seconds, number % ENGINES
    task, notes = asyncio.create_task(office.chats(RATE, seconds, in_turn())), list[str]()
    await asyncio.sleep(FAULT_SHARE * seconds)
    hot = Path(office.fleet.hot)
    hot.write_text(f"engine-{which}", encoding="ascii")
    try:
        async with office.fleet.slowed(which, notes):
            await task
    finally:
        hot.write_text("", encoding="ascii")
    return f"{SLOWED:g}x ({notes[0]}), thermal, {1 - FAULT_SHARE:.0%} of the time"


async def overload(office: Office, number: int) -> str:
    """Twice as much as the fleet serves."""
    served = len(office.replies)
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(ENGINES * 4):
            group.create_task(_busily(office, began + 6.0))
    rate = (len(office.replies) - served) / (time.monotonic() - began)
    office.fleet.told_from_s = time.time()
    await office.chats(2 * rate, office.fleet.seconds * 0.5)
    return f"2 x {rate:.1f}/s served in a closed loop"


async def _busily(office: Office, until: float) -> None:
    while time.monotonic() < until:
        text, tokens = filler(office.dice, office.dice.randint(60, 200)), office.dice.randint(60, 160)
        await office.ask("ann", [{"role": "user", "content": text}], tokens)


@dataclass(frozen=True)
class Plant:
    """A play, and what a report must tell of it."""

    play: Callable[[Office, int], Awaitable[str]]
    analysis: str = ""
    kinds: tuple[str, ...] = ()
    subject: str = ""
    """With `{n}` for the engine's number."""
    told: Callable[[Any], str] = lambda finding: ""
    beside: tuple[str, ...] = ()
    """Other findings that follow from the fault, as `kind subject`; any else is wrong."""


PLANTS = {
    "clean": Plant(clean),
    "straggler": Plant(
        straggler,
        "anomalies",
        ("straggler",),
        "engine-{n}",
        lambda each: f"{each.figures['ratio']:.2f}x decode, {each.figures['prefill_ratio']:.2f}x prefill",
        ("waiting slots", "saturation bench"),
    ),
    "aggressor": Plant(
        aggressor,
        "interference",
        ("interference",),
        "greedy",
        lambda each: f"{each.figures['share']:.0%} of decodes",
        ("waiting slots", "saturation bench"),
    ),
    "scatter": Plant(
        scatter,
        "conversations",
        ("affinity",),
        "conversations",
        lambda each: (
            f"{each.figures['needless_lost_tokens']:,.0f} tokens of {each.figures['needless_moves']:.0f} moves"
        ),
        ("interference long prefills", "waiting slots", "saturation bench"),
    ),
    "cascade": Plant(
        cascade, "failures", ("errors",), "engine-{n}", lambda each: f"{each.figures['errors']:.0f} broken attempts"
    ),
    "throttle": Plant(
        throttle,
        "GPU and energy",
        ("throttling",),
        "GPU-{n}",
        lambda each: f"{each.figures['slowed_ratio']:.2f}x, {each.figures['throttled_share']:.0%} of the window",
        ("straggler engine-{n}", "waiting slots", "saturation bench"),
    ),
    "overload": Plant(
        overload,
        "queueing",
        ("saturation",),
        "bench",
        lambda each: (
            f"{each.figures['arrivals_per_s']:.1f}/s come, {each.figures['capacity_per_s']:.1f}/s at most, "
            f"knee {each.figures['knee_per_s']:.1f}/s"
        ),
        ("waiting slots", "rejections bench"),
    ),
}
"""By name, in the order they are played."""


# --- made GPUs


def samplers(directory: Any) -> list[Any]:
    """Runs in the directory's actor: those of nodes."""
    return list(directory._samplers.values())


def give_gpus(actor: Any, hot: str) -> None:
    """Runs in the node's actor: an engine each has a GPU, of which the one that the file `hot` names is throttled."""
    servers = actor._servers
    update, energy_j, began = servers.update, [0.0] * ENGINES, time.time()

    def with_gpus(engines: Any) -> None:
        update(tuple(replace(each, gpu_ids=(int(each.name[-1]),), share=1.0) for each in engines))

    def read() -> tuple[GpuSample, ...]:
        with open(hot, encoding="ascii") as file:
            name, now = file.read(), time.time_ns()
        found = []
        for number, busy in enumerate(servers.busy.get(f"engine-{i}", 0) for i in range(ENGINES)):
            is_hot = name == f"engine-{number}"
            power_w = (HOT_W if is_hot else COOL_W) if busy else 80.0
            energy_j[number] += power_w
            sample = GpuSample(
                index=number,
                uuid=f"GPU-{number}",
                at_unix_nano=now,
                name="NVIDIA H200",
                driver="",
                utilization_ratio=0.9 if busy else 0.0,
                total_bytes=2**37,
                used_bytes=2**34,
                power_w=power_w,
                temperature_c=88.0 if is_hot else 55.0,
                energy_j=energy_j[number] + time.time() - began,
                throttle=THERMAL if is_hot else 0,
            )
            found.append(sample)
        return tuple(found)

    servers.update, actor._gpus.read = with_gpus, read
    with_gpus(servers.engines)


# --- the run


@dataclass
class Row:
    """One play."""

    name: str
    planted: str
    expected: str
    found: str
    rank: str
    told: str
    others: list[str]
    requests: int
    is_right: bool


async def play(name: str, number: int, on: Fleet) -> Row:
    """Once, and the report of it."""
    plant = PLANTS[name]
    await asyncio.to_thread(on.settle)
    office = Office(on, random.Random(f"{on.seed} {name} {number}"))
    began = time.time()
    try:
        planted = await plant.play(office, number)
    finally:
        office.close()
    began, ended, on.told_from_s = on.told_from_s or began, time.time(), None
    await asyncio.sleep(SETTLE_S)
    report = await asyncio.to_thread(on.cluster.report, ended - began, until_unix_s=ended)
    if on.keep:
        await asyncio.to_thread(keep, on.keep / f"{name}-{number}", planted, (began, ended), to_text(report))
    return judge(name, number, planted, report)


def keep(folder: Path, planted: str, window: tuple[float, float], text: str) -> None:
    """All rows that telemetry has, and what was said of them."""
    folder.mkdir(parents=True, exist_ok=True)
    page: Any = ray.get(
        ray.get_actor(names.telemetry(NAME), names.NAMESPACE).read_since.remote(0, tuple(COLUMNS), 10**7)
    )
    for kind, table in page.tables.items():
        pyarrow.feather.write_feather(table, folder / f"{kind}.arrow")
    (folder / "report.txt").write_text(text, encoding="utf-8")
    (folder / "play.json").write_text(json.dumps({"planted": planted, "window": window}), encoding="utf-8")


def again(folder: Path) -> Row:
    """A report of kept rows."""
    told = json.loads((folder / "play.json").read_text(encoding="utf-8"))
    tables = {path.stem: pyarrow.feather.read_table(path) for path in folder.glob("*.arrow")}
    tables = {
        kind: table.select([each for each in COLUMNS[kind] if each in table.column_names])
        for kind, table in tables.items()
    }
    start, end = (round(each * 1e9) for each in told["window"])
    trace = build_trace(tables, choose_engine("pandas"), start_unix_nano=start, end_unix_nano=end)
    report = make_report(trace, fleet=NAME)
    (folder / "report.txt").write_text(to_text(report), encoding="utf-8")
    name, _, number = folder.name.rpartition("-")
    return judge(name, int(number), told["planted"], report)


def judge(name: str, number: int, planted: str, report: Report) -> Row:
    """What was found, against what should be."""
    plant = PLANTS[name]
    subject = plant.subject.format(n=number % ENGINES)
    told = [(result.analysis, finding) for result, finding in report.ranked]
    of_class = [place for place, (_, each) in enumerate(told) if each.kind in plant.kinds]
    right = of_class[0] if of_class and told[of_class[0]][1].subject == subject else None
    finding = told[right][1] if right is not None else None
    failed = [result.analysis for result in report.results.values() if result.error]
    others = [each for place, (_, each) in enumerate(told) if place != right]
    beside = [each.format(n=number % ENGINES) for each in plant.beside]
    is_fair = all(f"{each.kind} {each.subject}".strip() in beside for each in others)
    return Row(
        name=name,
        planted=planted,
        expected=f"{plant.kinds[0]} {subject}" if plant.kinds else "nothing",
        found=finding.text if finding else "-",
        rank=f"{right + 1} of {len(told)}" if right is not None else "-",
        told=plant.told(finding) if finding else "",
        others=[f"{each.kind} {each.subject}: {each.text}" for each in others],
        requests=report.requests,
        is_right=not failed and is_fair and (finding is not None or not plant.kinds),
    )


def show(row: Row) -> None:
    """A play in some lines."""
    print(f"\n{'RIGHT' if row.is_right else 'WRONG'}  {row.name} ({row.requests} requests): {row.planted}", flush=True)
    print(f"  expected  {row.expected}\n  found     {row.found}\n  rank      {row.rank}\n  told      {row.told}")
    for other in row.others:
        print(f"  also      {other}", flush=True)


def main() -> int:
    """0: every report was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PLANTS), help="what to play, in this order; names may come again")
    parser.add_argument("--seconds", type=float, default=40.0, help="of one play")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the table there")
    parser.add_argument("--keep", type=Path, help="folder for the rows of each play")
    parser.add_argument("--again", type=Path, help="folder of kept rows: nothing is played")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    if chosen.again:
        rows = [again(path.parent) for path in sorted(chosen.again.glob("*/play.json"))]
        for row in rows:
            show(row)
    else:
        rows = run(chosen)
    write(chosen.json, rows)
    wrong = [row.name for row in rows if not row.is_right]
    print(
        f"\n{len(rows) - len(wrong)} of {len(rows)} reports were right" + f"; wrong: {', '.join(wrong)}" * bool(wrong)
    )
    return 1 if wrong else 0


def run(chosen: argparse.Namespace) -> list[Row]:
    """All plays, on one fleet."""
    rows: list[Row] = []
    numbers = Counter[str]()
    with fleet(chosen.seed, chosen.seconds) as on:
        on.keep, has_gpus = chosen.keep, False
        on.settle()
        warm = Office(on, random.Random(0))
        asyncio.run(warm.chats(3.0, 3.0))
        for name in chosen.only.split(","):
            if name == "throttle" and not has_gpus:
                directory = ray.get_actor(names.directory(NAME), names.NAMESPACE)
                nodes: list[Any] = ray.get(directory.__ray_call__.remote(samplers))
                for node in nodes:
                    ray.get(node.__ray_call__.remote(give_gpus, on.hot))
                has_gpus = True
            rows.append(asyncio.run(play(name, chosen.seed - 1 + numbers[name], on)))
            numbers[name] += 1
            show(rows[-1])
            write(chosen.json, rows)
    return rows


def write(path: Path | None, rows: Sequence[Row]) -> None:
    """All that was played so far, if anybody wants it in a file."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
