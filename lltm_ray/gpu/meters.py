"""What the GPUs of this machine are doing: one pass over all devices and all their meters."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lltm_ray.gpu.nvml import Device, ask, devices, session, text

_CORRECTED, _UNCORRECTED, _SINCE_BOOT = 0, 1, 0  # nvmlMemoryErrorType_t, nvmlEccCounterType_t (volatile) of nvml.h
_PCIE_SENT, _PCIE_RECEIVED = 197, 198  # NVML_FI_DEV_PCIE_COUNT_TX_BYTES, _RX_BYTES of nvml.h


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One look at one device. None: this device does not tell (a MIG device has no power meter of its own)."""

    index: int
    uuid: str
    at_unix_nano: int
    name: str = ""
    driver: str = ""
    utilization_ratio: float | None = None
    """Share of the last sampling period (1/6 to 1 s) in which a kernel ran."""
    encoder_ratio: float | None = None
    decoder_ratio: float | None = None
    total_bytes: int | None = None
    used_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    """Enforced now, whoever set it."""
    temperature_c: float | None = None
    energy_j: float | None = None
    """Since the driver was loaded, to the millijoule; differences are exact, unlike sums of `power_w`."""
    throttle: int | None = None
    """Why the clocks are where they are: bits `nvmlClocksEventReason*`."""
    pcie_sent_bytes: int | None = None
    """By the GPU, since the driver was loaded."""
    pcie_received_bytes: int | None = None
    ecc_corrected: int | None = None
    """Since the driver was loaded."""
    ecc_uncorrected: int | None = None
    process_bytes: dict[int, int] = field(default_factory=dict)
    """Device memory by process id, the host's; 0 where the driver does not tell."""


def read_samples() -> tuple[GpuSample, ...]:
    """What every device is doing now, in `read_inventory`'s order.

    Raises:
        MissingExtraError: pynvml is not installed.
        pynvml.NVMLError: there is no driver, or it refuses us.
    """
    with session() as nvml:
        driver = text(ask(nvml, nvml.nvmlSystemGetDriverVersion) or "")
        return tuple(_sample(nvml, device, driver) for device in devices(nvml, []))


def _sample(nvml: Any, device: Device, driver: str) -> GpuSample:
    handle = device.handle
    rates = ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    memory = ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    sent, received = _pcie(nvml, handle)
    return GpuSample(
        index=device.index,
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
        at_unix_nano=time.time_ns(),
        name=text(ask(nvml, nvml.nvmlDeviceGetName, handle) or ""),
        driver=driver,
        utilization_ratio=None if rates is None else rates.gpu / 100,
        encoder_ratio=_percent(ask(nvml, nvml.nvmlDeviceGetEncoderUtilization, handle)),
        decoder_ratio=_percent(ask(nvml, nvml.nvmlDeviceGetDecoderUtilization, handle)),
        total_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        power_w=_thousandths(ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)),
        power_limit_w=_thousandths(ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
        temperature_c=ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        energy_j=_thousandths(ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle)),
        throttle=ask(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
        pcie_sent_bytes=sent,
        pcie_received_bytes=received,
        ecc_corrected=ask(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, _CORRECTED, _SINCE_BOOT),
        ecc_uncorrected=ask(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, _UNCORRECTED, _SINCE_BOOT),
        process_bytes=_processes(nvml, handle),
    )


def _processes(nvml: Any, handle: Any) -> dict[int, int]:
    used: dict[int, int] = {}
    for process in ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ():
        used[int(process.pid)] = used.get(int(process.pid), 0) + int(process.usedGpuMemory or 0)
    return used


def _pcie(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    """Counters, not `nvmlDeviceGetPcieThroughput`, which takes 20 ms each time to measure a rate."""
    values = ask(nvml, nvml.nvmlDeviceGetFieldValues, handle, [_PCIE_SENT, _PCIE_RECEIVED])
    if values is None:
        return None, None
    sent, received = (int(each.value.ullVal) if each.nvmlReturn == 0 else None for each in values)
    return sent, received


def _percent(told: Any) -> float | None:
    """Of (percent, sampling period in us)."""
    return None if told is None else float(told[0]) / 100


def _thousandths(told: float | None) -> float | None:
    return None if told is None else told / 1e3
