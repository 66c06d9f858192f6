"""Prefixes: what prompts share, what of it was computed again though the fleet had it, and why.

Hashes of beginnings make a trie: a node is a beginning, its parent the beginning one block shorter. A node is a family
if at least two conversations share it and no longer beginning is shared by all of these.

What an ideal fleet, one server with unlimited slots and memory, would have found cached of a prompt is its longest
beginning that an earlier request had computed before this one's prefill began. What of that was computed again is
wasted. What a conversation lost as its turn moved counts in `conversations` and is subtracted here, so that no token
counts twice: left are first turns, single requests among them, whose beginnings others had, and later turns whose own
engine forgot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics.answer import Answer, Finding, rows, table
from lltm_ray.analytics.conversations import dearest
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.turns import SLACK_TOKENS, SPREAD, columns_of, prefill_token_s, turns

NAME = "prefixes"
LEAST_RATIO = 0.25
"""Wasted of reusable tokens; each engine has to compute a system prompt once, the ideal has only one engine."""
LEAST_REQUESTS = 20
"""That computed something again; fewer are chance."""
LEAST_WASTED_S = 1.0
LEAST_LOST_RATIO = 0.005
"""Wasted seconds of those that all requests took; less, nobody notices."""
_TOP = 50
_TURNS = ("first", "later")
_SUMS = dict.fromkeys(("prompt", "shared", "cached", "reusable", "wasted", "wasted_s"), "sum")


def analyze(trace: Trace) -> Answer:
    """Tables `families`, each request in its longest one so that they add up; `links` of them; `wasted` by turn.

    Figures: `reusable_ratio` and `reused_ratio` are of prompt tokens; what moved turns lost is not in `wasted_tokens`.
    """
    trie = build_trie(trace)
    found = reuse(trace, trie)
    family, above = families(trace, trie, found)
    found = found.assign(family=family, shared=_tokens(trace, trie, family))
    top = _top(trace, found)
    kept = top["family"].tolist()
    tables = {
        "families": _families(trace, trie, found, top),
        "links": _links(trace, trie, above, kept),
        "wasted": _wasted(trace, found),
    }
    return Answer(tables, _figures(trace, found, above))


def judge(answer: Answer) -> list[Finding]:
    """Kind `wasted prefill`, for first and for later turns: a large share of what could be reused was not."""
    least_s = max(LEAST_WASTED_S, LEAST_LOST_RATIO * answer.figures["total_s"])
    return [
        _finding(answer, row)
        for row in rows(answer.tables["wasted"])
        if row.requests >= LEAST_REQUESTS
        and row.wasted_s >= least_s
        and row.wasted_tokens >= LEAST_RATIO * row.reusable_tokens
    ]


def _finding(answer: Answer, row: Any) -> Finding:
    worst = next(iter(rows(answer.tables["families"])), None) if row.turn == "first" else None
    text = (
        f"{row.requests:,} {'first turns and single requests' if worst else 'later turns of conversations'} computed "
        f"again what the fleet had computed before: {row.wasted_tokens:,.0f} of {row.reusable_tokens:,.0f} reusable "
        f"tokens ({row.wasted_tokens / row.reusable_tokens:.0%}), {row.wasted_s:,.1f} s of prefill."
    )
    if worst:
        text += (
            f" Most by prefix {worst.family}: {worst.depth_tokens:,.0f} tokens, {worst.requests:,} requests on "
            f"{worst.engines} engines."
        )
    return Finding(
        kind="wasted prefill",
        subject=f"prefix {worst.family}" if worst else "later turns",
        text=text,
        advice=_advice(row, answer.figures),
        impact_s=float(row.wasted_s),
        figures={name: float(getattr(row, name)) for name in _WASTED[1:-1]},
        evidence=row.evidence,
    )


def _advice(row: Any, told: Mapping[str, float]) -> str:
    if row.forgotten_ratio >= 0.5:
        return (
            "Their own engine had had it and forgot: give engines more slots (engine.n_parallel), a larger context "
            "(engine.n_ctx) or more memory for idle prompts (engine.cache_ram_mib)."
        )
    if told["residency_ratio"] < 0.5:
        return 'Set gateway.policy = "residency": a prompt then goes to where its beginning is cached.'
    return (
        "Other engines had it: each engine computes a shared prompt for itself. Fewer engines with more slots each "
        "(engine.n_parallel) share more."
    )


# --- the trie


@dataclass(frozen=True, slots=True)
class Trie:
    """Nodes are numbered; rows are beginnings of usable requests, by request, then by depth."""

    r: Array
    node: Array
    first: Array
    """By request: its first row."""
    count: Array
    """By request: its rows."""
    hash: Array
    """By node."""
    parent: Array
    """By node: the beginning one block shorter, -1 for the first block."""
    end_bytes: Array
    """By node."""


def build_trie(trace: Trace) -> Trie:
    """Beginnings of the prompts of each model: caches know no other model's."""
    engine, xp, n = trace.engine, trace.engine.xp, len(trace.requests)
    of = columns_of(trace)
    r, value, size = (engine.array(trace.prefixes[name]) for name in ("r", "hash", "end_bytes"))
    keep = of["is_usable"][r]
    r, value, size = r[keep], value[keep], size[keep]
    keys, node = xp.unique(value ^ (of["model"][r] + 1) * SPREAD, return_inverse=True)
    count = xp.bincount(r, minlength=n) if len(r) else xp.zeros(n, "int64")
    is_first = xp.ones(len(r), bool)
    is_first[1:] = r[1:] != r[:-1]
    before = xp.zeros(len(r), "int64")
    before[1:] = node[:-1]
    nodes = [xp.zeros(len(keys), "int64") for _ in range(3)]
    for each, column in zip(nodes, (value, xp.where(is_first, -1, before), size), strict=True):
        each[node] = column  # rows of a node agree
    return Trie(r, node, xp.cumsum(count) - count, count, *nodes)


