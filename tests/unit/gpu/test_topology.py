"""What NVML says of links, on machines that are written down; the last test asks the real binding for our calls."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lltm_ray.cli import app
from lltm_ray.gpu import topology
from lltm_ray.gpu.topology import Links, Topology, ranges, read_topology
from tests.unit.gpu.scripted_nvml import ScriptedMachine, device, full, links

A, B, C = "00000000:17:00.0", "00000000:65:00.0", "00000000:CA:00.0"
SWITCH = "00000000:07:00.0"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*gpus: dict[str, Any], init_error: int = 0) -> ScriptedMachine:
        scripted = ScriptedMachine(list(gpus), init_error)
        monkeypatch.setitem(sys.modules, "pynvml", scripted)  # type: ignore[arg-type]
        return scripted

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def gpus_command(*argv: str) -> Result:
    return CliRunner().invoke(app, ["gpus", *argv], env={"COLUMNS": "220"})


def test_a_device_that_tells_all_is_described_in_our_units(script: Any) -> None:
    scripted = script(full("GPU-aa", A))
    gpu = read_topology().gpus[0]
    assert (gpu.name, gpu.bus_id, gpu.compute_capability) == ("NVIDIA T4", A.lower(), (7, 5))
    assert gpu.memory_bytes_s == pytest.approx(320e9, rel=0.001)  # its data sheet's figure
    assert gpu.flops == pytest.approx(8.1e12, rel=0.01)  # likewise
    assert (gpu.pcie_generation, gpu.pcie_generation_max, gpu.pcie_width) == (1, 3, 16)
    assert gpu.pcie_bytes_s == pytest.approx(15.76e9)
    assert (gpu.numa_node, gpu.cpus, gpu.mig_enabled) == (0, "0-3,64", False)
    assert set(gpu.untold) == {"links", "nvlink_bytes_s"}
    assert scripted.open == 0


def test_a_device_that_tells_nothing_has_none_and_the_drivers_reason(script: Any) -> None:
    one = device("GPU-aa")
    del one["nvmlDeviceGetMemoryInfo"], one["nvmlDeviceGetName"], one["nvmlDeviceGetPciInfo"]
    script(one)
    gpu = read_topology().gpus[0]
    fields = (
        "bus_id",
        "total_bytes",
        "compute_capability",
        "memory_bytes_s",
        "flops",
        "pcie_width",
        "numa_node",
        "cpus",
    )
    assert [getattr(gpu, name) for name in fields] == [None] * len(fields)
    assert (gpu.mig_enabled, gpu.links.active, gpu.pcie_bytes_s) == (None, 0, None)
    assert set(gpu.untold.values()) == {"Not Supported"}
    assert {"total_bytes", "free_bytes", "numa_node", "pcie_width", "cpus", "mig_enabled", "links"} <= set(gpu.untold)
    assert set(gpu.untold) <= {field.name for field in dataclasses.fields(gpu)}


def test_a_binding_without_a_function_is_a_reason(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(ScriptedMachine):
        def __getattr__(self, name: str) -> Any:
            if name == "nvmlDeviceGetNumaNodeId":
                raise AttributeError(name)
            return super().__getattr__(name)

    monkeypatch.setitem(sys.modules, "pynvml", Older([full("GPU-aa", A)]))  # type: ignore[arg-type]
    gpu = read_topology().gpus[0]
    assert gpu.numa_node is None
    assert gpu.untold["numa_node"] == "this nvidia-ml-py has no nvmlDeviceGetNumaNodeId"


def test_capabilities_are_compared_as_numbers(script: Any) -> None:
    script(full("GPU-aa", A, nvmlDeviceGetCudaComputeCapability=(12, 0)), full("GPU-bb", B))
    new, old = (gpu.compute_capability for gpu in read_topology().gpus)
    assert new is not None
    assert old is not None
    assert new > old  # as text "12.0" is less than "7.5"


@pytest.mark.parametrize(
    ("level", "word"), [(0, "INT"), (10, "PIX"), (20, "PXB"), (30, "PHB"), (40, "NODE"), (50, "SYS"), (99, "99")]
)
def test_pairs_without_nvlink_are_named_by_their_common_ancestor(script: Any, level: int, word: str) -> None:
    ancestor = {"nvmlDeviceGetTopologyCommonAncestor": {"GPU-bb": level}}
    script(full("GPU-aa", A, **ancestor, nvmlDeviceGetP2PStatus={("GPU-bb", 0): 0}), full("GPU-bb", B))
    pair = read_topology().pairs[0]
    assert (pair.word, pair.p2p, pair.bytes_s) == (word, "ok", pytest.approx(15.76e9))


def test_direct_nvlinks_are_counted_to_the_peer_they_reach(script: Any) -> None:
    to_b = links({0: (0, B), 1: (0, B), 2: (0, B), 3: (0, B), 4: (None, C)})
    to_a = links({0: (0, A), 1: (0, A), 2: (0, A), 3: (0, A)})
    script(full("GPU-aa", A, **to_b), full("GPU-bb", B, **to_a), full("GPU-cc", C))
    found = read_topology()
    assert found.gpus[0].links == Links(peers={B.lower(): 4, C.lower(): 1})
    words = [found.pair(*pair) for pair in ((0, 1), (2, 0), (1, 2))]
    assert [pair.word for pair in words if pair] == ["NV4", "NV1", "?"]
    pair = found.pair(1, 0)
    assert pair is not None
    assert pair.bytes_s == pytest.approx(4 * 26.562e9)


def test_nvlinks_to_switches_reach_every_gpu(script: Any) -> None:
    up = links(dict.fromkeys(range(18), (2, SWITCH)))
    fewer = links(dict.fromkeys(range(12), (2, SWITCH)))
    script(full("GPU-aa", A, **up), full("GPU-bb", B, **fewer), full("GPU-cc", C))
    assert [pair.word for pair in read_topology().pairs] == ["NV12", "?", "?"]


def test_links_whose_ends_are_hidden_count_where_the_driver_says_nvlink(script: Any) -> None:
    hidden = links(dict.fromkeys(range(4), (None, None)))
    says = {"nvmlDeviceGetP2PStatus": {("GPU-bb", 2): 0, ("GPU-bb", 0): 0, ("GPU-cc", 2): 5}}
    script(full("GPU-aa", A, **hidden, **says), full("GPU-bb", B, **hidden), full("GPU-cc", C, **hidden))
    assert [pair.word for pair in read_topology().pairs] == ["NV4", "?", "?"]


@pytest.mark.parametrize(
    ("status", "word"), [(0, "ok"), (4, "disabled"), (5, "not supported"), (77, "unknown"), (None, None)]
)
def test_peer_access_is_told_with_its_reason(script: Any, status: int | None, word: str | None) -> None:
    told = {} if status is None else {"nvmlDeviceGetP2PStatus": {("GPU-bb", 0): status}}
    script(full("GPU-aa", A, **told), full("GPU-bb", B))
    pair = read_topology().pairs[0]
    assert pair.p2p == word
    assert ("p2p" in pair.untold) == (status is None)


def test_mig_devices_are_listed_under_their_gpu(script: Any) -> None:
    size = SimpleNamespace(total=5 * 2**30, free=4 * 2**30, used=0)
    mig = {"nvmlDeviceGetUUID": "MIG-1", "nvmlDeviceGetMemoryInfo": size, "nvmlDeviceGetGpuInstanceId": 7}
    script(full("GPU-aa", A, nvmlDeviceGetMigMode=(1, 1), nvmlDeviceGetMaxMigDeviceCount=7, migs=[mig]))
    gpu = read_topology().gpus[0]
    assert gpu.mig_enabled
    (only,) = gpu.migs
    assert (only.uuid, only.gpu_instance, only.compute_instance, only.total_bytes) == ("MIG-1", 7, None, 5 * 2**30)


def test_a_lost_gpu_does_not_hide_the_others(script: Any) -> None:
    script(full("GPU-aa", A, lost=True), full("GPU-bb", B), full("GPU-cc", C))
    found = read_topology()
    assert [gpu.index for gpu in found.gpus] == [1, 2]
    assert [(pair.a, pair.b) for pair in found.pairs] == [(1, 2)]
    assert "GPU 0 cannot be read" in found.reason


@pytest.mark.parametrize(("code", "reason"), [(12, "no NVIDIA driver"), (9, "not loaded"), (4, "permission")])
def test_a_machine_without_a_driver_is_a_sentence_and_exit_code_0(script: Any, code: int, reason: str) -> None:
    script(init_error=code)
    assert read_topology() == Topology(reason=read_topology().reason)
    result = gpus_command()
    assert result.exit_code == 0
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_cpu_lists_are_written_as_the_kernel_does() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 5, 8, 9]) == "0-2,5,8-9"


def test_the_command_shows_devices_pairs_and_ids(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    up = links(dict.fromkeys(range(2), (2, SWITCH)))
    script(full("GPU-aa", A, **up), full("GPU-bb", B, **up))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    shown = gpus_command().stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["GPU0", "X", "NV2"] in rows
    assert ["GPU1", "NV2", "X"] in rows
    assert "gen1 x16 (gen3 x16)" in shown
    assert "NV#: so many NVLinks" in shown
    told = json.loads(gpus_command("--json").stdout)
    assert told["visible"] == {"GPU-bb": {"cuda": 0, "ray": "1"}}
    assert [gpu["uuid"] for gpu in told["gpus"]] == ["GPU-aa", "GPU-bb"]
    assert told["pairs"][0]["nvlinks"] == 2
    assert "environment" in told["nccl"]


def test_every_nvml_function_asked_for_links_exists_in_the_real_binding() -> None:
    pynvml = importlib.import_module("pynvml")
    source = Path(topology.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"\bnvmlDeviceGet\w+", source))
    assert len(names) > 20
    assert {name for name in names if not hasattr(pynvml, name)} == set()
    assert pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON == topology._NVLINK_MBPS
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (topology._SM, topology._MEM)
    assert pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH == topology._TO_SWITCH
    assert pynvml.NVML_TOPOLOGY_SYSTEM in topology._LEVELS
