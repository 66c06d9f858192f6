"""Two windows, before and after a change: what became better or worse, by how much, and how sure that is.

Intervals are bootstrapped; see `bootstrap` for how, and for what they assume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from lltm_ray.analytics import units
from lltm_ray.analytics.blame import DEADLINE, LOAD, OURS, error_kinds
from lltm_ray.analytics.bootstrap import SLICES, Draws, cliffs_delta, distance, draw_quantile, draw_slices, draw_whole
from lltm_ray.analytics.columns import NONE, Floats, Ints
from lltm_ray.analytics.frames import Frame
from lltm_ray.analytics.overlaps import Timeline
from lltm_ray.analytics.readings import Readings
from lltm_ray.analytics.trace import Trace, nanos
from lltm_ray.errors import ConfigError

BETTER, WORSE, NO_DIFFERENCE, NOT_MEASURED = "better", "worse", "no difference shown", "not measured"
MORE, LESS = "more", "less"
"""Of figures that arrivals decide, and no setting: neither is better."""
_SEED = 20_240_229
"""The same windows shall give the same answer."""
_DIGITS = 9
"""Of seconds: what is less than a nanosecond is no difference, but rounding."""
_COLUMNS = (
    *("engine", "error", "is_generating", "ended_s", "total_s", "ttft_s", "queue_s", "prefill_s", "decode_s"),
    *("cached", "prompt", "generated"),
)
LEAST = 20
"""Values in each window that a quantile is compared from."""
LEAST_MIX = 0.1
"""Largest distance of two cumulative distributions up to which workloads count as the same."""
_CHANCE = math.sqrt(-math.log(0.01 / 2) / 2)
"""Times the root of 1/n + 1/m, the distance that two samples of one distribution exceed once in a hundred times."""
MOST_ENGINES = 20
"""That rows are made for, those with the most attempts."""
_UNITS = {"s": units.seconds, "ratio": units.percent, "/s": units.digits, "J": units.joules}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of both windows."""

    scope: str
    """Engine's name; empty: the fleet."""
    metric: str
    statistic: str
    """`median`, `p95`, or `whole`: of the window as a whole."""
    unit: str
    """`s`, `ratio` (0..1), `/s` or `J`."""
    before: float
    after: float
    difference: float
    """after - before, and its confidence interval."""
    difference_low: float
    difference_high: float
    ratio: float
    """after / before, and its confidence interval; NaN where before is 0."""
    ratio_low: float
    ratio_high: float
    effect: float
    """Cliff's delta: the chance that a value of after is larger than one of before, less the chance that it is smaller,
    -1..1; NaN for wholes."""
    count_before: int
    count_after: int
    verdict: str
    """`better`, `worse`, `more`, `less`, `no difference shown`, or `not measured`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Whether both windows had the same work."""

    feature: str
    before: float
    """Median, or requests a second."""
    after: float
    distance: float
    """Kolmogorov and Smirnov's: the largest one of the cumulative distributions; of a rate the share it changed by."""
    is_same: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two windows."""

    before_unix_nano: tuple[int, int]
    """Start and end."""
    after_unix_nano: tuple[int, int]
    confidence: float
    rows: tuple[Row, ...]
    mix: tuple[Mix, ...]

    @property
    def is_same_workload(self) -> bool:
        """Whether the change, and not the work, may be what made a difference."""
        return all(each.is_same for each in self.mix)

    def as_dict(self) -> dict[str, Any]:
        """As JSON; what is not known is None."""
        return {name: _plain(value) for name, value in asdict(self).items()} | {
            "is_same_workload": self.is_same_workload
        }

    def text(self) -> str:
        """For a terminal."""
        return "\n".join(_lines(self)) + "\n"


def compare(before: Trace, after: Trace, *, confidence: float = 0.95) -> Comparison:
    """What is different between two windows.

    Times, tokens and paces are those of requests and attempts without an error. Errors are the fleet's own and
    requests whose time was up; `refused` are those for which there was no slot. At a confidence of 0.95, one row of
    twenty shows a difference by chance alone.

    Args:
        before: one window.
        after: the other.
        confidence: of the intervals; a difference is shown where its interval does not hold 0.

    Raises:
        ConfigError: a window without requests, or a confidence that is none.
    """
    if not 0.5 <= confidence < 1:
        raise ConfigError("confidence", confidence, "must be from 0.5 to less than 1")
    for name, trace in (("before", before), ("after", after)):
        if not len(trace.requests):
            raise ConfigError(name, "0 requests", "no request ended in this window; take one that had some")
    one, other, make = _Window.read(before), _Window.read(after), _Maker(confidence)
    rows = list(make.rows("", one, other))
    for name in _in_both((before, one), (after, other))[:MOST_ENGINES]:
        rows += make.rows(name, one.of(before.names.engine.index(name)), other.of(after.names.engine.index(name)))
    return Comparison(
        before_unix_nano=(before.start_unix_nano, nanos(before, before.length_s)),
        after_unix_nano=(after.start_unix_nano, nanos(after, after.length_s)),
        confidence=confidence,
        rows=tuple(rows),
        mix=tuple(_mix(one, other, rows)),
    )


def _in_both(*windows: tuple[Trace, _Window]) -> list[str]:
    """Engines that had attempts in both windows, those with the most in the first one first."""
    first, second = (
        dict(zip(trace.names.engine, np.bincount(own.attempts["engine"] + 1, minlength=1)[1:].tolist(), strict=False))
        for trace, own in windows
    )
    known = [name for name in first if first[name] and second.get(name)]
    return sorted(known, key=lambda name: (-first[name], name))


# --- one window


@dataclass(frozen=True, slots=True)
class _Window:
    """Columns of a window's requests and attempts, or of those of one engine, on the host."""

    requests: Mapping[str, Any]
    attempts: Mapping[str, Any]
    """Each with `engine` and `slice`; what was not, or went wrong, is NaN."""
    length_s: float
    joules: Floats | None
    """Of all GPUs, by slice; None where nobody measured them."""

    @classmethod
    def read(cls, trace: Trace) -> Self:
        """All of a trace."""
        length = max(trace.length_s, 1e-9)
        return cls(_of_requests(trace, length), _of_attempts(trace, length), length, _joules(trace))

    def of(self, engine: int) -> Self:
        """An engine's part."""
        requests, attempts = (
            {name: column[columns["engine"] == engine] for name, column in columns.items()}
            for columns in (self.requests, self.attempts)
        )
        return replace(self, requests=requests, attempts=attempts, joules=None)

    def sample(self, metric: str) -> tuple[Floats, Ints]:
        """A metric's values, ascending, and the slice of each."""
        columns = self.requests if metric in self.requests else self.attempts
        order = np.argsort(columns[metric])  # NaN comes last
        known = order[: len(order) - int(np.isnan(columns[metric]).sum())]
        return columns[metric][known], columns["slice"][known]

    def sums(self, metric: str) -> tuple[Floats, Floats]:
        """A whole's numerator and denominator, by slice; NaN where nobody measured it."""
        seconds = np.full(SLICES, self.length_s / SLICES)

        def total(name: str) -> Floats:
            weights = self.requests[name].astype(np.float64)
            return np.bincount(self.requests["slice"], weights, SLICES).astype(np.float64)

        if metric in ("errors", "refused"):
            return total(metric), total("one")
        if metric == "reuse":
            return total("cached"), total("prompt")
        if metric == "energy a token":
            return np.full(SLICES, math.nan) if self.joules is None else self.joules, total("generated")
        return total("generated" if metric == "tokens" else "one"), seconds


