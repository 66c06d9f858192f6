"""NaN and infinity among a tensor's values and block scales, read from the file in chunks: `find_bad_blocks`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ModelFormatError
from lltm_ray.models.gguf_header import TENSOR_TYPES, TensorInfo

_CHUNK_BYTES = 4 * 2**20
_BLOCK_BYTES = {name: nbytes for name, _, nbytes in TENSOR_TYPES.values()}
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F80_0000)}
"""Type -> how its values are read as whole numbers, and the bits that are all set in NaN and infinity."""
_HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q8_1": (0, 2), "Q1_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_S": (0,), "IQ2_XXS": (0,),
    "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,),
    "TQ2_0": (64,),
}  # fmt: skip
"""Type -> where in a block its float16 scales lie, as ggml's `block_*`. Whole numbers and NVFP4 have none."""
_Blocks = npt.NDArray[np.uint8]


def find_bad_blocks(path: str | os.PathLike[str], tensor: TensorInfo) -> tuple[int, int] | None:
    """How many blocks (of plain types: values) are not finite, and the byte in the file where the first begins.

    As ggml's `ggml_validate_row_data`. None: all are finite, or the type has no floats.

    Raises:
        ModelFormatError: the file ends before the tensor does.
    """
    size = _BLOCK_BYTES[tensor.type]
    buffer = bytearray(min(_CHUNK_BYTES // size * size, tensor.nbytes))
    count, first, at, end = 0, -1, tensor.offset_bytes, tensor.offset_bytes + tensor.nbytes
    with open(path, "rb", buffering=0) as file:
        while at < end:
            file.seek(at)
            read = file.readinto(memoryview(buffer)[: end - at])
            read -= read % size
            if not read:
                raise ModelFormatError(os.fspath(path), at, f"ends inside tensor {tensor.name}")
            bad = _not_finite(tensor.type, np.frombuffer(buffer, np.uint8, read))
            if bad is not None and (found := np.flatnonzero(bad)).size:
                first = at + int(found[0]) * size if first < 0 else first
                count += found.size
            at += read
    return (count, first) if count else None


def _not_finite(kind: str, raw: _Blocks) -> Any:
    """Which blocks are not finite; None if the type has nothing that could be."""
    if kind == "F64":  # ggml looks at it as float32
        with np.errstate(over="ignore"):
            return ~np.isfinite(raw.view("<f8").astype(np.float32))
    if kind in _EXPONENTS:
        dtype, bits = _EXPONENTS[kind]
        return _all_set(raw.view(dtype), bits)
    blocks = raw.reshape(-1, _BLOCK_BYTES[kind])
    if kind in _OTHERS:
        return _OTHERS[kind](blocks)
    bad = [_all_set(_column(blocks, at, "<u2"), 0x7C00) for at in _HALVES.get(kind, ())]
    return np.logical_or.reduce(bad) if bad else None


def _all_set(values: Any, bits: int) -> Any:
    mask = values.dtype.type(bits)
    return (values & mask) == mask


def _column(blocks: _Blocks, at: int, dtype: str) -> Any:
    return np.ascontiguousarray(blocks[:, at : at + np.dtype(dtype).itemsize]).view(dtype)[:, 0]


def _iq1_m(blocks: _Blocks) -> Any:
    """The scale is a float16 whose four nibbles are the highest ones of four words."""
    words = np.ascontiguousarray(blocks[:, 48:56]).view("<u2")
    return _all_set((words[:, 3] & 0xF000) | (words[:, 2] >> 4 & 0x0F00), 0x7C00)


_OTHERS: dict[str, Callable[[_Blocks], Any]] = {
    "MXFP4": lambda blocks: blocks[:, 0] == 0xFF,
    "Q8_K": lambda blocks: _all_set(_column(blocks, 0, "<u4"), 0x7F80_0000),
    "IQ1_M": _iq1_m,
}
"""Blocks whose scale is no float16 at one place."""
