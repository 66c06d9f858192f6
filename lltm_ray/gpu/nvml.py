"""What NVML says: which devices there are, why there are none, and what they are doing now.

The only file that speaks to `pynvml`. NVML counts its users, so nested sessions cost next to nothing: a sampler that
ticks should keep one `session()` open around its loop (a lone init takes tens of milliseconds on a large machine).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lltm_ray import _optional
from lltm_ray.errors import MissingExtraError
from lltm_ray.records import GpuInfo

_LIBRARY_NOT_FOUND, _DRIVER_NOT_LOADED, _NO_PERMISSION, _VERSION_MISMATCH = 12, 9, 4, 18  # nvmlReturn_t of nvml.h
_REASONS = {
    _LIBRARY_NOT_FOUND: "no NVIDIA driver is installed here (libnvidia-ml.so.1 is missing)",
    _DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded",
    _NO_PERMISSION: "no permission to ask the NVIDIA driver; add this user to the group of /dev/nvidia*",
    _VERSION_MISMATCH: "the NVIDIA driver and its library differ in version; reboot after a driver update",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The devices of this machine; `reason` is one sentence for what is missing, empty when all were read."""

    gpus: tuple[GpuInfo, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One look at one device. None: this device does not tell (a MIG device has no power meter of its own)."""

    index: int
    uuid: str
    at_unix_nano: int
    utilization_ratio: float | None = None
    """Share of the last sampling period (1/6 to 1 s) in which a kernel ran."""
    used_bytes: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    energy_mj: int | None = None
    """Millijoules since the driver was loaded; differences of two samples are exact, unlike sums of `power_w`."""


@dataclass(frozen=True, slots=True)
class _Device:
    index: int
    handle: Any


@contextmanager
def session() -> Iterator[Any]:
    """Hold NVML open; yields the `pynvml` module.

    Raises:
        MissingExtraError: pynvml is not installed.
        pynvml.NVMLError: there is no driver, or it refuses us.
    """
    nvml = _optional.load("pynvml", extra="nvml", feature="reading GPUs")
    nvml.nvmlInit()
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def read_inventory() -> Inventory:
    """List this machine's devices; MIG devices stand in for a GPU in MIG mode. An absent GPU is a reason, no error."""
    try:
        nvml = _optional.load("pynvml", extra="nvml", feature="reading GPUs")
    except MissingExtraError as error:
        return Inventory(reason=error.message)
    try:
        with session():
            return _list(nvml)
    except nvml.NVMLError as error:
        return Inventory(reason=_why(error))


def processes_memory(uuid: str) -> dict[int, int]:
    """Device memory of each process on the device: `{pid: bytes}`; 0 bytes where the driver does not tell.

    Process ids are the host's, so inside a container they may name none of its own. No such device gives `{}`.

    Raises:
        MissingExtraError: pynvml is not installed.
        pynvml.NVMLError: there is no driver, or it refuses us.
    """
    used: dict[int, int] = {}
    with session() as nvml:
        for device in _devices(nvml, []):
            if _text(nvml.nvmlDeviceGetUUID(device.handle)) != uuid:
                continue
            for process in _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, device.handle) or ():
                used[int(process.pid)] = used.get(int(process.pid), 0) + int(process.usedGpuMemory or 0)
    return used


def read_samples() -> tuple[GpuSample, ...]:
    """What every device is doing now, in `read_inventory`'s order.

    Raises:
        MissingExtraError: pynvml is not installed.
        pynvml.NVMLError: there is no driver, or it refuses us.
    """
    with session() as nvml:
        return tuple(_sample(nvml, device) for device in _devices(nvml, []))


def visible(inventory: Inventory, cuda_visible_devices: str | None) -> tuple[GpuInfo, ...]:
    """The devices that a process with this CUDA_VISIBLE_DEVICES sees, in its order.

    As CUDA reads it (CUDA C++ Programming Guide, environment variables): unset is all, the list ends at its first
    entry that names no device, and an entry is an index or the unique beginning of a `GPU-` or `MIG-` UUID. A device
    named twice leaves none. Indices follow the bus order (`CUDA_DEVICE_ORDER=PCI_BUS_ID`, NVML's own), which is
    CUDA's default order too where all GPUs are alike.
    """
    if cuda_visible_devices is None:
        return inventory.gpus
    chosen: list[GpuInfo] = []
    for entry in cuda_visible_devices.split(","):
        gpu = _named(inventory.gpus, entry.strip())
        if gpu is None:
            break
        if gpu in chosen:
            return ()
        chosen.append(gpu)
    return tuple(chosen)


def _named(gpus: tuple[GpuInfo, ...], entry: str) -> GpuInfo | None:
    if entry.isascii() and entry.isdigit():
        # A GPU in MIG mode is listed as its MIG devices; CUDA takes the first of them for its index.
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    matches = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _list(nvml: Any) -> Inventory:
    lost: list[str] = []
    driver = _text(_ask(nvml, nvml.nvmlSystemGetDriverVersion) or "")
    gpus = []
    for device in _devices(nvml, lost):
        try:
            gpus.append(_info(nvml, device, driver))
        except nvml.NVMLError as error:
            lost.append(f"GPU {device.index} cannot be read: {error}")
    return Inventory(gpus=tuple(gpus), reason="; ".join(lost) or ("" if gpus else "the NVIDIA driver lists no devices"))


def _info(nvml: Any, device: _Device, driver: str) -> GpuInfo:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, device.handle)  # unified memory (Grace, Jetson) has none to tell
    return GpuInfo(
        index=device.index,
        uuid=_text(nvml.nvmlDeviceGetUUID(device.handle)),
        name=_text(nvml.nvmlDeviceGetName(device.handle)),
        total_bytes=int(memory.total) if memory else 0,
        free_bytes=int(memory.free) if memory else 0,
        compute_capability=_capability(nvml, device),
        driver=driver,
    )


def _capability(nvml: Any, device: _Device) -> tuple[int, int]:
    major, minor = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, device.handle) or (0, 0)
    return int(major), int(minor)


def _sample(nvml: Any, device: _Device) -> GpuSample:
    handle = device.handle
    rates = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    return GpuSample(
        index=device.index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        at_unix_nano=time.time_ns(),
        utilization_ratio=None if rates is None else rates.gpu / 100,
        used_bytes=None if memory is None else int(memory.used),
        power_w=None if power_mw is None else power_mw / 1e3,
        temperature_c=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        energy_mj=_ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle),
    )


def _devices(nvml: Any, lost: list[str]) -> Iterator[_Device]:
    """Every device that computes: whole GPUs, and the MIG devices of those in MIG mode; `lost` gains the unreadable."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:  # one GPU off the bus must not hide the others
            lost.append(f"GPU {index} cannot be read: {error}")
            continue
        current, _pending = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle) or (0, 0)
        if not current:
            yield _Device(index, handle)
            continue
        for place in range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            mig = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
            if mig is not None:
                yield _Device(index, mig)


def _ask(nvml: Any, call: Callable[..., Any], *args: Any) -> Any:
    """The answer, or None where this device, driver or user does not get one."""
    try:
        return call(*args)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    """Bindings before 11.5 gave bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _why(error: Any) -> str:
    return _REASONS.get(getattr(error, "value", 0), f"NVML failed: {error}")
