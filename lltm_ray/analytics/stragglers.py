"""Which engine is slower than its peers at the same work, and since when.

Peers serve the same model on the same product of GPU. What a phase should take is fitted over all of them: for a decode
`tokens * (a + b * (busy - 1) + c * context)` and a ratio of the seconds that prefills ran beside it, for a prefill
`k + tokens * (a + b * others + c * context)`; context is the mean number of tokens before each one. What an attempt
took over that, as a logarithm, is its engine's pace then. Medians of it in time buckets, less those of the peers in the
same bucket, show runs of slow ones; the run with most behind it is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lltm_ray.analytics.fit import IQR_TO_SIGMA, MAD_TO_SIGMA
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.overlaps import Intervals, Timeline
from lltm_ray.analytics.paces import Paces
from lltm_ray.analytics.trace import Trace

SLOW = 1.2
"""Pace over the peers' from which a bucket counts as slow: noise of a bucket's median is a few percent."""
_MOST_BUCKETS, _BUCKET_ATTEMPTS = 60, 10
_FINER = 4
"""Into so many parts a bucket is cut to see whether an engine that is slow in the first one began so."""
_MANY_ENGINES = 32
_FIT_ROWS = 10_000
"""Attempts that peers' work is fitted to, taken evenly; more would not move it."""
_LEAST_IN_BUCKET = 3
"""Attempts, for a median to say anything."""
_DECODE_TOKENS, _PREFILL_TOKENS = 8, 64
"""Of attempts with fewer the start is most of the time."""
_MOST_STALLED = 0.7
"""Share of a decode beside prefills: above it, its own pace cannot be told."""
_CHANCE = 1e-3
"""Of a window without a straggler that one is told all the same."""
_MEDIAN_ERROR = 1.2533
"""Standard error of a median over that of a mean, where the noise is normal."""
_LEAST_SPREAD = 0.02
"""By so much engines differ that are all right."""

_COLUMNS = [
    *("r", "number", "engine", "model", "headers_s", "first_s", "ended_s"),
    *("prefill_s", "decode_s", "cached", "computed", "generated", "error"),
]
Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Run:
    """An engine's slowest time."""

    since_s: float
    until_s: float
    """Infinite: it lasts."""
    requests: int
    ratio: float
    z: float
    lost_s: float
    ms_token: float
    least_z: float = 0.0
    """Chance alone hardly ever makes a `z` above it."""
    is_since_ever: bool = False
    """It was never seen to be as fast as its peers before."""
    peers_ratio: float = 1.0
    """Pace of its peers over what work of all of them is expected to take."""


def device_of(trace: Trace) -> list[int]:
    """Engine code -> its GPU's product; -1: it has no GPU, or none that tells."""
    found = [-1] * len(trace.names.engine)
    homes = trace.engine.host(trace.engines[["engine", "device"]])
    for engine, device in zip(homes["engine"].tolist(), homes["device"].tolist(), strict=True):
        found[engine] = max(found[engine], device)
    return found


def peers_of(trace: Trace, engine: Array, model: Array) -> tuple[Array, list[tuple[int, int]]]:
    """Of each row a number that peers share, from 0 on; and what they have in common: model and product."""
    if not len(engine):
        return engine, []
    xp, products = trace.engine.xp, len(trace.names.device) + 1
    key = model * products + xp.asarray(device_of(trace))[engine] + 1
    used = xp.bincount(key) > 0
    pairs = [divmod(each, products) for each in xp.flatnonzero(used).tolist()]
    return (xp.cumsum(used * 1) - 1)[key], [(model, device - 1) for model, device in pairs]


def find_busy(trace: Trace) -> tuple[Frame, Array, Array]:
    """Attempts with a decode; the mean of their engine's busy slots in it, and its seconds beside prefills."""
    xp, column = trace.engine.xp, trace.engine.array
    each = _by_servers_clock(trace.attempts)
    is_held = (each["engine"] >= 0) & each["headers_s"].notna() & each["first_s"].notna()
    held = each[_COLUMNS][is_held].reset_index(drop=True)
    engine, start, first, end = (column(held[name]) for name in ("engine", "headers_s", "first_s", "ended_s"))
    end = xp.maximum(end, first)
    whole = _whole(trace)
    busy, reading = (
        tuple(xp.concatenate(both) for both in zip(each, whole, strict=True))
        for each in ((engine, start, end), (engine, start, first))
    )
    line = Timeline(xp, {"busy": busy, "prefill": reading})
    busy = line.within(line.level("busy"), engine, first, end) / xp.maximum(end - first, 1e-9)
    return held, xp.maximum(busy, 1.0), line.within((line.level("prefill") > 0) * 1.0, engine, first, end)


