"""Metrics as Prometheus' and OpenMetrics' text; exemplars, which only the latter has, carry trace ids.

Names follow OpenTelemetry's rules for Prometheus: dots become underscores, the unit is spelt out at the end, counters
end with `_total`. Source: https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    NumberDataPoint,
    Sum,
)
from prometheus_client import Metric as Family
from prometheus_client import exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from lltm_ray.telemetry.cumulation import DELTAS, Cumulation

TEXT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OPEN_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_UNITS: Final = {
    "s": "seconds",
    "By": "bytes",
    "J": "joules",
    "W": "watts",
    "Cel": "celsius",
    "1": "ratio",
}
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_:]+")


Newest = dict[tuple[Any, ...], Exemplar]
"""By metric, labels and bucket. The SDK gives an exemplar once: whoever scrapes next would find none."""


class PrometheusReader(MetricReader):
    """Reads all metrics of a provider when somebody scrapes."""

    def __init__(self) -> None:
        super().__init__(preferred_temporality=DELTAS)
        self._cumulation = Cumulation()
        self._data: MetricsData | None = None
        self._newest: Newest = {}

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_: object) -> None:
        self._data = self._cumulation.add(metrics_data)

    def forget(self, engines: frozenset[str]) -> None:
        """Let go of series of engines that are gone, whether anybody scrapes or not."""
        self._cumulation.forget(engines)
        self.collect()
        self._newest = {key: each for key, each in self._newest.items() if engines.isdisjoint(key)}

    def shutdown(self, timeout_millis: float = 30_000, **_: object) -> None:
        """Nothing is pushed, so nothing is left to do."""

    def text(self, *, is_open: bool = False) -> bytes:
        """Everything now.

        Args:
            is_open: as OpenMetrics 1.0, with exemplars; else as Prometheus' text 0.0.4.
        """
        self.collect()
        registry: Any = _Registry(families_of(self._data, self._newest))
        write: Callable[[Any], bytes] = openmetrics.generate_latest if is_open else exposition.generate_latest
        return write(registry)


class _Registry:
    """What prometheus_client's writers ask for."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def families_of(data: MetricsData | None, newest: Newest | None = None) -> Iterator[Family]:
    """Metrics of all scopes as Prometheus' families, by name; `newest` keeps exemplars from one call to the next."""
    newest = {} if newest is None else newest
    resources = () if data is None else data.resource_metrics
    metrics = [metric for each in resources for scope in each.scope_metrics for metric in scope.metrics]
    for metric in sorted(metrics, key=lambda each: each.name):
        family = _family(metric, newest)
        if family.samples:
            yield family


def name_of(metric: str, unit: str, *, is_counter: bool = False) -> str:
    """`gen_ai.server.request.duration` in `s` -> `gen_ai_server_request_duration_seconds`.

    The ratio of a gauge is spelt out, an annotation like `{request}` is not; no word stands twice. A `count` at the end
    goes: in Prometheus only histograms have one.
    """
    name = _NOT_IN_NAMES.sub("_", metric).removesuffix("_count")
    suffix = "" if is_counter and unit == "1" else _UNITS.get(unit, "")
    if suffix and suffix not in name.split("_"):
        name = f"{name}_{suffix}"
    return name


def _family(metric: Metric, newest: Newest) -> Family:
    data, text = metric.data, metric.description or metric.name
    is_counter = isinstance(data, Sum) and data.is_monotonic
    name = name_of(metric.name, metric.unit or "", is_counter=is_counter)
    labels = sorted({str(label) for point in data.data_points for label in point.attributes or ()})
    legal = [_NOT_IN_NAMES.sub("_", label) for label in labels]
    if isinstance(data, Histogram):
        return _histogram(HistogramMetricFamily(name, text, labels=legal), data.data_points, labels, newest)
    if is_counter:
        return _numbers(CounterMetricFamily(name, text, labels=legal), data, labels)
    return _numbers(GaugeMetricFamily(name, text, labels=legal), data, labels)


def _numbers(family: Any, data: Any, labels: Sequence[str]) -> Family:
    assert isinstance(data, Sum | Gauge)  # noqa: S101 - our instruments make nothing else
    for point in data.data_points:
        assert isinstance(point, NumberDataPoint)  # noqa: S101 - as above
        family.add_metric(_values(point.attributes, labels), point.value)
    return family  # type: ignore[no-any-return]


def _histogram(
    family: HistogramMetricFamily, points: Iterable[HistogramDataPoint], labels: Sequence[str], newest: Newest
) -> HistogramMetricFamily:
    for point in points:
        bounds = [*map(floatToGoString, point.explicit_bounds), "+Inf"]
        values = _values(point.attributes, labels)
        newest |= {(family.name, *values, place): each for place, each in _exemplars(point).items()}
        buckets: list[Any] = [
            (bound, float(count), newest.get((family.name, *values, place)))
            for place, (bound, count) in enumerate(zip(bounds, accumulate(point.bucket_counts), strict=True))
        ]
        family.add_metric(values, buckets, point.sum)
    return family


def _exemplars(point: HistogramDataPoint) -> dict[int, Exemplar]:
    """The newest of each bucket."""
    found: dict[int, Exemplar] = {}
    for each in sorted(point.exemplars, key=lambda exemplar: exemplar.time_unix_nano):
        if each.trace_id and each.span_id:
            ids = {"trace_id": f"{each.trace_id:032x}", "span_id": f"{each.span_id:016x}"}
            place = sum(each.value > bound for bound in point.explicit_bounds)
            found[place] = Exemplar(ids, float(each.value), each.time_unix_nano / 1e9)
    return found


def _values(attributes: Mapping[str, Any] | None, labels: Sequence[str]) -> list[str]:
    told = attributes or {}
    return [_word(told[label]) if label in told else "" for label in labels]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