def reuse(trace: Trace, trie: Trie) -> Frame:
    """One row for each request, in the order of `r`.

    Returns:
        r; engine: a code; conversation; is_later: 0 or 1, whether it has a previous turn; prompt, cached: tokens;
        reusable: tokens that the ideal fleet would have found; wasted: of them, those computed again and not lost by a
        move; wasted_s: the time that took; is_forgotten: 0 or 1, whether its own engine had had them.
    """
    xp, of, chain = trace.engine.xp, columns_of(trace), turns(trace)
    start, done = prefill_times(trace, of)
    ready = least_of(trace, trie.node, done[trie.r], len(trie.hash))
    is_ready = ready[trie.node] < start[trie.r]
    blocks = xp.bincount(trie.r[is_ready], minlength=len(start))  # longer beginnings are ready later
    node = xp.full(len(start), -1)
    some = blocks > 0
    node[some] = trie.node[trie.first[some] + blocks[some] - 1]
    reusable = xp.minimum(_tokens(trace, trie, node), xp.maximum(of["prompt"] - 1, 0))
    missed = xp.maximum(reusable - of["cached"], 0)
    wasted = missed - xp.minimum(missed, trace.engine.array(chain["lost"]))
    wasted = xp.where(wasted > SLACK_TOKENS, wasted, 0)
    columns = {
        "r": xp.arange(len(start)),
        "engine": of["engine"],
        "conversation": trace.engine.array(chain["conversation"]),
        "is_later": (trace.engine.array(chain["previous"]) >= 0).astype("int64"),
        "prompt": of["prompt"],
        "cached": of["cached"],
        "reusable": reusable,
        "wasted": wasted,
        "wasted_s": wasted * prefill_token_s(trace)[of["engine"]],
        "is_forgotten": _was_here(trace, trie, (start, done), xp.where(wasted > 0, node, -1)).astype("int64"),
    }
    return trace.engine.frame(columns)