def _of_requests(trace: Trace, length_s: float) -> Mapping[str, Any]:
    frame = _host(trace, trace.requests)
    whose = np.array([*error_kinds(trace.names), NONE])[frame["error"]]
    fine = np.where(frame["error"] < 0, 1.0, math.nan)
    generating = np.where(frame["is_generating"] > 0, fine, math.nan)
    return {
        **{name: frame[name] for name in ("engine", "cached", "prompt", "generated")},
        "slice": _slices(frame["ended_s"], length_s),
        "one": np.ones(len(fine)),
        "errors": (whose == OURS) | (whose == DEADLINE),
        "refused": whose == LOAD,
        "latency": (frame["total_s"] * fine).round(_DIGITS),
        "TTFT": (frame["ttft_s"] * fine).round(_DIGITS),
        "wait": (frame["queue_s"] * fine).round(_DIGITS),
        "prompt tokens": frame["prompt"] * generating,
        "generated tokens": frame["generated"] * generating,
    }


def _of_attempts(trace: Trace, length_s: float) -> Mapping[str, Any]:
    frame = _host(trace, trace.attempts)
    fine = np.where((frame["error"] < 0) & (frame["generated"] > 0), 1.0, math.nan)
    return {
        "engine": frame["engine"],
        "slice": _slices(frame["ended_s"], length_s),
        "prefill": (frame["prefill_s"] * fine).round(_DIGITS),
        "decode a token": (frame["decode_s"] / np.maximum(frame["generated"], 1) * fine).round(_DIGITS),
    }


