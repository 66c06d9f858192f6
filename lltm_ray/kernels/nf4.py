"""NF4: four bits a weight, with the layout and the numbers of bitsandbytes.

Blocks of 64 values share one scale, their largest magnitude (`absmax`, float32); a value is the index of the nearest of
16 levels, the quantiles of a normal distribution (Dettmers et al., "QLoRA", 2023). Two values share a byte, the first
in its high half. With `double`, the scales themselves are stored in 8 bits: less their mean (`offset`), in blocks of
256 with one float32 each, as indices into a map of 256 levels (Dettmers, "8-Bit Approximations", 2015). That is 4.127
bits a weight instead of 4.5.

Packed bytes and scales equal those of `bitsandbytes.functional.quantize_4bit(..., quant_type="nf4")`. The nested 8-bit
codes are the nearest level, ties to the even index, as its CUDA kernel finds them; `offset` is the mean, summed in
float64.

NumPy arrays and CPU tensors are handled by NumPy, CUDA tensors by Triton kernels without a wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lltm_ray.errors import ConfigError
from lltm_ray.kernels._arrays import dtype_name, is_cuda, require_array, torch_of, triton_module
from lltm_ray.kernels.tuning import Tuner

BLOCK = 64
NESTED_BLOCK = 256
DTYPES = ("float32", "float16", "bfloat16")
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
"""The 16 levels of bitsandbytes' `get_4bit_type("nf4")`, in [-1, 1]."""
BIN_SCALE, BIN_SHIFT = np.float32(15.49), np.float32(2**23 + 16)
"""x * scale + shift has the number of its bin, 1 to 31, in its lowest five bits: float32 holds no fraction there."""
SMALLEST_SCALE = np.float32(1e-38)
"""bitsandbytes divides by no less, so that a block of zeros stays one."""
_CHUNK = BLOCK * 2048

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Tensor:
    """A tensor in NF4; its arrays are of the library and on the device of what was quantized.

    Attributes:
        packed: uint8 [ceil(n / 2)], two levels a byte, the first in the high half.
        absmax: scale of each block of 64; float32, or uint8 indices into `dynamic_map()` where the scales are nested.
        shape: shape of the values.
        dtype: name of the values' element type; `dequantize` returns it by default.
        nested_absmax: float32, one for 256 scales, or None.
        offset: float32 scalar that was taken off the scales, or None.
    """

    packed: Any
    absmax: Any
    shape: tuple[int, ...]
    dtype: str
    nested_absmax: Any = None
    offset: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        held = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(int(array.nbytes) for array in held if array is not None)


def quantize(values: Any, *, double: bool = True, tuner: Tuner | None = None) -> Nf4Tensor:
    """Quantize an array of float32, float16 or (PyTorch only) bfloat16, of any shape, flat in C order.

    Args:
        values: NumPy array or PyTorch tensor.
        double: store the scales in 8 bits too.
        tuner: finds and keeps the fastest launch settings of the GPU; fixed ones without.

    Raises:
        ConfigError: another library or type; on the CPU also a value that is not finite (on a GPU, where looking would
            cost a wait, such a value spoils its own block).
    """
    require_array("values", values)
    if dtype_name(values) not in DTYPES:
        raise ConfigError("values", dtype_name(values), f"convert to one of {', '.join(DTYPES)}")
    if is_cuda(values):
        quantized: Nf4Tensor = triton_module("_nf4_triton").quantize(values, double=double, tuner=tuner)
        return quantized
    torch = torch_of(values)
    flat = values if torch is None else (values.float() if values.dtype == torch.bfloat16 else values).detach().numpy()
    packed, scales = _quantize_flat(np.ascontiguousarray(flat).reshape(-1))
    arrays = {"packed": packed, "absmax": scales}
    if double:
        offset = np.float32(scales.mean(dtype=np.float64) if scales.size else 0.0)
        codes, nested = quantize_scales(scales, offset)
        arrays |= {"absmax": codes, "nested_absmax": nested, "offset": np.array(offset)}
    to = (lambda array: array) if torch is None else torch.from_numpy
    return Nf4Tensor(
        shape=tuple(values.shape), dtype=dtype_name(values), **{name: to(array) for name, array in arrays.items()}
    )