def families(trace: Trace, trie: Trie, found: Frame) -> tuple[Array, Array]:
    """What conversations share.

    Returns:
        By request its longest family, as a node, -1 for none; by node the next shorter family, -1 where there is none,
        -2 where the node itself is no family.
    """
    xp, n, size = trace.engine.xp, len(found), len(trie.hash)
    labels, label = xp.unique(trace.engine.array(found["conversation"]), return_inverse=True)
    pairs = xp.sort(trie.node * (len(labels) + 1) + label[trie.r])
    is_new = xp.ones(len(pairs), bool)
    is_new[1:] = pairs[1:] != pairs[:-1]
    sharing = xp.bincount(pairs[is_new] // (len(labels) + 1), minlength=size)
    below = xp.flatnonzero((trie.parent >= 0) & (sharing > 1))
    most = -least_of(trace, trie.parent[below], -sharing[below], size)
    is_family = (sharing > 1) & (sharing > most)
    at = xp.flatnonzero(is_family[trie.node])
    r, node = trie.r[at], trie.node[at]
    is_same = r[1:] == r[:-1]
    above = xp.where(is_family, -1, -2)
    above[node[1:][is_same]] = node[:-1][is_same]
    family = xp.full(n, -1)
    is_last = xp.ones(len(r), bool)
    is_last[:-1] = ~is_same
    family[r[is_last]] = node[is_last]
    return family, above


def prefill_times(trace: Trace, of: Mapping[str, Array]) -> tuple[Array, Array]:
    """By request: when its first attempt's prefill began and its last one's ended; its own begin and end if unknown."""
    engine, xp, n = trace.engine, trace.engine.xp, len(trace.requests)
    r, began, ended = (engine.array(trace.attempts[name]) for name in ("r", "headers_s", "first_s"))
    if not len(r):
        return of["arrived_s"], of["ended_s"]
    count = xp.bincount(r, minlength=n)
    last = xp.maximum(xp.cumsum(count) - 1, 0)
    start = began[xp.minimum(xp.cumsum(count) - count, len(r) - 1)]
    start = xp.where((count > 0) & ~xp.isnan(start), start, of["arrived_s"])
    return start, xp.where((count > 0) & ~xp.isnan(ended[last]), ended[last], of["ended_s"])


def least_of(trace: Trace, group: Array, values: Array, groups: int) -> Array:
    """The smallest value of each group; infinity for none."""
    engine = trace.engine
    found = engine.frame({"group": group, "value": values.astype("float64")})
    found = found.groupby("group", sort=True).agg({"value": "min"}).reset_index()
    least = engine.xp.full(groups, engine.xp.inf)
    least[engine.array(found["group"])] = engine.array(found["value"])
    return least


def _was_here(trace: Trace, trie: Trie, times: tuple[Array, Array], node: Array) -> Array:
    """By request: whether its own engine had computed this node before; false for -1."""
    xp, (start, done) = trace.engine.xp, times
    served, engines = trace.engine.array(trace.requests["engine"]), len(trace.names.engine) + 1
    is_asked = xp.zeros(len(trie.hash) + 1, bool)
    is_asked[node] = True
    is_asked[-1] = False
    at = xp.flatnonzero(is_asked[trie.node])
    places, place = xp.unique(trie.node[at] * engines + served[trie.r[at]], return_inverse=True)
    ready = xp.concatenate([least_of(trace, place, done[trie.r[at]], len(places)), xp.full(1, xp.inf)])
    wanted = xp.searchsorted(places, node * engines + served)  # it is there itself
    return ready[xp.where(node >= 0, wanted, -1)] < start


def _tokens(trace: Trace, trie: Trie, node: Array) -> Array:
    """By request: tokens of its prompt's beginning that ends with this node; 0 for -1."""
    xp, of = trace.engine.xp, columns_of(trace)
    size = xp.concatenate([trie.end_bytes, xp.zeros(1, "int64")])[node]
    return xp.floor(size * of["prompt"] / xp.maximum(of["prompt_bytes"], 1))


# --- tables

_WASTED = ("turn", "requests", "reusable_tokens", "wasted_tokens", "wasted_s", "forgotten_ratio", "evidence")


def _wasted(trace: Trace, found: Frame) -> Any:
    shown = dearest(trace, found, "is_later", ["wasted_s"])
    lines = []
    for number, turn in enumerate(_TURNS):
        of = found[found["is_later"] == number]
        some = of[of["wasted"] > 0]
        wasted = float(some["wasted"].sum())
        forgotten = float(some[some["is_forgotten"] == 1]["wasted"].sum())
        ratio = forgotten / wasted if wasted else math.nan
        sums = (float(of["reusable"].sum()), wasted, float(some["wasted_s"].sum()), ratio)
        lines.append((turn, len(some), *sums, shown.get(number, ())))
    return table(dict(zip(_WASTED, zip(*lines, strict=True), strict=True)))


def _top(trace: Trace, found: Frame) -> Any:
    """Families, on the host: those that wasted most, then the most used ones."""
    members = found[found["family"] >= 0].assign(requests=1)
    sums = members.groupby("family", sort=True).agg({"requests": "sum"} | _SUMS).reset_index()
    order = sums.sort_values(["wasted_s", "requests", "family"], ascending=[False, False, True])
    return trace.engine.host(order.head(_TOP)).reset_index(drop=True)


def _families(trace: Trace, trie: Trie, found: Frame, top: Any) -> Any:
    kept = top["family"].tolist()
    members = found[found["family"].isin(kept)].assign(requests=1)
    placed = members.groupby(["family", "engine"], sort=True).agg({"cached": "sum", "requests": "sum"}).reset_index()
    order = ["family", "cached", "requests", "engine"]
    placed = trace.engine.host(placed.sort_values(order, ascending=[True, True, True, False]))
    best = dict(zip(placed["family"].tolist(), placed["engine"].tolist(), strict=True))  # the last one of each
    engines = placed["family"].value_counts().to_dict()
    shown = dearest(trace, members, "family", ["wasted_s"])
    return table(
        {
            "family": _named(trace, trie, kept),
            "depth_tokens": (top["shared"] / top["requests"]).round().tolist(),
            "requests": top["requests"].tolist(),
            **{f"{name}_tokens": top[name].tolist() for name in ("prompt", "shared", "cached", "reusable", "wasted")},
            "wasted_s": top["wasted_s"].tolist(),
            "best_engine": [trace.names.of("engine", best[node]) for node in kept],
            "engines": [engines[node] for node in kept],
            "evidence": [shown.get(node, ()) for node in kept],
        }
    )


def _links(trace: Trace, trie: Trie, above: Array, kept: list[int]) -> Any:
    """Of families that are shown: the next shorter one, and how many requests begin with the longer one."""
    engine, xp = trace.engine, trace.engine.xp
    nodes = xp.asarray(kept, "int64")
    passing = xp.bincount(trie.node, minlength=len(trie.hash))[nodes] if kept else nodes
    found = engine.host(engine.frame({"parent": above[nodes], "child": nodes, "requests": passing}))
    found = found[found["parent"].isin(kept)]
    ends = {name: _named(trace, trie, found[name].tolist()) for name in ("parent", "child")}
    return table(ends | {"requests": found["requests"].tolist()})


def _named(trace: Trace, trie: Trie, nodes: list[int]) -> list[str]:
    """The first half of their hashes."""
    values = trie.hash[trace.engine.xp.asarray(nodes, "int64")].tolist()
    return [f"{value % 2**64:016x}"[:8] for value in values]


def _figures(trace: Trace, found: Frame, above: Array) -> dict[str, float]:
    engine, xp = trace.engine, trace.engine.xp
    prompt, total_s = float(found["prompt"].sum()), float(trace.requests["total_s"].sum())
    policies = xp.asarray([code for code, name in enumerate(trace.names.policy) if name == "residency"])
    by_residency = xp.isin(engine.array(trace.requests["policy"]), policies)
    return {
        "reusable_ratio": float(found["reusable"].sum()) / prompt if prompt else math.nan,
        "reused_ratio": float(found["cached"].sum()) / prompt if prompt else math.nan,
        "reusable_tokens": float(found["reusable"].sum()),
        "wasted_tokens": float(found["wasted"].sum()),
        "wasted_s": float(found["wasted_s"].sum()),
        "families": float((above > -2).sum()),
        "total_s": total_s,
        "residency_ratio": float(by_residency.sum()) / len(found) if len(found) else math.nan,
    }
