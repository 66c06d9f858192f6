"""What requests' time goes through: centrality on the graph of `graph.py`, and engines that get more than their share.

A straggler is slow at the work it gets; a bottleneck gets too much of it. So load is counted in work: tokens, each at
what it costs the whole fleet, whoever computed it. And waiting is only counted as lost while a peer had a free slot,
and only what is left of it when the peer had first computed all that was cached where the request waited.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import MOST_EVIDENCE, Answer, Finding, rows, table
from lltm_ray.analytics.frames import Frame
from lltm_ray.analytics.graph import MOST_EDGES, MOST_NODES, Nodes, edges, known_nodes, nodes_of
from lltm_ray.analytics.load_share import FIT_RATIO, loads
from lltm_ray.analytics.occupancy import slots_of
from lltm_ray.analytics.trace import Trace, is_empty

NAME = "bottlenecks"
MOST_CENTRAL = 1000
"""Edges that centrality is computed on, the heaviest: the time of betweenness grows with clients times edges."""
MOST_ENGINES = 100
MIN_REQUESTS = 30
"""Of the engine, and of its peers: fewer are chance."""
MIN_RATIO = 1.5
"""Work it got over its share. Caches draw conversations: in a clean fleet to 1.1, among a straggler's peers to 1.25."""
MIN_WAIT_RATIO = 2.0
"""Mean wait for it over that for its peers."""
MIN_Z = 4.0
"""Of the difference of the two waits (Welch): once in 30,000 by chance."""
MIN_LOST_SHARE = 0.05
"""Of its requests' time: less is not worth a change of settings."""
_LEAST_LOST_S = 0.001
"""Of a request that is shown as evidence."""
_LEAST = 1e-9
"""Seconds of an edge, at least: an edge without weight is no edge."""
_NODES = ("node", "kind", "critical_s", "critical_share", "pagerank", "betweenness")
_EDGES = ("source", "target", "score", "critical_s")
_ENGINES = (
    *("engine", "model", "policy", "slots", "peers", "requests", "peers_requests", "work_share", "fair_share"),
    *("ratio", "pace_ratio", "busy_s", "utilization", "idlest", "idlest_utilization", "wait_s", "peers_wait_s", "z"),
    *("avoidable_s", "lost_s", "lost_share", "evidence"),
)


def analyze(trace: Trace) -> Answer:
    """Tables `nodes`, `edges` and `engines`, the most seconds first."""
    if is_empty(trace):
        names = {"nodes": _NODES, "edges": _EDGES, "engines": _ENGINES}
        return Answer({name: table(dict.fromkeys(columns, ())) for name, columns in names.items()})
    every = edges(trace)
    total_s = float(trace.requests["total_s"].sum())
    nodes, left_nodes, links, left_links = _central(trace, every, total_s)
    figures = {"critical_s": total_s, "nodes_left_out": left_nodes, "edges_left_out": left_links}
    return Answer({"nodes": nodes, "edges": links, "engines": _engines(trace)}, figures)


# --- centrality


def centrality(trace: Trace, every: Frame) -> tuple[Any, Any]:
    """Scores of the heaviest edges' graph, in the host's memory.

    Args:
        trace: whose engine computes them.
        every: `graph.edges`.

    Returns:
        node, pagerank (by critical seconds), betweenness (by steps); and source, target, score, critical_s, where
        score is edge betweenness (by steps).
    """
    engine = trace.engine
    heaviest = every.sort_values(["critical_s", "source", "target"], ascending=[False, True, True])
    graph = heaviest.head(MOST_CENTRAL)[["source", "target", "critical_s"]].reset_index(drop=True)
    graph["weight"] = graph["critical_s"].clip(lower=_LEAST)
    weighted = graph[["source", "target", "weight"]]
    rank = engine.pagerank(weighted).rename(columns={"score": "pagerank"})
    between = engine.betweenness(weighted).rename(columns={"score": "betweenness"})
    links = graph[["source", "target", "critical_s"]].merge(
        engine.edge_betweenness(weighted), on=["source", "target"], how="left"
    )
    return engine.host(rank.merge(between, on="node", how="left")), engine.host(links)


