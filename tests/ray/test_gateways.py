"""Two gateway processes on one port, each with its own part of every engine's slots; and a model that is cold."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

import lltm_ray
from lltm_ray.actors import names
from lltm_ray.actors.gateway import GatewayActor
from lltm_ray.actors.remote import actor
from lltm_ray.config import GatewayConfig
from lltm_ray.records import FleetStatus, ModelInfo, ModelState
from tests.ray.conftest import post, until
from tests.ray.load import Load


@pytest.fixture(scope="module")
def pair(ray_cluster):
    """Two engines of four slots behind two gateways."""
    settings = {"port": 0, "processes": 2}
    with lltm_ray.Cluster.start(model="random", engines=2, gpu_share=0.0, name="pair", gateway=settings) as fleet:
        yield fleet


def snapshots(fleet):
    actors = [ray.get_actor(names.gateway(fleet, name), namespace=names.NAMESPACE) for name in names.gateways(2)]
    return ray.get([actor.snapshot.remote() for actor in actors], timeout=60)


def owned(fleet="pair"):
    return [[row["slots_total"] for row in each["engines"].values()] for each in snapshots(fleet)]


def test_gateways_on_one_port_share_out_the_slots_and_the_clients(pair):
    assert len({gateway.url for gateway in pair.status().gateways}) == 1
    until(lambda: owned() == [[2, 2], [2, 2]])
    with Load(pair.endpoint) as load:
        load.wait_for(200)
    assert not load.failures()
    answered = [sum(model["requests"] for model in each["models"].values()) for each in snapshots("pair")]
    assert all(answered), f"the kernel gave all clients to one: {answered}"
    until(lambda: not any(row["slots_busy"] for each in snapshots("pair") for row in each["engines"].values()))


def test_a_drain_reaches_every_gateway(pair):
    until(lambda: owned() == [[2, 2], [2, 2]])
    report = post(f"{pair.endpoint}/lltm/drain?engine=engine-0&timeout_s=10", {})
    assert report["left"] == 0, report
    assert [each["engines"]["engine-0"]["is_closed"] for each in snapshots("pair")] == [True, True]
    until(lambda: [each.closed for each in pair.status().gateways] == [("engine-0",)] * 2)
    post(f"{pair.endpoint}/lltm/undrain?engine=engine-0", {})
    assert [each["engines"]["engine-0"]["is_closed"] for each in snapshots("pair")] == [False, False]
    until(lambda: [each.closed for each in pair.status().gateways] == [()] * 2)


def test_a_gateway_that_dies_leaves_its_slots_to_the_other_until_it_is_back(pair):
    victim = next(each for each in pair.status().gateways if each.name == "gateway-1")
    with Load(pair.endpoint, clients=8) as load:
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: next(each for each in pair.status().gateways if each.name == "gateway-1").pid != victim.pid)
        load.wait_for(100)
    for failure in load.failures():
        assert failure.got_bytes or not failure.engine, failure
    until(lambda: owned() == [[2, 2], [2, 2]])


def test_a_request_for_a_cold_model_starts_it_and_is_answered(ray_cluster):
    settings = {"name": "cold", "gateway": {"port": 0}, "gpu_share": 0.0, "engines": 0, "max_engines": 1}
    with lltm_ray.Cluster.start(model="random", idle_timeout_s=1.0, **settings) as fleet:
        ask = {"model": "random", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: post(f"{fleet.endpoint}/v1/chat/completions", ask), range(4)))
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [4] * 4
        until(lambda: fleet.status().models[0].state == "cold")
        assert post(f"{fleet.endpoint}/v1/chat/completions", ask)["usage"]["completion_tokens"] == 4


class LateDirectory:
    """Tells its table when two seconds have gone, as on a busy machine."""

    async def watch(self, version, timeout_s=10.0):
        await asyncio.sleep(timeout_s if version else 2.0)
        return FleetStatus(name="late", models=(ModelInfo(name="random", state=ModelState.COLD),), version=1)

    async def register_gateway(self, info):
        """Its heartbeats are of no interest here."""


def test_a_gateway_takes_no_connection_before_it_has_heard_of_its_fleet(ray_cluster):
    directory = actor(LateDirectory).options(name=names.directory("late"), namespace=names.NAMESPACE).remote()
    gateway = actor(GatewayActor).remote("gateway-0", "late", GatewayConfig(port=0, ledger=False))
    try:
        url = ray.get(gateway.ready.remote(), timeout=60).url
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["random"]
    finally:
        for each in (gateway, directory):
            ray.kill(each)


class Session:
    """A chat whose every turn comes by a new connection, so that the kernel chooses its gateway."""

    def __init__(self, name):
        self.messages = [{"role": "user", "content": f"{name} talks of this and that. " * 20}]
        self.reused = self.wanted = self.tokens = 0

    def turn(self, url):
        ask = {"messages": self.messages, "max_tokens": 17, "temperature": 0, "ignore_eos": True}
        answer = post(f"{url}/v1/chat/completions", ask)
        told = answer["timings"]
        self.reused += min(told["cache_n"], self.tokens)
        self.wanted += self.tokens
        self.tokens = told["cache_n"] + told["prompt_n"] + told["predicted_n"] - 1
        self.messages += [answer["choices"][0]["message"], {"role": "user", "content": "go on, please " * 8}]


def reused_ratio(url, pause_s):
    """What part of the tokens that five new sessions could find cached they found, with so much time to gossip."""
    sessions = [Session(f"{number} of {pause_s}") for number in range(5)]
    for _ in range(6):
        for session in sessions:
            session.turn(url)
        time.sleep(pause_s)
    return sum(each.reused for each in sessions) / sum(each.wanted for each in sessions)


def test_sessions_that_change_the_gateway_find_their_caches_and_erased_slots_are_known(ray_cluster):
    settings = {"gateway": {"port": 0, "processes": 2}, "gpu_share": 0.0, "engine": {"cache_ram_mib": 0}}
    with lltm_ray.Cluster.start(model="random", engines=2, name="gossip", **settings) as fleet:
        until(lambda: owned("gossip") == [[2, 2], [2, 2]])
        ratios = []
        for pause_s in (1.5, 3.0, 6.0):  # gossip takes its turn every 0.5 s, later on a busy machine
            ratios.append(reused_ratio(fleet.endpoint, pause_s))
            if ratios[-1] >= 0.85:
                break
        answered = [sum(model["requests"] for model in each["models"].values()) for each in snapshots("gossip")]
        assert all(answered), f"the kernel gave all clients to one: {answered}"
        assert ratios[-1] >= 0.85, ratios

        for engine in fleet.status().engines:
            for slot in range(engine.slots_total):
                post(f"{engine.url}/slots/{slot}?action=erase", {}, {"authorization": f"Bearer {engine.api_key}"})
        until(lambda: not sum(each["models"]["random"]["residency"]["slot_sequences"] for each in snapshots("gossip")))
