"""Engines that are slower than their peers, and requests that took longer than their size explains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lltm_ray.analytics.answer import MOST_EVIDENCE, Answer, Finding, rows, table
from lltm_ray.analytics.fit import Fit, fit_positive
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.stragglers import SLOW, Run, decodes, device_of, find_busy, find_runs, peers_of, prefills
from lltm_ray.analytics.trace import Trace, nanos
from lltm_ray.analytics.units import clock

NAME = "anomalies"
TERMS = (
    *("a request", "computed token", "generated token", "second of waiting", "generated token, each other busy slot"),
    *("computed token, each 1,000 before it", "generated token, each 1,000 before it"),
)
"""What the latency model of a request is made of."""
_TOP = 20
_BUCKETS = 60
_LEAST_REQUESTS = 50
"""Of a model, before its latency is modelled."""

STRAGGLER_RATIO, STRAGGLER_RATIO_OF_TWO = 1.25, 1.5
"""Pace over the peers' that is worth a drain; of two engines either may be the odd one, so the gap must be large."""
STRAGGLER_REQUESTS, STRAGGLER_REQUESTS_OF_TWO = 20, 50
STRAGGLER_LOST_S = 3.0
EPISODE_S = 10.0
"""An engine that was slow for less and is no more had a hiccup: nobody would drain it for that."""
OUTLIER_Z, OUTLIER_S = 6.0, 0.5
"""A request that took that much longer, by both measures, is an outlier; those of a straggler are its own matter."""
CLUSTER_REQUESTS, CLUSTER_SHARE, CLUSTER_S = 10, 0.3, 10.0
"""Outliers, their share of an engine's requests in that time and their seconds too many, that are no chance."""


def analyze(trace: Trace) -> Answer:
    """Tables `engines`, `requests`, `model` and `clusters`; figures `sigma_ratio`, `outliers`."""
    held, busy, beside = find_busy(trace)
    work = (decodes(trace, held, busy, beside), prefills(trace, held))
    asked, fit = model_latency(trace, held, busy)
    tables = {
        "engines": _engines(trace, work, asked),
        "requests": _requests(trace, asked, fit),
        "model": _model(trace, asked, fit),
        "clusters": _clusters(trace, asked),
    }
    return Answer(tables, {"sigma_ratio": fit.sigma, "outliers": float(_is_outlier(asked).sum())})


def judge(answer: Answer) -> list[Finding]:
    """Each straggler, and one finding for slow requests on engines that are none."""
    engines = list(rows(answer.tables["engines"]))
    accused = [row for row in engines if _is_straggler(row)]
    names = {row.engine for row in accused}
    clusters = [row for row in rows(answer.tables["clusters"]) if _is_cluster(row) and row.engine not in names]
    return [_of_straggler(row) for row in accused] + ([_of_clusters(clusters)] if clusters else [])


# --- requests


def model_latency(trace: Trace, held: Frame, busy: Any) -> tuple[Frame, Fit]:
    """Requests that were answered: `r, engine, peers, total_s, expected_s, z, arrived_s`; and the model behind it.

    `total_s` is about a sum of `TERMS`, for each group of peers of its own; `z` is the relative residual in robust
    standard deviations of it.
    """
    xp, column = trace.engine.xp, trace.engine.array
    each = trace.requests
    last = trace.engine.frame({"r": column(held["r"]), "number": column(held["number"]), "busy": busy})
    last = last.sort_values(["r", "number"]).drop_duplicates("r", keep="last")[["r", "busy"]]
    keep = (each["error"] < 0) & (each["engine"] >= 0) & (each["model"] >= 0) & (each["generated"] > 0)
    names = ["r", "engine", "model", "total_s", "arrived_s", "prompt", "computed", "generated", "queue_s"]
    asked = each[keep & (each["is_generating"] > 0)][names].merge(last, on="r", how="inner").sort_values("r")
    asked = asked.reset_index(drop=True)
    total, noise = column(asked["total_s"]), xp.maximum(column(asked["total_s"]), 1e-3)
    peers, kinds = peers_of(trace, column(asked["engine"]), column(asked["model"]))
    terms = _terms(trace, asked)
    fit = fit_positive(xp, peers, len(kinds), terms, total, 1.0 / noise)
    fit = fit_positive(xp, peers, len(kinds), terms, total, 1.0 / xp.maximum(fit.fitted, 0.05 * noise))
    asked["peers"], asked["expected_s"] = peers, xp.maximum(fit.fitted, 0.05 * noise)
    asked["z"] = fit.relative / max(fit.sigma, 1e-6)
    asked["of_peers"] = xp.bincount(peers)[peers] if len(peers) else peers
    return asked[asked["of_peers"] >= _LEAST_REQUESTS].reset_index(drop=True), fit


