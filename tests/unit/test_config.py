"""Where the paths of settings are meant from."""

import os
from pathlib import Path

import pytest

from lltm_ray._files import read_keys
from lltm_ray.config import EngineConfig, FleetConfig, GatewayConfig, LoraAdapter, ModelConfig, build
from lltm_ray.errors import ConfigError

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
    """The TOML file's folder and, elsewhere, the process's; both hold a `here.gguf` and keys."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("etc", "cwd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "here.gguf").touch()
        for keys in ("keys", "other"):
            (tmp_path / name / keys).write_text("alpha\n")
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


# --- what is wrong with a file

WRONG = [
    ("engines = true", "engines=True: must be int"),
    ("modl = 'tiny'", "modl='tiny': unknown setting; did you mean model"),
    ("drain_timeout_s = -1", "drain_timeout_s=-1.0: must be from 0 to 100000"),
    ("[gateway]\nport = 99999", "gateway.port=99999: must be from 0 to 65535"),
    ("engin = 2", "engin=2: unknown setting; did you mean engines or engine?"),
    ("[engin]\nn_ctx = 512", "engin={'n_ctx': 512}: unknown setting; did you mean engine or engines?"),
    ("[gateway]\nprot = 1", "gateway.prot=1: unknown setting; did you mean port?"),
    ("[gateway]\nhost = '0.0.0.0'", "gateway.host='0.0.0.0': a public address needs api_key_file"),
    ("gateway = 5", "gateway=5: must be a table [gateway] (in Python a dict)"),
    ("engine = 2", "engine=2: must be a table [engine] (in Python a dict); did you mean engines?"),
    ("engines = { n_parallel = 2 }", "engines={'n_parallel': 2}: must be int; did you mean engine?"),
    ("[engine]\nflash_attn = 'yes'", "engine.flash_attn='yes': must be one of on, off, auto"),
    ("[engine]\ntensor_split = [1, 'x']", "engine.tensor_split[1]='x': must be float"),
    ("[engine]\nlora = [{ scale = 1 }]", "engine.lora[0].path=None: is missing"),
    ("[telemetry]\nsample_ratio = 2", "telemetry.sample_ratio=2.0: must be from 0 to 1"),
    ("[analytics]\nengine = 'cudff'", "analytics.engine='cudff': must be one of"),
    ("[[models]]\nengines = 2", "models[0].model=None: is missing"),
    ("[[models]]\nmodel = 'a'\n[[models]]\nmodel = 'b'\nengines = 0", "models[1].engines=0: needs max_engines"),
    ("[[models]]\nmodel = 'a'\nengine = { n_parallel = 0 }", "models[0].engine.n_parallel=0: must be from 1"),
    ("[[models]]\nmodel = 'a'\n[[models]]\nmodel = 'a'", "models[1].served_name='a': two models have it"),
    ("[engine]\nlora = [{ path = 'a' }, { path = 'a' }]", "engine.lora[1].name='a': two adapters have it"),
    ("[models]\nmodel = 'a'", "models={'model': 'a'}: must be a list: a table [[models]] for each"),
    ("models = ['tiny', 3]", "models[0]='tiny': must be a table [[models]], with its model"),
    ("models = [{ model = 'tiny' }, 3]", "models[1]=3: must be a table [[models]], with its model"),
    ("[engine]\nlora = ['a.gguf']", "engine.lora[0]='a.gguf': must be a table [[engine.lora]], with its path"),
    ("[[models]]\nmodel = 'a'\nengine = 1", "models[0].engine=1: must be a table [models.engine]"),
    ("queue_limit = 1", "queue_limit=1: unknown setting; gateway has one of this name; known are"),
    (
        "[gateway]\nport = 1\nengines = 2",
        "gateway.engines=2: unknown setting; the top level has one of this name",
    ),
    (
        "[[models]]\nmodel = 'a'\nn_ctx = 8",
        "models[0].n_ctx=8: unknown setting; engine has one of this name",
    ),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[said.partition("=")[0] for _, said in WRONG])
def test_what_is_wrong_in_a_file_is_told_with_its_file_and_table(tmp_path, text, said):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        FleetConfig.from_toml(path, name="x")
    assert str(caught.value).startswith(f"{path}: {said}")
    assert caught.value.field == f"{path}: {said.partition('=')[0]}"


NO_TOML = [
    ("engines = ", "line 1='engines =': is no TOML: Invalid value (at end of document); "),
    ("model = tiny\nengines = 2\n", "line 1='model = tiny': is no TOML: Invalid value (at line 1, column 9); "),
    ("[gateway]\nport = 1\n\n  host = 0.0.0.0\n", "line 4='host = 0.0.0.0': is no TOML in gateway: "),
    ("[gateway]\n[engine]\n[ gateway ] # again", "line 3='[ gateway ] # again': is no TOML in gateway: Cannot declare"),
    ("[[models]]\nmodel = 'a'\n[[models]]\nmodel = 'a", 'line 4="model = \'a": is no TOML in models[1]: '),
    ("[[models]]\n[models.engine]\nn_ctx = 1\nn_ctx = 2\n#", "line 4='n_ctx = 2': is no TOML in models.engine: "),
]


@pytest.mark.parametrize(("text", "said"), NO_TOML, ids=[said.partition(":")[0] for _, said in NO_TOML])
def test_a_file_that_is_no_toml_is_told_with_the_line_and_its_table(tmp_path, text, said):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        FleetConfig.from_toml(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert str(caught.value).endswith("; texts stand in quotes, each name once in its table")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_bytes(b"\x80")
    for name, why in ((path, "'utf-8' codec"), (tmp_path / "none.toml", ".*No such file"), (tmp_path, ".*directory")):
        with pytest.raises(ConfigError, match=rf"^config='{name}': cannot be read: {why}"):
            FleetConfig.from_toml(name)


KEYS = [
    (None, "cannot be read: No such file or directory; write one API key a line into it"),
    (b"", "holds no key; write one a line"),
    (b"# none\n\n", "holds no key; write one a line"),
    (b"alpha\nb\xffta\n", "line 2 is no UTF-8 text; write one API key a line into it"),
]


@pytest.mark.parametrize(("keys", "said"), KEYS, ids=["missing", "empty", "a comment", "a wrong line"])
def test_a_key_file_that_is_of_no_use_is_told(tmp_path, keys, said):
    path = tmp_path / "keys"
    if keys is not None:
        path.write_bytes(keys)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert str(caught.value) == f"gateway.api_key_file='{path}': {said}"


def test_what_is_given_over_a_file_is_not_said_to_be_in_it(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text("max_engines = 2\n[gateway]\nport = 1")
    for over, said in (
        ({"gateway": {"port": -1}}, "gateway.port=-1: must be from 0 to 65535"),
        ({"engines": 3}, "engines=3: must be at most max_engines=2"),
        ({"models": [{"model": ""}]}, "models[0].model='': must name a model"),
    ):
        with pytest.raises(ConfigError) as caught:
            FleetConfig.from_toml(path, **over)
        assert str(caught.value) == f"{said} (over {path})"


def test_a_file_that_is_wrong_only_with_what_is_given_over_it_is_not_blamed_alone(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text("engines = 4")
    with pytest.raises(ConfigError) as caught:
        FleetConfig.from_toml(path, max_engines=2)
    said = "engines=4: must be at most max_engines=2"
    assert str(caught.value) == f"{path}: {said} (with what is given over it)"
    path.write_text("engines = 4\nmax_engines = 2")
    with pytest.raises(ConfigError) as caught:
        FleetConfig.from_toml(path, name="x")
    assert str(caught.value) == f"{path}: {said}"


def test_settings_given_by_name_are_told_with_their_table():
    with pytest.raises(ConfigError, match=r"^engine\.n_parallel=0: must be from 1"):
        build(FleetConfig, {"engine": {"n_parallel": 0}})
    with pytest.raises(ConfigError, match=r"^port=-1: must be from 0"):
        GatewayConfig(port=-1)


def test_a_number_that_is_none_is_told_by_its_name():
    with pytest.raises(ConfigError, match=r"^port='80': must be a number from 0 to 65535"):
        GatewayConfig(port="80")
    with pytest.raises(ConfigError, match=r"^queue_timeout_s=nan: must be from 0 to 1000000"):
        GatewayConfig(queue_timeout_s=float("nan"))
