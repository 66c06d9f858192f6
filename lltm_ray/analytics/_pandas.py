"""The engine of the CPU: pandas, SciPy and NetworkX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lltm_ray.analytics.frames import Array, Frame, Series

_SEED = 0
"""Louvain visits nodes in a random order; the same rows shall give the same answer."""


class PandasEngine:
    """See `frames.Engine`.

    Args:
        reason: why it is this one.
    """

    name = "pandas"
    xp: Any = np
    df: Any = pd

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def frame(self, columns: Mapping[str, Any]) -> Frame:
        """As `frames.Engine.frame`."""
        return pd.DataFrame(dict(columns), copy=False)

    def host(self, frame: Frame) -> Any:
        """As `frames.Engine.host`."""
        return frame

    def array(self, series: Series) -> Array:
        """As `frames.Engine.array`."""
        return series.to_numpy()

    def quantiles(self, frame: Frame, by: Sequence[str], column: str, q: Sequence[float]) -> Frame:
        """As `frames.Engine.quantiles`; one sort for all of them."""
        values = frame[column].to_numpy()
        keys = [frame[name].to_numpy() for name in by]
        order = np.lexsort((values, *keys[::-1]))
        order = order[~np.isnan(values[order])]
        values, keys = values[order], [key[order] for key in keys]
        is_first = np.ones(len(values), dtype=bool)
        if len(values):
            is_first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
        first = np.flatnonzero(is_first)
        count = np.diff(first, append=len(values))
        found = dict(zip(by, (key[first] for key in keys), strict=True)) | {"count": count}
        for each in q:
            place = each * (count - 1)
            below = np.floor(place).astype(np.int64)
            low, high = values[first + below], values[first + np.minimum(below + 1, count - 1)]
            found[f"q{each * 100:g}"] = low + (high - low) * (place - below)
        return pd.DataFrame(found)

    def components(self, source: Array, target: Array, nodes: int) -> Array:
        """As `frames.Engine.components`."""
        ones = np.ones(len(source), dtype=np.int8)
        count, labels = connected_components(coo_array((ones, (source, target)), shape=(nodes, nodes)), directed=False)
        least = np.full(count, nodes)
        np.minimum.at(least, labels, np.arange(nodes))
        return least[labels]

    def pagerank(self, edges: Frame) -> Frame:
        """As `frames.Engine.pagerank`."""
        return _scores(nx.pagerank(_graph(edges, nx.DiGraph), weight="weight", tol=1e-10, max_iter=1000))

    def betweenness(self, edges: Frame) -> Frame:
        """As `frames.Engine.betweenness`."""
        return _scores(nx.betweenness_centrality(_graph(edges, nx.DiGraph), normalized=True))

    def edge_betweenness(self, edges: Frame) -> Frame:
        """As `frames.Engine.edge_betweenness`."""
        found = nx.edge_betweenness_centrality(_graph(edges, nx.DiGraph), normalized=True)
        pairs = codes_of(list(found))
        return pd.DataFrame({"source": pairs[:, 0], "target": pairs[:, 1], "score": list(found.values())})

    def louvain(self, edges: Frame) -> tuple[Frame, float]:
        """As `frames.Engine.louvain`."""
        graph = _graph(edges, nx.Graph)
        groups = nx.community.louvain_communities(graph, weight="weight", seed=_SEED)
        modularity = nx.community.modularity(graph, groups, weight="weight") if graph.size() else 0.0
        members = {node: number for number, group in enumerate(groups) for node in group}
        nodes = sorted(members)
        return pd.DataFrame({"node": nodes, "community": [members[node] for node in nodes]}), float(modularity)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """As `frames.Engine.is_out_of_memory`; there is nowhere else to go."""
        return False


def codes_of(pairs: Sequence[tuple[int, int]]) -> Any:
    """Pairs of nodes as an array of shape (n, 2)."""
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def _graph(edges: Frame, kind: type[nx.Graph]) -> nx.Graph:
    graph = kind()
    weights = edges["weight"] if "weight" in edges else np.ones(len(edges))
    rows = zip(edges["source"].tolist(), edges["target"].tolist(), np.asarray(weights).tolist(), strict=True)
    graph.add_weighted_edges_from(rows)
    return graph


def _scores(found: Mapping[int, float]) -> Frame:
    nodes = sorted(found)
    return pd.DataFrame({"node": codes_of([(node, 0) for node in nodes])[:, 0], "score": [found[n] for n in nodes]})
