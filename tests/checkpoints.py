"""Small random checkpoints as Hugging Face keeps them, of every family that can be converted; the same for a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, FF, VOCAB = 2, 64, 4, 2, 16, 96, 300
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_theta": 10_000.0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
GEMMA = COMMON | {"head_dim": HEAD, "model_type": "gemma", "rms_norm_eps": 1e-6}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": COMMON | {"model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    "MistralForCausalLM": COMMON | {"model_type": "mistral", "head_dim": HEAD},
    "Qwen2ForCausalLM": COMMON | {"model_type": "qwen2"},
    "Qwen3ForCausalLM": COMMON | {"model_type": "qwen3", "head_dim": HEAD},
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA
    | {
        "model_type": "gemma2",
        "sliding_window": 128,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": GEMMA | {"model_type": "gemma3_text", "sliding_window": 128, "rope_local_base_freq": 1e4},
    "BertModel": {
        "model_type": "bert",
        "hidden_size": WIDTH,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "vocab_size": VOCAB,
        "type_vocab_size": 2,
    },
}


def write_checkpoint(
    folder: Path,
    architecture: str,
    *,
    dtype: str = "F32",
    shards: int = 1,
    config: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A whole checkpoint: config.json, tokenizer.json and one or several safetensors files.

    Args:
        folder: is made.
        architecture: one of `CONFIGS`.
        dtype: `F32|F16|BF16`.
        shards: files.
        config: what its config.json says beside or instead.
        without: tensors that it lacks.
    """
    folder.mkdir(parents=True)
    said = CONFIGS[architecture] | {"architectures": [architecture], "torch_dtype": "float32"} | (config or {})
    (folder / "config.json").write_text(json.dumps(said))
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(scale=0.2, size=shape).astype(np.float32) for name, shape in shapes(architecture).items()
    }
    names = [name for name in weights if name not in without]
    parts = [{name: weights[name] for name in names[part::shards]} for part in range(shards)]
    files = [f"model-{part + 1:05}-of-{shards:05}.safetensors" for part in range(shards)]
    for file, part in zip(files if shards > 1 else ["model.safetensors"], parts, strict=True):
        write_safetensors(folder / file, part, dtype)
    if shards > 1:
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    tokenizer = word_pieces() if architecture == "BertModel" else byte_pairs(spaces=architecture.startswith("Gemma"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ 1 }}"}))
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """One file in safetensors' format."""
    blobs, header, at = [], {}, 0
    for name, array in tensors.items():
        if dtype == "BF16":
            blob = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            blob = array.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    return _bert() if architecture == "BertModel" else _decoder(architecture)


def _decoder(architecture: str) -> dict[str, tuple[int, ...]]:
    gemma_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        wide = {"q_proj": (HEADS * HEAD, WIDTH), "k_proj": (KV_HEADS * HEAD, WIDTH), "v_proj": (KV_HEADS * HEAD, WIDTH)}
        found |= {f"{at}.self_attn.{name}.weight": shape for name, shape in wide.items()}
        if architecture == "Qwen2ForCausalLM":
            found |= {f"{at}.self_attn.{name}.bias": shape[:1] for name, shape in wide.items()}
        if architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"):
            found |= {f"{at}.self_attn.{name}.weight": (HEAD,) for name in ("q_norm", "k_norm")}
        found[f"{at}.self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD)
        found |= {f"{at}.mlp.{name}.weight": (FF, WIDTH) for name in ("gate_proj", "up_proj")}
        found[f"{at}.mlp.down_proj.weight"] = (WIDTH, FF)
        norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
        norms += gemma_norms if architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM") else ()
        found |= {f"{at}.{name}.weight": (WIDTH,) for name in norms}
    found["model.norm.weight"] = (WIDTH,)
    if not architecture.startswith("Gemma"):
        found["lm_head.weight"] = (VOCAB, WIDTH)
    return found


def _bert() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCAB, WIDTH),
        "embeddings.position_embeddings.weight": (512, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        wide = dict.fromkeys(square, (WIDTH, WIDTH))
        wide |= {"intermediate.dense": (FF, WIDTH), "output.dense": (WIDTH, FF)}
        for name, shape in wide.items():
            found |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found |= {f"{at}.{name}.{end}": (WIDTH,) for end in ("weight", "bias")}
    return found


def byte_pairs(*, spaces: bool = False) -> dict[str, Any]:
    """A tokenizer of single bytes and a few merges; with `spaces` as SentencePiece has it, else as GPT-2."""
    if spaces:
        letters = [chr(number) for number in range(97, 123)]
        tokens = [
            "<unk>",
            *(f"<0x{number:02X}>" for number in range(256)),
            "\u2581",
            *letters,
            *letters_of_greek(),
            "ab",
            "\u2581ab",
        ]
        merges = [["a", "b"], ["\u2581", "ab"]]
        model: dict[str, Any] = {"byte_fallback": True, "unk_token": "<unk>"}
        before = None
    else:
        tokens = [byte_letters()[number] for number in range(256)] + ["ab", "cd", "abcd"]
        merges = [["a", "b"], ["c", "d"], ["ab", "cd"]]
        model = {"byte_fallback": False}
        before = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    model |= {"type": "BPE", "vocab": {token: place for place, token in enumerate(tokens)}, "merges": merges}
    added = [{"id": len(tokens), "content": "<|end|>", "special": True, "normalized": False}]
    return {"version": "1.0", "added_tokens": added, "pre_tokenizer": before, "model": model}


def letters_of_greek() -> list[str]:
    """As many as fill the vocabulary: llama.cpp's converter cuts what is beyond off Gemma 3's embedding."""
    return [chr(number) for number in range(945, 945 + VOCAB - 1 - 286)]


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in plain]
    return {number: chr(number) for number in plain} | {number: chr(256 + place) for place, number in enumerate(others)}


def word_pieces() -> dict[str, Any]:
    """A tokenizer of letters, as BERT has it."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(number) for number in range(97, 123)]
    tokens = [*marks, *letters, *(f"##{letter}" for letter in letters)]
    added = [{"id": place, "content": mark, "special": True, "normalized": False} for place, mark in enumerate(marks)]
    vocab = {token: place for place, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"},
    }
