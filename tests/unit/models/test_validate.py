"""Every fault that a model file can have, and llama.cpp's own word on the ones it refuses."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.errors import ModelNotFoundError
from lltm_ray.models.embedded import embedded_path
from lltm_ray.models.gguf import read_gguf, shard_paths
from lltm_ray.models.gguf_header import TENSOR_TYPES, TensorInfo
from lltm_ray.models.gguf_values import find_bad_blocks
from lltm_ray.models.shards import split
from lltm_ray.models.validate import validate
from tests.sparse_models import Shape, write_sparse
from tests.unit.models.test_gguf import ARCH, build, entry, number, tensor, text

SIZES = {name: (elements, nbytes) for name, elements, nbytes in TENSOR_TYPES.values()}


def errors(path, **options):
    found = validate(path, **options)
    assert found.ok == (not any(each.severity == "error" for each in found.findings))
    return [each.what for each in found.findings if each.severity == "error"]


@pytest.mark.parametrize("shape", [Shape(kind="Q4_K"), Shape(architecture="qwen3moe", n_expert=4, n_expert_used=2)])
def test_a_good_model_has_no_findings(tmp_path, shape):
    write_sparse(tmp_path / "m.gguf", shape)
    found = validate(tmp_path / "m.gguf", check_data=True)
    assert (found.ok, found.findings, found.data_checked) == (True, (), True)
    assert found.n_tensors > 30


def test_the_packages_own_models_are_valid():
    for name in ("tiny", "tiny-draft"):
        found = validate(embedded_path(name), check_data=True)
        assert found.findings == ()
        assert found.tensor_bytes == read_gguf(embedded_path(name)).tensor_bytes


def test_a_stub_of_24_bytes_is_invalid(tmp_path):
    path = tmp_path / "stub.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 3, 0))
    assert errors(path) == ["3 tensors are more than the file can hold: it ends early; fetch or copy it again"]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert errors(path) == ["has no general.architecture, so llama.cpp cannot load it"]


def test_a_truncated_file_is_invalid_and_the_first_tensor_that_is_cut_is_named(tiny_path, tmp_path):
    whole, path = tiny_path.read_bytes(), tmp_path / "cut.gguf"
    last = read_gguf(tiny_path).tensors[-1]
    path.write_bytes(whole[: last.offset_bytes + last.nbytes - 1])
    found = validate(path, check_data=True)
    assert [(each.severity, each.tensor, each.offset_bytes) for each in found.findings] == [
        ("error", last.name, last.offset_bytes)
    ]
    path.write_bytes(whole[:300])
    assert len(errors(path)) == 1


def test_a_cut_file_is_told_once_with_the_number_of_tensors_it_has_lost(tiny_path, tmp_path):
    tensors, end, path = read_gguf(tiny_path).tensors, tiny_path.stat().st_size // 2, tmp_path / "cut.gguf"
    path.write_bytes(tiny_path.read_bytes()[:end])
    lost = [each for each in tensors if each.offset_bytes + each.nbytes > end]
    found = validate(path, check_data=True).findings
    assert [(each.severity, each.tensor, each.offset_bytes) for each in found] == [
        ("error", lost[0].name, min(lost[0].offset_bytes, end))
    ]
    assert f"end at {end}: {len(lost)} of {len(tensors)} tensors, the first of them {lost[0].name!r}" in found[0].what


def test_all_misplaced_tensors_are_told_and_not_only_the_first(tmp_path):
    listed = [tensor("a"), tensor("b", offset=0), tensor("b", offset=160), tensor("d", offset=300)]
    path = tmp_path / "m.gguf"
    path.write_bytes(build(tensors=listed, data=320))
    found = validate(path)
    assert [(each.tensor, each.what.split(": ")[0]) for each in found.findings[:4]] == [
        ("b", "tensor 'b' lies at data offset 0, not 128"),
        ("b", "tensor 'b' appears twice"),
        ("b", "tensor 'b' lies at data offset 160, not 128"),
        ("d", "tensor 'd' lies at data offset 300, not 288"),
    ]
    assert "beyond the file's end" in found.findings[4].what


def test_bytes_behind_the_last_tensor_are_a_warning(tiny_path, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_path.read_bytes() + bytes(100))
    found = validate(path)
    assert found.ok
    assert [each.what for each in found.findings] == ["100 bytes behind the last tensor belong to none"]


def write_model(path, *, drop=(), change=None, tensors=None, arch="llama"):
    """A model whose metadata can lack anything."""
    values = {
        f"{arch}.context_length": 128, f"{arch}.embedding_length": 32, f"{arch}.block_count": 1,
        f"{arch}.attention.head_count": 2, "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 4,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.tokens": ["a", "b", "c", "d"],
    } | (change or {})  # fmt: skip
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if key in drop:
            continue
        kinds = {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32, list: writer.add_array}
        kinds[type(value)](key, value)
    for name, shape in (tensors or {"token_embd.weight": (4, 32), "blk.0.attn_q.weight": (32, 32)}).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NEEDED = [
    ({}, None),
    ({"drop": ["llama.context_length"]}, "llama.context_length is missing"),
    ({"change": {"llama.block_count": 0}}, "llama.block_count is 0"),
    ({"drop": ["llama.attention.head_count"]}, "llama.attention.head_count is missing"),
    ({"drop": ["llama.attention.layer_norm_rms_epsilon"]}, "layer_norm_rms_epsilon"),
    ({"drop": ["tokenizer.ggml.model"]}, "there is no tokenizer"),
    ({"drop": ["tokenizer.ggml.tokens"]}, "tokenizer.ggml.tokens is missing"),
    ({"change": {"tokenizer.ggml.scores": [0.0] * 3}}, "3 entries for 4 tokens"),
    ({"change": {"tokenizer.ggml.model": "gpt2"}}, "tokenizer.ggml.merges is missing"),
    ({"change": {"llama.expert_count": 4}}, "expert_used_count is 0 of 4"),
    ({"change": {"llama.block_count": 3}}, "tensor blk.1.* is missing"),
    ({"tensors": {"blk.0.attn_q.weight": (32, 32)}}, "tensor token_embd.weight is missing"),
    ({"tensors": {"token_embd.weight": (5, 32), "blk.0.x": (4, 4)}}, "5 rows for 4 tokens"),
    ({"arch": "no-such-arch"}, "'no-such-arch', which llama.cpp does not know"),
    ({"change": {"llama.block_count": 70_000}}, "whole number from 0 to 4096"),
]


@pytest.mark.parametrize(("changes", "why"), NEEDED)
def test_what_llama_cpp_needs_is_asked_for(tmp_path, changes, why):
    found = validate(write_model(tmp_path / "m.gguf", **changes))
    said = [each.what for each in found.findings]
    assert all(each.remedy for each in found.findings)
    assert (said == []) if why is None else any(why in each for each in said)


def test_a_layer_of_deci_that_has_neither_heads_nor_a_width_needs_no_tensor(tmp_path):
    counts = {"attention.head_count": [2, 0], "attention.head_count_kv": [1, 0], "feed_forward_length": [64, 0]}
    for arch, said in (("deci", []), ("llama", ["tensor blk.1.* is missing"])):
        change = {f"{arch}.{key}": value for key, value in counts.items()} | {f"{arch}.block_count": 2}
        assert errors(write_model(tmp_path / f"{arch}.gguf", arch=arch, change=change)) == said
    change = {f"deci.{key}": value for key, value in (counts | {"feed_forward_length": [64, 64]}).items()}
    path = write_model(tmp_path / "m.gguf", arch="deci", change=change | {"deci.block_count": 2})
    assert errors(path) == ["tensor blk.1.* is missing"]


def test_a_name_of_many_shards_gives_no_more_findings_than_one_can_read(tmp_path):
    found = validate(write_model(tmp_path / "m-00001-of-05000.gguf"))
    assert (found.ok, len(found.findings)) == (False, 1000)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf"])
def test_a_file_whose_name_is_no_shards_is_read_by_itself(tmp_path, name):
    path = write_model(tmp_path / name)
    assert (shard_paths(path), validate(path).findings) == ((path,), ())


def test_llama_cpp_refuses_what_is_called_invalid(tmp_path, start_engine):
    path = tmp_path / "m.gguf"
    write_sparse(path, Shape(n_layer=1))
    raw = path.read_bytes().replace(b"llama.context_length", b"llama.context_lengxx")
    path.write_bytes(raw)
    assert errors(path) == ["llama.context_length is missing"]
    with pytest.raises(RuntimeError, match="Failed to init server"):
        start_engine(path)


def test_an_adapter_is_no_model_but_no_error_either(tmp_path):
    found = validate(write_model(tmp_path / "m.gguf", change={"general.type": "adapter"}, drop=["llama.block_count"]))
    assert found.ok
    assert "no model by itself but adapter" in found.findings[0].what


def test_a_set_of_shards_must_be_complete_and_consistent(tmp_path):
    write_sparse(tmp_path / "m.gguf", Shape(n_layer=2, kind="Q8_0"))
    made = split(tmp_path / "m.gguf", tmp_path / "s", max_tensors=8)
    found = validate(made[0], check_data=True)
    assert (found.findings, len(found.paths)) == ((), 3)
    assert found.tensor_bytes == read_gguf(tmp_path / "m.gguf").tensor_bytes
    assert validate(made[1]).ok
    kept = [path.read_bytes() for path in made]
    made[1].write_bytes(kept[1][:-40])
    assert any("beyond the file's end" in each for each in errors(made[0]))
    made[1].write_bytes(kept[2])
    said = errors(made[0])
    assert any("shard 2 says it is number 2" in each for each in said)
    assert any("is in two shards" in each for each in said)
    made[1].unlink()
    assert any("this shard is missing" in each for each in errors(made[0]))
    made[1].write_bytes(kept[1])
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(kept[0])
    assert any("its header says 3 shards, its name 1" in each for each in errors(alone))


def nan_block(kind):
    """Bytes of a block of zeros with NaN where the type's first scale or value lies; None where it has none."""
    places = {"Q2_K": 82, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}
    block = bytearray(SIZES[kind][1])
    if kind in ("I8", "I16", "I32", "I64", "NVFP4"):
        return None
    if kind == "MXFP4":
        block[0] = 0xFF
    elif kind == "IQ1_M":
        block[48:56] = bytes.fromhex("0000 0000 00f0 00f0".replace(" ", ""))
    elif kind in ("F32", "Q8_K"):
        block[:4] = struct.pack("<f", float("-inf"))
    elif kind == "F64":
        block[:8] = struct.pack("<d", float("nan"))
    elif kind == "BF16":
        block[:2] = struct.pack("<H", 0x7FC0)
    else:
        at = places.get(kind, 0)
        block[at : at + 2] = struct.pack("<e", float("nan"))
    return bytes(block)


