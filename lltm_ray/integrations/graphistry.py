"""PyGraphistry: a window's graphs as `Plottable`s, to query with Cypher or GFQL, lay out, and upload.

```python
spans = span_graph(trace)
slow = query(spans, "MATCH (n) WHERE n.name = 'decode' AND n.ms > 500 RETURN n.engine, count(*) AS spans")
picture = layout(dependency_graph(trace))
```

All graphs are bound alike: nodes are named by the column `node`, edges go from `source` to `target`; missing names are
empty, missing numbers NaN. Frames stay where the trace's engine has them. Only `upload` uses the network.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lltm_ray._optional import load
from lltm_ray.analytics import graph as dependencies
from lltm_ray.analytics import prefix
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.trace import Trace
from lltm_ray.errors import ConfigError
from lltm_ray.knowledge.graph import KnowledgeGraph

Plottable = Any
"""A `graphistry.Plottable`; its frames are `_nodes` and `_edges`."""
HUB = "hub.graphistry.com"
_OPERATIONS = ("Node", "Edge", "Call")
"""Steps of a GFQL chain that stay in this process; others fetch graphs from a server."""


# --- graphs


def graph(nodes: Frame, edges: Frame, *, name: str = "", title: str = "node") -> Plottable:
    """Any graph, bound as all of them here.

    Args:
        nodes: a pandas or cuDF frame with a column `node`.
        edges: likewise, with `source` and `target`.
        name: what it is called once uploaded.
        title: column of `nodes` that is shown beside them.

    Raises:
        ConfigError: a column is missing, or the frames are not of one kind.
        MissingExtraError: graphistry is not installed.
    """
    for what, frame, wanted in (("nodes", nodes, {"node", title}), ("edges", edges, {"source", "target"})):
        missing = wanted - set(frame.columns)
        if missing:
            raise ConfigError(what, list(frame.columns), f"must have the column {', '.join(sorted(missing))}")
    if _kind(nodes) != _kind(edges):
        raise ConfigError("edges", _kind(edges), f"must be a frame as nodes are, of {_kind(nodes)}")
    bound = _graphistry().bind(source="source", destination="target", node="node", point_title=title)
    return bound.nodes(nodes).edges(edges).name(name)


def span_graph(trace: Trace, trace_ids: Sequence[str] | None = None) -> Plottable:
    """Spans, with an edge from each to those below it.

    Nodes: node: a number; name, engine, slot (-1: none), ms, start_unix_nano, error, trace_id, request_id, tenant.

    Args:
        trace: the window.
        trace_ids: only these; None: all.

    Raises:
        ConfigError: the window has no such trace.
    """
    spans = trace.spans if trace_ids is None else _of_traces(trace, trace_ids)
    engine, named = trace.engine, partial(_named, trace)
    of = {name: engine.array(spans[name]) for name in spans.columns}
    tenant = engine.xp.concatenate([engine.array(trace.requests["tenant"]), engine.xp.full(1, -1)])
    columns = {
        "node": of["s"],
        "name": named(trace.names.span, of["name"]),
        "engine": named(trace.names.engine, of["engine"]),
        "slot": of["slot"],
        "ms": (of["end_s"] - of["start_s"]) * 1e3,
        "start_unix_nano": trace.start_unix_nano + engine.xp.rint(of["start_s"] * 1e9).astype("int64"),
        "error": named(trace.names.error, of["error"]),
        "trace_id": named(trace.trace_ids.to_pylist(), of["trace"]),
        "request_id": named(trace.request_ids.to_pylist(), of["r"]),
        "tenant": named(trace.names.tenant, tenant[of["r"]]),
    }
    below = spans[spans["parent"].isin(spans["s"])]
    edges = below[["parent", "s"]].rename(columns={"parent": "source", "s": "target"}).reset_index(drop=True)
    return graph(engine.df.DataFrame(columns), edges, name="spans", title="name")


def dependency_graph(trace: Trace) -> Plottable:
    """Who calls whom, as `analytics.graph` has it: its tables of nodes and edges, cut to those called most."""
    tables = dependencies.analyze(trace).tables
    return graph(_on(trace, tables["nodes"]), _on(trace, tables["edges"]), name="dependencies")


def prefix_graph(trace: Trace) -> Plottable:
    """Families of prompts that share a beginning, with an edge from each to the longer ones that begin with it.

    The tables `families` and `links` of `analytics.prefix`, with `node`, `source` and `target` for their families;
    `evidence` is trace ids with spaces between.
    """
    tables = prefix.analyze(trace).tables
    families = tables["families"].rename(columns={"family": "node"})
    families["evidence"] = [" ".join(each) for each in families["evidence"]]
    links = tables["links"].rename(columns={"parent": "source", "child": "target"})
    return graph(_on(trace, families), _on(trace, links), name="prefixes")


def knowledge_graph(found: KnowledgeGraph) -> Plottable:
    """Entities and their relations; nodes: type, mentions; edges: relation, mentions."""
    nodes, edges = found.to_frames()
    return graph(nodes, edges, name="knowledge")


def _of_traces(trace: Trace, trace_ids: Sequence[str]) -> Frame:
    codes = pc.index_in(pa.array(list(trace_ids), pa.string()), trace.trace_ids).to_pylist()
    for code, trace_id in zip(codes, trace_ids, strict=True):
        if code is None:
            raise ConfigError("trace_ids", trace_id, "is not in this window; take a longer one")
    return trace.spans[trace.spans["trace"].isin(codes)]


def _named(trace: Trace, names: Sequence[str | None], codes: Array) -> Any:
    """A column of names; empty for -1."""
    known = trace.engine.df.Series([*(name or "" for name in names), ""])
    return known.take(trace.engine.xp.where(codes >= 0, codes, len(names))).reset_index(drop=True)


def _on(trace: Trace, table: Any) -> Frame:
    """A host table, on the trace's engine."""
    return table if trace.engine.name == "pandas" else trace.engine.df.from_pandas(table)


