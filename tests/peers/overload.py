"""More than there is room for: `python -m tests.peers.overload [--seconds 60] [--factor 2] [--engines scripted|real]`.

The gateway runs in a process of its own, as its actor runs it, before engines of known speed or real ones. Capacity is
measured in a closed loop; then four tenants above their fair share and one that asks for little in a hurry send an
open loop of Poisson arrivals, every request with a deadline. Ends with 1 if anything that was promised does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from lltm_ray.config import GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.records import FleetStatus
from lltm_ray.routing.router import Router

from .engines import servers
from .ours import engine_info
from .processes import free_port, running
from .workloads import filler

ENGINES, SLOTS = 2, 4
AT_ONCE_S = 0.25
"""A refusal within this is at once; on a busy machine the client's own loop takes most of it."""
GIVE_UP_S = 120.0
FAIR = 0.25
"""A tenant's share of capacity when all want more."""
_LEARNT = ("wait_ratio", "wait_deviation", "wait_margin", "miss_credit")


@dataclass(frozen=True)
class Tenant:
    """Who asks: how much of capacity, for what, and how patient."""

    name: str
    share: float
    """Tokens a second as a part of what the fleet can do."""
    prompt: tuple[int, int]
    output: tuple[int, int]
    deadline_s: tuple[float, ...]

    @property
    def mean_tokens(self) -> float:
        """Of one request."""
        return (sum(self.prompt) + sum(self.output)) / 2


TENANTS = (
    Tenant("flood", 0.90, (40, 240), (12, 36), (3.0,)),
    Tenant("steady", 0.50, (40, 240), (12, 36), (1.5, 4.0)),
    Tenant("long", 0.32, (200, 480), (24, 64), (3.0, 6.0)),
    Tenant("short", 0.28, (20, 80), (6, 18), (2.0,)),
    Tenant("small", 0.05, (20, 80), (6, 18), (1.0,)),
)
"""Twice what the fleet can do in all."""


@dataclass
class Told:
    """One request and what came of it."""

    tenant: str
    deadline_s: float
    sent_s: float
    status: int = 0
    first_s: float | None = None
    """From sending to the answer's first byte, whatever it is."""
    took_s: float = 0.0
    retry_after: str = ""
    tokens: int = 0
    error: str = ""

    @property
    def ended_s(self) -> float:
        """Monotonic."""
        return self.sent_s + self.took_s

    @property
    def is_served(self) -> bool:
        """It got its answer, whole."""
        return self.status == 200 and not self.error

    @property
    def is_late(self) -> bool:
        """It was let in, and its answer began after its deadline."""
        return self.status == 200 and (self.first_s is None or self.first_s > self.deadline_s)

    @property
    def is_refused(self) -> bool:
        """In the way that is promised."""
        return self.status == 429 and self.retry_after.isdigit() and int(self.retry_after) >= 1


