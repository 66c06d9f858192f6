"""The native module, built with CUDA, sees the devices that NVML sees, and works on the one it is told.

Needs neither Ray nor the other fixtures here: `pytest --noconftest -m gpu tests/gpu/test_gpu_native.py` runs it alone.
"""

import threading

import pytest

from lltm_ray.errors import DeviceError
from lltm_ray.gpu.nvml import read_inventory
from tests import native_build

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def native():
    native_build.load(cuda=True)
    from lltm_ray.kernels import native

    return native


def test_cuda_and_nvml_agree_on_the_devices(native):
    gpus = read_inventory().gpus
    assert gpus
    assert native.cuda_version() >= 12000
    seen = native.read_devices()
    assert [(gpu.name, gpu.compute_capability) for gpu in seen] == [(gpu.name, gpu.compute_capability) for gpu in gpus]
    for device, gpu in zip(seen, gpus, strict=True):
        assert 0.9 * gpu.total_bytes < device.total_bytes <= gpu.total_bytes
        assert 0 < device.free_bytes <= device.total_bytes
        assert (device.warp_size, device.max_threads_per_block) == (32, 1024)
        assert device.multiprocessors > 0
        assert device.l2_bytes > 2**20


def test_the_current_device_is_the_threads_own_and_comes_back(native):
    last = len(native.read_devices()) - 1
    native.synchronize(last)
    with native.use_device(last):
        assert native.current_device() == last
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(native.current_device()))
        thread.start()
        thread.join()
        assert elsewhere == [0]
    assert native.current_device() == 0
    device = native.require_native().devices()[last]
    with device, device:
        assert native.current_device() == last
    assert native.current_device() == 0


def test_devices_that_are_not_there_are_refused(native):
    count = len(native.read_devices())
    calls = [native.synchronize, native.read_pool, native.trim_pool, lambda index: native.use_device(index).__enter__()]
    for call in calls:
        with pytest.raises(DeviceError, match=f"CUDA shows {count} device"):
            call(count)