def _by_servers_clock(attempts: Frame) -> Frame:
    """Phases as llama-server told them: to a gateway that is late at reading, an answer of seconds comes at once."""
    known = (attempts["predicted_ms"] > 0) & (attempts["prompt_ms"] >= 0)
    decode_s, prefill_s = attempts["predicted_ms"] / 1e3, attempts["prompt_ms"] / 1e3
    first_s = attempts["ended_s"] - decode_s
    told = {"decode_s": decode_s, "prefill_s": prefill_s, "first_s": first_s, "headers_s": first_s - prefill_s}
    return attempts.assign(**{name: attempts[name].where(~known, told[name]) for name in told})


def _whole(trace: Trace) -> Intervals:
    """Attempts without phases, such as embeddings: they hold a slot, and read, from their sending to their end."""
    each = trace.attempts[["r", "engine", "sent_s", "ended_s"]]
    each = each[(each["engine"] >= 0) & each["sent_s"].notna() & each["ended_s"].notna()]
    r, engine, sent, ended = (trace.engine.array(each[name]) for name in each.columns)
    keep = trace.engine.array(trace.requests["is_generating"])[r] == 0
    return engine[keep], sent[keep], trace.engine.xp.maximum(sent, ended)[keep]


def decodes(trace: Trace, held: Frame, busy: Array, beside: Array) -> Frame:
    """Decodes of attempts that came to their end."""
    column = trace.engine.array
    seconds, tokens = column(held["decode_s"]), column(held["generated"]) * 1.0
    keep = (
        (tokens >= _DECODE_TOKENS) & (seconds > 0) & (beside <= _MOST_STALLED * seconds) & (column(held["error"]) < 0)
    )
    keep = keep & (column(held["model"]) >= 0)
    context = column(held["cached"]) + column(held["computed"]) + tokens / 2
    seconds, tokens, busy, beside = seconds[keep], tokens[keep], busy[keep], beside[keep]
    terms = (tokens, tokens * (busy - 1.0), tokens * context[keep])
    return _work(trace, _where(trace, held, keep), seconds, terms, beside)


def prefills(trace: Trace, held: Frame) -> Frame:
    """Prefills of attempts that came to their end."""
    xp, column = trace.engine.xp, trace.engine.array
    where = (column(held["engine"]), column(held["headers_s"]), column(held["first_s"]))
    others = _others(xp, where)
    seconds, tokens = column(held["prefill_s"]), column(held["computed"]) * 1.0
    keep = (tokens >= _PREFILL_TOKENS) & (seconds > 0) & (column(held["error"]) < 0) & (column(held["model"]) >= 0)
    context = column(held["cached"]) + tokens / 2
    seconds, tokens, others = seconds[keep], tokens[keep], others[keep]
    terms = (tokens, tokens * others, xp.full(len(tokens), 1.0), tokens * context[keep])
    return _work(trace, _where(trace, held, keep), seconds, terms, xp.zeros(len(tokens)))


def _where(trace: Trace, frame: Frame, mask: Array) -> Frame:
    """Rows of a frame whose index counts from 0, by an array of booleans."""
    return frame[trace.engine.frame({"keep": mask})["keep"]]


def _others(xp: Any, prefill: Intervals) -> Array:
    """Mean number of other prefills beside each one."""
    line = Timeline(xp, {"prefill": prefill})
    return line.within(line.level("prefill"), *prefill) / xp.maximum(prefill[2] - prefill[1], 1e-9) - 1.0


