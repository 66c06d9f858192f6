"""A `pynvml` of which the whole machine is written down: what a driver would tell."""

# ruff: noqa: N802 - the names are NVML's

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__("Not Supported" if value == 3 else f"code {value}")
        self.value = value


class ScriptedMachine:
    """Functions over a list of GPUs, each a dict of answers by function name; a missing one is 'not supported' (3).

    An answer that is a dict is looked up by the call's next argument: a link, a clock, another GPU's UUID.
    """

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, gpus: list[dict[str, Any]], init_error: int = 0) -> None:
        self.gpus, self.init_error, self.open = gpus, init_error, 0

    def nvmlInit(self) -> None:
        if self.init_error:
            raise NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.open > 0, "NVML was asked outside a session"
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if self.gpus[index].get("lost"):
            raise NVMLError(15)
        return self.gpus[index]

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: dict[str, Any], place: int) -> dict[str, Any]:
        if place >= len(gpu["migs"]):
            raise NVMLError(6)
        handle: dict[str, Any] = gpu["migs"][place]
        return handle

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def ask(gpu: dict[str, Any], *args: Any) -> Any:
            if name not in gpu:
                raise NVMLError(3)
            answer = gpu[name]
            if isinstance(answer, dict):
                key = args[0]["nvmlDeviceGetUUID"] if isinstance(args[0], dict) else args[0]
                key = (key, *args[1:]) if (key, *args[1:]) in answer else key
                if key not in answer:
                    raise NVMLError(3)
                return answer[key]
            return answer

        return ask


def device(uuid: str, bus: str = "00000000:17:00.0", **more: Any) -> dict[str, Any]:
    """A GPU that tells the least that any does."""
    return {
        "nvmlDeviceGetUUID": uuid,
        "nvmlDeviceGetName": b"NVIDIA T4",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=16 * 2**30, free=15 * 2**30, used=2**30),
        "nvmlDeviceGetPciInfo": SimpleNamespace(busId=bus.encode()),
    } | more


def full(uuid: str, bus: str, **more: Any) -> dict[str, Any]:
    """One that tells all, with a T4's figures."""
    told = {
        "nvmlDeviceGetCudaComputeCapability": (7, 5),
        "nvmlDeviceGetMaxClockInfo": {2: 5001, 1: 1590},
        "nvmlDeviceGetMemoryBusWidth": 256,
        "nvmlDeviceGetNumGpuCores": 2560,
        "nvmlDeviceGetCurrPcieLinkGeneration": 1,
        "nvmlDeviceGetMaxPcieLinkGeneration": 3,
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetNumaNodeId": 0,
        "nvmlDeviceGetCpuAffinity": [0b1111, 0b1],
        "nvmlDeviceGetMigMode": (0, 0),
    }
    return device(uuid, bus, **(told | more))


def links(to: dict[int, tuple[int | None, str | None]], mbps: int = 26_562) -> dict[str, Any]:
    """NVLinks that are up: link -> (kind of what is at its end, its bus id)."""
    kinds = {link: kind for link, (kind, _) in to.items() if kind is not None}
    buses = {link: SimpleNamespace(busId=bus.encode()) for link, (_, bus) in to.items() if bus is not None}
    return {
        "nvmlDeviceGetNvLinkState": {link: int(link in to) for link in range(18)},
        "nvmlDeviceGetNvLinkRemoteDeviceType": kinds,
        "nvmlDeviceGetNvLinkRemotePciInfo": buses,
        "nvmlDeviceGetFieldValues": [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=mbps))],
    }
