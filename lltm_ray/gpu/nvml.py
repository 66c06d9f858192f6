"""What NVML says: which devices there are, and why there are none; what they are doing is in `meters`.

The only file that imports `pynvml`. NVML counts its users, so nested sessions cost next to nothing: a sampler that
ticks should keep one `session()` open around its loop (a lone init takes tens of milliseconds on a large machine).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from lltm_ray import _optional
from lltm_ray.errors import MissingExtraError
from lltm_ray.records import GpuInfo

_T = TypeVar("_T")
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


@dataclass(frozen=True, slots=True)
class Device:
    """One that computes; `handle` is NVML's."""

    index: int
    handle: Any


@contextmanager
def session() -> Iterator[Any]:
    """Hold NVML open; yields the `pynvml` module.

    Raises:
        MissingExtraError: pynvml is not installed.
        pynvml.NVMLError: there is no driver, or it refuses us.
    """
    nvml = _optional.load("pynvml", install="pip install nvidia-ml-py", feature="reading GPUs")
    nvml.nvmlInit()
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def read_inventory() -> Inventory:
    """List this machine's devices; MIG devices stand in for a GPU in MIG mode. An absent GPU is a reason, no error."""
    found = attempt(_list)
    return Inventory(reason=found) if isinstance(found, str) else found


def attempt(work: Callable[[Any], _T]) -> _T | str:
    """What `work` makes of the `pynvml` module in a session, or in one sentence why NVML cannot be asked."""
    try:
        nvml = _optional.load("pynvml", install="pip install nvidia-ml-py", feature="reading GPUs")
    except MissingExtraError as error:
        return error.message
    try:
        with session():
            return work(nvml)
    except nvml.NVMLError as error:
        return _why(error)


def processes_memory(uuid: str) -> dict[int, int]:
    """Device memory of each process on the device: `{pid: bytes}`; 0 bytes where the driver does not tell.

    Process ids are the host's, so inside a container they may name none of its own. No such device gives `{}`.

    Raises:
        MissingExtraError: pynvml is not installed.
        pynvml.NVMLError: there is no driver, or it refuses us.
    """
    used: dict[int, int] = {}
    with session() as nvml:
        for device in devices(nvml, []):
            if text(nvml.nvmlDeviceGetUUID(device.handle)) != uuid:
                continue
            for process in ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, device.handle) or ():
                used[int(process.pid)] = used.get(int(process.pid), 0) + int(process.usedGpuMemory or 0)
    return used


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
    driver = text(ask(nvml, nvml.nvmlSystemGetDriverVersion) or "")
    gpus = []
    for device in devices(nvml, lost):
        try:
            gpus.append(_info(nvml, device, driver))
        except nvml.NVMLError as error:
            lost.append(f"GPU {device.index} cannot be read: {error}")
    return Inventory(gpus=tuple(gpus), reason="; ".join(lost) or ("" if gpus else "the NVIDIA driver lists no devices"))


def _info(nvml: Any, device: Device, driver: str) -> GpuInfo:
    memory = ask(nvml, nvml.nvmlDeviceGetMemoryInfo, device.handle)  # unified memory (Grace, Jetson) has none to tell
    return GpuInfo(
        index=device.index,
        uuid=text(nvml.nvmlDeviceGetUUID(device.handle)),
        name=text(nvml.nvmlDeviceGetName(device.handle)),
        total_bytes=int(memory.total) if memory else 0,
        free_bytes=int(memory.free) if memory else 0,
        compute_capability=_capability(nvml, device),
        driver=driver,
    )


def _capability(nvml: Any, device: Device) -> tuple[int, int]:
    major, minor = ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, device.handle) or (0, 0)
    return int(major), int(minor)


def devices(nvml: Any, lost: list[str]) -> Iterator[Device]:
    """Every device that computes: whole GPUs, and the MIG devices of those in MIG mode; `lost` gains the unreadable."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:  # one GPU off the bus must not hide the others
            lost.append(f"GPU {index} cannot be read: {error}")
            continue
        current, _pending = ask(nvml, nvml.nvmlDeviceGetMigMode, handle) or (0, 0)
        if not current:
            yield Device(index, handle)
            continue
        for place in range(ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            mig = ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
            if mig is not None:
                yield Device(index, mig)


def ask(nvml: Any, call: Callable[..., Any], *args: Any) -> Any:
    """The answer, or None where this device, driver or user does not get one."""
    try:
        return call(*args)
    except nvml.NVMLError:
        return None


def text(value: str | bytes) -> str:
    """Bindings before 11.5 gave bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _why(error: Any) -> str:
    return _REASONS.get(getattr(error, "value", 0), f"NVML failed: {error}")
