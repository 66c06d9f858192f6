"""The registry's references, precision policies and what CUDA graphs refuse, on a CPU. Needs PyTorch."""

from __future__ import annotations

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.kernels import fused, precision
from lltm_ray.kernels.cuda_graphs import GraphPool
from tests.unit.kernels.fused_cases import OPTIONS, SHAPES, arguments, error

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", fused.KERNELS)
def test_references_are_within_tolerance_in_every_supported_type(torch, name, shape):
    kernel = fused.get_kernel(name)
    for dtype in kernel.dtypes:
        for options in OPTIONS.get(name, ({},)):
            tensors = arguments(torch, name, shape, getattr(torch, dtype), "cpu")
            found = kernel(*tensors, **options)
            assert (found.shape, found.dtype) == (tensors[0].shape, tensors[0].dtype)
            assert error(kernel, found, tensors, options) <= kernel.tolerance[dtype]


def test_references_are_the_formulas_of_pytorch(torch):
    functional, x = torch.nn.functional, torch.randn(6, 40, dtype=torch.float64)
    weight, bias = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    pairs = [
        (fused.softmax.reference(x), functional.softmax(x, -1)),
        (fused.layernorm.reference(x, weight, bias), functional.layer_norm(x, (40,), weight, bias)),
        (fused.rmsnorm.reference(x, weight, eps=1e-6), functional.rms_norm(x, (40,), weight, 1e-6)),
        (fused.swiglu.reference(x, x + 1), functional.silu(x) * (x + 1)),
    ]
    for found, wanted in pairs:
        assert (found - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("style", fused.STYLES)
def test_rope_turns_each_pair_by_its_angle(torch, style):
    x, angle = torch.randn(4, 2, 8, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    found = fused.rope.reference(x, angle.cos(), angle.sin(), style=style)
    places = [(i, i + 4) if style == "halves" else (2 * i, 2 * i + 1) for i in range(4)]
    for i, (one, other) in enumerate(places):
        turned = torch.complex(x[..., one], x[..., other]) * torch.exp(1j * angle[:, i])[:, None]
        assert torch.allclose(torch.complex(found[..., one], found[..., other]), turned)


def test_what_a_kernel_cannot_take_is_refused(torch):
    x = torch.randn(4, 6)
    refused = {
        "no gradient": lambda: fused.softmax(x.clone().requires_grad_()),
        "same shape": lambda: fused.add(x, x[:2]),
        "supported types": lambda: fused.add(x.double(), x.double()),
        "takes PyTorch tensors": lambda: fused.softmax(x.numpy()),
        "as x's last dimension": lambda: fused.rmsnorm(x, x[0, :5]),
        "must not be negative": lambda: fused.rmsnorm(x, x[0], eps=-1.0),
        "one of halves, pairs": lambda: fused.rope(x[None], x[:, :3], x[:, :3], style="thirds"),
        "even dim": lambda: fused.rope(x[None, :, :5], x[:, :3], x[:, :3], style="pairs"),
        r"\[tokens, dim / 2\]": lambda: fused.rope(x[None], x, x, style="pairs"),
        "is not registered": lambda: fused.get_kernel("gelu"),
    }
    for words, call in refused.items():
        with pytest.raises(ConfigError, match=words):
            call()


def test_a_leaf_that_needs_a_gradient_is_taken_under_no_grad(torch):
    with torch.no_grad():
        assert fused.softmax(torch.randn(2, 3, requires_grad=True)).shape == (2, 3)


def switches(torch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        getattr(matmul, "fp32_precision", None),
        cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32,
        torch.is_autocast_enabled("cpu"),
    )


def product_type(torch):
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_policies_nest_and_every_switch_comes_back_also_after_an_error(torch):
    before = switches(torch)
    with precision.precision(precision.BFLOAT16, device="cpu"):
        outer = switches(torch)
        assert product_type(torch) == torch.bfloat16
        with precision.precision(precision.FLOAT32, device="cpu"):
            assert product_type(torch) == torch.float32
            assert switches(torch) != outer
        assert switches(torch) == outer
        with pytest.raises(RuntimeError), precision.precision(precision.FLOAT32, device="cpu"):
            torch.ones(2) @ torch.ones(3)
        assert switches(torch) == outer
    assert switches(torch) == before


def test_unknown_policies_are_refused_before_any_switch_is_touched(torch):
    before = switches(torch)
    for policy, device in ((precision.PrecisionPolicy(autocast="int8"), "cpu"), (precision.FLOAT32, "tpu")):
        with pytest.raises(ConfigError), precision.precision(policy, device=device):
            pass
    assert switches(torch) == before


def test_capabilities_compare_as_numbers():
    assert precision.tensor_core_types((7, 0)) == {"fp16"}
    assert precision.tensor_core_types((7, 5)) == {"fp16", "int8"}
    assert precision.tensor_core_types((8, 6)) == {"fp16", "int8", "bf16", "tf32"}
    assert precision.tensor_core_types((9, 0)) == {"fp16", "int8", "bf16", "tf32", "fp8"}
    assert precision.tensor_core_types((10, 0)) >= precision.tensor_core_types((9, 0)) | {"fp4"}
    assert precision.tensor_core_types((6, 1)) == frozenset()
    assert precision.best_policy((9, 0)) == precision.BFLOAT16
    assert precision.best_policy((7, 5)) == precision.FLOAT16
    assert precision.best_policy((6, 1)) == precision.FLOAT32


def test_a_device_that_is_not_there_is_refused(torch):
    with pytest.raises(ConfigError, match="sees"):
        precision.compute_capability(torch.cuda.device_count())


def test_graphs_take_cuda_tensors_that_were_captured(torch):
    graphs = GraphPool(lambda x: x + 1, limit=2)
    with pytest.raises(ConfigError, match="take CUDA tensors"):
        graphs.capture(torch.ones(3))
    with pytest.raises(ConfigError, match="at least one input"):
        graphs.capture()
    with pytest.raises(ConfigError, match="were not captured"):
        graphs(torch.ones(3))
    assert (torch.ones(3),) not in graphs
    assert len(graphs) == 0
    for wrong in ({"limit": 0}, {"warm_ups": 0}):
        with pytest.raises(ConfigError):
            GraphPool(lambda x: x, **wrong)
