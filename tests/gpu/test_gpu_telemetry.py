"""Meters, processes' memory and joules of real GPUs: two engines on one, one on another."""

import json
import threading
import time

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families as parse

import lltm_ray
from lltm_ray.gpu.meters import read_samples

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

LOAD_S = 40.0
SETTLED_S = 8.0
"""Rows of the last second have arrived and their energy is shared out."""
HALVES, WHOLE = "halves", "whole"


@pytest.fixture(scope="module")
def cluster(gpus, model):
    if len(gpus) < 2:
        pytest.fail("needs two GPUs")
    models = [
        {"model": model, "served_name": HALVES, "engines": 2, "gpu_share": 0.5},
        {"model": model, "served_name": WHOLE, "engines": 1, "gpu_share": 1.0},
    ]
    with lltm_ray.Cluster.start(name="meters", models=models, gateway={"port": 0}) as cluster:
        yield cluster


def look(cluster):
    with requests.get(f"{cluster.endpoint}/dashboard/events", stream=True, timeout=30) as events:
        for line in events.iter_lines():
            if line.startswith(b"data: {"):
                return json.loads(line[6:])
    raise AssertionError("the live page's stream ended")


def energy(cluster):
    """Joules since the first reading: (by NVML itself, by telemetry's balance), each by UUID."""
    time.sleep(SETTLED_S)
    counters = {sample.uuid: sample.energy_j for sample in read_samples()}
    found = look(cluster)["energy"]
    balances = {uuid: sum(parts.values()) for uuid, parts in found["gpus"].items()}
    return counters, balances, found


def load(cluster, model, clients):
    """Chat until the time is up; the tokens that clients got."""
    until, tokens = time.monotonic() + LOAD_S, [0] * clients

    def client(number):
        while time.monotonic() < until:
            words = " ".join(f"word{number}-{each}" for each in range(200))
            body = {
                "model": model,
                "messages": [{"role": "user", "content": words}],
                "max_tokens": 64,
                "ignore_eos": True,
            }
            answer = requests.post(f"{cluster.endpoint}/v1/chat/completions", json=body, timeout=120)
            tokens[number] += answer.json()["usage"]["completion_tokens"]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    return threads, tokens


def test_joules_of_requests_and_idle_time_add_up_to_the_counters(cluster):
    home = {engine.name: engine for engine in cluster.status().engines}
    counters, balances, before = energy(cluster)
    halves, half_tokens = load(cluster, HALVES, 8)
    whole, whole_tokens = load(cluster, WHOLE, 8)
    for thread in (*halves, *whole):
        thread.join()
    counters_after, balances_after, found = energy(cluster)
    used = {engine.gpu_ids for engine in home.values()}
    assert len(used) == 2
    for sample in read_samples():
        if (sample.index,) not in used:
            continue
        counted = counters_after[sample.uuid] - counters[sample.uuid]
        shared = balances_after[sample.uuid] - balances[sample.uuid]
        parts = found["gpus"][sample.uuid]
        print(f"GPU {sample.index}: counter {counted:.1f} J, balance {shared:.1f} J ({shared / counted:.4f}), {parts}")
        assert shared == pytest.approx(counted, rel=0.02)
        assert parts["unattributed_j"] <= 0.02 * counted
    earlier = {row["engine"]: (row["joules"], row["tokens"]) for row in before["engines"]}
    sums = {row["engine"]: (row["joules"], row["tokens"]) for row in found["engines"]}
    for name, after in sums.items():
        joules, tokens = (new - old for new, old in zip(after, earlier.get(name, (0, 0)), strict=True))
        print(f"{name}: {joules:.1f} J for {tokens:.0f} tokens, {joules / tokens:.4f} J a token")
        assert joules > 0
    assert len(sums) == 3
    assert sum(half_tokens) > 0
    assert sum(whole_tokens) > 0


def test_meters_and_memory_of_processes_are_told(cluster, gpus):
    families = {family.name: family for family in parse(requests.get(f"{cluster.endpoint}/metrics", timeout=30).text)}
    uuids = {sample.labels["hw_id"] for sample in families["hw_power_watts"].samples}
    assert uuids == {gpu.uuid for gpu in gpus}
    for name in ("hw_gpu_utilization_ratio", "hw_energy_joules", "hw_temperature_celsius", "hw_gpu_memory_usage_bytes"):
        print(name, [(sample.labels["hw_id"][:12], sample.value) for sample in families[name].samples])
    memory = {each.labels["lltm_engine"]: each.value for each in families["lltm_gpu_process_memory_bytes"].samples}
    share = {each.labels["lltm_engine"]: each.value for each in families["lltm_gpu_process_share_bytes"].samples}
    print("memory of processes, GiB:", {name: (value / 2**30, share[name] / 2**30) for name, value in memory.items()})
    assert len(memory) == 3
    assert all(0 < value <= share[name] for name, value in memory.items())
