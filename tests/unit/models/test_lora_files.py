"""LoRA adapters: converted as llama.cpp's own script does, merged as llama.cpp computes them (`tests.peers.lora`)."""

import json
import math
import re
import shutil
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import xllamacpp
from typer.testing import CliRunner

from lltm_ray.cli.models import app
from lltm_ray.errors import ConfigError, LltmRayError, ModelFormatError, ModelNotFoundError
from lltm_ray.models.convert.checkpoint import read_header
from lltm_ray.models.convert.convert import convert
from lltm_ray.models.gguf import read_gguf
from lltm_ray.models.lora.convert import OUT_TYPES, convert_adapter
from lltm_ray.models.lora.file import check_fits, read_lora
from lltm_ray.models.lora.merge import merge_adapter
from lltm_ray.models.lora.peft import _Pattern
from lltm_ray.models.shards import split
from tests.checkpoints import CONFIGS, shapes, write_checkpoint, write_safetensors
from tests.peers.lora import ALPHA, PREFIX, RANK, contents, modules, write_peft

WANTED = json.loads(Path(__file__).with_name("converted_lora.json").read_text())
LLAMA, GEMMA = "LlamaForCausalLM", "GemmaForCausalLM"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {architecture: write_checkpoint(folder / architecture, architecture) for architecture in CONFIGS}


@pytest.fixture(scope="module")
def llama(bases, tmp_path_factory):
    """A base in F32 and its adapter, whole."""
    folder = tmp_path_factory.mktemp("llama")
    convert(bases[LLAMA], folder / "base.gguf", out_type="f32")
    made = write_peft(folder / "peft", LLAMA)
    convert_adapter(made, folder / "ada.gguf", base=folder / "base.gguf", out_type="f32")
    return folder


def numbers(path):
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}


