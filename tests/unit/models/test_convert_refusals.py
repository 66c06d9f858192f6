"""What is refused, and what is kept, of checkpoints that differ from the made ones."""

import json

import gguf
import pytest

from lltm_ray.errors import ConfigError, LltmRayError, ModelFormatError
from lltm_ray.models.convert.checkpoint import Checkpoint
from lltm_ray.models.convert.convert import convert
from lltm_ray.models.convert.vocabulary import read_vocabulary
from tests.checkpoints import LLAMA3_ROPE, write_checkpoint, write_safetensors
from tests.peers.convert import contents


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def edit(path, change):
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("architecture", "change", "word"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act"),
        ("Qwen2ForCausalLM", {"hidden_act": "relu"}, "hidden_act"),
        ("GemmaForCausalLM", {"hidden_act": "silu"}, "hidden_act"),
        ("Gemma2ForCausalLM", {"hidden_activation": "relu"}, "hidden_activation"),
        ("BertModel", {"hidden_act": "relu"}, "hidden_act"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Qwen3ForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ("Qwen2ForCausalLM", {"rope_scaling": LLAMA3_ROPE}, "rope_scaling"),
        ("LlamaForCausalLM", {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "rope_scaling"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused_by_name(tmp_path, architecture, change, word):
    folder = write_checkpoint(tmp_path / "checkpoint", architecture, config=change)
    with pytest.raises(ConfigError, match=word):
        convert(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("Gemma3ForCausalLM", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("GemmaForCausalLM", {"hidden_act": "gelu", "hidden_activation": None}),
        ("Qwen2ForCausalLM", {"hidden_act": "silu", "use_sliding_window": False, "partial_rotary_factor": 1.0}),
        ("BertModel", {"hidden_act": "gelu", "position_embedding_type": "absolute"}),
    ],
)
def test_what_published_configurations_say_is_taken(tmp_path, architecture, change):
    folder = write_checkpoint(tmp_path / "checkpoint", architecture, config=change)
    assert convert(folder, tmp_path / "out.gguf").n_params > 0


@pytest.mark.parametrize(("window", "length"), [(128, 128), (4096, 512), (None, 512)])
def test_mistrals_context_ends_where_its_window_does(tmp_path, caplog, window, length):
    folder = write_checkpoint(tmp_path / "checkpoint", "MistralForCausalLM", config={"sliding_window": window})
    convert(folder, tmp_path / "out.gguf")
    assert fields(tmp_path / "out.gguf")["llama.context_length"] == length
    assert ("sliding window" in caplog.text) == (length == 128)


def test_yarns_numbers_are_written(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    yarn |= {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}
    convert(write_checkpoint(tmp_path / "c", "Qwen2ForCausalLM", config={"rope_scaling": yarn}), tmp_path / "o.gguf")
    found = fields(tmp_path / "o.gguf")
    numbers = {name: found[f"qwen2.rope.scaling.yarn_{name}"] for name in ("attn_factor", "beta_fast", "beta_slow")}
    assert numbers == {"attn_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}


@pytest.mark.parametrize(
    ("architecture", "lost", "named"),
    [
        ("LlamaForCausalLM", "lm_head.weight", "output.weight"),
        ("LlamaForCausalLM", "model.embed_tokens.weight", "token_embd.weight"),
        ("Qwen2ForCausalLM", "model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("Qwen3ForCausalLM", "model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("GemmaForCausalLM", "model.norm.weight", "output_norm.weight"),
        ("BertModel", "encoder.layer.1.output.dense.bias", "blk.1.ffn_down.bias"),
        ("BertModel", "embeddings.position_embeddings.weight", "position_embd.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path, architecture, lost, named):
    folder = write_checkpoint(tmp_path / "checkpoint", architecture, without=(lost,))
    with pytest.raises(ModelFormatError, match=named.replace(".", r"\.")):
        convert(folder, tmp_path / "out.gguf")


def test_a_layer_that_is_missing_in_whole_is_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM", config={"num_hidden_layers": 3})
    with pytest.raises(ModelFormatError, match=r"blk\.2\."):
        convert(folder, tmp_path / "out.gguf")
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=2**30))
    with pytest.raises(ModelFormatError, match="layers"):
        convert(folder, tmp_path / "out.gguf")


def test_a_tied_output_is_the_embedding(tmp_path):
    tied = {"tie_word_embeddings": True}
    for name, without in (("with", ()), ("bare", ("lm_head.weight",))):
        folder = write_checkpoint(tmp_path / name, "Qwen2ForCausalLM", config=tied, without=without)
        convert(folder, tmp_path / f"{name}.gguf")
    assert contents(tmp_path / "with.gguf") == contents(tmp_path / "bare.gguf")
    assert "output.weight" not in contents(tmp_path / "with.gguf")[0]


def test_the_index_and_the_files_must_agree(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM", shards=2)
    index = folder / "model.safetensors.index.json"
    file = "model-00001-of-00002.safetensors"
    edit(index, lambda content: content["weight_map"].update({"model.layers.1.extra": file}))
    with pytest.raises(ModelFormatError, match=r"model\.layers\.1\.extra"):
        Checkpoint(folder)


def test_added_tokens_without_a_row_are_cut_and_the_models_own_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "GemmaForCausalLM")
    soft = {"id": 300, "content": "<image>", "special": True, "normalized": False}

    def add(tokenizer):
        tokenizer["added_tokens"].append(soft)
        tokenizer["model"]["vocab"]["<image>"] = 300

    edit(folder / "tokenizer.json", add)
    convert(folder, tmp_path / "out.gguf")
    assert len(fields(tmp_path / "out.gguf")["tokenizer.ggml.tokens"]) == 300
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update(beyond=301))
    with pytest.raises(ConfigError, match="vocab_size"):
        convert(folder, tmp_path / "out.gguf")


def test_an_embedding_of_another_length_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "GemmaForCausalLM", config={"vocab_size": 320})
    with pytest.raises(ModelFormatError, match="300 rows"):
        convert(folder, tmp_path / "out.gguf")


PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}


@pytest.mark.parametrize(
    ("normalizer", "before", "adds"),
    [
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, {"type": "Split"}, False),
        (None, None, False),
        (PREPEND, None, True),
        (None, {"type": "Metaspace", "prepend_scheme": "first"}, True),
        (None, {"type": "Metaspace", "prepend_scheme": "never"}, False),
        (None, {"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "add_prefix_space": False}]}, False),
    ],
)
def test_sentencepiece_says_whether_text_begins_with_a_space(tmp_path, normalizer, before, adds):
    folder = write_checkpoint(tmp_path / "checkpoint", "GemmaForCausalLM")
    edit(folder / "tokenizer.json", lambda all_: all_.update(normalizer=normalizer, pre_tokenizer=before))
    convert(folder, tmp_path / "out.gguf")
    assert fields(tmp_path / "out.gguf")["tokenizer.ggml.add_space_prefix"] is adds


def test_tokens_of_users_are_kept_as_they_are_written(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "GemmaForCausalLM")
    token = {"id": 298, "content": "\u2581\u2581", "special": False, "normalized": False}
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].append(token))
    found = read_vocabulary(Checkpoint(folder))
    assert (found.tokens[298], found.types[298]) == ("  ", gguf.TokenType.USER_DEFINED)
    assert "\u2581ab" not in found.tokens


@pytest.mark.parametrize(
    ("normalizer", "flags"),
    [
        ({"type": "BertNormalizer", "lowercase": True, "strip_accents": None}, {"lowercase": True}),
        ({"type": "BertNormalizer", "lowercase": False}, {"lowercase": False}),
        (
            {"type": "Sequence", "normalizers": [{"type": "BertNormalizer", "strip_accents": False}]},
            {"lowercase": True, "strip_accents": False},
        ),
        (None, {"lowercase": False, "strip_accents": False}),
    ],
)
def test_bert_says_whether_case_counts(tmp_path, normalizer, flags):
    folder = write_checkpoint(tmp_path / "checkpoint", "BertModel")
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=normalizer))
    convert(folder, tmp_path / "out.gguf")
    start = "tokenizer.ggml.normalizer."
    found = {name.removeprefix(start): value for name, value in fields(tmp_path / "out.gguf").items() if start in name}
    assert found == flags


MODULES = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_P"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}


def sentences(tmp_path, modules, mode):
    folder = write_checkpoint(tmp_path / "checkpoint", "BertModel")
    (folder / "modules.json").write_text(json.dumps(modules))
    if mode is not None:
        (folder / "1_P").mkdir()
        (folder / "1_P" / "config.json").write_text(json.dumps(mode))
    return folder


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, gguf.PoolingType.MEAN),
        ({"pooling_mode_cls_token": True}, gguf.PoolingType.CLS),
        ({"pooling_mode": "lasttoken"}, gguf.PoolingType.LAST),
    ],
)
def test_pooling_is_found_where_modules_say(tmp_path, mode, kind):
    convert(sentences(tmp_path, [*MODULES, POOLING], mode), tmp_path / "out.gguf")
    assert fields(tmp_path / "out.gguf")["bert.pooling_type"] == kind


