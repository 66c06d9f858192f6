"""Adapters from PEFT's folder to a gateway's answers, and what routers make of scales and adapters that change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gateway_harness import gateway, infos, real_engine

from lltm_ray.actors.directory_table import Table
from lltm_ray.config import LoraAdapter
from lltm_ray.errors import ConfigError
from lltm_ray.models.convert.convert import convert
from lltm_ray.models.lora.convert import convert_adapter
from lltm_ray.models.lora.merge import merge_adapter
from lltm_ray.records import Adapter, EngineInfo, EngineState, ModelInfo, ModelState
from lltm_ray.routing.adapters import choose
from lltm_ray.routing.router import Router
from tests.checkpoints import write_checkpoint
from tests.peers.lora import write_peft

ADA, BOB = Adapter(name="ada", scale=0.0, path="/a"), Adapter(name="bob", scale=1.0, path="/b")


async def test_a_converted_adapter_and_the_merged_model_say_the_same_through_a_gateway(tmp_path: Path) -> None:
    base, ada, merged = tmp_path / "base.gguf", tmp_path / "ada.gguf", tmp_path / "merged.gguf"
    folder = write_checkpoint(tmp_path / "hf", "LlamaForCausalLM")
    convert(folder, base, out_type="f32")
    convert_adapter(write_peft(tmp_path / "peft", "LlamaForCausalLM", strength=0.2), ada, base=folder, out_type="f32")
    merge_adapter(base, [(ada, 1.0)], merged)
    body = {"prompt": list(range(60, 90)), "n_predict": 24, "temperature": 0}
    said = {}
    lora = (LoraAdapter(path=str(ada), scale=0.0),)
    for file, adapters, models in ((base, lora, ("tiny", "tiny:ada")), (merged, (), ("tiny",))):
        with real_engine("one", file, tmp_path, slots=2, lora=adapters) as engine:
            async with gateway(*infos([engine])) as gate:
                for model in models:
                    async with gate.http.post(f"{gate.url}/completion", json=body | {"model": model}) as reply:
                        said[file.stem, model] = (await reply.json())["content"]
    assert said["base", "tiny:ada"] == said["merged", "tiny"]
    assert said["base", "tiny"] != said["merged", "tiny"]


def engine(name: str, *adapters: Adapter) -> EngineInfo:
    return EngineInfo(
        name=name,
        model="m",
        state=EngineState.READY,
        url=f"http://127.0.0.1/{name}",
        slots_total=1,
        server_pid=1,
        adapters=adapters,
    )


def test_a_router_sends_the_scales_that_an_engine_has_now() -> None:
    router = Router(10, 1.0)
    router.update([engine("e", ADA, BOB)])
    router.rescale("e", {1: 0.5})
    router.update([engine("e", replace(ADA, now=0.25), BOB)])
    row = router._engines["e"]
    assert row.scales is None, "what the engine says is newer than what a gateway heard"
    assert [each.own for each in row.info.adapters] == [0.25, 1.0]


def test_ids_mean_what_all_engines_have_while_one_more_adapter_is_on_its_way() -> None:
    engines = [engine("e0", ADA, BOB), engine("e1", replace(ADA, now=0.5)), engine("e2")]
    assert choose("m", [{"id": 0, "scale": 1.0}], "m", engines) == (("ada", None),)
    with pytest.raises(ConfigError, match=r"ids are 0 \(ada\)"):
        choose("m", [{"id": 1, "scale": 1.0}], "m", engines)
    with pytest.raises(ConfigError, match="number their adapters differently"):
        choose("m", [{"id": 0, "scale": 1.0}], "m", [engine("e0", ADA, BOB), engine("e1", BOB)])


def test_what_engines_shall_have_outlives_the_directory_and_is_changed_by_one_at_a_time(tmp_path: Path) -> None:
    models = (ModelInfo(name="m", state=ModelState.COLD, adapters=(ADA,)),)
    table = Table("f", tmp_path / "t.json", models)
    now = replace(ADA, now=0.5)
    assert table.note_adapters("m", (ADA,), (now, BOB))
    assert not table.note_adapters("m", (ADA,), ()), "somebody else was quicker"
    assert not table.note_adapters("n", (), (ADA,))
    (again,) = Table("f", tmp_path / "t.json", models).status().models
    assert [(each.name, each.own, each.path) for each in again.adapters] == [("ada", 0.5, "/a"), ("bob", 1.0, "/b")]
