"""Which type each tensor gets: the rules of llama.cpp's src/llama-quant.cpp (release 11434), in its order.

`allows` is its `tensor_allows_quantization`, `category` its `tensor_get_category`, `Mixture.choose` its
`llama_tensor_get_type_impl`, `fit` its `tensor_type_fallback`, `needs_imatrix` its `tensor_requires_imatrix`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lltm_ray.errors import ConfigError
from lltm_ray.models.quantize.kinds import BLOCKS, KINDS

_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    *("time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight"),
    *("time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight"),
    *("time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight"),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight"),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("a.rvq.codebook", "mm.a.code_embd"),
)
"""Parts of names whose tensors stay as they are: small ones, and those that lose too much."""
_KEPT_GLM5 = (
    *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
    *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight"),
    *("ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
)
_Q8_GLM5 = ("attn_q_a", "attn_q_b", "nextn.eh_proj")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_PARTS = (
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "kv_b"),
    ("attn_v.weight", "value"),
    ("attn_k.weight", "key"),
    ("attn_q.weight", "query"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)
VALUES = ("value", "qkv", "kv_b")
"""Parts that suffer alike."""
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_LOW = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M")
_LOW_S = ("IQ2_S", "IQ2_M")
_EMBEDDING = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
}
_OUTPUT_Q5 = (*_LOW, "IQ3_XXS")
_EIGHT_EXPERTS_Q5 = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)
_KEY = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
_ATTN_OUTPUT = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
_GARBAGE = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
"""Types that are useless without an importance matrix."""


def allows(name: str, shape: tuple[int, ...], arch: str, *, leave_output: bool) -> bool:
    """Whether the tensor may be quantized at all; `shape` is without trailing ones."""
    if len(shape) not in (2, 3) or not name.endswith("weight") or (leave_output and name == "output.weight"):
        return False
    if name in ("position_embd.weight", "token_types.weight"):
        return False
    kept = _KEPT + _KEPT_GLM5 if arch == "glm5-next" else _KEPT
    return not any(part in name for part in kept)


def category(name: str) -> str:
    """The tensor's part in the model, in broad terms."""
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "embedding"
    return next((part for piece, part in _PARTS if piece in name), "other")


def fit(kind: str, n_columns: int) -> str:
    """The type itself where its blocks divide a row, else one that does; F16 where none does."""
    if n_columns % BLOCKS[kind][0] == 0:
        return kind
    other = _FALLBACK.get(kind, kind)
    return other if n_columns % BLOCKS[other][0] == 0 else "F16"


def needs_imatrix(name: str, kind: str, file_kind: str) -> bool:
    """Whether the tensor is garbage in that type without an importance matrix."""
    if name in _EMBEDDINGS or name == "output.weight":
        return False
    return kind in _GARBAGE or (kind == "Q2_K" and file_kind == "Q2_K_S")


def _more_bits(layer: int, n_layer: int) -> bool:
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


def _when(condition: bool, kind: str) -> str | None:
    return kind if condition else None


