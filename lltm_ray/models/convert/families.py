"""What differs between model families: the numbers in the header, and what is done to tensors on their way.

Facts are those of llama.cpp's loaders (src/llama-arch.cpp, src/llama-model.cpp) and of the families' modelling code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError

Array = npt.NDArray[Any]
Config = Mapping[str, Any]
TIED = ("lm_head.weight",)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of llama.cpp's.

    `transform(name, array, config)` works on the checkpoint's names and shapes.
    """

    arch: gguf.MODEL_ARCH
    transform: Callable[[str, Array, Config], Array] = lambda _name, array, _config: array
    header: Callable[[gguf.GGUFWriter, Config], None] = lambda _writer, _config: None
    make: Callable[[Config], dict[str, Array]] = lambda _config: {}
    """Tensors that the checkpoint does not have."""
    dropped: tuple[str, ...] = ()
    """Names that llama.cpp does not know, or makes itself."""
    prefix: str = ""
    """Stripped from the checkpoint's names."""
    defaults: Config = field(default_factory=dict)
    """Numbers that the family's configurations leave out."""
    activations: tuple[str, ...] = ("silu",)
    """transformers' names of the one that llama.cpp computes for the family."""
    needed: tuple[str, ...] = ("token_embd.weight", "output_norm.weight")
    """llama.cpp's names of what stands outside of the layers; a decoder's output is looked at on its own."""
    is_cut_at_window: bool = False
    """The model attends within a window, llama.cpp's graph for it to everything: right until the window is full."""

    def all_dropped(self, config: Config) -> tuple[str, ...]:
        """Tensors that are left out; a tied output is the embedding, whatever the checkpoint holds beside it."""
        return self.dropped + (TIED if config.get("tie_word_embeddings") is True else ())


