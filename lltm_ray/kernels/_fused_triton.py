"""The kernels of `fused`, one pass over memory each; shapes and types were checked there."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0913, PLR0917 - kernels take what they read

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lltm_ray.kernels._arrays import dtype_name
from lltm_ray.kernels._launch import launch
from lltm_ray.kernels._words import as_words, pair_of, word_of
from lltm_ray.kernels.tuning import Settings, Tuner

_FLAT = tuple({"tile": tile, "warps": warps} for tile, warps in ((2048, 4), (1024, 4), (4096, 8), (8192, 8)))
_TURNS = tuple({"tokens": tokens, "warps": warps} for tokens, warps in ((1, 4), (1, 8), (2, 4), (4, 4)))
_ROW_TILES = (4096, 8192)
_THREAD_VALUES = (16, 8, 32)


def add(a: torch.Tensor, b: torch.Tensor, *, tuner: Tuner | None = None) -> torch.Tensor:
    """`fused.add` of CUDA tensors."""
    return _flat("add", a, b, gated=False, tuner=tuner)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, tuner: Tuner | None = None) -> torch.Tensor:
    """`fused.swiglu` of CUDA tensors."""
    return _flat("swiglu", gate, up, gated=True, tuner=tuner)


def softmax(x: torch.Tensor, *, tuner: Tuner | None = None) -> torch.Tensor:
    """`fused.softmax` of a CUDA tensor."""
    return _rows("softmax", x, (), eps=0.0, tuner=tuner)


def layernorm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-5, tuner: Tuner | None = None
) -> torch.Tensor:
    """`fused.layernorm` of CUDA tensors."""
    return _rows("layernorm", x, (weight, bias), eps=eps, tuner=tuner)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, tuner: Tuner | None = None) -> torch.Tensor:
    """`fused.rmsnorm` of CUDA tensors."""
    return _rows("rmsnorm", x, (weight,), eps=eps, tuner=tuner)


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, style: str, tuner: Tuner | None = None
) -> torch.Tensor:
    """`fused.rope` of CUDA tensors."""
    x, cos, sin = x.detach().contiguous(), cos.float().contiguous(), sin.float().contiguous()
    out = torch.empty_like(x)
    tokens, heads, half = x.shape[-3], x.shape[-2], x.shape[-1] // 2
    count = x.numel() // (heads * 2 * half)
    kernel = _rope_pairs if style == "pairs" else _rope_halves
    source, target = (as_words(x.view(-1)), as_words(out.view(-1))) if style == "pairs" else (x, out)

    def run(settings: Settings) -> None:
        kernel[(triton.cdiv(count, settings["tokens"]),)](
            source, cos, sin, target, count, tokens, heads, half,
            kind=dtype_name(x), per=settings["tokens"], head_tile=triton.next_power_of_2(heads),
            half_tile=triton.next_power_of_2(half), num_warps=settings["warps"],
        )  # fmt: skip

    launch(run, f"rope.{style}", _TURNS, tuner=tuner, sizes=(count, heads, half), tensor=x)
    return out


def _flat(name: str, a: torch.Tensor, b: torch.Tensor, *, gated: bool, tuner: Tuner | None) -> torch.Tensor:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    out = torch.empty_like(a)

    def run(settings: Settings) -> None:
        _two[(triton.cdiv(a.numel(), settings["tile"]),)](
            a, b, out, a.numel(), gated=gated, tile=settings["tile"], num_warps=settings["warps"]
        )

    launch(run, name, _FLAT, tuner=tuner, sizes=(a.numel(),), tensor=a)
    return out


def _rows(
    name: str, x: torch.Tensor, vectors: tuple[torch.Tensor, ...], *, eps: float, tuner: Tuner | None
) -> torch.Tensor:
    x = x.detach().contiguous()
    out, columns = torch.empty_like(x), x.shape[-1]
    count = x.numel() // columns
    weight, bias = (*(vector.detach().contiguous() for vector in vectors), x, x)[:2]
    block = triton.next_power_of_2(columns)

    def run(settings: Settings) -> None:
        _row_kernel[(triton.cdiv(count, settings["rows"]),)](
            x, weight, bias, out, count, columns, eps,
            step=name, rows=settings["rows"], block=block, num_warps=settings["warps"],
        )  # fmt: skip

    launch(run, name, _row_settings(block), tuner=tuner, sizes=(count, columns), tensor=x)
    return out


def _row_settings(block: int) -> tuple[Settings, ...]:
    """Rows a program, and warps for 16, 8 or 32 values a thread."""
    found = []
    for tile in _ROW_TILES:
        rows = max(1, tile // block)
        for each in _THREAD_VALUES:
            warps = min(32, max(1, rows * block // (32 * each)))
            if (settings := {"rows": rows, "warps": warps}) not in found:
                found.append(settings)
    return tuple(found)


@triton.jit
def _two(a, b, out, size, gated: tl.constexpr, tile: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = at < size
    first = tl.load(a + at, mask=inside).to(tl.float32)
    second = tl.load(b + at, mask=inside).to(tl.float32)
    total = first * tl.sigmoid(first) * second if gated else first + second
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _row_kernel(x, weight, bias, out, count, columns, eps, step: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    column = tl.arange(0, block)[None, :]
    there = column < columns
    inside = there & (row < count)
    at = row * columns + column
    if step == "softmax":
        values = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
        values = tl.exp(values - tl.max(values, axis=1, keep_dims=True))
        values = values / tl.sum(values, axis=1, keep_dims=True)
    else:
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if step == "layernorm":
            values = tl.where(there, values - tl.sum(values, axis=1, keep_dims=True) / columns, 0.0)
        mean = tl.sum(values * values, axis=1, keep_dims=True) / columns
        values = values * tl.rsqrt(mean + eps) * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
        if step == "layernorm":
            values += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _angles(cos, sin, token, tokens, half, half_tile: tl.constexpr):
    column = tl.arange(0, half_tile)[None, :]
    at = (token % tokens) * half + column
    return tl.load(cos + at, mask=column < half, other=0.0), tl.load(sin + at, mask=column < half, other=0.0)


@triton.jit(do_not_specialize=["count", "tokens"])
def _rope_halves(
    x, cos, sin, out, count, tokens, heads, half,
    kind: tl.constexpr, per: tl.constexpr, head_tile: tl.constexpr, half_tile: tl.constexpr,
):  # fmt: skip
    head, column = tl.arange(0, head_tile)[:, None], tl.arange(0, half_tile)[None, :]
    for each in tl.static_range(per):
        token = tl.program_id(0).to(tl.int64) * per + each
        inside = (head < tl.where(token < count, heads, 0)) & (column < half)
        c, s = _angles(cos, sin, token, tokens, half, half_tile)
        at = (token * heads + head) * (2 * half) + column
        first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "tokens"])
def _rope_pairs(
    x, cos, sin, out, count, tokens, heads, half,
    kind: tl.constexpr, per: tl.constexpr, head_tile: tl.constexpr, half_tile: tl.constexpr,
):  # fmt: skip
    head, column = tl.arange(0, head_tile)[:, None], tl.arange(0, half_tile)[None, :]
    for each in tl.static_range(per):
        token = tl.program_id(0).to(tl.int64) * per + each
        inside = (head < tl.where(token < count, heads, 0)) & (column < half)
        c, s = _angles(cos, sin, token, tokens, half, half_tile)
        at = (token * heads + head) * half + column
        first, second = pair_of(tl.load(x + at, mask=inside, other=0), kind)
        tl.store(out + at, word_of(first * c - second * s, second * c + first * s, kind), mask=inside)
