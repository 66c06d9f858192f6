"""All pairs of similar vectors, without the matrix of all scores: `similar_pairs`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError
from lltm_ray.knowledge.scores import Indices, NumpyScorer, Scorer
from lltm_ray.knowledge.vectors import Vectors, unit

_TILE = 4096
"""Vectors a side that are scored at once: 64 MiB of scores."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs by falling similarity, equal ones in the order of their indices; arrays of one length."""

    first: Indices
    second: Indices
    """Each above its `first`."""
    scores: Vectors
    """Cosine similarities."""

    def __len__(self) -> int:
        return len(self.first)


NO_PAIRS = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def similar_pairs(
    vectors: npt.ArrayLike, threshold: float, *, scorer: Scorer | None = None, limit: int = 10_000_000
) -> Pairs:
    """Each pair of vectors whose cosine similarity is at least `threshold`.

    Args:
        vectors: float [n, length], of any norm.
        threshold: -1..1. Scores are float32: equal vectors may score 1 - 1e-6.
        scorer: what multiplies; None: NumPy.
        limit: most pairs to keep; each takes 20 bytes.

    Raises:
        ConfigError: a wrong shape or threshold, or more pairs than `limit`.
    """
    if not -1 <= threshold <= 1:
        raise ConfigError("threshold", threshold, "must be from -1 to 1")
    points, scorer = unit(vectors), scorer or NumpyScorer()
    found: list[tuple[Indices, Indices, Vectors]] = []
    count = 0
    for top in range(0, len(points), _TILE):
        for left in range(top, len(points), _TILE):
            tile = _tile(scorer, points, top, left, threshold)
            count += len(tile[0])
            if count > limit:
                raise ConfigError("threshold", threshold, f"gives more than {limit:,} pairs; raise it, or raise limit")
            found.append(tile)
    empty = NO_PAIRS.first, NO_PAIRS.second, NO_PAIRS.scores
    first, second, scores = (np.concatenate(column) for column in zip(empty, *found, strict=True))
    order = np.lexsort((second, first, -scores))
    return Pairs(first[order], second[order], scores[order])


def _tile(scorer: Scorer, points: Vectors, top: int, left: int, threshold: float) -> tuple[Indices, Indices, Vectors]:
    rows, columns, scores = scorer.above(points[top : top + _TILE], points[left : left + _TILE], threshold)
    first, second = rows + top, columns + left
    kept = first < second
    return first[kept], second[kept], scores[kept]
