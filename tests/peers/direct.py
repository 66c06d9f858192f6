"""What `make bench` runs: one load on this machine, straight to a llama-server and through the gateway, in turns.

The ratio of the two is what counts: this machine may be busy. Prints a table and the gateway's own CPU time.
"""

import asyncio
import os

import ray

import lltm_ray
from lltm_ray.cli._load_result import LoadPlan
from lltm_ray.cli._load_run import run_load

ROUNDS, REQUESTS = 5, 400


def cpu_s(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(url, key=""):
    plan = LoadPlan(url=url, model="tiny", api_key=key, requests=REQUESTS, concurrency=4, max_tokens=64)
    return asyncio.run(run_load(plan))


with lltm_ray.Cluster.start(model="tiny", engines=1, gateway={"port": 0}) as cluster:
    status = cluster.status()
    engine, gateway = status.engines[0], status.gateways[0]
    measure(cluster.endpoint)  # warm up
    rows, spent, events = [], 0.0, 0
    for _ in range(ROUNDS):
        direct = measure(engine.url, engine.api_key)
        before = cpu_s(gateway.pid)
        through = measure(cluster.endpoint)
        spent += cpu_s(gateway.pid) - before
        events += through.output_tokens
        rows.append((direct.output_tokens_per_s, through.output_tokens_per_s, direct.ttft_ms.p50, through.ttft_ms.p50))
    print(f"{'tokens/s direct':>16} {'gateway':>10} {'ratio':>7} {'TTFT p50 direct':>17} {'gateway':>9}")
    for direct_rate, rate, direct_ttft, ttft in rows:
        print(f"{direct_rate:16,.0f} {rate:10,.0f} {rate / direct_rate:7.2f} {direct_ttft:14.2f} ms {ttft:6.2f} ms")
    print(f"gateway: {spent / events * 1e6:.1f} us CPU for each token it passed on ({events:,} tokens)")
ray.shutdown()
