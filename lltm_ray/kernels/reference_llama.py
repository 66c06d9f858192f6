"""A compact Llama in plain PyTorch that speaks the batcher's protocol: random weights, for tests and measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.kernels.attention import attend as attend_dense


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of the model."""

    n_vocab: int = 256
    n_embd: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    n_ff: int = 128
    rope_base: float = 10_000.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_embd % (2 * self.n_heads):
            raise ConfigError("n_embd", self.n_embd, f"must be a multiple of twice n_heads, {2 * self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError("n_heads", self.n_heads, f"must be a multiple of n_kv_heads, {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.n_embd // self.n_heads


class ReferenceLlama:
    """RMSNorm, rotary positions (halves), grouped heads, SwiGLU (Touvron et al. 2023, "LLaMA").

    Args:
        shape: sizes.
        device: as PyTorch takes it.
        dtype: of the weights, a `torch.dtype`; None: float32.
        seed: of the weights.
    """

    def __init__(self, shape: LlamaShape, *, device: Any = "cpu", dtype: Any = None, seed: int = 0) -> None:
        torch = load("torch", extra="torch")
        self.shape = shape
        self._torch = torch
        source = torch.Generator(device).manual_seed(seed)

        def weights(rows: int, columns: int) -> Any:
            made = torch.randn(rows, columns, device=device, generator=source) / columns**0.5
            return made.to(dtype or torch.float32)

        qkv = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
        self._embedding = weights(shape.n_vocab, shape.n_embd) * shape.n_embd**0.5
        self._output = weights(shape.n_vocab, shape.n_embd) * 4  # far enough apart for one to be the likeliest
        self._layers = [
            (
                weights(qkv, shape.n_embd),
                weights(shape.n_embd, shape.n_embd),
                weights(2 * shape.n_ff, shape.n_embd),
                weights(shape.n_embd, shape.n_ff),
            )
            for _ in range(shape.n_layers)
        ]
        half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32)
        self._frequencies = shape.rope_base ** (-half / shape.head_dim)

    @property
    def n_vocab(self) -> int:
        """Tokens there are."""
        return self.shape.n_vocab

    def hidden(self, tokens: Any, positions: Any, attend: Any) -> Any:
        """As `Decoder.hidden`."""
        functional, shape = self._torch.nn.functional, self.shape
        angles = positions[:, None].float() * self._frequencies
        turn = (angles.cos()[:, None], angles.sin()[:, None])
        state = self._embedding[tokens]
        for layer, (qkv, out, up, down) in enumerate(self._layers):
            mixed = functional.linear(self._norm(state), qkv).unflatten(-1, (-1, shape.head_dim))
            query, key, value = mixed.split((shape.n_heads, shape.n_kv_heads, shape.n_kv_heads), 1)
            found = attend(layer, self._rotate(query, *turn), self._rotate(key, *turn), value)
            state = state + functional.linear(found.flatten(1), out)
            gate, wide = functional.linear(self._norm(state), up).chunk(2, -1)
            state = state + functional.linear(functional.silu(gate) * wide, down)
        return self._norm(state)

    def logits(self, hidden: Any) -> Any:
        """As `Decoder.logits`."""
        return self._torch.nn.functional.linear(hidden, self._output)

    def full(self, tokens: Any) -> Any:
        """Logits [n, vocabulary] of one sequence, int64 [n], computed at once and without a cache."""

        def attend(_: int, *parts: Any) -> Any:
            query, key, value = (part.transpose(0, 1)[None] for part in parts)
            return attend_dense(query, key, value, causal=True).output[0].transpose(0, 1)

        positions = self._torch.arange(len(tokens), device=tokens.device)
        return self.logits(self.hidden(tokens, positions, attend))

    def _norm(self, state: Any) -> Any:
        return self._torch.nn.functional.rms_norm(state, state.shape[-1:], eps=self.shape.epsilon)

    @staticmethod
    def _rotate(heads: Any, cosine: Any, sine: Any) -> Any:
        first, second = heads.float().chunk(2, -1)
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return load("torch", extra="torch").cat(turned, -1).to(heads.dtype)
