"""Which kinds of work the fleet does: communities of requests that are alike, named by what tells them apart.

Requests are counted by what they look like (tenant, shared beginning of the prompt, route, and bins of prompt tokens,
generated tokens and cached share), so the graph does not grow with them: each combination is joined to its values by
an edge for each, as heavy as the requests that have it times how much the value tells, -log of its share. A value that
all requests have joins nothing. Louvain finds what holds together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lltm_ray._prefix import END_BYTES
from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, Finding, rows, table
from lltm_ray.analytics.columns import NONE
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.trace import Trace

NAME = "workload classes"
FEATURES = ("tenant", "route", "family", "prompt", "generated", "cached")
"""What combinations are made of."""
MOST_COMBINATIONS = 1000
"""Those of most requests; Louvain's time grows with their number."""
MOST_CLASSES = 12
LEAST_SHARE = 0.01
"""Of the requests: a tenant, a route or a beginning of prompts that fewer have joins nothing, nor is a class shown."""
LEAST_COUNT = 20
"""Likewise, of requests: a few that begin alike are one conversation."""
MOST_DEPTH = sum(end <= 8192 for end in END_BYTES)
"""Beginnings of more than 8 KiB are told apart by their first 8."""
LEAST_REQUESTS = 50
"""Fewer are one class: what ties their features may be chance."""
MIN_Z = 5.0
"""Standard deviations of chance by which a tie must be stronger than chance."""
LEAST_TIE = 0.05
"""A feature that tells less of every other one (share of the entropy) is left out."""
CACHED_BINS = (0.1, 0.5, 0.9)
TELLING_RATIO = 2.0
"""Prompts and answers are long or short where their median is so many times that of all others', or a part of it."""
TELLING_SHARE = 0.25
"""The cached share tells a class apart where it differs from the others' by so much."""
MOSTLY = 0.8
"""A class is a tenant's, a route's or a beginning's if so many of its requests are."""
LIFT = 1.5
"""And if their share among it is so many times that among all."""
_COLUMNS = (
    *("name", "requests", "share", "prompt_p50", "cached_share", "generated_p50", "ttft_p50_s", "p50_s", "p95_s"),
    *("tenants", "engines"),
)
_QUANTILES: Mapping[str, Mapping[float, str]] = {
    "prompt": {0.5: "prompt_p50"},
    "generated": {0.5: "generated_p50"},
    "ttft_s": {0.5: "ttft_p50_s"},
    "total_s": {0.5: "p50_s", 0.95: "p95_s"},
}
_LEAST = 1e-12
_SHOWN = 3
"""Tenants and engines of a class that are named, those with most requests."""


def analyze(trace: Trace) -> Answer:
    """Table `classes`, the largest first; figures `modularity` (0: no structure), `classes`, `requests_left_out`."""
    known = _known(trace)
    if not len(known):
        return Answer({"classes": table(dict.fromkeys(_COLUMNS, ()))}, {"modularity": 0.0, "classes": 0.0})
    labels, modularity = communities(trace, known)
    known["class"] = labels
    told = _describe(trace, known)
    shown = [row for row in told if row["share"] >= LEAST_SHARE][:MOST_CLASSES]
    figures = {
        "modularity": modularity,
        "classes": float(len(told)),
        "requests_left_out": float(len(trace.requests) - sum(row["requests"] for row in shown)),
    }
    return Answer({"classes": table({name: [row[name] for row in shown] for name in _COLUMNS})}, figures)


def _known(trace: Trace) -> Frame:
    """Requests that an engine read: the others tell nothing of what they are."""
    requests = trace.requests
    is_known = (requests["prompt"] > 0) | ((requests["is_generating"] == 0) & (requests["engine"] >= 0))
    wanted = ["r", "tenant", "route", "engine", "prompt", "cached", "generated", "ttft_s", "total_s"]
    known = requests[is_known][wanted].reset_index(drop=True)
    known["family"] = _families(trace, known)
    return known


# --- communities


def communities(trace: Trace, known: Frame) -> tuple[Array, float]:
    """Of each row a community from 0, -1 where its combination is one of the rarest; and their modularity."""
    engine, xp = trace.engine, trace.engine.xp
    key, sizes = _combine(xp, _features(trace, known))
    found, place, count = xp.unique(key, return_inverse=True, return_counts=True)
    rank = xp.full(len(found), NONE)
    kept = xp.lexsort(xp.stack([found, -count]))[:MOST_COMBINATIONS]
    rank[kept] = xp.arange(len(kept))
    edges = _edges(trace, found[kept], count[kept], sizes)
    if len(known) < LEAST_REQUESTS or not len(edges):
        return xp.minimum(rank[place], 0), 0.0
    labels, modularity = engine.louvain(edges)
    of = xp.full(len(kept) + sum(sizes), NONE)
    of[engine.array(labels["node"])] = engine.array(labels["community"])
    of = xp.concatenate([of[: len(kept)], xp.full(1, NONE)])
    return of[rank[place]], modularity