def _host(trace: Trace, frame: Frame) -> Mapping[str, Any]:
    names = [name for name in _COLUMNS if name in frame.columns]
    host = trace.engine.host(frame[names])
    return {name: host[name].to_numpy() for name in names}


def _slices(ended: Floats, length_s: float) -> Ints:
    places: Floats = np.nan_to_num(ended) / length_s * SLICES
    return np.clip(places, 0, SLICES - 1).astype(np.int64)


def _joules(trace: Trace) -> Floats | None:
    """Of all GPUs, by slice; None where nobody measured."""
    if not len(trace.gpus):
        return None
    readings, xp = Readings(trace), trace.engine.xp
    (gpu, start, end), joules = readings.energy()
    line = Timeline(xp, {"energy": (gpu * 0, start, end)})
    watts = line.level("energy", xp.where(end > start, joules / xp.maximum(end - start, 1e-9), 0.0))
    borders = xp.arange(SLICES + 1) * (trace.length_s / SLICES)
    found = line.within(watts, xp.zeros(SLICES, dtype="int64"), borders[:-1], borders[1:])
    host: Floats = trace.engine.host(trace.engine.frame({"joules": found}))["joules"].to_numpy()
    return host if host.sum() > 0 else None


# --- rows

_SAMPLES = ("latency", "TTFT", "wait", "prefill", "decode a token")
_RATIOS, _RATES = ("errors", "refused", "reuse"), ("tokens", "requests")
_WHOLES = dict.fromkeys(_RATIOS, "ratio") | dict.fromkeys(_RATES, "/s") | {"energy a token": "J"}
_MORE_IS_BETTER = frozenset({"reuse"})
_QUANTILES = {"median": 0.5, "p95": 0.95}


class _Maker:
    def __init__(self, confidence: float) -> None:
        self._ends = ((1 - confidence) / 2, (1 + confidence) / 2)
        self._dice = np.random.default_rng(_SEED)
        self._drawn = draw_slices(self._dice), draw_slices(self._dice)

    def rows(self, scope: str, before: _Window, after: _Window) -> Iterator[Row]:
        """All metrics of a scope; those that neither window has are left out."""
        for metric in _SAMPLES:
            samples = before.sample(metric), after.sample(metric)
            (one, _), (other, _) = samples
            if not len(one) and not len(other):
                continue
            told: dict[str, Any] = {"scope": scope, "metric": metric, "unit": "s", "effect": cliffs_delta(one, other)}
            told |= {"count_before": len(one), "count_after": len(other)}
            for name, q in _QUANTILES.items():
                draws = (draw_quantile(self._dice, *each, q) for each in samples)
                yield self._row(told | {"statistic": name}, *draws)
        counts = {"count_before": len(before.requests["one"]), "count_after": len(after.requests["one"])}
        for metric, unit in _WHOLES.items():
            sums = before.sums(metric), after.sums(metric)
            if not all(math.isnan(part.sum()) or not whole.sum() for part, whole in sums):
                told = {"scope": scope, "metric": metric, "statistic": "whole", "unit": unit, "effect": math.nan}
                draws = (draw_whole(drawn, *each) for drawn, each in zip(self._drawn, sums, strict=True))
                yield self._row(told | counts, *draws)

    def _row(self, told: Mapping[str, Any], before: Draws, after: Draws) -> Row:
        (one, ones), (other, others) = before, after
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = float(np.divide(other, one)) if one else math.nan
            ratios = np.where(ones > 0, others / ones, math.nan)
        low, high = self._interval(others - ones)
        ratio_low, ratio_high = self._interval(ratios)
        verdict = NO_DIFFERENCE
        if math.isnan(one + other) or min(told["count_before"], told["count_after"]) < LEAST:
            verdict = NOT_MEASURED
        elif low > 0 or high < 0:
            verdict = _verdict(told["metric"], is_more=low > 0)
        return Row(
            **told,
            before=one,
            after=other,
            difference=other - one,
            difference_low=low,
            difference_high=high,
            ratio=ratio,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            verdict=verdict,
        )

    def _interval(self, draws: Floats) -> tuple[float, float]:
        known = draws[~np.isnan(draws)]
        low, high = np.quantile(known, self._ends) if len(known) else (math.nan, math.nan)
        return float(low), float(high)


