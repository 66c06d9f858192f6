"""Where an engine saves its slots."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from lltm_ray.actors.launch import EngineSpec, adapters_of, plan_launch, slot_seal
from lltm_ray.config import EngineConfig, FleetConfig, LoraAdapter
from lltm_ray.errors import ConfigError, ServerBinaryError
from lltm_ray.llamacpp.slot_folder import new_name
from lltm_ray.models.random_weights import ensure_random
from lltm_ray.records import Adapter

FLEET = FleetConfig(model="tiny", llama_server="embedded", name="f")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    return tmp_path


def launch(fleet=FLEET, **engine):
    fleet = replace(fleet, engine=EngineConfig(n_ctx=512, n_parallel=1, **engine))
    spec = EngineSpec(name="e0", fleet=fleet, run_id="r1", share=0.0, engines_on_node=1, gateway_node_id=None)
    return plan_launch(spec, host="127.0.0.1")


def argument(planned):
    argv = planned.server.argv(0)
    return argv[argv.index("--slot-save-path") + 1] if "--slot-save-path" in argv else ""


def test_an_engine_gets_a_private_folder_of_its_own(cache):
    first, second = launch(), launch()
    for planned in (first, second):
        folder = Path(planned.slot_folder)
        assert folder.parent == cache / "run" / "f-r1" / "slots"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert argument(planned) == planned.slot_folder
        assert planned.slots.path == folder
    assert first.slot_folder != second.slot_folder
    for planned in (first, second):
        planned.slots.remove()
        assert not Path(planned.slot_folder).exists()


def test_a_folder_that_somebody_chose_is_used_and_never_removed(tmp_path):
    planned = launch(slot_save_path=str(tmp_path))
    assert (planned.slots, planned.slot_folder, argument(planned)) == (None, str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    "engine",
    [{"embeddings": True}, {"reranking": True}, {"extra_args": ("--slot-save-path", "/somewhere")}],
)
def test_a_server_without_conversations_or_with_its_own_word_on_them_gets_none(engine):
    planned = launch(**engine)
    assert (planned.slots, planned.slot_folder) == (None, "")


def test_what_a_dead_run_left_is_removed_when_the_next_engine_starts(cache):
    left = cache / "run" / "f-old" / "slots" / "e0-abc"
    left.mkdir(parents=True)
    (left / new_name()).write_bytes(b"a conversation")
    planned = launch()
    assert not left.exists()
    planned.slots.remove()


def test_a_server_that_cannot_be_started_leaves_no_folder(cache):
    with pytest.raises(ServerBinaryError):
        launch(replace(FLEET, llama_server="/nowhere/llama-server"))
    assert not list(cache.glob("run/*/slots/*"))


def test_where_requests_choose_adapters_there_is_no_cache_that_mixes_them(tmp_path):
    planned = launch(lora=(LoraAdapter(path=str(tmp_path / "ada.gguf"), scale=0.0),))
    argv = planned.server.argv(0)
    assert argv[argv.index("--cache-ram") + 1] == "0"
    assert argv[argv.index("--lora-scaled") + 1] == f"{tmp_path}/ada.gguf:0.0"
    assert planned.cache_ram_tokens == 0
    planned.slots.remove()


def test_adapters_are_called_by_name_or_file_and_no_two_alike():
    one = LoraAdapter(path="/a/ada.gguf")
    assert adapters_of(EngineConfig(lora=(one, replace(one, name="bob", scale=0.5)))) == (
        Adapter(name="ada"),
        Adapter(name="bob", scale=0.5),
    )
    with pytest.raises(ConfigError, match="two adapters have it"):
        EngineConfig(lora=(one, LoraAdapter(path="/b/ada.gguf")))
    with pytest.raises(ConfigError, match="does not tell adapters apart"):
        EngineConfig(lora=(one,), cache_ram_mib=100)


def test_saved_slots_are_for_engines_of_the_same_file_and_settings_alone(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"weights")
    config = EngineConfig(cache_type_k="q8_0")
    seal = slot_seal(config, model, "llama-server")
    assert seal == slot_seal(EngineConfig(cache_type_k="q8_0"), model, "llama-server")
    others = {slot_seal(EngineConfig(), model, "llama-server"), slot_seal(config, model, "other-server")}
    model.with_name("copy.gguf").write_bytes(b"weights")
    others.add(slot_seal(config, model.with_name("copy.gguf"), "llama-server"))
    model.write_bytes(b"WEIGHTS")
    os.utime(model, ns=(0, 0))
    others.add(slot_seal(config, model, "llama-server"))
    model.write_bytes(b"weights and more")
    os.utime(model, ns=(0, 0))
    others.add(slot_seal(config, model, "llama-server"))
    assert len({seal, *others}) == 6


def test_engines_restore_each_others_slots_whoever_of_them_made_the_random_model(tmp_path):
    seals = []
    for _ in range(2):  # as two makers at once: one has looked at the file before the other replaces it
        model = ensure_random(tmp_path)
        seals.append(slot_seal(EngineConfig(), model, "llama-server"))
        model.unlink()
    assert seals[0] == seals[1]