def find_family(architecture: str, config: Config) -> Family:
    """The family of a checkpoint.

    Raises:
        ConfigError: none that can be converted here.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        raise ConfigError(
            "architecture", architecture, f"cannot be converted; these can: {', '.join(sorted(FAMILIES))}"
        )
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        raise ConfigError("num_experts", experts, "mixtures of experts cannot be converted here")
    if quantized := config.get("quantization_config"):
        raise ConfigError("quantization_config", str(quantized)[:80], "convert from the unquantized checkpoint")
    _refuse_other_mathematics(family, config)
    return family


def _refuse_other_mathematics(family: Family, config: Config) -> None:
    """What llama.cpp would load and compute in its own way."""
    for name in ("hidden_act", "hidden_activation"):
        if config.get(name) not in (None, *family.activations):
            raise ConfigError(name, config[name], f"llama.cpp computes {family.activations[0]} for this family")
    if config.get("use_sliding_window"):
        raise ConfigError("use_sliding_window", True, "llama.cpp attends to the whole context for this family")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ConfigError("position_embedding_type", config["position_embedding_type"], "must be absolute")
    rope = _rope(config)
    for part in (rope.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if part not in (None, 1):
            raise ConfigError("partial_rotary_factor", part, "llama.cpp rotates whole heads for this family")
    if rope["rope_type"] == "llama3" and "rope_freqs.weight" not in family.make(config):
        raise ConfigError("rope_scaling", "llama3", "llama.cpp does not compute it for this family")


# --- numbers of the header -------------------------------------------------------------------------------------------


def write_common(writer: gguf.GGUFWriter, family: Family, config: Config) -> None:
    """What every family has.

    Raises:
        ConfigError: a number is missing or wrong.
    """
    heads = number(config, "num_attention_heads")
    writer.add_block_count(number(config, "num_hidden_layers"))
    writer.add_context_length(_context_length(family, config))
    writer.add_embedding_length(number(config, "hidden_size"))
    writer.add_feed_forward_length(number(config, "intermediate_size"))
    writer.add_head_count(heads)
    if "num_key_value_heads" in config:
        writer.add_head_count_kv(number(config, "num_key_value_heads"))
    if config.get("head_dim"):
        writer.add_key_length(number(config, "head_dim"))
        writer.add_value_length(number(config, "head_dim"))
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if "layer_norm_eps" in config:
        writer.add_layer_norm_eps(float(config["layer_norm_eps"]))
    _write_rope(writer, config)


def _context_length(family: Family, config: Config) -> int:
    length = number(config, "max_position_embeddings")
    if not family.is_cut_at_window or config.get("sliding_window") is None:
        return length
    window = number(config, "sliding_window")
    if window < length:
        log.warning("context_length is %d, the model's sliding window, not %d: llama.cpp has no such window for it",
                    window, length)  # fmt: skip
    return min(window, length)


def number(config: Config, name: str) -> int:
    """A positive whole number of the configuration.

    Raises:
        ConfigError: it is missing, or something else.
    """
    value = config.get(name)
    if type(value) is not int or not 0 < value < 2**31:
        raise ConfigError(name, value, "config.json must have a positive whole number there")
    return value


def _rope(config: Config) -> dict[str, Any]:
    """Newer configurations keep the base with the scaling, older ones beside it."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention") or found)
    if config.get("rope_theta") is not None:
        found.setdefault("rope_theta", config["rope_theta"])
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def _write_rope(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = _rope(config)
    if rope.get("rope_theta") is not None:
        writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        _write_yarn(writer, rope)
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError("rope_scaling", kind, "cannot be converted; these can: linear, yarn, llama3")


def _write_yarn(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    parts = {
        "extrapolation_factor": writer.add_rope_scaling_yarn_ext_factor,
        "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for name, add in parts.items():
        if rope.get(name) is not None:
            add(float(rope[name]))


def _write_llama(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_vocab_size(number(config, "vocab_size"))
    writer.add_rope_dimension_count(_head_length(config))
    if not config.get("head_dim"):
        writer.add_key_length(_head_length(config))
        writer.add_value_length(_head_length(config))


def _write_gemma2(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    writer.add_sliding_window(number(config, "sliding_window"))


def _write_gemma3(writer: gguf.GGUFWriter, config: Config) -> None:
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    if config.get("sliding_window_pattern") != 1:
        writer.add_sliding_window(number(config, "sliding_window"))
    scaling = config.get("rope_parameters") or {}
    local = (scaling.get("sliding_attention") or {}).get("rope_theta", config.get("rope_local_base_freq"))
    if local is not None:
        writer.add_rope_freq_base_swa(float(local))


def _write_bert(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_causal_attention(False)
    writer.add_token_type_count(int(config.get("type_vocab_size", 1)))


def _head_length(config: Config) -> int:
    return int(config.get("head_dim") or number(config, "hidden_size") // number(config, "num_attention_heads"))


# --- tensors ---------------------------------------------------------------------------------------------------------


def _interleave_rope(name: str, array: Array, config: Config) -> Array:
    """Rows of Q and K as llama.cpp's LLAMA rotates them: pairs side by side, where the checkpoint has halves."""
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        heads = number(config, "num_attention_heads")
    elif name.endswith(("k_proj.weight", "k_proj.bias")):
        heads = int(config.get("num_key_value_heads") or number(config, "num_attention_heads"))
    else:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _raise_norms(name: str, array: Array, _config: Config) -> Array:
    """Gemma multiplies by one more than it stores."""
    return array.astype(np.float32) + np.float32(1) if name.endswith("norm.weight") else array


def _llama3_frequencies(config: Config) -> dict[str, Array]:
    """Factors by which Llama 3 stretches its rotary frequencies (its own `apply_scaling`)."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return {}
    length, base = _head_length(config), float(rope.get("rope_theta", 10_000))
    wavelengths = 2 * math.pi * base ** (np.arange(0, length, 2, dtype=np.float32) / np.float32(length))
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if not (factor > 0 and high > low and base > 0):
        raise ConfigError("rope_scaling", str(rope)[:160], "must have a factor above 0 and high above low")
    turns = float(rope["original_max_position_embeddings"]) / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)}


_LLAMA = Family(arch=gguf.MODEL_ARCH.LLAMA, transform=_interleave_rope, header=_write_llama, make=_llama3_frequencies)
_GEMMA = Family(
    arch=gguf.MODEL_ARCH.GEMMA,
    transform=_raise_norms,
    dropped=TIED,
    activations=("gelu_pytorch_tanh", "gelu"),
)
"""Its output is its input embedding; its older configurations say gelu and mean the approximation."""
_GEMMA3_NUMBERS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
                   "max_position_embeddings": 131_072, "rope_theta": 1e6}  # fmt: skip
"""transformers' defaults, which the published configurations leave out."""
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": replace(_LLAMA, is_cut_at_window=True),
    "Qwen2ForCausalLM": Family(arch=gguf.MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": Family(arch=gguf.MODEL_ARCH.QWEN3),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": replace(_GEMMA, arch=gguf.MODEL_ARCH.GEMMA2, header=_write_gemma2),
    "Gemma3ForCausalLM": replace(_GEMMA, arch=gguf.MODEL_ARCH.GEMMA3, header=_write_gemma3, defaults=_GEMMA3_NUMBERS),
    "BertModel": Family(
        arch=gguf.MODEL_ARCH.BERT,
        header=_write_bert,
        dropped=("embeddings.position_ids", "pooler.", "cls."),
        prefix="bert.",
        activations=("gelu",),
        needed=("token_embd.weight", "token_embd_norm.weight", "position_embd.weight"),
    ),
}
"""By the checkpoint's `architectures[0]`."""
