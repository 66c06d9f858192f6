"""Attention of one new token of each sequence over its paged keys and values: `paged_attention`.

On CUDA a Triton kernel (`_paged_triton`) reads the blocks where they lie: one program for each sequence, KV head and
part of the sequence, so that few long sequences fill a GPU too (flash-decoding: https://pytorch.org/blog/flash-decoding;
paging: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"). Elsewhere
plain PyTorch gathers them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.kernels.paged_cache import PagedBatch

BACKENDS = ("auto", "triton", "torch")
MAX_HEAD_DIM = 256
_PROGRAMS_A_PROCESSOR = 4
"""Parts wanted for each multiprocessor: some run, some load."""
_MIN_PART, _MAX_PARTS = 256, 256
"""Tokens below which a split costs more than it brings; and most parts of one sequence."""


def paged_attention(
    query: Any, keys: Any, values: Any, batch: PagedBatch, *, scale: float | None = None, backend: str = "auto"
) -> Any:
    """Attention over a layer of a `PagedCache`; query heads share KV heads in order (GQA).

    Args:
        query: [n, heads, head size]; float16, bfloat16 or float32, with "torch" also float64.
        keys: [blocks, KV heads, block size, head size]: `PagedCache.keys[layer]`, of the query's type and device.
        values: the same of values.
        batch: the n sequences.
        scale: of the scores; None: 1 / sqrt(head size).
        backend: "triton", "torch", or "auto": Triton on CUDA.

    Returns:
        [n, heads, head size] of the query's type; zeros where a sequence is empty. Sums are in float32 or wider.

    Raises:
        ConfigError: shapes, types or devices do not fit.
        MissingExtraError: PyTorch or, for "triton", Triton is not installed.
    """
    _check(query, keys, values, batch)
    if backend not in BACKENDS:
        raise ConfigError("backend", backend, f"must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        fits = query.shape[-1] <= MAX_HEAD_DIM and "64" not in str(query.dtype)
        backend = "triton" if query.is_cuda and fits else "torch"
    if not query.numel() or not batch.longest:
        return query.new_zeros(query.shape)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if backend == "torch":
        return reference(query, keys, values, batch, scale)
    _check_triton(query)
    triton = load("lltm_ray.kernels._paged_triton", extra="torch", feature="Triton")
    part = part_tokens(batch, keys.shape[1], processors(query.device))
    return triton.attend(query, keys, values, batch, scale=scale, part=part)


def reference(query: Any, keys: Any, values: Any, batch: PagedBatch, scale: float) -> Any:
    """The same in plain PyTorch, on any device: gathers all blocks, so it needs room for a padded copy.

    float64 stays float64, everything else is summed in float32.
    """
    torch = load("torch", extra="torch")
    n, heads, size = query.shape
    kv_heads, block = keys.shape[1:3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    used = -(-batch.longest // block)
    picked = batch.tables[:, :used].long()
    inside = torch.arange(used * block, device=query.device) < batch.lengths[:, None]

    def gather(pool: Any) -> Any:
        own = pool[picked].transpose(1, 2).reshape(n, kv_heads, used * block, size).to(wide)
        return own.masked_fill(~inside[:, None, :, None], 0)  # what lies behind a sequence may be anything, also NaN

    grouped = query.to(wide).reshape(n, kv_heads, heads // kv_heads, size)
    scores = (grouped @ gather(keys).transpose(2, 3)) * scale
    weights = scores.masked_fill(~inside[:, None, None], -math.inf).softmax(-1).nan_to_num(0.0)  # NaN: an empty one
    return (weights @ gather(values)).reshape(n, heads, size).to(query.dtype)


def part_tokens(batch: PagedBatch, kv_heads: int, n_processors: int) -> int:
    """Tokens that one program takes: all of a sequence if there are programs enough, else a part; of 64 a multiple."""
    wanted = math.ceil(batch.total * kv_heads / (n_processors * _PROGRAMS_A_PROCESSOR))
    part = max(wanted, _MIN_PART, math.ceil(batch.longest / _MAX_PARTS))
    return math.ceil(part / 64) * 64


@functools.lru_cache
def processors(device: Any) -> int:
    """Multiprocessors of a GPU; of another device 1."""
    torch = load("torch", extra="torch")
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _check(query: Any, keys: Any, values: Any, batch: PagedBatch) -> None:
    shapes = {"query": tuple(query.shape), "keys": tuple(keys.shape), "tables": tuple(batch.tables.shape)}
    if query.ndim != 3:
        raise ConfigError("query", shapes["query"], "must be [sequences, heads, head size]")
    if keys.ndim != 4 or keys.shape != values.shape or keys.shape[-1] != query.shape[-1]:
        raise ConfigError("keys", shapes["keys"], "must be [blocks, KV heads, block size, head size], as values")
    if not keys.shape[1] or query.shape[1] % keys.shape[1]:
        raise ConfigError("query", shapes["query"], f"its heads must be a multiple of the {keys.shape[1]} KV heads")
    if batch.tables.ndim != 2 or len(batch.tables) != len(query) or tuple(batch.lengths.shape) != (len(query),):
        raise ConfigError("batch", shapes["tables"], f"must have a table and a length for each of {len(query)} queries")
    if batch.longest > batch.tables.shape[1] * keys.shape[2]:
        raise ConfigError("batch.longest", batch.longest, "is more than its tables' blocks hold")
    if not query.dtype == keys.dtype == values.dtype or not query.dtype.is_floating_point:
        raise ConfigError("query", query.dtype, f"must be of the cache's type, {keys.dtype}")
    devices = {str(each.device) for each in (query, keys, values, batch.tables, batch.lengths)}
    if len(devices) > 1:
        raise ConfigError("query", str(query.device), f"all must lie on one device, not {', '.join(sorted(devices))}")


def _check_triton(query: Any) -> None:
    if "64" in str(query.dtype):
        raise ConfigError("query", query.dtype, "must be float16, bfloat16 or float32 for the Triton kernel")
    if query.shape[-1] > MAX_HEAD_DIM:
        raise ConfigError("query", tuple(query.shape), f"head size must be at most {MAX_HEAD_DIM} for Triton")
