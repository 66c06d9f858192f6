"""Text that many prompts have, wherever it stands in them: blocks that the same prompts have, by all pairs of blocks.

Two blocks are alike if the sets of prompts that have them are (a cosine of 0.9 at least); blocks that are alike, in
steps, are a section. A system prompt behind a date is one; so is a document that many ask about. Prompts themselves are
no measure: two that share a system prompt differ in all else, however long that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.turns import SPREAD

MOST_PROMPTS = 2048
"""Compared; of more, so many by chance, the same ones each time."""
MOST_BLOCKS = 2048
"""Compared: those with most bytes over all prompts."""
LEAST_PROMPTS = 5
"""Of those compared that must have a block; fewer are no family."""
ALIKE = (9, 10)
"""The least cosine, as a fraction: with whole numbers all engines find the same pairs."""
_TILE = 512
"""Blocks whose pairs are in memory at once: 40 MiB with their copies."""


@dataclass(frozen=True, slots=True)
class Sections:
    """Blocks of sections."""

    key: Array
    """Sorted."""
    section: Array
    """By key: equal within a section; the place of its first key."""
    size: Array
    """By key: bytes."""
    prompts: int
    """That have blocks."""
    compared: int
    """Of them."""
    left_out: int
    """Blocks that were shared by `LEAST_PROMPTS` and not compared."""


def find_sections(trace: Trace, blocks: Frame) -> Sections:
    """Sections of a window.

    Args:
        trace: whose engine compares; memory is bounded by `MOST_PROMPTS` times `MOST_BLOCKS` float32.
        blocks: r; key: equal for equal blocks of one model; size.
    """
    engine, xp = trace.engine, trace.engine.xp
    prompts = xp.unique(engine.array(blocks["r"]))
    chosen = _chosen(xp, prompts)
    unique = blocks[["r", "key", "size"]].drop_duplicates(["r", "key"])
    r, key, size = (engine.array(unique[name]) for name in ("r", "key", "size"))
    if not len(r):
        return Sections(key, key, size, 0, 0, 0)
    row = xp.minimum(xp.searchsorted(chosen, r), len(chosen) - 1)
    is_chosen = chosen[row] == r
    row, size = row[is_chosen], size[is_chosen]
    keys, column = xp.unique(key[is_chosen], return_inverse=True)
    sizes = xp.zeros(len(keys), "int64")
    sizes[column] = size  # rows of a block agree
    kept, left_out = _heaviest(xp, xp.bincount(column, minlength=len(keys)), sizes)
    place = xp.full(len(keys), -1)
    place[kept] = xp.arange(len(kept))
    is_kept = place[column] >= 0
    has = xp.zeros((len(kept), len(chosen)), "float32")
    has[place[column][is_kept], row[is_kept]] = 1
    section = engine.components(*alike_pairs(xp, has), len(kept)) if len(kept) else kept
    return Sections(keys[kept], section, sizes[kept], len(prompts), len(chosen), left_out)


def alike_pairs(xp: Any, has: Array) -> tuple[Array, Array]:
    """All pairs of rows of 0 and 1, float32 [n, prompts], whose cosine is at least `ALIKE`: the lower, the higher."""
    over, under = (each * each for each in ALIKE)
    count = has.sum(axis=1).astype("int64")
    found = []
    for top in range(0, len(has), _TILE):
        together = (has[top : top + _TILE] @ has[top:].T).astype("int64")
        needed = count[top : top + _TILE, None] * count[None, top:]
        first, second = xp.nonzero(under * together * together >= over * needed)
        is_pair = first < second
        found.append((first[is_pair] + top, second[is_pair] + top))
    first, second = (xp.concatenate(each) for each in zip(*found, strict=True))
    return first, second


def _chosen(xp: Any, prompts: Array) -> Array:
    if len(prompts) <= MOST_PROMPTS:
        return prompts
    return xp.sort(prompts[xp.argsort(prompts * SPREAD)[:MOST_PROMPTS]])


def _heaviest(xp: Any, count: Array, size: Array) -> tuple[Array, int]:
    """Places of the blocks to compare, ascending, and how many are left out."""
    shared = xp.flatnonzero(count >= LEAST_PROMPTS)
    order = xp.lexsort(xp.stack([shared, -(count * size)[shared]]))
    return xp.sort(shared[order[:MOST_BLOCKS]]), max(len(shared) - MOST_BLOCKS, 0)
