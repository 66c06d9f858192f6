from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lltm_ray.cli import app
from lltm_ray.models.catalog import load_catalog


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))


def models(*argv: str) -> Result:
    return CliRunner().invoke(app, ["models", *argv])


def test_the_list_has_every_entry_of_the_catalogue() -> None:
    result = models("list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == list(load_catalog())


def test_a_kind_narrows_the_list_also_as_json() -> None:
    listed = json.loads(models("list", "--kind", "reranker", "--json").stdout)
    assert listed
    assert {entry["kind"] for entry in listed} == {"reranker"}


def test_an_unknown_kind_is_the_users_mistake() -> None:
    result = models("list", "--kind", "poems")
    assert result.exit_code == 2
    assert "must be one of chat, embedding, reranker" in result.stderr


def test_pull_makes_random_and_prints_only_its_path() -> None:
    result = models("pull", "random")
    assert result.exit_code == 0
    assert Path(result.stdout.strip()).is_file()


def test_show_tells_what_the_file_says_and_what_memory_each_context_takes() -> None:
    facts = json.loads(models("show", "random", "--json").stdout)
    assert (facts["architecture"], facts["origin"], facts["chat_template"]) == ("llama", "random", True)
    assert facts["file_bytes"] == Path(facts["path"]).stat().st_size
    assert [row["n_ctx"] for row in facts["memory"]] == [2048, facts["context"]]
    small, large = facts["memory"]
    assert large["kv_bytes"] == 4 * small["kv_bytes"] == 4 * 2048 * 2 * 2 * 2 * 16 * 2  # K and V, layers, heads, f16


def test_show_prints_a_path_of_ones_own_for_people(tmp_path: Path) -> None:
    path = models("pull", "random").stdout.strip()
    own = tmp_path / "own.gguf"
    own.write_bytes(Path(path).read_bytes())
    result = models("show", str(own))
    assert result.exit_code == 0
    assert "F32 100%" in result.stdout
    assert "MiB" in result.stdout


def test_show_of_a_model_not_downloaded_shows_its_entry_and_how_to_get_it() -> None:
    result = models("show", "qwen2.5-14b-q4_k_m", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["licence"] == "apache-2.0"
    assert "models pull qwen2.5-14b-q4_k_m" in result.stderr


def test_an_unknown_model_is_one_sentence_with_exit_code_1() -> None:
    result = models("show", "no-such-model")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no-such-model" in result.stderr


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, but long enough to be read as one")
    result = models("show", str(tmp_path / "x.gguf"))
    assert result.exit_code == 1
    assert "byte 0" in result.stderr


def test_an_engine_is_never_downloaded_without_a_hash() -> None:
    result = models("engine-download", "--tag", "b1")
    assert result.exit_code == 1
    assert "--sha256" in result.stderr


def test_an_unknown_variant_is_refused_with_those_there_are() -> None:
    result = models("engine-download", "--variant", "z80")
    assert result.exit_code == 1
    assert "cpu-x64" in result.stderr


def test_a_mirror_must_be_a_web_address() -> None:
    result = models("engine-download", "--sha256", "a" * 64, "--base-url", "ftp://mirror")
    assert result.exit_code == 1
    assert "ftp://mirror" in result.stderr
