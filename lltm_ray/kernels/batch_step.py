"""One run of a model over parts of many sequences, with their keys and values in a `PagedCache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lltm_ray._optional import load
from lltm_ray.kernels.attention import attend as attend_dense
from lltm_ray.kernels.paged_attention import paged_attention
from lltm_ray.kernels.paged_cache import PagedBatch, PagedCache


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one sequence that a step computes."""

    owner: Any
    sequence: int
    tokens: list[int]
    start: int
    """Position of the first."""
    is_last: bool
    """Whether the token after them is wanted."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several tokens of one sequence: they see its cache and each other."""

    rows: slice
    block_ids: Any
    length: int
    """Tokens of the sequence with these."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """What a model's layers call; single tokens come first, then chunks."""

    cache: PagedCache
    slots: Any
    singles: PagedBatch | None
    n_singles: int
    chunks: list[_Chunk]

    def __call__(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        cache = self.cache
        cache.write(layer, self.slots, key, value)
        asked = query.to(cache.keys.dtype)
        found = []
        if self.singles is not None:
            ours = asked[: self.n_singles]
            found.append(paged_attention(ours, cache.keys[layer], cache.values[layer], self.singles))
        for chunk in self.chunks:
            keys, values = cache.read(layer, chunk.block_ids, chunk.length)
            rows = asked[chunk.rows].transpose(0, 1)[None]
            found.append(attend_dense(rows, keys[None], values[None], causal=True).output[0].transpose(0, 1))
        torch = load("torch", extra="torch")
        return (found[0] if len(found) == 1 else torch.cat(found)).to(query.dtype)


def run_step(model: Any, cache: PagedCache, parts: Sequence[Part]) -> Any:
    """Run a `Decoder` over all parts together.

    Args:
        model: on the cache's device.
        cache: has room reserved for all parts; they are written, but not yet told to `advance`.
        parts: at least one, each of at least one token.

    Returns:
        Logits [n, vocabulary] of the last token of each part that `is_last`, in the order of `parts`; None without one.
    """
    torch = load("torch", extra="torch")
    order = sorted(range(len(parts)), key=lambda index: len(parts[index].tokens) > 1)
    sizes = np.array([len(parts[index].tokens) for index in order])
    ends = np.cumsum(sizes)
    tokens = np.concatenate([np.asarray(parts[index].tokens, np.int64) for index in order])
    positions = np.concatenate([parts[index].start + np.arange(len(parts[index].tokens)) for index in order])
    slots = np.concatenate([cache.slots(parts[index].sequence, len(parts[index].tokens)) for index in order])
    last = {index: end - 1 for index, end in zip(order, ends, strict=True)}
    wanted = [last[index] for index, part in enumerate(parts) if part.is_last]
    sent = torch.from_numpy(np.concatenate([tokens, positions, slots, np.array(wanted, np.int64)])).to(cache.device)
    n = len(tokens)
    attention = _attention(cache, [parts[index] for index in order], ends, sent[2 * n : 3 * n])
    hidden = model.hidden(sent[:n], sent[n : 2 * n], attention)
    return model.logits(hidden[sent[3 * n :]]) if wanted else None


def _attention(cache: PagedCache, parts: list[Part], ends: Any, slots: Any) -> _Attention:
    singles = [part.sequence for part in parts if len(part.tokens) == 1]
    batch = cache.batch(singles, [1] * len(singles)) if singles else None
    chunks = []
    for part, end in zip(parts[len(singles) :], ends[len(singles) :], strict=True):
        length = part.start + len(part.tokens)
        rows = slice(int(end) - len(part.tokens), int(end))
        chunks.append(_Chunk(rows, cache.block_ids(part.sequence, length), length))
    return _Attention(cache, slots, batch, len(singles), chunks)
