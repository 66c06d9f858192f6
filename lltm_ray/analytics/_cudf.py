"""The engine of an NVIDIA GPU: cuDF, CuPy and cuGraph.

cuGraph is called through pylibcugraph, its own lower layer: that takes isolated nodes, gives back plain arrays, and
does not import Dask. Edges must be unique: cuGraph counts a second one, where NetworkX lets it replace the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cudf
import cupy
import numpy as np
import pylibcugraph
import rmm
from rmm.allocators.cupy import rmm_cupy_allocator

from lltm_ray.analytics.frames import Array, Frame, Series

_FIRST_BYTES = 1 << 26
"""Size of the memory pool before it grows."""
_GRAIN_BYTES = 256
"""RMM's pools are multiples of it."""
_DAMPING, _TOLERANCE, _MOST_ROUNDS = 0.85, 1e-10, 1000
"""Of PageRank: what remains of an error of one round is less than 6 times the tolerance."""
_LEVELS, _LEAST_GAIN, _RESOLUTION = 100, 1e-7, 1.0
"""Of Louvain: cuGraph's own defaults."""
_NO_MEMORY = ("bad_alloc", "out_of_memory", "out of memory", "MemoryAllocation")
"""How cuGraph and CUDA say it, which raise a RuntimeError."""


class _Arrays:
    """CuPy, with a `bincount` that takes an empty array as NumPy's does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(cupy, name)

    @staticmethod
    def bincount(values: Array, weights: Array | None = None, minlength: int = 0) -> Array:
        """As `numpy.bincount`; float64 with weights."""
        if not len(values):
            return cupy.zeros(minlength, dtype="int64" if weights is None else "float64")
        return cupy.bincount(values, weights, minlength)


class CudfEngine:
    """See `frames.Engine`. It sets cuDF's pandas mode and the memory pool of the whole process.

    Args:
        memory_bytes: of the GPU, at most; None: all of it.

    Raises:
        RuntimeError: cuDF or cuGraph gives wrong answers here; and whatever a broken CUDA raises.
    """

    name = "cudf"
    xp: Any = _Arrays()
    df: Any = cudf

    def __init__(self, memory_bytes: int | None = None) -> None:
        device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        _bound_memory(memory_bytes)
        cudf.set_option("mode.pandas_compatible", True)  # NaN, order of rows and of groups as in pandas
        self.reason = f"cuDF {'.'.join(cudf.__version__.split('.')[:2])} on {device}"
        self._probe()

    def frame(self, columns: Mapping[str, Any]) -> Frame:
        """As `frames.Engine.frame`."""
        return cudf.DataFrame(dict(columns), nan_as_null=False)

    def host(self, frame: Frame) -> Any:
        """As `frames.Engine.host`."""
        return frame.to_pandas()

    def array(self, series: Series) -> Array:
        """As `frames.Engine.array`; missing numbers, which cuDF keeps in a mask, become NaN."""
        if series.dtype.kind != "f" and series.has_nulls:
            series = series.astype("float64")
        return series.to_cupy(na_value=np.nan if series.dtype.kind == "f" else None)

    def quantiles(self, frame: Frame, by: Sequence[str], column: str, q: Sequence[float]) -> Frame:
        """As `frames.Engine.quantiles`; one sort for all of them."""
        known = frame[[*by, column]].dropna().sort_values([*by, column])
        values = self.array(known[column])
        groups = known.groupby(list(by), sort=True).agg({column: "count"}).reset_index()
        count = self.array(groups[column])
        first = cupy.cumsum(count) - count
        found = {name: self.array(groups[name]) for name in by} | {"count": count}
        for each in q:
            place = each * (count - 1)
            below = cupy.floor(place).astype("int64")
            low, high = values[first + below], values[first + cupy.minimum(below + 1, count - 1)]
            found[f"q{each * 100:g}"] = low + (high - low) * (place - below)
        return self.frame(found)

    def components(self, source: Array, target: Array, nodes: int) -> Array:
        """As `frames.Engine.components`."""
        if not len(source):
            return cupy.arange(nodes)
        graph = _graph(source, target, is_directed=False, vertices_array=cupy.arange(nodes))
        node, label = pylibcugraph.weakly_connected_components(_handle(), graph, None, None, None, None, False)
        labels = cupy.empty(nodes, dtype="int64")
        labels[node] = label
        order = cupy.argsort(labels)  # stable, so a label's first node is its smallest
        return order[cupy.searchsorted(labels[order], labels)]

    def pagerank(self, edges: Frame) -> Frame:
        """As `frames.Engine.pagerank`."""
        if not len(edges):
            return self._by_node(cupy.empty(0, "int64"), score=cupy.empty(0))
        weights = self.array(edges["weight"])
        graph = _graph(*self._ends(edges), weights, store_transposed=True)
        options = (_DAMPING, _TOLERANCE, _MOST_ROUNDS, False)
        node, score = pylibcugraph.pagerank(_handle(), graph, None, None, None, None, *options)
        return self._by_node(node, score=score)

    def betweenness(self, edges: Frame) -> Frame:
        """As `frames.Engine.betweenness`."""
        if not len(edges):
            return self._by_node(cupy.empty(0, "int64"), score=cupy.empty(0))
        graph = _graph(*self._ends(edges))
        node, score = pylibcugraph.betweenness_centrality(_handle(), graph, None, None, True, False, False)
        return self._by_node(node, score=cupy.nan_to_num(score.astype("float64")))  # two nodes: 0 / 0

    def edge_betweenness(self, edges: Frame) -> Frame:
        """As `frames.Engine.edge_betweenness`."""
        if not len(edges):
            source, target, score = cupy.empty(0, "int64"), cupy.empty(0, "int64"), cupy.empty(0)
        else:
            graph = _graph(*self._ends(edges))
            found = pylibcugraph.edge_betweenness_centrality(_handle(), graph, None, None, True, False)
            source, target, score = found[:3]
        return self.frame({"source": source, "target": target, "score": score.astype("float64")})

    def louvain(self, edges: Frame) -> tuple[Frame, float]:
        """As `frames.Engine.louvain`."""
        if not len(edges):
            return self._by_node(cupy.empty(0, "int64"), community=cupy.empty(0, "int64")), 0.0
        graph = _graph(*self._ends(edges), self.array(edges["weight"]), is_directed=False)
        options = (_LEVELS, _LEAST_GAIN, _RESOLUTION, False)
        node, community, modularity = pylibcugraph.louvain(_handle(), graph, *options)
        return self._by_node(node, community=community), float(modularity)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """As `frames.Engine.is_out_of_memory`."""
        return isinstance(error, MemoryError) or any(each in str(error) for each in _NO_MEMORY)

    def _ends(self, edges: Frame) -> tuple[Array, Array]:
        return self.array(edges["source"]), self.array(edges["target"])

    def _by_node(self, node: Array, **values: Array) -> Frame:
        order = cupy.argsort(node)
        return self.frame({"node": node[order]} | {name: each[order] for name, each in values.items()})

    def _probe(self) -> None:
        """Compute on a few rows what all analyses stand on.

        Raises:
            RuntimeError: the answer is wrong.
        """
        left = self.frame({"key": np.array([2, 0, 1, 0]), "value": np.array([1.0, np.nan, 3.0, 4.0])})
        right = self.frame({"key": np.arange(3), "weight": np.array([10.0, 20.0, 30.0])})
        joined = left.merge(right, on="key", how="left").groupby("key", sort=True)
        sums = self.host(joined.agg({"value": "sum", "weight": "max"}).reset_index())
        ring = self.frame({"source": np.arange(3), "target": np.array([1, 2, 0]), "weight": np.ones(3)})
        ranks = self.host(self.pagerank(ring))["score"].to_numpy()
        if sums.to_numpy().tolist() != [[0, 4, 10], [1, 3, 20], [2, 1, 30]]:
            raise RuntimeError(f"a merge and a groupby of four rows gave {sums.to_numpy().tolist()}")
        if not np.allclose(ranks, 1 / 3, atol=1e-8):
            raise RuntimeError(f"the PageRank of a ring of three nodes is {ranks.tolist()}")


def _bound_memory(memory_bytes: int | None) -> None:
    """A pool for cuDF, cuGraph and CuPy; what earlier pools gave out stays valid."""
    most = None if memory_bytes is None else memory_bytes // _GRAIN_BYTES * _GRAIN_BYTES
    first = _FIRST_BYTES if most is None else min(_FIRST_BYTES, most)
    pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=first, maximum_pool_size=most)
    rmm.mr.set_current_device_resource(pool)
    cupy.cuda.set_allocator(rmm_cupy_allocator)


def _handle() -> Any:
    """Made anew for each call, for it stands on the memory pool of now."""
    return pylibcugraph.ResourceHandle()


def _graph(
    source: Array, target: Array, weights: Array | None = None, *, is_directed: bool = True, **options: Any
) -> Any:
    """A graph of codes; one without direction has each edge both ways."""
    ends = [cupy.ascontiguousarray(each, dtype="int64") for each in (source, target)]
    if weights is not None:
        options["weight_array"] = cupy.ascontiguousarray(weights, dtype="float64")
    if not is_directed:
        ends = [cupy.concatenate(ends), cupy.concatenate(ends[::-1])]
        options |= {"drop_self_loops": True, "drop_multi_edges": True}
        if weights is not None:
            options["weight_array"] = cupy.concatenate([options["weight_array"]] * 2)
    kind = pylibcugraph.GraphProperties(is_symmetric=not is_directed, is_multigraph=False)
    return pylibcugraph.SGGraph(_handle(), kind, *ends, renumber=True, **options)