@pytest.mark.parametrize("kind", SIZES)
def test_one_bad_block_of_any_type_is_found_where_it_is(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("lltm_ray.models.gguf_values._CHUNK_BYTES", 4096)
    size, count = SIZES[kind][1], 3000
    path, at = tmp_path / "data", 1777
    info = TensorInfo("t", (SIZES[kind][0], count), kind, 64, size * count)
    path.write_bytes(bytes(64 + size * count))
    assert find_bad_blocks(path, info) is None
    bad = nan_block(kind)
    if bad is None:
        path.write_bytes(b"\xff" * (64 + size * count))
        assert find_bad_blocks(path, info) is None
        return
    raw = bytearray(64 + size * count)
    for place in (at, count - 1):
        raw[64 + place * size : 64 + (place + 1) * size] = bad
    path.write_bytes(bytes(raw))
    assert find_bad_blocks(path, info) == (2, 64 + at * size)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ1_M", "TQ2_0"])
def test_random_blocks_are_judged_as_their_decoded_values_are(tmp_path, kind):
    """llama.cpp's decoder, in Python, says which blocks become NaN or infinity."""
    size, count = SIZES[kind][1], 4000
    raw = np.random.default_rng(1).integers(0, 256, (count, size), np.uint8)
    path = tmp_path / "data"
    path.write_bytes(raw.tobytes())
    with np.errstate(all="ignore"):
        decoded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    bad = np.flatnonzero(~np.isfinite(decoded).all(axis=1))
    found = find_bad_blocks(path, TensorInfo("t", (SIZES[kind][0], count), kind, 0, size * count))
    assert bad.size > 50
    assert found == (bad.size, int(bad[0]) * size)


def test_a_nan_in_a_model_is_found_with_its_tensor_only_when_data_is_asked_for(tmp_path):
    path = tmp_path / "m.gguf"
    info = write_sparse(path, Shape(kind="Q4_K"))
    wrong = next(each for each in info.tensors if each.name == "blk.2.ffn_up.weight")
    at = wrong.offset_bytes + 144 * 1000
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack("<e", float("inf")), at + 2)
    assert validate(path).ok
    found = validate(path, check_data=True)
    assert [(each.tensor, each.offset_bytes) for each in found.findings] == [("blk.2.ffn_up.weight", at)]
    assert "download or convert it again" in found.findings[0].remedy