def _central(trace: Trace, every: Frame, total_s: float) -> tuple[Any, int, Any, int]:
    nodes = nodes_of(trace)
    scores, links = centrality(trace, every)
    critical = _critical(trace.engine.host(every), nodes)
    known = critical | {node: 0.0 for node in known_nodes(trace) if node not in critical}
    order = sorted(known, key=lambda node: (-known[node], node))[:MOST_NODES]
    ranked = {row.node: row for row in rows(scores)}
    columns: dict[str, list[Any]] = {
        "node": [nodes.name(node) for node in order],
        "kind": [nodes.kind(node) for node in order],
        "critical_s": [known[node] for node in order],
        "critical_share": [known[node] / total_s if total_s else 0.0 for node in order],
    }
    for name in ("pagerank", "betweenness"):
        columns[name] = [float(getattr(ranked[node], name)) if node in ranked else 0.0 for node in order]
    shown = links.sort_values(["critical_s", "source", "target"], ascending=[False, True, True]).head(MOST_EDGES)
    ends = {name: [nodes.name(node) for node in shown[name]] for name in ("source", "target")}
    told = table(ends | {name: shown[name].tolist() for name in ("score", "critical_s")})
    return table(columns), len(known) - len(order), told, len(every) - len(shown)


def _critical(every: Any, nodes: Nodes) -> dict[int, float]:
    """Node -> seconds that it added to requests, all below it included; a client adds none."""
    found = dict.fromkeys((source for source in every["source"].tolist() if source < nodes.starts[1]), 0.0)
    for row in rows(every):
        found[row.target] = found.get(row.target, 0.0) + row.critical_s
    return found


# --- what is told of them


def _engines(trace: Trace) -> Any:
    """One row an engine that got requests, the busiest first."""
    each = loads(trace)
    if not len(each):
        return table(dict.fromkeys(_ENGINES, ()))
    found = trace.engine.host(_sums(trace, each))
    slots, policies, evidence = slots_of(trace), _policies(trace, each), _evidence(trace, each)
    found["slots"] = [max(slots[engine], 1) for engine in found["engine"]]
    known = list(rows(found))
    told = [
        _load(trace, row, [other for other in known if other.model == row.model])
        | {"policy": policies.get(row.engine, ""), "evidence": evidence.get(row.engine, ())}
        for row in sorted(known, key=lambda row: (-row.taken_s, row.engine))[:MOST_ENGINES]
    ]
    return table({name: [row[name] for row in told] for name in _ENGINES})


def _sums(trace: Trace, each: Frame) -> Frame:
    """Of each engine that got requests: how many (one), its model, and sums over them."""
    engine, xp = trace.engine, trace.engine.xp
    columns = {name: engine.array(each[name]) for name in each.columns}
    codes = columns["engine"]
    columns["wait_squared"] = columns["wait_s"] ** 2
    sums = ("failed", "wait_s", "wait_squared", "taken_s", "work_s", "avoidable_s", "lost_s")
    found = {name: xp.bincount(codes, weights=columns[name]) for name in sums}
    models = each.groupby("engine", sort=True).agg({"model": "max", "r": "count"}).reset_index()
    at = engine.array(models["engine"])
    told = {"engine": at, "model": engine.array(models["model"]), "one": engine.array(models["r"])}
    return engine.frame(told | {name: sums_of[at] for name, sums_of in found.items()})


def _load(trace: Trace, row: Any, group: list[Any]) -> dict[str, Any]:
    """An engine beside its peers: those of `group` that answer."""
    names, length_s = trace.names, trace.length_s
    peers = [other for other in group if other.engine != row.engine and other.failed <= FIT_RATIO * other.one]
    use = {other.engine: other.taken_s / (other.slots * length_s) for other in group}
    idlest = min(peers, key=lambda other: (use[other.engine], other.engine), default=None)
    work, fair = row.work_s / max(sum(other.work_s for other in group), _LEAST), row.slots
    fair /= row.slots + sum(other.slots for other in peers)
    count, waited, squared = (sum(getattr(p, name) for p in peers) for name in ("one", "wait_s", "wait_squared"))
    mean, spread = _moments(row.one, row.wait_s, row.wait_squared)
    peers_mean, peers_spread = _moments(count, waited, squared)
    pace = sum(p.taken_s for p in peers) / max(sum(p.work_s for p in peers), _LEAST)
    return {
        "engine": names.of("engine", row.engine),
        "model": names.of("model", row.model),
        "slots": row.slots,
        "peers": len(peers),
        "requests": row.one,
        "peers_requests": count,
        "work_share": work,
        "fair_share": fair,
        "ratio": work / fair,
        "pace_ratio": row.taken_s / max(row.work_s, _LEAST) / pace if pace else 1.0,
        "busy_s": row.taken_s,
        "utilization": use[row.engine],
        "idlest": names.of("engine", idlest.engine) if idlest else "",
        "idlest_utilization": use[idlest.engine] if idlest else 0.0,
        "wait_s": mean,
        "peers_wait_s": peers_mean,
        "z": (mean - peers_mean) / max((spread + peers_spread) ** 0.5, _LEAST),
        "avoidable_s": row.avoidable_s,
        "lost_s": row.lost_s,
        "lost_share": row.lost_s / max(row.wait_s + row.taken_s, _LEAST),
    }


