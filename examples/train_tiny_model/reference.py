"""Perplexity from a GGUF file alone: Llama in NumPy, float32, on dequantized weights. Not llama.cpp's arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class Reference:
    """A Llama file's network: `logits` of a run of token ids.

    Args:
        path: a GGUF of the architecture `llama` with tied embeddings.
    """

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
        number = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
        self.layers, self.heads = number["llama.block_count"], number["llama.attention.head_count"]
        self.groups, self.epsilon = (
            number["llama.attention.head_count_kv"],
            number["llama.attention.layer_norm_rms_epsilon"],
        )
        self.base = number.get("llama.rope.freq_base", 10_000.0)
        self.context: int = number["llama.context_length"]

    def logits(self, tokens: npt.NDArray[np.int64]) -> Array:
        """Logits (length, vocabulary) of ids (length,), each position seeing those up to it."""
        x = self.weights["token_embd.weight"][tokens]
        for layer in range(self.layers):
            x = x + self._attend(self._norm(x, f"blk.{layer}.attn_norm"), layer)
            y = self._norm(x, f"blk.{layer}.ffn_norm")
            gate, up = (y @ self.weights[f"blk.{layer}.ffn_{name}.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"blk.{layer}.ffn_down.weight"].T
        return self._norm(x, "output_norm") @ self.weights["token_embd.weight"].T

    def perplexity(self, tokens: npt.NDArray[np.int64]) -> float:
        """In windows of the whole context; every token but a window's first is predicted."""
        losses = []
        for start in range(0, len(tokens), self.context):
            window = tokens[start : start + self.context]
            logits = self.logits(window[:-1]).astype(np.float64)
            top = logits.max(axis=1)
            whole = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            losses.append(whole - logits[np.arange(len(window) - 1), window[1:]])
        return math.exp(np.concatenate(losses).mean())

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon) * self.weights[f"{name}.weight"]

    def _attend(self, x: Array, layer: int) -> Array:
        q, k, v = (x @ self.weights[f"blk.{layer}.attn_{name}.weight"].T for name in "qkv")
        length = len(x)
        size = q.shape[1] // self.heads
        q, k = self._rotate(q.reshape(length, self.heads, size)), self._rotate(k.reshape(length, self.groups, size))
        shared = self.heads // self.groups
        k, v = (np.repeat(each.reshape(length, self.groups, size), shared, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k, optimize=True) / np.float32(math.sqrt(size))
        scores += np.triu(np.full((length, length), -np.inf, np.float32), 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        seen = np.einsum("hqk,khd->qhd", weights, v, optimize=True).reshape(length, -1)
        return seen @ self.weights[f"blk.{layer}.attn_output.weight"].T

    def _rotate(self, x: Array) -> Array:
        """Neighbours rotated against each other: how GGUF files hold Llama's queries and keys."""
        length, _, size = x.shape
        angles = np.outer(np.arange(length), self.base ** (-np.arange(0, size, 2) / size))
        cosine, sine = (wave(angles)[:, None, :].astype(np.float32) for wave in (np.cos, np.sin))
        turned = np.empty_like(x)
        turned[..., ::2] = x[..., ::2] * cosine - x[..., 1::2] * sine
        turned[..., 1::2] = x[..., 1::2] * cosine + x[..., ::2] * sine
        return turned