def test_data_is_checked_in_bounded_memory(tmp_path):
    path = tmp_path / "m.gguf"
    write_sparse(path, Shape(n_embd=1024, n_ff=4096, n_layer=1, n_vocab=4096))
    tracemalloc.start()
    assert validate(path, check_data=True).ok
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 90 * 2**20
    assert peak < 24 * 2**20


def test_a_file_that_is_not_there_is_an_error_of_its_own(tmp_path):
    with pytest.raises(ModelNotFoundError):
        validate(tmp_path / "none.gguf")


def test_the_command_says_valid_or_ends_with_1(tiny_path, tmp_path):
    def run(*argv):
        return CliRunner().invoke(app, ["models", "validate", *argv])

    good = run(str(tiny_path), "--data")
    assert good.exit_code == 0
    assert good.stdout.startswith("valid: ")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_path.read_bytes()[:-100])
    bad = run(str(cut), "--json")
    assert bad.exit_code == 1
    told = json.loads(bad.stdout)
    assert told["ok"] is False
    assert {"severity", "what", "remedy", "tensor", "offset_bytes"} <= told["findings"][0].keys()
    shown = run(str(cut))
    assert shown.exit_code == 1
    assert "invalid: " in shown.stdout
    assert run(str(Path(tmp_path / "none.gguf"))).exit_code == 1


def test_metadata_alone_is_no_model(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(build([ARCH, entry("general.name", 8, text("m")), entry("a", 4, number(1, "I"))]))
    assert "tensor token_embd.weight is missing" in errors(path)
