"""NF4 on a GPU; `nf4` says what the numbers mean.

Small tables lie in registers, an element a lane, and are read by shuffles: a level takes fewer instructions than the
memory needs time. Sums and products round as in NumPy: no fused multiply-add.

Nested scales take three passes: the blocks of values, with scales in the type of the values, which holds them exactly;
their sum in float64, always in the same order; and the 8-bit codes.
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
_FAR = 2.0**40
"""Times this, float32s of [-1, 1] that differ are at least 1 apart where they are as large as a limit."""
_TILES = tuple({"rows": rows, "warps": warps} for rows, warps in ((64, 4), (32, 4), (128, 8), (64, 8), (128, 4)))
_READS = tuple({"rows": rows, "warps": warps} for rows, warps in ((16, 4), (32, 8), (32, 4), (64, 8)))
_PRODUCTS = tuple(
    {"columns": columns, "blocks": blocks, "warps": warps, "stages": stages}
    for columns, blocks, warps, stages in ((16, 4, 4, 3), (16, 2, 4, 4), (32, 4, 4, 3), (16, 8, 4, 2), (32, 2, 8, 3))
)
_SCALE_ROWS = 8
_SUM_TILE, _SUMS = 4096, 512
"""Scales that a program adds at a time, and the most programs that do."""


def quantize(values: torch.Tensor, *, double: bool, tuner: Tuner | None) -> nf4.Nf4Tensor:
    """`nf4.quantize` of a CUDA tensor."""
    name, device = dtype_name(values), values.device
    words = as_words(values.detach().contiguous().reshape(-1))
    blocks = triton.cdiv(values.numel(), nf4.BLOCK)
    packed = torch.empty(len(words), dtype=torch.uint8, device=device)
    scales = torch.empty(blocks, dtype=values.dtype if double else torch.float32, device=device)
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
    size, device = scales.numel(), scales.device
    count = triton.cdiv(size, nf4.NESTED_BLOCK)
    codes = torch.empty(size, dtype=torch.uint8, device=device)
    nested = torch.empty(count, dtype=torch.float32, device=device)
    offset = (torch.empty if size else torch.zeros)((), dtype=torch.float32, device=device)
    tiles = triton.cdiv(size, _SUM_TILE)
    steps = triton.next_power_of_2(max(1, triton.cdiv(tiles, _SUMS)))
    sums = torch.empty(triton.cdiv(tiles, steps), dtype=torch.float64, device=device)
    limits = _tables(device)[3]

    def run(settings) -> None:
        _sum[(len(sums),)](scales, sums, size, steps=steps, tile=_SUM_TILE, num_warps=8)
        _quantize_nested[(triton.cdiv(count, settings["rows"]),)](
            scales, sums, offset, limits, codes, nested, size, count, len(sums),
            kept=_SUMS, direct=scales.is_cuda, rows=settings["rows"], num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

    if count:
        launch(run, "nf4.scales", ({"rows": _SCALE_ROWS},), tuner=None, sizes=(count,), tensor=scales)
    return {"absmax": codes, "nested_absmax": nested, "offset": offset}


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Bins (32 limits as `_level` takes them, 32 bases), levels, the 8-bit map and its limits; all float32."""
    base, limit = nf4.level_bins()
    bins = torch.from_numpy(np.concatenate([limit * np.float32(-_FAR), base.astype(np.float32)]))
    tables = (bins, *(torch.from_numpy(table.copy()) for table in (nf4.LEVELS, nf4.dynamic_map(), nf4.scale_limits())))
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
def _lane(table, last: tl.constexpr, direct: tl.constexpr):
    """Element `lane & last` of a float32 table, for shuffles; the interpreter has no lanes and takes the table."""
    if direct:
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 at; .reg .b32 lane;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, $2;
            mad.wide.u32 at, lane, 4, $1;
            ld.global.nc.f32 $0, [at];
            }""",
            "=f,l,r",
            [table.to(tl.int64), tl.full((), last, tl.int32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - Triton compiles one of the two
        return table


@triton.jit
def _level(scaled, limits, bases, direct: tl.constexpr):
    """Index of the nearest level, as float32: the base of the value's bin, and one more above the bin's limit.

    The sum's lowest five bits are the number of the bin (`nf4.BIN_SCALE`, `nf4.BIN_SHIFT`), and a shuffle's lane. A
    product with `_FAR` less the limit's, cut to [0, 1], is the comparison.
    """
    if direct:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bin; .reg .f32 sum, limit, base;
            fma.rn.f32 sum, $3, 0f4177D70A, 0f4B000010;
            mov.b32 bin, sum;
            shfl.sync.idx.b32 limit, $1, bin, 31, 0xffffffff;
            shfl.sync.idx.b32 base, $2, bin, 31, 0xffffffff;
            fma.rn.sat.f32 limit, $3, 0f53800000, limit;
            add.f32 $0, base, limit;
            }""",
            "=f,f,f,f",
            [limits, bases, scaled],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - Triton compiles one of the two
        place = tl.fma(scaled, 15.49, 8388624.0).to(tl.int32, bitcast=True) & 31
        above = tl.fma(scaled, 1099511627776.0, tl.load(limits + place)) > 0
        return tl.load(bases + place) + tl.where(above, 1.0, 0.0)


