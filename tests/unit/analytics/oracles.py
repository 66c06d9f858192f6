"""Random trees of spans, and slow, plain answers about them."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import pyarrow as pa
from hypothesis import strategies as st

from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.trace import Trace

ZERO = 1_790_000_000_000_000_000
MS = 1_000_000
PANDAS = choose_engine("pandas")


@dataclass(frozen=True)
class Node:
    """One span; times are nanoseconds."""

    parent: int
    begin: int
    end: int
    is_request: bool = False
    name: str = "work"


@st.composite
def forests(draw: st.DrawFn, jitter: tuple[int, ...] = (0, 0, 0, 1, 700, 1500)) -> list[Node]:
    """Children overlap, outlast their parents, begin before them, lie beside them, take no time; requests call some."""
    nodes: list[Node] = []
    for i in range(draw(st.integers(1, 16))):
        begin = draw(st.integers(0, 20)) * MS + draw(st.sampled_from(jitter))
        length = draw(st.integers(0, 12)) * MS + draw(st.sampled_from(jitter))
        parent = draw(st.integers(-1, i - 1)) if i else -1
        nodes.append(Node(parent, begin, begin + length, not i or draw(st.integers(0, 9)) == 0, f"work {i % 3}"))
    return nodes


def trace_of(nodes: list[Node]) -> tuple[Trace, list[int]]:
    """The trace, and each node's row among its spans."""
    requests = [i for i, node in enumerate(nodes) if node.is_request]
    spans = [i for i, node in enumerate(nodes) if not node.is_request]
    tables = {"requests": _requests(nodes, requests), "spans": _spans(nodes, spans)}
    order = [*requests, *spans]
    trace = build_trace(tables, PANDAS, start_unix_nano=ZERO, end_unix_nano=ZERO + 10**15)
    return trace, [order.index(i) for i in range(len(nodes))]


def _id(i: int) -> str:
    return f"{i + 1:016x}" if i >= 0 else ""


def _requests(nodes: list[Node], which: list[int]) -> pa.Table:
    return pa.table(
        {
            "trace_id": pa.array([f"{i + 1:032x}" for i in which], pa.string()),
            "span_id": pa.array([_id(i) for i in which], pa.string()),
            "parent_span_id": pa.array([_id(nodes[i].parent) for i in which], pa.string()),
            "arrived_unix_nano": pa.array([ZERO + nodes[i].begin for i in which], pa.int64()),
            "total_s": pa.array([(nodes[i].end - nodes[i].begin) / 1e9 for i in which], pa.float64()),
        }
    )


def _spans(nodes: list[Node], which: list[int]) -> pa.Table:
    return pa.table(
        {
            "trace_id": pa.array(["f" * 32 for _ in which], pa.string()),
            "span_id": pa.array([_id(i) for i in which], pa.string()),
            "parent_span_id": pa.array([_id(nodes[i].parent) for i in which], pa.string()),
            "name": pa.array([nodes[i].name for i in which], pa.string()),
            "start_unix_nano": pa.array([ZERO + nodes[i].begin for i in which], pa.int64()),
            "end_unix_nano": pa.array([ZERO + nodes[i].end for i in which], pa.int64()),
        }
    )


def critical_path(nodes: list[Node], touch: int) -> dict[int, int]:
    """Node -> nanoseconds of its own on the critical path of the request it is below; those that are not on it: none.

    Args:
        nodes: parents before their children.
        touch: a child may end so long after the point that the walk is at.
    """
    tree = nx.DiGraph()
    tree.add_nodes_from(range(len(nodes)))
    tree.add_edges_from((n.parent, i) for i, n in enumerate(nodes) if n.parent >= 0 and not n.is_request)
    found: dict[int, int] = {}

    def visit(node: int, begin: int, end: int) -> None:
        left = []
        for child in tree.successors(node):
            low = min(max(nodes[child].begin, begin), end)
            high = max(min(nodes[child].end, end), begin)
            if high > low:
                left.append((high, -low, child))
        point, own = end, 0
        while left:
            high, low, child = max(left)
            left.remove((high, low, child))
            if high > point + touch:
                continue
            high, low = min(high, point), min(-low, point)
            own += point - high
            if high > low:
                visit(child, low, high)
            point = low
        found[node] = own + point - begin

    for i, node in enumerate(nodes):
        if node.is_request and node.end > node.begin:
            visit(i, node.begin, node.end)
    return found


def self_times(nodes: list[Node], unit: int) -> list[int]:
    """Each node's time that no child of it shares, in cells of `unit` nanoseconds; all times are whole cells."""
    cells = [set(range(node.begin // unit, node.end // unit)) for node in nodes]
    for node in nodes:
        if node.parent >= 0:
            cells[node.parent] -= set(range(node.begin // unit, node.end // unit))
    return [len(each) for each in cells]
