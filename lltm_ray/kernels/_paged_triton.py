"""Triton kernels of `paged_attention`; imported only when one is launched, because Triton is an extra."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# ruff: noqa: PLR0913, PLR0917 - kernels take what they read

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
import triton.language as tl

from lltm_ray.kernels._arrays import on_device_of
from lltm_ray.kernels.paged_cache import PagedBatch

_LOG2E = 1.4426950408889634
_LAUNCH = threading.Lock()
"""Triton compiles at a first launch, and does not say that threads may do so together."""


def attend(query: Any, keys: Any, values: Any, batch: PagedBatch, *, scale: float, part: int) -> Any:
    """Launch: one program a sequence, KV head and part; then, if there are several parts, one that adds them up.

    Arguments as `paged_attention`; `part` is the tokens of a part, a multiple of 64.
    """
    query = query if query.stride(-1) == 1 else query.contiguous()
    keys, values = (pool if pool.stride(-1) == 1 else pool.contiguous() for pool in (keys, values))
    n, heads, size = query.shape
    kv_heads = keys.shape[1]
    parts = triton.cdiv(batch.longest, part)
    out = torch.empty((n, heads, size), device=query.device, dtype=query.dtype)
    sums = torch.empty((n, heads, parts, size), device=query.device, dtype=torch.float32) if parts > 1 else out
    norms = torch.empty((n, heads, parts), device=query.device, dtype=torch.float32)
    tables = batch.tables.contiguous()
    strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], tables.stride(0))
    constants = {"group": heads // kv_heads, "size": size, "block_size": keys.shape[2], "split": parts > 1}
    inputs = (query, keys, values, tables, batch.lengths.contiguous(), sums, norms)
    with _LAUNCH, on_device_of(query):
        part_kernel[(n, kv_heads, parts)](
            *inputs, *strides, scale * _LOG2E, part, parts, **constants, **tiles(size, heads // kv_heads, query)
        )
        if parts > 1:
            add_kernel[(n, heads)](
                sums, norms, batch.lengths, out, part, parts,
                size=size, width=triton.next_power_of_2(size), part_tile=triton.next_power_of_2(parts), num_warps=8,
            )  # fmt: skip
    return out


def tiles(size: int, group: int, query: Any) -> dict[str, int]:
    """Sizes of the tiles of one program."""
    wide, width = query.element_size() == 4, max(16, triton.next_power_of_2(size))
    return {
        "row_tile": max(16, triton.next_power_of_2(group)),  # the least that a tensor core takes
        "width": width,
        "tile": (4096 if wide else 8192) // max(width, 128),  # more of float32 does not stay in registers
        "num_warps": 8 if wide else 4,
        "num_stages": 3,
    }


@triton.jit
def load_rows(pool, offsets, columns, mask):
    """[offsets, columns] of a tensor; 0 where the mask says no."""
    return tl.load(pool + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def add_tile(scores, value, highest, total, mean):
    """Online softmax: highest score, sum of exponentials and weighted sum of values with one more tile."""
    top = tl.maximum(highest, tl.max(scores, 1))
    weights, faded = tl.exp2(scores - top[:, None]), tl.exp2(highest - top)
    added = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return top, total * faded + tl.sum(weights, 1), mean * faded[:, None] + added


@triton.jit
def part_kernel(
    query, keys, values, tables, lengths, sums, norms,
    query_row, query_head, key_block, key_head, key_slot, value_block, value_head, value_slot, table_row,
    scale, part, parts,
    group: tl.constexpr, size: tl.constexpr, block_size: tl.constexpr, split: tl.constexpr,
    row_tile: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    """Softmax of one part of one sequence, for the query heads of one KV head.

    Writes the part's weighted mean and the base-2 logarithm of its sum of exponentials; without `split`, the result.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    number = tl.program_id(2)
    length, begin = tl.load(lengths + row), number * part
    end = tl.minimum(begin + part, length)
    members, columns = tl.arange(0, row_tile), tl.arange(0, width)
    real = (members < group)[:, None] & (columns < size)[None, :]
    heads = head * group + members
    if split and begin >= length:
        return
    asked = load_rows(query, row * query_row + heads * query_head, columns, real)
    highest = tl.full([row_tile], float("-inf"), tl.float32)
    total = tl.zeros([row_tile], tl.float32)
    mean = tl.zeros([row_tile, width], tl.float32)
    for start in range(begin, end, tile):
        at = start + tl.arange(0, tile)
        inside = at < end
        block = tl.load(tables + row * table_row + at // block_size, mask=inside, other=0).to(tl.int64)
        slot, here = at % block_size, inside[:, None] & (columns < size)[None, :]
        key = load_rows(keys, block * key_block + head * key_head + slot * key_slot, columns, here)
        scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        value = load_rows(values, block * value_block + head * value_head + slot * value_slot, columns, here)
        highest, total, mean = add_tile(scores, value, highest, total, mean)
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    place = (row * tl.num_programs(1) * group + heads) * parts + number
    tl.store(sums + place[:, None] * size + columns[None, :], mean.to(sums.dtype.element_ty), mask=real)
    if split:
        tl.store(norms + place, highest + tl.log2(total), mask=members < group)


@triton.jit
def add_kernel(
    sums, norms, lengths, out, part, parts, size: tl.constexpr, width: tl.constexpr, part_tile: tl.constexpr
) -> None:
    """The parts of one head of one sequence, each weighed by its sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    used = tl.cdiv(tl.load(lengths + row), part)
    number = tl.arange(0, part_tile)
    columns = tl.arange(0, width)
    norm = tl.load(norms + place * parts + number, mask=number < used, other=float("-inf"))
    top = tl.max(norm, 0)
    weight = tl.exp2(norm - tl.where(used > 0, top, 0.0))
    here = (number < used)[:, None] & (columns < size)[None, :]
    mean = tl.load(sums + (place * parts + number)[:, None] * size + columns[None, :], mask=here, other=0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(mean * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + place * size + columns, result.to(out.dtype.element_ty), mask=columns < size)
