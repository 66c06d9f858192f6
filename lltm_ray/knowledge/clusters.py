"""Groups of similar vectors: `k_means` on the unit sphere, where distance and cosine similarity order alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError
from lltm_ray.knowledge.vectors import Vectors, unit


@dataclass(frozen=True, slots=True)
class Clusters:
    """What `k_means` found."""

    labels: npt.NDArray[np.int64]
    """[n]: each vector's cluster, 0..k-1, the largest first."""
    centers: Vectors
    """[k, length], of length 1."""
    similarity: float
    """Mean cosine similarity of the vectors to their centers."""

    def predict(self, vectors: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The nearest cluster of each of other vectors, float [n, length]."""
        return np.asarray((unit(vectors) @ self.centers.T).argmax(axis=1), np.int64)

    def members(self, cluster: int) -> npt.NDArray[np.int64]:
        """Indices of a cluster's vectors."""
        return np.flatnonzero(self.labels == cluster)


def k_means(vectors: npt.ArrayLike, k: int, *, seed: int = 0, restarts: int = 4, rounds: int = 100) -> Clusters:
    """Spherical k-means (Dhillon and Modha 2001), begun as k-means++ (Arthur and Vassilvitskii 2007); deterministic.

    Args:
        vectors: float [n, length], of any norm.
        k: clusters, 1..n; equal vectors may leave fewer than `k` with members.
        seed: of the first centers.
        restarts: tries; the one whose vectors are nearest to their centers counts.
        rounds: most steps of each.

    Raises:
        ConfigError: `k` is not in 1..n.
    """
    points = unit(vectors)
    if not 1 <= k <= len(points):
        raise ConfigError("k", k, f"must be from 1 to the number of vectors, {len(points)}")
    random = np.random.default_rng(seed)
    tries = [_run(points, _first_centers(points, k, random), rounds) for _ in range(restarts)]
    labels, centers, similarity = max(tries, key=lambda each: each[2])
    order = np.argsort(-np.bincount(labels, minlength=k), kind="stable")
    return Clusters(np.argsort(order)[labels], centers[order], similarity)


def _run(points: Vectors, centers: Vectors, rounds: int) -> tuple[npt.NDArray[np.int64], Vectors, float]:
    labels = np.full(len(points), -1)
    for _ in range(rounds):
        scores = points @ centers.T
        nearest = scores.argmax(axis=1)
        if (nearest == labels).all():
            break
        labels = nearest
        centers = _centers(points, labels, scores, len(centers))
    return labels, centers, float((points * centers[labels]).sum(axis=1).mean())


def _centers(points: Vectors, labels: npt.NDArray[np.int64], scores: Vectors, k: int) -> Vectors:
    """Means of the members; a cluster that lost all of its members begins anew at the vector that fits worst."""
    sums = np.zeros((k, points.shape[1]), np.float32)
    np.add.at(sums, labels, points)
    empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
    worst = np.argsort(scores[np.arange(len(points)), labels], kind="stable")[: len(empty)]
    sums[empty] = points[worst]
    return unit(sums)


def _first_centers(points: Vectors, k: int, random: np.random.Generator) -> Vectors:
    chosen = [int(random.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < k:
        distance = np.minimum(distance, np.maximum(0, 1 - points @ points[chosen[-1]]))
        total = distance.sum()
        chosen.append(int(random.choice(len(points), p=distance / total if total > 0 else None)))
    return points[chosen]
