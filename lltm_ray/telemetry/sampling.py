"""Which requests' spans are exported: all errors, each model's slowest, and a share of the rest.

Decided when a request has ended, once for its whole tree. No clock and no I/O; metrics are not sampled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from math import ceil, isnan

from lltm_ray.telemetry.context import SAMPLED
from lltm_ray.telemetry.rows import RequestRow, SpanRow

_WINDOW = 1000
"""Requests of a model that its running quantile looks back on."""
_REMEMBERED = 4096
"""Traces kept as errors or slow, whose later spans are kept too."""


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
    """

    def __init__(self, ratio: float = 1.0, slow_ratio: float = 0.01, *, keep_unsampled: bool = False) -> None:
        self._rejected_below = round((1.0 - ratio) * 2**56)
        self._slow_ratio, self._keep_unsampled = slow_ratio, keep_unsampled
        self._slowest: dict[str, Slowest] = {}
        self._kept: OrderedDict[str, None] = OrderedDict()

    def decide(self, request: RequestRow) -> str:
        """Why the request's tree is exported: `error`, `slow` or `share`; empty: it is not."""
        is_error = bool(request.error_type) or request.status >= 400
        is_slow = not is_error and self._is_slow(request)  # asked of every request: the quantile is of all
        if request.parent_span_id and not request.flags & SAMPLED and not self._keep_unsampled:
            return ""
        if is_error or is_slow:
            self._remember(request.trace_id)
            return "error" if is_error else "slow"
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
