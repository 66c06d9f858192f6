"""Where a program's own spans and metrics go: its OpenTelemetry providers, never ours, never replaced.

Only OpenTelemetry's API is used here, so a program without its SDK pays for calls that do nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import metrics as otel_metrics
from opentelemetry import trace as otel_trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, TracerProvider

from lltm_ray import __version__
from lltm_ray.errors import LltmRayError, UpstreamError
from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.content import Capture, read_capture
from lltm_ray.telemetry.profiles import Metric, Profile, read_profile

_SCOPE = "lltm_ray.client"
Labels = Mapping[str, str | int]
_Record = Callable[[float, Labels, Context], None]


class Outlet:
    """A tracer and instruments of one pair of providers.

    Args:
        tracer_provider: of the program; None: the global one, as it is at each call.
        meter_provider: likewise.
        capture: makes spans' content; None: as the environment says, which is none unless opted in.

    Raises:
        ConfigError: a variable of the environment cannot be used.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: otel_metrics.MeterProvider | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.profile: Profile = read_profile(os.environ)
        self.capture = capture or read_capture(os.environ, None)
        self._given = tracer_provider, meter_provider
        self._tracer: tuple[Any, Any] = None, None
        self._instruments: tuple[Any, dict[str, _Record]] = None, {}

    @property
    def tracer(self) -> otel_trace.Tracer:
        """Of the given provider, or of the one that is global now."""
        provider, tracer = self._tracer
        now = self._given[0] or otel_trace.get_tracer_provider()
        if provider is not now:
            tracer = now.get_tracer(_SCOPE, __version__, self.profile.schema_url or None)
            self._tracer = now, tracer
        found: otel_trace.Tracer = tracer
        return found

    def measure(self, operation: str, quantity: str, value: float, labels: Labels, context: Context) -> None:
        """Give a quantity of `Profile.client` to its instruments.

        Args:
            operation: `gen_ai.operation.name`.
            quantity: as in `profiles.Quantities`; one that the operation does not have is left out.
            value: in the instruments' unit.
            labels: without the instruments' own.
            context: with the call's span, for exemplars.
        """
        records = self._records()
        for metric in self.profile.client[operation].get(quantity, ()):
            records[metric.name](value, {**labels, **metric.attributes}, context)

    def _records(self) -> dict[str, _Record]:
        provider, records = self._instruments
        now = self._given[1] or otel_metrics.get_meter_provider()
        if provider is not now:
            meter = now.get_meter(_SCOPE, __version__, self.profile.schema_url or None)
            every = {
                each.name: each
                for of_operation in self.profile.client.values()
                for some in of_operation.values()
                for each in some
            }
            records = {name: _make(meter, metric) for name, metric in every.items()}
            self._instruments = now, records
        return records


def _make(meter: otel_metrics.Meter, metric: Metric) -> _Record:
    if metric.kind == "counter":
        return meter.create_counter(metric.name, metric.unit, metric.description).add
    return meter.create_histogram(
        metric.name, metric.unit, metric.description, explicit_bucket_boundaries_advisory=list(metric.bounds)
    ).record


def error_type_of_exception(error: BaseException) -> str:
    """Of low cardinality: the server's HTTP status, our errors' code, else the exception's class."""
    if isinstance(error, UpstreamError):
        return str(error.http_status)
    return error.code if isinstance(error, LltmRayError) else type(error).__name__


def fail(span: Span, error: BaseException) -> None:
    """Status ERROR, `error.type`, and an exception event."""
    span.set_attribute(names.ERROR_TYPE, error_type_of_exception(error))
    span.set_status(Status(StatusCode.ERROR, str(error)))
    span.record_exception(error)


_current: Outlet | None = None


def current_outlet() -> Outlet:
    """The one that `instrument()` set, else one of the global providers."""
    return _current or _default()


@functools.cache
def _default() -> Outlet:
    return Outlet()


def set_outlet(outlet: Outlet | None) -> None:
    """Make it the current one; None: the global providers."""
    global _current
    _current = outlet
