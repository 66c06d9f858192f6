"""Tensors and other libraries' arrays: NumPy and DLPack without copies, lifetimes, leaks and threads."""

import gc
import sys
import threading
import weakref

import numpy as np
import psutil
import pytest

from lltm_ray.errors import DeviceError, DTypeError, NativeError
from tests.unit.kernels.tensor_cases import DTYPES, make, random_array, values

pytestmark = pytest.mark.timeout(600)  # the first test of a run waits for the compiler

NUMPY_DTYPES = tuple(dtype for dtype in DTYPES if dtype != "bfloat16")
ROUNDS = 10_000
GROWTH_BYTES = 16 << 20


class Older:
    """A producer from before DLPack 1.0."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_dlpack_shares_memory_in_both_directions(tensors, dtype, shape):
    tensor = make(tensors, random_array(np.random.default_rng(5), shape, dtype), dtype)
    array = np.from_dlpack(tensor)
    assert (array.shape, str(array.dtype)) == (shape, dtype)
    assert np.array_equal(array, tensor.to_numpy())
    again = tensors.from_dlpack(array)
    assert (again.shape, again.dtype) == (shape, dtype)
    tensor.fill(9)
    assert np.all(array == 9)
    assert np.array_equal(again.to_numpy(), array)


def test_dlpack_keeps_the_strides_of_views(tensors):
    tensor = tensors.from_numpy(np.arange(60, dtype=np.int32).reshape(3, 4, 5))
    view = tensor[::-1, 1:, ::2].T
    assert np.array_equal(np.from_dlpack(view), tensor.to_numpy()[::-1, 1:, ::2].T)
    array = np.arange(60, dtype=np.float32).reshape(6, 10)[::2, ::-3]
    assert np.array_equal(tensors.from_dlpack(array).to_numpy(), array)


def test_dlpack_of_older_producers_is_read(tensors):
    array = np.arange(6, dtype=np.float32)
    tensor = tensors.from_dlpack(Older(array))
    array[2] = 50
    assert tensor.to_numpy().tolist() == [0, 1, 50, 3, 4, 5]


def test_both_kinds_of_capsules_are_made_and_unused_ones_free_their_memory(tensors):
    tensor = tensors.zeros(3)
    assert "dltensor" in repr(tensor.__dlpack__())
    assert "dltensor_versioned" in repr(tensor.__dlpack__(max_version=(1, 2), copy=True))
    with pytest.raises(DeviceError, match="stream"):
        tensor.__dlpack__(stream=1)
    with pytest.raises(DeviceError, match="device type 7"):
        tensor.__dlpack__(dl_device=(7, 0))


def test_read_only_memory_stays_so(tensors):
    array = np.arange(4, dtype=np.float32)
    array.flags.writeable = False
    tensor = tensors.from_dlpack(array)
    assert tensor.is_readonly
    with pytest.raises(NativeError, match="read-only"):
        tensor.fill(1)
    with pytest.raises(BufferError, match="read-only"):
        tensor.__dlpack__()
    assert not np.from_dlpack(tensor).flags.writeable
    assert tensor[1:].is_readonly
    assert not tensor.to(dtype="float16").is_readonly


def test_what_cannot_be_shared_is_refused(tensors):
    with pytest.raises(DTypeError, match="64 bits"):
        tensors.from_dlpack(np.zeros(2))
    with pytest.raises(TypeError, match="__dlpack__"):
        tensors.from_dlpack([1, 2])
    assert not hasattr(tensors.zeros(2), "__cuda_array_interface__")
    with pytest.raises(AttributeError):
        tensors.from_cuda_array(np.zeros(2))


def test_memory_between_element_boundaries_is_copied_and_not_shared(tensors):
    array = np.frombuffer(bytearray(4 * 9 + 1), np.float32, 9, 1)
    array[:] = np.arange(9)
    assert tensors.from_numpy(array, dtype="float16").to_numpy().tolist() == list(range(9))
    with pytest.raises(NativeError, match="share a copy"):
        tensors.from_dlpack(array)


def test_numpy_arrays_of_any_layout_are_copied(tensors):
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    for layout in (array.T, array[::-1, ::2], array.astype(">i4"), np.asfortranarray(array), array[:0]):
        tensor = tensors.from_numpy(layout)
        assert np.array_equal(tensor.to_numpy(), layout)
        assert tensor.is_contiguous
    assert np.asarray(tensors.from_numpy(array), np.float64).sum() == array.sum()
    with pytest.raises(ValueError, match="from_dlpack"):
        np.asarray(tensors.from_numpy(array), copy=False)


def test_a_view_keeps_the_memory_and_the_owner_alive(tensors):
    view = tensors.full((1000, 1000), 3)[5:7, ::500]
    gc.collect()
    other = tensors.full((1000, 1000), 4)
    assert view.to_numpy().tolist() == [[3, 3], [3, 3]]
    array = np.from_dlpack(view)
    del view
    gc.collect()
    assert array.tolist() == [[3, 3], [3, 3]]
    assert other.size == 10**6


def test_memory_of_others_is_let_go_with_the_last_view(tensors):
    class Array(np.ndarray):
        pass

    array = np.zeros(10, np.float32).view(Array)
    gone = weakref.ref(array)
    view = tensors.from_dlpack(array)[2:5]
    del array
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_ten_thousand_tensors_leave_no_memory_behind(tensors):
    array = np.ones((64, 256), np.float32)
    references = sys.getrefcount(array)

    def once():
        tensor = tensors.from_dlpack(array)
        made = tensors.zeros((256, 512))
        capsule = made.T.__dlpack__()
        with pytest.raises(NativeError):
            made.view(7)
        return tensor[0], np.from_dlpack(made), capsule

    for _ in range(200):
        once()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(ROUNDS):
        once()
    gc.collect()
    assert psutil.Process().memory_info().rss - before < GROWTH_BYTES
    assert sys.getrefcount(array) == references


def test_eight_threads_at_once_do_not_disturb_each_other(tensors):
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            a, b = random_array(rng, (30, 40), "int8"), random_array(rng, (40, 20), "int8")
            left = make(tensors, a, "int8")
            found = values(left @ make(tensors, b, "int8"))
            if not np.array_equal(found, a @ b) or not np.array_equal(np.from_dlpack(left), a):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
