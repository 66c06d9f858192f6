"""Converted checkpoints against what llama.cpp's own converter makes of them (`python -m tests.peers.convert`)."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lltm_ray.cli.models import app
from lltm_ray.errors import ConfigError, LltmRayError, ModelFormatError, ModelNotFoundError
from lltm_ray.models.convert.checkpoint import Checkpoint, read_header
from lltm_ray.models.convert.convert import OUT_TYPES, convert
from lltm_ray.models.convert.vocabulary import read_vocabulary
from tests.checkpoints import CONFIGS, byte_pairs, shapes, write_checkpoint, write_safetensors
from tests.peers.convert import contents

WANTED = json.loads(Path(__file__).with_name("converted.json").read_text())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {architecture: write_checkpoint(folder / architecture, architecture) for architecture in CONFIGS}


@pytest.mark.parametrize("out_type", OUT_TYPES)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_tensor_and_number_is_llama_cpps_own(checkpoints, tmp_path, architecture, out_type):
    out = tmp_path / "out.gguf"
    info = convert(checkpoints[architecture], out, out_type=out_type)
    tensors, numbers = contents(out)
    wanted = WANTED[f"{architecture} {out_type}"]
    assert json.loads(json.dumps(tensors)) == wanted["tensors"]
    assert {name: numbers.get(name) for name in wanted["numbers"]} == pytest.approx(wanted["numbers"])
    more = {name: number for name, number in numbers.items() if name not in wanted["numbers"]}
    assert set(more.values()) <= {10_000.0}, "llama.cpp's default of rope.freq_base, said aloud"
    assert (info.path, info.n_params) == (str(out), sum(np.prod(each[1]) for each in tensors.values()))
    assert list(tmp_path.iterdir()) == [out]


def test_shards_and_other_types_of_weights_make_the_same_file(checkpoints, tmp_path):
    whole, shards = tmp_path / "whole.gguf", tmp_path / "shards.gguf"
    convert(checkpoints["Qwen2ForCausalLM"], whole, out_type="f32")
    convert(write_checkpoint(tmp_path / "parts", "Qwen2ForCausalLM", shards=3), shards, out_type="f32")
    assert contents(whole) == contents(shards)
    half, brain = (write_checkpoint(tmp_path / dtype, "Qwen2ForCausalLM", dtype=dtype) for dtype in ("F16", "BF16"))
    for folder, dtype, tolerance in ((half, "f16", 1e-3), (brain, "bf16", 1e-2)):
        out = tmp_path / f"{dtype}.gguf"
        convert(folder, out, out_type="f32")
        found = {each.name: each.data for each in gguf.GGUFReader(out).tensors}
        for each in gguf.GGUFReader(whole).tensors:
            assert found[each.name] == pytest.approx(each.data, rel=tolerance, abs=1e-6), each.name


def test_progress_is_told_and_can_end_it_without_a_trace(checkpoints, tmp_path):
    told = []
    convert(checkpoints["BertModel"], tmp_path / "a.gguf", progress=lambda *words: told.append(words))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2] == sum(each.n_bytes for each in gguf.GGUFReader(tmp_path / "a.gguf").tensors)

    def enough(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoints["BertModel"], tmp_path / "b.gguf", progress=enough)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_the_command_converts_and_says_where(checkpoints, tmp_path):
    out = tmp_path / "out.gguf"
    done = CliRunner().invoke(app, ["convert", str(checkpoints["LlamaForCausalLM"]), str(out), "--type", "q8_0"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert gguf.GGUFReader(out).fields["general.file_type"].contents() == 7


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture"),
        ({"num_local_experts": 8}, "num_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_attention_heads": "four"}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, change, word):
    folder = write_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM", config=change)
    with pytest.raises(ConfigError, match=word):
        convert(folder, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_that_is_not_whole_says_what_it_lacks(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "out.gguf")
    folder = write_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="model-00002-of-00002"):
        convert(folder, tmp_path / "out.gguf")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(ModelFormatError, match="secret"):
        convert(folder, tmp_path / "out.gguf")
    folder = write_checkpoint(tmp_path / "other", "LlamaForCausalLM")
    strange = {f"model.layers.{layer}.novelty.weight": np.ones((2, 2), np.float32) for layer in range(2)}
    write_safetensors(folder / "model.safetensors", strange)
    with pytest.raises(ModelFormatError, match="novelty"):
        convert(folder, tmp_path / "out.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        convert(folder, tmp_path / "out.gguf")
    with pytest.raises(ConfigError, match="out_type"):
        convert(folder, tmp_path / "out.gguf", out_type="q4_k_m")


def header(**tensors):
    raw = json.dumps(tensors).encode()
    return len(raw).to_bytes(8, "little") + raw


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.binary(max_size=90).map(lambda raw: len(raw).to_bytes(8, "little") + raw))
@example(b"\xff" * 8)
@example(header(x={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}))
@example(header(x={"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}))
@example(header(x={"dtype": "F32", "shape": [1, True], "data_offsets": [0, 4]}) + b"1234")
@example(header(x={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + b"1234")
@example(header(x={"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}) + b"1234")
@example(header(x={"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}))
@example(header(x={"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}))
@example(header(x={"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}) + b"1234")
@example(header(x={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + b"1234")
@example(header(x={"dtype": "F32", "shape": [], "data_offsets": [0, 4]}) + b"1234")
@example(header(x={"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}) + b"1")
@example(header(x=[1]))
@example((b"\x88\x13" + b"\0" * 6) + b"[" * 5000)
def test_a_damaged_or_hostile_file_is_refused_at_once(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except ModelFormatError:
        return
    for tensor in tensors:  # what was let through can be read, or is of a type that cannot
        if tensor.dtype in ("F64", "F32", "F16", "BF16"):
            assert tensor.read().shape == tensor.shape
        else:
            with pytest.raises(ModelFormatError, match="unquantized"):
                tensor.read()


def test_a_packed_checkpoint_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(x={"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}) + b"1234")
    with pytest.raises(ModelFormatError, match="unquantized"):
        read_header(path)[0].read()


@pytest.mark.parametrize(
    ("architecture", "model", "pre"),
    [
        ("LlamaForCausalLM", "gpt2", "gpt-2"),
        ("GemmaForCausalLM", "llama", "default"),
        ("BertModel", "bert", "bert-bge"),
    ],
)
def test_each_kind_of_tokenizer_is_told_from_the_file(checkpoints, architecture, model, pre):
    found = read_vocabulary(Checkpoint(checkpoints[architecture]))
    assert (found.model, found.pre) == (model, pre)
    assert len(found.tokens) == len(found.types) == 300
    assert (found.types[-1] == gguf.TokenType.UNUSED) == (model != "llama")
    assert (found.scores is not None) == (model == "llama")


def test_sentencepiece_merges_keep_their_order_and_bytes_their_type(checkpoints):
    found = read_vocabulary(Checkpoint(checkpoints["GemmaForCausalLM"]))
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["ab"] > score["\u2581ab"] > score["a"] - 1e-9
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert (kinds["<unk>"], kinds["<0x41>"]) == (gguf.TokenType.UNKNOWN, gguf.TokenType.BYTE)
    assert (kinds["ab"], kinds["<|end|>"]) == (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)


def test_an_unknown_pre_tokenizer_asks_for_its_name(checkpoints, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "Qwen2ForCausalLM")
    tokenizer = byte_pairs()
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\d+"}}, {"type": "ByteLevel"}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="pre"):
        read_vocabulary(Checkpoint(folder))
    assert read_vocabulary(Checkpoint(folder), pre="tekken").pre == "tekken"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "type", "vocab", "merges", "id", "added_tokens", "content"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_a_hostile_tokenizer_ends_in_an_error_of_ours(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["LlamaForCausalLM"] | {"architectures": ["x"]}))
    write_safetensors(tmp_path / "model.safetensors", {"x": np.ones(1, np.float32)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(LltmRayError):
        read_vocabulary(Checkpoint(tmp_path))


def test_the_made_checkpoints_have_every_tensor_of_their_family():
    assert all(len(shapes(architecture)) > 15 for architecture in CONFIGS)