def _terms(trace: Trace, asked: Frame) -> tuple[Array, ...]:
    """What `TERMS` count, of each request."""
    xp, column = trace.engine.xp, trace.engine.array
    prompt, computed, generated = (column(asked[name]) * 1.0 for name in ("prompt", "computed", "generated"))
    return (
        *(xp.full(len(prompt), 1.0), computed, generated, xp.nan_to_num(column(asked["queue_s"]))),
        generated * (column(asked["busy"]) - 1.0),
        computed * (prompt - computed / 2) / 1e3,
        generated * (prompt + generated / 2) / 1e3,
    )


def _is_outlier(asked: Frame) -> Any:
    return (asked["z"] >= OUTLIER_Z) & (asked["total_s"] - asked["expected_s"] >= OUTLIER_S)


def _requests(trace: Trace, asked: Frame, fit: Fit) -> Any:
    worst = asked[_is_outlier(asked)].sort_values(["z", "r"], ascending=[False, True]).head(_TOP)
    host = trace.engine.host
    tries = trace.attempts[["r", "number", "asked_s", "ended_s", "prefill_s", "decode_s"]]
    tries = host(tries[tries["r"].isin(worst["r"])].sort_values(["r", "number"]))
    of: dict[int, list[Any]] = {}
    for each in rows(tries):
        of.setdefault(int(each.r), []).append(each)
    terms = host(trace.engine.frame({f"t{i}": fit.terms[:, i] for i in range(len(TERMS))})).to_numpy()
    found = host(worst).sort_values(["z", "r"], ascending=[False, True])
    ids = trace.evidence(found["r"])
    reasons = [_why(row, of[int(row.r)], terms[int(row.peers)]) for row in rows(found)]
    return table(
        {
            "trace_id": list(ids),
            "request_id": [trace.request_id(r) for r in found["r"]],
            "engine": trace.names.decode("engine", found["engine"]),
            "seconds": found["total_s"].to_numpy(),
            "expected_s": found["expected_s"].to_numpy(),
            "z": found["z"].to_numpy(),
            "why": reasons,
            "at_unix_nano": [nanos(trace, at) for at in found["arrived_s"]],
        }
    )


def _why(row: Any, tries: list[Any], terms: Any) -> str:
    """The phase that is furthest above what the model gives it."""
    *before, last = tries
    context = row.prompt - row.computed / 2, row.prompt + row.generated / 2
    prefill_s = terms[0] + row.computed * (terms[1] + terms[5] * context[0] / 1e3)
    decode_s = row.generated * (terms[2] + terms[4] * (row.busy - 1.0) + terms[6] * context[1] / 1e3)
    phases = {
        "decode": (float(last.decode_s), float(decode_s)),
        "prefill": (float(last.prefill_s), float(prefill_s)),
        "waiting for a slot": (float(row.queue_s), float(terms[3] * row.queue_s)),
        f"{len(before)} failed attempts": (float(sum(each.ended_s - each.asked_s for each in before)), 0.0),
    }
    known = {name: each for name, each in phases.items() if not np.isnan(each[0])}
    name, (took_s, expected_s) = max(known.items(), key=lambda each: each[1][0] - each[1][1])
    return f"{name}: {took_s:.2f} s, expected {max(expected_s, 0.0):.2f}"


def _model(trace: Trace, asked: Frame, fit: Fit) -> Any:
    host = trace.engine.host
    devices, names = device_of(trace), trace.names
    kinds = host(asked[["peers", "model", "engine"]].drop_duplicates().sort_values(["peers", "engine"]))
    kinds = list(rows(kinds.drop_duplicates("peers")))
    terms = host(trace.engine.frame({f"t{i}": fit.terms[:, i] for i in range(len(TERMS))})).to_numpy()
    return table(
        {
            "model": [names.of("model", kind.model) for kind in kinds for _ in TERMS],
            "device": [names.of("device", devices[kind.engine]) for kind in kinds for _ in TERMS],
            "term": list(TERMS) * len(kinds),
            "seconds_per_unit": [float(terms[kind.peers, i]) for kind in kinds for i in range(len(TERMS))],
        }
    )


_CLUSTER = (
    *("engine", "since_unix_nano", "until_unix_nano", "requests", "outliers", "excess_s"),
    *("evidence", "request_id"),
)


