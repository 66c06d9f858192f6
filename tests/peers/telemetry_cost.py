"""What telemetry costs the gateway: one with it and one without, side by side, loaded in turns.

`python -m tests.peers.telemetry_cost [--lives 2] [--rounds 4] [--seconds 2.0] [--real]`. Both are processes of one Ray,
as a fleet's gateways are; the one with telemetry sends its rows to an actor that throws them away, for a real one
(`--real`) is as busy as the gateway, and on few cores the gateway is then slower for it. Engines answer at once, so
nothing but the gateway shows. Two processes of the same program differ by some percent for all of their lives, so each
life starts new ones. Wanted of the medians: at most 5 % more CPU for a request, 1 % for a token of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import uvloop

from lltm_ray.actors import names
from lltm_ray.actors.remote import actor, options
from lltm_ray.actors.sender import EVERY_S, Sender
from lltm_ray.actors.telemetry import TelemetryActor
from lltm_ray.config import GatewayConfig, TelemetryConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.gateway.trace import Tracing
from lltm_ray.records import FleetStatus
from lltm_ray.routing.ledger import Ledger
from lltm_ray.routing.router import Router
from lltm_ray.telemetry.parcel import Parcel

from .cost import WARM_S, Shape, load, rest, upstreams
from .ours import engine_info
from .peers import Front, Peer, Site, front
from .processes import cpu_s

FLEET = "cost"
SLOTS = 64
REQUESTS = (Shape("whole, c=16", 16, 1, streamed=False), Shape("whole, c=1", 1, 1, streamed=False))
STREAMS = (
    Shape("64 tokens, c=8", 8, 64, streamed=True),
    Shape("256 tokens, c=8", 8, 256, streamed=True, stretch=1.5),
)
MOST_PER_REQUEST, MOST_PER_TOKEN = 0.05, 0.01
SETTLE_S = EVERY_S + 0.2
"""After each load, for its last rows."""


async def gateway(is_on: bool, port: int, urls: list[str]) -> None:
    """Serve until killed; within a Ray of its own where none is named."""
    with contextlib.ExitStack() as stack:
        if address := os.environ.get("RAY_ADDRESS"):
            ray.init(address, namespace=names.NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
        else:
            stack.enter_context(telemetry_actor(Nothing))
        await _serve(is_on, port, urls)


async def _serve(is_on: bool, port: int, urls: list[str]) -> None:
    config = GatewayConfig(port=port)
    router = Router(config.queue_limit, config.queue_timeout_s, policy=config.policy)
    router.update([engine_info(number, url, SLOTS) for number, url in enumerate(urls)])
    sender = Sender(FLEET, f"gateway-{port}")
    sending = asyncio.create_task(sender.run()) if is_on else None
    with tempfile.TemporaryDirectory(prefix="bench-ledger-") as folder:
        app = GatewayApp(
            router=router,
            config=config,
            keys=ApiKeys(),
            status=lambda: FleetStatus(name=FLEET, engines=router.engines()),
            ledger=Ledger(Path(folder) / "ledger.sqlite", keep_requests=config.ledger_requests),
            tracing=Tracing(sender.outbox.add, later=sender.outbox.later) if is_on else None,
        )
        await serve(app, config, ready=lambda _: None)
    assert sending is None or not sending.done()


def _peer(name: str) -> Peer:
    def build(site: Site, _programs: Path) -> list[str]:
        return [sys.executable, "-m", "tests.peers.telemetry_cost", "--serve", name, str(site.port), *site.engines]

    address = str(ray.get_runtime_context().gcs_address)
    return Peer(name, build, env=(("RAY_ADDRESS", address), ("PYTHONHASHSEED", "0")))


def cost_us(target: Front, shape: Shape, seconds: float) -> float:
    """CPU time of one request, with what is still to be sent of it."""
    assert target.process is not None
    before = cpu_s(target.process.pid)
    seen = load(target, shape, seconds * shape.stretch)
    assert not seen["errors"], seen
    time.sleep(SETTLE_S)
    answers: int = seen["requests"]
    return (cpu_s(target.process.pid) - before) / answers * 1e6


def live(folder: Path, urls: tuple[str, ...], rounds: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """One pair of processes: for each shape a pair (without, with) a round."""
    found = defaultdict(list)
    with front(_peer("off"), folder / "off", urls, SLOTS) as off, front(_peer("on"), folder / "on", urls, SLOTS) as on:
        for target in (off, on):
            load(target, REQUESTS[0], WARM_S)
            load(target, STREAMS[0], WARM_S)
            rest(target)
        for number in range(rounds):
            for shape in (*REQUESTS, *STREAMS):
                costs = {each: cost_us(each, shape, seconds) for each in ((off, on) if number % 2 else (on, off))}
                found[shape.name].append((costs[off], costs[on]))
    return found


class Nothing:
    """Takes rows and forgets them."""

    def __init__(self, *_given: Any) -> None:
        self._batches = 0

    async def put(self, _sender: str, parcel: Parcel, _dropped: Mapping[str, int]) -> None:
        """As `TelemetryActor.put`."""
        self._batches += bool(parcel)

    async def look(self) -> dict[str, Any]:
        """As `TelemetryActor.look`."""
        return {"telemetry": {"batches": self._batches}}


@contextlib.contextmanager
def telemetry_actor(of_class: type[Any]) -> Iterator[Any]:
    """A Ray of our own with the actor that the rows go to."""
    ray.init(
        "local",
        include_dashboard=False,
        namespace=names.NAMESPACE,
        logging_level=logging.ERROR,
        log_to_driver=False,
        num_cpus=2,
    )
    try:
        own = options(detached=False) | {"name": names.telemetry(FLEET)}
        yield actor(of_class).options(**own).remote(FLEET, TelemetryConfig(), {})
    finally:
        ray.shutdown()


def report(shape: Shape, pairs: list[tuple[float, float]]) -> bool:
    """One line; whether the median is within its limit."""
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    least = [min(column) for column in zip(*pairs, strict=True)]
    more = statistics.median(on / off - 1 for off, on in pairs)
    limit, each = (MOST_PER_TOKEN, shape.tokens) if shape.streamed else (MOST_PER_REQUEST, 1)
    figures = (
        f"{name} {off / each:7.2f} -> {on / each:7.2f} us" for name, (off, on) in (("median", medians), ("min", least))
    )
    unit = "token" if shape.streamed else "request"
    print(f"{shape.name:16} per {unit:8}", *figures, f"pairs' median {more:+.1%}, wanted <= {limit:.0%}", sep="   ")
    return more <= limit


def main() -> int:
    """0: within the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--real", action="store_true", help="send to a telemetry actor that keeps and counts the rows")
    chosen = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as name,
        telemetry_actor(TelemetryActor if chosen.real else Nothing) as sink,
        upstreams(Path(name)) as urls,
    ):
        for number in range(chosen.lives):
            for shape, pairs in live(Path(name) / str(number), urls, chosen.rounds, chosen.seconds).items():
                found[shape] += pairs
        print("the actor has", ray.get(sink.look.remote())["telemetry"])
    held = [report(shape, found[shape.name]) for shape in (*REQUESTS, *STREAMS)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        uvloop.run(gateway(sys.argv[2] == "on", int(sys.argv[3]), sys.argv[4:]))
    else:
        sys.exit(main())
