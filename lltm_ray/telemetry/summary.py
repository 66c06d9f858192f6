"""Summaries: rows of requests in, one line of figures for each group out, as a pandas DataFrame.

Percentiles interpolate linearly between order statistics (Hyndman and Fan's type 7, NumPy's default), over all
requests of the window; nothing is bucketed or sampled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.batch import unpack
from lltm_ray.telemetry.figures import Tokens, read_phases, tokens_of_all, waited_s
from lltm_ray.telemetry.rows import AttemptRow, RequestRow
from lltm_ray.telemetry.spans import Span

_MINUTE_NANO = 60 * 10**9
_QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_MEASURED: Final = ("latency", "ttft", "queue")
COLUMNS: Final = (
    *("requests", "errors", "error_ratio", "requests_s"),
    *("input_tokens", "cached_tokens", "output_tokens", "output_tokens_s", "reuse_ratio"),
    *(f"{what}_{how}_s" for what in _MEASURED for how in (*_QUANTILES, "mean", "max")),
)
"""After the columns of `by`; times in seconds. `reuse_ratio` is cached tokens of input tokens; NaN: nothing to tell."""
TIMELINE_COLUMNS: Final = (
    *("name", "kind", "depth", "start_s", "end_s", "duration_s", "engine", "error_type", "span_id", "parent_span_id"),
)


class _Request(NamedTuple):
    """One request with what its attempts tell."""

    row: RequestRow
    ended_unix_nano: int
    engine: str
    """The last that was asked."""
    slot: int
    tokens: Tokens
    queue_s: float


_KEYS: Final[dict[str, Callable[[_Request], Any]]] = {
    "model": lambda each: each.row.model,
    "engine": lambda each: each.engine,
    "route": lambda each: each.row.route,
    "tenant": lambda each: each.row.tenant,
    "slot": lambda each: each.slot,
    "minute": lambda each: each.ended_unix_nano // _MINUTE_NANO * _MINUTE_NANO,
}
BY: Final = tuple(_KEYS)
"""What to group by. `engine` and `slot` (-1: none) are the last attempt's; `minute` is when a request ended."""


def summarize(
    tables: Mapping[str, pa.Table],
    *,
    by: Sequence[str] = ("model",),
    window_s: float | None = None,
    until_unix_s: float | None = None,
) -> Any:
    """Requests, errors, rates, tokens, and percentiles of latency, time to first token and queue time.

    Latency is of requests without an `error.type`, which refused ones have, too; time to first token of those that
    streamed; queue time (here and in llama-server) of those that an engine was asked for; all of requests that ended.

    Args:
        tables: `requests` and `attempts`, as `read_since` gives them.
        by: any of `BY`, in the order of the frame's first columns; empty: one line for all.
        window_s: look at so many last seconds; None: at all there is.
        until_unix_s: the window's end; None: the newest request's.

    Returns:
        DataFrame: the columns of `by`, then `COLUMNS`, ordered by the former; without requests it has no lines.

    Raises:
        ConfigError: nothing to group by has such a name, or a window that is not positive.
        MissingExtraError: pandas is not installed.
    """
    _check(by, window_s)
    requests = list(_join(tables))
    window = _Window.of(requests, window_s, until_unix_s)
    groups: defaultdict[tuple[Any, ...], list[_Request]] = defaultdict(list)
    for each in requests:
        if window.start_unix_nano <= each.ended_unix_nano <= window.end_unix_nano:
            groups[tuple(_KEYS[name](each) for name in by)].append(each)
    lines = []
    for key in sorted(groups):
        named = dict(zip(by, key, strict=True))
        lines.append(named | _figures(groups[key], window.within(named.get("minute"))))
    frame = _pandas().DataFrame(lines, columns=[*by, *COLUMNS])
    if "minute" in by:
        frame["minute"] = frame["minute"].astype("int64").astype("datetime64[ns, UTC]")
    return frame


