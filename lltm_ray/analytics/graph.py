"""Who calls whom: the window's requests as one graph, client -> gateway -> engine -> slot -> GPU.

A request is a chain, and a graph of requests tells nothing; so calls between the same two are one edge. An engine that
chose the slot itself has an edge right to its GPU, and one with several GPUs counts as on its first. Rows do not tell
which of several gateways took a request, so there is one node for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics.answer import Answer, Finding, table
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.trace import Names, Trace, is_empty

NAME = "dependencies"
KINDS = ("client", "gateway", "engine", "slot", "gpu")
"""In the order of their codes, which is that of a request's way."""
MOST_NODES = 200
"""Rows of the table of nodes: more than anybody reads, few enough to draw."""
MOST_EDGES = 400
_GONE = ("client_gone", "client gone")
"""Requests that ended so failed by nobody's fault, as attempts do (their rows have no error then)."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Codes of nodes: a range for each kind, one after the other."""

    names: Names
    slots: int
    """More than any slot's number."""

    @property
    def starts(self) -> tuple[int, ...]:
        """First code of each kind, and one past the last code of all."""
        engines = len(self.names.engine)
        starts = [0]
        for size in (len(self.names.tenant) + 1, 1, engines, engines * self.slots, len(self.names.gpu)):
            starts.append(starts[-1] + size)
        return tuple(starts)

    def kind(self, node: int) -> str:
        """One of `KINDS`."""
        return KINDS[sum(node >= start for start in self.starts[1:-1])]

    def name(self, node: int) -> str:
        """What people call it; `client` for those who named no tenant."""
        kind = self.kind(node)
        code = node - self.starts[KINDS.index(kind)]
        if kind == "client":
            return f"tenant {self.names.of('tenant', code - 1)}" if code else "client"
        if kind == "slot":
            return f"slot {self.names.of('engine', code // self.slots)}/{code % self.slots}"
        return "gateway" if kind == "gateway" else f"{kind} {self.names.of(kind, code)}"


def nodes_of(trace: Trace) -> Nodes:
    """The codes that `calls` and `edges` use for this trace."""
    slots = trace.attempts["slot"]
    return Nodes(trace.names, max(int(slots.max()), 0) + 1 if len(slots) else 1)


def calls(trace: Trace) -> Frame:
    """Every call: source, target: nodes; seconds; critical_s; failed: 0 or 1.

    `critical_s` is what the target adds to the request's time, all below it included. Attempts of a request follow one
    another, so all of their seconds count, the failed ones' too: of an engine from sending to the end, of a slot and a
    GPU prefill and decode. The gateway adds what no engine had: routing, waiting for a slot, and its own work.
    """
    engine, xp = trace.engine, trace.engine.xp
    clients, gateway, engines, slots, gpus, _ = (0, *nodes_of(trace).starts[1:])
    requests = {name: engine.array(trace.requests[name]) for name in ("tenant", "total_s", "error")}
    columns = ("r", "engine", "slot", "gpu", "error", "sent_s", "ended_s", "queue_s")
    tries = {name: engine.array(trace.attempts[name]) for name in columns}
    total = xp.nan_to_num(requests["total_s"])
    taken = xp.nan_to_num(tries["ended_s"] - tries["sent_s"])
    worked = xp.maximum(taken - xp.nan_to_num(tries["queue_s"]), 0)
    has_engine = tries["engine"] >= 0
    away = _sum_by(trace, tries["r"], xp.where(has_engine, taken, 0.0), len(total))
    code, slot, gpu = tries["engine"], tries["slot"], tries["gpu"]
    to_engine, to_slot, failed = engines + code, slots + code * nodes_of(trace).slots + slot, tries["error"] >= 0
    has_slot, has_gpu = has_engine & (slot >= 0), has_engine & (gpu >= 0)
    every, arrived = xp.full(len(total), gateway), clients + requests["tenant"] + 1
    layers = (
        (arrived, every, total, xp.maximum(total - away, 0), _has_failed(trace, requests["error"]), every >= 0),
        (xp.full(len(code), gateway), to_engine, taken, taken, failed, has_engine),
        (to_engine, to_slot, worked, worked, failed, has_slot),
        (xp.where(has_slot, to_slot, to_engine), gpus + gpu, worked, worked, failed, has_gpu),
    )
    kept = [[column[layer[-1]] for column in layer[:-1]] for layer in layers]
    source, target, seconds, critical_s, wrong = (xp.concatenate(parts) for parts in zip(*kept, strict=True))
    columns_of = {"source": source, "target": target, "seconds": seconds, "critical_s": critical_s}
    return engine.frame({**columns_of, "failed": wrong.astype("int64")})