@dataclass
class Run:
    """What one run has to show."""

    told: list[Told]
    began_s: float
    seconds: float
    capacity_tokens_s: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The router's own words during it, every 100 ms."""

    def served_tokens(self) -> dict[str, int]:
        """Computed and generated, by tenant."""
        counts: Counter[str] = Counter()
        for each in self.told:
            counts[each.tenant] += each.tokens
        return dict(counts)

    def goodput_tokens_s(self) -> float:
        """Of answers that ended while requests came and, as `Crowd.closed` counts, after the first seconds."""
        until_s = self.began_s + self.seconds
        from_s = self.began_s + min(5.0, self.seconds / 5)
        return sum(each.tokens for each in self.told if from_s <= each.ended_s <= until_s) / (until_s - from_s)

    def figures(self) -> dict[str, Any]:
        """All of it."""
        admitted = [each for each in self.told if each.status == 200]
        refused = [each for each in self.told if each.status == 429]
        quick = [each for each in refused if each.took_s <= AT_ONCE_S]
        lost = [each for each in self.told if each.status not in (200, 429) or (each.status == 200 and each.error)]
        tokens = self.served_tokens()
        last = self.samples[-1]["model"]["admission"] if self.samples else {}
        return {
            "offered": len(self.told),
            "offered_by_tenant": dict(Counter(each.tenant for each in self.told)),
            "admitted": len(admitted),
            "admitted_by_tenant": dict(Counter(each.tenant for each in admitted)),
            "rejected_at_once": len(quick),
            "rejected_later": len(refused) - len(quick),
            "429_ms": _percentiles(each.took_s for each in refused),
            "429_without_retry_after": sum(not each.is_refused for each in refused),
            "retry_after_s": sorted(Counter(each.retry_after for each in refused).items()),
            "reasons": last.get("rejected", {}) | {"evicted": last.get("evicted", 0)},
            "wait_prediction": {name: round(last[name] or 0.0, 3) for name in _LEARNT if name in last},
            "ttft_ms": _percentiles(each.first_s for each in admitted if each.first_s is not None),
            "slack_p99_ms": _slack_ms(admitted),
            "in_time_ratio": 1 - sum(each.is_late for each in admitted) / max(1, len(admitted)),
            "refused_by_tenant": {tenant.name: round(_ratio(refused, self.told, tenant.name), 4) for tenant in TENANTS},
            "small_refused_ratio": _ratio(refused, self.told, "small"),
            "tokens_by_tenant": tokens,
            "fairness": jain([tokens.get(tenant.name, 0) for tenant in TENANTS if tenant.share >= FAIR]),
            "silent": len(lost),
            "silent_kinds": dict(Counter(f"{each.status} {each.error}"[:80] for each in lost)),
            "goodput_tokens_s": self.goodput_tokens_s(),
            "capacity_tokens_s": self.capacity_tokens_s,
            "goodput_ratio": self.goodput_tokens_s() / self.capacity_tokens_s,
            "idle_slot_ratio": _idle([sample for sample in self.samples if sample["waiting"]]),
            "waiting_mean": sum(sample["waiting"] for sample in self.samples) / max(1, len(self.samples)),
        }


def broken(
    figures: dict[str, Any],
    *,
    fairness: float = 0.95,
    goodput: float = 0.9,
    late: float = 0.01,
    in_time: float = 0.99,
    refused: float = 0.05,
) -> list[str]:
    """The promises that the figures do not keep."""
    refused_late = figures["rejected_later"] / max(1, figures["offered"])
    checks = {
        f"{in_time} of the admitted began within their deadline": figures["in_time_ratio"] >= in_time,
        "every refusal has a Retry-After": not figures["429_without_retry_after"],
        f"refusals come at once, but for {late}": refused_late <= late,
        f"fairness is at least {fairness}": figures["fairness"] >= fairness,
        f"who asks for little is refused less than {refused}": figures["small_refused_ratio"] < refused,
        "nothing timed out silently": not figures["silent"],
        f"goodput is at least {goodput} of capacity": figures["goodput_ratio"] >= goodput,
        "slots are not idle while somebody waits": figures["idle_slot_ratio"] <= 0.02,
        "there was something to refuse": figures["rejected_at_once"] > 0,
    }
    return [what for what, holds in checks.items() if not holds]


def _ratio(some: Sequence[Told], told: Sequence[Told], tenant: str) -> float:
    """Part of a tenant's requests that are among some."""
    return sum(each.tenant == tenant for each in some) / max(1, sum(each.tenant == tenant for each in told))