def timeline_frame(spans: Sequence[Span | Mapping[str, Any]]) -> Any:
    """A request's spans as a table in the order of their start, `depth` telling who is below whom.

    Args:
        spans: of one request: `Span`s, or what `timeline()` gives as its `spans`.

    Returns:
        DataFrame of `TIMELINE_COLUMNS`; times are seconds, from the first span's start for `Span`s.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    first = min((each.start_unix_nano for each in spans if isinstance(each, Span)), default=0)
    told = [_told(each, first) for each in spans]
    parents = {each["span_id"]: each["parent_span_id"] for each in told}
    for each in told:
        each["depth"] = _depth(each["span_id"], parents)
        each["duration_s"] = each["end_s"] - each["start_s"]
        each["engine"] = each["attributes"].get(names.ENGINE, "")
    told.sort(key=lambda each: (each["start_s"], each["depth"]))
    return _pandas().DataFrame(told, columns=list(TIMELINE_COLUMNS))


@dataclass(frozen=True, slots=True)
class _Window:
    start_unix_nano: int
    end_unix_nano: int

    @classmethod
    def of(cls, requests: Sequence[_Request], window_s: float | None, until_unix_s: float | None) -> _Window:
        newest = max((each.ended_unix_nano for each in requests), default=0)
        end = newest if until_unix_s is None else round(until_unix_s * 1e9)
        if window_s is not None:
            return cls(end - round(window_s * 1e9), end)
        return cls(min((each.row.arrived_unix_nano for each in requests), default=end), end)

    def within(self, minute_unix_nano: int | None) -> float:
        """Its seconds, or those of one of its minutes."""
        start, end = self.start_unix_nano, self.end_unix_nano
        if minute_unix_nano is not None:
            start, end = max(start, minute_unix_nano), min(end, minute_unix_nano + _MINUTE_NANO)
        return (end - start) / 1e9


def _check(by: Sequence[str], window_s: float | None) -> None:
    wrong = [name for name in by if name not in _KEYS]
    if isinstance(by, str) or wrong or len(set(by)) < len(by):
        raise ConfigError("by", by, f"must be a list of some of {', '.join(BY)}, each once")
    if window_s is not None and not 0 < window_s < math.inf:
        raise ConfigError("window_s", window_s, "must be more than 0")


def _join(tables: Mapping[str, pa.Table]) -> Iterator[_Request]:
    attempts: defaultdict[str, list[AttemptRow]] = defaultdict(list)
    for attempt in unpack("attempts", tables["attempts"]) if "attempts" in tables else ():
        attempts[attempt.request_span_id].append(attempt)
    for row in unpack("requests", tables["requests"]) if "requests" in tables else ():
        own = sorted(attempts.get(row.span_id, ()), key=lambda attempt: attempt.number)
        operation = names.OPERATIONS.get(row.route, "")
        phases = [read_phases(attempt, operation, row.total_s) for attempt in own]
        ended = row.arrived_unix_nano + round(row.total_s * 1e9)
        last = own[-1] if own else None
        engine, slot = (last.engine, last.slot) if last else ("", -1)
        yield _Request(row, ended, engine, slot, tokens_of_all(own), waited_s(phases))


def _figures(group: Sequence[_Request], within_s: float) -> dict[str, Any]:
    errors = sum(bool(each.row.error_type) for each in group)
    cached, computed, output = (sum(column) for column in zip(*(each.tokens for each in group), strict=True))
    return {
        "requests": len(group),
        "errors": errors,
        "error_ratio": errors / len(group),
        "requests_s": _ratio(len(group), within_s),
        "input_tokens": cached + computed,
        "cached_tokens": cached,
        "output_tokens": output,
        "output_tokens_s": _ratio(output, within_s),
        "reuse_ratio": _ratio(cached, cached + computed),
        **_spread("latency", [each.row.total_s for each in group if not each.row.error_type]),
        **_spread("ttft", [each.row.ttft_s for each in group]),
        **_spread("queue", [each.queue_s for each in group]),
    }


def _spread(what: str, measured: Sequence[float]) -> dict[str, float]:
    known = np.asarray([value for value in measured if not math.isnan(value)])
    if not known.size:
        return {f"{what}_{how}_s": math.nan for how in (*_QUANTILES, "mean", "max")}
    found = dict(zip(_QUANTILES, np.quantile(known, list(_QUANTILES.values())).tolist(), strict=True))
    found |= {"mean": float(known.mean()), "max": float(known.max())}
    return {f"{what}_{how}_s": value for how, value in found.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _told(span: Span | Mapping[str, Any], first_unix_nano: int) -> dict[str, Any]:
    if not isinstance(span, Span):
        return dict(span)
    start_s, end_s = ((at - first_unix_nano) / 1e9 for at in (span.start_unix_nano, span.end_unix_nano))
    return asdict(span) | {"start_s": start_s, "end_s": end_s}


def _depth(span_id: str, parents: Mapping[str, str]) -> int:
    """How many of its ancestors are among them."""
    seen = {span_id}
    while (parent := parents[span_id]) in parents and parent not in seen:
        seen.add(parent)
        span_id = parent
    return len(seen) - 1


def _pandas() -> Any:
    return load("pandas", extra="pandas", feature="summaries as DataFrames")
