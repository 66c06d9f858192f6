"""Whether analytics costs the engines anything: tokens/s of a loaded fleet with reports running and without, in turn.

`python -m tests.peers.split [--model GGUF] [--gpu] [--rounds 6] [--seconds 8] [--clients 32]`. With `--gpu` two engines
share one GPU and analytics (cuDF, cuGraph) has another one; without, all are on the CPU. The client is a process of its
own. While reports run, one follows the other without a pause: more than any operator asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from lltm_ray import Cluster
from lltm_ray.load.result import LoadPlan
from lltm_ray.load.run import run_load


def drive(url: str, seconds: float, clients: int, seed: int) -> tuple[float, float, float]:
    """Tokens/s, requests' errors, TTFT p50 in ms of one window; runs in a process of its own."""
    plan = LoadPlan(url=url, duration_s=seconds, concurrency=clients, prompt_tokens=128, max_tokens=64, seed=seed)
    found = asyncio.run(run_load(plan))
    ttft_ms = found.ttft_ms.p50 if found.ttft_ms is not None else float("nan")
    return found.output_tokens_per_s, float(sum(found.errors.values())), ttft_ms


class Reports:
    """Reports, one after the other, until told to stop."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.ms: list[float] = []
        self.last: Any = None

    def _run(self) -> None:
        while not self._stop.is_set():
            self.last = self._cluster.report(600)
            self.ms.append(self.last.ms)

    def __enter__(self) -> Reports:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()


def ratio(on: list[float], off: list[float], seed: int = 0) -> tuple[float, float, float]:
    """On over off of neighbouring windows: the mean of the ratios and its 95 % bootstrap interval."""
    ratios = np.asarray(on) / np.asarray(off)
    draws = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(ratios.mean()), float(low), float(high)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random")
    parser.add_argument("--gpu", action="store_true", help="engines on one GPU, analytics on another")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=32)
    chosen = parser.parse_args()
    share, analytics = (0.5, 1.0) if chosen.gpu else (0.0, 0.0)
    settings: dict[str, Any] = {"enabled": True, "gpu_share": analytics, "engine": "cudf" if chosen.gpu else "pandas"}
    fleet: dict[str, Any] = {"model": chosen.model, "engines": 2, "gpu_share": share, "analytics": settings}
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with (
        Cluster.start(name="split", gateway={"port": 0}, engine={"n_parallel": 16}, **fleet) as cluster,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as client,
    ):

        def window(seed: int) -> float:
            tokens_s, failed, ttft_ms = client.submit(
                drive, str(cluster.endpoint), chosen.seconds, chosen.clients, seed
            ).result()
            print(f"    {tokens_s:9.0f} tokens/s, TTFT p50 {ttft_ms:6.1f} ms, {failed:.0f} failed", flush=True)
            return tokens_s

        window(0)
        found = cluster.report(600)
        for number in range(chosen.rounds):
            for is_on in (number % 2 == 0, number % 2 == 1):
                print(f"round {number + 1}, reports {'on' if is_on else 'off'}", flush=True)
                if is_on:
                    with Reports(cluster) as reports:
                        speeds[True].append(window(number + 1))
                    found = reports.last
                    print(f"    {len(reports.ms)} reports, {statistics.median(reports.ms):.0f} ms each", flush=True)
                else:
                    speeds[False].append(window(number + 1))
    mean, low, high = ratio(speeds[True], speeds[False])
    print(f"\n{found.engine}: {found.reason}; {found.requests} requests, {sum(found.rows.values())} rows")
    print({name: round(result.ms, 1) for name, result in found.results.items()})
    print(f"tokens/s with reports over without: {mean:.4f} (95 % {low:.4f} to {high:.4f})")
    print(json.dumps({"on": speeds[True], "off": speeds[False], "ratio": [mean, low, high]}))


if __name__ == "__main__":
    main()
