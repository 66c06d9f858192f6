"""What GPUs did while engines prefilled and decoded: energy, utilization, and what throttling cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lltm_ray.analytics.answer import MOST_EVIDENCE, Answer, Finding, rows, table
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.occupancy import read_held
from lltm_ray.analytics.overlaps import Intervals, Timeline
from lltm_ray.analytics.readings import THROTTLES, Readings, sums
from lltm_ray.analytics.trace import Trace, nanos
from lltm_ray.analytics.units import clock, digits, percent, seconds

NAME = "GPU and energy"
_LEAST_TOKENS = 4
"""Of a reply that a pace is read from."""
_HOT, _COOL = 0.5, 0.05
"""Throttled share of a decode from which it counts as throttled, and up to which as not."""
_LEAST_CLEAR = 10
"""Decodes that a pace without throttling is read from."""
_ALL = sum(THROTTLES.values())
_LEVELS = 1024
"""Busy slots that paces are told apart by; more count as so many."""
_MEDIAN_ERROR = 1.2533 / 1.349
"""A median's standard error, times the root of the count, over the distance of the quartiles; normal distribution."""

LEAST_SHARE = 0.02
"""Of the time its GPU was looked at: throttling for seconds of an hour is no news."""
LEAST_RATIO = 1.15
"""Slower than this must its decodes be: a busy GPU at its power limit is often shown as throttled, and loses little."""
LEAST_SIGMA = 4.0
"""Standard errors by which decodes must be slower at all."""
LEAST_REPLIES = 20
"""Throttled ones."""
LEAST_LOST_S = 2.0
DRAIN_RATIO = 1.5
"""From here on its engines hold requests up more than they serve: others had better take them."""

_SLOW = ("straggler", "slower engine", "slow requests")
"""Findings of engines that count the same seconds."""

_GPUS = (
    *("gpu", "node", "engines", "joules", "generated", "joules_per_token", "utilization_prefill"),
    *("utilization_decode", "throttled_s", "throttled_share", "reasons", "reason", "since_unix_nano"),
    *("until_unix_nano", "is_over", "slowed_ratio", "slowed_low", "slowed_replies", "compared_with"),
    *("decode_ms_token", "lost_s", "memory_high_bytes", "temperature_high_c", "evidence"),
)
_NOT_SLOWED: Mapping[str, Any] = {
    **dict.fromkeys(("slowed_ratio", "slowed_low", "decode_ms_token"), math.nan),
    "slowed_replies": 0,
    "compared_with": "",
    "lost_s": 0.0,
    "evidence": (),
}


def analyze(trace: Trace) -> Answer:
    """Tables `gpus`, `track`; figures `joules`, `generated`, `joules_per_token`, `throttled_s`, `lost_s`.

    `generated` are tokens generated between a GPU's first and last reading; an engine on several GPUs counts for each
    of them with an equal part, so that sums over GPUs are right. `utilization_*` are means over the phases' seconds,
    all attempts together. `slowed_ratio`, and `slowed_low`, its lower bound: see `paces`.
    """
    readings, attempts = Readings(trace), on_gpus(trace)
    gpus = _table(trace, readings, attempts)
    tokens = trace.engine.array(attempts["generated"] * attempts["part"] / attempts["decode_s"].clip(lower=1e-9))
    joules, generated = float(gpus["joules"].sum()), float(gpus["generated"].sum())
    return Answer(
        {"gpus": gpus, "track": readings.track(_over(trace, attempts, "first_s", "ended_s"), tokens)},
        {
            "joules": joules,
            "generated": generated,
            "joules_per_token": joules / generated if generated else math.nan,
            "throttled_s": float(gpus["throttled_s"].sum()),
            "lost_s": float(gpus["lost_s"].sum()),
        },
    )