def _verdict(metric: str, *, is_more: bool) -> str:
    if metric in _RATES:
        return MORE if is_more else LESS
    return BETTER if is_more == (metric in _MORE_IS_BETTER) else WORSE


# --- the work itself


def _mix(before: _Window, after: _Window, rows: Iterable[Row]) -> Iterator[Mix]:
    for feature in ("prompt tokens", "generated tokens"):
        (one, _), (other, _) = before.sample(feature), after.sample(feature)
        if len(one) and len(other):
            apart = distance(one, other)
            is_same = apart <= max(LEAST_MIX, _CHANCE * math.sqrt(1 / len(one) + 1 / len(other)))
            medians = float(np.median(one)), float(np.median(other))
            yield Mix(feature=feature, before=medians[0], after=medians[1], distance=apart, is_same=is_same)
    rate = next(row for row in rows if row.metric == "requests")
    apart = abs(rate.ratio - 1)
    is_same = apart <= LEAST_MIX or rate.verdict == NO_DIFFERENCE
    yield Mix(feature="requests a second", before=rate.before, after=rate.after, distance=apart, is_same=is_same)


# --- for people


def _lines(found: Comparison) -> Iterator[str]:
    for name, span in (("Before", found.before_unix_nano), ("After ", found.after_unix_nano)):
        yield f"{name} {units.window(*span)}"
    yield ""
    if not found.is_same_workload:
        changed = (
            f"{each.feature} {units.digits(each.before)} -> {units.digits(each.after)}"
            for each in found.mix
            if not each.is_same
        )
        yield f"The windows are not the same workload: {', '.join(changed)}. What differs below may come from that."
        yield ""
    sure = f"{found.confidence * 100:g} %"
    yield f"{'':<12}{'':<16}{'':<8}{'before':>10}{'after':>10}  {'ratio, ' + sure:<24}{'effect':>7}  verdict"
    shown = [row for row in found.rows if not row.scope or row.verdict not in (NO_DIFFERENCE, NOT_MEASURED)]
    yield from map(_line, shown)
    by_chance = len(found.rows) * (1 - found.confidence)
    yield ""
    yield (
        f"{len(found.rows)} figures were compared, of which about {units.digits(by_chance)} differ by chance alone; "
        "those of engines are shown where they differ."
    )


def _line(row: Row) -> str:
    show = _UNITS[row.unit]
    ratio = units.NOTHING
    if not math.isnan(row.ratio):
        ratio = f"{units.digits(row.ratio)} ({units.digits(row.ratio_low)} to {units.digits(row.ratio_high)})"
    effect = units.NOTHING if math.isnan(row.effect) else f"{row.effect:+.2f}"
    statistic = "" if row.statistic == "whole" else row.statistic
    metric = f"{row.metric} / s" if row.unit == "/s" else row.metric
    figures = f"{show(row.before):>10}{show(row.after):>10}  {ratio:<24}{effect:>7}"
    return f"{units.plain(row.scope) or 'fleet':<12}{metric:<16}{statistic:<8}{figures}  {row.verdict}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
