"""What cannot work is told before Ray is started, in the words of the engine that would find out."""

from dataclasses import replace

import pytest
import ray

import lltm_ray
from lltm_ray.actors.launch import EngineSpec, plan_launch
from lltm_ray.config import FleetConfig, build
from lltm_ray.errors import ConfigError, LltmRayError, ModelNotFoundError

NOWHERE = [
    {"model": "nosuch"},
    {"model": "tinyy"},
    {"model": "/nowhere/m.bin"},
    {"model": "~/nowhere/m.gguf"},
    {"model": "tiny", "engine": {"model_draft": "nosuch"}},
    {"model": "nosuch", "engine": {"model_draft": "/nowhere/draft.gguf"}},
    {"models": [{"model": "tiny"}, {"model": "nosuch"}]},
]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch, tmp_path):
    def join(_address):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("lltm_ray.driver.join_ray", join)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    assert not ray.is_initialized()


@pytest.mark.parametrize("settings", NOWHERE, ids=str)
def test_a_model_that_is_not_there_is_told_without_ray(settings):
    settings = {"gateway": {"port": 0}, **settings}
    with pytest.raises(ModelNotFoundError) as told:
        lltm_ray.Cluster.start(**settings)
    fleet = build(FleetConfig, settings).with_absolute_paths()
    one = fleet.for_model(fleet.served()[-1])
    spec = EngineSpec(name="e", fleet=one, run_id="r", share=0.0, engines_on_node=1, gateway_node_id=None)
    with pytest.raises(LltmRayError) as later:
        plan_launch(spec, host="127.0.0.1")
    assert (type(told.value), str(told.value)) == (type(later.value), str(later.value))


@pytest.mark.parametrize("model", ["tiny", "random", "owner/name:file.gguf@main", "qwen3-8b-q4_k_m"])
def test_what_may_be_there_is_left_to_the_engine(model, tmp_path):
    with pytest.raises(AssertionError, match="Ray was started"):
        lltm_ray.Cluster.start(model=model, gateway={"port": 0})
    assert not list(tmp_path.iterdir()), "nothing is made or downloaded before"


def test_a_number_for_a_table_is_told_with_what_was_probably_meant():
    for start in ({"engine": 2}, {"config": replace(FleetConfig(), engine=2)}):
        with pytest.raises(ConfigError, match=r"^engine=2: must be a table \[engine\] .* did you mean engines\?$"):
            lltm_ray.Cluster.start(**start)