def _features(trace: Trace, known: Frame) -> list[Array]:
    """Of each row its value of each of `FEATURES`, from 0; -1 where it has none that joins."""
    engine, xp = trace.engine, trace.engine.xp
    of = {name: engine.array(known[name]) for name in FEATURES}
    codes = [_common(xp, of[name]) for name in ("tenant", "route", "family")]
    bins = [xp.floor(xp.log(of[name] + 1.0) / math.log(2)).astype("int64") for name in ("prompt", "generated")]
    cached = xp.searchsorted(xp.asarray(CACHED_BINS), of["cached"] / xp.maximum(of["prompt"], 1), side="right")
    return [*codes, *bins, cached]


def least_count(requests: int) -> float:
    """So many of these requests must share a value that it joins them."""
    return max(LEAST_SHARE * requests, LEAST_COUNT)


def _common(xp: Any, values: Array) -> Array:
    """Values from 0, the rare ones -1."""
    found, place, count = xp.unique(values, return_inverse=True, return_counts=True)
    keep = (count >= least_count(len(values))) & (found != NONE)
    return xp.where(keep, xp.cumsum(keep) - 1, NONE)[place]


def _families(trace: Trace, known: Frame) -> Array:
    """Of each row the hash of the longest beginning that enough requests share; -1 for none."""
    engine, xp = trace.engine, trace.engine.xp
    begun = trace.prefixes[trace.prefixes["depth"] < MOST_DEPTH]
    r, hashes, depth = (engine.array(begun[name]) for name in ("r", "hash", "depth"))
    longest = xp.full(len(trace.requests), NONE)
    if len(r):
        _, place, count = xp.unique(hashes, return_inverse=True, return_counts=True)
        shared = xp.where(count[place] >= least_count(len(known)))[0]
        order = shared[xp.lexsort(xp.stack([depth[shared], r[shared]]))]
        last = xp.where(xp.concatenate([r[order][1:] != r[order][:-1], xp.full(min(len(order), 1), True)]))[0]
        longest[r[order[last]]] = hashes[order[last]]
    return longest[engine.array(known["r"])]


def _combine(xp: Any, features: Sequence[Array]) -> tuple[Array, list[int]]:
    """One number for each row's values, and how many values each feature has, -1 included."""
    key, sizes = xp.zeros(len(features[0]), dtype="int64"), []
    for values in features:
        sizes.append(int(values.max()) + 2)
        key = key * sizes[-1] + values + 1
    return key, sizes


def _edges(trace: Trace, keys: Array, count: Array, sizes: Sequence[int]) -> Frame:
    """Combinations from 0 and, after them, values: source, target, weight."""
    xp = trace.engine.xp
    values: list[Array] = []
    for size in reversed(sizes):
        values.insert(0, keys % size)
        keys = keys // size
    ties = _ties(xp, values, sizes, count)
    sources, targets, weights, start = [], [], [], len(keys)
    for value, size, tie in zip(values, sizes, ties, strict=True):
        share = xp.bincount(value, weights=count, minlength=size) / count.sum()
        weight = -xp.log(xp.maximum(share, _LEAST))[value] * count * tie
        joins = xp.where((value > 0) & (weight > 0))[0]
        sources.append(joins)
        targets.append(start + value[joins])
        weights.append(weight[joins])
        start += size
    ends = {"source": xp.concatenate(sources), "target": xp.concatenate(targets)}
    return trace.engine.frame(ends | {"weight": xp.concatenate(weights)})


def _ties(xp: Any, values: Sequence[Array], sizes: Sequence[int], count: Array) -> list[float]:
    """Of each feature how far it is tied to another one, 0..1: mutual information over the smaller entropy.

    Less the bias of a table's estimate, (rows - 1) * (columns - 1) / 2n (Miller, 1955); 2n times the information of a
    table of chance is distributed as chi squared. A feature that tells nothing of any other is no part of a class,
    however its values are spread.
    """
    total = float(count.sum())

    def entropy(codes: Array, size: int) -> tuple[float, int]:
        share = xp.bincount(codes, weights=count, minlength=size) / total
        seen = share[share > 0]
        return float(-(seen * xp.log(seen)).sum()), len(seen)

    alone = [entropy(codes, size) for codes, size in zip(values, sizes, strict=True)]
    ties = [0.0] * len(values)
    for i, (one, cells) in enumerate(alone):
        for j in range(i):
            other, others = alone[j]
            both, _ = entropy(values[i] * sizes[j] + values[j], sizes[i] * sizes[j])
            freedom = (cells - 1) * (others - 1)
            shared = one + other - both - freedom / (2 * total)
            is_sure = 2 * total * shared > MIN_Z * math.sqrt(2 * freedom)
            tie = shared / max(min(one, other), _LEAST) if is_sure else 0.0
            ties[i], ties[j] = (max(each, tie) for each in (ties[i], ties[j]))
    return [min(tie, 1.0) if tie >= LEAST_TIE else 0.0 for tie in ties]


