"""GGUF's block formats on a GPU; `gguf_blocks` says what the bytes mean. No fused multiply-add: it rounds otherwise."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lltm_ray.kernels._launch import launch
from lltm_ray.kernels.tuning import Tuner

_SETTINGS = tuple({"rows": rows, "warps": warps} for rows, warps in ((32, 4), (16, 4), (64, 8), (64, 4)))
_ROW_VALUES = {"Q4_0": 32, "Q8_0": 32, "Q4_K": 64, "Q6_K": 128}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(blocks: torch.Tensor, kind: str, *, n_elements: int, tuner: Tuner | None) -> torch.Tensor:
    """`gguf_blocks.dequantize` of a CUDA tensor whose size was checked."""
    flat = blocks.contiguous().reshape(-1)
    if flat.data_ptr() % 4:
        flat = flat.clone()  # as the views and the float16 loads need
    if kind in _PLAIN:
        return _widen(flat, _PLAIN[kind])
    out = torch.empty(n_elements, dtype=torch.float32, device=flat.device)
    rows = n_elements // _ROW_VALUES[kind]

    def run(settings) -> None:
        grid = (triton.cdiv(rows, settings["rows"]),)
        _KERNELS[kind][grid](
            flat, out, rows, tile=settings["rows"], num_warps=settings["warps"], enable_fp_fusion=False
        )

    if rows:
        launch(run, f"gguf.{kind}", _SETTINGS, tuner=tuner, sizes=(n_elements,), tensor=out)
    return out


def _widen(flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    aligned = flat if flat.storage_offset() % dtype.itemsize == 0 else flat.clone()
    return aligned.view(dtype).to(torch.float32, copy=True)


@triton.jit
def _float16_at(blocks, at, mask):
    return tl.load((blocks + at).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _q4_0(blocks, out, count, tile: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile))[:, None]
    inside = row < count
    half = tl.arange(0, 16)[None, :]
    d = _float16_at(blocks, row * 18, inside)
    both = tl.load(blocks + row * 18 + 2 + half, mask=inside, other=0).to(tl.int32)
    tl.store(out + row * 32 + half, d * ((both & 15) - 8).to(tl.float32), mask=inside)
    tl.store(out + row * 32 + 16 + half, d * ((both >> 4) - 8).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _q8_0(blocks, out, count, tile: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile))[:, None]
    inside = row < count
    column = tl.arange(0, 32)[None, :]
    d = _float16_at(blocks, row * 34, inside)
    level = tl.load(blocks + row * 34 + 2 + column, mask=inside, other=0).to(tl.int8, bitcast=True)
    tl.store(out + row * 32 + column, d * level.to(tl.float32), mask=inside)


@triton.jit
def _six_bits(blocks, base, group, mask):
    """6-bit (scale, min) of sub-block `group`, 0 to 7, of a Q4_K block at `base`."""
    four = group % 4
    low = tl.load(blocks + base + 4 + four, mask=mask, other=0).to(tl.int32)
    high = tl.load(blocks + base + 8 + four, mask=mask, other=0).to(tl.int32)
    both = tl.load(blocks + base + 12 + four, mask=mask, other=0).to(tl.int32)
    early = group < 4
    scale = tl.where(early, low & 63, (both & 15) | ((low >> 2) & 48))
    least = tl.where(early, high & 63, (both >> 4) | ((high >> 2) & 48))
    return scale.to(tl.float32), least.to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _q4_k(blocks, out, count, tile: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile))[:, None]
    inside = row < count
    column = tl.arange(0, 32)[None, :]
    base, quarter = row // 4 * 144, (row % 4).to(tl.int32)
    d, dmin = _float16_at(blocks, base, inside), _float16_at(blocks, base + 2, inside)
    scale, least = _six_bits(blocks, base, 2 * quarter, inside)
    scale_2, least_2 = _six_bits(blocks, base, 2 * quarter + 1, inside)
    both = tl.load(blocks + base + 16 + quarter * 32 + column, mask=inside, other=0).to(tl.int32)
    first = (d * scale) * (both & 15).to(tl.float32) - dmin * least
    second = (d * scale_2) * (both >> 4).to(tl.float32) - dmin * least_2
    tl.store(out + row * 64 + column, first, mask=inside)
    tl.store(out + row * 64 + 32 + column, second, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _q6_k(blocks, out, count, tile: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile))[:, None]
    inside = row < count
    column = tl.arange(0, 32)[None, :]
    base, part = row // 2 * 210, (row % 2).to(tl.int32)
    d = _float16_at(blocks, base + 208, inside)
    scales = blocks + base + 192 + part * 8 + column // 16
    low = tl.load(blocks + base + part * 64 + column, mask=inside, other=0).to(tl.int32)
    low_2 = tl.load(blocks + base + part * 64 + 32 + column, mask=inside, other=0).to(tl.int32)
    high = tl.load(blocks + base + 128 + part * 32 + column, mask=inside, other=0).to(tl.int32)
    for quarter in tl.static_range(4):
        nibble = (low if quarter % 2 == 0 else low_2) >> (4 * (quarter // 2))
        level = ((nibble & 15) | (((high >> (2 * quarter)) & 3) << 4)) - 32
        scale = tl.load(scales + 2 * quarter, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        tl.store(out + row * 128 + quarter * 32 + column, d * scale * level.to(tl.float32), mask=inside)


_KERNELS = {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