def jain(values: Sequence[float]) -> float:
    """Jain, Chiu and Hawe's fairness index: 1 for equal shares, 1/n for one that has all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def _percentiles(values: Any) -> list[float] | None:
    """p50 and p99 in milliseconds."""
    ordered = sorted(values)
    return (
        [round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1e3, 1) for p in (50, 99)] if ordered else None
    )


def _slack_ms(admitted: Sequence[Told]) -> float | None:
    """What 99 of 100 had left of their time."""
    left = sorted(each.deadline_s - (each.first_s or GIVE_UP_S) for each in admitted)
    return round(left[len(left) // 100] * 1e3, 1) if left else None


def _idle(samples: Sequence[dict[str, Any]]) -> float:
    """Share of the slots that were free while somebody waited."""
    total = sum(sample["slots"] for sample in samples)
    return sum(sample["slots"] - sample["busy"] for sample in samples) / total if total else 0.0


class Crowd:
    """The clients.

    Args:
        url: of the gateway.
        http: with room for all connections.
        seed: of arrivals and prompts.
        patience: what deadlines are multiplied by.
    """

    def __init__(self, url: str, http: aiohttp.ClientSession, seed: int, patience: float = 1.0) -> None:
        self.url = url
        self.http = http
        self.dice = random.Random(seed)
        self.patience = patience

    async def ask(self, tenant: Tenant, deadline_s: float | None) -> Told:
        """One request, to its end."""
        output = self.dice.randint(*tenant.output)
        body = {
            "model": "bench",
            "messages": [{"role": "user", "content": filler(self.dice, self.dice.randint(*tenant.prompt))}],
            "max_tokens": output,
            "temperature": 0,
            "stream": True,
        }
        headers = {"authorization": f"Bearer key-{tenant.name}"}
        if deadline_s is not None:
            headers["x-lltm-deadline-ms"] = str(round(deadline_s * 1e3))
        told = Told(tenant.name, deadline_s or GIVE_UP_S, time.monotonic())
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await self._exchange(body, headers, told)
        except TimeoutError:
            told.error = "no end"
        except (aiohttp.ClientError, OSError) as error:
            told.error = type(error).__name__
        told.took_s = time.monotonic() - told.sent_s
        return told

    async def _exchange(self, body: dict[str, Any], headers: dict[str, str], told: Told) -> None:
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
            told.status = answer.status
            told.retry_after = answer.headers.get("retry-after", "")
            data = b""
            async for part in answer.content.iter_any():
                told.first_s = told.first_s or time.monotonic() - told.sent_s
                data = (data + part)[-2048:]
            if told.status != 200:
                return
            if b"[DONE]" not in data:
                told.error = "cut off"
                return
            timings = json.loads(data[data.rindex(b'"timings":') + 10 :].split(b"}")[0] + b"}")
            told.tokens = timings["prompt_n"] + timings["predicted_n"]

    async def closed(self, seconds: float, users: int) -> float:
        """Tokens a second when somebody always waits; the first fifth is not counted.

        Tenants come as often as gives them the tokens that a fair overload would.
        """
        end_s = time.monotonic() + seconds
        from_s = end_s - 0.8 * seconds
        weights = [min(tenant.share, FAIR) / tenant.mean_tokens for tenant in TENANTS]
        done: list[Told] = []

        async def user() -> None:
            while time.monotonic() < end_s:
                [tenant] = self.dice.choices(TENANTS, weights)
                done.append(await self.ask(tenant, None))

        await asyncio.gather(*(user() for _ in range(users)))
        counted = [each for each in done if from_s <= each.ended_s <= end_s and each.is_served]
        return sum(each.tokens for each in counted) / (end_s - from_s)

    async def open(self, seconds: float, factor: float, tokens_s: float) -> list[Told]:
        """Poisson arrivals, whatever becomes of them."""
        arrivals = []
        for tenant in TENANTS:
            rate = tenant.share * factor / 2 * tokens_s / tenant.mean_tokens
            at_s = self.dice.expovariate(rate)
            while at_s < seconds:
                arrivals.append((at_s, tenant))
                at_s += self.dice.expovariate(rate)
        began_s, tasks = time.monotonic(), []
        for at_s, tenant in sorted(arrivals, key=lambda each: each[0]):
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            deadline_s = self.patience * self.dice.choice(tenant.deadline_s)
            tasks.append(asyncio.create_task(self.ask(tenant, deadline_s)))
        return list(await asyncio.gather(*tasks))

    async def sample(self, samples: list[dict[str, Any]], pause_s: float = 0.1) -> None:
        """Ask the router how it stands until cancelled."""
        while True:
            headers = {"authorization": f"Bearer key-{TENANTS[0].name}"}
            async with self.http.get(f"{self.url}/lltm/status", headers=headers) as answer:
                router = (await answer.json())["router"]
            rows = router["engines"].values()
            samples.append(
                {
                    "waiting": sum(router["waiting"].values()),
                    "busy": sum(row["slots_busy"] for row in rows),
                    "slots": sum(row["slots_total"] for row in rows),
                    "model": router["models"]["bench"],
                }
            )
            await asyncio.sleep(pause_s)


async def drive(
    url: str, seconds: float, factor: float, *, seed: int = 1, closed_s: float = 10.0, patience: float = 1.0
) -> Run:
    """Measure capacity, then overload."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        crowd = Crowd(url, http, seed, patience)
        tokens_s = await crowd.closed(closed_s, 2 * ENGINES * SLOTS)
        samples: list[dict[str, Any]] = []
        sampling = asyncio.create_task(crowd.sample(samples))
        began_s = time.monotonic()
        told = await crowd.open(seconds, factor, tokens_s)
        if sampling.done():
            sampling.result()
        sampling.cancel()
        return Run(told, began_s, seconds, tokens_s, samples)


