"""Engines that come and go with demand: started by the first request, stopped when idle, evicted, looked after."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import ray
from ray.util import placement_group_table

from lltm_ray.actors import names
from lltm_ray.actors.crew import Crew, engine_names, find_engines
from lltm_ray.actors.fleet import find_fleet, start_fleet
from lltm_ray.actors.placement import demand_of, plan_share, read_nodes, reserve_one, resolve_models
from lltm_ray.config import FleetConfig, build
from lltm_ray.records import EngineState, GatewayInfo, ModelDemand, ModelState
from tests.ray.conftest import HI, post, servers, until

FROM_ZERO = {"engines": 0, "max_engines": 1}
SMALL = {"n_parallel": 2, "n_ctx": 512}
ROOMY = {"n_parallel": 2, "n_ctx": 8192}
LONG = 80
"""Sentences that take longer to compute than to restore, on a slow machine too."""


def elastic(name, *models, **settings):
    """A fleet without a gateway; the tests say what one would report."""
    raw = {"name": name, "gateway": None, "engine": SMALL, "drain_timeout_s": 5.0, **settings}
    if models:
        raw["models"] = [{"model": "random", **model} for model in models]
    return start_fleet(build(FleetConfig, raw))


def state_of(fleet, model):
    return next(each for each in fleet.status().models if each.name == model)


def ready(fleet, model):
    return [each for each in fleet.status().engines if each.model == model and each.state is EngineState.READY]


def report(fleet, **demand):
    """What a gateway says with every heartbeat."""
    told = tuple(ModelDemand(model=model, **each) for model, each in demand.items())
    info = GatewayInfo(name="fake", url="", state="ready", pid=os.getpid(), demand=told)
    ray.get(fleet.directory.register_gateway.remote(info))


def keep_reporting(fleet, condition, **demand):
    def look():
        report(fleet, **demand)
        return condition()

    return until(look)


def shares_of(fleet):
    """CPUs that Ray holds for each engine."""
    prefix = names.engine(fleet, "")
    return {
        group["name"].removeprefix(prefix): group["bundles"][0]["CPU"]
        for group in placement_group_table().values()
        if group["name"].startswith(prefix) and group["state"] != "REMOVED"
    }


def controller_of(fleet):
    return ray.get_actor(names.controller(fleet.config.name), namespace=names.NAMESPACE)


@pytest.fixture(scope="module")
def two(ray_cluster, cache, tmp_path_factory):
    """Four CPUs: `warm` holds two of them, `cold` needs three, `talk` finds room beside each; two more never start."""
    broken = tmp_path_factory.mktemp("models") / "broken.gguf"
    broken.write_bytes(b"GGUF?")
    fleet = elastic(
        "two",
        {"served_name": "warm", "gpu_share": 0.0, "cpu_share": 2.0},
        {"served_name": "cold", "gpu_share": 0.0, "cpu_share": 3.0, **FROM_ZERO, "idle_timeout_s": 2.0},
        {"served_name": "broken", "model": str(broken), "gpu_share": 0.0, "cpu_share": 0.5, **FROM_ZERO},
        {"served_name": "wide", "gpu_share": 8.0, **FROM_ZERO},
        {"served_name": "talk", "gpu_share": 0.0, "cpu_share": 0.5, **FROM_ZERO, "engine": ROOMY, "idle_timeout_s": 2},
        room_timeout_s=2.0,
        gateway={"port": 0},
    )
    try:
        yield fleet
    finally:
        fleet.stop()
    until(lambda: (servers(), shares_of("two")) == (set(), {}))
    assert not list(cache.glob("run/two-*/slots/*")), "what was saved went with the fleet"


def test_a_request_for_a_cold_model_makes_room_and_idling_gives_it_back(ray_cluster, two):
    until(lambda: ready(two, "warm"))
    assert (state_of(two, "cold").state, state_of(two, "cold").is_startable) == (ModelState.COLD, True)
    began = time.monotonic()
    ray.get(two.directory.wake.remote("cold"))
    engine = keep_reporting(two, lambda: ready(two, "cold"), cold={"running": 1})[0]
    print(f"evicted and started in {time.monotonic() - began:.1f} s")
    assert state_of(two, "warm").state is ModelState.COLD
    assert shares_of("two") == {engine.name: 3.0}
    handle = find_engines("two")[engine.name]
    assert ray.get(handle.chat.remote(HI, max_tokens=4)).engine == engine.name
    report(two, cold={"running": 0})
    until(lambda: state_of(two, "cold").state is ModelState.COLD and not two.status().engines)
    assert engine_names("two") == set()
    ray.get(two.directory.wake.remote("warm"))
    again = until(lambda: ready(two, "warm"))[0]
    assert shares_of("two") == {again.name: 2.0}
    decisions = ray.get(controller_of(two).snapshot.remote())["decisions"]
    assert any("Evict" in each and "cold" in each for each in decisions), decisions


def test_a_model_that_cannot_start_says_why_and_a_start_without_room_waits(two):
    until(lambda: ray.available_resources().get("CPU", 0.0) >= 1.0)  # else `warm` would have to make room for `broken`
    ray.get(two.directory.wake.remote("broken"))
    ray.get(two.directory.wake.remote("wide"))
    seen, wanted = {}, {("wide", ModelState.WAITING), ("wide", ModelState.FAILED), ("broken", ModelState.FAILED)}

    def all_seen():
        """Each state lasts for some seconds only: whoever missed one asks for the model again."""
        models = two.status().models
        seen.update(((model.name, model.state), model) for model in models)
        for name in {name for name, _ in wanted - seen.keys()} & {m.name for m in models if m.state is ModelState.COLD}:
            ray.get(two.directory.wake.remote(name))
        return wanted <= seen.keys()

    until(all_seen, 120.0)
    assert "broken.gguf" in seen["broken", ModelState.FAILED].detail
    assert not seen["broken", ModelState.FAILED].is_startable
    assert "8 GPU" in seen["wide", ModelState.FAILED].detail
    assert [engine.model for engine in two.status().engines] == ["warm"], "what could not help stayed"


def turn(fleet, model, messages, **headers):
    """One more turn of a conversation; its timings."""
    (gateway,) = (each for each in fleet.status().gateways if each.url)
    body = {"model": model, "messages": messages, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    told = post(f"{gateway.url}/v1/chat/completions", body, headers.items())
    messages.append({"role": "assistant", "content": told["choices"][0]["message"]["content"]})
    messages.append({"role": "user", "content": "go on"})
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == told["timings"]["cache_n"]
    return told["timings"]


@pytest.mark.timeout(300)
def test_a_conversation_goes_on_from_its_cache_after_its_model_was_stopped_to_zero(two, cache):
    talks = [[{"role": "user", "content": f"{name} talks of this and that. " * LONG}] for name in ("Ann", "Bob")]
    before = [turn(two, "talk", talk) for talk in talks]
    until(lambda: state_of(two, "talk").state is ModelState.COLD and not ready(two, "talk"))
    saved = until(lambda: two.status().shelf.files)
    assert [file.model for file in saved] == ["talk"] * 2
    (folder,) = cache.glob("run/two-*/slots/shelf-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir()) == sorted(file.name for file in saved)
    began = time.monotonic()
    after = [turn(two, "talk", talk) for talk in talks]
    print(f"started and went on in {time.monotonic() - began:.1f} s: {after}")
    for old, new in zip(before, after, strict=True):
        assert new["cache_n"] >= 0.95 * (old["prompt_n"] + old["predicted_n"] - 1)
    used = {file.name for file in saved}  # the next idle stop saves under other names
    until(lambda: used.isdisjoint(path.name for path in folder.iterdir()))
    until(lambda: used.isdisjoint(file.name for file in two.status().shelf.files))


def test_an_engine_whose_controller_died_before_it_could_start_it_is_started_by_the_next(two):
    until(lambda: ready(two, "warm"))
    (model,) = (each for each in resolve_models(two.config, read_nodes()) if each.name == "broken")
    model = replace(model, model="random")
    name = ray.get(two.directory.new_name.remote(()))
    share = reserve_one("two", plan_share(demand_of(model, name), read_nodes()), detached=True)
    crew = Crew(config=two.config, run_id=two.run_id, gateway_node_id=None)
    crew.make(model, share, engines_on_node=2, detached=True)
    until(lambda: any(each.name == name for each in two.status().engines))
    time.sleep(1.0)
    assert not ready(two, "broken"), "nobody told it to"
    ray.kill(controller_of(two), no_restart=False)
    assert until(lambda: ready(two, "broken"))[0].name == name


def knows(fleet, model):
    """Whether the directory has heard from the gateway itself that it served a model."""
    served = (each for gateway in fleet.status().gateways if gateway.url for each in gateway.demand)
    return any(each.model == model and each.last_request_unix_nano for each in served)


@pytest.mark.timeout(300)
def test_engines_are_added_while_requests_wait_and_go_when_others_would_do(ray_cluster):
    most = {"engines": 1, "max_engines": 2, "scale_up_wait_s": 0.5, "scale_down_after_s": 1.0}
    fleet = elastic("auto", served_name="m", gpu_share=0.0, gateway={"port": 0}, **most)
    try:
        wait = {"waiting": 3, "running": 2, "predicted_wait_s": 4.0}
        keep_reporting(fleet, lambda: len(ready(fleet, "m")) == 2, m=wait)
        busy = {"running": 4}
        later = time.monotonic() + 1.5
        keep_reporting(fleet, lambda: time.monotonic() > later, m=busy)
        assert len(ready(fleet, "m")) == 2, "busy engines stay"
        pid = ray._private.state.actors(controller_of(fleet)._actor_id.hex())["Pid"]
        before = {each.name: each.server_pid for each in ready(fleet, "m")}
        os.kill(pid, signal.SIGKILL)
        actor_id = controller_of(fleet)._actor_id.hex()
        keep_reporting(fleet, lambda: ray._private.state.actors(actor_id)["Pid"] not in (0, pid), m=busy)
        assert {each.name: each.server_pid for each in ready(fleet, "m")} == before, "engines outlive the controller"
        talk = [{"role": "user", "content": "Ann talks of this and that. " * 3}]
        with ThreadPoolExecutor(1) as aside:
            turning = aside.submit(turn, fleet, "m", talk, **{"x-lltm-engine": "engine-1"})
            keep_reporting(fleet, lambda: turning.done() and knows(fleet, "m"), m=busy)
        old = turning.result()
        keep_reporting(fleet, lambda: len(fleet.status().engines) == 1, m={"running": 0})
        assert set(find_fleet("auto").engines) == {"engine-0"}, "the newest went"
        new = turn(fleet, "m", talk)
        assert new["cache_n"] >= 0.95 * (old["prompt_n"] + old["predicted_n"] - 1), "and what it held had moved"
    finally:
        fleet.stop()
