"""The engine that analyses run on: cuDF and cuGraph where a GPU is usable, pandas and NetworkX else.

Frames hold numbers only: names are codes (see `trace.Names`), missing floats are NaN, missing codes -1. Analyses use
what pandas and cuDF spell alike (merge, groupby with agg, cumsum, cummax, shift and cumcount, sort_values,
drop_duplicates, boolean masks, arithmetic) and the verbs below for all else, so that both give the same answers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lltm_ray._optional import load
from lltm_ray.config import ANALYTICS_ENGINES
from lltm_ray.errors import ConfigError, MissingExtraError

Frame = Any
"""A `pandas.DataFrame` or a `cudf.DataFrame`."""
Series = Any
"""A column of one."""
Array = Any
"""A `numpy.ndarray`, or a `cupy.ndarray` beside cuDF."""
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """Where frames live, and the verbs that the two kinds of frame spell differently."""

    name: str
    """`pandas` or `cudf`."""
    reason: str
    """Why it is this one, in one sentence."""
    xp: Any
    """`numpy` or `cupy`: its arrays."""
    df: Any
    """`pandas` or `cudf`: its frames."""

    def frame(self, columns: Mapping[str, Any]) -> Frame:
        """A frame of arrays of numbers, from the host's memory or the engine's own; the index counts from 0."""

    def host(self, frame: Frame) -> Any:
        """The same as a `pandas.DataFrame`."""

    def array(self, series: Series) -> Array:
        """A column's values."""

    def quantiles(self, frame: Frame, by: Sequence[str], column: str, q: Sequence[float]) -> Frame:
        """Columns of `by`, `count`, and one `q<percent>` for each quantile (linear interpolation), NaN left out."""

    def components(self, source: Array, target: Array, nodes: int) -> Array:
        """Weakly connected components of nodes 0..nodes-1, as labels: the smallest node of each."""

    def pagerank(self, edges: Frame) -> Frame:
        """`node`, `score` of the directed edges `source`, `target`, `weight`; damping 0.85, error under 1e-8."""

    def betweenness(self, edges: Frame) -> Frame:
        """`node`, `score`: share of the shortest paths, by steps, between other nodes that go through it, 0..1."""

    def edge_betweenness(self, edges: Frame) -> Frame:
        """`source`, `target`, `score`: share of all shortest paths, by steps, that take this directed edge, 0..1."""

    def louvain(self, edges: Frame) -> tuple[Frame, float]:
        """`node`, `community` of undirected `source`, `target`, `weight`, each pair once, and their modularity."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an analysis failed for want of the engine's memory."""


def choose_engine(prefer: str = "auto", *, memory_bytes: int | None = None, reason: str = "asked for") -> Engine:
    """The engine for this process; cuDF is tried on a few rows, for what is installed need not be usable.

    Args:
        prefer: one of `ANALYTICS_ENGINES`; `auto` takes pandas where cuDF is not usable, and says why.
        memory_bytes: of the GPU, at most; None: all of it. cuDF only.
        reason: why `pandas` was asked for.

    Raises:
        ConfigError: no such engine; or `cudf`, and it is not usable.
        MissingExtraError: pandas or NetworkX is not installed.
    """
    if prefer not in ANALYTICS_ENGINES:
        raise ConfigError("engine", prefer, f"must be one of {', '.join(ANALYTICS_ENGINES)}")
    if prefer == "pandas":
        return _pandas(reason)
    try:
        make = load("lltm_ray.analytics._cudf:CudfEngine", extra="rapids", feature="analytics on a GPU")
        engine: Engine = make(memory_bytes=memory_bytes)
    except MissingExtraError as error:
        why = error.message
    except Exception as error:  # noqa: BLE001 - border: a CUDA that is broken fails in any way it likes
        why = f"cuDF is not usable here: {type(error).__name__}: {str(error)[:200]}"
    else:
        return engine
    if prefer == "cudf":
        raise ConfigError("engine", prefer, f"{why}; use engine = 'auto' to go on without")
    return _pandas(why)


def _pandas(reason: str) -> Engine:
    make = load("lltm_ray.analytics._pandas:PandasEngine", extra="analytics", feature="analytics")
    engine: Engine = make(reason)
    return engine


def codes(values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """An array of codes, which are always int64."""
    return np.asarray(values, dtype=np.int64)
