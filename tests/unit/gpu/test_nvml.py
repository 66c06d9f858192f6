"""NVML's library needs a driver, so a scripted one with the binding's own names tells what a driver would."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lltm_ray.gpu import nvml
from lltm_ray.gpu.meters import read_samples
from lltm_ray.gpu.nvml import Inventory, processes_memory, read_inventory, session, visible
from lltm_ray.records import GpuInfo
from tests.unit.gpu.scripted_nvml import ScriptedMachine


def gpu(uuid: str | bytes, **more: Any) -> dict[str, Any]:
    return {
        "nvmlDeviceGetUUID": uuid,
        "nvmlDeviceGetName": b"NVIDIA T4" if isinstance(uuid, bytes) else "NVIDIA T4",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=16 * 2**30, free=15 * 2**30, used=2**30),
        "nvmlDeviceGetCudaComputeCapability": (7, 5),
    } | more


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*gpus: dict[str, Any], init_error: int = 0) -> ScriptedMachine:
        scripted = ScriptedMachine(list(gpus), init_error)
        monkeypatch.setitem(sys.modules, "pynvml", scripted)  # type: ignore[arg-type]
        return scripted

    return install


def test_this_machine_lists_gpus_or_says_in_a_sentence_why_not() -> None:
    inventory = read_inventory()
    assert inventory.gpus or len(inventory.reason.split()) > 3


def test_a_missing_package_is_a_reason_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]  # the import system's way to say absent
    assert "pip install nvidia-ml-py" in read_inventory().reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [(12, "no NVIDIA driver"), (9, "not loaded"), (4, "permission"), (18, "reboot"), (999, "code 999")],
)
def test_each_way_to_have_no_driver_has_its_own_reason(script: Any, code: int, reason: str) -> None:
    scripted = script(init_error=code)
    inventory = read_inventory()
    assert inventory.gpus == ()
    assert reason in inventory.reason
    assert scripted.open == 0


def test_a_driver_without_devices_is_a_reason_too(script: Any) -> None:
    script()
    assert read_inventory() == Inventory(reason="the NVIDIA driver lists no devices")


@pytest.mark.parametrize("uuid", ["GPU-aa", b"GPU-aa"])
def test_bindings_that_give_bytes_and_those_that_give_text_read_alike(script: Any, uuid: str | bytes) -> None:
    scripted = script(gpu(uuid))
    inventory = read_inventory()
    assert inventory == Inventory(
        gpus=(
            GpuInfo(
                index=0,
                uuid="GPU-aa",
                name="NVIDIA T4",
                total_bytes=16 * 2**30,
                free_bytes=15 * 2**30,
                compute_capability=(7, 5),
                driver="580.1",
            ),
        )
    )
    assert scripted.open == 0


def test_a_lost_gpu_does_not_hide_the_others_and_is_named(script: Any) -> None:
    script(gpu("GPU-aa", lost=True), gpu("GPU-bb"))
    inventory = read_inventory()
    assert [(info.index, info.uuid) for info in inventory.gpus] == [(1, "GPU-bb")]
    assert inventory.reason == "GPU 0 cannot be read: code 15"


def test_a_gpu_in_mig_mode_is_listed_as_its_mig_devices(script: Any) -> None:
    migs = [gpu("MIG-11"), gpu("MIG-22")]
    script(
        gpu("GPU-aa", nvmlDeviceGetMigMode=(1, 1), nvmlDeviceGetMaxMigDeviceCount=7, migs=migs),
        gpu("GPU-bb", nvmlDeviceGetMigMode=(0, 0)),
    )
    assert [(info.index, info.uuid) for info in read_inventory().gpus] == [(0, "MIG-11"), (0, "MIG-22"), (1, "GPU-bb")]


def test_unified_memory_that_nvml_cannot_size_is_zero_bytes(script: Any) -> None:
    one = gpu("GPU-aa")
    del one["nvmlDeviceGetMemoryInfo"]
    script(one)
    assert read_inventory().gpus[0].total_bytes == 0
    assert read_samples()[0].used_bytes is None


def test_a_sample_holds_what_the_device_tells_in_our_units(script: Any) -> None:
    script(
        gpu(
            "GPU-aa",
            nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=42, memory=7),
            nvmlDeviceGetPowerUsage=70_500,
            nvmlDeviceGetTemperature=55,
            nvmlDeviceGetTotalEnergyConsumption=123_456,
            nvmlDeviceGetEnforcedPowerLimit=100_000,
            nvmlDeviceGetEncoderUtilization=[3, 1_000],
            nvmlDeviceGetCurrentClocksEventReasons=0x40,
            nvmlDeviceGetTotalEccErrors=2,
            nvmlDeviceGetFieldValues=[
                SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal=2**40)),
                SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(ullVal=0)),
            ],
            nvmlDeviceGetComputeRunningProcesses=[SimpleNamespace(pid=7, usedGpuMemory=100)],
        ),
        gpu("GPU-bb"),
    )
    full, bare = read_samples()
    assert (full.utilization_ratio, full.used_bytes, full.power_w) == (0.42, 2**30, 70.5)
    assert (full.temperature_c, full.energy_j, full.power_limit_w) == (55, 123.456, 100.0)
    assert (full.encoder_ratio, full.decoder_ratio) == (0.03, None)
    assert (full.throttle, full.ecc_corrected, full.process_bytes) == (0x40, 2, {7: 100})
    assert (full.pcie_sent_bytes, full.pcie_received_bytes) == (2**40, None)
    assert full.at_unix_nano > 0
    assert (bare.pcie_sent_bytes, bare.process_bytes) == (None, {})
    assert (bare.uuid, bare.power_w, bare.utilization_ratio, bare.energy_j) == ("GPU-bb", None, None, None)


def test_memory_of_processes_is_added_up_per_pid_of_that_device_only(script: Any) -> None:
    processes = [SimpleNamespace(pid=7, usedGpuMemory=100), SimpleNamespace(pid=8, usedGpuMemory=None)]
    processes.append(SimpleNamespace(pid=7, usedGpuMemory=11))
    other = [SimpleNamespace(pid=9, usedGpuMemory=5)]
    script(
        gpu(b"GPU-aa", nvmlDeviceGetComputeRunningProcesses=processes),
        gpu("GPU-bb", nvmlDeviceGetComputeRunningProcesses=other),
    )
    assert processes_memory("GPU-aa") == {7: 111, 8: 0}
    assert processes_memory("GPU-zz") == {}


def test_a_session_is_closed_also_after_an_error_inside_it(script: Any) -> None:
    scripted = script(gpu("GPU-aa"))
    with session():
        assert read_samples()
        assert scripted.open == 1
    with pytest.raises(ZeroDivisionError), session():
        1 / 0  # noqa: B018
    assert scripted.open == 0


def info(index: int, uuid: str) -> GpuInfo:
    return GpuInfo(index=index, uuid=uuid, name="g", total_bytes=1, free_bytes=1)


@pytest.mark.parametrize(
    ("entries", "seen"),
    [
        (None, ["GPU-aa1", "GPU-aa2", "MIG-3", "MIG-4"]),
        ("", []),
        ("-1", []),
        ("1,0", ["GPU-aa2", "GPU-aa1"]),
        (" 1 , 0 ", ["GPU-aa2", "GPU-aa1"]),
        ("0,9,1", ["GPU-aa1"]),
        ("0,-1,1", ["GPU-aa1"]),
        ("0,0", []),
        ("0,GPU-aa1", []),
        ("GPU-aa2", ["GPU-aa2"]),
        ("GPU-aa", []),
        ("GPU-", []),
        ("2", ["MIG-3"]),
        ("MIG-4,MIG-3", ["MIG-4", "MIG-3"]),
        ("NoDevFiles", []),
        ("²", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(entries: str | None, seen: list[str]) -> None:
    inventory = Inventory(gpus=(info(0, "GPU-aa1"), info(1, "GPU-aa2"), info(2, "MIG-3"), info(2, "MIG-4")))
    assert [gpu.uuid for gpu in visible(inventory, entries)] == seen


def test_every_nvml_function_we_call_exists_in_the_real_binding() -> None:
    pynvml = importlib.import_module("pynvml")
    source = Path(nvml.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"nvml\.((?:nvml|NVML)\w+)", source))
    assert len(names) > 10
    assert {name for name in names if not hasattr(pynvml, name)} == set()
