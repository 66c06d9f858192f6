"""The draft model of an engine: named as the model is."""

import pytest

from lltm_ray.actors.launch import EngineSpec, plan_launch
from lltm_ray.config import EngineConfig, FleetConfig
from lltm_ray.errors import ModelNotFoundError
from lltm_ray.models.embedded import embedded_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))


def launch(draft):
    engine = EngineConfig(n_ctx=512, n_parallel=1, model_draft=draft)
    fleet = FleetConfig(model="tiny", llama_server="embedded", engine=engine)
    spec = EngineSpec(name="e0", fleet=fleet, run_id="r1", share=0.0, engines_on_node=1, gateway_node_id=None)
    return plan_launch(spec, host="127.0.0.1")


def test_a_draft_is_given_by_name():
    argv = launch("tiny-draft").server.argv(0)
    assert argv[argv.index("--spec-draft-model") + 1] == str(embedded_path("tiny-draft"))


@pytest.mark.parametrize(("draft", "remedy"), [("tiny-drat", "did you mean tiny-draft"), ("gone.gguf", "no such file")])
def test_a_draft_that_is_not_there_is_told_from_the_model(draft, remedy):
    with pytest.raises(ModelNotFoundError, match=rf"'{draft}' not found: engine\.model_draft: {remedy}"):
        launch(draft)
