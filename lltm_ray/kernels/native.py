"""Devices as the native module (`csrc/`) sees them, without PyTorch or CuPy; `tensors` is its other half."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    max_threads_per_block: int
    max_threads_per_multiprocessor: int
    warp_size: int
    shared_bytes_per_block: int
    l2_bytes: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """Stream-ordered memory of one device: what tensors hold, and what is kept for the next ones."""

    used_bytes: int
    used_high_bytes: int
    reserved_bytes: int
    reserved_high_bytes: int


def require_native() -> Any:
    """The native module.

    Raises:
        MissingExtraError: it was not built.
    """
    return load(
        "lltm_ray.kernels._native", install="LLTM_RAY_NATIVE=1 pip install .", feature="the native module (csrc/)"
    )


def cuda_version() -> int:
    """CUDA runtime version that the module was built with: 13000 is 13.0, 0 is none.

    Raises:
        MissingExtraError: the native module was not built.
    """
    return int(require_native().cuda_version())


def read_devices() -> tuple[NativeDevice, ...]:
    """Devices that this process may use; empty without CUDA or without a device.

    Raises:
        MissingExtraError: the native module was not built.
        NativeError: the CUDA runtime or driver is broken, in its own words.
    """
    names = NativeDevice.__dataclass_fields__
    found = require_native().devices()
    return tuple(NativeDevice(**{name: getattr(device, name) for name in names}) for device in found)


def current_device() -> int:
    """Index of the device that "cuda" means on this thread.

    Raises:
        DeviceError: the module was built without CUDA.
    """
    return int(require_native().current_device())


@contextmanager
def use_device(index: int) -> Iterator[None]:
    """Make a device the thread's current one for a while.

    Raises:
        DeviceError: there is no such device.
    """
    native = require_native()
    before = native.current_device()
    native.set_current_device(index)
    try:
        yield
    finally:
        native.set_current_device(before)


def synchronize(index: int, stream: int | None = None) -> None:
    """Wait for all work of a device, or of one of its streams.

    Raises:
        DeviceError: there is no such device.
        NativeError: the work failed, in CUDA's own words.
    """
    native = require_native()
    if stream is None:
        native.synchronize(index)
    else:
        native.synchronize_stream(index, stream)


def read_pool(index: int) -> PoolUse:
    """Memory that tensors of this process use on a device, and what is kept of what they used.

    Raises:
        DeviceError: there is no such device.
    """
    return PoolUse(**require_native().pool_use(index))


def trim_pool(index: int) -> None:
    """Give memory that no tensor holds back to the device, for other libraries; waits for the device's work.

    Raises:
        DeviceError: there is no such device.
    """
    require_native().trim_pool(index)
