"""Two raylets: one gateway and one driver reach the engines of both; one raylet dies."""

import time

import pytest
import ray
from ray.util import placement_group_table

import lltm_ray
from lltm_ray.errors import PlacementError
from lltm_ray.records import EngineState
from tests.ray.conftest import HI
from tests.ray.load import Load


def ready(cluster):
    return [engine for engine in cluster.status().engines if engine.state is EngineState.READY]


def groups():
    return {group for group, info in placement_group_table().items() if info["state"] != "REMOVED"}


@pytest.fixture
def second_node(ray_cluster):
    node = ray_cluster.add_node(num_cpus=3)
    ray_cluster.wait_for_nodes()
    yield node
    if node in ray_cluster.list_all_nodes():
        ray_cluster.remove_node(node)


def test_a_lost_node_costs_only_what_no_longer_fits(ray_cluster, second_node):
    head_id = ray.get_runtime_context().get_node_id()
    settings = {"model": "tiny", "engines": 5, "gpu_share": 0.0, "name": "two-nodes", "gateway": {"port": 0}}
    with lltm_ray.Cluster.start(**settings) as cluster:
        before = {engine.name: engine for engine in ready(cluster)}
        at_home = [engine for engine in before.values() if engine.node_id == head_id]
        away = [engine for engine in before.values() if engine.node_id != head_id]
        assert (len(at_home), len(away)) == (3, 2)
        assert {answer.engine for answer in cluster.batch([HI] * 40, max_tokens=16)} == set(before)
        with Load(cluster.endpoint) as load:
            load.wait_for(64)
            assert {outcome.engine for outcome in load.outcomes} == set(before)
            began = time.monotonic()
            ray_cluster.remove_node(second_node, allow_graceful=False)
            while len(ready(cluster)) != 4 or any(engine.node_id != head_id for engine in ready(cluster)):
                assert time.monotonic() - began < 60, cluster.status()
                time.sleep(0.1)
            print(f"four of five engines on the other node after {time.monotonic() - began:.1f} s")
            load.wait_for(64)
        for failure in load.failures():
            assert failure.engine in {engine.name for engine in away}, failure
            assert failure.got_bytes, failure
        after = {engine.name: engine for engine in cluster.status().engines}
        for engine in at_home:
            assert after[engine.name].server_pid == engine.server_pid, "an engine on the other node was touched"
        assert {answer.engine for answer in cluster.batch([HI] * 40, max_tokens=16)} == {e.name for e in ready(cluster)}


def test_a_fleet_that_does_not_fit_is_refused_whole(ray_cluster):
    held = groups()
    with pytest.raises(PlacementError, match="the largest free share is"):
        lltm_ray.Cluster.start(model="tiny", engines=3, gpu_share=1.0, name="too-big")
    assert groups() == held
