"""Telemetry's own failures under load: the collector dies for a minute, then the telemetry actor is killed.

`python -m tests.peers.outage [--seconds 60]`. A fleet of two engines exports by gRPC and HTTP to a collector in a
process of its own (`tests/otlp_sink.py`), four clients load it all the while. Looked at: that requests take as long
without the collector as with it, that lost spans are counted and export goes on by itself; that a killed telemetry
actor comes back with its segments, gateways reach it again, and the account of tokens agrees with llama.cpp's own
counters. Prints a table; exit 1 where something is amiss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

import lltm_ray
from lltm_ray.actors import names
from lltm_ray.config import FleetConfig, GatewayConfig, TelemetryConfig
from lltm_ray.telemetry.context import new_span_id, new_trace_id
from tests.otlp_sink import grpc_sink, http_sink

from .otlp import CHAT, Findings, Sent, chat, send
from .processes import Running, cmdline, free_port, running, tree

CLIENTS = 4
QUEUE_SPANS = 2000
"""Room for some seconds only, so that an outage does lose spans."""
NOISE_RATIO, NOISE_S = 1.35, 0.02
"""What latencies of the same load may differ by on a shared machine."""


def serve_sink(grpc_port: int, http_port: int) -> None:
    """A collector on two ports; tells how many spans it has on stdout each time it is asked on stdin."""
    with grpc_sink(grpc_port) as by_grpc, http_sink(http_port) as by_http:
        for _ in iter(
            lambda: print(len(by_grpc.spans()), len(by_http.spans()), flush=True) or sys.stdin.readline(), ""
        ):
            pass


@contextlib.contextmanager
def collector(folder: Path, ports: tuple[int, int]) -> Iterator[Running]:
    """It, in a process of its own."""
    argv = [sys.executable, "-m", "tests.peers.outage", "--serve", *map(str, ports)]
    with running(argv, folder / "collector.log", talks=True) as process:
        process.first_line()
        yield process


def spans_of(process: Running) -> tuple[int, int]:
    """What it has by gRPC and by HTTP."""
    assert process.process.stdin is not None
    process.process.stdin.write("\n")
    process.process.stdin.flush()
    by_grpc, by_http = process.first_line().split()
    return int(by_grpc), int(by_http)


@dataclass
class Load:
    """Clients in threads; how long each request took, by the phase it began in."""

    url: str
    phase: str = "warm"
    took_s: dict[str, list[float]] = field(default_factory=dict)
    failures: list[Any] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    sent: int = 0

    def client(self, number: int) -> None:
        """Until it is stopped."""
        turn = 0
        while not self.stop.is_set():
            turn += 1
            sent = Sent("load", CHAT, chat(stream=bool(turn % 2)), f"{number}-{turn}", new_trace_id(), new_span_id())
            phase, began = self.phase, time.monotonic()
            try:
                send(self.url, sent)
            except OSError as error:
                self.failures.append(error)
            if sent.status != 200:
                self.failures.append(sent.status)
            self.took_s.setdefault(phase, []).append(time.monotonic() - began)
            self.sent += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """All clients, meanwhile."""
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()

    def figures(self, phase: str) -> tuple[float, float]:
        """p50 and p99 in seconds."""
        ordered = sorted(self.took_s[phase])
        return statistics.median(ordered), ordered[len(ordered) * 99 // 100]


def telemetry_of(cluster: Any) -> dict[str, Any]:
    """What the telemetry actor says of itself."""
    told: dict[str, Any] = ray.get(handle(cluster).look.remote(), timeout=30)["telemetry"]
    return told


def handle(cluster: Any) -> Any:
    """The actor, by name."""
    return ray.get_actor(names.telemetry(cluster.status().name), namespace=names.NAMESPACE)


def eventually(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What it gives once that is true; its last word when the time is over. Ray's and the network's errors are no."""
    deadline, seen = time.monotonic() + timeout_s, None
    while time.monotonic() < deadline:
        with contextlib.suppress(ray.exceptions.RayError, ValueError, OSError):
            if seen := condition():
                return seen
        time.sleep(0.25)
    return seen


def check_latency(load: Load, into: Findings) -> None:
    """With the collector and without."""
    shown = {phase: load.figures(phase) for phase in ("before", "during", "after")}
    seen = "; ".join(f"{phase} {p50 * 1e3:.1f} / {p99 * 1e3:.1f} ms" for phase, (p50, p99) in shown.items())
    for place, what in enumerate(("p50", "p99")):
        calm = max(shown["before"][place], shown["after"][place])
        worse = shown["during"][place]
        misses = [what] if worse > calm * NOISE_RATIO + NOISE_S else []
        into.add(f"{what} of requests is the same without a collector", misses, seen)


