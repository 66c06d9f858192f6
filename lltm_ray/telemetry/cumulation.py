"""Histograms that add up from one collection to the next, and whose series can be let go.

The SDK keeps each series of a cumulative histogram for ever, and has no way to drop one: a fleet that scales up and
down would have ever more. Of a histogram that is collected as deltas it keeps nothing from one collection to the next
(since 1.45). So readers collect deltas and the sums are kept here, until their engine is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from opentelemetry.sdk.metrics import Histogram as HistogramInstrument
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ScopeMetrics,
)

from lltm_ray.telemetry import semconv as names

DELTAS: Final[dict[type, AggregationTemporality]] = {HistogramInstrument: AggregationTemporality.DELTA}
"""What a reader is to prefer, for `Cumulation` to add up."""
_Key = tuple[tuple[str, Any], ...]


class Cumulation:
    """Adds up one reader's histograms. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: dict[tuple[str, str], _Sums] = {}
        """By scope and name."""
        self._gone: set[str] = set()

    def add(self, data: MetricsData) -> MetricsData:
        """The data with whole sums instead of deltas; other metrics as they are."""
        with self._lock:
            resources = [
                replace(each, scope_metrics=[self._add(scope) for scope in each.scope_metrics])
                for each in data.resource_metrics
            ]
            for sums in self._metrics.values() if self._gone else ():
                sums.forget(self._gone)
            self._gone.clear()
        return replace(data, resource_metrics=resources)

    def forget(self, engines: Collection[str]) -> None:
        """Have series of these engines end with the next collection, which is the last that they are in."""
        with self._lock:
            self._gone.update(engines)

    def _add(self, scope: ScopeMetrics) -> ScopeMetrics:
        now = max((each.time_unix_nano for metric in scope.metrics for each in metric.data.data_points), default=0)
        others = []
        for metric in scope.metrics:
            if _is_delta(metric.data):
                self._metrics.setdefault((scope.scope.name, metric.name), _Sums(metric, {})).add(metric)
            else:
                others.append(metric)
        kept = [sums for (name, _), sums in self._metrics.items() if name == scope.scope.name]
        return replace(scope, metrics=[*others, *(sums.metric(now) for sums in kept if sums.series)])


@dataclass(slots=True)
class _Sums:
    """Of one metric."""

    last: Metric
    series: dict[_Key, HistogramDataPoint]

    def add(self, metric: Metric) -> None:
        self.last = metric
        for point in _points(metric):
            key = tuple(sorted((point.attributes or {}).items()))
            old = self.series.get(key)
            self.series[key] = point if old is None else _sum(old, point)

    def metric(self, now: int) -> Metric:
        """As of now. An exemplar is given once, as by the SDK."""
        points = [replace(point, time_unix_nano=now) for point in self.series.values()]
        self.series = {
            key: replace(point, exemplars=()) if point.exemplars else point for key, point in self.series.items()
        }
        return replace(self.last, data=Histogram(points, AggregationTemporality.CUMULATIVE))

    def forget(self, engines: Collection[str]) -> None:
        self.series = {key: point for key, point in self.series.items() if dict(key).get(names.ENGINE) not in engines}


def _is_delta(data: Any) -> bool:
    return isinstance(data, Histogram) and data.aggregation_temporality is AggregationTemporality.DELTA


def _points(metric: Metric) -> Iterator[HistogramDataPoint]:
    for point in metric.data.data_points:
        assert isinstance(point, HistogramDataPoint)  # noqa: S101 - of a histogram
        yield point


def _sum(old: HistogramDataPoint, new: HistogramDataPoint) -> HistogramDataPoint:
    return replace(
        new,
        start_time_unix_nano=old.start_time_unix_nano,
        count=old.count + new.count,
        sum=old.sum + new.sum,
        bucket_counts=tuple(map(sum, zip(old.bucket_counts, new.bucket_counts, strict=True))),
        min=min(old.min, new.min),
        max=max(old.max, new.max),
    )
