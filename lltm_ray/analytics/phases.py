"""Where attempts' time went, for all of them at once; and the spans that tell it.

The same rules as in `lltm_ray.telemetry.figures`, which tells them of one attempt: phases meet without a gap, and one
that was cut off ends where its attempt ended. A test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lltm_ray.analytics.columns import NONE, Floats, Ints, find
from lltm_ray.analytics.trace import ATTEMPT, DECODE, PREFILL, QUEUE, REQUEST, ROUTE


def attempt_phases(
    offsets: Mapping[str, Floats], columns: Mapping[str, Any], arrived: Floats, total: Floats, is_generating: Ints
) -> dict[str, Floats]:
    """Moments and durations of attempts.

    Args:
        offsets: asked_s, sent_s, headers_s, first_s, ended_s from the request's arrival; NaN: it did not come to that.
        columns: prompt_ms and predicted_ms by llama-server's clock.
        arrived: of each attempt's request, seconds.
        total: likewise, its duration.
        is_generating: likewise, whether it has phases; embeddings and reranking have none.

    Returns:
        The five moments, counted from the window's start, and route_s, queue_s, prefill_s, decode_s; NaN for none.
    """
    asked, sent = offsets["asked_s"], offsets["sent_s"]
    ended = np.where(np.isnan(offsets["ended_s"]), total, offsets["ended_s"])
    first, slot = offsets["first_s"], offsets["headers_s"]
    is_estimate = np.isnan(first) & (columns["predicted_ms"] > 0) & (columns["prompt_ms"] >= 0)
    counted_first = np.maximum(sent, ended - columns["predicted_ms"] / 1e3)
    counted_slot = np.maximum(sent, counted_first - columns["prompt_ms"] / 1e3)
    is_told = (columns["prompt_ms"] > 0) & (slot <= first)  # a busy gateway may read a stream's headers late
    slot = np.where(is_told, np.maximum(sent, np.minimum(slot, first - columns["prompt_ms"] / 1e3)), slot)
    first, slot = np.where(is_estimate, counted_first, first), np.where(is_estimate, counted_slot, slot)
    has_phases = is_generating.astype(bool) & ~np.isnan(sent)
    return {
        "asked_s": arrived + asked,
        "sent_s": arrived + sent,
        "headers_s": arrived + np.where(has_phases, slot, np.nan),
        "first_s": arrived + np.where(has_phases, first, np.nan),
        "ended_s": arrived + ended,
        "route_s": np.maximum(_until(sent, ended) - asked, 0),
        "queue_s": np.where(has_phases, np.maximum(_until(slot, ended) - sent, 0), np.nan),
        "prefill_s": np.where(has_phases, np.maximum(_until(first, ended) - slot, 0), np.nan),
        "decode_s": np.where(has_phases, np.maximum(ended - first, 0), np.nan),
    }


def _until(moment: Floats, ended: Floats) -> Floats:
    found: Floats = np.where(np.isnan(moment), ended, moment)
    return found


def sum_up(attempts: Mapping[str, Any], requests: int) -> dict[str, Any]:
    """What attempts, sorted by request and number, tell of their requests.

    Tokens are those of the answer that the client got: the last attempt's, and of those that it continued what they
    delivered; the prompt is the first one's, for later prompts hold what was generated before.
    """
    r = attempts["r"]
    count = np.bincount(r, minlength=requests).astype(np.int64)
    has = count > 0
    last = np.cumsum(count) - 1
    start = np.cumsum(count) - count
    anew = np.flatnonzero(attempts["is_continued"] <= 0)
    np.maximum.at(start, r[anew], anew)

    def of(name: str, row: Ints, missing: Any) -> Any:
        values = attempts[name]
        return np.where(has, values[np.where(has, row, 0)], missing) if len(values) else np.full(requests, missing)

    told = {"engine": of("engine", last, NONE), "slot": of("slot", last, NONE), "gpu": of("gpu", last, NONE)}
    first = np.where(of("cached", start, 0) + of("computed", start, 0) > 0, start, last)
    cached, computed = of("cached", first, 0), of("computed", first, 0)
    is_before = (np.arange(len(r)) >= start[r]) & (np.arange(len(r)) < last[r])
    before = np.bincount(r[is_before], attempts["delivered"][is_before], minlength=requests)
    waits = np.nan_to_num(attempts["route_s"]) + np.nan_to_num(attempts["queue_s"])
    waited = np.bincount(r, waits, minlength=requests)
    return {
        **{name: column.astype(np.int64) for name, column in told.items()},
        "attempts": count,
        "cached": cached.astype(np.int64),
        "computed": computed.astype(np.int64),
        "prompt": (cached + computed).astype(np.int64),
        "generated": (before + of("generated", last, 0)).astype(np.int64),
        "queue_s": np.where(has, waited, np.nan),
    }


def build_spans(requests: Mapping[str, Any], attempts: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """All spans: the requests' (row r), then the others that rows of requests and attempts make, then `own`."""
    n, r = len(requests["r"]), attempts["r"]
    sent, ended = attempts["sent_s"], attempts["ended_s"]
    has_client = ~np.isnan(sent)
    client = np.where(has_client, n + np.cumsum(has_client) - 1, NONE)
    slot_at, first_at = attempts["headers_s"], attempts["first_s"]
    below: list[tuple[int, Ints, Floats, Floats]] = [
        (ATTEMPT, r, sent, ended),
        (ROUTE, r, attempts["asked_s"], attempts["asked_s"] + attempts["route_s"]),
        (QUEUE, client, sent, sent + attempts["queue_s"]),
        (PREFILL, client, slot_at, slot_at + attempts["prefill_s"]),
        (DECODE, client, first_at, ended),
    ]
    parts = [_of_requests(requests, np.full(n, NONE, np.int64))]
    for name, parent, start, end in below:
        keep = np.flatnonzero(~np.isnan(start) & ~np.isnan(end) & (parent >= 0))
        times = {"parent": parent[keep], "start_s": start[keep], "end_s": end[keep]}
        parts.append(times | _of_attempts(requests["trace"], attempts, name, keep))
    made = sum(len(part["r"]) for part in parts)
    k = len(own["span"])
    ids = np.concatenate([requests["span"], attempts["span"], own["span"]])
    rows = np.concatenate([np.arange(n), client, made + np.arange(k)])
    parts[0]["parent"] = _rows(rows, find(ids, requests["parent"]))
    parent = _rows(rows, find(ids, np.where(own["parent"] == own["span"], 0, own["parent"])))
    parts.append(
        {name: own[name] for name in ("trace", "name", "start_s", "end_s", "error", "engine")}
        | {"parent": parent, **{name: np.full(k, NONE, np.int64) for name in ("r", "a", "slot")}}
    )
    spans = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    spans["end_s"] = np.maximum(spans["end_s"], spans["start_s"])
    return {"s": np.arange(made + k), **spans}


def _rows(rows: Ints, at: Ints) -> Ints:
    found: Ints = np.where(at >= 0, rows[at], NONE) if len(rows) else at
    return found


def _of_requests(requests: Mapping[str, Any], nowhere: Ints) -> dict[str, Any]:
    return {
        "parent": nowhere,
        "trace": requests["trace"],
        "r": requests["r"],
        "a": nowhere,
        "name": np.full(len(nowhere), REQUEST, np.int64),
        "start_s": requests["arrived_s"],
        "end_s": requests["ended_s"],
        "error": requests["error"],
        "engine": nowhere,
        "slot": nowhere,
    }


def _of_attempts(traces: Ints, attempts: Mapping[str, Any], name: int, keep: Ints) -> dict[str, Any]:
    nothing = np.full(len(keep), NONE, np.int64)
    told = {column: attempts[column][keep] for column in ("r", "a", "engine", "slot", "error")}
    error = told["error"] if name == ATTEMPT else nothing
    return told | {"trace": traces[told["r"]], "name": np.full(len(keep), name, np.int64), "error": error}