@pytest.mark.parametrize(
    ("modules", "mode", "word"),
    [
        ([*MODULES, POOLING], {"pooling_mode_max_tokens": True}, "max_tokens"),
        ([*MODULES, POOLING], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token, mean"),
        ([*MODULES, POOLING], {"pooling_mode": ["mean", "cls"]}, "pooling_mode"),
        ([*MODULES, POOLING], {}, "pooling_mode"),
        ([*MODULES, POOLING, DENSE], {"pooling_mode": "mean"}, "Dense"),
        ([*MODULES, POOLING], None, "1_P"),
        ([*MODULES, POOLING | {"path": "../1_P"}], None, "1_P"),
        ({"0": 1}, None, "list"),
        ([1], None, "TypeError"),
    ],
)
def test_pooling_that_llama_cpp_lacks_is_refused(tmp_path, modules, mode, word):
    folder = sentences(tmp_path, modules, mode)
    with pytest.raises(LltmRayError, match=word):
        convert(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "before",
    [
        {"type": "Split", "pattern": {"String": " "}},
        {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"String": " "}}, {"type": "ByteLevel"}]},
        {"type": "Split", "pattern": {"Regex": ""}},
        {"type": "ByteLevel", "use_regex": False},
        {"type": "Whitespace"},
        None,
    ],
)
def test_only_plain_byte_level_is_gpt_2(tmp_path, before):
    folder = write_checkpoint(tmp_path / "checkpoint", "Qwen2ForCausalLM")
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer=before))
    with pytest.raises(ConfigError, match="pre_tokenizer"):
        read_vocabulary(Checkpoint(folder))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GemmaForCausalLM"])
