"""Where errors began, whom they hit, who was saved, and what followed on other engines.

An error that has an erroneous span below it is an effect; the others are origins. Of a request, the origin that ended
first is what it suffers from. Clients that leave are no error of ours, requests that are refused for want of a slot or
cut at their deadline are load, and requests that could not be served as they were sent are their client's: they are
told apart.
"""

from __future__ import annotations

from typing import Any

from lltm_ray.analytics import turned_away
from lltm_ray.analytics.answer import MOST_EVIDENCE, Answer, Finding, rows, table
from lltm_ray.analytics.blame import DEADLINE, GONE, LOAD, OURS, classes_of, error_kinds
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.trace import Trace, nanos
from lltm_ray.analytics.units import clock

NAME = "failures"
_CONTINUED = "continued"
_WORDS = {
    "retried": "before their first byte",
    "continued": "in the middle of an answer that went on elsewhere",
    "failed": "without another try",
    "gateway lost": "with their gateway",
}
_TOP = 100
_MOST_DEPTH = 100
"""Of spans below a request; parents that go round in a circle end there."""
CASCADE_S = 15.0
"""Errors, and waiting, that begin so soon after one of an engine's own may have followed from it."""
LEAST_FOLLOWING, FOLLOWING_SIGMA = 2, 3.0
"""Errors elsewhere that follow: so many, and standard deviations above those that fall into that time by chance."""

LEAST_ERRORS, LEAST_RATIO = 3, 0.01
"""Of an engine's attempts: fewer are what a restart or a lost connection costs now and then."""
_WAIT_S, _WAIT_FACTOR = 0.2, 2.0
"""Median waiting on the other engines that was not there before, by both measures."""


def analyze(trace: Trace) -> Answer:
    """Tables `origins`, `engines`, `cascades`, `rejections`, `deadlines`; figures: ratios and counts of requests.

    Cascades: `errors_elsewhere` are other engines' errors within `CASCADE_S` after one of the engine's own; of those of
    the whole window `chance_elsewhere` fall into that time by chance, give or take `spread_elsewhere`. `wait_during_s`
    is the median waiting for others in that time, `wait_before_s` at all other times.
    """
    classes = error_kinds(trace.names)
    begun = find_origins(trace, classes)
    hit = _hit(trace, begun, classes)
    engines = _engines(trace, classes)
    requests = trace.requests
    kind = classes_of(trace, requests["error"], classes)
    count = max(len(requests), 1)
    kinds = {"failed": OURS, "rejected": LOAD, "gone": GONE, "deadlines": DEADLINE}
    told = {name: float((kind == each).sum()) for name, each in kinds.items()}
    tables = {
        "origins": _origins(trace, begun, hit),
        "engines": engines,
        "cascades": _cascades(trace, begun, classes),
        "rejections": turned_away.rejections(trace, kind),
        "deadlines": turned_away.deadlines(trace, kind),
    }
    ratios = {"error_ratio": "failed", "rejected_ratio": "rejected", "deadline_ratio": "deadlines"}
    figures = {name: told[each] / count for name, each in ratios.items()}
    return Answer(tables, figures | told | {"requests": float(len(requests))})


# --- origins


def find_origins(trace: Trace, classes: list[int]) -> Frame:
    """Erroneous spans of ours that no erroneous span below explains.

    Returns:
        s, trace, name, error, start_s, end_s, engine: the request's last one for a request's own error, r: of the
        request they are part of, -1 where they are of none; is_first: 1 for the one of its trace that ended first.
    """
    xp, column = trace.engine.xp, trace.engine.array
    spans = trace.spans
    parent = column(spans["parent"])
    is_error = classes_of(trace, spans["error"], classes) == OURS
    origin = xp.nonzero(is_error & ~has_below(xp, parent, is_error))[0]
    owner, requests = find_owners(xp, parent, column(spans["r"]), origin), trace.requests
    engine = column(spans["engine"])[origin]
    if len(requests) and len(origin):
        last = column(requests["engine"])[xp.maximum(owner, 0)]
        engine = xp.where((engine < 0) & (owner >= 0), last, engine)
    told = {name: column(spans[name])[origin] for name in ("trace", "name", "error", "start_s", "end_s")}
    found = trace.engine.frame({"s": origin, "r": owner, "engine": engine} | told)
    first = found.sort_values(["trace", "end_s", "s"]).drop_duplicates("trace", keep="first")
    found["is_first"] = found["s"].isin(first["s"]).astype("int64")
    return found