def _work(trace: Trace, held: Frame, seconds: Array, terms: tuple[Array, ...], beside: Array) -> Frame:
    """Attempts' seconds in one phase, against what they are on their engine and its peers at the same work.

    Returns:
        r, engine, peers, at_s, seconds, tokens; pace: logarithm of the own part of `seconds` over the expected.
    """
    column = trace.engine.array
    engine = column(held["engine"])
    peers, kinds = peers_of(trace, engine, column(held["model"]))
    some = slice(None, None, max(len(engine) // _FIT_ROWS, 1))
    model = Paces(trace, len(kinds), *(each[some] for each in (engine, peers, seconds, beside, *terms)))
    pace = model.pace(peers, seconds, beside, *terms)
    rows = {"r": column(held["r"]), "engine": engine, "peers": peers, "at_s": column(held["first_s"])}
    return trace.engine.frame(rows | {"seconds": seconds, "tokens": terms[0], "pace": pace})


# --- time buckets, in the host's memory


@dataclass(frozen=True, slots=True)
class _Buckets:
    """Engines by time buckets."""

    width_s: float
    count: Matrix
    pace: Matrix
    noise: Matrix
    """Standard deviation of `pace` within each, by its quartiles, and no less than `sigma`."""
    seconds: Matrix
    tokens: Matrix
    sigma: float
    """Standard deviation within buckets, over all."""


def find_runs(trace: Trace, work: Frame) -> dict[int, Run]:
    """Engine code -> its slowest time, or the whole window where it has none; engines without a peer are left out."""
    if not len(work):
        return {}
    buckets = _bucket(trace, work)
    known = trace.engine.host(work[["engine", "peers"]].drop_duplicates().sort_values(["peers", "engine"]))
    runs: dict[int, Run] = {}
    for peers in known["peers"].unique().tolist():
        engines = known["engine"][known["peers"] == peers].to_numpy()
        if len(engines) > 1:
            runs |= _of_peers(buckets, engines)
    if not any(run.is_since_ever for run in runs.values()):
        return runs
    fine = _bucket(trace, work, _FINER)
    return {engine: _began_well(run, fine, engine) if run.is_since_ever else run for engine, run in runs.items()}


def _began_well(run: Run, fine: _Buckets, engine: int) -> Run:
    """The run from where it became slow, if it was nearer to its peers' pace before."""
    known = np.where(fine.count[engine] >= _LEAST_IN_BUCKET, fine.pace[engine], np.nan)
    known = known[np.arange(len(known)) + 0.5 < run.until_s / fine.width_s]
    is_slow = known > np.log(run.ratio) / 2 + np.log(run.peers_ratio)
    first = int(np.argmax(is_slow))
    if not is_slow.any() or np.isnan(known[:first]).all():
        return run
    return replace(run, since_s=first * fine.width_s, is_since_ever=False)


def _bucket(trace: Trace, work: Frame, finer: int = 1) -> _Buckets:
    xp, column, engines = trace.engine.xp, trace.engine.array, len(trace.names.engine)
    at, engine, pace = (column(work[name]) for name in ("at_s", "engine", "pace"))
    number = int(min(max(len(work) // (engines * _BUCKET_ATTEMPTS), 1), _MOST_BUCKETS)) * finer
    width_s = max(trace.length_s, float(at.max()) + 1e-6) / number
    cell = engine * number + xp.minimum(xp.maximum(at / width_s, 0.0), number - 1.0).astype("int64")
    amounts = {name: column(work[name]) for name in ("seconds", "tokens")}
    frame = trace.engine.frame({"cell": cell, "pace": pace} | amounts)
    middle = trace.engine.quantiles(frame, ["cell"], "pace", [0.25, 0.5, 0.75])
    sums = frame.groupby("cell", sort=True).agg({"seconds": "sum", "tokens": "sum"}).reset_index()
    found = trace.engine.host(middle.merge(sums, on="cell", how="inner"))
    places = found["cell"].to_numpy()
    shaped = {}
    for name in ("count", "q25", "q50", "q75", "seconds", "tokens"):
        flat = np.full(engines * number, np.nan if name[0] == "q" else 0.0)
        flat[places] = found[name].to_numpy()
        shaped[name] = flat.reshape(engines, number)
    whole = xp.zeros(engines * number)
    whole[column(middle["cell"])] = column(middle["q50"])
    sigma = MAD_TO_SIGMA * float(xp.percentile(xp.abs(pace - whole[cell]), 50))
    noise = np.fmax((shaped["q75"] - shaped["q25"]) * IQR_TO_SIGMA, sigma)
    return _Buckets(width_s, shaped["count"], shaped["q50"], noise, shaped["seconds"], shaped["tokens"], sigma)


def _of_peers(buckets: _Buckets, engines: Any) -> dict[int, Run]:
    count = buckets.count[engines]
    known = np.where(count >= _LEAST_IN_BUCKET, buckets.pace[engines], np.nan)
    means, found = _median(known.T), {}
    for i, (engine, peers) in enumerate(zip(engines.tolist(), _peers(known), strict=True)):
        others = np.delete(means, i)
        others = others[~np.isnan(others)]
        if not len(others):
            continue
        base = float(np.median(others))
        excess = known[i] - np.where(np.isnan(peers), base, peers)
        if not np.isnan(excess).all():
            run = _run(buckets, engine, excess, (count.sum(axis=0) - count[i], _spread(others)))
            found[engine] = replace(run, peers_ratio=math.exp(base))
    return found


def _run(buckets: _Buckets, engine: int, excess: Matrix, peers: tuple[Matrix, float]) -> Run:
    """An engine's slowest run, by its medians over its peers'; of these their attempts and how far they are apart."""
    first, last = _slowest(excess, buckets.count[engine])
    part = slice(first, last + 1)
    seen = ~np.isnan(excess[part])
    support, spread = peers
    weight = buckets.count[engine, part][seen]
    mean = float(np.average(excess[part][seen], weights=weight))
    own = np.average(buckets.noise[engine, part][seen] ** 2, weights=weight) / weight.sum()
    variance = _MEDIAN_ERROR**2 * (own + buckets.sigma**2 / max(support[part].sum(), 1.0))
    seconds, tokens = buckets.seconds[engine, part].sum(), buckets.tokens[engine, part].sum()
    return Run(
        since_s=first * buckets.width_s,
        until_s=(last + 1) * buckets.width_s if _recovered(excess, last) else np.inf,
        requests=int(buckets.count[engine, part].sum()),
        ratio=float(np.exp(mean)),
        z=mean / float(np.sqrt(variance + spread**2)),
        lost_s=float(seconds * max(1 - np.exp(-mean), 0.0)),
        ms_token=float(seconds / tokens * 1e3),
        least_z=_least_z(*buckets.count.shape),
        is_since_ever=bool(np.isnan(excess[:first]).all()),
    )


def _least_z(engines: int, buckets: int) -> float:
    """By a bound of the normal tail: two phases of each engine and every run of buckets are looked at."""
    looks = engines * buckets * (buckets + 1)
    return math.sqrt(2 * math.log(looks / _CHANCE))


def _peers(known: Matrix) -> list[Matrix]:
    """Of each engine, the median of the others in each bucket; among many its own part in it does not matter."""
    if len(known) > _MANY_ENGINES:
        return [_median(known)] * len(known)
    return [_median(np.delete(known, i, axis=0)) for i in range(len(known))]


def _recovered(excess: Matrix, last: int) -> bool:
    """Whether later buckets are known, which then were not slow."""
    return bool((~np.isnan(excess[last + 1 :])).any())


def _slowest(excess: Matrix, count: Matrix) -> tuple[int, int]:
    """First and last bucket of the run with the most behind it; buckets that are not known break none."""
    best, run, found = 0.0, 0.0, (0, len(excess) - 1)
    first = -1
    for i, each in enumerate(excess.tolist()):
        if np.isnan(each):
            continue
        if each <= np.log(SLOW):
            first, run = -1, 0.0
            continue
        first = i if first < 0 else first
        run += each * float(count[i])
        if run > best:
            best, found = run, (first, i)
    return found


def _median(known: Matrix) -> Matrix:
    """Of each column; NaN where nothing is known. Sorting puts NaN last."""
    ordered, count = np.sort(known, axis=0), (~np.isnan(known)).sum(axis=0)
    column = np.arange(known.shape[1])
    found: Matrix = (ordered[np.maximum(count - 1, 0) // 2, column] + ordered[np.maximum(count, 1) // 2, column]) / 2
    return np.where(count > 0, found, np.nan)


def _spread(means: Matrix) -> float:
    """How far peers are apart among themselves, where there are enough to say so."""
    if len(means) < 3:
        return _LEAST_SPREAD
    return max(MAD_TO_SIGMA * float(np.median(np.abs(means - np.median(means)))), _LEAST_SPREAD)