def test_merges_that_are_no_list_are_refused(tmp_path, architecture):
    folder = write_checkpoint(tmp_path / "checkpoint", architecture)
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer["model"].update(merges={"a b": 1}))
    with pytest.raises(ModelFormatError, match="merges"):
        convert(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"text_config": [1]}),
        ("config.json", {"architectures": 5}),
        ("config.json", {"architectures": [[]]}),
        ("config.json", {"rope_scaling": [1]}),
        ("config.json", {"rope_theta": "x"}),
        ("config.json", {"rms_norm_eps": None}),
        ("config.json", {"rms_norm_eps": 10**400}),
        ("config.json", {"num_attention_heads": 7}),
        ("config.json", {"vocab_size": None}),
        ("tokenizer.json", {"added_tokens": [{"id": 259, "content": "\ud800", "special": True}]}),
        ("tokenizer_config.json", {"chat_template": "\ud800"}),
        ("model.safetensors.index.json", {"weight_map": {"x": [1]}}),
        ("model.safetensors.index.json", {"weight_map": [1]}),
    ],
)
def test_odd_values_end_in_an_error_of_ours_and_leave_no_file(tmp_path, file, change):
    folder = write_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM", config={"rope_scaling": None})
    path = folder / file
    if not path.exists():
        path.write_text("{}")
    edit(path, lambda content: content.update(change))
    with pytest.raises(LltmRayError):
        convert(folder, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_error_of_progress_stays_its_own(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "BertModel")

    def fail(*_):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        convert(folder, tmp_path / "out.gguf", progress=fail)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", "BertModel")
    tensors = {name: tensor.read() for name, tensor in Checkpoint(folder).tensors.items()}
    tensors["bert.embeddings.LayerNorm.bias"] = tensors["embeddings.LayerNorm.bias"]
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ModelFormatError, match="token_embd_norm"):
        convert(folder, tmp_path / "out.gguf")