def _graphistry() -> Any:
    return load("graphistry", extra="graphistry", feature="graphs with Graphistry")


# --- queries


def query(graph: Plottable, text: str) -> Plottable:
    """Ask a graph, on the engine that its frames are of.

    Args:
        graph: as `graph` makes them.
        text: Cypher (`MATCH ... RETURN ...` gives rows, `GRAPH { MATCH ... }` a graph), or GFQL as a JSON list of
            operations (gives a graph). Of Cypher, what changes a graph is not understood, nor are aggregates other
            than avg, collect, count, max, min and sum.

    Returns:
        What was found: rows, or nodes, are its `_nodes`; the edges of a graph its `_edges`.

    Raises:
        ConfigError: a query that is not understood, or that names a column that is not there.
    """
    asked = _operations(text) if text.lstrip().startswith("[") else text
    try:
        # by name: graphistry would guess, and takes "cudf" for pandas frames without a word; strict, for an absent
        # column would be null
        return graph.gfql(asked, engine=_kind(graph._nodes), strict=True)
    except Exception as error:  # border: a query that does not get through raises whatever it hits
        raise ConfigError("query", text, f"{_reason(error)}; {_columns(graph)}") from error


def is_graph(found: Plottable, asked: Plottable) -> bool:
    """Whether an answer is a part of the graph that was asked, rather than rows made of it."""
    return set(asked._nodes.columns) <= set(found._nodes.columns)


def _operations(text: str) -> Any:
    try:
        steps = json.loads(text)
    except ValueError as error:
        raise ConfigError("query", text, f"is no JSON: {error}; Cypher begins with MATCH or GRAPH") from error
    for step in steps:
        if not isinstance(step, dict) or step.get("type") not in _OPERATIONS:
            raise ConfigError("query", text, f"each step's type must be one of {', '.join(_OPERATIONS)}, not {step}")
    chain = load("graphistry.compute.chain:Chain", extra="graphistry", feature="graph queries")
    try:
        return chain.from_json({"type": "Chain", "chain": steps})
    except Exception as error:  # border: as above
        raise ConfigError("query", text, _reason(error)) from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "message", "") or f"{type(error).__name__}: {error}")[:300].rstrip(".")


def _columns(graph: Plottable) -> str:
    nodes, edges = (", ".join(map(str, frame.columns)) for frame in (graph._nodes, graph._edges))
    return f"nodes have {nodes}; edges have {edges}"


def _kind(frame: Frame) -> str:
    """`pandas` or `cudf`."""
    kind = type(frame).__module__.partition(".")[0]
    if kind not in ("pandas", "cudf"):
        raise ConfigError("nodes", type(frame).__name__, "must be a frame of pandas or cuDF")
    return kind


def to_host(frame: Frame) -> Any:
    """A frame as a `pandas.DataFrame`."""
    return frame.to_pandas() if _kind(frame) == "cudf" else frame


# --- layout


def layout(graph: Plottable) -> Plottable:
    """Places for the nodes, in columns `x` and `y`: layers from left to right, each sorted by where it is called from.

    `x` is the number of edges on the longest way to a node (a cycle is cut at its busiest node), `y` its place in the
    layer, around 0. Needs no server, and no other package.
    """
    nodes, edges = (to_host(frame) for frame in (graph._nodes, graph._edges))
    if not len(nodes):
        return _placed(graph, np.zeros(0), np.zeros(0))
    names = nodes["node"]
    rank = dict(zip(names.tolist(), range(len(names)), strict=True))
    leveled = to_host(graph.get_topological_levels(level_col="x", warn_cycles=False)._nodes)
    x = leveled.drop_duplicates("node").set_index("node")["x"].reindex(names).to_numpy()
    ends = [edges[end].map(rank) for end in ("source", "target")]
    known = ends[0].notna() & ends[1].notna()
    source, target = (end[known].to_numpy().astype(np.int64) for end in ends)
    down = x[source] < x[target]
    return _placed(graph, x.astype(np.float64), _heights(x, source[down], target[down]))


