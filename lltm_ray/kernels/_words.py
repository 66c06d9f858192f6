"""Pairs of values as one word, for Triton kernels: the thread that has a word has both values, so that none move."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORDS = {2: torch.int32, 4: torch.int64}


def as_words(flat: torch.Tensor) -> torch.Tensor:
    """Two values a word, int32 or int64 [ceil(n / 2)], of a flat contiguous tensor; an odd one gets a zero."""
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    elif flat.data_ptr() % (2 * flat.itemsize) or flat.storage_offset() % 2:
        flat = flat.clone()
    return flat.view(_WORDS[flat.itemsize])


@triton.jit
def pair_of(word, kind: tl.constexpr):
    """The two values of a word, the first one in its low half, as float32."""
    if kind == "float32":
        first, second = word.to(tl.int32), (word >> 32).to(tl.int32)
        return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)
    elif kind == "bfloat16":  # noqa: RET505 - Triton compiles one of them
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        first, second = word.to(tl.int16), (word >> 16).to(tl.int16)
        return first.to(tl.float16, bitcast=True).to(tl.float32), second.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def word_of(first, second, kind: tl.constexpr):
    """Two float32 values rounded to `kind`, side by side in a word."""
    if kind == "float32":
        low, high = first.to(tl.int32, bitcast=True).to(tl.int64), second.to(tl.int32, bitcast=True).to(tl.int64)
        return (low & 0xFFFFFFFF) | (high << 32)
    else:  # noqa: RET505 - Triton compiles one of them
        element: tl.constexpr = tl.float16 if kind == "float16" else tl.bfloat16
        low, high = first.to(element).to(tl.uint16, bitcast=True), second.to(element).to(tl.uint16, bitcast=True)
        return (low.to(tl.uint32) | (high.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
