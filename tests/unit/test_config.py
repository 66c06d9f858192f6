"""Where the paths of settings are meant from."""

import os
from pathlib import Path

import pytest

from lltm_ray.config import EngineConfig, FleetConfig, GatewayConfig, LoraAdapter, ModelConfig, build

TOML = """
llama_server = "bin/llama-server"
log_dir = "~/logs"
[engine]
mmproj = "eye.gguf"
slot_save_path = "/srv/slots"
lora = [{ path = "a/b.gguf", scale = 0.5 }]
[gateway]
host = "0.0.0.0"
api_key_file = "keys"
trace = "../trace.jsonl"
[[models]]
model = "here.gguf"
[[models]]
model = "gone.gguf"
engine = { model_draft = "draft.gguf" }
[[models]]
model = "tiny"
[[models]]
model = "owner/name:file.gguf@main"
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The TOML file's folder and, elsewhere, the process's; both hold a `here.gguf`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("etc", "cwd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "here.gguf").touch()
    (tmp_path / "etc" / "fleet.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "etc", tmp_path / "cwd"


def test_paths_of_a_file_are_meant_from_its_folder_and_names_stay_names(folders):
    etc, cwd = folders
    fleet = FleetConfig.from_toml(os.path.relpath(etc / "fleet.toml", cwd)).with_absolute_paths()
    gateway, engine = fleet.gateway, fleet.engine
    seen = fleet.llama_server, engine.mmproj, engine.lora[0].path, gateway.api_key_file, gateway.trace
    wanted = "bin/llama-server", "eye.gguf", "a/b.gguf", "keys", "../trace.jsonl"
    assert [os.path.normpath(path) for path in seen] == [os.path.normpath(etc / path) for path in wanted]
    assert (fleet.log_dir, engine.slot_save_path) == (str(Path.home() / "logs"), "/srv/slots")
    models = [model.model for model in fleet.models]
    normal = [os.path.normpath(path) for path in models[:2]]
    assert normal == [str(etc / "here.gguf"), str(etc / "gone.gguf")]
    assert models[2:] == ["tiny", "owner/name:file.gguf@main"]
    assert os.path.normpath(fleet.models[1].engine.model_draft) == str(etc / "draft.gguf")


def test_what_wins_over_the_file_is_meant_from_the_process_s_folder(folders):
    etc, cwd = folders
    over = {"llama_server": "embedded", "gateway": {"api_key_file": "other"}}
    fleet = FleetConfig.from_toml(etc / "fleet.toml", **over).with_absolute_paths()
    assert (fleet.llama_server, fleet.gateway.api_key_file) == ("embedded", str(cwd / "other"))
    assert fleet.gateway.host == "0.0.0.0"


def test_absolute_paths_change_nothing_else(folders):
    _etc, cwd = folders
    engine = EngineConfig(n_parallel=2, tensor_split=(1.0, 2.0), extra_args=("--x",), lora=(LoraAdapter(path="l"),))
    model = ModelConfig(model="here.gguf", gpu_share=0.5, engine=engine)
    before = FleetConfig(models=(model,), engine=engine, gateway=GatewayConfig(port=0))
    after = before.with_absolute_paths()
    assert after != before
    assert after.with_absolute_paths() == after
    assert after.models[0].model == str(cwd / "here.gguf")
    assert after.engine.lora == (LoraAdapter(path=str(cwd / "l")),)
    assert after.engine.tensor_split == (1.0, 2.0)
    assert after.gateway == before.gateway
    assert build(FleetConfig, {"gateway": None}).with_absolute_paths().gateway is None
