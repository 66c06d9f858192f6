"""What routers are told of the last minute: engines to spare, who has shared beginnings, tenants to keep apart.

Only what holds now is told: an engine that was slow and is no more is none, whatever the window's mean says. Each kind
goes in by a clear sign and out by another, so that a hint that works does not take its own reason away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from lltm_ray.analytics import interference
from lltm_ray.analytics.anomaly import STRAGGLER_Z
from lltm_ray.analytics.answer import rows
from lltm_ray.analytics.prefix import build_trie, families
from lltm_ray.analytics.stragglers import Run, decodes, find_busy, find_runs, prefills
from lltm_ray.analytics.trace import Trace, is_empty
from lltm_ray.analytics.turns import turns
from lltm_ray.records import Hints, PrefixFamily

SLOW_IN, SLOW_OUT = 1.5, 1.2
"""Pace over the peers' from which an engine is spared, and below which it is no more: routers learn of smaller
differences by themselves."""
SLOW_REQUESTS = 10
LAST, LEAST_LAST = 5, 3
"""An engine's pace now is the median of its last ones. Fewer say nothing; then it is spared no more, for who gets no
requests can show nothing."""
SLOW_PART = 3
"""At most one engine in so many of a model is spared, thus none of one or two: the others have to do its work."""
MOST_FAMILIES, MOST_HOLDERS = 64, 8
"""A router looks at four holders; of some it has none, or they are full."""
APART_PART = 4
"""A tenant is kept to one engine in so many of a model."""
LEAST_LONG = 3
"""Long prefills in the window that keep a tenant apart, once it is: kept apart it stalls few."""


def make_hints(trace: Trace, previous: Hints, *, now_unix_nano: int, valid_s: float) -> Hints:
    """Hints of a short window.

    Args:
        trace: the window, about a minute.
        previous: what was made of the window before.
        now_unix_nano: when they are made.
        valid_s: for how long routers may follow them.
    """
    if is_empty(trace):
        return Hints(made_unix_nano=now_unix_nano, valid_s=valid_s)
    trace, models = _by_servers_clock(trace), _models(trace)
    slow = find_slow(trace, models, previous.slow)
    return Hints(
        made_unix_nano=now_unix_nano,
        valid_s=valid_s,
        slow=slow,
        families=find_families(trace),
        apart=find_apart(trace, models, previous.apart, slow),
    )


def _by_servers_clock(trace: Trace) -> Trace:
    """Phases as llama-server told them: to a gateway that is late at reading, an answer of seconds comes at once."""
    each, known = trace.attempts, (trace.attempts["predicted_ms"] > 0) & (trace.attempts["prompt_ms"] >= 0)
    decode_s, prefill_s = each["predicted_ms"] / 1e3, each["prompt_ms"] / 1e3
    first_s = each["ended_s"] - decode_s
    told = {"decode_s": decode_s, "prefill_s": prefill_s, "first_s": first_s, "headers_s": first_s - prefill_s}
    return replace(trace, attempts=each.assign(**{name: each[name].where(~known, told[name]) for name in told}))


def _models(trace: Trace) -> dict[int, list[int]]:
    """Model -> its engines, as codes."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    for frame in (trace.attempts, trace.engines):
        pairs = trace.engine.host(frame[["engine", "model"]].drop_duplicates())
        for engine, model in zip(pairs["engine"].tolist(), pairs["model"].tolist(), strict=True):
            if engine >= 0 and model >= 0:
                found[model].add(engine)
    return {model: sorted(engines) for model, engines in found.items()}


# --- engines to spare


@dataclass(frozen=True, slots=True)
class _Phase:
    """Attempts' paces in one phase, by time: one row each."""

    engine: Any
    pace: Any

    def ratio_now(self, engine: int, peers: Iterable[int]) -> float:
        """An engine's pace over its peers'; NaN where too little is known of either."""
        own = self.pace[self.engine == engine][-LAST:]
        others = [self.pace[self.engine == peer] for peer in peers]
        known = [float(np.median(each)) for each in others if len(each) >= LEAST_LAST]
        if len(own) < LEAST_LAST or not known:
            return float("nan")
        return float(np.exp(np.median(own) - np.median(known)))