def dequantize(quantized: Nf4Tensor, *, dtype: str | None = None, tuner: Tuner | None = None) -> Any:
    """The values again, as `dtype` (by default the one that was quantized), of the same library and device.

    Raises:
        ConfigError: an unknown `dtype`, or one that NumPy does not have, or parts that do not fit the shape.
    """
    dtype = quantized.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    _check_parts(quantized)
    if is_cuda(quantized.packed):
        return triton_module("_nf4_triton").dequantize(quantized, dtype=dtype, tuner=tuner)
    torch = torch_of(quantized.packed)
    if torch is None:
        if dtype == "bfloat16":
            raise ConfigError("dtype", dtype, "NumPy has no such type; take float32")
        return _dequantize_flat(quantized, np.dtype(dtype)).reshape(quantized.shape)
    through = np.dtype("float32" if dtype == "bfloat16" else dtype)
    flat = torch.from_numpy(_dequantize_flat(_as_numpy(quantized), through))
    return flat.to(getattr(torch, dtype)).reshape(quantized.shape)


def matmul(x: Any, weight: Nf4Tensor, *, tuner: Tuner | None = None) -> Any:
    """`x @ weight.T`: x of [..., k], weight of [n, k], result [..., n] in x's type.

    The weight is dequantized to x's type, and sums are float32. On a GPU up to 16 rows of x are multiplied in one fused
    kernel that reads only the packed weight; more rows, and an x that needs a gradient, go through `dequantize` and the
    library's own product.

    Raises:
        ConfigError: shapes, libraries or devices that do not go together.
    """
    require_array("x", x)
    _check_parts(weight)
    if len(weight.shape) != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ConfigError("x", tuple(x.shape), f"its last dimension must be the weight's second, of {weight.shape}")
    if dtype_name(x) not in DTYPES:
        raise ConfigError("x", dtype_name(x), f"convert to one of {', '.join(DTYPES)}")
    if torch_of(x) is not torch_of(weight.packed) or (torch_of(x) is not None and x.device != weight.packed.device):
        raise ConfigError("x", type(x).__name__, "must be of the weight's library and on its device")
    if is_cuda(x):
        return triton_module("_nf4_triton").matmul(x, weight, tuner=tuner)
    return x @ dequantize(weight, dtype=dtype_name(x)).T


