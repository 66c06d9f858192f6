"""Tensors and products of the native module on a GPU, against float64, beside PyTorch and CuPy.

Needs neither Ray nor the other fixtures here: `pytest --noconftest -m gpu tests/gpu/test_gpu_tensors.py` runs it alone,
after `python -m tests.native_build --cuda`. Under compute-sanitizer, add
`-k "not huge and not leak and not memory_runs_out and not plans and not process"`.
"""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lltm_ray.errors import DeviceError, DeviceMemoryError, DTypeError, ShapeError
from tests import native_build
from tests.unit.kernels.tensor_cases import (
    DTYPES,
    FLOATS,
    LAYOUTS,
    check_product,
    laid_out,
    make,
    random_array,
    round_to,
    values,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

CUDA = "cuda:0"
FACTORS = (*FLOATS, "int8")
SIZES = [(1, 1, 1), (3, 5, 7), (17, 31, 129), (64, 256, 128), (257, 1000, 65), (1, 4096, 33), (300, 2, 1)]
ROUNDS = 10_000
SIDE = 2**15 + 1
"""A square of more than 2^30 elements; two of them are more than 2^31."""


@pytest.fixture(scope="module")
def native():
    return native_build.load(cuda=True)


@pytest.fixture(scope="module")
def tensors(native):
    from lltm_ray.kernels import tensors

    return tensors


@pytest.fixture(scope="module")
def torch():
    import torch

    assert torch.cuda.is_available()
    return torch


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


@pytest.fixture
def rng():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    return np.random.default_rng(seed)


def on_gpu(tensors, array, dtype):
    return make(tensors, array, dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
def test_makers_copies_and_views_are_those_of_numpy(tensors, rng, dtype):
    array = random_array(rng, (5, 33, 70), dtype)
    tensor = on_gpu(tensors, array, dtype)
    assert (tensor.device, tensor.dtype, tensor.shape) == (CUDA, dtype, array.shape)
    views = {
        "whole": lambda each: each,
        "steps": lambda each: each[::2, ::-3, 1::4],
        "one": lambda each: each[-1, :, 5],
        "turned": lambda each: each.T,
        "even": lambda each: each[:, 1:31, 4:68],
        "none": lambda each: each[3:3],
    }
    for name, view in views.items():
        assert np.array_equal(values(view(tensor)), view(array)), name
        assert np.array_equal(values(view(tensor).contiguous()), view(array)), name
        there = make(tensors, array, dtype)
        view(there).copy_from(view(tensor))
        assert np.array_equal(values(there), array), name
    large = random_array(rng, (3, 65, 100), dtype)
    swapped = on_gpu(tensors, large, dtype).transpose(1, 2)
    assert np.array_equal(values(swapped.contiguous()), large.swapaxes(1, 2))
    assert np.array_equal(values(swapped[1].contiguous()), large[1].T)
    assert np.array_equal(values(swapped[1, 3:].contiguous()), large[1].T[3:])
    tensor[1::2, 3].fill(7)
    array[1::2, 3] = 7
    tensor[0].copy_from(make(tensors, array[1], dtype))
    array[0] = array[1]
    tensor[2, ::3, ::2].copy_from(make(tensors, array[3], dtype)[::3, ::2])
    array[2, ::3, ::2] = array[3, ::3, ::2]
    assert np.array_equal(values(tensor), array)
    assert np.array_equal(values(tensors.full((3, 5), 9, dtype, CUDA)), np.full((3, 5), 9))
    assert np.array_equal(values(tensors.zeros(77, dtype, "cuda")), np.zeros(77))
    assert tensors.ones((), dtype, CUDA).item() == 1


@pytest.mark.parametrize(("source", "target"), list(itertools.product(DTYPES, DTYPES)))
def test_casts_are_bit_by_bit_those_of_the_cpu(tensors, rng, source, target):
    bits = tensors.from_numpy(rng.integers(0, 256, (300, 4 * 41), dtype=np.uint8))
    size = tensors.zeros(1, source).itemsize
    raw = np.from_dlpack(bits).view(f"u{size}")
    named = {4: np.float32 if source == "float32" else np.int32, 2: np.float16, 1: np.int8}[size]
    here = tensors.from_numpy(raw, dtype="bfloat16") if source == "bfloat16" else tensors.from_numpy(raw.view(named))
    if source == "uint8":
        here = tensors.from_numpy(raw)
    there, flat = here.to(CUDA), here.size
    views = {
        "turned": lambda each: each.T,
        "whole": lambda each: each,
        "odd end": lambda each: each.view(-1)[: flat - 3],
        "misaligned": lambda each: each.view(-1)[1:],
        "one": lambda each: each.view(-1)[:1],
    }
    for name, view in views.items():
        found, wanted = view(there).to(dtype=target).to("cpu"), view(here).to(dtype=target)
        assert (found.dtype, found.shape) == (target, wanted.shape)
        found, wanted = np.asarray(found), np.asarray(wanted)
        kind = f"u{found.itemsize}"
        different = found.view(kind) != np.ascontiguousarray(wanted).view(kind)
        if target in FLOATS:  # the bits of NaN may differ
            different &= ~(np.isnan(found.astype(np.float32)) & np.isnan(wanted.astype(np.float32)))
        assert not different.any(), name


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_float64_in_every_layout(tensors, rng, dtype, size):
    m, k, n = size
    a, b = random_array(rng, (m, k), dtype), random_array(rng, (k, n), dtype)
    for left, right in itertools.product(LAYOUTS, LAYOUTS):
        found = laid_out(tensors, a, dtype, left, CUDA) @ laid_out(tensors, b, dtype, right, CUDA)
        assert found.dtype == ("int32" if dtype == "int8" else dtype)
        check_product(found, a, b, dtype)
    for layout in LAYOUTS:
        out = laid_out(tensors, np.zeros((m, n)), "int32" if dtype == "int8" else dtype, layout, CUDA)
        tensors.matmul(
            on_gpu(tensors, a.T, dtype), on_gpu(tensors, b.T, dtype), transpose_a=True, transpose_b=True, out=out
        )
        check_product(out, a, b, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_epilogues_are_those_of_float64(tensors, rng, dtype, activation):
    for (m, k, n), with_bias, batch in itertools.product(SIZES[:5], (True, False), (0, 3)):
        front = (batch,) if batch else ()
        a, b = random_array(rng, (*front, m, k), dtype), random_array(rng, (*front, k, n), dtype)
        bias = random_array(rng, (n,), dtype) if with_bias else None
        given = None if bias is None else on_gpu(tensors, np.repeat(bias, 2), dtype)[::2]
        multiply = tensors.batched_matmul if batch else tensors.matmul
        found = multiply(on_gpu(tensors, a, dtype), on_gpu(tensors, b, dtype), bias=given, activation=activation)
        check_product(found, a, b, dtype, bias=bias, activation=activation)


@pytest.mark.parametrize("dtype", FACTORS)
def test_batches_and_shared_factors(tensors, rng, dtype):
    for one, other in ((6, 6), (1, 6), (6, 1), (1, 1)):
        a, b = random_array(rng, (one, 20, 33), dtype), random_array(rng, (other, 33, 18), dtype)
        for left, right in (("rows", "columns"), ("steps", "rows"), ("offset", "offset"), ("columns", "steps")):
            factors = laid_out(tensors, a, dtype, left, CUDA), laid_out(tensors, b, dtype, right, CUDA)
            check_product(tensors.batched_matmul(*factors), a, b, dtype)
            kind = "int32" if dtype == "int8" else dtype
            out = laid_out(tensors, np.zeros((max(one, other), 20, 18)), kind, right, CUDA)
            check_product(tensors.batched_matmul(*factors, out=out), a, b, dtype)


def test_tf32_is_used_only_when_asked_for(tensors, rng):
    a, b = random_array(rng, (500, 700), "float32"), random_array(rng, (700, 300), "float32")
    left, right = on_gpu(tensors, a, "float32"), on_gpu(tensors, b, "float32")
    exact, fast = tensors.matmul(left, right), tensors.matmul(left, right, tf32=True)
    check_product(exact, a, b, "float32")
    check_product(fast, a, b, "float32", tf32=True)
    assert np.abs(values(fast) - a @ b).max() > 10 * np.abs(values(exact) - a @ b).max()


@pytest.mark.parametrize("dtype", FACTORS)
def test_tuned_products_are_right_too(tensors, rng, dtype):
    a, b = random_array(rng, (256, 320), dtype), random_array(rng, (320, 192), dtype)
    for _ in range(2):
        check_product(tensors.matmul(on_gpu(tensors, a, dtype), on_gpu(tensors, b, dtype), tune=True), a, b, dtype)


def test_half_floats_are_summed_in_float32(tensors):
    for dtype in ("float16", "bfloat16"):
        ones = tensors.ones((1, 2**15), dtype, CUDA)
        assert (ones @ ones.T).item() == 2**15


def test_empty_products(tensors):
    for dtype in FACTORS:
        assert np.array_equal(
            values(tensors.zeros((2, 0), dtype, CUDA) @ tensors.zeros((0, 3), dtype, CUDA)), np.zeros((2, 3))
        )
        assert (tensors.zeros((0, 4), dtype, CUDA) @ tensors.zeros((4, 3), dtype, CUDA)).shape == (0, 3)
    bias = on_gpu(tensors, np.array([-1.0, 2.0]), "float16")
    empty = tensors.zeros((3, 0), "float16", CUDA), tensors.zeros((0, 2), "float16", CUDA)
    assert values(tensors.matmul(*empty, bias=bias, activation="relu")).tolist() == [[0, 2]] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_tensors_share_memory_in_both_directions(tensors, torch, rng, dtype):
    array = random_array(rng, (6, 50), dtype)
    theirs = torch.from_dlpack(on_gpu(tensors, array, dtype))
    ours = tensors.from_dlpack(theirs)
    assert (str(theirs.dtype), ours.data_ptr) == (f"torch.{dtype}", theirs.data_ptr())
    theirs[2] = 5
    array[2] = 5
    ours[3].fill(6)
    array[3] = 6
    assert np.array_equal(values(ours), array)
    assert np.array_equal(theirs.double().cpu().numpy(), array)
    view = tensors.from_dlpack(theirs[1::2, 3:].T)
    assert np.array_equal(values(view), array[1::2, 3:].T)
    if dtype != "bfloat16":
        assert torch.as_tensor(ours, device="cuda").data_ptr() == ours.data_ptr
        assert np.array_equal(values(tensors.from_cuda_array(theirs[:, ::5])), array[:, ::5])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "bfloat16"])
def test_cupy_and_tensors_share_memory_in_both_directions(tensors, cupy, rng, dtype):
    array = random_array(rng, (6, 50), dtype)
    tensor = on_gpu(tensors, array, dtype)[:, ::2]
    array = array[:, ::2]
    for theirs in (cupy.asarray(tensor), cupy.from_dlpack(tensor)):
        assert theirs.data.ptr == tensor.data_ptr
        assert np.array_equal(cupy.asnumpy(theirs).astype(np.float64), array)
        for ours in (tensors.from_cuda_array(theirs), tensors.from_dlpack(theirs)):
            assert ours.data_ptr == tensor.data_ptr
            assert np.array_equal(values(ours), array)
        theirs[1] = 3
        array[1] = 3
    assert np.array_equal(values(tensor), array)
    assert tensors.from_cuda_array(cupy.zeros((0, 3), dtype)).shape == (0, 3)


def test_work_on_the_streams_of_torch_is_in_order(tensors, torch):
    side = torch.cuda.Stream()
    for round_ in range(20):
        with torch.cuda.stream(side):
            factor = torch.randn(1500, 1500, device="cuda", dtype=torch.float16)
            theirs = (factor @ factor) / 1500 + round_
            number = side.cuda_stream
            product = tensors.matmul(
                tensors.from_dlpack(theirs, stream=number), tensors.from_dlpack(factor, stream=number), stream=number
            )
        doubled = tensors.matmul(product, tensors.full((1500, 1500), 0.001, "float16", CUDA))  # on the default stream
        with torch.cuda.stream(side):
            found = torch.from_dlpack(doubled)
            wanted = (theirs @ factor) @ torch.full_like(factor, 0.001)
            assert torch.allclose(found, wanted, rtol=0.02, atol=0.2), round_


def test_streams_may_end_before_what_is_kept_for_them(tensors, cupy):
    for _ in range(20):  # more than have a workspace of their own
        stream = cupy.cuda.Stream(non_blocking=True)
        ones = tensors.ones((300, 300), device=CUDA, stream=stream.ptr)
        product = tensors.matmul(ones, ones, stream=stream.ptr)
        assert np.all(product.to_numpy(stream=stream.ptr) == 300)
        del ones, product, stream


def test_a_copy_to_the_cpu_through_dlpack_is_whole(tensors):
    tensor = tensors.full((1000, 1000), 3, "float32", CUDA)
    array = np.from_dlpack(tensor, device="cpu", copy=True)
    assert array.sum() == 3e6


def test_wrong_devices_are_refused(tensors, native):
    here, there = tensors.zeros((2, 2)), tensors.zeros((2, 2), device=CUDA)
    cases = [
        (lambda: here @ there, DeviceError, "same device"),
        (lambda: tensors.matmul(there, there, bias=tensors.zeros(2)), DeviceError, "bias is on cpu"),
        (lambda: tensors.matmul(there, there, out=here), DeviceError, "out is on cpu"),
        (lambda: tensors.zeros(2, device=f"cuda:{native.device_count()}"), DeviceError, "CUDA shows"),
        (lambda: there.__dlpack__(stream=-2), DeviceError, "stream=-2"),
        (lambda: tensors.zeros((2, 3), device=CUDA) @ there, ShapeError, "Incompatible"),
        (lambda: tensors.zeros((2, 2), "uint8", CUDA) @ tensors.zeros((2, 2), "uint8", CUDA), DTypeError, "uint8"),
        (lambda: tensors.matmul(there, there, out=there), ShapeError, "shares memory"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_when_memory_runs_out_a_tensor_is_refused_and_the_next_one_is_not(tensors):
    with pytest.raises(DeviceMemoryError, match="no room for"):
        tensors.empty(2**42, "uint8", CUDA)
    assert tensors.ones(3, device=CUDA).to_numpy().tolist() == [1, 1, 1]


def test_eight_threads_at_once_do_not_disturb_each_other(tensors, torch):
    failures = []

    def work(seed):
        own = np.random.default_rng(seed)
        stream = torch.cuda.Stream().cuda_stream if seed % 2 else 0
        for _ in range(25):
            m, k, n = own.integers(1, 200, 3)
            a, b = random_array(own, (m, k), "int8"), random_array(own, (k, n), "int8")
            left, right = (make(tensors, each, "int8").to(CUDA, stream=stream) for each in (a, b))
            found = tensors.matmul(left, right, stream=stream)
            if not np.array_equal(found.to_numpy(stream=stream), a @ b):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_ten_thousand_tensors_leak_nothing(tensors, native, torch):
    factor = tensors.ones((64, 64), "float16", CUDA)
    theirs = torch.ones(64, 64, device="cuda", dtype=torch.float16)

    def once(number):
        found = tensors.matmul(factor, tensors.from_dlpack(theirs))
        shared = torch.from_dlpack(found)
        view = tensors.zeros((number % 97 + 1, 1000), device=CUDA)[::2].contiguous()
        return shared, view

    for number in range(300):
        once(number)
    gc.collect()
    native.synchronize(0)
    before, free_before = native.pool_use(0)["used_bytes"], torch.cuda.mem_get_info()[0]
    for number in range(ROUNDS):
        once(number)
    gc.collect()
    native.synchronize(0)
    assert native.pool_use(0)["used_bytes"] == before
    assert free_before - torch.cuda.mem_get_info()[0] < 64 << 20
    native.trim_pool(0)
    assert native.pool_use(0)["reserved_bytes"] < before + (256 << 20)


def test_plans_are_bounded(tensors, native):
    ones = tensors.ones((1, 1), "float16", CUDA)
    for rows in range(1, 1100):
        tensors.matmul(tensors.empty((rows, 1), "float16", CUDA), ones)
    assert 0 < native.plan_count(0) <= 1024


def test_huge_tensors_are_counted_with_64_bits(tensors, native):
    huge = tensors.zeros((2, SIDE, SIDE), "int8", CUDA)
    assert huge.size > 2**31
    huge[1, -1, -5:].fill(9)
    huge[:, -2, ::4].fill(2)
    turned = huge.permute(2, 0, 1).contiguous()
    assert turned.view(-1)[-1].item() == 9
    assert values(turned[-1, 1, -2:]).tolist() == [2, 9]
    assert values(huge.to(dtype="uint8")[1, -1, -6:]).tolist() == [0, 9, 9, 9, 9, 9]
    del turned
    weights = tensors.zeros((SIDE, 1), "float16", CUDA)
    weights[-5:].fill(1)
    last = huge[1, -2:].to(dtype="float16")
    assert values(last @ weights).ravel().tolist() == [2 * len(range(SIDE)[::4][-2:]), 45]
    del huge
    native.trim_pool(0)


def test_a_process_ends_well_with_tensors_in_its_hands():
    code = (
        "from tests import native_build; native_build.load(cuda=True)\n"
        "from lltm_ray.kernels import tensors as t\n"
        "import atexit, torch\n"
        "a = t.ones((100, 100), 'float16', 'cuda'); b = a @ a; shared = torch.from_dlpack(b)\n"
        "own = t.from_dlpack(torch.ones(3, device='cuda'))\n"
        "atexit.register(lambda: t.matmul(a, a).to_numpy())\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_values_of_bfloat16_go_in_and_out(tensors, rng):
    array = rng.standard_normal((30, 40)).astype(np.float32)
    tensor = tensors.from_numpy(array, CUDA, "bfloat16")
    assert np.array_equal(values(tensor), round_to(array, "bfloat16"))
    assert np.array_equal(np.asarray(tensor).view(np.uint16), np.asarray(tensor.to("cpu")).view(np.uint16))
