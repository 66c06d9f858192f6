"""Quantized models load in llama.cpp and answer, and the commands make them."""

import json

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.models.gguf import read_gguf
from lltm_ray.sdk.server import ServerManager
from tests.quantized import SMALL, digest, make, write_matrix, write_source


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Nothing of this machine's llama.cpp, and no signal handler that outlives a test."""
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)


def models(*arguments):
    done = CliRunner().invoke(app, ["models", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0"])
def test_llama_cpp_answers_with_a_quantized_model(tmp_path, kind):
    path = tmp_path / "model.gguf"
    code, out, said = models("quantize", "tiny", path, "--type", kind, "--allow-requantize")
    assert (code, out.strip()) == (0, str(path)), said
    assert f"{kind}: 9.2 MiB to {'5.5' if kind == 'Q4_K_M' else '9.2'} MiB" in said
    with ServerManager() as manager:
        manager.start_server(str(path), ctx_size=512, n_threads=1, n_threads_batch=1)
        question = [{"role": "user", "content": "How do I start a fleet?"}]
        assert "lltm-ray up" in manager.client.chat(question, max_tokens=24, temperature=0).text


def test_several_types_go_into_a_folder_and_one_that_fails_spoils_no_other(tmp_path):
    source = write_source(tmp_path / "model-F16.gguf", SMALL["llama"], "F16")
    folder, kinds = tmp_path / "out", ("Q8_0", "IQ2_XXS", "q4_k")
    code, out, said = models("quantize", source, folder, *[word for kind in kinds for word in ("--type", kind)])
    assert code == 2
    assert out.split() == [str(folder / "model-Q8_0.gguf"), str(folder / "model-Q4_K_M.gguf")]
    assert "IQ2_XXS: error: type='IQ2_XXS': blk.0.attn_k.weight would be garbage" in said
    assert {path.name for path in folder.iterdir()} == {"model-Q8_0.gguf", "model-Q4_K_M.gguf"}


def test_json_tells_what_was_made_of_what_and_by_what(tmp_path):
    source, matrix = write_source(tmp_path / "model.gguf", SMALL["llama"]), tmp_path / "matrix.gguf"
    write_matrix(matrix, SMALL["llama"])
    given = ("--type", "IQ4_XS", "--imatrix", matrix, "--threads", 1, "--leave-output", "--json")
    code, out, _ = models("quantize", source, tmp_path / "out.gguf", *given)
    (row,) = json.loads(out)
    make(source, tmp_path / "same.gguf", "IQ4_XS", imatrix=str(matrix), leave_output=True)
    assert (code, digest(tmp_path / "out.gguf")) == (0, digest(tmp_path / "same.gguf"))
    assert row["file_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert row["quantization"] == dict(read_gguf(row["path"]).quantization)
    assert (row["kind"], row["tool"][:5], row["error"]) == ("IQ4_XS", "ggml ", None)


def test_wrong_words_end_with_two_and_what_is_missing_with_one(tmp_path):
    source = write_source(tmp_path / "model.gguf", SMALL["llama"])
    code, _, said = models("quantize", source, tmp_path / "out.gguf", "--type", "Q4")
    assert (code, "type='Q4': must be one of BF16" in said) == (2, True)
    code, _, said = models("quantize", source, tmp_path / "out.gguf", "--type", "Q8_0", "--tool", "llama-quantize")
    assert (code, "llama-quantize is not installed: `lltm-ray models engine-download`" in said) == (1, True)
    code, _, said = models("imatrix", source, tmp_path / "text.txt", tmp_path / "out.gguf")
    assert (code, "llama-imatrix is not installed: `lltm-ray models engine-download`" in said) == (1, True)
    code, _, said = models("quantize", source, source, "--type", "Q8_0", "--type", "Q4_0")
    assert (code, "must be a folder for several types" in said) == (2, True)
