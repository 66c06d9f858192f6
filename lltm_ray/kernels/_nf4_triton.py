"""NF4 on a GPU; `nf4` says what the numbers mean.

A level is found by two loads from 128-byte tables, which a warp serves from one cache line, and one comparison: fewer
instructions than the memory needs time. Sums and products round as in NumPy: no fused multiply-add.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0913, PLR0917 - kernels take what they read

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from lltm_ray.kernels import nf4
from lltm_ray.kernels._arrays import dtype_name
from lltm_ray.kernels._launch import launch
from lltm_ray.kernels._words import as_words, pair_of, word_of
from lltm_ray.kernels.tuning import Tuner

FUSED_ROWS = 16
"""Rows of x that the fused product takes: the smallest tile of a tensor core."""
_TILES = tuple({"rows": rows, "warps": warps} for rows, warps in ((64, 4), (32, 4), (128, 8), (64, 8), (128, 4)))
_READS = tuple({"rows": rows, "warps": warps} for rows, warps in ((16, 4), (32, 8), (32, 4), (64, 8)))
_PRODUCTS = tuple(
    {"columns": columns, "blocks": blocks, "warps": warps, "stages": stages}
    for columns, blocks, warps, stages in ((16, 4, 4, 3), (16, 2, 4, 4), (32, 4, 4, 3), (16, 8, 4, 2), (32, 2, 8, 3))
)
_SCALE_ROWS = 4


def quantize(values: torch.Tensor, *, double: bool, tuner: Tuner | None) -> nf4.Nf4Tensor:
    """`nf4.quantize` of a CUDA tensor."""
    name, device = dtype_name(values), values.device
    words = as_words(values.detach().contiguous().reshape(-1))
    blocks = triton.cdiv(values.numel(), nf4.BLOCK)
    packed = torch.empty(len(words), dtype=torch.uint8, device=device)
    scales = torch.empty(blocks, dtype=torch.float32, device=device)
    bins = _tables(device)[0]

    def run(settings) -> None:
        grid = (triton.cdiv(blocks, settings["rows"]),)
        _quantize[grid](
            words, packed, scales, bins, len(words), blocks,
            kind=name, direct=words.is_cuda, rows=settings["rows"], num_warps=settings["warps"], enable_fp_fusion=False,
        )  # fmt: skip

    if blocks:
        launch(run, f"nf4.quantize.{name}", _TILES, tuner=tuner, sizes=(len(words),), tensor=words)
    parts = {"packed": packed, "absmax": scales}
    if double:
        parts |= _quantize_scales(scales)
    return nf4.Nf4Tensor(shape=tuple(values.shape), dtype=name, **parts)


def dequantize(quantized: nf4.Nf4Tensor, *, dtype: str, tuner: Tuner | None) -> torch.Tensor:
    """`nf4.dequantize` of CUDA tensors."""
    packed, absmax, nested, offset = _parts(quantized)
    words = len(packed)
    out = torch.empty(2 * words, dtype=getattr(torch, dtype), device=packed.device)
    blocks = len(absmax)
    _, levels, dynamic, _ = _tables(packed.device)

    def run(settings) -> None:
        grid = (triton.cdiv(blocks, settings["rows"]),)
        _dequantize[grid](
            packed, absmax, nested, offset, levels, dynamic, as_words(out), words, blocks,
            double=quantized.nested_absmax is not None, kind=dtype, direct=packed.is_cuda, rows=settings["rows"],
            num_warps=settings["warps"], enable_fp_fusion=False,
        )  # fmt: skip

    if blocks:
        launch(run, "nf4.dequantize", _READS, tuner=tuner, sizes=(words,), tensor=out)
    return out[: prod(quantized.shape)].reshape(quantized.shape)


def matmul(x: torch.Tensor, weight: nf4.Nf4Tensor, *, tuner: Tuner | None) -> torch.Tensor:
    """`nf4.matmul` of CUDA tensors."""
    columns, inner = weight.shape
    rows, learns = prod(x.shape[:-1]), x.requires_grad and torch.is_grad_enabled()
    if learns or not 0 < rows <= FUSED_ROWS or not inner or inner % nf4.BLOCK or not columns:
        return torch.nn.functional.linear(x, nf4.dequantize(weight, dtype=dtype_name(x), tuner=tuner))
    flat = x.detach().reshape(rows, inner).contiguous()
    out = torch.empty((len(flat), columns), dtype=x.dtype, device=x.device)
    words, precise, count = as_words(flat.reshape(-1)), x.dtype == torch.float32, inner // nf4.BLOCK
    _, levels, dynamic, _ = _tables(x.device)
    packed, absmax, nested, offset = _parts(weight)

    def run(settings) -> None:
        grid = (triton.cdiv(columns, settings["columns"]),)
        at_once = 1 if precise or count % settings["blocks"] else settings["blocks"]
        _matmul[grid](
            words, packed, absmax, nested, offset, levels, dynamic, out, rows, columns,
            blocks=count, per=at_once, double=weight.nested_absmax is not None, direct=x.is_cuda,
            tile=settings["columns"], precise=precise, num_warps=settings["warps"], num_stages=settings["stages"],
        )  # fmt: skip

    launch(run, "nf4.matmul", _PRODUCTS, tuner=tuner, sizes=(columns, inner), tensor=flat)
    return out.reshape(*x.shape[:-1], columns)


def _parts(quantized: nf4.Nf4Tensor) -> tuple[Any, Any, Any, Any]:
    """Packed bytes, scales, nested scales and offset, contiguous; for the last two stand-ins where there are none."""
    packed, absmax = quantized.packed.contiguous(), quantized.absmax.contiguous()
    if quantized.nested_absmax is None:
        return packed, absmax, absmax, absmax
    return packed, absmax, quantized.nested_absmax.contiguous(), quantized.offset


def _quantize_scales(scales: torch.Tensor) -> dict[str, torch.Tensor]:
    offset = (scales.mean(dtype=torch.float64) if scales.numel() else scales.new_zeros(())).to(torch.float32)
    count = triton.cdiv(scales.numel(), nf4.NESTED_BLOCK)
    codes = torch.empty(scales.numel(), dtype=torch.uint8, device=scales.device)
    nested = torch.empty(count, dtype=torch.float32, device=scales.device)
    middles = _tables(scales.device)[3]

    def run(settings) -> None:
        _quantize_nested[(triton.cdiv(count, settings["rows"]),)](
            scales, offset, middles, codes, nested, scales.numel(), count,
            direct=scales.is_cuda, rows=settings["rows"], num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

    if count:
        launch(run, "nf4.scales", ({"rows": _SCALE_ROWS},), tuner=None, sizes=(count,), tensor=scales)
    return {"absmax": codes, "nested_absmax": nested, "offset": offset}


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Bins (32 bases, 32 limits), levels, the 8-bit map and its middles with infinity after them; all float32."""
    bins = torch.from_numpy(np.concatenate([table.astype(np.float32) for table in nf4.level_bins()]))
    dynamic = torch.from_numpy(nf4.dynamic_map().copy())
    middles = torch.cat([torch.from_numpy(nf4.midpoints(nf4.dynamic_map())), torch.tensor([float("inf")])])
    tables = (bins, torch.from_numpy(nf4.LEVELS), dynamic, middles)
    return tuple(table.to(device) for table in tables)