def on_gpus(trace: Trace) -> Frame:
    """Attempts with phases, once for each GPU of their engine.

    Returns:
        a, r, engine, model, gpu, device: the GPU's product; generated, error, decode_s; slot_s, first_s, ended_s: the
        phases' borders; part: 1 over the number of its engine's GPUs.
    """
    attempts = trace.attempts
    attempts = attempts[attempts["decode_s"].notna() & (attempts["engine"] >= 0)].reset_index(drop=True)
    kept = attempts[["a", "r", "engine", "model", "generated", "error", "decode_s", "ended_s"]].copy()
    kept["slot_s"] = attempts["sent_s"] + attempts["queue_s"]
    kept["first_s"] = attempts["ended_s"] - attempts["decode_s"]
    places = _places(trace)
    count = places.groupby("engine", sort=False).agg({"gpu": "count"}).reset_index().rename(columns={"gpu": "gpus"})
    joined = kept.merge(places.merge(count, on="engine", how="inner"), on="engine", how="inner")
    joined["part"] = 1.0 / joined["gpus"]
    return joined.sort_values(["a", "gpu"]).reset_index(drop=True)


def _places(trace: Trace) -> Frame:
    """engine, gpu, device: of each engine, all of its GPUs."""
    return trace.engines[trace.engines["gpu"] >= 0][["engine", "gpu", "device"]].drop_duplicates()


def _over(trace: Trace, attempts: Frame, start: str, end: str) -> tuple[Array, Array, Array]:
    first, gpu, last = (trace.engine.array(attempts[name]) for name in (start, "gpu", end))
    return gpu, first, trace.engine.xp.maximum(last, first)


def paces(trace: Trace, readings: Readings, attempts: Frame) -> Frame:
    """Decodes' seconds a token against those of comparable ones that no throttling touched.

    Comparable are decodes of the same engine while as many slots of its GPU were busy (rounded) on average. Where fewer
    than `_LEAST_CLEAR` of them were not throttled, those of all engines of its model on GPUs of the same product; but
    not for a decode that only the power cap throttled: under load, some GPUs are at theirs all the time.

    Returns:
        Columns of `attempts`, and throttled: share of the decode; pace; clear_pace: median of the comparable ones, NaN
        for none; is_own: 1 where they are of the same engine.
    """
    xp, fine = trace.engine.xp, attempts[(attempts["generated"] >= _LEAST_TOKENS) & (attempts["error"] < 0)]
    fine = fine[fine["decode_s"] > 0].reset_index(drop=True)
    over = _over(trace, fine, "first_s", "ended_s")
    hot, looked = readings.within(readings.throttled(), over)
    hard, _ = readings.within(readings.throttled(_ALL & ~THROTTLES["power cap"]), over)
    busy = Timeline(xp, {"busy": _held_on_gpus(trace)})
    frame = fine.assign(
        throttled=xp.where(looked > 0, hot / xp.maximum(looked, 1e-9), float("nan")),
        is_hard=(hard >= _HOT * looked) * 1,
        beside=xp.minimum(xp.rint(busy.mean(busy.level("busy"), *over)), _LEVELS).astype("int64"),
        pace=fine["decode_s"] / fine["generated"],
    )
    worst = frame.groupby("a", sort=False).agg({"throttled": "max", "gpu": "min"}).reset_index()
    frame = frame.merge(worst.rename(columns={"throttled": "worst", "gpu": "one"}), on="a", how="inner")
    clear = frame[(frame["worst"] <= _COOL) & (frame["gpu"] == frame["one"])]
    for by, name in ((("engine", "beside"), "own"), (("model", "device", "beside"), "peers")):
        found = trace.engine.quantiles(clear, by, "pace", (0.5,))
        found = found[found["count"] >= _LEAST_CLEAR][[*by, "q50"]].rename(columns={"q50": name})
        frame = frame.merge(found, on=list(by), how="left")
    has_peers = (frame["device"] >= 0) & (frame["is_hard"] > 0)
    frame["peers"] = frame["peers"].where(has_peers, float("nan"))
    frame["clear_pace"] = frame["own"].where(frame["own"].notna(), frame["peers"])
    frame["is_own"] = frame["own"].notna().astype("float64")
    return frame.sort_values(["a", "gpu"]).reset_index(drop=True)


def _held_on_gpus(trace: Trace) -> Intervals:
    """Slots that attempts held, on each GPU of their engine: engines that share one slow each other down."""
    column, held = trace.engine.array, read_held(trace)
    told = trace.engine.frame({"engine": held.engine, "slot": held.slot, "ended": held.ended})
    placed = told.merge(_places(trace), on="engine", how="inner")
    return column(placed["gpu"]), column(placed["slot"]), column(placed["ended"])


# --- the table of GPUs


