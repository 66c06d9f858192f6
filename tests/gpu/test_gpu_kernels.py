"""NF4, GGUF blocks, fused kernels, graphs and precision on a real GPU: `pytest -m gpu tests/gpu/test_gpu_kernels.py`.

Quantized bytes and values must be those of the CPU; fused kernels stay within their stated tolerance of float64.
Inputs are fresh each run; the seed is printed.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.kernels import fused, gguf_blocks, nf4, precision
from lltm_ray.kernels.cuda_graphs import GraphPool
from lltm_ray.kernels.tuning import Tuner
from tests.unit.kernels.fused_cases import OPTIONS, arguments, error
from tests.unit.kernels.gguf_samples import random_blocks

pytestmark = pytest.mark.gpu
WAITS = """
import torch
from lltm_ray.kernels.cuda_graphs import GraphPool
graphs = GraphPool(lambda x: x * x.sum().item())
try:
    graphs.capture(torch.ones(4, device="cuda"))
except RuntimeError:
    print("RuntimeError")
print(len(graphs), (torch.ones(2, device="cuda") + 1).tolist())
"""
FIELDS = ("packed", "absmax", "nested_absmax", "offset")


@pytest.fixture(scope="module")
def torch():
    import torch

    assert torch.cuda.is_available()
    return torch


@pytest.fixture(autouse=True)
def seed(torch):
    chosen = random.SystemRandom().randrange(2**31)
    print(f"seed {chosen}")
    torch.manual_seed(chosen)
    return chosen


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def assert_same(one, other):
    for field in FIELDS:
        mine, theirs = getattr(one, field), getattr(other, field)
        assert (mine is None) == (theirs is None)
        assert mine is None or np.array_equal(mine.cpu().numpy(), theirs.cpu().numpy()), field


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 64 * 256, 64 * 300 + 7, 1 << 20])
def test_nf4_bytes_and_values_are_those_of_the_cpu(torch, size, dtype, double):
    values = (torch.randn(size) * torch.randn(size).exp()).to(getattr(torch, dtype))
    values[64:128] = 0
    here, there = nf4.quantize(values, double=double), nf4.quantize(values.cuda(), double=double)
    assert_same(here, there)
    for wanted in nf4.DTYPES:
        back = nf4.dequantize(there, dtype=wanted)
        assert (name_of(back.dtype), back.shape) == (wanted, values.shape)
        assert torch.equal(back.cpu(), nf4.dequantize(here, dtype=wanted))


def test_nf4_levels_at_every_limit_are_those_of_the_cpu(torch):
    middles = nf4.midpoints(nf4.LEVELS)
    near = np.concatenate([middles, *(np.nextafter(middles, way, dtype=np.float32) for way in (-2, 2)), nf4.LEVELS])
    rows = np.ones((near.size, 64), np.float32)
    rows[:, 1] = near
    assert_same(
        *(nf4.quantize(where, double=False) for where in (torch.from_numpy(rows), torch.from_numpy(rows).cuda()))
    )


def test_nf4_reads_strided_and_misaligned_tensors(torch):
    for dtype in nf4.DTYPES:
        base = torch.randn(130, 131, device="cuda").to(getattr(torch, dtype))
        for view in (base.T, base[:, 1:], base.reshape(-1)[1:], base.reshape(-1)[3:-5], base[::2]):
            assert_same(nf4.quantize(view.cpu().contiguous()), nf4.quantize(view))


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 200])
@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_nf4_products_are_those_of_the_dequantized_weight(torch, rows, dtype):
    allowed = {"float32": 2e-4, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    with precision.precision(precision.FLOAT32):
        for columns, inner in ((1, 64), (100, 192), (512, 1024), (33, 100)):
            for double in (False, True):
                x = torch.randn(rows, inner, device="cuda").to(getattr(torch, dtype))
                weight = nf4.quantize(torch.randn(columns, inner, device="cuda"), double=double)
                wanted = x.double() @ nf4.dequantize(weight, dtype=dtype).double().T
                found = nf4.matmul(x, weight)
                assert (found.dtype, found.shape) == (x.dtype, wanted.shape)
                assert ((found.double() - wanted).abs() <= allowed * wanted.abs().clamp(min=inner**0.5)).all()


def test_a_product_has_a_gradient_and_takes_an_empty_weight(torch):
    weight = nf4.quantize(torch.randn(40, 128, device="cuda"))
    x = torch.randn(3, 128, device="cuda", requires_grad=True)
    nf4.matmul(x, weight).sum().backward()
    assert torch.allclose(x.grad[0], nf4.dequantize(weight).sum(0), atol=1e-3)
    empty = nf4.quantize(torch.empty(5, 0, device="cuda"))
    assert nf4.matmul(torch.empty(2, 0, device="cuda"), empty).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("count", [1, 5, 1000, 20000])
@pytest.mark.parametrize("kind", gguf_blocks.KINDS)
def test_gguf_blocks_are_those_of_the_cpu_bit_for_bit(torch, seed, kind, count):
    raw, size = random_blocks(kind, count, seed=seed), count * gguf_blocks.KINDS[kind].values
    wanted = gguf_blocks.dequantize(raw, kind, n_elements=size)
    held = torch.from_numpy(np.concatenate([np.zeros(1, np.uint8), raw])).cuda()
    for blocks in (held[1:], held[1:].clone()):
        found = gguf_blocks.dequantize(blocks, kind, n_elements=size)
        assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float32, (size,))
        assert found.cpu().numpy().tobytes() == wanted.tobytes()


def test_f32_blocks_are_copied_and_nothing_gives_nothing(torch):
    raw = torch.zeros(40, dtype=torch.uint8, device="cuda")
    gguf_blocks.dequantize(raw, "F32", n_elements=10).fill_(1)
    assert not raw.any()
    for kind in gguf_blocks.KINDS:
        assert gguf_blocks.dequantize(raw[:0], kind, n_elements=0).shape == (0,)


@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (5, 4096), (3, 32768), (2, 40000), (20000, 33)])
@pytest.mark.parametrize("name", fused.KERNELS)
def test_fused_kernels_are_within_tolerance_of_float64(torch, name, shape):
    kernel = fused.get_kernel(name)
    for dtype in kernel.dtypes:
        for options in OPTIONS.get(name, ({},)):
            tensors = arguments(torch, name, shape, getattr(torch, dtype), "cuda")
            found = kernel(*tensors, **options)
            assert (found.shape, found.dtype) == (tensors[0].shape, tensors[0].dtype)
            assert error(kernel, found, tensors, options) <= kernel.tolerance[dtype], (dtype, options)


def test_fused_kernels_take_strided_and_empty_tensors_and_leave_inputs_alone(torch):
    base = torch.randn(64, 130, device="cuda", dtype=torch.float16)
    before = base.clone()
    for view in (base.T, base[:, 1:], base[::2], base.reshape(-1)[1:]):
        assert error(fused.softmax, fused.softmax(view), (view,), {}) <= 2.0**-10
        assert error(fused.add, fused.add(view, view), (view, view), {}) <= 2.0**-10
    assert torch.equal(base, before)
    assert fused.softmax(base[:0]).shape == (0, 130)
    assert fused.rmsnorm(base[:, :0], base[0, :0]).shape == (64, 0)


def test_softmax_of_masked_and_large_scores_is_that_of_pytorch(torch):
    x = torch.randn(8, 500, device="cuda") * 1e4
    x[:, 100:] = float("-inf")
    assert torch.allclose(fused.softmax(x), x.softmax(-1), atol=1e-6)


def test_more_than_two_to_the_31_elements_are_addressed(torch):
    size = 2**31 + 4096
    x = torch.zeros(size, dtype=torch.float16, device="cuda")
    x[-2:] = 2
    total = fused.add(x, x)
    assert total[-2:].tolist() == [4, 4]
    assert total[:-2].any().item() is False
    del total
    quantized = nf4.quantize(x)
    assert quantized.packed[-1].item() == 0xFF
    back = nf4.dequantize(quantized)
    assert back[-2:].tolist() == [2, 2]
    assert back[:-2].any().item() is False
    del x, back, quantized
    torch.cuda.empty_cache()


def test_tuned_settings_give_the_same_results_and_are_kept(torch, tmp_path):
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    weight = nf4.quantize(torch.randn(256, 1024, device="cuda"))
    raw = torch.from_numpy(random_blocks("Q4_K", 400)).cuda()
    calls = {
        "softmax": lambda tuner: fused.softmax(x, tuner=tuner),
        "swiglu": lambda tuner: fused.swiglu(x, x, tuner=tuner),
        "dequantize": lambda tuner: nf4.dequantize(nf4.quantize(x, tuner=tuner), tuner=tuner),
        "matmul": lambda tuner: nf4.matmul(x[:4], weight, tuner=tuner),
        "gguf": lambda tuner: gguf_blocks.dequantize(raw, "Q4_K", n_elements=400 * 256, tuner=tuner),
    }
    first = Tuner(tmp_path)
    for name, call in calls.items():
        wanted, found = call(None), call(first)
        assert torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2), name
    second = Tuner(tmp_path)
    assert len(second) == len(first) == 6
    before = (tmp_path / "kernel-settings.json").read_bytes()
    for call in calls.values():
        call(second)
    assert (tmp_path / "kernel-settings.json").read_bytes() == before


def test_eight_threads_at_once_get_the_results_of_one(torch):
    values = [torch.randn(100_000 + 64 * i, device="cuda") for i in range(8)]
    wanted = [nf4.dequantize(nf4.quantize(each)) for each in values]
    wrong = []

    def work(i):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                back = nf4.dequantize(nf4.quantize(values[i]))
                if not torch.equal(back, wanted[i]) or not torch.equal(fused.add(back, back), 2 * wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert wrong == []


def test_ten_thousand_calls_leave_no_memory_behind(torch):
    x = torch.randn(64 * 64, device="cuda")
    for round_calls in (50, 10_000):
        for _ in range(round_calls):
            nf4.quantize(x, double=False)
        torch.cuda.synchronize()
        if round_calls == 50:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == before


def test_cpu_and_gpu_tensors_do_not_mix(torch):
    x = torch.randn(4, 64)
    with pytest.raises(ConfigError, match="must be on"):
        fused.add(x.cuda(), x)
    with pytest.raises(ConfigError, match="on its device"):
        nf4.matmul(x, nf4.quantize(x.cuda()))


def step(x, weight):
    hidden = fused.rmsnorm(x, weight)
    return {"out": fused.swiglu(hidden, x), "pair": (fused.softmax(hidden), hidden + 1)}


def test_a_replay_computes_on_new_inputs_and_returns_what_later_replays_leave_alone(torch):
    graphs = GraphPool(step)
    shapes = [(4, 64), (8, 64), (4, 128)]
    for rows, columns in shapes:
        graphs.capture(torch.randn(rows, columns, device="cuda"), torch.randn(columns, device="cuda"))
    kept = []
    for _ in range(3):
        for rows, columns in shapes:
            x, weight = torch.randn(rows, columns, device="cuda"), torch.randn(columns, device="cuda")
            kept.append((graphs(x, weight), step(x, weight)))
    for found, wanted in kept:
        assert torch.equal(found["out"], wanted["out"])
        assert all(torch.equal(one, other) for one, other in zip(found["pair"], wanted["pair"], strict=True))
    assert len(graphs) == 3


def test_a_replay_scope_gives_the_graphs_own_outputs(torch):
    graphs = GraphPool(lambda x: x * 2)
    x = torch.randn(16, device="cuda")
    graphs.capture(x)
    with graphs.replay(x) as first:
        held = first.data_ptr()
        assert torch.equal(first, x * 2)
    with graphs.replay(x + 1) as second:
        assert second.data_ptr() == held
        assert torch.equal(second, (x + 1) * 2)


def test_a_function_that_writes_to_its_input_starts_from_what_is_given(torch):
    graphs = GraphPool(lambda x: x.add_(1).clone())
    x = torch.zeros(8, device="cuda")
    graphs.capture(x)
    assert x.tolist() == [0] * 8
    assert graphs(x).tolist() == [1] * 8
    assert graphs(x).tolist() == [1] * 8


def test_shapes_types_and_order_that_were_not_captured_are_refused(torch):
    graphs = GraphPool(lambda x: x + 1)
    x = torch.randn(4, 4, device="cuda")
    graphs.capture(x)
    graphs.capture(x)
    assert len(graphs) == 1
    assert (x,) in graphs
    for other in (x[:2], x.half(), x.cpu(), x[None]):
        with pytest.raises(ConfigError, match="were not captured"):
            graphs(other)
    assert torch.equal(graphs(x.T), x.T + 1)


def test_the_least_recently_used_graph_goes_first_and_memory_comes_back(torch):
    graphs = GraphPool(lambda x: (x @ x).relu() + x, limit=2)
    inputs = [torch.randn(size, size, device="cuda") for size in (64, 128, 256)]
    graphs.capture(inputs[0])
    graphs.capture(inputs[1])
    graphs(inputs[0])
    graphs.capture(inputs[2])
    assert [(each,) in graphs for each in inputs] == [True, False, True]
    graphs.clear()
    assert len(graphs) == 0
    graphs.capture(inputs[1])
    assert torch.allclose(graphs(inputs[1]), (inputs[1] @ inputs[1]).relu() + inputs[1], atol=1e-3)


def test_a_function_that_waits_for_the_device_is_not_kept():
    """In a process of its own: a failed capture leaves PyTorch's random numbers unusable."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["RuntimeError", "0", "[2.0,", "2.0]"], done.stderr[-2000:]


def test_threads_replay_one_after_another(torch):
    graphs = GraphPool(lambda x: x * 3)
    graphs.capture(torch.zeros(1000, device="cuda"))
    wrong = []

    def work(number):
        for _ in range(50):
            found = graphs(torch.full((1000,), float(number), device="cuda"))
            if found.unique().tolist() != [3.0 * number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_precision_policies_change_products_and_come_back(torch):
    capability = precision.compute_capability()
    assert capability == torch.cuda.get_device_capability()
    x = torch.randn(512, 512, device="cuda")
    wanted = x.double() @ x.double()

    def worst():
        return ((x @ x).double() - wanted).abs().max().item()

    plain = worst()
    with precision.precision(precision.FLOAT32):
        exact = worst()
    assert exact <= 1e-3
    if "tf32" in precision.tensor_core_types(capability):
        with precision.precision(precision.TF32):
            assert worst() > 5 * exact
    with precision.precision(precision.best_policy(capability)):
        assert (x @ x).dtype in {torch.bfloat16, torch.float16}
    assert worst() == plain
