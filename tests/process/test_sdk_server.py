"""One real server without Ray, by the familiar calls."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lltm_ray.errors import EngineNotReadyError, EngineStartError, LltmRayError, ModelNotFoundError
from lltm_ray.sdk.server import ServerManager


@pytest.fixture
def manager(tmp_path, monkeypatch):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    with ServerManager() as manager:
        yield manager
    assert not list(tmp_path.glob("run/**/*.key")), "a key was left behind"


def test_a_server_starts_answers_and_ends(manager):
    assert not manager.is_running
    with pytest.raises(EngineNotReadyError, match="start_server"):
        _ = manager.client
    manager.start_server("tiny", n_parallel=2, ctx_size=1024)
    info = manager.get_server_info()
    assert (info["state"], info["n_parallel"], info["n_ctx"], info["model"]) == ("ready", 2, 1024, "tiny")
    assert manager.check_server_health()
    assert len(manager.client.slots()) == 2
    assert manager.client.complete("hi", n_predict=4, ignore_eos=True).usage.output_tokens == 4
    manager.stop_server()
    assert not manager.is_running
    assert not manager.check_server_health()
    with pytest.raises(ProcessLookupError):
        os.kill(info["pid"], 0)


def test_another_model_ends_the_server_that_runs(manager):
    first = manager.start_server("tiny").pid
    second = manager.start_server("tiny", n_parallel=3).pid
    assert first != second
    assert len(manager.client.slots()) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_start_that_is_refused_leaves_the_server_that_runs(manager, tmp_path):
    pid = manager.start_server("tiny", n_parallel=2).pid
    for model, settings, words in (
        ("tiny", {"n_paralel": 4}, r"n_paralel=4: .*did you mean n_parallel\?"),
        ("tiny", {"gpu_layers": 4}, r"gpu_layers=4: .*gpus=1"),
        (str(tmp_path / "absent.gguf"), {}, "no such file"),
        ("tinny", {}, "did you mean tiny"),
    ):
        with pytest.raises(LltmRayError, match=words):
            manager.start_server(model, **settings)
    assert manager.get_server_info()["pid"] == pid
    assert manager.client.complete("hi", n_predict=2, ignore_eos=True).usage.output_tokens == 2


def test_a_restart_keeps_the_settings(manager):
    before = manager.start_server("tiny", n_parallel=2).pid
    assert manager.client.health()
    after = manager.restart_server().pid
    assert after != before
    assert len(manager.client.slots()) == 2


def test_a_server_that_is_killed_comes_back(manager):
    pid = manager.start_server("tiny").pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (info := manager.get_server_info())["state"] != "ready" or info["pid"] == pid:
        assert time.monotonic() < deadline, info
        time.sleep(0.05)
    assert manager.client.complete("hi", n_predict=2, ignore_eos=True).usage.output_tokens == 2


def test_what_cannot_start_leaves_nothing_behind(manager, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        manager.start_server(str(tmp_path / "absent.gguf"))
    with pytest.raises(EngineStartError):
        manager.start_server("tiny", extra_args=("--no-such-flag",))
    assert not manager.is_running
    manager.start_server("tiny")
    assert manager.is_running


def is_alive(pid):
    """Not so once it is a zombie: nobody may be there to reap an orphan."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_its_server_dies_with_the_program_and_ray_is_never_imported(tmp_path):
    script = (
        "import sys; from lltm_ray.sdk.server import ServerManager; m = ServerManager();"
        "print(m.start_server('tiny').pid, 'ray' in sys.modules, flush=True); sys.stdin.read()"
    )
    env = os.environ | {"LLTM_RAY_CACHE": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        pid, has_ray = child.stdout.readline().split()
        child.kill()
    assert has_ray == "False"
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, "it outlived its program"
        time.sleep(0.05)