def outage(cluster: Any, load: Load, folder: Path, ports: tuple[int, int], seconds: float, into: Findings) -> None:
    """The collector is there, is killed, is there again."""
    calm_s = seconds / 2
    with collector(folder, ports) as process:
        time.sleep(3.0)
        load.phase = "before"
        time.sleep(calm_s)
        before = spans_of(process)
        into.add("spans arrive by both protocols", [] if all(before) else [before], f"{before}")
        os.kill(process.process.pid, signal.SIGKILL)
    load.phase = "during"
    time.sleep(seconds)
    exporters = telemetry_of(cluster)["exporters"]
    dropped = {name: exporters[name]["dropped"] for name in ("otlp-grpc traces", "otlp-http traces")}
    into.add("lost spans are counted", [name for name, count in dropped.items() if not count], f"{dropped}")
    errors = {name: exporters[name]["error"][:60] for name in dropped}
    into.add("the reason is told", [name for name, error in errors.items() if not error], f"{errors}")
    back = time.monotonic()
    with collector(folder, ports) as process:
        load.phase = "after"
        eventually(lambda: all(spans_of(process)), 90.0)
        took_s = time.monotonic() - back
        after = spans_of(process)
        into.add("export goes on by itself", [] if all(after) else [after], f"after {took_s:.1f} s: {after}")
        time.sleep(max(0.0, calm_s - took_s))
        load.phase = "afterwards"


def kill(cluster: Any, load: Load, into: Findings) -> None:
    """The telemetry actor's process, by SIGKILL."""
    page = ray.get(handle(cluster).read_since.remote(0, ["requests"], 10**6))
    before, pid = page.tables["requests"].num_rows, _pid()
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: _pid() not in (0, pid))
    new = eventually(lambda: telemetry_of(cluster)["rows"].get("requests"), 60.0)
    into.add(
        "the actor is back and gateways reach it", [] if new else ["no rows"], f"{time.monotonic() - killed:.1f} s"
    )
    time.sleep(5.0)
    load.stop.set()
    time.sleep(2.0)
    page = ray.get(handle(cluster).read_since.remote(0, ["requests"], 10**6))
    after = page.tables["requests"].num_rows
    lost = load.sent - after
    into.add("its segments are back", [after] if after < before else [], f"{before} requests before, {after} after")
    into.add("rows of its absence are kept", [], f"{load.sent} requests sent, {lost} not told of")


def _pid() -> int:
    """Of the actor's process; 0: it has none."""
    return next((pid for pid in tree(os.getpid()) if cmdline(pid).startswith("ray::TelemetryActor")), 0)


def check_account(cluster: Any, load: Load, into: Findings) -> None:
    """The ledger saw every request and agrees with llama-server."""

    def agrees() -> dict[str, Any] | None:
        with urllib.request.urlopen(f"{cluster.endpoint}/lltm/status", timeout=10) as answer:
            account: dict[str, Any] = json.load(answer)["ledger"]
        drift = account["drift_tokens"]
        return account if len(drift) == 2 and not any(map(any, drift.values())) else None

    account = eventually(agrees, 30.0)
    into.add("the account's drift is 0", [] if account else ["it drifts"], f"{account}")
    into.add("no request failed", load.failures[:5], f"{load.sent} requests")


def main() -> int:
    """0: all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the outage")
    chosen = parser.parse_args()
    ports, findings = (free_port(), free_port()), Findings()
    exporters = (f"otlp-grpc=http://127.0.0.1:{ports[0]}", f"otlp-http=http://127.0.0.1:{ports[1]}")
    with tempfile.TemporaryDirectory() as name:
        config = FleetConfig(
            model="random",
            engines=2,
            name="outage",
            served_name="text",
            gpu_share=0.0,
            cpu_share=0.2,
            gateway=GatewayConfig(port=0),
            telemetry=TelemetryConfig(exporters=exporters, queue_spans=QUEUE_SPANS, segment_dir=f"{name}/segments"),
            drain_timeout_s=1.0,
        )
        with lltm_ray.Cluster.start(config) as cluster:
            load = Load(cluster.endpoint)
            with load.running():
                outage(cluster, load, Path(name), ports, chosen.seconds, findings)
                kill(cluster, load, findings)
            check_account(cluster, load, findings)
    check_latency(load, findings)
    return 0 if findings.show() else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_sink(int(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