def _clusters(trace: Trace, asked: Frame) -> Any:
    """Each engine's outliers in its worst stretch of time; who arrived before the window counts at its begin."""
    found = []
    width_s = max(trace.length_s, 1e-6) / _BUCKETS
    asked = asked.assign(excess_s=asked["total_s"] - asked["expected_s"])
    asked["bucket"] = (asked["arrived_s"] / width_s).clip(0, _BUCKETS - 1).astype("int64")
    odd = asked[_is_outlier(asked)].reset_index(drop=True)
    counts = odd.groupby("engine", sort=True).agg({"r": "count"}).reset_index()
    for code in trace.engine.host(counts[counts["r"] >= CLUSTER_REQUESTS])["engine"].tolist():
        first, last = _densest(trace.engine.host(odd[odd["engine"] == code])["bucket"].to_numpy())
        inside, mine = (
            each[(each["engine"] == code) & (each["bucket"] >= first) & (each["bucket"] <= last)]
            for each in (asked, odd)
        )
        mine = trace.engine.host(mine).sort_values(["excess_s", "r"], ascending=[False, True])
        since, until = nanos(trace, first * width_s), nanos(trace, (last + 1) * width_s)
        sums = (len(inside), len(mine), float(mine["excess_s"].sum()))
        worst = mine["r"].tolist()[:MOST_EVIDENCE]
        told = trace.evidence(worst), trace.request_id(worst[0])
        found.append((trace.names.of("engine", code), since, until, *sums, *told))
    return _table(_CLUSTER, found)


def _densest(buckets: Any) -> tuple[int, int]:
    """Around the fullest bucket, as far as buckets have at least a third as many."""
    counts = np.bincount(buckets)
    first = last = int(counts.argmax())
    least = max(counts[first] / 3, 1)
    while first > 0 and counts[first - 1] >= least:
        first -= 1
    while last + 1 < len(counts) and counts[last + 1] >= least:
        last += 1
    return first, last


# --- engines


_ENGINE = (
    *("engine", "model", "gpu", "device", "peers", "requests", "decode_ms_token", "peers_ms_token", "ratio", "z"),
    *("prefill_ms_token", "prefill_peers_ms_token", "prefill_ratio", "prefill_z", "least_z", "residual_ratio"),
    *("since_unix_nano", "until_unix_nano", "is_over", "is_since_ever", "lost_s", "evidence"),
)


def _engines(trace: Trace, work: tuple[Frame, Frame], asked: Frame) -> Any:
    runs, names, device = tuple(find_runs(trace, each) for each in work), trace.names, device_of(trace)
    pairs = trace.engine.host(trace.attempts[["engine", "model"]].drop_duplicates())
    model = {int(row.engine): int(row.model) for row in rows(pairs) if row.engine >= 0 and row.model >= 0}
    kinds = [(model[code], device[code]) for code in model]
    homes = trace.engine.host(trace.engines[["engine", "gpu"]])
    gpus = {int(row.engine): names.of("gpu", row.gpu) for row in rows(homes)}
    asked = asked.assign(ratio=asked["total_s"] / asked["expected_s"])
    medians = trace.engine.host(trace.engine.quantiles(asked, ["engine"], "ratio", [0.5]))
    residuals = dict(zip(medians["engine"].tolist(), medians["q50"].tolist(), strict=True))
    found = []
    for code in sorted(set(runs[0]) | set(runs[1])):
        decode, prefill = runs[0].get(code, _NO_RUN), runs[1].get(code, _NO_RUN)
        worse, rows_of = (decode, work[0]) if _is_worse(decode, prefill) else (prefill, work[1])
        what = names.of("model", model[code]), gpus.get(code, ""), names.of("device", device[code])
        peers, until = kinds.count((model[code], device[code])) - 1, nanos(trace, min(worse.until_s, trace.length_s))
        lost_s = sum(run.lost_s for run in (decode, prefill) if run.ratio >= SLOW)
        found.append(
            (
                *(names.of("engine", code), *what, peers, worse.requests),
                *(decode.ms_token, decode.ms_token / decode.ratio, decode.ratio, decode.z),
                *(prefill.ms_token, prefill.ms_token / prefill.ratio, prefill.ratio, prefill.z),
                *(
                    max(decode.least_z, prefill.least_z),
                    residuals.get(code, np.nan),
                    nanos(trace, worse.since_s),
                    until,
                    worse.until_s < np.inf,
                ),
                *(worse.is_since_ever, lost_s, _slowest(trace, rows_of, code, worse)),
            )
        )
    return _table(_ENGINE, found)


def _table(columns: tuple[str, ...], found: list[tuple[Any, ...]]) -> Any:
    """A host table of rows."""
    return table(dict(zip(columns, zip(*found, strict=True) if found else ((),) * len(columns), strict=True)))


_NO_RUN = Run(0.0, np.inf, 0, 1.0, 0.0, 0.0, np.nan)


