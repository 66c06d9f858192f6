"""Exporters: where spans, metrics and logs go, several at once, each on its own.

Names: `otlp` (as the environment says), `otlp-grpc`, `otlp-http`, `console`, or an entry point of the group
`lltm_ray.exporters`: a callable without arguments that returns an object with `export(spans)`, which takes a list of
`spans.Span` and may return False or raise, and `shutdown()`. OpenTelemetry's global providers are left alone.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, TextIO

from opentelemetry.sdk.metrics import Histogram
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    MetricExporter,
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation
from opentelemetry.sdk.resources import Resource

from lltm_ray import __version__
from lltm_ray.config import TelemetryConfig
from lltm_ray.errors import ConfigError
from lltm_ray.telemetry import otlp
from lltm_ray.telemetry.cumulation import DELTAS, Cumulation
from lltm_ray.telemetry.pump import Counts, Pump, Reporter, overhear
from lltm_ray.telemetry.rows import LogRow
from lltm_ray.telemetry.spans import Span

GROUP = "lltm_ray.exporters"
_FIXED = ExplicitBucketHistogramAggregation()
BUILT_IN = ("otlp", "otlp-grpc", "otlp-http", "console")
_ADDRESS = re.compile(r"(\w+://)?(?:[^/?#@\s]*@)?((?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?)(?=[/?#]|\Z)")


class Console:
    """One JSON object a line and span.

    Args:
        file: None: standard output, as it is when a line is written.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def export(self, spans: Sequence[Span]) -> None:
        """Write them."""
        file = self._file or sys.stdout
        file.writelines(f"{json.dumps(_as_dict(span), ensure_ascii=False)}\n" for span in spans)
        file.flush()

    def shutdown(self) -> None:
        """Nothing is held."""


def _as_dict(span: Span) -> dict[str, Any]:
    told = {field.name: getattr(span, field.name) for field in fields(span)}
    told["events"] = [event._asdict() for event in span.events]
    return told


class Exporters:
    """All of a fleet's destinations. `export*` never block and never raise.

    Args:
        config: names them.
        resource: who speaks.
        schema_url: of the conventions that attributes follow.

    Raises:
        ConfigError: an exporter that is not there, or a variable of the environment that cannot be used.
    """

    def __init__(self, config: TelemetryConfig, resource: Resource, schema_url: str = "") -> None:
        overhear()
        self._translator = (resource, __version__, schema_url)
        self._capacity = config.queue_spans
        self._pumps: list[Pump[Span]] = []
        self._log_pumps: list[Pump[LogRow]] = []
        self._metrics: list[_Metrics] = []
        try:
            for name in dict.fromkeys(config.exporters):
                self._add(*name.partition("=")[::2])
        except Exception:
            self.shutdown(0.0)
            raise

    @property
    def takes_spans(self) -> bool:
        """Whether there is anyone to export them to."""
        return bool(self._pumps)

    def export(self, spans: Sequence[Span]) -> None:
        """Queue spans for every destination."""
        for pump in self._pumps if spans else ():
            pump.put(spans)

    def export_logs(self, rows: Sequence[LogRow]) -> None:
        """Queue log rows for every destination that takes logs."""
        for pump in self._log_pumps if rows else ():
            pump.put(rows)

    def metric_readers(self) -> list[MetricReader]:
        """For a meter provider, which then owns them: one for each destination that takes metrics.

        `OTEL_METRIC_EXPORT_INTERVAL` (milliseconds) is honoured.
        """
        return [PeriodicExportingMetricReader(exporter) for exporter in self._metrics]

    def forget(self, engines: Collection[str]) -> None:
        """Let go of metrics of engines that are gone, once they were exported for the last time."""
        for metrics in self._metrics:
            metrics.forget(engines)

    def counts(self) -> dict[str, Counts]:
        """Destination -> what became of what it was given."""
        all_of_them: list[Any] = [*self._all, *self._metrics]
        return {each.name: each.counts() for each in all_of_them}

    @property
    def _all(self) -> list[Pump[Any]]:
        return [*self._pumps, *self._log_pumps]

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send what is queued now; whether each had its time and all went."""
        end = time.monotonic() + timeout_s
        for pump in self._all:
            pump.flush(0.0)
        return all(pump.flush(max(0.0, end - time.monotonic())) for pump in self._all)

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """Flush for so long all together, drop the rest, end the threads. Meter providers are shut down before."""
        threads = [threading.Thread(target=pump.shutdown, args=(timeout_s,), daemon=True) for pump in self._all]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _add(self, name: str, endpoint: str) -> None:
        if name == "otlp":
            self._add_chosen()
        elif name in ("otlp-grpc", "otlp-http"):
            for signal in otlp.SIGNALS:
                self._add_signal(name, signal, endpoint)
        else:
            exporter = Console() if name == "console" else _load(name)
            self._pumps.append(Pump(name, exporter.export, self._capacity, exporter.shutdown))

    def _add_chosen(self) -> None:
        """The environment's choice, signal by signal."""
        for signal in otlp.SIGNALS:
            protocol = otlp.chosen_protocol(signal)
            if protocol is not None:
                self._add_signal(protocol, signal, "")

    def _add_signal(self, protocol: str, signal: str, endpoint: str) -> None:
        if not otlp.wanted(signal):
            return
        inner = otlp.build_exporter(protocol, signal, endpoint)
        translator = otlp.Translator(*self._translator)
        name = self._name(f"{protocol} {signal}", endpoint)
        if signal == "traces":
            self._pumps.append(Pump(name, _sending(inner, translator.spans), self._capacity, inner.shutdown))
        elif signal == "logs":
            self._log_pumps.append(Pump(name, _sending(inner, translator.logs), self._capacity, inner.shutdown))
        else:
            self._metrics.append(_Metrics(name, inner))

    def _name(self, name: str, endpoint: str) -> str:
        """Another one each; no more of an endpoint than host and port, for the rest may hold credentials."""
        taken = self.counts()
        if name in taken and (address := _ADDRESS.match(endpoint)):
            name += f" {address[1] or ''}{address[2]}"
        numbered = (f"{name} {number}" for number in range(2, len(taken) + 3))
        return name if name not in taken else next(each for each in numbered if each not in taken)


