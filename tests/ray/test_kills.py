"""kill -9 under the load of 16 clients: the fleet comes back by itself; only what had begun on the victim is lost."""

import os
import signal
import time

import pytest
import ray

from lltm_ray.actors import names
from lltm_ray.actors.watch import get_directory
from lltm_ray.records import EngineState
from tests.ray.conftest import servers
from tests.ray.load import Load

WHOLE_WITHIN_S = 90.0
pytestmark = pytest.mark.timeout(400)


def pid_of(actor_name):
    """Pid of a named actor's worker, as Ray's own state shows it."""
    actor = ray.get_actor(actor_name, namespace=names.NAMESPACE)
    info = ray._private.state.actors(actor._actor_id.hex())
    return info["Pid"]


def wait_whole(cluster, victim_pid, began):
    """Seconds until every engine and the gateway are ready again and the victim is replaced."""
    while True:
        try:
            status = cluster.status()
            engines = all(engine.state is EngineState.READY for engine in status.engines)
            gateways = all(gateway.state == "ready" for gateway in status.gateways)
            pids = {pid for engine in status.engines for pid in (engine.server_pid, engine.actor_pid)}
            pids |= {gateway.pid for gateway in status.gateways}
            if len(status.engines) == 2 and engines and gateways and victim_pid not in pids:
                return time.monotonic() - began
        except ray.exceptions.RayError:
            pass  # the directory is the victim
        assert time.monotonic() - began < WHOLE_WITHIN_S, cluster.status()
        time.sleep(0.05)


def claims(cluster):
    gateway = ray.get_actor(names.gateway(cluster.name, "gateway-0"), namespace=names.NAMESPACE)
    snapshot = ray.get(gateway.snapshot.remote(), timeout=60)
    return {name: row["slots_busy"] for name, row in snapshot["engines"].items()}, snapshot["waiting"]


def check_clean(cluster):
    """No orphan process, no claim that nobody holds, no slot that decodes for nobody."""
    deadline = time.monotonic() + 60
    while any(claims(cluster)[0].values()) or any(slots_busy(cluster)):
        assert time.monotonic() < deadline, (claims(cluster), slots_busy(cluster))
        time.sleep(0.05)
    assert claims(cluster) == ({"engine-0": 0, "engine-1": 0}, {})
    assert len(servers()) == 2


def slots_busy(cluster):
    return [slot.is_processing for engine in cluster.engines for slot in ray.get(engine.slots.remote(), timeout=60)]


@pytest.mark.parametrize("victim", ["server", "engine worker"])
def test_an_engine_that_is_killed_loses_only_answers_it_had_begun(cluster, victim, record_property):
    engine = cluster.status().engines[0]
    pid = engine.server_pid if victim == "server" else engine.actor_pid
    with Load(cluster.endpoint) as load:
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        whole_s = wait_whole(cluster, pid, began)
        load.wait_for(64)
    record_property("whole_s", whole_s)
    print(f"{victim}: whole after {whole_s:.1f} s, {load.succeeded()} answers, {len(load.failures())} broken")
    for failure in load.failures():
        assert failure.got_bytes, failure
        assert failure.engine == engine.name, failure
    check_clean(cluster)
    after = cluster.status().engines[0]
    assert after.restarts == engine.restarts + 1
    assert after.server_pid != engine.server_pid


def test_a_killed_directory_is_not_noticed_by_any_request(cluster):
    pid = pid_of(names.directory(cluster.name))
    with Load(cluster.endpoint) as load:
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        load.wait_for(64)
        wait_whole(cluster, pid, began)
        whole_s = time.monotonic() - began
        load.wait_for(64)
    print(f"directory: whole after {whole_s:.1f} s, {load.succeeded()} answers")
    assert load.failures() == []
    assert pid_of(names.directory(cluster.name)) != pid
    assert ray.get(get_directory(cluster.name).describe.remote())[0].name == cluster.name
    check_clean(cluster)


def test_a_killed_gateway_comes_back_at_its_address(cluster):
    before = cluster.status().gateways[0]
    with Load(cluster.endpoint) as load:
        began = time.monotonic()
        os.kill(before.pid, signal.SIGKILL)
        whole_s = wait_whole(cluster, before.pid, began)
        load.wait_for(64)
    after = cluster.status().gateways[0]
    print(f"gateway: whole after {whole_s:.1f} s, {load.succeeded()} answers, {len(load.failures())} broken")
    assert (after.url, after.restarts) == (before.url, before.restarts + 1)
    assert all(failure.began < began + whole_s for failure in load.failures())
    check_clean(cluster)