@triton.jit
def _inverse(top):
    """1 / top, rounded as IEEE says; the numbers are spelled as float32, for 1e-38 alone would be taken as float64."""
    least = tl.full(top.shape, 1e-38, tl.float32)
    return tl.div_rn(tl.full(top.shape, 1.0, tl.float32), tl.maximum(top, least))


@triton.jit
def _look_up(table, index, direct: tl.constexpr):
    """float32 `table[index]` element by element, in the index's own layout.

    `tl.load` of scattered addresses would first move the index to another layout through shared memory, and the result
    back; `direct` loads in place. The interpreter knows no PTX.
    """
    if direct:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 at; mad.wide.s32 at, $2, 4, $1; ld.global.nc.f32 $0, [at]; }",
            "=f,l,r",
            [table.to(tl.int64), index],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.load(table + index)


@triton.jit
def _look_up_byte(table, index, direct: tl.constexpr):
    if direct:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 at; cvt.s64.s32 at, $2; add.s64 at, at, $1; ld.global.nc.u8 $0, [at]; }",
            "=r,l,r",
            [table.to(tl.int64), index],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.load(table + index).to(tl.int32)


@triton.jit
def _level(scaled, bins, direct: tl.constexpr):
    """Index of the nearest level, as float32: the base of the value's bin, and one more above the bin's limit.

    The sum's lowest five bits are the number of the bin (`nf4.BIN_SCALE`, `nf4.BIN_SHIFT`).
    """
    if direct:
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 at; .reg .b32 bin; .reg .f32 sum, base, limit;
            fma.rn.f32 sum, $2, 0f4177D70A, 0f4B000010;
            mov.b32 bin, sum;
            and.b32 bin, bin, 31;
            mad.wide.u32 at, bin, 4, $1;
            ld.global.nc.f32 base, [at];
            ld.global.nc.f32 limit, [at+128];
            set.gt.f32.f32 limit, $2, limit;
            add.f32 $0, base, limit;
            }""",
            "=f,l,f",
            [bins.to(tl.int64), scaled],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - Triton compiles one of the two
        place = tl.fma(scaled, 15.49, 8388624.0).to(tl.int32, bitcast=True) & 31
        return tl.load(bins + place) + tl.where(scaled > tl.load(bins + 32 + place), 1.0, 0.0)


@triton.jit(do_not_specialize=["blocks"])
def _quantize(x, packed, scales, bins, words, blocks, kind: tl.constexpr, rows: tl.constexpr, direct: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    at = row * 32 + tl.arange(0, 32)[None, :]
    first, second = pair_of(tl.load(x + at, mask=at < words, other=0), kind)
    top = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1, keep_dims=True)
    inverse = _inverse(top)
    byte = tl.fma(_level(first * inverse, bins, direct), 16.0, _level(second * inverse, bins, direct))
    tl.store(packed + at, byte.to(tl.int32).to(tl.uint8), mask=at < words)
    tl.store(scales + row, top, mask=row < blocks)


@triton.jit
def _read_scale(scales, nested, offset, dynamic, start, row, double: tl.constexpr, direct: tl.constexpr):
    """Scales of blocks `start + row`; `start` is a multiple of what a program reads, so that `row` has 32 bits."""
    if double:
        outer = _look_up(nested + start // 256, ((start % 256).to(tl.int32) + row) // 256, direct)
        code = _look_up_byte(scales + start, row, direct)
        return _look_up(dynamic, code, direct) * outer + tl.load(offset)
    else:  # noqa: RET505 - Triton compiles one of the two
        return _look_up(scales + start, row, direct)


@triton.jit(do_not_specialize=["blocks"])
def _dequantize(
    packed, scales, nested, offset, levels, dynamic, out, words, blocks,
    double: tl.constexpr, kind: tl.constexpr, rows: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * rows
    column = tl.arange(0, 32)[None, :]
    row = tl.arange(0, rows)[:, None]
    at = (start + row) * 32 + column
    both = tl.load(packed + at, mask=at < words, other=0).to(tl.int32)
    last = tl.minimum(blocks - 1 - start, rows).to(tl.int32)
    each = tl.minimum(row, last) + tl.zeros((rows, 32), tl.int32)
    scale = _read_scale(scales, nested, offset, dynamic, start, each, double, direct)
    first = _look_up(levels, both >> 4, direct) * scale
    second = _look_up(levels, both & 15, direct) * scale
    tl.store(out + at, word_of(first, second, kind), mask=at < words)


@triton.jit(do_not_specialize=["blocks"])
def _quantize_nested(scales, offset, middles, codes, nested, size, blocks, rows: tl.constexpr, direct: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    at = row * 256 + tl.arange(0, 256)[None, :]
    shift = tl.load(offset)
    values = tl.load(scales + at, mask=at < size, other=shift) - shift
    top = tl.max(tl.abs(values), axis=1, keep_dims=True)
    scaled = values * _inverse(top)
    code = tl.zeros((rows, 256), dtype=tl.int32)
    for power in tl.static_range(8):
        step = 128 >> power
        code += tl.where(_look_up(middles, code + (step - 1), direct) < scaled, step, 0)
    tied = (_look_up(middles, code, direct) == scaled) & (code % 2 == 1)
    tl.store(codes + at, (code + tied.to(tl.int32)).to(tl.uint8), mask=at < size)
    tl.store(nested + row, top, mask=row < blocks)


@triton.jit(do_not_specialize=["m"])
def _matmul(
    x, packed, scales, nested, offset, levels, dynamic, out, m, n, blocks: tl.constexpr, per: tl.constexpr,
    double: tl.constexpr, tile: tl.constexpr, precise: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * tile
    column = tl.arange(0, tile)
    near = tl.minimum(column, (n - 1 - start).to(tl.int32))
    row = tl.arange(0, 16)
    half = tl.arange(0, 32 * per)
    total = tl.zeros((16, tile), dtype=tl.float32)
    precision: tl.constexpr = "ieee" if precise else "tf32"
    bits: tl.constexpr = tl.int32 if precise else tl.int16
    first_row = packed + start * (blocks * 32)
    for step in range(blocks // per):
        both = tl.load(first_row + near[:, None] * (blocks * 32) + (step * 32 * per + half)[None, :]).to(tl.int32)
        scale_at = near[:, None] * blocks + (step * per + half // 32)[None, :]
        scale = _read_scale(scales, nested, offset, dynamic, start * blocks, scale_at, double, direct)
        first = (_look_up(levels, both >> 4, direct) * scale).to(out.dtype.element_ty)
        second = (_look_up(levels, both & 15, direct) * scale).to(out.dtype.element_ty)
        at = x + row[:, None] * (blocks * 32) + step * 32 * per + half[None, :]
        word = tl.load(at, mask=(row < m)[:, None], other=0)
        even = word.to(bits).to(out.dtype.element_ty, bitcast=True)
        odd = (word >> (32 if precise else 16)).to(bits).to(out.dtype.element_ty, bitcast=True)
        total = tl.dot(even, tl.trans(first), total, input_precision=precision)
        total = tl.dot(odd, tl.trans(second), total, input_precision=precision)
    at = row.to(tl.int64)[:, None] * n + (start + column)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (start + column < n)[None, :])
