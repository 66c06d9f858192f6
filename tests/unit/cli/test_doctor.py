from __future__ import annotations

import json
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lltm_ray.cli import app, doctor
from lltm_ray.cli.doctor import CHECKS, Finding, run_check
from lltm_ray.config import EngineConfig
from lltm_ray.errors import ServerBinaryError

CHILDLESS = [name for name in CHECKS if name not in ("ray", "llama-server", "embedded engine")]


def run_doctor(monkeypatch: pytest.MonkeyPatch, *argv: str, **checks: Callable[[], Finding]) -> Result:
    monkeypatch.setattr(doctor, "CHECKS", checks)
    return CliRunner().invoke(app, ["doctor", *argv])


def good() -> Finding:
    return Finding(state="ok", detail="fine [really]")


def bad() -> Finding:
    return Finding(state="bad", detail="broken", remedy="mend it")


def off() -> Finding:
    return Finding(state="off", detail="not here")


@pytest.mark.parametrize("name", CHILDLESS)
def test_every_check_comes_back_with_a_known_state_and_a_detail(name: str) -> None:
    found = run_check(CHECKS[name])
    assert found.state in ("ok", "warn", "off", "bad")
    assert found.detail


def test_slots_are_told_with_who_would_take_them() -> None:
    told = run_check(CHECKS["machine"]).detail
    assert "; quick_start starts " in told
    assert f"`lltm-ray up` takes {EngineConfig().n_parallel} slots each unless told" in told


def test_only_something_bad_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_doctor(monkeypatch, one=good, two=off).exit_code == 0
    assert run_doctor(monkeypatch, one=good, two=bad, three=off).exit_code == 1


def test_a_server_path_that_leads_nowhere_is_bad_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SERVER_PATH", "/no/such/llama-server")
    result = run_doctor(monkeypatch, "--json", **{"llama-server": CHECKS["llama-server"]})
    (found,) = json.loads(result.stdout)
    assert (result.exit_code, found["name"], found["state"]) == (1, "llama-server", "bad")
    assert "LLAMA_SERVER_PATH" in found["detail"]


def test_rows_show_state_detail_and_remedy_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_doctor(monkeypatch, one=good, two=bad).stdout.splitlines()
    assert lines[0].split() == ["ok", "one", "fine", "[really]"]
    assert lines[1].split() == ["bad", "two", "broken"]
    assert lines[2].split() == ["→", "mend", "it"]


def test_json_lists_every_check_with_four_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_doctor(monkeypatch, "--json", one=good, two=bad)
    assert json.loads(result.stdout) == [
        {"name": "one", "state": "ok", "detail": "fine [really]", "remedy": ""},
        {"name": "two", "state": "bad", "detail": "broken", "remedy": "mend it"},
    ]
    assert result.exit_code == 1


def test_a_check_that_raises_is_a_bad_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise OSError("no such luck")

    def ours() -> Finding:
        raise ServerBinaryError("LLAMA_SERVER_PATH names '/x', which does not exist")

    result = run_doctor(monkeypatch, one=broken, two=ours, three=good)
    assert "OSError: no such luck" in result.stdout
    assert "LLAMA_SERVER_PATH names '/x'" in result.stdout
    assert "fine" in result.stdout


def test_a_taken_port_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        config = doctor.GatewayConfig(port=holder.getsockname()[1])
        monkeypatch.setattr(doctor, "GatewayConfig", lambda: config)
        taken = run_check(CHECKS["gateway port"])
    assert (taken.state, str(config.port) in taken.detail) == ("warn", True)
    assert run_check(CHECKS["gateway port"]).state == "ok"


def test_few_open_files_are_warned_of_with_the_command_that_helps() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        found = run_check(CHECKS["open files"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.state, "ulimit -n" in found.remedy) == ("warn", True)


def test_a_cache_that_is_no_folder_is_bad_and_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path / "file" / "cache"))
    found = run_check(CHECKS["cache folder"])
    assert (found.state, "LLTM_RAY_CACHE" in found.remedy) == ("bad", True)
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path / "new"))
    assert run_check(CHECKS["cache folder"]).state in ("ok", "warn")


def test_an_extra_that_is_not_there_is_off_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]  # the import system's way to say absent
    found = run_check(CHECKS["extra torch"])
    assert (found.state, "lltm_ray[torch]" in found.remedy) == ("off", True)


def test_an_extra_that_is_there_but_breaks_on_import_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "graphistry.py").write_text("raise OSError('libcuda.so.1: cannot open')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "graphistry", raising=False)
    found = run_check(CHECKS["extra graphistry"])
    assert found.state == "warn"
    assert "libcuda.so.1" in found.detail


def test_a_required_package_that_is_gone_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _name: None)
    assert run_check(CHECKS["uvloop"]).state == "bad"


def test_ray_is_shown_with_the_cluster_it_would_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_module", lambda _name: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert run_check(CHECKS["ray"]).detail.endswith("RAY_ADDRESS=10.0.0.1:6379")
