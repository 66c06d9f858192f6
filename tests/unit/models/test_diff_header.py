"""Metadata of two files, compared."""

from __future__ import annotations

import json

import gguf
import numpy as np
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.models.diff import diff_models
from lltm_ray.models.diff_header import diff_headers
from lltm_ray.models.embedded import embedded_path
from lltm_ray.models.shards import split


def write(path, *, context=128, template="{{ x }}", tokens=("a", "b"), layers=(1, 2), name="m"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_chat_template(template)
    writer.add_token_list(list(tokens))
    writer.add_head_count_kv(list(layers))
    writer.add_tensor("x", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_with_the_same_metadata_have_no_difference(tmp_path):
    a, b = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf")
    assert diff_headers(a, b) == ()
    assert diff_models(a, b).metadata == ()


def test_each_key_that_differs_is_told_with_both_values_and_long_ones_by_their_length(tmp_path):
    a = write(tmp_path / "a.gguf")
    b = write(tmp_path / "b.gguf", context=256, template="y" * 500, tokens=("a", "c"), layers=range(9))
    found = {each.key: (each.a, each.b) for each in diff_headers(a, b)}
    assert found == {
        "llama.context_length": ("128", "256"),
        "tokenizer.chat_template": ("{{ x }}", "y" * 60 + "… (500 characters)"),
        "tokenizer.ggml.tokens": ("2 texts", "2 texts"),
        "llama.attention.head_count_kv": ("2 numbers: 1, 2", "9 numbers: 0, 1, 2, 3, 4, 5, …"),
    }
    assert {each.key for each in diff_models(a, b).metadata} == set(found)


def test_shards_of_a_model_have_its_metadata(tiny_path, tmp_path):
    made = split(tiny_path, tmp_path / "s", max_tensors=4)
    assert diff_headers(tiny_path, made[0]) == ()


def test_two_models_can_be_compared_by_their_headers():
    run = CliRunner()
    done = run.invoke(app, ["models", "diff", "tiny", "tiny-draft", "--header"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "block_count" in done.stdout
    assert "(weights)" in done.stdout
    told = json.loads(run.invoke(app, ["models", "diff", "tiny", "tiny-draft", "--header", "--json"]).stdout)
    assert {each["key"] for each in told} >= {"(weights)", "llama.embedding_length"}
    assert not any(each["key"] == "tokenizer.ggml.tokens" for each in told)
    same = run.invoke(app, ["models", "diff", str(embedded_path("tiny")), "tiny", "--header"])
    assert "The metadata is the same." in same.stderr


def test_a_key_of_one_file_alone_has_no_other_value(tmp_path):
    a = write(tmp_path / "a.gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_tensor("x", np.ones(32, np.float32))
    writer.add_name("m")
    writer.add_file_type(7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {each.key: (each.a, each.b) for each in diff_headers(a, tmp_path / "b.gguf")}
    assert found["general.file_type"] == (None, "7")
    assert found["llama.context_length"] == ("128", None)
