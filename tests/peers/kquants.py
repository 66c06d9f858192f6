"""Q4_K and Q6_K blocks by plain rounding, in PyTorch: for measurements only.

llama.cpp's own quantizer searches for better scales; here each block takes the range of its numbers. The bytes are
valid, and the relative error of normal numbers is 7.9 and 1.9 %.
"""

from __future__ import annotations

from typing import Any

import torch


def _halves(values: Any) -> Any:
    """float16 as two bytes: uint8 [n, 2]."""
    return values.to(torch.float16).view(torch.uint8).reshape(-1, 2)


def quantize_q4_k(values: Any) -> Any:
    """uint8 [elements / 256 * 144] of float32 values, a multiple of 256."""
    blocks = values.reshape(-1, 8, 32)
    low = blocks.amin(-1).clamp(max=0)
    scale, least = (blocks.amax(-1) - low) / 15, -low
    wide, deep = (each.amax(-1, keepdim=True) / 63 for each in (scale, least))
    wide, deep = wide.half().float().clamp(min=1e-7), deep.half().float().clamp(min=1e-7)
    six, offset = (scale / wide).round().clamp(0, 63), (least / deep).round().clamp(0, 63)
    step = (six * wide).clamp(min=1e-12)[..., None]
    levels = ((blocks + (offset * deep)[..., None]) / step).round().clamp(0, 15).to(torch.uint8)
    levels = levels.reshape(-1, 4, 2, 32)
    packed = (levels[:, :, 0] | (levels[:, :, 1] << 4)).reshape(-1, 128)
    six, offset = six.to(torch.uint8), offset.to(torch.uint8)
    scales = torch.cat(
        [
            six[:, :4] | (six[:, 4:] >> 4 << 6),
            offset[:, :4] | (offset[:, 4:] >> 4 << 6),
            (six[:, 4:] & 15) | (offset[:, 4:] << 4),
        ],
        1,
    )
    return torch.cat([_halves(wide), _halves(deep), scales, packed], 1).reshape(-1)


def quantize_q6_k(values: Any) -> Any:
    """uint8 [elements / 256 * 210] of float32 values, a multiple of 256."""
    blocks = values.reshape(-1, 16, 16)
    scale = blocks.abs().amax(-1) / 31
    wide = (scale.amax(-1, keepdim=True) / 127).half().float().clamp(min=1e-7)
    eight = (scale / wide).round().clamp(0, 127)
    step = (eight * wide).clamp(min=1e-12)[..., None]
    levels = ((blocks / step).round().clamp(-32, 31) + 32).to(torch.uint8).reshape(-1, 2, 4, 32)
    low = (levels & 15).reshape(-1, 2, 2, 64)  # first the 64 whose bits are the low half of a byte
    low = (low[:, :, 0] | (low[:, :, 1] << 4)).reshape(-1, 128)
    high = levels >> 4
    high = (high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)).reshape(-1, 64)
    return torch.cat([low, high, eight.to(torch.uint8), _halves(wide)], 1).reshape(-1)
