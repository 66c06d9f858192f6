"""Two raylets: saved slots go from one to the other, one gateway reaches the engines of both, one raylet dies."""

import os
import stat
import time
from collections import Counter

import pytest
import ray
from ray.util import placement_group_table

import lltm_ray
from lltm_ray.actors.remote import actor, near
from lltm_ray.actors.transfer import RayFiles
from lltm_ray.errors import PlacementError
from lltm_ray.llamacpp.slot_folder import CHUNK_BYTES, SlotFolder, new_name
from lltm_ray.records import EngineInfo, EngineState
from tests.ray.conftest import HI, until, until_free
from tests.ray.load import Load

SIZE = 2 * CHUNK_BYTES + 12_345


def ready(cluster):
    return [engine for engine in cluster.status().engines if engine.state is EngineState.READY]


def states():
    return Counter(info["state"] for info in placement_group_table().values())


def groups():
    return {group for group, info in placement_group_table().items() if info["state"] != "REMOVED"}


@pytest.fixture(scope="module")
def second_node(ray_cluster):
    node = ray_cluster.add_node(num_cpus=3)
    ray_cluster.wait_for_nodes()
    yield node
    if node in ray_cluster.list_all_nodes():
        ray_cluster.remove_node(node)


class Probe:
    def node_id(self):
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def ends(second_node, tmp_path):
    """An engine on each of two nodes."""
    ids = [ray.get_runtime_context().get_node_id(), second_node.node_id]
    made = []
    for name, node_id in zip(("e0", "e1"), ids, strict=True):
        (tmp_path / name).mkdir(mode=0o700)
        folder = str(tmp_path / name)
        made.append(EngineInfo(name=name, model="random", state=EngineState.READY, node_id=node_id, slot_folder=folder))
    return made


def test_an_actor_of_the_fleet_stays_on_its_makers_node(ray_cluster, second_node):
    here = ray.get_runtime_context().get_node_id()
    probes = [actor(Probe).options(**near()).remote() for _ in range(4)]
    assert ray.get([probe.node_id.remote() for probe in probes]) == [here] * len(probes)
    for probe in probes:
        ray.kill(probe)


async def test_a_file_goes_from_node_to_node_or_not_at_all(ends):
    source, target = ends
    files = RayFiles(source.node_id)
    here, there, name = SlotFolder(source.slot_folder), SlotFolder(target.slot_folder), new_name()
    data = os.urandom(SIZE)
    here.create(name)
    here.write(name, 0, data)
    await files.carry(source, target, name)
    assert there.read(name, 0, SIZE + 1) == data
    assert stat.S_IMODE(there.path_of(name).stat().st_mode) == 0o600
    await files.carry(source, target, name)  # there already, as in a folder that both nodes see
    await files.remove(target, name)
    await files.remove(target, name)
    assert there.size(name) is None

    with pytest.raises(OSError, match="is not in the folder of e0"):
        await files.carry(source, target, new_name())
    with pytest.raises(OSError, match="is no name of a saved slot"):
        await files.remove(target, "../e0/" + name)
    gone = target.with_(slot_folder=target.slot_folder + "/gone")
    with pytest.raises(OSError, match="No such file or directory"):
        await files.carry(source, gone, name)
    assert (here.read(name, 0, SIZE), os.listdir(target.slot_folder)) == (data, [])
    await files.remove(source, name)
    assert os.listdir(source.slot_folder) == []


@pytest.mark.timeout(400)
def test_a_lost_node_costs_only_what_no_longer_fits(ray_cluster, second_node):
    head_id = ray.get_runtime_context().get_node_id()
    until_free(7)
    shares = {"engines": 4, "gpu_share": 0.0, "cpu_share": 1.25}  # 4 CPUs here, 3 there
    with lltm_ray.Cluster.start(model="random", name="two-nodes", gateway={"port": 0}, **shares) as cluster:
        before = {engine.name: engine for engine in ready(cluster)}
        at_home = [engine for engine in before.values() if engine.node_id == head_id]
        away = [engine for engine in before.values() if engine.node_id != head_id]
        assert (len(at_home), len(away)) == (2, 2)
        assert {answer.engine for answer in cluster.batch([HI] * 40, max_tokens=16)} == set(before)
        with Load(cluster.endpoint) as load:
            load.wait_for(64)
            assert {outcome.engine for outcome in load.outcomes} == set(before)
            began = time.monotonic()
            ray_cluster.remove_node(second_node, allow_graceful=False)
            while len(ready(cluster)) != 3 or any(engine.node_id != head_id for engine in ready(cluster)):
                assert time.monotonic() - began < 150, cluster.status()
                time.sleep(0.1)
            print(f"three of four engines on the other node after {time.monotonic() - began:.1f} s")
            load.wait_for(64)
        for failure in load.failures():
            assert failure.engine in {engine.name for engine in away}, failure
            assert failure.got_bytes, failure
        after = {engine.name: engine for engine in cluster.status().engines}
        for engine in at_home:
            assert after[engine.name].server_pid == engine.server_pid, "an engine on the other node was touched"
        still = {engine.name for engine in ready(cluster)}
        until(lambda: {answer.engine for answer in cluster.batch([HI] * 40, max_tokens=16)} == still)

        (lost,) = (engine for engine in away if engine.name not in still)
        asks_quietly = "no heartbeat: its node is lost; waits for 0 GPU and 1.25 CPU"
        until(lambda: {e.name: e.detail for e in cluster.status().engines}[lost.name] == asks_quietly)
        assert "RESCHEDULING" not in states(), "Ray's head is kept busy by a share that does not fit"
        another = ray_cluster.add_node(num_cpus=3)
        until(lambda: len(ready(cluster)) == 4)
        (back,) = (engine for engine in ready(cluster) if engine.node_id == another.node_id)
        assert back.name == lost.name
        until(lambda: {answer.engine for answer in cluster.batch([HI] * 40, max_tokens=16)} == set(before))
    ray_cluster.remove_node(another)


def test_a_fleet_that_does_not_fit_is_refused_whole(ray_cluster):
    held = groups()
    with pytest.raises(PlacementError, match="the largest free share is"):
        lltm_ray.Cluster.start(model="random", engines=3, gpu_share=1.0, name="too-big")
    assert groups() == held
