"""The native module, built with CUDA, sees what NVML sees."""

import pytest

from lltm_ray.kernels import native

pytestmark = pytest.mark.gpu


def test_cuda_and_nvml_agree_on_the_devices(gpus):
    assert native.cuda_version() >= 12000
    seen = native.read_devices()
    assert [(gpu.name, gpu.compute_capability) for gpu in seen] == [(gpu.name, gpu.compute_capability) for gpu in gpus]
    for device, gpu in zip(seen, gpus, strict=True):
        assert 0.9 * gpu.total_bytes < device.total_bytes <= gpu.total_bytes
        assert 0 < device.free_bytes <= device.total_bytes
