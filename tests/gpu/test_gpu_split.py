"""Engines and a user's functions on GPUs of their own, as NVML sees their processes; one GPU is enough to run it."""

import os

import pytest

from lltm_ray.gpu.nvml import processes_memory
from lltm_ray.sdk.split import split_gpu
from tests.ray.conftest import HI

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_functions_see_no_gpu_of_the_engines(gpus, model):
    def visible_gpus():  # in here, so that it is pickled whole: workers do not find this module
        import ctypes

        cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value

    environment = dict(os.environ)
    with split_gpu(model, llm=0, analytics=1, name="split", gateway={"port": 0}) as session:
        print(session)
        (engine,) = session.cluster.status().engines
        assert engine.server_pid in processes_memory(gpus[0].uuid)
        assert session.seats["llm"][0].uuids == (gpus[0].uuid,)
        if len(gpus) > 1:
            assert session.seats["run"][0].uuids == (gpus[1].uuid,)
            assert session.run(visible_gpus) == 1
            assert engine.server_pid not in processes_memory(gpus[1].uuid)
        else:
            assert "functions on the CPU" in session.how
            assert session.run(visible_gpus) in (0, 100), "100 is CUDA's own word for none"
        assert session.cluster.chat(HI, max_tokens=8).usage.output_tokens == 8
    assert dict(os.environ) == environment