@triton.jit
def _levels_of(levels, both, direct: tl.constexpr):
    """Levels of the high and the low halves of bytes, four at a time.

    Lanes 16 to 31 hold the levels once more: what stands above the four bits does not matter.
    """
    if direct:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 rest;
            shfl.sync.idx.b32 $4, $8, $12, 31, 0xffffffff;
            shr.u32 rest, $12, 4;
            shfl.sync.idx.b32 $0, $8, rest, 31, 0xffffffff;
            shr.u32 rest, $12, 8;
            shfl.sync.idx.b32 $5, $8, rest, 31, 0xffffffff;
            shr.u32 rest, $12, 12;
            shfl.sync.idx.b32 $1, $8, rest, 31, 0xffffffff;
            shr.u32 rest, $12, 16;
            shfl.sync.idx.b32 $6, $8, rest, 31, 0xffffffff;
            shr.u32 rest, $12, 20;
            shfl.sync.idx.b32 $2, $8, rest, 31, 0xffffffff;
            shr.u32 rest, $12, 24;
            shfl.sync.idx.b32 $7, $8, rest, 31, 0xffffffff;
            shr.u32 rest, $12, 28;
            shfl.sync.idx.b32 $3, $8, rest, 31, 0xffffffff;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,r",
            [levels, both],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.load(levels + (both >> 4)), tl.load(levels + (both & 15))


@triton.jit(do_not_specialize=["blocks"])
def _quantize(x, packed, scales, bins, words, blocks, kind: tl.constexpr, rows: tl.constexpr, direct: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    at = row * 32 + tl.arange(0, 32)[None, :]
    first, second = pair_of(tl.load(x + at, mask=at < words, other=0), kind)
    top = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1, keep_dims=True)
    inverse = _inverse(top)
    limits, bases = _lane(bins, 31, direct), _lane(bins + 32, 31, direct)
    byte = tl.fma(_level(first * inverse, limits, bases, direct), 16.0, _level(second * inverse, limits, bases, direct))
    whole = (byte + 8388608.0).to(tl.int32, bitcast=True)  # 2**23: the byte is the lowest
    tl.store(packed + at, whole.to(tl.uint8), mask=at < words)
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
    both = tl.load(packed + at, mask=at < words, other=0)
    last = tl.minimum(blocks - 1 - start, rows).to(tl.int32)
    each = tl.minimum(row, last) + tl.zeros((rows, 32), tl.int32)
    scale = _read_scale(scales, nested, offset, dynamic, start, each, double, direct)
    first, second = _levels_of(_lane(levels, 15, direct), both, direct)
    tl.store(out + at, word_of(first * scale, second * scale, kind), mask=at < words)


@triton.jit
def _sum(scales, sums, size, steps: tl.constexpr, tile: tl.constexpr):
    total = tl.zeros((tile,), tl.float64)
    for step in range(steps):
        at = (tl.program_id(0).to(tl.int64) * steps + step) * tile + tl.arange(0, tile)
        total += tl.load(scales + at, mask=at < size, other=0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["blocks", "count"])
def _quantize_nested(
    scales, sums, offset, limits, codes, nested, size, blocks, count,
    kept: tl.constexpr, rows: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    at = row * 256 + tl.arange(0, 256)[None, :]
    read = tl.load(scales + at, mask=at < size, other=0).to(tl.float32)
    each = tl.arange(0, kept)
    total = tl.sum(tl.load(sums + each, mask=each < count, other=0))
    shift = (total / tl.full((), size, tl.float64)).to(tl.float32)
    values = tl.where(at < size, read - shift, 0.0)
    top = tl.max(tl.abs(values), axis=1, keep_dims=True)
    code = _scale_code(values * _inverse(top), limits, direct)
    tl.store(codes + at, code.to(tl.uint8), mask=at < size)
    tl.store(nested + row, top, mask=row < blocks)
    if tl.program_id(0) == 0:
        tl.store(offset, shift)


@triton.jit
def _scale_code(scaled, limits, direct: tl.constexpr):
    """Index of the nearest 8-bit level, as `nf4.quantize_scales` finds it, with one comparison.

    Of both signs there are 2**p even steps in the p-th power of ten. The number of the limit that is nearest to a
    magnitude is a line in each of them, and the least of the seven lines in all.
    """
    size = tl.abs(scaled)
    near = tl.fma(size, 1e6 / 0.9, 8 / 9 - 1)
    for power in tl.static_range(1, 7):
        near = tl.minimum(near, tl.fma(size, 10.0 ** (6 - power) * 2.0**power / 0.9, 2.0**power * 8 / 9 - 1))
    place = (near + 8388608.0).to(tl.int32, bitcast=True) & 127
    steps = place + (size > _look_up(limits, place, direct)).to(tl.int32)
    return tl.maximum(tl.where(scaled < 0, 127 - steps, 127 + steps), 0)


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