def deltas(path):
    """What each matrix gets at scale 1, computed apart from the code under test."""
    found, alpha = numbers(path), read_lora(path).alpha
    names = {name.rpartition(".")[0] for name in found}
    turned = {name: name == "token_embd.weight" for name in names}
    pairs = {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in names}
    return {name: (a @ b.T if turned[name] else b @ a) * alpha / b.shape[1] for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_tensor_and_number_is_llama_cpps_own_whatever_the_base_is_given_as(bases, tmp_path, architecture):
    made, base = write_peft(tmp_path / "peft", architecture), tmp_path / "base.gguf"
    convert(bases[architecture], base)
    for out_type, given in zip(OUT_TYPES, (bases[architecture], base, base), strict=True):
        out = tmp_path / f"{out_type}.gguf"
        lora = convert_adapter(made, out, base=given, out_type=out_type)
        assert json.loads(json.dumps(contents(out))) == WANTED[f"{architecture} {out_type}"]
        assert (lora.alpha, {pair.rank for pair in lora.pairs.values()}) == (ALPHA, {RANK})
        assert len(lora.pairs) == len(modules(architecture))
        check_fits(lora, read_gguf(base))


@pytest.mark.parametrize("architecture", [LLAMA, "Qwen3ForCausalLM", GEMMA])
def test_merging_after_converting_is_converting_after_merging(bases, tmp_path, architecture):
    """The checkpoint's own W + alpha / r B A, converted, beside the converted base with the converted adapter."""
    made = write_peft(tmp_path / "peft", architecture)
    factors = {each.name: each.read() for each in read_header(made / "adapter_model.safetensors")}
    weights = {each.name: each.read() for each in read_header(bases[architecture] / "model.safetensors")}
    for module in modules(architecture):
        halves = [factors[f"{PREFIX}{module}.lora_{end}"] for end in ("A.weight", "B.weight")] \
            if "embed_tokens" not in module else \
            [factors[f"{PREFIX}{module}.lora_embedding_{end}"] for end in "AB"]  # fmt: skip
        delta = halves[1] @ halves[0] * np.float32(ALPHA / RANK)
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + (delta.T if "embed_tokens" in module else delta)
    merged_folder = write_checkpoint(tmp_path / "merged", architecture)
    write_safetensors(merged_folder / "model.safetensors", weights)
    convert(merged_folder, tmp_path / "wanted.gguf", out_type="f32")
    convert(bases[architecture], tmp_path / "base.gguf", out_type="f32")
    convert_adapter(made, tmp_path / "ada.gguf", base=bases[architecture], out_type="f32")
    merge_adapter(tmp_path / "base.gguf", [(tmp_path / "ada.gguf", 1.0)], tmp_path / "ours.gguf")
    ours, wanted = numbers(tmp_path / "ours.gguf"), numbers(tmp_path / "wanted.gguf")
    assert ours.keys() == wanted.keys()
    assert ("output.weight" in ours) == (architecture != GEMMA), "the head is neither lost nor made"
    for name, array in wanted.items():
        assert ours[name] == pytest.approx(array, abs=1e-5), name


def logits(start_engine, path, adapters=()):
    """Log probabilities of the whole vocabulary after a prompt, from the real engine."""
    loras = []
    for file, scale in adapters:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(file), scale
        loras.append(lora)
    kept = xllamacpp.ggml_type.GGML_TYPE_F32
    engine = start_engine(path, n_ctx=256, lora_adapters=loras, cache_type_k=kept, cache_type_v=kept)
    asked = {"prompt": [5, 80, 17, 3, 99, 42], "n_predict": 1, "n_probs": 300, "temperature": -1}
    (token,) = engine.post("/completion", asked)["completion_probabilities"]
    return {each["id"]: each["logprob"] for each in token["top_logprobs"]}


def test_the_merged_model_says_what_llama_cpp_says_with_the_adapters_loaded(llama, bases, start_engine, tmp_path):
    other = write_peft(tmp_path / "other", LLAMA, only=("q_proj", "k_proj", "down_proj"), rank=3, seed=9)
    convert_adapter(other, tmp_path / "bob.gguf", base=bases[LLAMA])
    chosen = [(llama / "ada.gguf", 0.25), (tmp_path / "bob.gguf", -0.5)]
    merge_adapter(llama / "base.gguf", chosen, tmp_path / "merged.gguf")
    plain, loaded, merged = (
        logits(start_engine, *each)
        for each in ((llama / "base.gguf",), (llama / "base.gguf", chosen), (tmp_path / "merged.gguf",))
    )
    assert len(merged) == len(loaded) == 300
    assert max(abs(merged[token] - loaded[token]) for token in loaded) < 1e-3
    assert max(abs(plain[token] - loaded[token]) for token in loaded) > 0.1, "the adapters do change something"


def test_what_no_adapter_changes_is_copied_byte_for_byte_and_metadata_is_kept(llama, bases, tmp_path):
    base, made, steps = tmp_path / "base.gguf", tmp_path / "merged.gguf", []
    convert(bases[LLAMA], base, out_type="q8_0")
    q_only = write_peft(tmp_path / "q", LLAMA, only=("q_proj",))
    convert_adapter(q_only, tmp_path / "q.gguf", base=base)
    merge_adapter(base, [(tmp_path / "q.gguf", 0.5)], made, progress=lambda *step: steps.append(step))
    before, after = gguf.GGUFReader(base), gguf.GGUFReader(made)
    assert {name: field.contents() for name, field in before.fields.items()} == {
        name: field.contents() for name, field in after.fields.items()
    }
    added = deltas(tmp_path / "q.gguf")
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.tensor_type) == (new.name, new.tensor_type)
        if old.name in added:
            wanted = gguf.quants.dequantize(old.data, old.tensor_type) + added[old.name] / 2
            assert new.data.tobytes() == gguf.quants.quantize(wanted, old.tensor_type).tobytes()
        else:
            assert old.data.tobytes() == new.data.tobytes()
    assert len(added) == 2
    assert steps[-1][1] == steps[-1][2] == read_gguf(made).tensor_bytes
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def test_changed_tensors_get_the_asked_type_and_f16_where_their_own_cannot_be_written(llama, tmp_path):
    q4 = tmp_path / "q4k.gguf"
    writer = gguf.GGUFWriter(q4, "llama")
    writer.add_uint32("llama.block_count", 1)
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (4, 144), np.uint8)
    blocks[:, :4] = np.array([[0.01, 0.02]] * 4, np.float16).view(np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_tensor("blk.0.attn_v.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    adapter = write_gguf_adapter(tmp_path / "ada.gguf", {"blk.0.attn_q.weight": (256, 4)})
    for asked, got in ((None, "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("f32", "F32")):
        merged = merge_adapter(q4, [(adapter, 1.0)], tmp_path / "out.gguf", asked)
        assert {each.name: each.type for each in merged.tensors} == {
            "blk.0.attn_q.weight": got,
            "blk.0.attn_v.weight": "Q4_K",
        }
    wanted = numbers(q4)["blk.0.attn_q.weight"] + deltas(adapter)["blk.0.attn_q.weight"]
    assert numbers(tmp_path / "out.gguf")["blk.0.attn_q.weight"] == pytest.approx(wanted, abs=1e-6)


def write_gguf_adapter(path, sizes, *, alpha=4.0, rank=2, **keys):
    """By hand: for what our own converter would not write."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(1)
    said = {"general.type": "adapter", "adapter.type": "lora"} | keys
    for key, value in said.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (columns, rows) in sizes.items():
        writer.add_tensor(f"{name}.lora_a", random.standard_normal((rank, columns)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", random.standard_normal((rows, rank)).astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def test_what_llama_cpp_has_no_word_for_is_in_the_tensors(llama, bases, tmp_path):
    """Each module's scaling is PEFT's, as `alpha / rank` of the file and its b say together."""
    ends = ("q_proj", "v_proj", "down_proj")
    for use_rslora in (False, True):
        made = write_peft(
            tmp_path / f"peft-{use_rslora}",
            LLAMA,
            only=ends,
            ranks={"v_proj": 4, "1.self_attn.q_proj": 2},
            rank_pattern={"v_proj": 4, r"layers\.1\.self_attn\.q_proj": 2},
            alpha_pattern={"down_proj": 3.0, "model.layers.0.self_attn.v_proj": 20},
            use_rslora=use_rslora,
        )
        convert_adapter(made, tmp_path / "ada.gguf", base=bases[LLAMA], out_type="f32")
        found = deltas(tmp_path / "ada.gguf")
        factors = {each.name: each.read() for each in read_header(made / "adapter_model.safetensors")}
        alphas = {"blk.0.attn_v": 20.0, "blk.0.ffn_down": 3.0, "blk.1.ffn_down": 3.0}
        for short, module in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
            for layer in (0, 1):
                a, b = (factors[f"{PREFIX}model.layers.{layer}.{module}.lora_{half}.weight"] for half in "AB")
                alpha, rank = alphas.get(f"blk.{layer}.{short}", ALPHA), len(a)
                scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
                assert found[f"blk.{layer}.{short}.weight"] == pytest.approx(b @ a * scaling, rel=1e-4, abs=1e-5)
        a, b = (factors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_{half}.weight"] for half in "AB")
        scaling = ALPHA / (math.sqrt(2) if use_rslora else 2)
        norms = [np.linalg.norm(each) for each in (found["blk.1.attn_q.weight"], b @ a * scaling)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5), "rows of Q are exchanged, not scaled"


def test_a_split_model_is_merged_into_one_file(llama, tmp_path):
    reader = gguf.GGUFReader(llama / "base.gguf")
    parts = [tmp_path / f"base-0000{part}-of-00002.gguf" for part in (1, 2)]
    for part, path in enumerate(parts):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 2)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        for each in reader.tensors[part::2]:
            writer.add_tensor(each.name, np.array(each.data), raw_dtype=each.tensor_type)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
    merge_adapter(parts[0], [(llama / "ada.gguf", 1.0)], tmp_path / "out.gguf")
    merge_adapter(llama / "base.gguf", [(llama / "ada.gguf", 1.0)], tmp_path / "whole.gguf")
    one, other = numbers(tmp_path / "out.gguf"), numbers(tmp_path / "whole.gguf")
    assert read_gguf(tmp_path / "out.gguf").split_count == 0
    assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in other.items()}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "ADALORA"}, "peft_type"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"r": 4}, "r"),
        ({"rank_pattern": {"q_proj": 4}}, "r"),
        ({"alpha_pattern": {"(a+)+": 4}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a|.)" * 24: 4}}, "alpha_pattern"),
        ({"alpha_pattern": {"[a-z]_proj": 4}}, "alpha_pattern"),
        ({"rank_pattern": {"x" * 201: 4}}, "rank_pattern"),
        ({"rank_pattern": {f"m{number}": 4 for number in range(4097)}}, "rank_pattern"),
    ],
)
def test_an_adapter_that_llama_cpp_cannot_compute_is_refused_by_name(bases, tmp_path, config, field):
    made = write_peft(tmp_path / "peft", LLAMA, only=("q_proj",), **config)
    with pytest.raises(ConfigError, match=f"^{field}=") as caught:
        convert_adapter(made, tmp_path / "out.gguf", base=bases[LLAMA])
    assert caught.value.field == field
    assert not (tmp_path / "out.gguf").exists()


def test_patterns_fit_what_they_fit_in_peft_and_none_takes_long():
    keys = ["q_proj", "1.self_attn.q_proj", r"layers\.1\..*_proj", "^model.layers.1.mlp.up_proj$", ".*", "o_proj"]
    keys += [".*proj", "a.*r.*1.*q", "layers.*layers.*", "elf_attn.q_proj", "^layers.*", "", "mod.*1.*proj"]
    modules = ["model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj", "q_proj", "model.layers.1.mlp.up_proj"]
    for key in keys:
        wanted = [re.match(rf"(.*\.)?({key})$", module) is not None for module in modules]  # peft's get_pattern_key
        assert [_Pattern(key).fits(module) for module in modules] == wanted, key
    started = time.process_time()
    assert not _Pattern("a.*" * 60 + "b").fits("a." * 5000)
    assert time.process_time() - started < 1


def test_a_config_of_more_layers_than_any_model_has_is_refused_before_they_are_listed(bases, tmp_path):
    made = write_peft(tmp_path / "peft", LLAMA, only=("q_proj",))
    said = json.loads((bases[LLAMA] / "config.json").read_text()) | {"num_hidden_layers": 4097}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="num_hidden_layers=4097: must be at most 4096"):
        convert_adapter(made, tmp_path / "out.gguf", base=tmp_path)


def test_nothing_is_written_over_what_it_is_made_of(llama, bases, tmp_path):
    base, ada, link = tmp_path / "base.gguf", tmp_path / "ada.gguf", tmp_path / "link.gguf"
    shutil.copy(llama / "base.gguf", base)
    shutil.copy(llama / "ada.gguf", ada)
    link.symlink_to(base)
    first, second, *_ = split(base, tmp_path / "s", max_tensors=12)
    made = write_peft(tmp_path / "peft", LLAMA, only=("q_proj",))
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for given, out in ((base, base), (base, ada), (base, link), (link, base), (first, second)):
        with pytest.raises(ConfigError, match="is one of the files that it is made of"):
            merge_adapter(given, [(ada, 1.0)], out)
    for given, out in ((base, base), (first, second), (base, made / "adapter_config.json")):
        with pytest.raises(ConfigError, match="is one of the files that it is made of"):
            convert_adapter(made, out, base=given)
    with pytest.raises(ConfigError, match="is one of the files that it is made of"):
        convert(bases[LLAMA], bases[LLAMA] / "model.safetensors")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_merged_model_says_of_which_type_it_has_become_and_nothing_of_shards(llama, tmp_path):
    base = tmp_path / "base.gguf"
    reader, writer = gguf.GGUFReader(llama / "base.gguf"), gguf.GGUFWriter(base, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_uint8("split.count", 1)
    writer.add_uint32("general.file_type", 0)
    for each in reader.tensors:
        writer.add_tensor(each.name, np.array(each.data), raw_dtype=each.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for out_type, number in ((None, 0), ("f32", 0), ("q8_0", 7), ("bf16", 32)):
        merged = merge_adapter(base, [(llama / "ada.gguf", 1.0)], tmp_path / "out.gguf", out_type)
        assert merged.metadata["general.file_type"] == number
        assert merged.metadata["llama.block_count"] == 2
        assert not [key for key in merged.metadata if key.startswith("split.")]


def refused(tmp_path, base, kind, match, **peft):
    with pytest.raises(kind, match=match):
        convert_adapter(write_peft(tmp_path / "peft", LLAMA, **peft), tmp_path / "out.gguf", base=base)
    return [each.name for each in tmp_path.iterdir()] == ["peft"]


def test_tensors_that_are_not_the_bases_are_refused(bases, tmp_path):
    cases = (
        (LLAMA, "is it another base's", {"model.layers.0.self_attn.q_proj": (128, 64)}),
        (LLAMA, "no matrix for", {"model.layers.7.self_attn.q_proj": (64, 64)}),
        (LLAMA, "no matrix for", {"model.layers.0.self_attn.nobody": (64, 64)}),
        (GEMMA, "output is its embedding", {"lm_head": (300, 64)}),
        (GEMMA, "output is its embedding", {"model.embed_tokens": (300, 64)}),
    )
    for place, (architecture, why, sizes) in enumerate(cases):
        folder = tmp_path / str(place)
        folder.mkdir()
        assert refused(folder, bases[architecture], ConfigError, why, sizes=sizes), "and nothing is written"


def test_no_pickle_is_read_and_whole_modules_and_halves_are_refused(bases, tmp_path):
    made = write_peft(tmp_path / "peft", LLAMA, only=("q_proj",))
    weights = made / "adapter_model.safetensors"
    factors = {each.name: np.array(each.read()) for each in read_header(weights)}
    first = next(iter(factors))
    out = tmp_path / "out.gguf"
    for tensors, kind, why in (
        ({name: array for name, array in factors.items() if name != first}, ModelFormatError, "two factors"),
        (factors | {f"{PREFIX}lm_head.weight": np.zeros((300, 64), np.float32)}, ConfigError, "no factor of a matrix"),
        (factors | {first: np.full_like(factors[first], np.nan)}, ConfigError, "cannot hold"),
        ({}, ModelFormatError, "changes nothing"),
    ):
        write_safetensors(weights, tensors)
        with pytest.raises(kind, match=why):
            convert_adapter(made, out, base=bases[LLAMA])
    weights.rename(made / "adapter_model.bin")
    with pytest.raises(ModelNotFoundError, match="pickle, which may run code: save it again"):
        convert_adapter(made, out, base=bases[LLAMA])
    assert not out.exists()


def test_a_merge_refuses_what_llama_cpp_would_not_load(llama, bases, tmp_path):
    base, out = llama / "base.gguf", tmp_path / "out.gguf"
    other = tmp_path / "gemma.gguf"
    convert(bases[GEMMA], other)
    row = "blk.0.attn_q.weight"
    cases = (
        (base, [], "adapters="),
        (base, [(base, 1.0)], "is no LoRA adapter"),
        (base, [(llama / "ada.gguf", float("nan"))], "scale="),
        (other, [(llama / "ada.gguf", 1.0)], "is for llama, the model is gemma"),
        (base, [(write_gguf_adapter(tmp_path / "a.gguf", {row: (128, 64)}), 1.0)], "another base's"),
        (base, [(write_gguf_adapter(tmp_path / "b.gguf", {"blk.9.attn_q.weight": (64, 64)}), 1.0)], "does not have"),
        (base, [(write_gguf_adapter(tmp_path / "c.gguf", {row: (64, 64)}, **{"adapter.type": "x"}), 1.0)], "no LoRA"),
        (base, [(llama / "ada.gguf", 1.0)], "cannot be written"),
    )
    for given, adapters, why in cases:
        target = tmp_path / "no" / "folder.gguf" if why == "cannot be written" else out
        with pytest.raises(ConfigError, match=why):
            merge_adapter(given, adapters, target)
    assert not out.exists()


@pytest.mark.parametrize("cut", [40, 200, 5000])
def test_damaged_files_are_refused_in_our_own_words(llama, bases, tmp_path, cut):
    whole = (llama / "ada.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:cut])
    with pytest.raises(LltmRayError):
        merge_adapter(llama / "base.gguf", [(tmp_path / "cut.gguf", 1.0)], tmp_path / "out.gguf")
    made = write_peft(tmp_path / "peft", LLAMA, only=("q_proj",))
    weights = made / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(LltmRayError):
        convert_adapter(made, tmp_path / "out.gguf", base=bases[LLAMA])


def test_what_progress_raises_ends_a_merge_without_a_trace(llama, tmp_path):
    def stop(*_step):
        raise KeyboardInterrupt

    (tmp_path / "out.gguf").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(llama / "base.gguf", [(llama / "ada.gguf", 1.0)], tmp_path / "out.gguf", progress=stop)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("out.gguf", "before")]


def test_the_commands_convert_show_and_merge(llama, bases, tmp_path):
    made, ada, out = write_peft(tmp_path / "peft", LLAMA), tmp_path / "ada.gguf", tmp_path / "out.gguf"
    run = CliRunner().invoke
    first = run(app, ["lora", "convert", str(made), str(ada), "--base", str(bases[LLAMA]), "--type", "f32"])
    assert first.stdout.strip() == str(ada), first.output
    assert ada.read_bytes()[-64:] == (llama / "ada.gguf").read_bytes()[-64:]
    shown = json.loads(run(app, ["lora", "show", str(ada), "--json"]).stdout)
    assert (shown["architecture"], shown["alpha"], shown["ranks"]) == ("llama", ALPHA, [RANK])
    assert {each["tensor"] for each in shown["changes"]} >= {"blk.1.ffn_down.weight", "output.weight"}
    assert "blk.0.attn_q.weight" in run(app, ["lora", "show", str(ada)]).stdout
    merged = run(app, ["lora", "merge", str(llama / "base.gguf"), str(out), "--adapter", f"{ada}=0.5", "--type", "f16"])
    assert merged.stdout.strip() == str(out), merged.output
    half = deltas(ada)["blk.0.attn_q.weight"] / 2
    wanted = numbers(llama / "base.gguf")["blk.0.attn_q.weight"] + half
    assert numbers(out)["blk.0.attn_q.weight"] == pytest.approx(wanted, abs=2e-3)
    wrong = run(app, ["lora", "merge", str(llama / "base.gguf"), str(out), "--adapter", f"{ada}=much"])
    assert (wrong.exit_code, "PATH=SCALE" in wrong.stderr) == (2, True)


def test_shapes_of_a_folder_are_those_of_its_conversion(bases, tmp_path):
    from lltm_ray.models.lora.convert import read_base

    for architecture in CONFIGS:
        convert(bases[architecture], tmp_path / "base.gguf")
        told, real = read_base(bases[architecture]).shapes, read_base(tmp_path / "base.gguf").shapes
        assert {name: real[name] for name in told} == told, architecture
        assert len(told) >= len([name for name in shapes(architecture) if "proj" in name and "weight" in name])
