"""LoRA adapters of a whole fleet: from its settings to every gateway's and the driver's requests."""

import json
import os
import signal
import urllib.request

import gguf
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import lltm_ray
from lltm_ray.cli.adapters import adapters
from lltm_ray.records import Adapter
from tests.process.gateway_harness import write_adapter
from tests.ray.conftest import post, until
from tests.ray.load import Load

ASKED = {"prompt": "once upon a time " * 20, "n_predict": 12, "temperature": 0}


@pytest.fixture(scope="module")
def adapted(ray_cluster, tmp_path_factory):
    """One engine of two slots, one for each of two gateways."""
    path = tmp_path_factory.mktemp("adapters") / "ada.gguf"
    write_adapter(path, 1)
    engine = {"n_ctx": 4096, "n_parallel": 2, "lora": [{"path": str(path), "scale": 0.0}]}
    settings = {"model": "random", "gpu_share": 0.0, "name": "adapted", "gateway": {"port": 0, "processes": 2}}
    with lltm_ray.Cluster.start(engine=engine, **settings) as fleet:
        yield fleet


def adapters_app():
    app = typer.Typer()
    app.command()(adapters)
    return app


def texts(fleet, model):
    """What both gateways say, sooner or later: each new connection goes to one of them."""
    return {post(f"{fleet.endpoint}/completion", ASKED | {"model": model})["content"] for _ in range(8)}


def test_driver_and_gateways_choose_the_same_adapter_and_mix_no_caches(adapted):
    (engine,) = adapted.status().engines
    assert engine.adapters == adapted.status().models[0].adapters == (Adapter(name="ada", scale=0.0),)
    asked = ASKED | {"model": "random:ada"}
    own = [(adapted.complete(**ASKED).text, adapted.complete(**asked).text) for _ in range(3)]
    assert own[0] == own[1] == own[2]
    assert own[0][0] != own[0][1]
    assert (texts(adapted, "random"), texts(adapted, "random:ada")) == ({own[0][0]}, {own[0][1]})
    with pytest.raises(lltm_ray.errors.ModelNotFoundError, match="random:ada"):
        adapted.complete(**ASKED, model="random:eve")


def test_new_scales_reach_every_gateway(adapted):
    plain, chosen = texts(adapted, "random"), texts(adapted, "random:ada")
    for scale, wanted in ((1.0, chosen), (0.0, plain)):
        told = post(f"{adapted.endpoint}/lora-adapters", [{"id": 0, "scale": scale}])
        assert told == {"success": True}
        assert texts(adapted, "random") == wanted
    assert plain != chosen


@pytest.fixture(scope="module")
def plain(ray_cluster):
    """Two engines that were started without adapters."""
    settings = {"model": "random", "gpu_share": 0.0, "name": "plain", "gateway": {"port": 0}, "engines": 2}
    with lltm_ray.Cluster.start(engine={"n_ctx": 4096, "n_parallel": 2}, **settings) as fleet:
        yield fleet


@pytest.fixture
def eve(tmp_path):
    write_adapter(tmp_path / "eve.gguf", 5)
    return tmp_path / "eve.gguf"


def scales(fleet):
    return {each.name: each.scales for each in fleet.adapters()}


def server_scales(fleet):
    with urllib.request.urlopen(f"{fleet.endpoint}/lora-adapters", timeout=30) as reply:
        return [each["scale"] for each in json.load(reply)]


def pids(fleet):
    return {engine.server_pid for engine in fleet.status().engines}


