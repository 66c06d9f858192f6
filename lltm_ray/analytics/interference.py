"""Who stalled whom: long prefills against the decodes of others, on one engine and on engines that share a GPU.

llama-server computes prompts and replies in one batch: while a long prompt is read, replies beside it get their next
token late. When each token came is not known, but whole replies tell what they lost: the seconds of a decode are
a + b * busy slots for each token, and on top a ratio of the seconds in which long prefills ran beside it. A robust
regression for each engine finds the ratio. Prefills that run at once answer for equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics.answer import MOST_EVIDENCE, Answer, Finding, rows, table
from lltm_ray.analytics.fit import fit_groups
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.occupancy import read_held
from lltm_ray.analytics.overlaps import Intervals, Timeline, count_overlaps
from lltm_ray.analytics.readings import sums
from lltm_ray.analytics.trace import Trace

NAME = "interference"
LONG_PREFILL_TOKENS = 512
"""Uncached prompt tokens from which a prefill counts as long: llama.cpp's default n_ubatch, one pass of the model."""
LONG_PREFILL_STEPS = 50
"""One of fewer tokens is long, too, if it took as long as so many tokens of a reply."""
_LEAST_TOKENS = 8
"""Of a reply that a pace is read from: what a shorter one took is mostly its start."""
_CLEAR, _LEAST_RATIO = 4.0, 1e-3
"""Standard errors, and ratio, below which an engine's ratio is taken for none."""
_LEAST_STALLED_S = 1e-3
"""Of a prefill, or of an answer: less is rounding."""
_TOP_AGGRESSORS, _TOP_TENANTS = 50, 5

LEAST_SHARE = 0.05
"""Of the decode seconds of its engines that a tenant must have stalled: less is what any mixed load has."""
LEAST_CONCENTRATION = 3.0
"""Odds that a stalled second is a tenant's over the odds that a request is: below it, it is the load, and no tenant. Of
a tenant with a tenth of the requests this asks for a quarter of the seconds, of one with half of them for three."""
MOST_OF = 0.5
"""A tenant's part of all stalled seconds from which it is named where the load is blamed."""
LEAST_SHARE_OF_ALL = 0.2
"""Of all decode seconds, before the load as a whole is worth a word."""
LEAST_SIGMA = 4.0
"""Standard errors that the stalled seconds must be above zero."""
LEAST_SECONDS, LEAST_VICTIMS = 5.0, 10
"""Victims of a tenant; where the load as a whole is worth a word, whoever sends most of it is named in any case."""
_ADVICE = (
    "Lower engine.n_batch (to engine.n_ubatch), so that replies get a token in between more often, or give long "
    "prompts engines of their own: another [[models]] entry of the same model under its own served_name"
)


@dataclass(frozen=True, slots=True)
class Lines:
    """Decodes, prefills and busy slots, beside each other."""

    own: Timeline
    """By engine."""
    shared: Timeline
    """By GPU, without busy slots."""
    lost: Intervals
    """Decodes, by engine."""
    on_gpu: Intervals
    """The same, by GPU."""


@dataclass(frozen=True, slots=True)
class Stalls:
    """What long prefills cost."""

    decodes: Frame
    """r, engine, reach, start_s, end_s; beside_s: seconds with a long prefill on the same engine; elsewhere_s: seconds
    of those on other engines of its GPU, added up; stalled_s."""
    prefills: Frame
    """r, engine, reach, start_s, end_s, computed; stalled_s: of others' decodes."""
    engines: Frame
    """engine, gpu; reach: a number that engines share whose prefills are felt by each other's decodes; beside_ratio,
    elsewhere_ratio: stalled seconds in each of those seconds, 0 where that is not clear; beside_error, elsewhere_error:
    their standard errors."""
    lines: Lines


def analyze(trace: Trace) -> Answer:
    """Tables `engines`, `aggressors`, `tenants`; figures `stalled_s`, `decode_s`, `share`, `long_prefills`."""
    stalls = find_stalls(trace)
    engines = _by_engine(trace, stalls)
    stalled_s, decode_s = float(engines["stalled_s"].sum()), float(engines["decode_s"].sum())
    figures = {
        "stalled_s": stalled_s,
        "stalled_error_s": float(engines["error_s"].sum()),
        "decode_s": decode_s,
        "share": stalled_s / (decode_s or 1.0),
        "long_prefills": float(len(stalls.prefills)),
    }
    tables = {"engines": engines, "aggressors": _aggressors(trace, stalls), "tenants": _tenants(trace, stalls)}
    return Answer(tables, figures)