def has_below(xp: Any, parent: Array, is_marked: Array) -> Array:
    """Which spans have a marked one somewhere below them; parents that go round in a circle end it."""
    found = xp.zeros(len(parent), dtype=bool)
    now = parent[is_marked]
    while True:
        now = now[now >= 0]
        now = xp.unique(now[~found[now]])
        if not len(now):
            return found
        found[now] = True
        now = parent[now]


def find_owners(xp: Any, parent: Array, r: Array, rows: Array) -> Array:
    """The request that each of these spans is below, itself counted; -1 for none."""
    at, found = rows, xp.full(len(rows), -1, dtype="int64")
    for _ in range(_MOST_DEPTH):
        here = xp.where(at >= 0, r[xp.maximum(at, 0)], -1) if len(r) else found
        found = xp.where(found < 0, here, found)
        at = xp.where((found < 0) & (at >= 0), parent[xp.maximum(at, 0)], -1)
        if not bool((at >= 0).any()):
            break
    return found


def _hit(trace: Trace, begun: Frame, classes: list[int]) -> Frame:
    """Requests that suffer from an origin: r, s, is_failed: for good, lost_s."""
    xp, column = trace.engine.xp, trace.engine.array
    first = begun[(begun["is_first"] > 0) & (begun["r"] >= 0)][["r", "s"]]
    hit = first.merge(trace.requests[["r", "total_s", "error"]], on="r", how="inner")
    hit = hit.merge(lost_seconds(trace, classes), on="r", how="left").sort_values("r").reset_index(drop=True)
    failed = classes_of(trace, hit["error"], classes) == OURS
    hit["is_failed"] = failed.astype("int64")
    lost = xp.nan_to_num(column(hit["lost_s"]))
    hit["lost_s"] = xp.where(failed, column(hit["total_s"]), xp.minimum(lost, column(hit["total_s"])))
    return hit


def lost_seconds(trace: Trace, classes: list[int]) -> Frame:
    """r, lost_s: what failed attempts cost a request that was saved.

    All of an attempt that came to nothing; of one that another engine continued, only what that needed to get so far:
    its waiting and its prefill.
    """
    each = trace.attempts[["r", "number", "engine", "error", "asked_s", "ended_s", "route_s", "queue_s", "prefill_s"]]
    xp, column = trace.engine.xp, trace.engine.array
    each = each.sort_values(["r", "number"]).reset_index(drop=True)
    error, r = column(each["error"]), column(each["r"])
    known = [code for code, name in enumerate(trace.names.error) if name == _CONTINUED]
    is_continued = error == (known[0] if known else -2)
    is_failed = (classes_of(trace, each["error"], classes) == OURS) & ~is_continued
    after = xp.zeros(len(r), dtype=bool)
    after[1:] = is_continued[:-1] & (r[1:] == r[:-1])
    again = sum(xp.nan_to_num(column(each[name])) for name in ("route_s", "queue_s", "prefill_s"))
    whole = xp.nan_to_num(column(each["ended_s"]) - column(each["asked_s"]))
    each["lost_s"] = xp.where(is_failed, whole, xp.where(after, again, 0.0))
    return each.groupby("r", sort=True).agg({"lost_s": "sum"}).reset_index()


# --- tables


