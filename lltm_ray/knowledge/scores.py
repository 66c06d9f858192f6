"""How vectors are scored against each other: one product of matrices and what is kept of it, here with NumPy.

A `Scorer` sees tiles of bounded size and gives back only what was asked for, so one that runs on a GPU
(`lltm_ray.kernels.similarity.TorchScorer`) keeps the scores themselves there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lltm_ray.knowledge.vectors import Vectors

Indices = npt.NDArray[np.int64]
Product = Callable[[Vectors, Vectors], npt.NDArray[Any]]
"""Scores [m, n] of float32 [m, length] and [n, length]: `a @ b.T`."""


class Scorer(Protocol):
    """Scores of two sets of vectors, float32 [m, length] and [n, length]."""

    def top(self, queries: Vectors, vectors: Vectors, k: int) -> tuple[Indices, Vectors]:
        """The `k` (1..n) best of `vectors` for each query, in any order: indices and scores, [m, k] each."""

    def above(self, first: Vectors, second: Vectors, threshold: float) -> tuple[Indices, Indices, Vectors]:
        """All pairs with a score of at least `threshold`, in any order: rows, columns and scores, [pairs] each."""


class NumpyScorer:
    """On the CPU.

    Args:
        product: what multiplies; NumPy by default.
    """

    def __init__(self, product: Product | None = None) -> None:
        self._product = product or (lambda first, second: first @ second.T)

    def top(self, queries: Vectors, vectors: Vectors, k: int) -> tuple[Indices, Vectors]:
        """As `Scorer.top`."""
        scores = self._product(queries, vectors)
        # Row by row: what a row needs stays in the processor's cache.
        best = np.array([np.argpartition(-row, k - 1)[:k] for row in scores], np.int64).reshape(-1, k)
        return best, np.take_along_axis(scores, best, 1)

    def above(self, first: Vectors, second: Vectors, threshold: float) -> tuple[Indices, Indices, Vectors]:
        """As `Scorer.above`."""
        scores = self._product(first, second)
        rows, columns = np.nonzero(scores >= threshold)
        return rows.astype(np.int64), columns.astype(np.int64), scores[rows, columns]
