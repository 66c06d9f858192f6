"""Shares on real GPUs: who is on which device, in how much of its memory."""

from contextlib import contextmanager

import pytest

import lltm_ray
from lltm_ray.errors import ModelDoesNotFitError
from lltm_ray.gpu.nvml import processes_memory
from tests.ray.conftest import HI

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@contextmanager
def fleet(model, **settings):
    defaults = {"model": model, "name": "gpu", "gateway": {"port": 0}}
    with lltm_ray.Cluster.start(**defaults | settings) as cluster:
        yield cluster


def placed(cluster, gpus):
    """`{engine: {gpu index: bytes}}` as NVML shows it."""
    by_gpu = {gpu.index: processes_memory(gpu.uuid) for gpu in gpus}
    return {
        engine.name: {index: used[engine.server_pid] for index, used in by_gpu.items() if engine.server_pid in used}
        for engine in cluster.status().engines
    }


def test_two_halves_share_one_gpu_and_leave_the_other_idle(gpus, model):
    with fleet(model, engines=2, gpu_share=0.5) as cluster:
        seen = placed(cluster, gpus)
        print(seen)
        homes = [set(devices) for devices in seen.values()]
        assert homes[0] == homes[1]
        assert len(homes[0]) == 1
        half = gpus[0].total_bytes / 2
        assert all(used <= half for devices in seen.values() for used in devices.values())
        assert {answer.engine for answer in cluster.batch([HI] * 16, max_tokens=16)} == set(seen)


def test_whole_shares_take_a_gpu_each(gpus, model):
    if len(gpus) < 2:
        pytest.fail("needs two GPUs")
    with fleet(model, engines=2, gpu_share=1.0) as cluster:
        seen = placed(cluster, gpus)
        print(seen)
        assert sorted(index for devices in seen.values() for index in devices) == [0, 1]
        assert {answer.engine for answer in cluster.batch([HI] * 16, max_tokens=16)} == set(seen)


def test_one_engine_spans_two_gpus(gpus, model):
    if len(gpus) < 2:
        pytest.fail("needs two GPUs")
    with fleet(model, engines=1, gpu_share=2.0) as cluster:
        print(placed(cluster, gpus))
        assert len(placed(cluster, gpus)["engine-0"]) == 2
        assert len(cluster.status().engines[0].gpu_ids) == 2
        assert cluster.chat(HI, max_tokens=16).usage.output_tokens == 16


def test_a_small_share_gets_less_context_and_says_so(gpus, model):
    with fleet(model, engines=1, gpu_share=0.02, engine={"n_parallel": 64}) as cluster:
        engine = cluster.status().engines[0]
        print(engine.n_ctx, engine.n_gpu_layers, engine.detail, placed(cluster, gpus))
        assert engine.detail
        assert sum(placed(cluster, gpus)["engine-0"].values()) <= 0.02 * gpus[0].total_bytes


def test_what_cannot_fit_is_refused(gpus, model):
    with pytest.raises(ModelDoesNotFitError), fleet(model, engines=1, gpu_share=1.0, engine={"n_ctx": 2**30}):
        pass