def test_engines_get_and_lose_an_adapter_under_load_and_no_request_fails(plain, eve):
    before, engines = pids(plain), [engine.name for engine in plain.status().engines]
    base = plain.complete(**ASKED).text
    with Load(plain.endpoint, clients=6) as load:
        plain.load_adapter(eve, scale=0.0)
        load.wait_for(12)
        assert scales(plain) == {"eve": dict.fromkeys(engines, 0.0)}
        chosen = [plain.complete(**ASKED, model="random:eve").text for _ in range(4)]
        plain.set_adapter_scale("eve", 1.0)
        load.wait_for(12)
        assert {plain.complete(**ASKED).text for _ in range(4)} == set(chosen)
        plain.unload_adapter("eve")
        load.wait_for(12)
    assert load.failures() == []
    assert len(load.outcomes) > 60
    assert (len(set(chosen)), chosen[0] != base) == (1, True)
    assert not before & pids(plain), "every server was restarted"
    assert (scales(plain), plain.complete(**ASKED).text) == ({}, base)
    with pytest.raises(lltm_ray.errors.ModelNotFoundError, match="no adapters"):
        plain.complete(**ASKED, model="random:eve")


def test_an_adapter_of_another_model_disturbs_nobody(plain, tmp_path):
    before = pids(plain)
    wrong = tmp_path / "wrong.gguf"
    writer = gguf.GGUFWriter(wrong, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((2, 128), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.zeros((64, 2), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for path, why in ((wrong, "another base's"), (tmp_path / "none.gguf", "no such file")):
        with pytest.raises(lltm_ray.errors.LltmRayError, match=why):
            plain.load_adapter(path)
    assert (pids(plain), scales(plain)) == (before, {})


def test_a_new_scale_is_every_routers_and_outlives_the_server(adapted):
    (engine,) = adapted.status().engines
    base, chosen = adapted.complete(**ASKED).text, adapted.complete(**ASKED, model="random:ada").text
    adapted.set_adapter_scale("random:ada", 1.0)
    os.kill(engine.server_pid, signal.SIGKILL)
    until(lambda: not {engine.server_pid} & pids(adapted) and adapted.status().engines[0].state == "ready")
    assert scales(adapted) == {"ada": {engine.name: 1.0}}
    assert (adapted.complete(**ASKED).text, texts(adapted, "random")) == (chosen, {chosen})
    assert server_scales(adapted) == [1.0], "the server itself, for those who ask it"
    post(f"{adapted.endpoint}/lora-adapters", [{"id": 0, "scale": 0.0}])
    until(lambda: scales(adapted) == {"ada": {engine.name: 0.0}})
    assert (adapted.complete(**ASKED).text, base != chosen) == (base, True)


def test_what_cannot_be_done_is_said_and_undone(adapted):
    before, wanted = scales(adapted), adapted.status().models[0].adapters
    with pytest.raises(lltm_ray.errors.ModelNotFoundError, match="random:ada"):
        adapted.set_adapter_scale("eve", 1.0)
    with pytest.raises(lltm_ray.errors.ConfigError, match="scale="):
        adapted.set_adapter_scale("ada", float("inf"))
    (engine,) = adapted.status().engines
    os.kill(engine.server_pid, signal.SIGSTOP)  # it takes nothing, and says nothing
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lltm_ray.actors.adapters._ANSWER_S", 0.5)
            with pytest.raises(lltm_ray.errors.FleetError, match=engine.name):
                adapted.set_adapter_scale("ada", 0.5)
    finally:
        os.kill(engine.server_pid, signal.SIGCONT)
    assert adapted.status().models[0].adapters == wanted
    until(lambda: server_scales(adapted) == [before["ada"][engine.name]] == list(scales(adapted)["ada"].values()))
    adapted.set_adapter_scale("ada", 0.25)
    assert scales(adapted) == {"ada": {engine.name: 0.25}}


def test_the_command_shows_and_sets(adapted):
    run = CliRunner().invoke
    told = run(adapters_app(), ["--name", "adapted", "--set", "ada=0.75", "--json"])
    assert [each["scales"] for each in json.loads(told.stdout)] == [{"engine-0": 0.75}], told.output
    assert "ada" in run(adapters_app(), ["--name", "adapted"]).stdout
    assert run(adapters_app(), ["--name", "adapted", "--set", "ada"]).exit_code == 2
