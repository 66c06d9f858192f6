"""One Ray cluster for the whole folder; a fleet for each module that asks for one.

The cluster declares GPUs that do not exist: placement and isolation are Ray's and ours, only a CUDA server would know.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import urllib.request
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

import lltm_ray
from lltm_ray.actors import names

_QUICK_TO_BURY = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 5,
}
"""Ray takes near a minute to call a node dead that is gone; its tests need not wait for that.

One whose machine stands still for some seconds must not be taken for it.
"""
HI = [{"role": "user", "content": "hi"}]


def pytest_collection_modifyitems(items):
    """Whoever waits here says sooner what did not come to be; on a busy machine Ray alone takes minutes."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Everything the fleets write goes where the tests can look at it."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("LLTM_RAY_CACHE")
    os.environ["LLTM_RAY_CACHE"] = str(folder)
    yield folder
    os.environ.pop("LLTM_RAY_CACHE") if before is None else os.environ.update(LLTM_RAY_CACHE=before)


@pytest.fixture(scope="session")
def ray_cluster(cache):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, while it starts
        quiet = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        head = {"num_cpus": 4, "num_gpus": 2, "_system_config": _QUICK_TO_BURY, **quiet}
        cluster = RayCluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, namespace=names.NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(ray_cluster, request):
    """Two engines of four slots of 8,192 tokens, which take seconds to fill, behind a gateway."""
    settings = {"gpu_share": 0.0, "gateway": {"port": 0}, "engine": {"n_ctx": 4 * 8192}}
    name = request.module.__name__.rpartition(".")[2]
    with lltm_ray.Cluster.start(model="random", engines=2, name=name, **settings) as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def no_orphans(ray_cluster):
    """A test that leaves a fleet behind, or a server that no engine owns, has failed."""
    before = directories()
    yield
    deadline = time.monotonic() + 60  # killed actors take a moment to be gone, on a busy machine a long one
    while directories() - before or servers() - owned():
        assert time.monotonic() < deadline, (directories() - before, servers() - owned())
        time.sleep(0.05)


def until(condition, timeout_s=60.0):
    """What `condition` returns once it is true. Ray needs up to 10 s to start a worker on a busy machine."""
    deadline = time.monotonic() + timeout_s
    while not (seen := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
    return seen


def until_free(cpus):
    """Until Ray has back what ended fleets and tests held; on a busy machine it hears of that late."""
    until(lambda: ray.available_resources().get("CPU", 0.0) >= cpus)


def directories():
    return {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if ":directory" in entry["name"]}


def owned():
    """Pids of servers that some fleet's directory knows."""
    pids = set()
    for name in directories():
        try:
            directory = ray.get_actor(name, namespace=names.NAMESPACE)
            pids |= {engine.server_pid for engine in ray.get(directory.status.remote(), timeout=60).engines}
        except (ValueError, ray.exceptions.RayError):
            continue  # gone between the calls, or just restarted: who waits for its servers' owner looks again
    return pids


def servers():
    """Pids of llama-servers that belong to these tests, by the cache folder in their arguments."""
    marker = os.environ["LLTM_RAY_CACHE"].encode()
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as stream:
                arguments = stream.read()
        except OSError:
            continue  # gone between the two calls
        if b"lltm_ray.llamacpp.embedded" in arguments and marker in arguments:
            found.add(int(pid))
    return found


@contextmanager
def held_port():
    """A port where nothing listens, and which nobody is given meanwhile but who asks for it and shares it."""
    with socket.socket() as held:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            held.setsockopt(socket.SOL_SOCKET, option, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def post(url, body, headers=()):
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"content-type": "application/json", **dict(headers)}
    )
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.load(answer)