@contextlib.contextmanager
def target(kind: str, folder: Path) -> Iterator[str]:
    """Engines and the gateway before them, in processes of their own; its URL."""
    keys = folder / "keys"
    keys.write_text("".join(f"key-{tenant.name} {tenant.name}\n" for tenant in TENANTS))
    keys.chmod(0o600)
    with contextlib.ExitStack() as stack:
        if kind == "real":
            urls = [server.url for server in stack.enter_context(servers(folder, ENGINES))]
        else:
            argv = [sys.executable, "-m", "tests.peers.scripted", str(SLOTS), str(ENGINES)]
            urls = json.loads(stack.enter_context(running(argv, folder / "engines.log", talks=True)).first_line())
        argv = [sys.executable, "-m", "tests.peers.overload", "--serve", str(keys), str(free_port()), *urls]
        yield stack.enter_context(running(argv, folder / "gateway.log", talks=True)).first_line()


async def _gateway(keys: str, port: str, urls: Sequence[str]) -> None:
    config = GatewayConfig(port=int(port))
    router = Router(config.queue_limit, config.queue_timeout_s)
    router.update([engine_info(number, url, SLOTS) for number, url in enumerate(urls)])
    status = FleetStatus(name="bench", engines=router.engines())
    app = GatewayApp(router=router, config=config, keys=ApiKeys.from_file(keys), status=lambda: status)

    def ready(number: int) -> None:
        sys.stdout.write(f"http://127.0.0.1:{number}\n")
        sys.stdout.flush()

    await serve(app, config, ready=ready)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it, print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=2.0, help="offered tokens over capacity")
    parser.add_argument("--engines", choices=("scripted", "real"), default="scripted")
    parser.add_argument("--patience", type=float, default=1.0, help="deadlines are so many times longer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.serve:
        uvloop.run(_gateway(chosen.serve[0], chosen.serve[1], chosen.serve[2:]))
        return 0
    with tempfile.TemporaryDirectory() as folder, target(chosen.engines, Path(folder)) as url:
        run = uvloop.run(drive(url, chosen.seconds, chosen.factor, seed=chosen.seed, patience=chosen.patience))
    figures = run.figures()
    for name, value in figures.items():
        sys.stdout.write(f"{name:26} {value if not isinstance(value, float) else round(value, 4)}\n")
    # the clients and the gateway take their part of the real ones' processors
    failed = broken(figures, goodput=0.8 if chosen.engines == "real" else 0.9)
    sys.stdout.write(("\n".join(f"BROKEN: {what}" for what in failed) or "all promises kept") + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
