"""On a machine with NVIDIA GPUs: `pytest -m gpu tests/gpu`, with a CUDA llama-server on PATH or in LLAMA_SERVER_PATH.

LLTM_RAY_GPU_MODEL names a GGUF to use instead of `random`.
"""

from __future__ import annotations

import os
import warnings

import pytest


@pytest.fixture(scope="session")
def gpus():
    """The machine's devices, under one Ray for all tests; those of kernels run without either."""
    import ray

    from lltm_ray.driver import join_ray
    from lltm_ray.gpu.nvml import read_inventory

    inventory = read_inventory()
    assert inventory.gpus, inventory.reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, while it starts
        join_ray()
        yield inventory.gpus
        ray.shutdown()


@pytest.fixture(scope="session")
def model():
    return os.environ.get("LLTM_RAY_GPU_MODEL", "random")