def _table(trace: Trace, readings: Readings, attempts: Frame) -> Any:
    xp, count = trace.engine.xp, readings.gpus
    gpu = trace.engine.array(attempts["gpu"])
    columns = {"gpu": xp.arange(count), "generated": sums(xp, gpu, _tokens(trace, readings, attempts), count)}
    columns["throttled_s"], columns["known_s"] = readings.integral(readings.throttled())
    for name, bit in THROTTLES.items():
        columns[name], _ = readings.integral(readings.throttled(bit))
    (by, _, _), joules = readings.energy()
    columns["joules"] = sums(xp, by, joules, count)
    for phase, start, end in (("prefill", "slot_s", "first_s"), ("decode", "first_s", "ended_s")):
        area, looked = readings.within(readings.meter("utilization"), _over(trace, attempts, start, end))
        area, looked = sums(xp, gpu, area, count), sums(xp, gpu, looked, count)
        columns[f"utilization_{phase}"] = xp.where(looked > 0, area / xp.maximum(looked, 1e-9), float("nan"))
    host = readings.highest().merge(trace.engine.host(trace.engine.frame(columns)), on="gpu")
    engines: dict[int, list[str]] = {}
    for row in rows(trace.engine.host(trace.engines)):
        engines.setdefault(int(row.gpu), []).append(trace.names.of("engine", row.engine))
    stretches = readings.longest_throttled()
    slowed = _slowed(trace, readings, attempts) if stretches else {}
    _, last = readings.span()
    told: dict[str, list[Any]] = {name: [] for name in _GPUS}
    for row in host.sort_values("gpu").to_dict("records"):
        code = int(row["gpu"])
        one = row | _told(trace, row) | slowed.get(code, _NOT_SLOWED)
        one |= {"engines": ", ".join(engines.get(code, ()))}
        one |= _stretch(trace, *stretches.get(code, (math.nan, math.nan)), float(last[code]))
        for name in _GPUS:
            told[name].append(one[name])
    return table(told)


def _tokens(trace: Trace, readings: Readings, attempts: Frame) -> Array:
    """Of each attempt, generated while its GPU was being read."""
    xp, (begin, last) = trace.engine.xp, readings.span()
    gpu, first, ended = _over(trace, attempts, "first_s", "ended_s")
    seen = xp.minimum(ended, last[gpu]) - xp.maximum(first, begin[gpu])
    whole = xp.maximum(ended - first, 1e-9)
    return trace.engine.array(attempts["generated"] * attempts["part"]) * xp.minimum(xp.maximum(seen, 0.0) / whole, 1.0)


def _told(trace: Trace, row: Mapping[str, Any]) -> Mapping[str, Any]:
    reasons = sorted((name for name in THROTTLES if row[name] > 0), key=lambda name: -row[name])
    return {
        "gpu": trace.names.of("gpu", row["gpu"]),
        "node": trace.names.of("node", row["node"]),
        "joules_per_token": row["joules"] / row["generated"] if row["generated"] else math.nan,
        "throttled_share": row["throttled_s"] / row["known_s"] if row["known_s"] else math.nan,
        "reasons": ", ".join(f"{name} {seconds(row[name])}" for name in reasons),
        "reason": reasons[0] if reasons else "",
        "memory_high_bytes": row["memory_used_bytes"] if row["memory_used_bytes"] >= 0 else math.nan,
        "temperature_high_c": row["temperature_c"] if row["temperature_c"] >= 0 else math.nan,
    }


def _stretch(trace: Trace, start: float, end: float, last: float) -> Mapping[str, Any]:
    is_none = math.isnan(start)
    return {
        "since_unix_nano": 0 if is_none else nanos(trace, start),
        "until_unix_nano": 0 if is_none else nanos(trace, end),
        "is_over": not end >= last,
    }


