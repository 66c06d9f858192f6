"""Where time really goes: what each span took itself, who called whom, and latency over the window.

A span's self time is its duration without the union of its children's times, cut to its own: children may overlap.
"""

from __future__ import annotations

from typing import Any

from lltm_ray.analytics.answer import Answer, Finding, rows, table
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.trace import PHASES, REQUEST, Trace, nanos
from lltm_ray.analytics.units import count, percent, seconds

NAME = "self time"
BUCKETS = 60
"""Of the timeline: a minute each of an hour."""
OWN_SHARE = 0.2
"""A gateway takes a few per cent of a request; a fifth is a queue at its door."""
OWN_S = 0.02
"""Under 20 ms nobody waits for a gateway, however short the answer."""
OWN_FINE_S = 0.005
"""What parsing, routing and writing may take; the rest counts as lost."""
FEWEST_REQUESTS = 50
"""Under so many the median may be chance."""
_MOST_NAMES, _MOST_CALLS, _MOST_ENGINES, _MOST_EVIDENCE = 60, 200, 16, 5


def analyze(trace: Trace) -> Answer:
    """Self time by span name, the call graph by span names, and the requests that ended over time."""
    selves = self_times(trace)
    own, evidence = _gateway(trace, selves)
    found, left_out = _self_time(trace, selves, evidence)
    timeline, engines_left_out = _timeline(trace)
    figures = {"names_left_out": float(left_out), "engines_left_out": float(engines_left_out), **own}
    return Answer({"self_time": found, "calls": _calls(trace), "timeline": timeline}, figures)


def judge(answer: Answer) -> list[Finding]:
    """A gateway that takes a large part of latency itself."""
    told = answer.figures
    is_long = told["gateway_share_p50"] > OWN_SHARE and told["gateway_p50_s"] > OWN_S
    if told["gateway_requests"] < FEWEST_REQUESTS or not is_long:
        return []
    text = (
        f"Half of {count(told['gateway_requests'])} requests spend over {percent(told['gateway_share_p50'])} of their "
        f"time ({seconds(told['gateway_p50_s'])}) in the gateway itself, neither waiting for a slot nor on an engine."
    )
    advice = "Start more gateway processes (`gateway.processes`)"
    advice += "; where prompts are large, see whether clients send them slowly: reading them counts here too."
    evidence = next((row.evidence for row in rows(answer.tables["self_time"]) if row.span == PHASES[REQUEST]), ())
    found = Finding(
        kind="gateway overhead",
        subject="gateway",
        text=text,
        advice=advice,
        impact_s=told["gateway_lost_s"],
        figures={name: value for name, value in told.items() if name.startswith("gateway_")},
        evidence=evidence,
    )
    return [found]


def self_times(trace: Trace) -> Frame:
    """Every span's own time.

    Returns:
        s, name: as in `Trace.spans`; r: of spans that are requests, else -1; total_s; self_s: what no child covers.
    """
    xp, spans = trace.engine.xp, trace.spans
    of = {name: trace.engine.array(spans[name]) for name in ("s", "parent", "r", "a", "name", "start_s", "end_s")}
    total = of["end_s"] - of["start_s"]
    child = xp.flatnonzero(of["parent"] >= 0)
    parent = of["parent"][child]
    low = xp.maximum(of["start_s"][child], of["start_s"][parent])
    high = xp.minimum(of["end_s"][child], of["end_s"][parent])
    is_inside = high > low
    own = total - _covered(trace, parent[is_inside], low[is_inside], high[is_inside])
    columns = {"s": of["s"], "name": of["name"], "r": xp.where(of["a"] < 0, of["r"], -1)}
    return trace.engine.frame(columns | {"total_s": total, "self_s": xp.maximum(own, 0.0)})


def _covered(trace: Trace, parent: Array, low: Array, high: Array) -> Array:
    """Length of the union of each span's intervals, which are those of positive length."""
    xp, engine = trace.engine.xp, trace.engine
    if not len(parent):
        return xp.zeros(len(trace.spans))
    order = xp.lexsort(xp.stack([low, parent.astype("float64")]))
    parent, low, high = parent[order], low[order], high[order]
    until = engine.array(engine.frame({"parent": parent, "high": high}).groupby("parent")["high"].cummax())
    is_next = parent[1:] == parent[:-1]
    begin = low.copy()
    begin[1:] = xp.where(is_next, xp.maximum(low[1:], until[:-1]), low[1:])
    return xp.bincount(parent, weights=xp.maximum(high - begin, 0.0), minlength=len(trace.spans))


def _gateway(trace: Trace, selves: Frame) -> tuple[dict[str, float], tuple[str, ...]]:
    """What the gateway itself took of the requests that an engine answered, and those of which it took the most."""
    xp, array, requests = trace.engine.xp, trace.engine.array, trace.requests
    r, own = array(selves["r"]), array(selves["self_s"])
    total = array(requests["total_s"])
    took = xp.zeros(len(total))
    took[r[r >= 0]] = own[r >= 0]
    fine = xp.flatnonzero((array(requests["engine"]) >= 0) & (array(requests["error"]) < 0) & (total > 0))
    took, share = took[fine], took[fine] / total[fine]
    figures = {
        "gateway_requests": float(len(fine)),
        "gateway_p50_s": float(xp.percentile(took, 50)) if len(fine) else 0.0,
        "gateway_share_p50": float(xp.percentile(share, 50)) if len(fine) else 0.0,
        "gateway_lost_s": float(xp.maximum(took - OWN_FINE_S, 0.0).sum()),
    }
    most = xp.argsort(-took, kind="stable")[:_MOST_EVIDENCE]
    return figures, trace.evidence(fine[most].tolist())


