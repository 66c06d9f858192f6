"""Inputs whose NF4 form bitsandbytes has been asked for, made by integer arithmetic so that they never change."""

from __future__ import annotations

import hashlib

import numpy as np

CASES = {"one": 1, "odd": 129, "blocks": 64 * 40, "tail": 64 * 300 + 30, "many": 1 << 18}


def values(size, dtype):
    """About normal, of very different scales, with blocks of zeros and of one value."""
    index = np.arange(size, dtype=np.uint64)
    total = np.zeros(size, np.int64)
    for factor in (2654435761, 2246822519, 3266489917, 668265263):
        word = (index + 1) * np.uint64(factor)
        total += ((word ^ (word >> np.uint64(15))) % np.uint64(65536)).astype(np.int64) - 32768
    block = index.astype(np.int64) // 64
    scaled = np.ldexp(total.astype(np.float32), (block % 9 - 20).astype(np.int32))
    scaled[block % 17 == 3] = 0
    scaled[block % 19 == 5] = np.float32(-0.75)
    return scaled.astype(dtype)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:24]
