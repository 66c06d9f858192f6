"""What the tests of tensors share on the CPU and on GPUs: arrays, exact values and error bounds of products."""

from __future__ import annotations

import numpy as np

DTYPES = ("float32", "float16", "bfloat16", "int32", "int8", "uint8")
FLOATS = DTYPES[:3]
FRACTION_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
TF32_BITS = 10
SMALLEST = 2.0**-24
"""Step of float16 near 0."""
GELU_ERROR = 2e-3
"""GPUs have an approximate tanh."""
LAYOUTS = ("rows", "columns", "steps", "offset")


def random_array(rng, shape, dtype):
    """Values that `dtype` holds, as float64."""
    if dtype in FLOATS:
        return round_to(rng.standard_normal(shape), dtype)
    low, high = {"int32": (-1000, 1000), "int8": (-128, 127), "uint8": (0, 255)}[dtype]
    return rng.integers(low, high, shape, endpoint=True).astype(np.float64)


def round_to(array, dtype):
    """Round to nearest even, as float64."""
    if dtype != "bfloat16":
        return np.asarray(array, dtype).astype(np.float64)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)


def make(tensors, array, dtype, device="cpu"):
    wide = np.float32 if dtype in FLOATS else np.int32
    return tensors.from_numpy(np.asarray(array).astype(wide), device, dtype)


def values(tensor):
    """All values, exactly, as float64."""
    return tensor.to("cpu", "float32" if tensor.dtype in FLOATS else "int32").to_numpy().astype(np.float64)


def laid_out(tensors, array, dtype, layout, device="cpu"):
    """The same matrix (or batch of them) in memory of four kinds."""
    if layout == "columns":
        return make(tensors, np.swapaxes(array, -1, -2), dtype, device).transpose(-1, -2)
    if layout == "steps":
        wide = np.zeros((*array.shape[:-2], array.shape[-2] * 2, array.shape[-1] * 3))
        wide[..., ::2, ::3] = array
        return make(tensors, wide, dtype, device)[..., ::2, ::3]
    if layout == "offset":
        wide = np.zeros((*array.shape[:-2], array.shape[-2] + 1, array.shape[-1] + 3))
        wide[..., 1:, 1:-2] = array
        return make(tensors, wide, dtype, device)[..., 1:, 1:-2]
    return make(tensors, array, dtype, device)


def activate(array, activation):
    if activation == "relu":
        return np.maximum(array, 0)
    if activation == "gelu":
        return 0.5 * array * (1 + np.tanh(np.sqrt(2 / np.pi) * (array + 0.044715 * array**3)))
    return array


def check_product(found, a, b, dtype, *, bias=None, activation="none", tf32=False):
    """Against float64: float32 sums of exact factors, then one rounding to the result's type (two without epilogue)."""
    exact = a @ b + (0 if bias is None else bias)
    wanted = activate(exact, activation)
    assert found.shape == wanted.shape
    if dtype == "int8":
        assert np.array_equal(values(found), wanted)
        return
    terms = np.abs(a) @ np.abs(b) + (0 if bias is None else np.abs(bias))
    allowed = 1.2 * terms * (a.shape[-1] + 4) * 2.0**-24
    if tf32:
        allowed = allowed + terms * 2.0 ** (2 - TF32_BITS)
    largest = np.abs(exact) + (0 if bias is None else np.abs(bias))
    allowed = allowed + 2 * np.maximum(np.abs(wanted), largest) * 2.0 ** -FRACTION_BITS[dtype] + SMALLEST
    if activation == "gelu":
        allowed = allowed + GELU_ERROR
    error = np.abs(values(found) - wanted)
    assert np.all(error <= allowed), f"{np.max(error / allowed)} times the bound"