@dataclass(slots=True, kw_only=True)
class Mixture:
    """One file's choices; tensors must be asked for in the order of `plan.order`, each once."""

    kind: str
    """Of the file: a key of `KINDS`."""
    arch: str
    n_layer: int
    n_gqa: int
    """Query heads a KV head, in the first layer."""
    n_expert: int
    is_70b: bool
    has_imatrix: bool
    is_tied: bool
    """No output.weight: the embeddings are the output too."""
    n_values: int
    """Tensors of V, QKV and KV_B."""
    _seen: Counter[str] = field(default_factory=Counter)

    def choose(self, name: str, n_columns: int) -> str:
        """The type that the mixture wants, whether or not its blocks fit."""
        default, part = KINDS[self.kind][1], category(name)
        if self.arch == "glm5-next" and any(piece in name for piece in _Q8_GLM5):
            return "Q8_0"
        if part == "output" or (part == "embedding" and self.is_tied):
            return self._output(default, n_columns)
        if part == "embedding":
            return _EMBEDDING.get(self.kind, default)
        if part in VALUES:
            chosen = (self._low_value() if self.kind in _LOW else self._value()) or default
            self._seen["value"] += 1
            return chosen
        if self.kind in _LOW:
            return self._low(part) or default
        return self._usual(part, name) or default

    def _usual(self, part: str, name: str) -> str | None:
        layer = self._layer(part, name) if part in ("down", "gate", "up") else 0
        match part:
            case "down":
                return self._down(layer)
            case "key" if self.n_expert == 8:
                return "Q8_0"
            case "key" | "query":
                return _KEY.get(self.kind)
            case "attn_output":
                return self._attn_output()
            case "gate" | "up" if self.n_layer // 8 <= layer < 7 * self.n_layer // 8:
                return _when(self.kind == "IQ3_XS", "IQ3_XXS")
        return None

    def _output(self, default: str, n_columns: int) -> str:
        if self.arch == "falcon" or n_columns % BLOCKS[default][0] or default == "Q8_0":
            return "Q8_0"
        return "Q5_K" if self.kind in _OUTPUT_Q5 else "Q6_K"

    def _value(self) -> str:
        chosen = self._value_by_kind() or KINDS[self.kind][1]
        if self.is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.n_expert == 8 else chosen

    def _value_by_kind(self) -> str | None:
        layer, grouped = self._seen["value"], self.n_gqa >= 4
        more = _more_bits(layer, self.n_values)
        return {
            "Q2_K": "Q4_K" if grouped else "Q3_K",
            "Q2_K_S": _when(grouped, "Q4_K"),
            "IQ3_XXS": "Q4_K" if grouped else "IQ3_XXS" if self.has_imatrix else "IQ3_S",
            "IQ3_XS": _when(grouped, "Q4_K"),
            "IQ3_S": _when(grouped, "Q4_K"),
            "IQ3_M": "Q4_K",
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": _when(grouped, "Q5_K"),
            "IQ4_XS": _when(grouped, "Q5_K"),
            "Q4_K_M": _when(more, "Q6_K"),
            "Q5_K_M": _when(more, "Q6_K"),
            "Q4_K_S": _when(layer < 4, "Q5_K"),
        }.get(self.kind)

    def _low_value(self) -> str:
        if self.n_gqa >= 4 or self.n_expert >= 4:
            return "Q4_K"
        return "IQ3_S" if self.kind in _LOW_S else "Q2_K"

    def _low(self, part: str) -> str | None:
        more = "IQ3_S" if self.kind in _LOW_S else "Q2_K"
        match part:
            case "key":
                return _when(self.n_expert == 8, "Q4_K")
            case "down":
                self._seen["down"] += 1
                return _when(self._seen["down"] <= self.n_layer // 8, more)
            case "attn_output" if self.n_expert == 8:
                return "Q5_K"
            case "attn_output":
                return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(self.kind)
        return None

    def _down(self, layer: int) -> str | None:
        falcon, imatrix = self.arch == "falcon", self.has_imatrix
        first, very_first = layer < self.n_layer // 8, layer < self.n_layer // 16
        more = _more_bits(layer, self.n_layer)
        falcons = "Q6_K" if very_first else _when(more, "Q5_K")
        return {
            "Q2_K": "Q3_K",
            "Q2_K_S": _when(first, "Q4_K"),
            "IQ3_XXS": _when(not imatrix, "Q4_K" if first else "Q3_K"),
            "Q3_K_M": "Q5_K" if very_first else _when(more or not falcon, "Q4_K"),
            "IQ3_M": _when(first or (self.n_expert == 8 and more), "Q4_K"),
            "Q3_K_L": "Q4_K" if falcon else "Q5_K",
            "Q4_K_M": falcons if falcon else _when(more, "Q6_K"),
            "IQ4_NL": _when(first and not imatrix, "Q5_K"),
            "IQ4_XS": _when(first and not imatrix, "Q5_K"),
            "Q5_K_M": _when(more, "Q6_K"),
            "Q4_K_S": _when(first and not falcon, "Q5_K"),
            "Q4_0": _when(first and imatrix, "Q4_1"),
            "Q5_0": _when(first and imatrix, "Q5_1"),
        }.get(self.kind)

    def _attn_output(self) -> str | None:
        if self.arch == "falcon":
            return _when(self.kind == "Q3_K_L", "Q4_K")
        if self.n_expert == 8:
            return _when(self.kind in _EIGHT_EXPERTS_Q5, "Q5_K")
        return _ATTN_OUTPUT.get(self.kind)

    def _layer(self, part: str, name: str) -> int:
        """How many of its part came before; with experts, whose order is not the layers', what the name says."""
        seen = self._seen[part]
        self._seen[part] += 1
        if self.n_expert <= 1:
            return seen
        number = layer_of(name)
        if not 0 <= number < self.n_layer:
            raise ConfigError("source", name, f"has no layer from 0 to {self.n_layer - 1} in its name")
        return number


def layer_of(name: str) -> int:
    """The layer in `blk.<layer>.`, else -1."""
    prefix, _, rest = name.partition(".")
    number, dot, _ = rest.partition(".")
    return int(number) if prefix == "blk" and dot and number.isdecimal() else -1