def judge(answer: Answer) -> list[Finding]:
    """A tenant whose prompts stall others; or the load as a whole."""
    figures = answer.figures
    is_clear = figures["stalled_s"] > max(LEAST_SIGMA * figures["stalled_error_s"], LEAST_SECONDS)
    is_much = is_clear and figures["share"] >= LEAST_SHARE_OF_ALL
    least = 1 if is_much else LEAST_VICTIMS
    tenants = [row for row in rows(answer.tables["tenants"]) if row.victims >= least and _is_aggressor(row)]
    if tenants:
        return [_of_tenant(row) for row in tenants]
    return [_of_all(answer)] if is_much else []


# --- seconds


def find_stalls(trace: Trace) -> Stalls:
    """Seconds that long prefills took from decodes, by those who lost and by those who took them."""
    xp, column, make = trace.engine.xp, trace.engine.array, trace.engine.frame
    decodes, prefills = _decodes(trace), _prefills(trace)
    lost, took = _intervals(trace, decodes), _intervals(trace, prefills)
    held = read_held(trace)
    own = Timeline(xp, {"decode": lost, "prefill": took, "busy": (held.engine, held.slot, held.ended)})
    gpus = _gpus(trace)
    on_gpu, took_gpu = (gpus[lost[0]], *lost[1:]), (gpus[took[0]], *took[1:])
    shared = Timeline(xp, {"decode": on_gpu, "prefill": took_gpu})
    lines, running = Lines(own, shared, lost, on_gpu), own.level("prefill")
    beside = own.within((running > 0) * 1.0, *lost)
    elsewhere = _elsewhere(xp, lines)
    ratio, error = _ratios(trace, decodes, lost, (own, beside, elsewhere))
    by_beside, by_elsewhere = ratio[:, 0][lost[0]], ratio[:, 1][lost[0]]
    took_s = own.within(own.level("decode", by_beside) * (running > 0) / xp.maximum(running, 1.0), *took)
    wide_s = shared.within(shared.level("decode", by_elsewhere), *took_gpu)
    took_s = took_s + xp.maximum(wide_s - own.within(own.level("decode", by_elsewhere), *took), 0.0)
    seconds = {"beside_s": beside, "elsewhere_s": elsewhere}
    ratios = {"beside_ratio": ratio[:, 0], "elsewhere_ratio": ratio[:, 1]}
    reach = _reach(trace, gpus, ratio)
    errors = {"beside_error": error[:, 0], "elsewhere_error": error[:, 1]}
    told = {"computed": column(prefills["computed"]), "stalled_s": took_s}
    lost_s = by_beside * beside + by_elsewhere * elsewhere
    return Stalls(
        make(_columns(trace, decodes, lost) | {"reach": reach[lost[0]]} | seconds | {"stalled_s": lost_s}),
        make(_columns(trace, prefills, took) | {"reach": reach[took[0]]} | told),
        make({"engine": xp.arange(len(gpus)), "gpu": _real(trace, gpus), "reach": reach} | ratios | errors),
        lines,
    )


def _elsewhere(xp: Any, lines: Lines, weight: Array | None = None) -> Array:
    """Seconds of each decode with prefills on other engines of its GPU, added up, or the sum of their weights."""
    wide = lines.shared.within(lines.shared.level("prefill", weight), *lines.on_gpu)
    found = wide - lines.own.within(lines.own.level("prefill", weight), *lines.lost)
    return xp.where(found > 1e-6, found, 0.0)  # less is rounding


