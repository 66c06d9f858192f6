"""LoRA adapters of a whole fleet: from its settings to every gateway's and the driver's requests."""

import pytest

import lltm_ray
from lltm_ray.records import Adapter
from tests.process.gateway_harness import write_adapter
from tests.ray.conftest import post

ASKED = {"prompt": "once upon a time " * 20, "n_predict": 12, "temperature": 0}


@pytest.fixture(scope="module")
def adapted(ray_cluster, tmp_path_factory):
    """One engine of two slots, one for each of two gateways."""
    path = tmp_path_factory.mktemp("adapters") / "ada.gguf"
    write_adapter(path, 1)
    engine = {"n_ctx": 4096, "n_parallel": 2, "lora": [{"path": str(path), "scale": 0.0}]}
    settings = {"model": "tiny", "gpu_share": 0.0, "name": "adapted", "gateway": {"port": 0, "processes": 2}}
    with lltm_ray.Cluster.start(engine=engine, **settings) as fleet:
        yield fleet


def texts(fleet, model):
    """What both gateways say, sooner or later: each new connection goes to one of them."""
    return {post(f"{fleet.endpoint}/completion", ASKED | {"model": model})["content"] for _ in range(8)}


def test_driver_and_gateways_choose_the_same_adapter_and_mix_no_caches(adapted):
    (engine,) = adapted.status().engines
    assert engine.adapters == adapted.status().models[0].adapters == (Adapter(name="ada", scale=0.0),)
    asked = ASKED | {"model": "tiny:ada"}
    own = [(adapted.complete(**ASKED).text, adapted.complete(**asked).text) for _ in range(3)]
    assert own[0] == own[1] == own[2]
    assert own[0][0] != own[0][1]
    assert (texts(adapted, "tiny"), texts(adapted, "tiny:ada")) == ({own[0][0]}, {own[0][1]})
    with pytest.raises(lltm_ray.errors.ModelNotFoundError, match="tiny:ada"):
        adapted.complete(**ASKED, model="tiny:eve")


def test_new_scales_reach_every_gateway(adapted):
    plain, chosen = texts(adapted, "tiny"), texts(adapted, "tiny:ada")
    for scale, wanted in ((1.0, chosen), (0.0, plain)):
        told = post(f"{adapted.endpoint}/lora-adapters", [{"id": 0, "scale": scale}])
        assert told == {"success": True}
        assert texts(adapted, "tiny") == wanted
    assert plain != chosen
