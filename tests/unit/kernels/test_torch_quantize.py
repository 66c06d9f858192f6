"""CPU tensors give what NumPy arrays give, and bfloat16, which NumPy lacks. Needs PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.kernels import gguf_blocks, nf4
from tests.unit.kernels.gguf_samples import random_blocks

pytestmark = pytest.mark.torch
SHAPES = [(0,), (1,), (63,), (3, 130), (64 * 300 + 7,)]


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tensor_is_quantized_as_its_array(torch, shape, dtype):
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    array, tensor = nf4.quantize(values), nf4.quantize(torch.from_numpy(values))
    for name in ("packed", "absmax", "nested_absmax", "offset"):
        assert np.array_equal(getattr(array, name), getattr(tensor, name).numpy()), name
    back = nf4.dequantize(tensor)
    assert str(back.dtype) == f"torch.{dtype}"
    assert np.array_equal(nf4.dequantize(array), back.numpy())


def test_bfloat16_is_quantized_as_the_float32_it_is_and_rounded_once_when_read(torch):
    values = torch.randn(5, 200).to(torch.bfloat16)
    quantized, wide = nf4.quantize(values), nf4.quantize(values.float())
    assert torch.equal(quantized.packed, wide.packed)
    back = nf4.dequantize(quantized)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, nf4.dequantize(wide).to(torch.bfloat16))


def test_a_product_takes_the_type_of_x(torch):
    weight = nf4.quantize(torch.randn(32, 128))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 4, 128).to(dtype)
        found = nf4.matmul(x, weight)
        wanted = x.double() @ nf4.dequantize(weight, dtype=str(dtype).removeprefix("torch.")).double().T
        assert (found.dtype, found.shape) == (dtype, (3, 4, 32))
        assert (found.double() - wanted).abs().max() <= (1e-4 if dtype == torch.float32 else 0.5)
    x = torch.randn(2, 128, requires_grad=True)
    nf4.matmul(x, weight).sum().backward()
    assert torch.allclose(x.grad[0], nf4.dequantize(weight).sum(0), atol=1e-4)
    with pytest.raises(ConfigError, match="library"):
        nf4.matmul(np.ones((2, 128), np.float32), weight)


@pytest.mark.parametrize("kind", gguf_blocks.KINDS)
def test_blocks_in_a_tensor_are_read_as_those_in_an_array(torch, kind):
    raw, size = random_blocks(kind, 70), 70 * gguf_blocks.KINDS[kind].values
    found = gguf_blocks.dequantize(torch.from_numpy(raw), kind, n_elements=size)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), gguf_blocks.dequantize(raw, kind, n_elements=size))
    spaced = torch.zeros(raw.size, 2, dtype=torch.uint8)
    spaced[:, 0] = torch.from_numpy(raw)
    assert torch.equal(gguf_blocks.dequantize(spaced[:, 0], kind, n_elements=size), found)


def test_wrong_types_and_devices_are_refused(torch):
    with pytest.raises(ConfigError, match="float32, float16, bfloat16"):
        nf4.quantize(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ConfigError, match="meta"):
        nf4.quantize(torch.ones(4, device="meta"))
    with pytest.raises(ConfigError, match="uint8"):
        gguf_blocks.dequantize(torch.zeros(18, dtype=torch.int8), "Q4_0", n_elements=32)