def _ratios(
    trace: Trace, decodes: Frame, lost: Intervals, seconds: tuple[Timeline, Array, Array]
) -> tuple[Array, Array]:
    """Stalled seconds a second (beside, elsewhere) of each engine, and their standard errors."""
    xp = trace.engine.xp
    engine, start, end = lost
    own, beside, elsewhere = seconds
    generated = trace.engine.array(decodes["generated"]) * 1.0
    busy = own.mean(own.level("busy"), *lost)
    terms = (generated, generated * xp.maximum(busy - 1.0, 0.0), beside, elsewhere)
    fit = fit_groups(xp, engine, len(trace.names.engine), terms, end - start, 1.0 / xp.maximum(generated, 1.0))
    ratio, error = xp.minimum(xp.maximum(fit.terms[:, 2:], 0.0), 1.0), fit.errors[:, 2:]
    return xp.where(ratio > xp.maximum(_CLEAR * error, _LEAST_RATIO), ratio, 0.0), error


def _decodes(trace: Trace) -> Frame:
    """Attempts whose pace can be read."""
    each = trace.attempts
    keep = (each["engine"] >= 0) & (each["generated"] >= _LEAST_TOKENS) & (each["decode_s"] > 0) & (each["error"] < 0)
    found = each[["r", "engine", "first_s", "ended_s", "generated"]][keep]
    return found.rename(columns={"first_s": "start_s", "ended_s": "end_s"}).reset_index(drop=True)


def _prefills(trace: Trace) -> Frame:
    """Attempts whose prefill was long."""
    each = trace.attempts
    paced = each[["decode_s", "generated"]][(each["generated"] >= _LEAST_TOKENS) & (each["decode_s"] > 0)]
    step_s = float((paced["decode_s"] / paced["generated"]).median()) if len(paced) else 0.0
    is_slow = (each["computed"] > 0) & (each["prefill_s"] >= LONG_PREFILL_STEPS * step_s)
    is_long = (each["computed"] >= LONG_PREFILL_TOKENS) | is_slow
    keep = is_long & (each["engine"] >= 0) & (each["prefill_s"] > 0) & each["first_s"].notna()
    found = each[["r", "engine", "headers_s", "first_s", "computed"]][keep]
    return found.rename(columns={"headers_s": "start_s", "first_s": "end_s"}).reset_index(drop=True)


def _intervals(trace: Trace, frame: Frame, group: str = "engine") -> Intervals:
    column = trace.engine.array
    return column(frame[group]), column(frame["start_s"]), column(frame["end_s"])


def _columns(trace: Trace, frame: Frame, intervals: Intervals) -> dict[str, Array]:
    names = ("engine", "start_s", "end_s")
    return {"r": trace.engine.array(frame["r"]), **dict(zip(names, intervals, strict=True))}


def _gpus(trace: Trace) -> Array:
    """Engine -> number of its first GPU; one of its own beyond all GPUs, where it has none that we know."""
    xp, gpus, engines = trace.engine.xp, len(trace.names.gpu), len(trace.names.engine)
    found = gpus + xp.arange(engines)
    known = trace.engines[trace.engines["gpu"] >= 0].sort_values(["engine", "gpu"]).drop_duplicates("engine")
    found[trace.engine.array(known["engine"])] = trace.engine.array(known["gpu"])
    return found


def _reach(trace: Trace, gpus: Array, ratio: Array) -> Array:
    """Engines of a GPU go together if any of them feels the others."""
    xp, alone = trace.engine.xp, len(trace.names.gpu) + trace.engine.xp.arange(len(gpus))
    felt = xp.bincount(gpus, weights=ratio[:, 1], minlength=len(trace.names.gpu) + len(gpus))
    return xp.where(felt[gpus] > 0, gpus, alone)


def _real(trace: Trace, gpus: Array) -> Array:
    return trace.engine.xp.where(gpus < len(trace.names.gpu), gpus, -1)


# --- tables


def _by_engine(trace: Trace, stalls: Stalls) -> Any:
    host = trace.engine.host
    each = stalls.decodes.assign(decode_s=stalls.decodes["end_s"] - stalls.decodes["start_s"])
    totals = dict.fromkeys(("stalled_s", "decode_s", "beside_s", "elsewhere_s"), "sum")
    found = host(each.groupby("engine", sort=True).agg(totals).reset_index())
    found = found.merge(host(stalls.engines), on="engine", how="inner")
    error_s = found["beside_error"] * found["beside_s"] + found["elsewhere_error"] * found["elsewhere_s"]
    return table(
        {
            "engine": trace.names.decode("engine", found["engine"]),
            "gpu": trace.names.decode("gpu", found["gpu"]),
            "stalled_s": found["stalled_s"],
            "decode_s": found["decode_s"],
            "share": found["stalled_s"] / found["decode_s"],
            "error_s": error_s.where(found["stalled_s"] > 0, 0.0),
            "reach": found["reach"],
            "beside_s": found["beside_s"],
            "beside_ratio": found["beside_ratio"],
            "elsewhere_ratio": found["elsewhere_ratio"],
        }
    )


