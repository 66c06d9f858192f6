"""The face of `csrc/`: what the CUDA runtime sees, without PyTorch or CuPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lltm_ray._optional import load


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeDevice:
    """One GPU as the CUDA runtime shows it, in CUDA's order (which CUDA_VISIBLE_DEVICES rules)."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int
    free_bytes: int


def cuda_version() -> int:
    """CUDA runtime version that the module was built with: 13000 is 13.0, 0 is none.

    Raises:
        MissingExtraError: the native module was not built.
    """
    return int(_native().cuda_version())


def read_devices() -> tuple[NativeDevice, ...]:
    """Devices that this process may use; empty without CUDA or without a device.

    Raises:
        MissingExtraError: the native module was not built.
        RuntimeError: the CUDA runtime or driver is broken, in its own words.
    """
    names = NativeDevice.__dataclass_fields__
    return tuple(NativeDevice(**{name: getattr(found, name) for name in names}) for found in _native().devices())


def _native() -> Any:
    return load(
        "lltm_ray.kernels._native", install="LLTM_RAY_NATIVE=1 pip install .", feature="the native module (csrc/)"
    )
