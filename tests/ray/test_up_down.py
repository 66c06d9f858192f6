"""The command line as a user types it: up, status, chat, bench, down, each a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from lltm_ray.actors.runstate import RunState
from tests.ray.conftest import held_port, servers

pytestmark = pytest.mark.timeout(400)


def lltm(*arguments, check=True, **options):
    done = subprocess.run(
        [sys.executable, "-m", "lltm_ray.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """These commands start and end a Ray of their own."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_worker_niceness", raising=False)


def test_a_detached_fleet_is_seen_used_and_taken_down(cache):
    before = servers()
    up = lltm("up", "--model", "random", "--engines", "2", "--port", "0", "--name", "cli", "--detach")
    try:
        url = re.fullmatch(r"cli is ready at (http://127\.0\.0\.1:\d+)\n", up.stdout)[1]
        status = json.loads(lltm("status", "--name", "cli", "--json").stdout)
        assert [engine["state"] for engine in status["engines"]] == ["ready", "ready"]
        assert status["gateways"][0]["url"] == url
        bench = json.loads(lltm("bench", "--name", "cli", "--requests", "64", "--max-tokens", "8", "--json").stdout)
        assert (bench["ok"], bench["errors"]) == (64, {})
        assert lltm("chat", "hi", "--url", url, "--max-tokens", "8").stdout.strip()
        script = "import lltm_ray; print(lltm_ray.Cluster.connect('cli').complete('hi', max_tokens=8).engine)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
        assert "engine-" in done.stdout, done.stderr
        again = lltm("up", "--name", "cli", "--detach", check=False)
        assert again.returncode == 1
        assert "runs already" in again.stderr
    finally:
        assert lltm("down", "--name", "cli").stdout.strip() == "cli is down"
    assert servers() == before
    gone = lltm("status", "--name", "cli", check=False)
    assert gone.returncode == 1
    assert "lltm-ray up --name cli" in gone.stderr


def test_ctrl_c_in_the_foreground_drains_and_ends_everything(cache):
    before = servers()
    process = subprocess.Popen(
        [sys.executable, "-m", "lltm_ray.cli", "up", "--engines", "1", "--port", "0", "--name", "front"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        assert "front is ready at http://127.0.0.1:" in process.stdout.readline()
        (server,) = servers() - before
        assert os.getpriority(os.PRIO_PROCESS, server) == os.getpriority(os.PRIO_PROCESS, 0), "Ray's own choice is 15"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        deadline = time.monotonic() + 150
        while process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert process.returncode == 0
        assert "draining" in process.stderr.read()
    assert servers() == before


@contextmanager
def ended(process):
    """Whatever goes wrong, nobody waits for it for ever."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["timeout", "closed terminal"])
def test_a_signal_that_ends_ray_too_ends_everything_within_seconds(cache, number):
    before, ours = servers(), signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not inherited where we run under nohup
    process = subprocess.Popen(
        [sys.executable, "-m", "lltm_ray.cli", "up", "--engines", "2", "--port", "0", "--name", "all"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGHUP, ours)
    with process, ended(process):
        assert "all is ready at http://127.0.0.1:" in process.stdout.readline()
        own = psutil.Process(process.pid).children(recursive=True)
        assert len(servers() - before) == 2
        began = time.monotonic()
        os.killpg(process.pid, number)
        process.wait(150)
        took_s = time.monotonic() - began
        left = psutil.wait_procs(own, timeout=10)[1]  # agents of a raylet end with it by themselves
        told = process.stderr.read()
        assert process.returncode == 0, told
    assert "Traceback" not in told
    assert "ended without a drain" in told
    assert took_s < 30, "Ray's own patience is 60 s"
    assert left == []
    assert servers() == before
    assert RunState.load("all") is None


def test_a_failed_start_is_one_sentence_and_an_exit_code(cache, tmp_path):
    done = lltm("up", "--model", str(tmp_path / "gone.gguf"), "--name", "bad", "--detach", check=False)
    assert done.returncode == 1
    assert "gone.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_without_a_ray_is_told_at_once(cache):
    with held_port() as port:
        environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        done = lltm("up", "--name", "nowhere", check=False, env=environment)
    assert done.returncode == 2
    assert "no Ray cluster answers there" in done.stderr
    assert "Connection refused" in done.stderr, "Ray's own tries, which take 14 minutes, have other words"
    assert "Traceback" not in done.stderr