def _aggressors(trace: Trace, stalls: Stalls) -> Any:
    top = stalls.prefills[stalls.prefills["stalled_s"] >= _LEAST_STALLED_S].sort_values(
        ["stalled_s", "r"], ascending=[False, True]
    )
    top = top.head(_TOP_AGGRESSORS).reset_index(drop=True)
    xp, host, each = trace.engine.xp, trace.engine.host, stalls.decodes
    victims = count_overlaps(xp, _intervals(trace, top, "reach"), _intervals(trace, each, "reach"))
    found = host(top.assign(victims=victims).merge(trace.requests[["r", "tenant"]], on="r", how="inner"))
    found = found.sort_values(["stalled_s", "r"], ascending=[False, True])
    ids = trace.evidence(found["r"])
    return table(
        {
            "trace_id": list(ids),
            "request_id": [trace.request_id(r) for r in found["r"]],
            "tenant": trace.names.decode("tenant", found["tenant"]),
            "engine": trace.names.decode("engine", found["engine"]),
            "prefill_tokens": found["computed"].to_numpy(),
            "prefill_s": (found["end_s"] - found["start_s"]).to_numpy(),
            "victims": found["victims"].to_numpy(),
            "stalled_s": found["stalled_s"].to_numpy(),
            "evidence": [(each,) for each in ids],
        }
    )


def _tenants(trace: Trace, stalls: Stalls) -> Any:
    """The worst few by all that their prefills stalled, with what `judge` weighs.

    `stalled_s`, `share`, `error_s`, `engines` and `victims` are about answers of others alone; `stalled_part` is the
    tenant's part of all stalled seconds, `request_part` that of all requests.
    """
    host, column, requests = trace.engine.host, trace.engine.array, trace.requests[["r", "tenant"]]
    took = stalls.prefills[stalls.prefills["stalled_s"] >= _LEAST_STALLED_S].merge(requests, on="r", how="inner")
    totals = took.groupby("tenant", sort=True).agg({"stalled_s": "sum", "r": "count"}).reset_index()
    worst = host(totals.sort_values(["stalled_s", "tenant"], ascending=[False, True]).head(_TOP_TENANTS))
    tokens = host(trace.engine.quantiles(took, ["tenant"], "computed", [0.5]))
    asked = host(requests.groupby("tenant", sort=True).agg({"r": "count"}).reset_index())
    tokens_of, asked_of = _dict(tokens, "tenant", "q50"), _dict(asked, "tenant", "r")
    codes = worst["tenant"].tolist()
    whose = column(requests["tenant"])
    of = tuple(whose[column(frame["r"])] for frame in (stalls.decodes, stalls.prefills))
    found = [_tenant(trace, stalls, of, code) for code in codes]
    whole = float(took["stalled_s"].sum()) or 1.0
    return table(
        {
            "tenant": trace.names.decode("tenant", codes),
            "requests": worst["r"].to_numpy(),
            **{name: [each[name] for each in found] for name in _OTHERS},
            "tokens_p50": [tokens_of[code] for code in codes],
            "stalled_part": worst["stalled_s"].to_numpy() / whole,
            "request_part": [asked_of[code] / len(requests) for code in codes],
            "evidence": [_evidence(trace, took[took["tenant"] == code]) for code in codes],
        }
    )


_OTHERS = ("stalled_s", "share", "error_s", "engines", "victims")


def _dict(frame: Any, key: str, value: str) -> dict[int, Any]:
    return dict(zip(frame[key].tolist(), frame[value].tolist(), strict=True))


