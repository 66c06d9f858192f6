"""Which Ray is joined, and how soon one that does not answer is told or passed over. Nothing here starts a Ray."""

import os
import socket
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import ray
from ray._private import services

from lltm_ray.actors import join
from lltm_ray.actors.runstate import RunState
from lltm_ray.driver import Cluster, join_ray
from lltm_ray.errors import ConfigError, FleetError

NODE = ray.NodeID.from_random()
TRIES = "RAY_gcs_server_port_wait_time_s"


@contextmanager
def port(*, listens):
    """An address that refuses, or that takes connections and never says a word."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if listens:
            held.listen()
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def dead():
    with port(listens=False) as address:
        yield address


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """No Ray at all: none in the environment, in Ray's file, among the processes, or left by `lltm-ray up`."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path / "cache"))
    raylets = set()
    monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: raylets if "gcs" in flag else {NODE.hex()})
    forget = services.find_gcs_addresses.cache_clear
    yield raylets
    forget()


class Answers:
    """A Ray that answers whoever knocks."""

    nodes = (NODE,)
    fleets: ClassVar = {}
    """What runs where, its state with it; everywhere else `x` does."""

    def __init__(self, address):
        self.address = address

    @classmethod
    def standalone(cls, address, **_):
        return cls(address)

    def check_alive(self, nodes, **_):
        return [node in self.nodes for node in nodes]

    async def async_get_all_actor_info(self, *, actor_state_name, **_):
        fleet, state = self.fleets.get(self.address, ("x", "ALIVE"))
        actor = SimpleNamespace(name=f"lltm:{fleet}:directory", ray_namespace="lltm_ray")
        return {b"actor": actor} if state == actor_state_name else {}


@pytest.fixture
def joined(monkeypatch):
    """Addresses that Ray was told to join; each is taken for a Ray that answers."""
    seen = []
    monkeypatch.setattr(ray, "init", lambda address, **_: seen.append(address))
    monkeypatch.setattr(ray._raylet, "InnerGcsClient", Answers)
    return seen


def last_started(tmp_path, address):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)


def refused(**options):
    before = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster answers there") as caught:
        join_ray(**options)
    assert time.monotonic() - before < 5, "Ray itself tries for 14 minutes"
    assert caught.value.field == "address"
    return str(caught.value)


def test_the_last_ray_of_this_machine_is_told_with_its_file_when_it_is_gone(tmp_path, dead):
    last_started(tmp_path, dead)
    told = refused(fleet="x")
    assert told.startswith(f"address='{dead}': no Ray cluster answers there (")
    assert "the last `ray start` (ray_current_cluster) names it" in told
    assert "lltm-ray up" in told


def test_a_raylet_that_outlives_its_cluster_is_told(machine, dead):
    machine.add(dead)
    assert "a raylet of this machine names it" in refused(fleet="x")
    machine.clear()
    with pytest.raises(ConfigError, match="no Ray runs on this machine"):
        join_ray(fleet="x")


def test_an_address_is_told_with_who_named_it(monkeypatch, dead):
    assert "the caller names it" in refused(address=dead)
    assert "(Invalid address format: nonsense)" in refused(address="nonsense")
    monkeypatch.setenv("RAY_ADDRESS", dead)
    assert "RAY_ADDRESS names it" in refused()
    RunState(name="gone", ray_address=dead, endpoint="").save()
    with pytest.raises(ConfigError, match="RAY_ADDRESS names it"):
        Cluster.connect("gone")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match="lltm-ray down --name gone"):
        Cluster.connect("gone")


def test_what_takes_connections_and_is_no_ray_is_told_in_time():
    with port(listens=True) as address:
        before = time.monotonic()
        with pytest.raises(ConfigError, match="no Ray cluster answers there"):
            join_ray(address)
        assert time.monotonic() - before < 30


def test_a_ray_that_is_gone_is_passed_over_for_one_that_answers(tmp_path, machine, dead, joined):
    last_started(tmp_path, dead)
    with port(listens=True) as alive:
        machine.add(alive)
        assert join_ray(fleet="x")
        assert joined == [alive]


def test_the_ray_that_was_started_last_is_the_first_to_be_joined(tmp_path, machine, joined):
    with port(listens=True) as last, port(listens=True) as other:
        machine.update((other, last))
        last_started(tmp_path, last)
        assert join_ray("auto")
    assert joined == [last]


@pytest.mark.parametrize("other", [("y", "ALIVE"), ("x", "DEAD")])
def test_a_ray_without_the_fleet_is_not_joined(tmp_path, machine, joined, monkeypatch, dead, other):
    with port(listens=True) as last, port(listens=True) as alive:
        last_started(tmp_path, last)
        machine.update((alive, dead))
        monkeypatch.setattr(Answers, "fleets", {last: other, alive: ("x", "RESTARTING")})
        assert join_ray(fleet="x")
        assert joined == [alive]
        monkeypatch.setattr(Answers, "fleets", {last: other, alive: other})
        with pytest.raises(FleetError, match="no fleet 'x' runs on a Ray of this machine"):
            join_ray(fleet="x")
        assert join_ray(last, fleet="x"), "an address that is named is joined: who looks there tells what it lacks"
    assert joined == [alive, last]


def test_where_ray_gives_up_by_itself_the_next_one_is_joined(tmp_path, machine, joined, monkeypatch):
    def init(address, **_):
        joined.append(address)
        if len(joined) == 1:
            raise ConnectionError("its raylet is gone")

    monkeypatch.setattr(ray, "init", init)
    with port(listens=True) as last, port(listens=True) as other:
        machine.add(other)
        last_started(tmp_path, last)
        assert join_ray(fleet="x")
        assert joined == [last, other]


def test_a_ray_whose_node_here_is_gone_is_not_waited_for(joined, monkeypatch):
    monkeypatch.setattr(Answers, "nodes", (ray.NodeID.from_random(),))
    monkeypatch.setattr(join, "_STEP_S", 0.2)
    with port(listens=True) as address:
        assert "none of its nodes is this machine" in refused(address=address), "Ray itself waits for 60 s"
    assert joined == []


@pytest.mark.parametrize("given", [None, "7"])
def test_one_that_ends_while_it_is_joined_is_tried_once_unless_the_user_says_otherwise(joined, monkeypatch, given):
    monkeypatch.delenv(TRIES, raising=False)
    if given:
        monkeypatch.setenv(TRIES, given)
    seen = []
    monkeypatch.setattr(ray, "init", lambda *_, **__: seen.append(os.environ.get(TRIES)))
    with port(listens=True) as address:
        join_ray(address)
    join_ray("local")
    assert seen == [given or "1", given], "a Ray of one's own has its whole time to start"


def test_without_any_ray_one_is_started_or_its_lack_told(joined):
    with pytest.raises(ConfigError, match=r"^address='auto': no Ray runs on this machine; start one \(lltm-ray up"):
        join_ray(fleet="x")
    assert join_ray()
    assert joined == ["local"]


def test_a_ray_without_what_it_does_not_promise_is_joined_unasked(monkeypatch, joined):
    monkeypatch.delattr(services, "find_gcs_addresses")
    assert join_ray(fleet="x")
    monkeypatch.setattr(Answers, "nodes", ())
    with port(listens=True) as address:
        monkeypatch.delattr(services, "find_node_ids")
        assert join_ray(address)
        monkeypatch.delattr(ray._raylet, "InnerGcsClient")
        assert join_ray(address, fleet="nobody")
    assert joined == ["auto", address, address]
