"""OTLP: our spans, metrics and log rows through OpenTelemetry's own exporters.

They read the environment themselves: `OTEL_EXPORTER_OTLP_{ENDPOINT,HEADERS,TIMEOUT,COMPRESSION,INSECURE,CERTIFICATE,
CLIENT_KEY,CLIENT_CERTIFICATE}` and the same with `TRACES_`, `METRICS_` or `LOGS_` after `OTLP_`. What they would only
log, or ignore, is refused here. `OTEL_EXPORTER_OTLP_TIMEOUT` is in seconds, as in all of OpenTelemetry's Python.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogs
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogs
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry.rows import LogRow
from lltm_ray.telemetry.spans import Span

PROTOCOLS = {"grpc": "otlp-grpc", "http/protobuf": "otlp-http"}
"""Values of `OTEL_EXPORTER_OTLP_PROTOCOL` -> our exporter."""
SIGNALS = ("traces", "metrics", "logs")
_MAKERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("otlp-grpc", "traces"): GrpcSpans,
    ("otlp-grpc", "metrics"): GrpcMetrics,
    ("otlp-grpc", "logs"): GrpcLogs,
    ("otlp-http", "traces"): HttpSpans,
    ("otlp-http", "metrics"): HttpMetrics,
    ("otlp-http", "logs"): HttpLogs,
}
_KINDS = {kind.name.lower(): kind for kind in SpanKind}
_SEVERITIES = {
    "DEBUG": SeverityNumber.DEBUG,
    "INFO": SeverityNumber.INFO,
    "WARNING": SeverityNumber.WARN,
    "ERROR": SeverityNumber.ERROR,
    "CRITICAL": SeverityNumber.FATAL,
}
_COMPRESSIONS = {"otlp-grpc": ("none", "gzip"), "otlp-http": ("none", "gzip", "deflate")}


def wanted(signal: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a signal goes out by OTLP: `OTEL_{TRACES,METRICS,LOGS}_EXPORTER` and `OTEL_SDK_DISABLED` may say no."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    chosen = environ.get(f"OTEL_{signal.upper()}_EXPORTER") or "otlp"
    return "otlp" in (name.strip() for name in chosen.split(","))


def chosen_protocol(signal: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """`otlp-grpc` or `otlp-http`, as the environment says; None where it names no endpoint for the signal.

    Raises:
        ConfigError: `OTEL_EXPORTER_OTLP_PROTOCOL`, or the signal's own, is not one we speak.
    """
    name, value = _setting(signal, "PROTOCOL", environ)
    if value and value not in PROTOCOLS:
        raise ConfigError(name, value, f"must be one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[value or "http/protobuf"] if _setting(signal, "ENDPOINT", environ)[1] else None


def build_exporter(protocol: str, signal: str, endpoint: str = "") -> Any:
    """OpenTelemetry's exporter.

    Args:
        protocol: `otlp-grpc` or `otlp-http`.
        signal: one of `SIGNALS`.
        endpoint: base address that wins over the environment's; empty: the environment's, else this host.

    Raises:
        ConfigError: a variable of the environment cannot be used.
    """
    options: dict[str, Any] = {"endpoint": _full_endpoint(protocol, signal, endpoint)} if endpoint else {}
    if _check_environment(protocol, signal) == "none" and protocol == "otlp-grpc":
        options["compression"] = 0  # grpc.Compression.NoCompression; the exporter itself refuses the word
    if protocol == "otlp-http" and _setting(signal, "CERTIFICATE")[1]:
        options["session"] = _Session()
    try:
        return _MAKERS[protocol, signal](**options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError("exporters", protocol, f"OpenTelemetry's exporter of {signal} refused: {error}") from error


def _full_endpoint(protocol: str, signal: str, endpoint: str) -> str:
    return f"{endpoint.rstrip('/')}/v1/{signal}" if protocol == "otlp-http" else endpoint


def _setting(signal: str, name: str, environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """A variable and its value: the signal's own before the common one."""
    for variable in (f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}", f"OTEL_EXPORTER_OTLP_{name}"):
        if environ.get(variable):
            return variable, environ[variable].strip()
    return f"OTEL_EXPORTER_OTLP_{name}", ""


def _check_environment(protocol: str, signal: str) -> str:
    """Refuse what cannot be used; the compression asked for."""
    for name in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"):
        variable, value = _setting(signal, name)
        if value and not Path(value).is_file():
            raise ConfigError(variable, value, "no such file")
    variable, value = _setting(signal, "TIMEOUT")
    if value and not value.replace(".", "", 1).isdigit():
        raise ConfigError(variable, value, "must be a number of seconds")
    variable, value = _setting(signal, "COMPRESSION")
    if value and value.lower() not in _COMPRESSIONS[protocol]:
        raise ConfigError(variable, value, f"{protocol} can {', '.join(_COMPRESSIONS[protocol])}")
    return value.lower()


class _Session(requests.Session):
    """Trusts the certificate it was given: `requests` itself lets `REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE` win."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        """As the base, with our certificate."""
        given = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, given, cert)


class Translator:
    """Our records as the SDK's, for one exporter's thread.

    Args:
        resource: who speaks.
        version: of the scopes.
        schema_url: of the conventions that the attributes follow.
    """

    def __init__(self, resource: Resource, version: str = "", schema_url: str = "") -> None:
        self._resource, self._version, self._schema_url = resource, version, schema_url
        self._scopes: dict[str, InstrumentationScope] = {}

    def spans(self, spans: Sequence[Span]) -> list[ReadableSpan]:
        """One each."""
        return [self._span(span) for span in spans]

    def _span(self, span: Span) -> ReadableSpan:
        flags = TraceFlags(span.flags)
        state = TraceState.from_header([span.state]) if span.state else None
        trace_id = int(span.trace_id, 16)
        is_remote = span.kind in ("server", "consumer")
        parent = None
        if span.parent_span_id:
            parent = SpanContext(trace_id, int(span.parent_span_id, 16), is_remote, flags, state)
        return ReadableSpan(
            span.name,
            SpanContext(trace_id, int(span.span_id, 16), False, flags, state),
            parent,
            self._resource,
            span.attributes,
            [Event(event.name, event.attributes, event.at_unix_nano) for event in span.events],
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR, span.status_error or None) if span.is_error else Status(),
            start_time=span.start_unix_nano,
            end_time=span.end_unix_nano,
            instrumentation_scope=self._scope(span.scope),
        )

    def logs(self, rows: Sequence[LogRow]) -> list[ReadableLogRecord]:
        """One each."""
        return [self._log(row) for row in rows]

    def _log(self, row: LogRow) -> ReadableLogRecord:
        trace_id, span_id = int(row.trace_id or "0", 16), int(row.span_id or "0", 16)
        context = SpanContext(trace_id, span_id, False, TraceFlags(TraceFlags.SAMPLED if trace_id else 0))
        record = LogRecord(
            timestamp=row.at_unix_nano,
            observed_timestamp=row.at_unix_nano,
            context=set_span_in_context(NonRecordingSpan(context)),
            severity_text=row.severity,
            severity_number=_SEVERITIES.get(row.severity, SeverityNumber.UNSPECIFIED),
            body=row.message,
            attributes=json.loads(row.attributes or "{}"),
        )
        return ReadableLogRecord(record, self._resource, self._scope(row.logger))

    def _scope(self, name: str) -> InstrumentationScope:
        scope = self._scopes.get(name)
        if scope is None:
            scope = self._scopes[name] = InstrumentationScope(name, self._version, self._schema_url)
        return scope
