"""Random blocks of every kind with finite scales."""

from __future__ import annotations

import numpy as np

from lltm_ray.kernels.gguf_blocks import KINDS

FLOAT16_AT = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind, count, seed=0):
    """uint8 [count * bytes of a block]; every byte random but the float16 scales, which are normal numbers."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, KINDS[kind].nbytes), dtype=np.uint8)
    for at in FLOAT16_AT.get(kind, ()):
        rows[:, at : at + 2] = rng.standard_normal(count).astype(np.float16)[:, None].view(np.uint8)
    if kind in {"F32", "F16", "BF16"}:
        wide = rng.standard_normal(count).astype(np.float32)
        rows = {
            "F32": lambda: wide.view(np.uint8),
            "F16": lambda: wide.astype(np.float16).view(np.uint8),
            "BF16": lambda: np.ascontiguousarray(wide.view(np.uint8).reshape(-1, 4)[:, 2:]),
        }[kind]()
    return rows.reshape(-1)