def _sending(inner: Any, translate: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """Translated in the pump's thread; the SDK's results are enums with one `SUCCESS`."""
    return lambda items: bool(inner.export(translate(items)).name == "SUCCESS")


def _load(name: str) -> Any:
    """An exporter from an entry point."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join((*BUILT_IN, *sorted(found)))
        raise ConfigError("exporters", name, f"no such exporter, nor an entry point in {GROUP!r}; known are {known}")
    try:
        exporter = found[name].load()()
        _ = exporter.export, exporter.shutdown
        return exporter
    except Exception as error:
        raise ConfigError("exporters", name, f"{found[name].value} failed: {type(error).__name__}: {error}") from error


def _wants_sums(inner: Any) -> bool:
    """Whether histograms are to be whole sums of fixed buckets: the default, which the environment may change."""
    temporality = (inner._preferred_temporality or {}).get(Histogram, AggregationTemporality.CUMULATIVE)
    aggregation = (inner._preferred_aggregation or {}).get(Histogram, _FIXED)
    is_fixed = isinstance(aggregation, ExplicitBucketHistogramAggregation)
    return is_fixed and temporality is AggregationTemporality.CUMULATIVE


class _Metrics(MetricExporter):
    """A metric exporter whose failures are counted and told once a minute."""

    def __init__(self, name: str, inner: Any) -> None:
        is_ours = _wants_sums(inner)
        temporality = {**(inner._preferred_temporality or {}), **(DELTAS if is_ours else {})}
        super().__init__(temporality, inner._preferred_aggregation)
        self.name, self._inner, self._reporter, self._sent = name, inner, Reporter(name), 0
        self._cumulation = Cumulation() if is_ours else None

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Called by the reader's thread."""
        told = metrics_data if self._cumulation is None else self._cumulation.add(metrics_data)

        def send() -> bool:
            result = self._inner.export(told, timeout_millis=timeout_millis)
            return result is MetricExportResult.SUCCESS

        is_sent = self._reporter.attempt(send)
        self._sent += is_sent
        return MetricExportResult.SUCCESS if is_sent else MetricExportResult.FAILURE

    def forget(self, engines: Collection[str]) -> None:
        """As `Cumulation.forget`."""
        if self._cumulation is not None:
            self._cumulation.forget(engines)

    def counts(self) -> Counts:
        """In collections; a failed one is dropped, as the next one holds its sums."""
        failures = self._reporter.failures
        return Counts(0, self._sent, failures, failures, self._reporter.error)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Nothing is held."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Called by the reader."""
        with self._reporter.listening():
            self._inner.shutdown()
