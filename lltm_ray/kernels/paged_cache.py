"""A paged KV cache for PyTorch models: `BlockTables` says where, `PagedCache` holds the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.kernels.block_tables import BlockTables


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a model keeps of each token, and how much of it there is room for."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_blocks: int
    block_size: int = 16
    """Tokens a block holds. A small one shares more, a large one is read faster."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(name, value, "must be a whole number, at least 1")

    @property
    def elements(self) -> int:
        """Of keys and values together."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.n_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Sequences as a kernel reads them."""

    tables: Any
    """int32 [n, most blocks of one]: blocks in order; what lies behind a sequence's own is not read."""
    lengths: Any
    """int32 [n]: tokens of each that are in the cache; 0 is allowed."""
    longest: int
    """The largest of `lengths`, known without asking the device."""
    total: int
    """Their sum."""


class PagedCache:
    """Keys and values of many sequences in blocks of one pool, allocated once.

    `keys` and `values` are [layers, blocks, KV heads, block size, head size]. Sequences are opened, reserved for,
    advanced, forked and freed through `tables`; a `reserve` goes through this class, which copies shared blocks.
    Calls are not locked: one thread at a time.

    Args:
        shape: sizes.
        device: as PyTorch takes it.
        dtype: of keys and values, a `torch.dtype`; None: float16.

    Raises:
        MissingExtraError: PyTorch is not installed.
    """

    def __init__(self, shape: CacheShape, *, device: Any = "cpu", dtype: Any = None) -> None:
        torch = load("torch", extra="torch")
        self.shape = shape
        self.tables = BlockTables(shape.n_blocks, shape.block_size)
        size = (shape.n_layers, shape.n_blocks, shape.n_kv_heads, shape.block_size, shape.head_dim)
        dtype = dtype or torch.float16
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    @property
    def device(self) -> Any:
        """Where the pool lies."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Of the pool."""
        return 2 * int(self.keys.numel() * self.keys.element_size())

    def reserve(self, sequence: int, n_tokens: int) -> None:
        """Make room for `n_tokens` more tokens of a sequence; see `BlockTables.reserve`.

        Raises:
            CacheFullError: there is none; nothing has changed.
        """
        copies = self.tables.reserve(sequence, n_tokens)
        if copies:
            torch = load("torch", extra="torch")
            source, target = torch.tensor(copies, device=self.device).T
            with torch.inference_mode():
                for pool in (self.keys, self.values):
                    pool[:, target] = pool[:, source]

    def slots(self, sequence: int, n_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Places of the next `n_tokens` of a sequence, int64 [n_tokens]: block * block size + offset."""
        held, size = self.tables.blocks(sequence), self.shape.block_size
        at = self.tables.length(sequence) + np.arange(n_tokens)
        if n_tokens and int(at[-1]) >= len(held) * size:
            raise ConfigError("n_tokens", n_tokens, "are more than were reserved; call reserve first")
        return np.frombuffer(held, np.int32)[at // size].astype(np.int64) * size + at % size

    def write(self, layer: int, slots: Any, keys: Any, values: Any) -> None:
        """Put tokens' keys and values into their places.

        Args:
            layer: of which layer.
            slots: int64 tensor [n] of `slots`, on the pool's device.
            keys: [n, KV heads, head size], of any float type.
            values: the same.
        """
        block, offset = slots // self.shape.block_size, slots % self.shape.block_size
        for pool, new in ((self.keys, keys), (self.values, values)):
            pool[layer][block, :, offset] = new.to(pool.dtype)

    def block_ids(self, sequence: int, n_tokens: int) -> Any:
        """The blocks of a sequence's first `n_tokens`, int64 on the pool's device; for `read`."""
        torch = load("torch", extra="torch")
        held = np.frombuffer(self.tables.blocks(sequence), np.int32)[: self.tables.blocks_for(n_tokens)]
        return torch.from_numpy(held.astype(np.int64)).to(self.device)

    def read(self, layer: int, block_ids: Any, n_tokens: int) -> tuple[Any, Any]:
        """Copies of keys and values of the first `n_tokens` in those blocks, each [KV heads, n_tokens, head size]."""
        shape = self.shape.n_kv_heads, len(block_ids) * self.shape.block_size, self.shape.head_dim
        picked = (pool[layer][block_ids].transpose(0, 1).reshape(shape) for pool in (self.keys, self.values))
        keys, values = (each[:, :n_tokens] for each in picked)
        return keys, values

    def batch(self, sequences: Sequence[int], more: Sequence[int] | None = None) -> PagedBatch:
        """Sequences for `paged_attention`.

        Args:
            sequences: which ones.
            more: tokens of each that are written already but not yet told to `advance`; None: none.
        """
        torch = load("torch", extra="torch")
        held = [self.tables.blocks(sequence) for sequence in sequences]
        lengths = np.array([self.tables.length(sequence) for sequence in sequences], np.int32)
        if more is not None:
            lengths += np.asarray(more, np.int32)
        tables = np.zeros((len(held), max(map(len, held), default=0) or 1), np.int32)
        for row, blocks in zip(tables, held, strict=True):
            row[: len(blocks)] = np.frombuffer(blocks, np.int32)
        return PagedBatch(
            tables=torch.from_numpy(tables).to(self.device, non_blocking=True),
            lengths=torch.from_numpy(lengths).to(self.device, non_blocking=True),
            longest=int(lengths.max(initial=0)),
            total=int(lengths.sum(dtype=np.int64)),
        )