def _slowed(trace: Trace, readings: Readings, attempts: Frame) -> Mapping[int, Mapping[str, Any]]:
    """GPU -> what throttling did to decodes there."""
    engine, known = trace.engine, paces(trace, readings, attempts)
    known = known[(known["throttled"] >= _HOT) & known["clear_pace"].notna()].reset_index(drop=True)
    known["log_ratio"] = engine.xp.log(engine.array(known["pace"] / known["clear_pace"]))
    known["lost_s"] = known["decode_s"] - known["generated"] * known["clear_pace"]
    totals = {"lost_s": "sum", "is_own": "mean", "decode_s": "sum", "generated": "sum"}
    ratios = engine.host(engine.quantiles(known, ("gpu",), "log_ratio", (0.25, 0.5, 0.75)))
    ratios = ratios.merge(engine.host(known.groupby("gpu", sort=True).agg(totals).reset_index()), on="gpu")
    worst = known.sort_values(["lost_s", "a"], ascending=False).reset_index(drop=True)
    worst = worst[worst.groupby("gpu", sort=False).cumcount() < MOST_EVIDENCE]
    evidence = engine.host(worst[["gpu", "r"]])
    found = {}
    for row in rows(ratios):
        error = _MEDIAN_ERROR * (row.q75 - row.q25) / row.count**0.5
        found[int(row.gpu)] = {
            "slowed_ratio": math.exp(row.q50),
            "slowed_low": math.exp(row.q50 - LEAST_SIGMA * error),
            "slowed_replies": int(row.count),
            "compared_with": "itself" if row.is_own >= 0.5 else "peers",
            "decode_ms_token": 1e3 * row.decode_s / row.generated,
            "lost_s": max(row.lost_s, 0.0),
            "evidence": trace.evidence(evidence["r"][evidence["gpu"] == row.gpu]),
        }
    return found


# --- findings

_REMEDIES = {
    "thermal": "Cool it: look at its fans, its air's way and the room (`nvidia-smi -q -d TEMPERATURE -i {gpu}`); until "
    "then a lower power limit keeps its clock steady (`nvidia-smi -i {gpu} -pl WATTS`).",
    "power cap": "Raise its power limit if the machine's supply and cooling allow it (`nvidia-smi -q -d POWER -i {gpu}`"
    " shows the range, `nvidia-smi -i {gpu} -pl WATTS` sets it).",
    "power brake": "Its machine's power supply asks it to slow down: check the supply and what else draws on it.",
}
_REMEDY = "`nvidia-smi -q -d PERFORMANCE -i {gpu}` shows what holds its clocks down."


def judge(answer: Answer) -> list[Finding]:
    """`throttling`: GPUs whose engines decode slower while they are throttled."""
    gpus = answer.tables["gpus"]
    return [_finding(row, is_only=len(gpus) == 1) for row in rows(gpus) if _is_slowed(row)]


def _is_slowed(row: Any) -> bool:
    return bool(
        row.throttled_share >= LEAST_SHARE
        and row.slowed_ratio >= LEAST_RATIO
        and row.slowed_low > 1
        and row.slowed_replies >= LEAST_REPLIES
        and row.lost_s >= LEAST_LOST_S
    )


def _finding(row: Any, *, is_only: bool) -> Finding:
    when = f"since {clock(row.since_unix_nano)}"
    if row.is_over:
        when = f"at most from {clock(row.since_unix_nano)} to {clock(row.until_unix_nano)}"
    other = "when it is not" if row.compared_with == "itself" else "other engines of their model"
    kind = next((name for name in _REMEDIES if name in row.reason), "")
    advice = _REMEDIES.get(kind, _REMEDY).format(gpu=row.gpu)
    if row.slowed_ratio >= DRAIN_RATIO and not is_only:
        drains = ", ".join(f"`lltm-ray drain {name}`" for name in row.engines.split(", "))
        advice += f" Until it is mended, let others take its requests: {drains}."
    return Finding(
        kind="throttling",
        subject=row.gpu,
        text=(
            f"{row.gpu} was throttled ({row.reason}) in {percent(row.throttled_share)} of the window, {when}: "
            f"{row.engines} decode {digits(row.slowed_ratio)}x slower than {other} "
            f"({digits(row.decode_ms_token)} ms a token against {digits(row.decode_ms_token / row.slowed_ratio)}). "
            f"{row.slowed_replies} replies lost {seconds(row.lost_s)}."
        ),
        advice=advice,
        impact_s=row.lost_s,
        figures={
            name: float(getattr(row, name))
            for name in ("throttled_share", "throttled_s", "slowed_ratio", "slowed_low", "decode_ms_token", "lost_s")
        },
        explains=tuple((kind, name) for kind in _SLOW for name in row.engines.split(", ")),
        evidence=tuple(row.evidence),
    )
