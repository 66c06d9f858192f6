"""How much memory an engine may plan with."""

import pytest

from lltm_ray.actors import launch
from lltm_ray.actors.launch import EngineSpec, memory_for
from lltm_ray.config import EngineConfig, FleetConfig, LoraAdapter
from lltm_ray.records import GpuInfo

GIB = 2**30


def gpu(free=10 * GIB, total=10 * GIB):
    return GpuInfo(index=0, uuid="GPU-0", name="x", total_bytes=total, free_bytes=free)


def memory(*gpus, share=1.0, neighbours=1, limit=None, **engine):
    fleet = FleetConfig(memory_limit_bytes=limit)
    spec = EngineSpec(name="e", fleet=fleet, run_id="r", share=share, engines_on_node=neighbours, gateway_node_id=None)
    return memory_for(spec, EngineConfig(**engine), gpus)


def test_a_fraction_gets_its_part_and_two_gpus_both():
    whole = memory(gpu())
    assert 9 * GIB < whole <= 10 * GIB
    assert abs(memory(gpu(), share=0.5) - whole / 2) < 0.2 * GIB
    assert memory(gpu(), gpu(), share=2.0) == 2 * whole


def test_memory_that_others_hold_is_not_planned_with():
    assert memory(gpu(free=3 * GIB)) <= 3 * GIB


@pytest.mark.parametrize(
    ("settings", "gpus_worth"),
    [({"split_mode": "none"}, 1.0), ({"tensor_split": (3.0, 1.0)}, 4 / 3), ({"tensor_split": (1.0, 0.0)}, 1.0)],
)
def test_the_device_that_is_full_first_bounds_a_split(settings, gpus_worth):
    assert memory(gpu(), gpu(), share=2.0, **settings) == pytest.approx(gpus_worth * memory(gpu()), rel=1e-6)


def test_unequal_devices_hold_the_sum_of_both_in_layers_and_twice_the_smaller_in_tensors():
    large, small = gpu(free=8 * GIB), gpu(free=4 * GIB)
    alone = memory(large), memory(small)
    assert memory(large, small, share=2.0, split_mode="layer") == sum(alone)
    assert memory(large, small, share=2.0, split_mode="tensor") == 2 * alone[1]


def test_a_gpu_without_memory_of_its_own_sets_no_limit():
    assert memory(gpu(0, 0)) is None
    assert memory(gpu(0, 0), limit=GIB) == GIB


def test_engines_on_a_node_divide_its_memory(monkeypatch):
    monkeypatch.setattr(launch, "available_ram_bytes", lambda: 16 * GIB)
    assert memory(share=0.0, neighbours=4, cache_ram_mib=1024) == 3 * GIB
    assert memory(share=0.0, neighbours=4, cache_ram_mib=0, limit=GIB) == GIB


def test_what_is_loaded_beside_the_model_is_taken_off(tmp_path):
    (tmp_path / "adapter").write_bytes(bytes(1000))
    (tmp_path / "draft").write_bytes(bytes(500))
    side = {"lora": (LoraAdapter(path=str(tmp_path / "adapter")),), "model_draft": str(tmp_path / "draft")}
    assert memory(gpu()) - memory(gpu(), **side) == 1500