def _moments(count: float, total: float, squared: float) -> tuple[float, float]:
    """Mean, and the square of its standard error."""
    mean = total / max(count, 1)
    return mean, max(squared / max(count, 1) - mean * mean, 0.0) / max(count, 1)


def _policies(trace: Trace, each: Frame) -> dict[int, str]:
    """Engine -> the policy that sent it most."""
    engine = trace.engine
    policy = engine.array(trace.requests["policy"])[engine.array(each["r"])]
    sent = engine.frame({"engine": engine.array(each["engine"]), "policy": policy, "count": engine.array(each["r"])})
    counts = engine.host(sent.groupby(["engine", "policy"], sort=True).agg({"count": "count"}).reset_index())
    ordered = rows(counts.sort_values(["count", "policy"], ascending=[True, False]))
    return {row.engine: trace.names.of("policy", row.policy) for row in ordered}


def _evidence(trace: Trace, each: Frame) -> dict[int, tuple[str, ...]]:
    """Engine -> traces of the requests that lost most by waiting for it."""
    lost = (
        each[each["lost_s"] > _LEAST_LOST_S]
        .sort_values(["lost_s", "r"], ascending=[False, True])
        .reset_index(drop=True)
    )
    lost["place"] = lost.groupby("engine").cumcount()
    worst = trace.engine.host(lost[lost["place"] < MOST_EVIDENCE][["engine", "r"]])
    found: dict[int, tuple[str, ...]] = {}
    for engine, trace_id in zip(worst["engine"].tolist(), trace.evidence(worst["r"]), strict=True):
        found[engine] = (*found.get(engine, ()), trace_id)
    return found


# --- judgement


def judge(answer: Answer) -> list[Finding]:
    """Engines that get far more work than their share while their requests wait and a peer has room."""
    return [_finding(row) for row in _overloaded(answer)]


def _overloaded(answer: Answer) -> Iterator[Any]:
    for row in rows(answer.tables["engines"]):
        is_more = row.peers > 0 and row.ratio >= MIN_RATIO and min(row.requests, row.peers_requests) >= MIN_REQUESTS
        is_waited_for = row.wait_s >= MIN_WAIT_RATIO * row.peers_wait_s and row.z >= MIN_Z
        if is_more and is_waited_for and row.lost_share >= MIN_LOST_SHARE:
            yield row


def _finding(row: Any) -> Finding:
    text = (
        f"{row.engine} gets {units.percent(row.work_share)} of the work of {row.model} on {row.peers + 1} engines, "
        f"{units.times(row.ratio)} its share: a request waits {units.seconds(row.wait_s)} for it, against "
        f"{units.seconds(row.peers_wait_s)} for its peers, while {row.idlest} uses "
        f"{units.percent(row.idlest_utilization)} of its slots. It needs {units.times(row.pace_ratio)} its peers' time "
        "for the same work."
    )
    names = (
        "work_share",
        "fair_share",
        "ratio",
        "pace_ratio",
        "utilization",
        "wait_s",
        "peers_wait_s",
        "z",
        "avoidable_s",
    )
    return Finding(
        kind="bottleneck",
        subject=row.engine,
        text=text,
        advice=_ADVICE.get(row.policy, _ADVICE[""]),
        impact_s=row.lost_s,
        figures={name: float(getattr(row, name)) for name in names},
        evidence=tuple(row.evidence),
    )


_ADVICE = {
    "": 'set gateway.policy = "residency": it sends a request elsewhere when waiting costs more than the cache saves',
    "residency": (
        'compare with gateway.policy = "least-loaded" on a recorded trace (gateway.trace) first: '
        "lltm-ray replay TRACE --policy residency --policy least-loaded"
    ),
    "least-loaded": (
        "set gateway.processes = 1: each gateway process owns a part of every engine's slots, and sees no other's load"
    ),
}
"""By the policy that sent the requests; that of "" for all others."""