def _origins(trace: Trace, begun: Frame, hit: Frame) -> Any:
    """What began where, the costliest first; requests are counted at their first origin."""
    by = ["name", "engine", "error"]
    told = begun.groupby(by, sort=True).agg({"s": "count", "start_s": "min", "end_s": "max"}).reset_index()
    mine = hit[["s", "r", "is_failed", "lost_s"]].merge(begun[["s", *by]], on="s", how="inner")
    sums = mine.groupby(by, sort=True).agg({"r": "count", "is_failed": "sum", "lost_s": "sum"}).reset_index()
    firsts = begun.groupby(by, sort=True).agg({"end_s": "min"}).reset_index().rename(columns={"end_s": "first_s"})
    host = trace.engine.host
    found = host(told).merge(host(firsts), on=by).merge(host(sums), on=by, how="left")
    found = found.fillna({"r": 0, "is_failed": 0, "lost_s": 0.0})
    found = found.sort_values(["lost_s", "s", *by], ascending=[False, False, True, True, True]).head(_TOP)
    worst = mine.sort_values(["lost_s", "r"], ascending=[False, True])
    evidence = []
    for row in rows(found):
        same = (worst["name"] == row.name) & (worst["engine"] == row.engine) & (worst["error"] == row.error)
        evidence.append(trace.evidence(host(worst[same].head(MOST_EVIDENCE))["r"]))
    return table(
        {
            "span": trace.names.decode("span", found["name"]),
            "engine": trace.names.decode("engine", found["engine"]),
            "error": trace.names.decode("error", found["error"]),
            "errors": found["s"].to_numpy(),
            "requests": found["r"].astype("int64").to_numpy(),
            "failed_requests": found["is_failed"].astype("int64").to_numpy(),
            "lost_s": found["lost_s"].to_numpy(),
            "first_unix_nano": [nanos(trace, at) for at in found["first_s"]],
            "last_unix_nano": [nanos(trace, at) for at in found["end_s"]],
            "evidence": evidence,
        }
    )


def _engines(trace: Trace, classes: list[int]) -> Any:
    each = trace.attempts[trace.attempts["engine"] >= 0][["engine", "error"]].reset_index(drop=True)
    each["failed"] = (classes_of(trace, each["error"], classes) == OURS).astype("int64")
    sums = each.groupby("engine", sort=True).agg({"error": "count", "failed": "sum"}).reset_index()
    found = trace.engine.host(sums)
    return table(
        {
            "engine": trace.names.decode("engine", found["engine"]),
            "attempts": found["error"].to_numpy(),
            "failed": found["failed"].to_numpy(),
            "ratio": (found["failed"] / found["error"]).to_numpy(),
        }
    )


def _cascades(trace: Trace, begun: Frame, classes: list[int]) -> Any:
    """What the other engines saw within `CASCADE_S` after errors of the few engines that had most."""
    xp, host, column = trace.engine.xp, trace.engine.host, trace.engine.array
    known = begun[begun["engine"] >= 0].groupby("engine", sort=True).agg({"s": "count", "end_s": "min"}).reset_index()
    worst = host(known).sort_values(["s", "engine"], ascending=[False, True]).head(MOST_EVIDENCE)
    each = trace.attempts
    wait = xp.nan_to_num(column(each["route_s"])) + xp.nan_to_num(column(each["queue_s"]))
    asked, engine = column(each["asked_s"]), column(each["engine"])
    is_error = classes_of(trace, each["error"], classes) == OURS
    whose, ended = engine[is_error], column(each["ended_s"])[is_error]
    found = []
    for row in rows(worst):
        own = xp.sort(column(begun["end_s"])[column(begun["engine"]) == row.engine])
        errors = ended[(whose >= 0) & (whose != row.engine)]
        near = errors[_is_after(xp, own, errors)]
        part = min(_near_s(xp, own, trace.length_s) / max(trace.length_s, 1e-9), 1.0)
        others = (engine >= 0) & (engine != row.engine)
        is_near = _is_after(xp, own, asked)
        usual_s, now_s = (_median(xp, wait[others & some]) for some in (~is_near, is_near))
        during = wait[others & is_near]
        delay_s = float(xp.maximum(during - usual_s, 0.0).sum())
        after_s = float(near.min()) - row.end_s if len(near) else float("nan")
        told = (len(near), part * len(errors), (len(errors) * part * (1 - part)) ** 0.5, after_s)
        found.append((trace.names.of("engine", row.engine), *told, usual_s, now_s, delay_s, len(during)))
    columns = (
        *("engine", "errors_elsewhere", "chance_elsewhere", "spread_elsewhere", "after_s"),
        *("wait_before_s", "wait_during_s", "delay_s", "requests"),
    )
    return table(dict(zip(columns, zip(*found, strict=True) if found else ((),) * len(columns), strict=True)))


def _is_after(xp: Any, own: Array, at_s: Array) -> Array:
    """Which moments are within `CASCADE_S` after one of `own`, which ascend and are at least one."""
    last = xp.searchsorted(own, at_s, side="right") - 1
    return (last >= 0) & (at_s - own[xp.maximum(last, 0)] <= CASCADE_S)


