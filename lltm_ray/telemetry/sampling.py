"""Which requests' spans are exported: all errors, each model's slowest, and a share of the rest.

Decided when a request has ended, once for its whole tree. No clock and no I/O; metrics are not sampled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Mapping
from math import ceil, isnan
from typing import Final, NamedTuple

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry.context import SAMPLED
from lltm_ray.telemetry.rows import RequestRow, SpanRow

_SAMPLER, _ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
_RATIOS: Final = {"always_on": 1.0, "always_off": 0.0, "traceidratio": None}
"""OpenTelemetry's samplers; None: the argument says."""
_PARENT_BASED = "parentbased_"
_WINDOW = 1000
"""Requests of a model that its running quantile looks back on."""
_REMEMBERED = 4096
"""Traces kept as errors or slow, whose later spans are kept too."""


class Share(NamedTuple):
    """What is exported of ordinary requests."""

    ratio: float = 1.0
    """By trace id."""
    keep_unsampled: bool = False
    """Also of what its caller does not record."""
    keep_sampled: bool = False
    """All that its caller records."""


def read_share(environ: Mapping[str, str]) -> Share:
    """As `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` say; without them all of it.

    `always_on` and `traceidratio` do not ask what the caller does; with `parentbased_` its decision holds.

    Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/

    Raises:
        ConfigError: another sampler, or an argument that is no ratio.
    """
    given = environ.get(_SAMPLER, "").strip()
    if not given:
        return Share()
    name = given.lower().removeprefix(_PARENT_BASED)
    if name not in _RATIOS:
        known = ", ".join((*_RATIOS, *(f"{_PARENT_BASED}{each}" for each in _RATIOS)))
        raise ConfigError(_SAMPLER, given, f"must be one of {known}; or set telemetry.sample_ratio")
    ratio = _RATIOS[name]
    ratio = _read_ratio(environ.get(_ARGUMENT, "").strip() or "1") if ratio is None else ratio
    is_parents = given.lower().startswith(_PARENT_BASED)
    return Share(ratio, keep_unsampled=not is_parents and ratio > 0, keep_sampled=is_parents)


def _read_ratio(given: str) -> float:
    try:
        ratio = float(given)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ConfigError(_ARGUMENT, given, "must be a ratio from 0 to 1")
    return ratio


class Slowest:
    """Whether a duration is among the slowest `ratio` of the last 1000 before it.

    The quantile is exact over that window: a sorted list beside a ring, 2 us an observation. It follows a load that
    changes and needs no assumption about its distribution, which estimators in constant memory do.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._ring: deque[float] = deque()
        self._sorted: list[float] = []

    def is_slow(self, duration_s: float) -> bool:
        """Compare with the window, then join it. False until the window is long enough to have a slowest one."""
        count = len(self._sorted)
        rank = count - ceil(count * self._ratio)
        is_slow = count * self._ratio >= 1 and duration_s > self._sorted[rank]
        if count == _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._ring.popleft())]
        self._ring.append(duration_s)
        insort(self._sorted, duration_s)
        return is_slow


class Sampler:
    """Decides for one fleet. Not for several threads at once.

    Args:
        ratio: share of ordinary requests, 0 to 1.
        slow_ratio: share of each model's requests that are kept for being slow.
        keep_unsampled: keep also what its caller does not record.
        keep_sampled: keep all that its caller records.
    """

    def __init__(
        self,
        ratio: float = 1.0,
        slow_ratio: float = 0.01,
        *,
        keep_unsampled: bool = False,
        keep_sampled: bool = False,
    ) -> None:
        self._rejected_below = round((1.0 - ratio) * 2**56)
        self._slow_ratio, self._keep_unsampled, self._keep_sampled = slow_ratio, keep_unsampled, keep_sampled
        self._slowest: dict[str, Slowest] = {}
        self._kept: OrderedDict[str, None] = OrderedDict()

    def decide(self, request: RequestRow) -> str:
        """Why the request's tree is exported: `error`, `slow` or `share`; empty: it is not."""
        is_error = bool(request.error_type) or request.status >= 400
        is_slow = not is_error and self._is_slow(request)  # asked of every request: the quantile is of all
        if request.parent_span_id and not request.flags & SAMPLED and not self._keep_unsampled:
            return ""
        is_callers = self._keep_sampled and bool(request.parent_span_id and request.flags & SAMPLED)
        if is_error or is_slow or is_callers:
            self._remember(request.trace_id)
            return "error" if is_error else "slow" if is_slow else "share"
        return "share" if self._has_share(request.trace_id) else ""

    def decide_span(self, span: SpanRow) -> str:
        """As `decide`, for a span of no request: `error`, `trace` (its request was kept) or `share`; empty: no."""
        if span.error_type:
            return "error"
        if span.trace_id in self._kept:
            return "trace"
        return "share" if self._has_share(span.trace_id) else ""

    def _is_slow(self, request: RequestRow) -> bool:
        if isnan(request.total_s):
            return False
        slowest = self._slowest.get(request.model)
        if slowest is None:
            slowest = self._slowest[request.model] = Slowest(self._slow_ratio)
        return slowest.is_slow(request.total_s)

    def _has_share(self, trace_id: str) -> bool:
        """Every service with the same ratio keeps the same traces; a larger ratio keeps these and more.

        Source: https://opentelemetry.io/docs/specs/otel/trace/tracestate-probability-sampling/ : the lowest 56 bits of
        a trace id are its randomness, and it is kept where they are at least the rejection threshold.
        """
        return int(trace_id[-14:], 16) >= self._rejected_below

    def _remember(self, trace_id: str) -> None:
        self._kept[trace_id] = None
        if len(self._kept) > _REMEMBERED:
            self._kept.popitem(last=False)
