"""Requests that the fleet turned away: refused for want of a slot, or cut when their time was up."""

from __future__ import annotations

from typing import Any

from lltm_ray.analytics.answer import MOST_EVIDENCE, Finding, rows, table
from lltm_ray.analytics.blame import DEADLINE, LOAD
from lltm_ray.analytics.columns import NONE
from lltm_ray.analytics.frames import Array
from lltm_ray.analytics.trace import Trace, nanos
from lltm_ray.analytics.units import clock

REFUSED = 429
"""Status of a request for which there was no slot."""
LEAST_REJECTED, LEAST_REJECTED_RATIO = 10, 0.01
"""Of a model's requests, refused or cut."""
CONCENTRATED = 0.5
"""An engine's part of all cut attempts from which it is named, if it is twice its part of all attempts."""


def models_of(trace: Trace) -> Array:
    """Of requests; those that were refused before theirs was read are for the only one, if there is only one."""
    xp, model = trace.engine.xp, trace.engine.array(trace.requests["model"])
    return xp.maximum(model, 0) if len(trace.names.model) == 1 else model


def _turned_away(trace: Trace, kind: Array, which: int) -> tuple[dict[str, Any], Any]:
    """Requests with one kind of end, by model, as columns; and their codes.

    Models that requests do not name share a row, in which `requests` are all of the window.
    """
    host = trace.engine.host
    each = trace.requests[["r", "arrived_s", "total_s"]].assign(kind=kind, model=models_of(trace))
    ended = each[each["kind"] == which]
    by = ended.groupby("model", sort=True)
    found = host(by.agg({"r": "count", "arrived_s": "min", "total_s": "sum"}).reset_index())
    last = host(by.agg({"arrived_s": "max"}).reset_index())
    asked = host(each.groupby("model", sort=True).agg({"r": "count"}).reset_index())
    of_model = dict(zip(asked["model"].tolist(), asked["r"].tolist(), strict=True)) | {NONE: len(each)}
    samples = [host(ended[ended["model"] == code].sort_values("r").head(MOST_EVIDENCE))["r"] for code in found["model"]]
    told = {
        "model": trace.names.decode("model", found["model"]),
        "requests": [of_model[code] for code in found["model"]],
        "first_unix_nano": [nanos(trace, at) for at in found["arrived_s"]],
        "last_unix_nano": [nanos(trace, at) for at in last["arrived_s"]],
        "evidence": [trace.evidence(sample) for sample in samples],
    }
    return told, found


def rejections(trace: Trace, kind: Array) -> Any:
    """Requests of each model that were refused for want of a slot."""
    told, found = _turned_away(trace, kind, LOAD)
    return table(told | {"rejected": found["r"].to_numpy()})


def deadlines(trace: Trace, kind: Array) -> Any:
    """Requests of each model whose time was up, and the engine that had most of them."""
    told, found = _turned_away(trace, kind, DEADLINE)
    each = trace.requests[["engine"]].assign(model=models_of(trace), one=1, cut=(kind == DEADLINE) * 1)
    by = each[each["engine"] >= 0].groupby(["model", "engine"], sort=True)
    sums = trace.engine.host(by.agg({"one": "sum", "cut": "sum"}).reset_index())
    worst = [_worst(sums[sums["model"] == code]) for code in found["model"]]
    told |= {"cut": found["r"].to_numpy(), "lost_s": found["total_s"].to_numpy()}
    told |= {"engine": trace.names.decode("engine", [engine for engine, _ in worst])}
    return table(told | {"engine_cut": [cut for _, cut in worst]})


def _worst(engines: Any) -> tuple[int, int]:
    """The engine on which far more requests were cut than its part, and how many; else none."""
    if not len(engines):
        return NONE, 0
    row = next(iter(rows(engines.sort_values(["cut", "engine"], ascending=[False, True]))))
    part = row.cut / max(engines["cut"].sum(), 1)
    is_odd = part >= max(CONCENTRATED, 2 * row.one / engines["one"].sum())
    return (int(row.engine), int(row.cut)) if is_odd else (NONE, 0)


# --- findings


def judge(refused: Any, cut: Any) -> list[Finding]:
    """One for each model that refused many or kept many waiting too long.

    Args:
        refused: `rejections`' table.
        cut: `deadlines`' table.
    """
    found = [_of_rejections(row) for row in rows(refused) if _are_many(row.rejected, row.requests)]
    return found + [_of_deadlines(row) for row in rows(cut) if _are_many(row.cut, row.requests)]


def _are_many(count: int, requests: int) -> bool:
    return bool(count >= max(LEAST_REJECTED, LEAST_REJECTED_RATIO * requests))


def _of_rejections(row: Any) -> Finding:
    return Finding(
        kind="rejections",
        subject=row.model or "requests",
        text=f"{row.rejected:,} of {row.requests:,} requests{_for(row.model)} were refused for want of a slot between "
        f"{clock(row.first_unix_nano)} and {clock(row.last_unix_nano)}",
        advice="Add engines (--engines, or --max-engines to let load decide) or slots (--n-parallel); a longer "
        "gateway.queue_limit only makes them wait.",
        impact_s=0.0,
        figures={"rejected": row.rejected, "requests": row.requests},
        evidence=tuple(row.evidence),
    )


def _of_deadlines(row: Any) -> Finding:
    where = f"; {row.engine_cut:,} of them on {row.engine}, far more than its part" if row.engine else ""
    look = f" Look at {row.engine} first: its log (log_dir), its GPU." if row.engine else ""
    return Finding(
        kind="deadlines",
        subject=row.model or "requests",
        text=f"{row.cut:,} of {row.requests:,} requests{_for(row.model)} were cut at their deadline between "
        f"{clock(row.first_unix_nano)} and {clock(row.last_unix_nano)}{where}",
        advice="Add engines (--engines, or --max-engines to let load decide), or give requests longer: their "
        f"x-lltm-deadline-ms, gateway.request_timeout_s.{look}",
        impact_s=float(row.lost_s),
        figures={"cut": row.cut, "requests": row.requests, "lost_s": row.lost_s},
        evidence=tuple(row.evidence),
    )


def _for(model: str) -> str:
    return f" for {model}" if model else ""
