"""What routers are told of the last minute: who has which shared beginning of prompts."""

from __future__ import annotations

from lltm_ray.analytics.answer import rows
from lltm_ray.analytics.prefix import build_trie, families
from lltm_ray.analytics.trace import Trace, is_empty
from lltm_ray.analytics.turns import turns
from lltm_ray.records import Hints, PrefixFamily

MOST_FAMILIES, MOST_HOLDERS = 64, 8
"""A router looks at four holders; of some it has none, or they are full."""


def make_hints(trace: Trace, *, now_unix_nano: int, valid_s: float) -> Hints:
    """Hints of a short window.

    Args:
        trace: the window, about a minute.
        now_unix_nano: when they are made.
        valid_s: for how long routers may follow them.
    """
    found = () if is_empty(trace) else find_families(trace)
    return Hints(made_unix_nano=now_unix_nano, valid_s=valid_s, families=found)


def find_families(trace: Trace) -> tuple[PrefixFamily, ...]:
    """Beginnings that several conversations share, those with most tokens to share first; the last holders first."""
    engine, xp = trace.engine, trace.engine.xp
    trie = build_trie(trace)
    if not len(trie.hash):
        return ()
    _, above = families(trace, trie, turns(trace))
    at = xp.flatnonzero((above > -2)[trie.node])
    r, node = trie.r[at], trie.node[at]
    of = {name: engine.array(trace.requests[name])[r] for name in ("engine", "prompt", "prompt_bytes", "ended_s")}
    tokens = xp.floor(trie.end_bytes[node] * of["prompt"] / xp.maximum(of["prompt_bytes"], 1))
    seen = engine.frame({"node": node, "engine": of["engine"], "tokens": tokens, "ended_s": of["ended_s"]})
    seen["shared"] = seen["tokens"]
    sums = {"tokens": "min", "ended_s": "max", "shared": "sum"}
    holders = seen.groupby(["node", "engine"], sort=True).agg(sums).reset_index()
    total = holders.groupby("node", sort=True).agg({"shared": "sum"}).reset_index()
    top = total.sort_values(["shared", "node"], ascending=[False, True]).head(MOST_FAMILIES)
    order = {each: place for place, each in enumerate(engine.host(top)["node"].tolist())}
    kept = engine.host(holders[holders["node"].isin(top["node"])])
    kept = kept.sort_values(["ended_s", "engine"], ascending=[False, True])
    nodes = xp.asarray(list(order), "int64")
    ends = dict(zip(order, zip(trie.end_bytes[nodes].tolist(), trie.hash[nodes].tolist(), strict=True), strict=True))
    found: dict[tuple[int, int], list[tuple[str, int]]] = {ends[each]: [] for each in order}
    for row in rows(kept):  # one text may begin the prompts of several models
        found[ends[row.node]].append((trace.names.of("engine", row.engine), int(row.tokens)))
    return tuple(
        PrefixFamily(end_bytes=end, hash=(value % 2**64).to_bytes(8, "big"), engines=tuple(each[:MOST_HOLDERS]))
        for (end, value), each in found.items()
    )