def _near_s(xp: Any, own: Array, length_s: float) -> float:
    """Seconds of the window that are within `CASCADE_S` after one of `own`, which ascend."""
    until = xp.minimum(xp.concatenate([own[1:], xp.full(1, float("inf"))]), own + CASCADE_S)
    return float((xp.clip(until, 0.0, length_s) - xp.clip(own, 0.0, length_s)).sum())


def _median(xp: Any, values: Array) -> float:
    return float(xp.percentile(values, 50)) if len(values) else 0.0


# --- findings


def judge(answer: Answer) -> list[Finding]:
    """One for each place where errors began, and for each model that refused many or kept many waiting too long."""
    attempts = {row.engine: row for row in rows(answer.tables["engines"])}
    cascades = {row.engine: row for row in rows(answer.tables["cascades"])}
    places: dict[str, list[Any]] = {}
    for row in rows(answer.tables["origins"]):
        places.setdefault(row.engine or row.span, []).append(row)
    found = [
        _of_errors(place, origins, cascades.get(place))
        for place, origins in places.items()
        if _is_grave(origins, attempts.get(place), answer.figures["requests"])
    ]
    return found + turned_away.judge(answer.tables["rejections"], answer.tables["deadlines"])


def _is_grave(origins: list[Any], engine: Any, requests: float) -> bool:
    errors = sum(row.errors for row in origins)
    of = engine.attempts if engine is not None else requests
    return bool(errors >= max(LEAST_ERRORS, LEAST_RATIO * of))


def _of_errors(place: str, origins: list[Any], cascade: Any) -> Finding:
    errors, hit = sum(row.errors for row in origins), sum(row.requests for row in origins)
    failed, lost_s = sum(row.failed_requests for row in origins), sum(row.lost_s for row in origins)
    first, last = min(row.first_unix_nano for row in origins), max(row.last_unix_nano for row in origins)
    kinds = "; ".join(f"{row.errors:,} {_WORDS.get(row.error, f'with {row.error}')}" for row in origins[:3])
    is_engine = bool(origins[0].engine)
    began = (
        f"{place} broke {errors:,} attempts" if is_engine else f"{errors:,} errors began in span {place} of no engine"
    )
    delay_s, after = _followed(cascade)
    return Finding(
        kind="errors",
        subject=place,
        text=f"{began} between {clock(first)} and {clock(last)} ({kinds}): of {hit:,} requests "
        f"{hit - failed:,} were saved by another try and {failed:,} failed{after}",
        advice=_advice(place, failed=failed) if is_engine else "lltm-ray explain shows what one of them met.",
        impact_s=float(lost_s + delay_s),
        figures={"errors": errors, "requests": hit, "failed_requests": failed, "lost_s": lost_s, "delay_s": delay_s},
        evidence=tuple(each for row in origins for each in row.evidence)[:MOST_EVIDENCE],
    )


def _followed(cascade: Any) -> tuple[float, str]:
    """Seconds of waiting on other engines that followed, and what did, in words."""
    if cascade is None:
        return 0.0, ""
    parts, delay_s = [], 0.0
    least = cascade.chance_elsewhere + FOLLOWING_SIGMA * cascade.spread_elsewhere
    if cascade.errors_elsewhere >= max(LEAST_FOLLOWING, least):
        parts.append(
            f"{cascade.errors_elsewhere:,} attempts on others broke, too, from {cascade.after_s:.1f} s later on"
        )
    risen_s = cascade.wait_during_s - cascade.wait_before_s
    if risen_s >= _WAIT_S and cascade.wait_during_s >= _WAIT_FACTOR * cascade.wait_before_s:
        delay_s = float(cascade.delay_s)
        parts.append(
            f"median waiting on the others rose from {cascade.wait_before_s:.2f} s to {cascade.wait_during_s:.2f} s"
        )
    return delay_s, "".join(f"; {part}" for part in parts)


def _advice(engine: str, *, failed: int) -> str:
    more = " Keep gateway.failover on and gateway.max_attempts above 1: both save requests." if failed else ""
    return f"Read {engine}'s log (log_dir); if it goes on, lltm-ray drain {engine}.{more}"
