"""Libraries that are compiled here stand for NCCL: the version comes from their own function."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app, doctor
from lltm_ray.gpu.nccl import ask_version, decode_version, read_nccl

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    def make(body: str, name: str = "libnccl.so.2") -> Path:
        folder = tmp_path_factory.mktemp("nccl")
        (folder / "nccl.cpp").write_text(f'extern "C" int {body}')
        subprocess.run(["c++", "-shared", "-fPIC", "-o", folder / name, folder / "nccl.cpp"], check=True)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("code", "version"),
    [(2708, (2, 7, 8)), (21003, (2, 10, 3)), (22705, (2, 27, 5)), (23203, (2, 32, 3)), (30102, (3, 1, 2))],
)
def test_both_schemes_of_version_codes_are_read(code: int, version: tuple[int, int, int]) -> None:
    assert decode_version(code) == version


def test_the_version_is_what_the_library_says(build: Build) -> None:
    path = build("ncclGetVersion(int* version) { *version = 22907; return 0; }")
    found = read_nccl({"LD_LIBRARY_PATH": f"/nowhere:{path.parent}", "NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"})
    if found.origin.startswith("wheel"):  # an environment that has the real one
        found = read_nccl({"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"})
        assert found.version is not None
    else:
        assert (found.version_text, found.origin, found.path) == ("2.29.7", "LD_LIBRARY_PATH", str(path))
    assert found.environment == {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}


def test_a_library_that_cannot_say_has_a_reason(build: Build, tmp_path: Path) -> None:
    (tmp_path / "libnccl.so.2").write_bytes(b"not a library")
    assert "not usable" in ask_version(tmp_path / "libnccl.so.2")[1]
    assert "ncclGetVersion" in ask_version(build("something() { return 0; }"))[1]
    assert ask_version(build("ncclGetVersion(int*) { return 5; }"))[1].endswith("failed with 5")


def test_the_doctor_says_what_it_found_and_json_has_it_too(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build("ncclGetVersion(int* version) { *version = 22907; return 0; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(path.parent))
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    finding = doctor.CHECKS["nccl"]()
    assert finding.state == "ok"
    assert finding.detail.endswith("NCCL_P2P_DISABLE=1")
    told = json.loads(CliRunner().invoke(app, ["gpus", "--json"]).stdout)["nccl"]
    assert told["environment"]["NCCL_P2P_DISABLE"] == "1"
    assert told["version"] is not None


def test_no_library_is_an_option_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lltm_ray.gpu.nccl._places", lambda _: iter(()))
    finding = doctor.CHECKS["nccl"]()
    assert finding.state == "off"
    assert "pip install" in finding.detail