def _sum_by(trace: Trace, group: Array, values: Array, groups: int) -> Array:
    xp = trace.engine.xp
    return xp.bincount(group, weights=values, minlength=groups) if len(group) else xp.zeros(groups)


def _has_failed(trace: Trace, error: Array) -> Array:
    failed = error >= 0
    for code, name in enumerate(trace.names.error):
        if name in _GONE:
            failed = failed & (error != code)
    return failed


def edges(trace: Trace) -> Frame:
    """One row an edge, sorted: source, target: nodes; calls, errors, seconds, critical_s (sums), p50_s, p95_s."""
    engine, size = trace.engine, nodes_of(trace).starts[-1]
    each = calls(trace)
    each["edge"] = each["source"] * size + each["target"]
    wanted = {"failed": "sum", "seconds": "sum", "critical_s": "sum"}
    sums = each.groupby("edge", sort=True).agg(wanted).reset_index()
    spread = engine.quantiles(each, ("edge",), "seconds", (0.5, 0.95))
    found = sums.merge(spread, on="edge", how="left").sort_values("edge").reset_index(drop=True)
    found["source"] = found["edge"] // size
    found["target"] = found["edge"] % size
    named = {"count": "calls", "failed": "errors", "q50": "p50_s", "q95": "p95_s"}
    columns = ["source", "target", "calls", "errors", "seconds", "critical_s", "p50_s", "p95_s"]
    return found.rename(columns=named)[columns]


def known_nodes(trace: Trace) -> Iterator[int]:
    """Engines, and GPUs that some engine is on, whether they were called or not."""
    starts = nodes_of(trace).starts
    for name, start in (("engine", starts[2]), ("gpu", starts[4])):
        codes = trace.engine.host(trace.engines[[name]].drop_duplicates())[name]
        yield from (start + int(code) for code in codes if code >= 0)


def analyze(trace: Trace) -> Answer:
    """Tables `nodes` and `edges`, in the order of a request's way, cut to those that were called most."""
    if is_empty(trace):
        columns = ("source", "target", "calls", "errors", "error_ratio", "p50_s", "p95_s", "seconds")
        nothing = {"nodes": table(dict.fromkeys(("node", "kind", "requests", "errors"), ()))}
        return Answer({**nothing, "edges": table(dict.fromkeys(columns, ()))})
    nodes = nodes_of(trace)
    found = trace.engine.host(edges(trace))
    traffic = dict.fromkeys(known_nodes(trace), (0, 0)) | _traffic(found, nodes)
    busiest = sorted(traffic, key=lambda node: (-traffic[node][0], node))[:MOST_NODES]
    shown = found[found["source"].isin(busiest) & found["target"].isin(busiest)]
    shown = shown.sort_values(["seconds", "source", "target"], ascending=[False, True, True]).head(MOST_EDGES)
    kept = sorted(busiest)
    at: dict[str, list[Any]] = {
        "node": [nodes.name(node) for node in kept],
        "kind": [nodes.kind(node) for node in kept],
        "requests": [traffic[node][0] for node in kept],
        "errors": [traffic[node][1] for node in kept],
    }
    left = {"nodes_left_out": len(traffic) - len(kept), "edges_left_out": len(found) - len(shown)}
    return Answer({"nodes": table(at), "edges": _named(shown.sort_values(["source", "target"]), nodes)}, left)


def _traffic(found: Any, nodes: Nodes) -> dict[int, tuple[int, int]]:
    """Node -> calls and errors: those that it got, or that a client made."""
    traffic: dict[int, tuple[int, int]] = {}
    ends = zip(found["source"].tolist(), found["target"].tolist(), strict=True)
    for (source, target), count, errors in zip(ends, found["calls"].tolist(), found["errors"].tolist(), strict=True):
        for node in (source, target) if source < nodes.starts[1] else (target,):
            before = traffic.get(node, (0, 0))
            traffic[node] = (before[0] + count, before[1] + errors)
    return traffic


def _named(found: Any, nodes: Nodes) -> Any:
    columns = {name: [nodes.name(node) for node in found[name]] for name in ("source", "target")}
    columns |= {name: found[name].tolist() for name in ("calls", "errors")}
    columns["error_ratio"] = (found["errors"] / found["calls"]).tolist()
    return table(columns | {name: found[name].tolist() for name in ("p50_s", "p95_s", "seconds")})


def judge(answer: Answer) -> list[Finding]:
    """Nothing: this is the map. Errors are judged by `failures`, load by `bottlenecks`, slowness by `anomaly`."""
    del answer
    return []
