"""`TRITON_INTERPRET=1 python -m tests.unit.kernels.interpreted`: every Triton kernel on the CPU; prints errors as JSON.

Triton's interpreter must be chosen before Triton is imported, hence a process of its own. It truncates to bfloat16
instead of rounding and has no bfloat16 products: those types are left to a GPU.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import torch

from lltm_ray.kernels import _fused_triton, _gguf_triton, _nf4_triton, fused, gguf_blocks, nf4
from tests.unit.kernels.fused_cases import OPTIONS, arguments, error
from tests.unit.kernels.gguf_samples import random_blocks


def differing_nf4(size, double, dtype):
    """Array elements of a quantized and dequantized tensor that are not those of the CPU path."""
    values = torch.randn(size).to(dtype)
    values[64:128] = 0
    wanted, found = nf4.quantize(values, double=double), _nf4_triton.quantize(values, double=double, tuner=None)
    pairs = [(getattr(wanted, name), getattr(found, name)) for name in ("packed", "absmax", "nested_absmax", "offset")]
    pairs.append((nf4.dequantize(wanted), _nf4_triton.dequantize(found, dtype=found.dtype, tuner=None)))
    return sum(int((one != other).sum()) for one, other in pairs if one is not None)


def differing_scales(dtype):
    """Codes and scales of nested scales, at every limit and beside it, that are not those of the CPU path."""
    limits = nf4.midpoints(nf4.dynamic_map())
    near = [np.nextafter(limits, way, dtype=np.float32) for way in (-2, 2)]
    powers = np.float32(10) ** np.arange(-9, 1, dtype=np.float32)
    one_sign = np.concatenate([limits, *near, powers, nf4.dynamic_map(), np.zeros(1, np.float32)])
    spread = (10 ** np.random.default_rng(0).uniform(-8, 0, 40_000)).astype(np.float32)
    rows = np.resize(np.concatenate([one_sign, spread]), (len(spread) // 128, 127)).astype(np.float32)
    rows = np.concatenate([rows, -rows, np.ones((len(rows), 1), np.float32), -np.ones((len(rows), 1), np.float32)], 1)
    scales = torch.from_numpy(rows.reshape(-1)).to(dtype)
    found = _nf4_triton._quantize_scales(scales)
    codes, nested = nf4.quantize_scales(scales.float().numpy(), np.float32(found["offset"]))
    return int((found["absmax"].numpy() != codes).sum() + (found["nested_absmax"].numpy() != nested).sum())


def matmul_error(rows, dtype, inner):
    x, weight = torch.randn(rows, inner).to(dtype), nf4.quantize(torch.randn(40, inner))
    wanted = x.double() @ nf4.dequantize(weight, dtype=str(dtype).removeprefix("torch.")).double().T
    return (_nf4_triton.matmul(x, weight, tuner=None).double() - wanted).abs().max().item()


def differing_blocks(kind, count):
    raw, size = random_blocks(kind, count), count * gguf_blocks.KINDS[kind].values
    found = _gguf_triton.dequantize(torch.from_numpy(raw), kind, n_elements=size, tuner=None).numpy()
    wanted = gguf_blocks.dequantize(raw, kind, n_elements=size)
    return int((found.view(np.uint32) != wanted.view(np.uint32)).sum())


def main():
    warnings.simplefilter("ignore")  # the interpreter's own, of infinities that no result holds
    torch.manual_seed(0)
    found = {f"nf4 scales {dtype}": differing_scales(dtype) for dtype in (torch.float32, torch.float16)}
    for size in (0, 1, 63, 65, 64 * 300 + 7):
        for dtype in (torch.float32, torch.float16):
            for double in (False, True):
                found[f"nf4 {size} {dtype} {double}"] = differing_nf4(size, double, dtype)
    for kind in gguf_blocks.KINDS:
        found[f"gguf {kind}"] = max(differing_blocks(kind, count) for count in (1, 70))
    for rows in (1, 16):
        for inner in (192, 512):
            found[f"matmul {rows} {inner} float32"] = matmul_error(rows, torch.float32, inner) / 1e-4
            found[f"matmul {rows} {inner} float16"] = matmul_error(rows, torch.float16, inner) / 0.05
    for name, kernel in fused.KERNELS.items():
        for dtype in (torch.float32, torch.float16):
            for options in OPTIONS.get(name, ({},)):
                tensors = arguments(torch, name, (7, 130), dtype, "cpu")
                result = getattr(_fused_triton, name)(*tensors, **options)
                allowed = kernel.tolerance[str(dtype).removeprefix("torch.")]
                found[f"{name} {dtype} {options}"] = error(kernel, result, tensors, options) / allowed
    print(json.dumps(found))


if __name__ == "__main__":
    main()
