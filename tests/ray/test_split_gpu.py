"""Engines and analytics on GPUs of their own, on a node with two GPUs that only its NVML knows of.

The node's NVML is a scripted `pynvml`, as a driver would answer; all else is real: Ray's isolation, the engines (on the
CPU: the embedded server has no CUDA), the analytics.
"""

import os
import threading
import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from lltm_ray.actors import seats
from lltm_ray.errors import ConfigError, DeadlineError, FleetError, PlacementError
from lltm_ray.sdk.split import split_gpu
from tests.ray.conftest import HI, until

NVML = """
class NVMLError(Exception):
    value = 3


class Memory:
    total = free = 15 * 2**30


NVML_TEMPERATURE_GPU = 0
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: 2
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetUUID = lambda index: f"GPU-{index}-of-two"
nvmlDeviceGetName = lambda index: "Tesla T4"
nvmlDeviceGetMemoryInfo = lambda index: Memory
nvmlDeviceGetCudaComputeCapability = lambda index: (7, 5)


def __getattr__(name):
    if not name.startswith("nvml"):
        raise AttributeError(name)

    def refuse(*_):
        raise NVMLError

    return refuse
"""
ASKED = []
"""What the session's engine has answered: one each."""
QUICK = {"gateway": {"port": 0}, "drain_timeout_s": 1.0, "engine": {"n_gpu_layers": 0, "n_parallel": 2}}


@pytest.fixture(scope="module")
def head_is_taken(ray_cluster):
    """Somebody holds the GPUs of the first node."""
    group = placement_group([{"GPU": 1}] * 2)
    assert group.wait(60)
    yield
    remove_placement_group(group)


@pytest.fixture(scope="module")
def two_gpus(head_is_taken, ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "pynvml.py").write_text(NVML)
    node = ray_cluster.add_node(num_cpus=2, num_gpus=2, env_vars={"PYTHONPATH": str(folder)})
    until(lambda: ray.available_resources().get("GPU") == 2)
    yield node.node_id
    ray_cluster.remove_node(node)


def test_gpus_that_somebody_is_giving_back_are_waited_for_and_others_are_not(two_gpus):
    held = placement_group([{"GPU": 1}])
    assert held.wait(60)
    giving = threading.Timer(1.0, remove_placement_group, (held,))
    giving.start()
    assert seats.roomiest_node(2) == (two_gpus, 2)
    giving.join()
    began = time.monotonic()
    assert seats.roomiest_node(3) == (two_gpus, 2)
    assert time.monotonic() - began < seats._BACK_S, "no node has three"


@pytest.fixture(scope="module")
def session(two_gpus):
    """The indices the other way round: Ray alone would give the engine GPU 0."""
    environment = own_environment()
    with split_gpu("random", llm=1, analytics=0, strict=True, name="split", **QUICK) as session:
        assert own_environment() == environment
        yield session
    assert own_environment() == environment


def own_environment():
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def chat(session, tokens):
    ASKED.append(session.cluster.chat(HI, max_tokens=tokens).usage.output_tokens)
    return ASKED[-1]


def where_am_i(base, *, more=0):
    return base + more, os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def test_engines_and_analytics_are_on_the_gpus_that_were_asked_for(session, two_gpus):
    (engine,), (analytics,), (guest,) = (session.seats[role] for role in ("llm", "analytics", "run"))
    assert (engine.gpus, analytics.gpus, guest.gpus) == ((1,), (0,), (0,))
    assert {seat.node_id for seat in (engine, analytics, guest)} == {two_gpus}
    assert engine.uuids == ("GPU-1-of-two",)
    assert analytics.uuids == guest.uuids == ("GPU-0-of-two",)
    assert str(session).endswith("llm: GPU 1; analytics: GPU 0; run: GPU 0")
    assert chat(session, 4) == 4


def test_a_function_runs_on_the_analytics_gpu_in_a_process_of_its_own(session):
    total, visible, pid = session.run(where_am_i, 40, more=2)
    assert (total, visible) == (42, "0")
    assert pid != os.getpid()
    assert pid == session.run(os.getpid), "state that a function leaves on the GPU is there for the next one"


def test_what_a_function_raises_comes_back_and_its_death_is_survived(session):
    with pytest.raises(ZeroDivisionError):
        session.run(lambda: 1 / 0)
    with pytest.raises(DeadlineError):
        session.run(lambda: __import__("time").sleep(1), timeout_s=0.1)
    with pytest.raises(FleetError, match="ended its process"):
        session.run(os._exit, 3)
    assert session.run(where_am_i, 1)[1] == "0"
    assert chat(session, 2) == 2


def test_a_report_is_made_on_the_analytics_gpu(session):
    for _ in range(3):
        chat(session, 2)
    until(lambda: session.report(600).requests == len(ASKED))
    assert "no share of a GPU" not in session.report(600).reason


def test_an_actor_whose_gpu_somebody_else_took_is_not_waited_for(head_is_taken, monkeypatch):
    monkeypatch.setattr(seats, "_SEAT_S", 1.0)
    guest = seats.make_guest(ray.get_runtime_context().get_node_id(), 0.5)
    with pytest.raises(PlacementError, match="somebody else took one"):
        seats.seats_of([guest])
    seats.end_actor(guest)


def test_what_was_held_is_given_back_if_not_all_can_be(head_is_taken, monkeypatch):
    made = []

    def make(*bundles, **own):
        if made:
            raise ValueError("no more")
        made.append(placement_group(*bundles, **own))
        return made[0]

    monkeypatch.setattr(seats, "placement_group", make)
    with pytest.raises(ValueError, match="no more"), seats.Holds(ray.get_runtime_context().get_node_id(), 2):
        pass
    until(lambda: placement_group_table(made[0])["state"] == "REMOVED")


def test_two_gpus_that_are_not_free_are_refused_or_done_without(session, ray_cluster):
    with pytest.raises(PlacementError, match="2 whole GPUs"):
        split_gpu("random", strict=True, name="late", **QUICK)
    with split_gpu("random", name="late", telemetry={"enabled": False}, **QUICK) as late:
        assert late.how == "no GPU is free: engines, analytics and your functions on the CPU"
        assert late.seats["llm"][0].gpus == late.seats["run"][0].gpus == late.seats["analytics"] == ()
        assert late.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]) == "", "it could reach into an engine's GPU"
    late.close()
    with pytest.raises(FleetError, match="closed"):
        late.run(os.getpid)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"llm": 0, "analytics": 0}, "analytics=0"),
        ({"llm": (0, 0)}, "llm="),
        ({"llm": ()}, "llm="),
        ({"analytics_share": 1.0}, "analytics_share="),
    ],
)
def test_an_order_that_cannot_be_is_refused(ray_cluster, asked, field):
    with pytest.raises(ConfigError, match=field):
        split_gpu("random", **asked)