def _heights(level: Any, source: Any, target: Any) -> Any:
    """Layer by layer: nodes by the mean height of those that call them, the others and equal ones in their order."""
    y = np.zeros(len(level))
    order = np.argsort(level[target], kind="stable")
    source, target = source[order], target[order]
    for each in np.unique(level):
        layer = np.flatnonzero(level == each)
        begin, end = np.searchsorted(level[target], (each, each + 1))
        place = np.searchsorted(layer, target[begin:end])
        calls = np.bincount(place, minlength=len(layer))
        total = np.bincount(place, weights=y[source[begin:end]], minlength=len(layer))
        ranks = np.argsort(np.argsort(total / np.maximum(calls, 1), kind="stable"))
        y[layer] = ranks - (len(layer) - 1) / 2
    return y


def _placed(graph: Plottable, x: Any, y: Any) -> Plottable:
    placed = graph.nodes(graph._nodes.assign(x=x, y=y)).bind(point_x="x", point_y="y")
    return placed.layout_settings(play=0)  # milliseconds of Graphistry's own layout once it is shown


# --- upload


@dataclass(frozen=True, slots=True)
class Account:
    """Who uploads: a user with a password, or a personal key; and where to."""

    username: str = ""
    password: str = field(default="", repr=False)
    personal_key_id: str = ""
    personal_key_secret: str = field(default="", repr=False)
    server: str = HUB
    """A host, or its URL; https if it does not say."""

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Account:
        """What GRAPHISTRY_USERNAME, _PASSWORD, _PERSONAL_KEY_ID, _PERSONAL_KEY_SECRET and _SERVER say."""
        told = {name: environ.get(f"GRAPHISTRY_{name.upper()}", "") for name in cls.__slots__}
        return cls(**{name: value for name, value in told.items() if value})

    def login(self) -> dict[str, str]:
        """Options of graphistry's `register`.

        Raises:
            ConfigError: neither a password nor a key is whole.
        """
        for names in (("username", "password"), ("personal_key_id", "personal_key_secret")):
            pair = {name: getattr(self, name) for name in names}
            if all(pair.values()):
                protocol, found, host = self.server.rstrip("/").rpartition("://")
                return {**pair, "protocol": protocol if found else "https", "server": host}
        why = "set GRAPHISTRY_USERNAME and GRAPHISTRY_PASSWORD, or GRAPHISTRY_PERSONAL_KEY_ID and _PERSONAL_KEY_SECRET"
        raise ConfigError("account", self, f"has no password and no key: {why}, or give them as Account(...)")


def upload(graph: Plottable, account: Account | None = None, *, timeout_s: float = 120.0) -> str:
    """Send a graph to a Graphistry server, in a session of its own that is forgotten.

    Args:
        graph: what to show; all its columns travel.
        account: None: as `Account.of` reads it from the environment.
        timeout_s: how long the server may take for all of it.

    Returns:
        The picture's URL.

    Raises:
        ConfigError: no account; or the server refused it or the graph, cannot be reached, or takes too long.
    """
    account = account or Account.of()
    login = account.login()
    try:
        sent = _within(timeout_s, lambda: _send(graph, login))
    except TimeoutError:
        raise ConfigError("server", account.server, f"has not taken the graph within {timeout_s:g} s") from None
    except Exception as error:  # noqa: BLE001 - border: graphistry raises Exception itself, with the server's answer
        why = str(error)
        for secret in (account.password, account.personal_key_secret):
            why = why.replace(secret, "…") if secret else why
        raise ConfigError("server", account.server, f"did not take the account or the graph: {why[:300]}") from None
    if not sent._url or not sent._dataset_id:
        raise ConfigError("server", account.server, "gave the graph no URL; is it a Graphistry server?")
    return str(sent._url)


def _send(graph: Plottable, login: Mapping[str, str]) -> Plottable:
    client = _graphistry().client()
    mine = graph.bind()  # a copy
    with _quiet():
        client.register(api=3, **login, store_token_creds_in_memory=False)
        # a graph stays with the session that it was made in, which has no account
        mine._pygraphistry, mine.session = client, client.session
        return mine.upload(memoize=False, validate="strict")


def _within(timeout_s: float, work: Callable[[], Plottable]) -> Plottable:
    """What it returns or raises; `TimeoutError`: it goes on alone. graphistry waits for a server without an end."""
    done: Future[Plottable] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)

    Thread(target=run, name="upload", daemon=True).start()
    return done.result(timeout_s)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep graphistry's own log lines back: they quote the server's answers, and we raise what went wrong."""
    known = [logger for name, logger in logging.root.manager.loggerDict.items() if name.startswith("graphistry")]
    loud = [logger for logger in known if isinstance(logger, logging.Logger) and not logger.disabled]
    for logger in loud:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loud:
            logger.disabled = False
