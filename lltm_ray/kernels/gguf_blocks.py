"""GGUF's block formats as float32, bit for bit what `gguf.quants.dequantize` gives.

The formats are those of llama.cpp (`ggml-common.h`); a block holds 32 or 256 values:

======  ======  =====  ======================================================================================
kind    values  bytes  layout
======  ======  =====  ======================================================================================
Q4_0        32     18  float16 d; 16 bytes of two 4-bit q: value = d (q - 8), low halves first
Q8_0        32     34  float16 d; 32 int8 q: value = d q
Q4_K       256    144  float16 d, dmin; 12 bytes of eight 6-bit (scale, min); 128 bytes of 4-bit q
Q6_K       256    210  128 bytes of low 4 bits, 64 of high 2 bits; 16 int8 scales; float16 d: d scale (q - 32)
======  ======  =====  ======================================================================================

NumPy arrays and CPU tensors are handled by NumPy, CUDA tensors by Triton kernels without a wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lltm_ray.errors import ConfigError
from lltm_ray.kernels._arrays import dtype_name, is_cuda, require_array, torch_of, triton_module
from lltm_ray.kernels.tuning import Tuner

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class BlockKind:
    """A GGML type: so many values in so many bytes, and how NumPy reads rows of blocks."""

    values: int
    nbytes: int
    read: Callable[[Bytes], Floats]


def dequantize(blocks: Any, kind: str, *, n_elements: int, tuner: Tuner | None = None) -> Any:
    """A tensor's raw bytes as float32, flat.

    Args:
        blocks: uint8 NumPy array or PyTorch tensor (CPU or CUDA) of any shape: the tensor's bytes in file order.
        kind: the GGML type's name, one of `KINDS`.
        n_elements: values that the tensor has.
        tuner: finds and keeps the fastest launch settings of the GPU; fixed ones without.

    Returns:
        float32 [n_elements] of the same library, on the same device.

    Raises:
        ConfigError: an unknown kind, not bytes, or not as many bytes as the values take.
    """
    require_array("blocks", blocks)
    if kind not in KINDS:
        raise ConfigError("kind", kind, f"cannot be dequantized here; supported are {', '.join(KINDS)}")
    if dtype_name(blocks) != "uint8":
        raise ConfigError("blocks", dtype_name(blocks), "pass the raw bytes as uint8")
    form, found = KINDS[kind], int(np.prod(blocks.shape, dtype=np.int64))
    if n_elements < 0 or n_elements % form.values or n_elements // form.values * form.nbytes != found:
        why = f"{kind} has {form.values} values in {form.nbytes} bytes, and there are {found} bytes"
        raise ConfigError("n_elements", n_elements, why)
    if is_cuda(blocks):
        return triton_module("_gguf_triton").dequantize(blocks, kind, n_elements=n_elements, tuner=tuner)
    torch = torch_of(blocks)
    if torch is None:
        return _dequantize_flat(np.ascontiguousarray(blocks).reshape(-1), form, n_elements)
    return torch.from_numpy(_dequantize_flat(blocks.contiguous().numpy().reshape(-1), form, n_elements))


def _dequantize_flat(flat: Bytes, form: BlockKind, n_elements: int) -> Floats:
    """In chunks that stay in the processor's cache."""
    rows, out = flat.reshape(-1, form.nbytes), np.empty(n_elements, np.float32)
    step = max(1, _CHUNK_BYTES // form.nbytes)
    for start in range(0, len(rows), step):
        values = form.read(rows[start : start + step]).reshape(-1)
        out[start * form.values : start * form.values + values.size] = values
    return out


def _float16(columns: Bytes) -> Floats:
    """float32 [rows, 1] of two bytes each."""
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


def _halves(columns: Bytes) -> Bytes:
    """Low and high four bits of each byte: uint8 [rows, 2, columns]."""
    return np.stack([columns & 15, columns >> 4], axis=1)


def _read_q4_0(rows: Bytes) -> Floats:
    levels = _halves(rows[:, 2:]).reshape(len(rows), 32).astype(np.float32)
    levels -= np.float32(8)
    return levels * _float16(rows[:, :2])


def _read_q8_0(rows: Bytes) -> Floats:
    return rows[:, 2:].view(np.int8).astype(np.float32) * _float16(rows[:, :2])


def _read_q4_k(rows: Bytes) -> Floats:
    low, high, both = rows[:, 4:8], rows[:, 8:12], rows[:, 12:16]
    scale = np.concatenate([low & 63, (both & 15) | ((low >> 2) & 48)], axis=1).astype(np.float32)
    least = np.concatenate([high & 63, (both >> 4) | ((high >> 2) & 48)], axis=1).astype(np.float32)
    scale *= _float16(rows[:, :2])
    least *= _float16(rows[:, 2:4])
    packed = rows[:, 16:].reshape(-1, 32)
    levels = _halves(packed).reshape(len(rows), 8, 32).astype(np.float32)
    levels *= scale[:, :, None]
    levels -= least[:, :, None]
    return levels


def _read_q6_k(rows: Bytes) -> Floats:
    low = rows[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = rows[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    levels = (low.reshape(-1, 2, 4, 32) | high << 4).reshape(-1, 16, 16).astype(np.float32)
    levels -= np.float32(32)
    scale = rows[:, 192:208].view(np.int8).astype(np.float32) * _float16(rows[:, 208:])
    return levels * scale[:, :, None]


def _read_f16(rows: Bytes) -> Floats:
    return _float16(rows)


def _read_bf16(rows: Bytes) -> Floats:
    return (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _read_f32(rows: Bytes) -> Floats:
    return np.ascontiguousarray(rows).view(np.float32)


KINDS = {
    "F32": BlockKind(1, 4, _read_f32),
    "F16": BlockKind(1, 2, _read_f16),
    "BF16": BlockKind(1, 2, _read_bf16),
    "Q4_0": BlockKind(32, 18, _read_q4_0),
    "Q8_0": BlockKind(32, 34, _read_q8_0),
    "Q4_K": BlockKind(256, 144, _read_q4_k),
    "Q6_K": BlockKind(256, 210, _read_q6_k),
}
"""The kinds that `dequantize` knows, by GGML's names."""