def _self_time(trace: Trace, selves: Frame, evidence: tuple[str, ...]) -> tuple[Any, int]:
    """The table, and how many names it leaves out."""
    host = trace.engine.host
    sums = host(selves.groupby("name", sort=True).agg({"total_s": "sum", "self_s": "sum"}).reset_index())
    found = sums.merge(host(trace.engine.quantiles(selves, ["name"], "self_s", [0.5, 0.95])), on="name")
    whole = max(float(found["self_s"].sum()), 1e-9)
    shown = found.sort_values(["self_s", "name"], ascending=[False, True]).head(_MOST_NAMES)
    columns = {
        "span": trace.names.decode("span", shown["name"]),
        "count": shown["count"].tolist(),
        "total_s": shown["total_s"].tolist(),
        "self_s": shown["self_s"].tolist(),
        "self_share": (shown["self_s"] / whole).tolist(),
        "p50_s": shown["q50"].tolist(),
        "p95_s": shown["q95"].tolist(),
        "evidence": [evidence if code == REQUEST else () for code in shown["name"]],
    }
    return table(columns), len(found) - len(shown)


def _calls(trace: Trace) -> Any:
    """Parent name -> child name; spans without a parent are called by an empty one."""
    xp, array, spans = trace.engine.xp, trace.engine.array, trace.spans
    above, name = array(spans["parent"]), array(spans["name"])
    parent = xp.where(above >= 0, name[above], -1)
    calls = trace.engine.frame({"parent": parent, "name": name, "total_s": array(spans["end_s"] - spans["start_s"])})
    keys = ["parent", "name"]
    sums = trace.engine.host(calls.groupby(keys, sort=True).agg({"total_s": "sum"}).reset_index())
    found = sums.merge(trace.engine.host(trace.engine.quantiles(calls, keys, "total_s", [0.95])), on=keys)
    shown = found.sort_values(["total_s", *keys], ascending=[False, True, True]).head(_MOST_CALLS)
    columns = {
        "parent": trace.names.decode("span", shown["parent"]),
        "child": trace.names.decode("span", shown["name"]),
        "count": shown["count"].tolist(),
        "total_s": shown["total_s"].tolist(),
        "p95_s": shown["q95"].tolist(),
    }
    return table(columns)


def _timeline(trace: Trace) -> tuple[Any, int]:
    """Requests by the bucket they ended in, of the busiest engines and of all; and how many engines it leaves out."""
    ended, bucket_s, left_out = _ended(trace)
    keys, host = ["engine", "bucket"], trace.engine.host
    sums = {"is_error": "sum", "generated": "sum", "r": "count"}
    found = host(ended.groupby(keys, sort=True).agg(sums).reset_index())
    for column, quantiles, names in (("total_s", [0.5, 0.95], ["p50", "p95"]), ("ttft_s", [0.95], ["ttft"])):
        told = host(trace.engine.quantiles(ended, keys, column, quantiles)).drop(columns="count")
        told.columns = [*keys, *names]
        found = found.merge(told, on=keys, how="left")
    found = found.sort_values(keys)
    at = (found["bucket"] * bucket_s).tolist()
    columns = {
        "at_s": at,
        "at_unix_nano": [nanos(trace, each) for each in at],
        "engine": trace.names.decode("engine", found["engine"]),
        "requests": found["r"].tolist(),
        "errors": found["is_error"].tolist(),
        "p50_s": found["p50"].tolist(),
        "p95_s": found["p95"].tolist(),
        "ttft_p95_s": found["ttft"].tolist(),
        "generated": found["generated"].tolist(),
    }
    return table(columns), left_out


def _ended(trace: Trace) -> tuple[Frame, float, int]:
    """Each request twice: as one of all (engine -1), and of its engine; a bucket's seconds; engines left out."""
    xp, requests = trace.engine.xp, trace.requests
    of = {name: trace.engine.array(requests[name]) for name in ("r", "engine", "total_s", "ttft_s", "generated")}
    of["is_error"] = (trace.engine.array(requests["error"]) >= 0).astype("int64")
    bucket_s = max(trace.length_s, 1e-9) / BUCKETS
    bucket = xp.floor(trace.engine.array(requests["ended_s"]) / bucket_s).astype("int64")
    of["bucket"] = xp.clip(bucket, 0, BUCKETS - 1)
    named = of["engine"][of["engine"] >= 0]
    busy = xp.bincount(named, minlength=1) if len(named) else xp.zeros(1, dtype="int64")
    rank = xp.argsort(xp.argsort(-busy, kind="stable"), kind="stable")
    is_shown = (of["engine"] >= 0) & (rank[of["engine"]] < _MOST_ENGINES)
    columns = {name: xp.concatenate([values, values[is_shown]]) for name, values in of.items()}
    columns["engine"][: len(of["r"])] = -1
    return trace.engine.frame(columns), bucket_s, max(int((busy > 0).sum()) - _MOST_ENGINES, 0)
