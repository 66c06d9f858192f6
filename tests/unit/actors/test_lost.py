"""When a Ray counts as lost: nobody listens where its GCS did, and this process has not left it; and whom it takes."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import psutil
import pytest

from lltm_ray.actors import lost


class FakeRay:
    """What is asked of Ray here."""

    exceptions = types.SimpleNamespace(RayError=RuntimeError)

    def __init__(self, address):
        self.address, self.here, self.daemons = address, True, ["raylet"]

    def is_initialized(self):
        return self.here

    def get_runtime_context(self):
        return types.SimpleNamespace(gcs_address=self.address, get_session_name=lambda: "session_1")


@pytest.fixture
def gcs(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ray = FakeRay(f"127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(lost, "ray", ray)
        monkeypatch.setattr(lost, "LOOK_EVERY_S", 0.01)
        monkeypatch.setattr(lost, "_lost", set())
        monkeypatch.setattr(lost, "_sessions", {})
        monkeypatch.setattr(lost, "_daemons", lambda: ray.daemons)
        yield ray, listener


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "watch-ray"]


def test_a_ray_is_lost_once_nobody_listens_where_its_gcs_did(gcs):
    ray, listener = gcs
    told = threading.Event()
    lost.watch_ray(told.set)
    assert not lost.is_lost()
    assert not told.wait(0.2)
    listener.close()
    assert told.wait(60)
    assert lost.is_lost()
    ray.here = False
    assert not lost.is_lost(), "it is in none any more"


def test_a_ray_that_was_left_before_it_ended_is_not_lost(gcs):
    ray, listener = gcs
    told = threading.Event()
    lost.watch_ray(told.set)
    (watch,) = threads()
    ray.here = False
    listener.close()
    watch.join(60)
    assert not watch.is_alive()
    assert not told.is_set()
    assert not lost.is_lost()


def test_what_was_found_lost_is_told_also_when_it_is_left_at_once(gcs, monkeypatch):
    """The main thread may find it first, and then be in `ray.shutdown` for long."""
    ray, listener = gcs
    told, asleep, found = threading.Event(), threading.Event(), threading.Event()

    def sleep(_seconds):
        asleep.set()
        found.wait(60)

    monkeypatch.setattr(lost, "time", types.SimpleNamespace(sleep=sleep))
    lost.watch_ray(told.set)
    assert asleep.wait(60)
    listener.close()
    assert lost.is_lost()
    assert not told.is_set()
    ray.here = False
    found.set()
    assert told.wait(60)


def test_a_gcs_that_is_slow_is_not_lost(gcs, monkeypatch):
    def late(*_args, **_options):
        raise TimeoutError("timed out")

    monkeypatch.setattr(lost.socket, "create_connection", late)
    assert not lost.is_lost()


def test_a_new_ray_at_an_old_address_is_not_lost(gcs):
    ray, listener = gcs
    lost._lost.add(ray.address)
    assert not lost.is_lost()
    listener.close()
    assert lost.is_lost()


def test_a_ray_of_somebody_else_is_not_ours_to_end(gcs):
    """Its address may be one that is meant on another machine."""
    ray, listener = gcs
    ray.daemons = []
    listener.close()
    assert not lost.is_lost()


def test_a_child_that_ends_while_it_is_looked_at_ends_no_watch(gcs, monkeypatch):
    class Gone:
        def name(self):
            raise psutil.NoSuchProcess(1)

    ray, listener = gcs
    monkeypatch.undo()
    monkeypatch.setattr(lost, "ray", ray)
    monkeypatch.setattr(lost, "_lost", set())
    monkeypatch.setattr(lost, "_sessions", {})
    monkeypatch.setattr(psutil.Process, "children", lambda _self, recursive=False: [Gone()])
    listener.close()
    assert not lost.is_lost()


@pytest.fixture
def start(gcs, monkeypatch, tmp_path):
    """Starts children of this process that do nothing, with a log of a session and a raylet's number."""
    ray, _ = gcs
    monkeypatch.undo()
    monkeypatch.setattr(lost, "ray", ray)
    monkeypatch.setattr(lost, "_sessions", {})
    begun = []

    def start_one(*command, session="session_1", raylet=None, **options):
        log = tmp_path / session / "logs" / "worker.out"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"RAY_RAYLET_PID": str(raylet.pid)} if raylet else {})
        with log.open("ab") as sink:
            begun.append(subprocess.Popen(command or ("sleep", "600"), stdout=sink, env=environment, **options))
        return begun[-1]

    yield start_one
    for process in begun:
        process.kill()
        process.wait(30)
        if process.stdin is not None:
            process.stdin.close()


def raylet_of(start, tmp_path):
    program = shutil.copy(shutil.which("sleep"), tmp_path / "raylet")
    return start("sleep", "600", executable=str(program))


def test_what_a_lost_ray_started_is_killed_and_who_has_only_a_number_of_it_is_spared(start, gcs, tmp_path):
    late = start("sh", "-c", "read n; RAY_RAYLET_PID=$n exec sleep 600", stdin=subprocess.PIPE)
    time.sleep(0.1)  # the kernel tells starts in steps of 10 ms
    raylet = raylet_of(start, tmp_path)
    worker = start(raylet=raylet)
    idle = "import time; time.sleep(600)"
    monitor = start(sys.executable, "-c", idle, f"--gcs-address={gcs[0].address}", "--logs=/tmp/ray/session_1/logs")
    late.stdin.write(f"{raylet.pid}\n".encode())
    late.stdin.flush()
    spared = {
        "only the number": start(raylet=raylet, session="elsewhere"),
        "another session": start(raylet=raylet, session="session_2"),
        "only the log": start(),
        "a reader of the log": start(sys.executable, "-c", idle, "/tmp/ray/session_1/logs"),
        "older than the raylet": late,
    }
    while psutil.Process(late.pid).name() != "sleep":
        time.sleep(0.01)
    lost.end_lost()
    for killed in (raylet, worker, monitor):
        assert not psutil.pid_exists(killed.pid)
    assert [name for name, process in spared.items() if process.poll() is not None] == []