def _is_worse(decode: Run, prefill: Run) -> bool:
    are_both = decode.z >= decode.least_z and prefill.z >= prefill.least_z
    return decode.lost_s >= prefill.lost_s if are_both else decode.z >= prefill.z


def _slowest(trace: Trace, work: Frame, engine: int, run: Run) -> tuple[str, ...]:
    """Traces of the attempts that lost most, for engines that may be accused."""
    if run.ratio < SLOW or run.z < run.least_z / 2:
        return ()
    each = work
    mine = each[(each["engine"] == engine) & (each["at_s"] >= run.since_s) & (each["at_s"] < run.until_s)]
    mine = mine.assign(lost_s=mine["seconds"] * mine["pace"]).sort_values(["lost_s", "r"], ascending=[False, True])
    return trace.evidence(trace.engine.host(mine.head(MOST_EVIDENCE))["r"])


# --- findings


def _is_straggler(row: Any) -> bool:
    of_two = row.peers == 1
    least = STRAGGLER_RATIO_OF_TWO if of_two else STRAGGLER_RATIO
    is_slow = any(ratio >= least and z >= row.least_z for ratio, z in _phases(row))
    enough = row.requests >= (STRAGGLER_REQUESTS_OF_TWO if of_two else STRAGGLER_REQUESTS)
    lasted_s = (row.until_unix_nano - row.since_unix_nano) / 1e9 if row.is_over else math.inf
    return bool(is_slow and enough and row.lost_s >= STRAGGLER_LOST_S and lasted_s >= EPISODE_S)


def _phases(row: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    return (row.ratio, row.z), (row.prefill_ratio, row.prefill_z)


def _of_straggler(row: Any) -> Finding:
    told = zip(
        ("decode", "prefill"),
        _phases(row),
        ((row.decode_ms_token, row.peers_ms_token), (row.prefill_ms_token, row.prefill_peers_ms_token)),
        strict=True,
    )
    parts = [
        f"{phase} {ratio:.1f}x its peers ({own:.3g} ms a token against {peers:.3g})"
        for phase, (ratio, z), (own, peers) in told
        if ratio >= SLOW and z >= row.least_z
    ]
    where = f" on {row.gpu}" if row.gpu else ""
    verb, since = ("was", "from") if row.is_over else ("is", "since")
    until = f" to {clock(row.until_unix_nano)}" if row.is_over else ""
    kind = "slower engine" if _may_be_made_so(row) else "straggler"
    return Finding(
        kind=kind,
        subject=row.engine,
        text=f"{row.engine}{where} {verb} a {kind}: {' and '.join(parts)} {since} "
        f"{clock(row.since_unix_nano)}{until}, over {row.requests:,} requests",
        advice=_advice(row),
        impact_s=float(row.lost_s),
        figures={
            "ratio": row.ratio,
            "z": row.z,
            "least_z": row.least_z,
            "prefill_ratio": row.prefill_ratio,
            "requests": row.requests,
        },
        evidence=tuple(row.evidence),
    )


def _may_be_made_so(row: Any) -> bool:
    """Whether its hardware may be slower than that of its peers: nobody tells of it, and it was never faster."""
    return bool(not row.device and row.is_since_ever)


def _advice(row: Any) -> str:
    look = "look at its GPU, its node and what else runs there"
    if row.is_over:
        return f"It is over; {look}."
    if _may_be_made_so(row):
        return (
            f"No GPU tells what it runs on, and it was as slow from the window's begin: {look}. "
            "On slower hardware this is its pace."
        )
    return f"lltm-ray drain {row.engine}; {look}; then --undrain."


def _is_cluster(row: Any) -> bool:
    is_dense = row.outliers >= max(CLUSTER_REQUESTS, CLUSTER_SHARE * row.requests)
    return bool(is_dense and row.excess_s >= CLUSTER_S)


def _of_clusters(found: list[Any]) -> Finding:
    found = sorted(found, key=lambda row: -row.excess_s)
    names = ", ".join(row.engine for row in found)
    outliers, excess_s = sum(row.outliers for row in found), sum(row.excess_s for row in found)
    since, until = min(row.since_unix_nano for row in found), max(row.until_unix_nano for row in found)
    return Finding(
        kind="slow requests",
        subject=names if len(found) == 1 else f"{len(found)} engines",
        text=f"{outliers:,} of {sum(row.requests for row in found):,} requests on {names} between {clock(since)} and "
        f"{clock(until)} took {excess_s:,.0f} s longer than their size, their waiting and the busy slots explain",
        advice=f"lltm-ray explain {found[0].request_id} shows where one of them spent its time.",
        impact_s=excess_s,
        figures={"outliers": outliers, "excess_s": excess_s},
        evidence=found[0].evidence,
    )