def find_slow(trace: Trace, models: Mapping[int, list[int]], before: Mapping[str, float]) -> dict[str, float]:
    """Engines that are slower than their peers now -> how many times.

    Args:
        trace: the window.
        models: model -> engines, as codes.
        before: engines that are spared already.
    """
    held, busy, beside = find_busy(trace)
    works = decodes(trace, held, busy, beside), prefills(trace, held)
    runs = [find_runs(trace, work) for work in works]
    clear = {code for each in runs for code, run in each.items() if _is_clear(run)}
    spared = {code for code, name in enumerate(trace.names.engine) if name in before}
    if not clear | spared:
        return {}
    phases = [_phase(trace, work) for work in works]
    found: dict[str, float] = {}
    for engines in models.values():
        ratios = {code: _ratio_now(phases, code, engines) for code in engines if code in clear | spared}
        slow = [code for code, ratio in ratios.items() if ratio >= (SLOW_OUT if code in spared else SLOW_IN)]
        for code in sorted(slow, key=lambda code: -ratios[code])[: len(engines) // SLOW_PART]:
            found[trace.names.of("engine", code)] = ratios[code]
    return found


def _is_clear(run: Run) -> bool:
    return run.ratio >= SLOW_IN and run.z >= STRAGGLER_Z and run.requests >= SLOW_REQUESTS


def _phase(trace: Trace, work: Any) -> _Phase:
    found = trace.engine.host(work[["engine", "at_s", "pace"]].sort_values(["at_s", "engine", "pace"]))
    return _Phase(found["engine"].to_numpy(), found["pace"].to_numpy())


def _ratio_now(phases: Iterable[_Phase], engine: int, engines: Iterable[int]) -> float:
    """In the phase where it is slower; 0 where nothing is known."""
    peers = [each for each in engines if each != engine]
    return max((ratio for each in phases if not np.isnan(ratio := each.ratio_now(engine, peers))), default=0.0)


# --- beginnings


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


# --- tenants to keep apart


def find_apart(
    trace: Trace, models: Mapping[int, list[int]], before: Mapping[str, tuple[str, ...]], slow: Mapping[str, float]
) -> dict[str, tuple[str, ...]]:
    """Tenants whose long prefills stall others -> the engines of each model that already run most of these.

    Args:
        trace: the window.
        models: model -> engines, as codes.
        before: who is kept apart already, and where.
        slow: engines that are none to keep to.
    """
    answer = interference.analyze(trace)
    accused = {each.subject for each in interference.judge(answer) if "tokens_p50" in each.figures}
    long = _long_prefills(trace)
    is_kept = {tenant for tenant in before if sum(long[tenant].values()) >= LEAST_LONG}
    found = {}
    for tenant in sorted((accused | is_kept) - {""}):
        rank = _Rank(trace, long[tenant], before.get(tenant, ()), slow)
        own = [code for engines in models.values() for code in sorted(engines, key=rank)[: rank.places(engines)]]
        found[tenant] = tuple(trace.names.decode("engine", own))
    return {tenant: engines for tenant, engines in found.items() if engines}


def _long_prefills(trace: Trace) -> defaultdict[str, dict[int, int]]:
    """Tenant -> engine's code -> how many it computed there."""
    each = trace.attempts[["r", "engine", "computed"]]
    each = each[(each["engine"] >= 0) & (each["computed"] >= interference.LONG_PREFILL_TOKENS)]
    each = each.merge(trace.requests[["r", "tenant"]], on="r", how="inner")
    counts = trace.engine.host(each.groupby(["tenant", "engine"], sort=True).agg({"r": "count"}).reset_index())
    found: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for row in rows(counts):
        found[trace.names.of("tenant", row.tenant)][int(row.engine)] = int(row.r)
    return found


@dataclass(frozen=True, slots=True)
class _Rank:
    """Engines for one tenant, the best first."""

    trace: Trace
    long: Mapping[int, int]
    before: tuple[str, ...]
    slow: Mapping[str, float]

    def __call__(self, engine: int) -> tuple[bool, bool, int, int]:
        name = self.trace.names.of("engine", engine)
        return name in self.slow, name not in self.before, -self.long.get(engine, 0), engine

    def places(self, engines: Iterable[int]) -> int:
        """How many of a model's; none where it does nothing."""
        counts = [self.long.get(each, 0) for each in engines]
        return ceil(len(counts) / APART_PART) if sum(counts) else 0