def _tenant(trace: Trace, stalls: Stalls, of: tuple[Array, ...], code: int) -> dict[str, Any]:
    """What one tenant's prefills stalled of others' decodes; its share of the decode time of these, and its error."""
    xp, column, lines = trace.engine.xp, trace.engine.array, stalls.lines
    decodes, mine = of[0], (of[1] == code) * 1.0
    engine, start, end = lines.lost
    own = lines.own
    beside = own.within(own.level("prefill", mine) / xp.maximum(own.level("prefill"), 1.0), *lines.lost)
    seconds = {"beside": beside, "elsewhere": _elsewhere(xp, lines, mine)}
    stalled, error = (
        sum(column(stalls.engines[f"{name}_{what}"])[engine] * each for name, each in seconds.items())
        for what in ("ratio", "error")
    )
    is_hit, engines = (decodes != code) & (stalled >= _LEAST_STALLED_S), len(trace.names.engine)
    by_engine = sums(xp, engine, xp.where(is_hit, stalled, 0.0), engines)
    is_there = (decodes != code) & (by_engine > 0)[engine]
    stalled_s, decode_s = float(by_engine.sum()), float(((end - start) * is_there).sum())
    told = trace.engine.host(trace.engine.frame({"engine": xp.arange(engines), "stalled_s": by_engine}))
    told = told[told["stalled_s"] > 0].sort_values(["stalled_s", "engine"], ascending=[False, True])
    return {
        "stalled_s": stalled_s,
        "share": stalled_s / (decode_s or 1.0),
        "error_s": float((error * is_hit).sum()),
        "engines": tuple(trace.names.decode("engine", told["engine"])),
        "victims": int(is_hit.sum()),
    }


def _evidence(trace: Trace, took: Frame) -> tuple[str, ...]:
    """The prefills that stalled most."""
    worst = took.sort_values(["stalled_s", "r"], ascending=[False, True]).head(MOST_EVIDENCE)
    return trace.evidence(trace.engine.host(worst)["r"])


# --- findings


def _is_aggressor(row: Any) -> bool:
    return bool(
        row.share >= LEAST_SHARE
        and _odds(row.stalled_part) >= LEAST_CONCENTRATION * _odds(row.request_part)
        and row.stalled_s >= max(LEAST_SECONDS, LEAST_SIGMA * row.error_s)
    )


def _odds(part: float) -> float:
    return part / max(1.0 - part, 1e-9)


def _of_tenant(row: Any) -> Finding:
    who = f"tenant {row.tenant}" if row.tenant else "requests without a tenant"
    return Finding(
        kind="interference",
        subject=row.tenant,
        text=f"prefills of {who} (p50 {row.tokens_p50:,.0f} tokens to compute) held up {row.victims:,} answers of "
        f"others on {_several(row.engines)} for {row.stalled_s:,.0f} s in all ({row.share:.0%} of their decode time)",
        advice=f"{_ADVICE}, for {who}.",
        impact_s=float(row.stalled_s),
        figures={"share": row.share, "requests": row.requests, "tokens_p50": row.tokens_p50, "error_s": row.error_s},
        evidence=tuple(row.evidence),
    )


def _of_all(answer: Answer) -> Finding:
    figures, worst = answer.figures, answer.tables["aggressors"]
    engines = answer.tables["engines"].sort_values("stalled_s", ascending=False)["engine"].tolist()
    return Finding(
        kind="interference",
        subject="long prefills",
        text=f"{figures['long_prefills']:,.0f} long prefills held up other answers on {_several(engines)} for "
        f"{figures['stalled_s']:,.0f} s in all ({figures['share']:.0%} of the decode time); {_whose(answer)}",
        advice=f"{_ADVICE}; or add engines (--engines).",
        impact_s=figures["stalled_s"],
        figures=dict(figures),
        evidence=tuple(worst["trace_id"][:MOST_EVIDENCE]),
    )


def _whose(answer: Answer) -> str:
    tenants = list(rows(answer.tables["tenants"]))
    if not any(row.tenant for row in tenants):
        return "requests name no tenant"
    worst = tenants[0]
    if worst.stalled_part < MOST_OF:
        return "no one tenant sends them"
    who = f"tenant {worst.tenant} sends" if worst.tenant else "requests without a tenant bring"
    return f"{who} {worst.stalled_part:.0%} of that, and {worst.request_part:.0%} of all requests"


def _several(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
