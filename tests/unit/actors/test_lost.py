"""When a Ray counts as lost: nobody listens where its GCS did, and this process has not left it."""

import socket
import threading
import types

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
        return types.SimpleNamespace(gcs_address=self.address)


@pytest.fixture
def gcs(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ray = FakeRay(f"127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(lost, "ray", ray)
        monkeypatch.setattr(lost, "LOOK_EVERY_S", 0.01)
        monkeypatch.setattr(lost, "_lost", set())
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
    told, found = threading.Event(), threading.Event()
    monkeypatch.setattr(lost, "time", types.SimpleNamespace(sleep=lambda _seconds: found.wait(60)))
    lost.watch_ray(told.set)
    listener.close()
    if not told.wait(0.2):
        assert lost.is_lost()
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