def quantize_scales(scales: Floats, offset: np.float32) -> tuple[Bytes, Floats]:
    """8-bit codes of `scales - offset` (float32 [n]) and the scale of each block of 256, float32."""
    blocks = -(-scales.size // NESTED_BLOCK)
    rows = np.zeros((blocks, NESTED_BLOCK), np.float32)
    rows.reshape(-1)[: scales.size] = scales - offset
    nested = np.abs(rows).max(axis=1, initial=0.0)
    scaled = rows * (np.float32(1) / np.maximum(nested, SMALLEST_SCALE))[:, None]
    middles = midpoints(dynamic_map())
    codes = np.searchsorted(middles, scaled, side="left")
    tied = middles[np.minimum(codes, middles.size - 1)] == scaled
    codes += tied & (codes % 2 == 1)
    return codes.astype(np.uint8).reshape(-1)[: scales.size], nested


def read_scales(quantized: Nf4Tensor) -> Floats:
    """Scale of each block of 64 as float32 [blocks], of a tensor in NumPy's arrays."""
    if quantized.nested_absmax is None:
        return np.asarray(quantized.absmax, np.float32)
    nested = np.repeat(quantized.nested_absmax, NESTED_BLOCK)[: quantized.absmax.size]
    scales: Floats = dynamic_map()[quantized.absmax] * nested + np.float32(quantized.offset)
    return scales


def midpoints(levels: Floats) -> Floats:
    """Between each level and the next, in float32: the limits of nearest-level rounding."""
    return (levels[:-1] + levels[1:]) / np.float32(2)


@cache
def dynamic_map() -> Floats:
    """The 256 levels of 8-bit dynamic quantization: bitsandbytes' `create_dynamic_map()` (signed, 7 exponent bits).

    For each of seven powers of ten up to 1, the middles of 2**i equal steps from 0.1 to 1, with both signs; then 0
    and 1. The steps are those of a float32 linspace that counts from the nearer end with one rounding.
    """
    values = [np.array([0.0, 1.0], np.float32)]
    for power in range(7):
        steps = 2**power
        index = np.arange(steps + 1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(steps))
        ends = np.where(
            index < (steps + 1) // 2, np.float64(np.float32(0.1)) + step * index, 1 - step * (steps - index)
        )
        middles = midpoints(ends.astype(np.float32)) * np.float32(10.0 ** (power - 6))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


@cache
def scale_limits() -> Floats:
    """The 128 limits between levels of `dynamic_map()` from 0 up.

    Each second one, from the first, is the next lower float32: `>` then rounds ties to the even index.
    """
    limits = midpoints(dynamic_map())[127:].copy()
    limits[::2] = np.nextafter(limits[::2], np.float32(0))
    return limits


@cache
def level_bins() -> tuple[Bytes, Floats]:
    """For each of 32 bins of [-1, 1]: the level index at its lower end, and the one limit within it (or infinity).

    No two limits share a bin and none lies near a bin's end, so one comparison finds the nearest level.
    """
    ends = (np.arange(33) - 16.5) / BIN_SCALE
    middles = midpoints(LEVELS)
    base = np.searchsorted(middles, ends[:-1]).astype(np.uint8)
    limit = np.append(middles, np.float32(np.inf))[base]
    return base, np.where(limit < ends[1:], limit, np.float32(np.inf)).astype(np.float32)


@cache
def _level_pairs() -> Floats:
    """Both levels of every byte, float32 [256, 2]."""
    byte = np.arange(256)
    return LEVELS[np.stack([byte >> 4, byte & 15], axis=1)]


def _quantize_flat(values: NDArray[Any]) -> tuple[Bytes, Floats]:
    blocks = -(-values.size // BLOCK)
    packed, scales = np.empty(-(-values.size // 2), np.uint8), np.empty(blocks, np.float32)
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        rows = np.zeros((-(-part.size // BLOCK), BLOCK), np.float32)
        rows.reshape(-1)[: part.size] = part
        top = np.abs(np.maximum(rows.max(axis=1), -rows.min(axis=1)))  # abs: no negative zero
        if not np.isfinite(top).all():
            raise ConfigError("values", "inf or nan", "must be finite")
        scales[start // BLOCK : start // BLOCK + top.size] = top
        rows *= (np.float32(1) / np.maximum(top, SMALLEST_SCALE))[:, None]
        codes = _nearest_level(rows).reshape(-1, 2)
        both = (codes[:, 0] << 4) | codes[:, 1]
        packed[start // 2 : start // 2 + -(-part.size // 2)] = both[: -(-part.size // 2)]
    return packed, scales


def _nearest_level(scaled: Floats) -> Bytes:
    base, limit = level_bins()
    bins = (scaled * BIN_SCALE + BIN_SHIFT).view(np.int32) & 31
    codes: Bytes = base[bins] + (scaled > limit[bins])
    return codes


def _dequantize_flat(quantized: Nf4Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    scales, size = read_scales(quantized), prod(quantized.shape)
    out = np.empty(size, dtype)
    for start in range(0, size, _CHUNK):
        part = quantized.packed[start // 2 : (start + _CHUNK) // 2]
        rows = np.zeros((-(-part.size * 2 // BLOCK), BLOCK), np.float32)
        np.take(_level_pairs(), part, axis=0, out=rows.reshape(-1)[: part.size * 2].reshape(-1, 2), mode="clip")
        rows *= scales[start // BLOCK : start // BLOCK + len(rows), None]
        out[start : start + _CHUNK] = rows.reshape(-1)[: min(_CHUNK, size - start)]
    return out


def _as_numpy(quantized: Nf4Tensor) -> Nf4Tensor:
    read: Callable[[Any], Any] = lambda tensor: None if tensor is None else tensor.numpy()  # noqa: E731
    return Nf4Tensor(
        packed=read(quantized.packed),
        absmax=read(quantized.absmax),
        shape=quantized.shape,
        dtype=quantized.dtype,
        nested_absmax=read(quantized.nested_absmax),
        offset=read(quantized.offset),
    )


def _check_parts(quantized: Nf4Tensor) -> None:
    """Refuse parts that a kernel would read beyond, or take for something else."""
    size, nested = prod(quantized.shape), quantized.nested_absmax is not None
    blocks, place = -(-size // BLOCK), getattr(quantized.packed, "device", "cpu")
    _check_part(quantized, "packed", "uint8", (-(-size // 2),), place)
    _check_part(quantized, "absmax", "uint8" if nested else "float32", (blocks,), place)
    if nested:
        _check_part(quantized, "nested_absmax", "float32", (-(-blocks // NESTED_BLOCK),), place)
        _check_part(quantized, "offset", "float32", (), place)


def _check_part(quantized: Nf4Tensor, name: str, dtype: str, shape: tuple[int, ...], place: Any) -> None:
    part = getattr(quantized, name)
    if not hasattr(part, "dtype") or dtype_name(part) != dtype or part.shape != shape:
        found = (str(getattr(part, "dtype", type(part).__name__)), tuple(getattr(part, "shape", ())))
        raise ConfigError(name, found, f"must be {dtype} {list(shape)} where values have shape {quantized.shape}")
    if getattr(part, "device", "cpu") != place:  # of NumPy the word, of PyTorch an object that does not equal it
        raise ConfigError(name, str(part.device), f"must be of the library and on the device of packed, {place}")
