"""Several models in the settings, in the plan of shares, in the directory's table, in the controller's eyes; no Ray."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from lltm_ray.actors import watch
from lltm_ray.actors.controller import Controller, ControllerSpec, Move, merge_demand, rules_of
from lltm_ray.actors.crew import Crew
from lltm_ray.actors.directory_table import Table
from lltm_ray.actors.front import Front
from lltm_ray.actors.launch import models_of
from lltm_ray.actors.placement import demand_of, engines_beside, give_back, name_engines, plan_share
from lltm_ray.config import FleetConfig, ModelConfig, build
from lltm_ray.errors import ConfigError
from lltm_ray.gpu.shares import NodeCapacity, ShareDemand
from lltm_ray.records import (
    EngineInfo,
    EngineState,
    FleetStatus,
    GatewayInfo,
    ModelDemand,
    ModelInfo,
    ModelState,
    ServerCounters,
)
from lltm_ray.routing.ledger import Ledger
from lltm_ray.routing.scaling import Stop
from lltm_ray.serve import build_app

SEVERAL = {
    "engine": {"n_parallel": 2},
    "idle_timeout_s": 60.0,
    "models": [
        {"model": "tiny", "served_name": "a", "engines": 2, "gpu_share": 0.5},
        {"model": "/m/b-00001-of-00002.gguf", "engines": 0, "max_engines": 3, "engine": {"n_parallel": 8}},
    ],
}


def test_a_model_has_the_fleets_settings_where_it_has_none_of_its_own():
    fleet = build(FleetConfig, SEVERAL)
    a, b = fleet.served()
    assert (a.name, a.max_engines, a.engine.n_parallel, a.idle_timeout_s) == ("a", 2, 2, 60.0)
    assert (b.name, b.max_engines, b.engine.n_parallel, b.gpu_share) == ("b", 3, 8, None)
    alone = fleet.for_model(b)
    assert (alone.model, alone.served_name, alone.engine.n_parallel, alone.models) == (b.model, "b", 8, ())
    assert alone.served() == (b,)


def test_only_a_fleet_that_may_change_is_elastic():
    assert not FleetConfig(engines=2).is_elastic
    assert not FleetConfig(models=(ModelConfig(model="tiny"), ModelConfig(model="x"))).is_elastic
    for settings in ({"max_engines": 2}, {"engines": 0, "max_engines": 1}, {"idle_timeout_s": 5.0}):
        assert FleetConfig(**settings).is_elastic, settings


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny", "tiny"),
        ("/a/x.q8-00001-of-00003.gguf", "x.q8"),
        ("o/n:sub/f.gguf@main", "f"),
        ("qwen-0.5b", "qwen-0.5b"),
    ],
)
def test_a_model_without_a_served_name_is_called_as_its_file(model, name):
    assert ModelConfig(model=model).name == name


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"engines": 0}, "max_engines"),
        ({"engines": 3, "max_engines": 2}, "at most max_engines=2"),
        ({"min_engines": 2}, "min_engines=2"),
        ({"models": [{"model": "x"}, {"model": "y", "served_name": "x"}]}, "another name"),
        ({"models": [{"model": "x", "gpu_share": 1.5}]}, "whole number"),
        ({"models": [{"model": "x"}], "engines": 2}, "each entry of models"),
        ({"models": [{"model": "x", "idle_timeout": 2}]}, "idle_timeout_s"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_a_remedy(settings, word):
    with pytest.raises(ConfigError, match=word):
        build(FleetConfig, settings)


def test_a_serve_application_takes_the_same_settings():
    assert build_app(SEVERAL) is not None
    assert build_app({"engines": "0", "max_engines": "2", "idle_timeout_s": "30"}) is not None
    with pytest.raises(ConfigError, match="max_engines"):
        build_app({"engines": "0"})


def test_gateway_processes_are_ingress_replicas_under_serve_which_gives_them_time_to_end():
    ingress = build_app(SEVERAL | {"gateway.processes": "3", "gateway.drain_timeout_s": "7"})._bound_deployment
    assert (ingress.name, ingress.num_replicas) == ("gateway", 3)
    settings = ingress._deployment_config
    assert settings.graceful_shutdown_timeout_s > 7 > settings.graceful_shutdown_wait_loop_s
    assert build_app(SEVERAL)._bound_deployment.num_replicas == 1


def test_rules_keep_what_was_started_unless_told_otherwise():
    one = rules_of(FleetConfig(engines=2, max_engines=4).served()[0])
    assert (one.floor, one.keep, one.ceiling) == (0, 2, 4)
    other = rules_of(FleetConfig(engines=2, min_engines=1, max_engines=4).served()[0])
    assert (other.floor, other.keep) == (1, 1)


def test_engines_are_named_across_models_and_shares_fit_or_not():
    models = (ModelConfig(model="x", engines=2, gpu_share=0.5), ModelConfig(model="y", gpu_share=2.0))
    assert [model.name for model in name_engines(models).values()] == ["x", "x", "y"]
    nodes = (NodeCapacity(node_id="n", cpus=4.0, gpus=(0.5,)),)
    assert plan_share(demand_of(models[1], "e"), nodes).node_id == ""
    freed = give_back(
        nodes,
        [
            ("n", ShareDemand(engine="v", gpus=1.0)),
            ("n", ShareDemand(engine="u", gpus=0.5)),
            ("m", ShareDemand(engine="w", gpus=8.0)),
        ],
    )
    assert plan_share(demand_of(models[1], "e"), freed).node_id == "n"
    assert (engines_beside(models, 1, 1), engines_beside(models, 3, 2), engines_beside(models, 3, 1)) == (3, 2, 1)


def test_all_gateways_together_are_the_demand_and_dead_ones_are_not():
    def gateway(name, state="ready", **demand):
        return GatewayInfo(name=name, url="", state=state, demand=(ModelDemand(model="m", **demand),))

    merged = merge_demand((gateway("g", waiting=1, predicted_wait_s=2.0), gateway("h", waiting=2, rejected=3),
                           gateway("i", "failed", waiting=9)))  # fmt: skip
    assert merged == (ModelDemand(model="m", waiting=3, predicted_wait_s=2.0, rejected=3),)


# --- the table


def table(tmp_path):
    return Table("f", tmp_path / "t.json", models_of(build(FleetConfig, SEVERAL)))


def engine(state=EngineState.READY, name="engine-0"):
    return EngineInfo(name=name, model="a", state=state, url="u", server_pid=1)


def states(seen):
    return {model.name: (model.state, model.engines) for model in seen.status().models}


def test_every_model_is_listed_with_its_state_also_without_engines(tmp_path):
    seen = table(tmp_path)
    assert states(seen) == {"a": (ModelState.COLD, 0), "b": (ModelState.COLD, 0)}
    seen.register(engine(EngineState.STARTING), 0.0)
    assert states(seen)["a"] == (ModelState.STARTING, 0)
    seen.register(engine(), 0.0)
    assert states(seen)["a"] == (ModelState.READY, 1)
    assert seen.note_models({"b": (ModelState.WAITING, "why")})
    assert not seen.note_models({"b": (ModelState.WAITING, "why")}), "told once"
    assert states(seen)["b"] == (ModelState.WAITING, 0)
    assert [model["state"] for model in seen.status().public()["models"]] == ["ready", "waiting for room"]


def test_a_wake_is_news_once_and_over_when_an_engine_is_ready_or_the_start_failed(tmp_path):
    seen = table(tmp_path)
    version = seen.version
    assert seen.wake("a")
    assert not seen.wake("a"), "every waiting request says it"
    assert not seen.wake("unknown")
    assert seen.version == version + 1
    assert seen.status().models[0].woken_unix_nano > 0
    seen.register(engine(), 0.0)
    assert seen.status().models[0].woken_unix_nano == 0
    assert not seen.wake("a"), "it can be served"
    assert seen.wake("b")
    seen.note_models({"b": (ModelState.FAILED, "no such file")})
    assert (seen.status().models[1].woken_unix_nano, seen.status().models[1].is_startable) == (0, False)


def test_a_retired_engine_takes_no_more_requests_whatever_its_heartbeats_say(tmp_path):
    seen = table(tmp_path)
    seen.register(engine(), 0.0)
    assert seen.retire("engine-0")
    seen.register(engine(), 1.0)
    assert seen.status().engines[0].state is EngineState.DRAINING
    assert seen.remove("engine-0")
    assert not seen.register(engine(), 2.0), "its last heartbeat was under way"
    assert seen.status().engines == ()


def test_a_name_is_never_given_twice(tmp_path):
    seen = table(tmp_path)
    seen.register(engine(name="engine-4"), 0.0)
    assert seen.new_name({"engine-0", "engine-6"}) == "engine-7"
    assert seen.new_name(()) == "engine-8"
    seen.remove("engine-4")
    assert seen.new_name(()) == "engine-9"


def test_demand_is_no_news_for_routers_and_survives_a_restart(tmp_path):
    seen = table(tmp_path)
    demand = (ModelDemand(model="a", waiting=2),)
    seen.register_gateway(GatewayInfo(name="g", url="u", state="ready", demand=demand), 0.0)
    assert not seen.register_gateway(GatewayInfo(name="g", url="u", state="ready"), 1.0)
    assert seen.status().gateways[0].demand == ()
    seen.register(engine(), 0.0)
    assert table(tmp_path).status().gateways[0].name == "g"


async def test_the_same_drift_is_logged_once(tmp_path, caplog):
    front, ledger = Front.__new__(Front), Ledger(tmp_path / "ledger.sqlite")
    front._drift = {}
    told = ServerCounters(
        engine="e", server_pid=1, prompt_tokens=7.0, generated_tokens=0.0, busy=0, asked_unix_nano=time.time_ns()
    )
    for _ in range(3):
        await front._compare(ledger, told)
    ledger.close()
    assert front._drift["e"].prompt_tokens == 7
    assert caplog.text.count("counts other tokens") == 1


async def test_waking_a_model_neither_holds_the_loop_nor_is_told_twice_at_once(monkeypatch):
    told, asked = [], threading.Event()

    def slow(_fleet):
        asked.wait(60)  # as long as Ray's head does not answer
        return SimpleNamespace(wake=SimpleNamespace(remote=told.append))

    monkeypatch.setattr(watch, "get_directory", slow)
    front = Front.__new__(Front)
    front._fleet, front._wakes = "f", {}
    for model in ("a", "a", "b", "a"):
        front._wake(model)
    tasks = list(front._wakes.values())
    await asyncio.sleep(0.01)
    assert told == []
    asked.set()
    await asyncio.gather(*tasks)
    assert sorted(told) == ["a", "b"]
    front._wake("a")
    await asyncio.gather(*front._wakes.values())
    assert sorted(told) == ["a", "a", "b"]


async def test_a_start_that_is_withdrawn_at_two_looks_is_undone_to_its_end():
    crew = Crew(config=FleetConfig(), run_id="r", gateway_node_id=None)
    controller = Controller(ControllerSpec(crew=crew, models=()))
    undone = asyncio.Event()

    async def start():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            undone.set()

    move = Move(engine="engine-1", model="a", is_start=True, stuck=True)
    controller._run(move, start())
    for _ in range(2):
        await asyncio.sleep(0.01)
        await controller._begin(Stop("engine-1", "nobody asks for it any more"), {})
    await asyncio.wait({move.task})
    assert undone.is_set()
    assert not controller.snapshot()["moves"]


async def test_a_start_that_has_just_failed_is_left_to_tell_why(monkeypatch):
    crew = Crew(config=FleetConfig(engines=0, max_engines=1), run_id="r", gateway_node_id=None)
    controller = Controller(ControllerSpec(crew=crew, models=crew.config.served()))
    monkeypatch.setattr(controller, "_tell", lambda: asyncio.sleep(0))
    move = Move(engine="engine-1", model="tiny", is_start=True)
    controller._run(move, asyncio.sleep(60))
    failed = EngineInfo(name="engine-1", model="tiny", state=EngineState.FAILED, detail="no such file")
    woken = ModelInfo(name="tiny", state=ModelState.STARTING, is_elastic=True, woken_unix_nano=time.time_ns())
    await controller._look(FleetStatus(name="default", engines=(failed,), models=(woken,)))
    assert controller.snapshot()["decisions"] == [], "the directory may hear of it before the controller does"
    assert not move.task.cancelling()
    move.task.cancel()
