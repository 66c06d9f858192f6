"""`lltm-ray up`: its options become settings of the engines."""

from importlib import import_module

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.llamacpp.command import build_args, read_args


def up(*words):
    return CliRunner().invoke(app, ["up", *words])


def test_how_a_model_is_split_over_gpus_is_an_option_and_reaches_llama_server(monkeypatch, tmp_path):
    fleets, file = [], tmp_path / "fleet.toml"

    def note(fleet, **_):
        fleets.append(fleet)

    monkeypatch.setattr(import_module("lltm_ray.cli.up"), "_run", note)
    file.write_text('[engine]\nsplit_mode = "row"\nmain_gpu = 1\n')
    done = up("--config", str(file), "--split-mode", "none", "--tensor-split", "3, 1.5", "--main-gpu", "0")
    assert done.exit_code == 0, done.output
    paths = {"model_path": "/m.gguf", "alias": "m", "api_key_file": None}
    flags = read_args(build_args(fleets[0].engine, host="127.0.0.1", port=1, **paths))
    assert [flags[name] for name in ("--split-mode", "--tensor-split", "--main-gpu")] == ["none", "3.0,1.5", 0]
    assert up("--config", str(file)).exit_code == 0
    assert (fleets[1].engine.split_mode, fleets[1].engine.main_gpu) == ("row", 1), "what is left out is the file's"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--split-mode", "sideways", "must be one of none, layer, row, tensor"),
        ("--tensor-split", "3:1", "must be a number for each of an engine's GPUs, e.g. 3,1"),
        ("--tensor-split", "3,-1", "parts must be finite"),
        ("--tensor-split", "0,0", "not all 0"),
        ("--main-gpu", "-1", "main_gpu"),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_words(option, value, told):
    done = up(option, value)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())