# --- names


def _describe(trace: Trace, known: Frame) -> list[dict[str, Any]]:
    """A row of the table for each class, the largest first."""
    known = known[known["class"] >= 0]
    sums = {"r": "count", "prompt": "sum", "cached": "sum"}
    host = trace.engine.host(known.groupby("class", sort=True).agg(sums).reset_index())
    told: dict[int, dict[str, Any]] = {}
    for row in rows(host.sort_values(["r", "class"], ascending=[False, True]).rename(columns={"class": "number"})):
        cached = row.cached / row.prompt if row.prompt else 0.0
        told[row.number] = {"requests": row.r, "share": row.r / len(trace.requests), "cached_share": cached}
    for column, quantiles in _QUANTILES.items():
        found = trace.engine.host(trace.engine.quantiles(known, ("class",), column, tuple(quantiles)))
        for q, name in quantiles.items():
            values = dict(zip(found["class"].tolist(), found[f"q{q * 100:g}"].tolist(), strict=True))
            for number, row in told.items():
                row[name] = values.get(number, math.nan)
    counts = {name: _counts(trace, known, name) for name in ("tenant", "engine", "family", "route")}
    used: Counter[str] = Counter()
    for number, row in told.items():
        row |= {f"{name}s": _most(trace, name, counts[name].get(number, {})) for name in ("tenant", "engine")}
        others = _others(trace, known, number) if row["share"] >= LEAST_SHARE and len(told) > 1 else {}
        name = ", ".join(_telling(trace, row, others, counts, number)) or _plain(row, len(told))
        used[name] += 1
        row["name"] = name if used[name] == 1 else f"{name} ({used[name]})"
    return list(told.values())


def _counts(trace: Trace, known: Frame, column: str) -> dict[int, Counter[int]]:
    """Class -> value -> requests, those of no value left out."""
    named = known[known[column] != NONE]
    sums = trace.engine.host(named.groupby(["class", column], sort=True).agg({"r": "count"}).reset_index())
    found: dict[int, Counter[int]] = {}
    for number, value, count in zip(*(sums[name].tolist() for name in ("class", column, "r")), strict=True):
        found.setdefault(number, Counter())[value] = count
    return found


def _most(trace: Trace, kind: str, counts: Mapping[int, int]) -> str:
    """Names of those with most requests, and how many more there are."""
    order = sorted(counts, key=lambda code: (-counts[code], code))
    names = [trace.names.of(kind, code) for code in order[:_SHOWN]]
    return ", ".join(names + ([f"{len(order) - _SHOWN} more"] if len(order) > _SHOWN else []))


def _others(trace: Trace, known: Frame, number: int) -> dict[str, float]:
    """What the requests of all other classes are like."""
    rest = known[known["class"] != number]
    cached = float(rest["cached"].sum()) / max(float(rest["prompt"].sum()), 1.0)
    medians = {name: float(rest[name].median()) for name in ("prompt", "generated")}
    return {"prompt_p50": medians["prompt"], "generated_p50": medians["generated"], "cached_share": cached}


def _telling(
    trace: Trace,
    row: Mapping[str, Any],
    others: Mapping[str, float],
    counts: Mapping[str, Mapping[int, Counter[int]]],
    number: int,
) -> Iterator[str]:
    """What the class has and the others have not, in words."""
    if not others:
        return
    total = round(row["requests"] / row["share"])
    for column, word in (("prompt_p50", "prompts"), ("generated_p50", "answers")):
        here, there = row[column], others[column]
        if max(here, there) >= TELLING_RATIO * max(min(here, there), 1):
            yield f"{'long' if here > there else 'short'} {word} (p50 {units.count(here)} tokens)"
    if abs(row["cached_share"] - others["cached_share"]) >= TELLING_SHARE:
        yield f"{row['cached_share'] * 100:.0f} % cached"
    for column, words in (("tenant", "tenant {}"), ("route", "{}"), ("family", "all begin alike ({})")):
        if (value := _own(counts[column], number, row["requests"], total)) is not None:
            shown = f"{value & 2**64 - 1:016x}"[:8] if column == "family" else trace.names.of(column, value)
            yield words.format(shown)


def _own(counts: Mapping[int, Counter[int]], number: int, requests: int, total: int) -> int | None:
    """The value that most `requests` of a class have, if fewer of all `total` do."""
    if not counts.get(number):
        return None
    value, most = max(counts[number].items(), key=lambda item: (item[1], -item[0]))
    every = sum(each[value] for each in counts.values())
    return value if most >= MOSTLY * requests and most / requests >= LIFT * every / total else None


def _plain(row: Mapping[str, Any], classes: int) -> str:
    if classes == 1:
        return "all requests"
    return f"prompts of {units.count(row['prompt_p50'])} tokens, answers of {units.count(row['generated_p50'])} (p50)"


def judge(answer: Answer) -> list[Finding]:
    """Nothing: that there are classes is no fault. Where one harms another, `interference` says so."""
    del answer
    return []
