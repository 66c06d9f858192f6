"""Which exporters there are, how they are named, and what a span and a log row become."""

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from opentelemetry import metrics, trace
from opentelemetry._logs import SeverityNumber
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind, StatusCode

from lltm_ray.config import FleetConfig, TelemetryConfig, build
from lltm_ray.errors import ConfigError
from lltm_ray.telemetry.exporters import Console, Exporters
from lltm_ray.telemetry.otlp import Translator
from lltm_ray.telemetry.rows import LogRow
from lltm_ray.telemetry.spans import Span, SpanEvent

HERE = Resource({"service.name": "here"})
DEAD = "http://127.0.0.1:9"


def span(**changes):
    given = {
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "span_id": "b7ad6b7169203331",
        "parent_span_id": "00f067aa0ba902b7",
        "name": "chat tiny",
        "kind": "server",
        "start_unix_nano": 1_000,
        "end_unix_nano": 2_000,
        "attributes": {"gen_ai.request.model": "tiny", "stops": ["a", "b"], "n": 3, "ok": True},
        "flags": 3,
        "state": "vendor=1,other=2",
    }
    return Span(**(given | changes))


@pytest.fixture
def make(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    made = []

    def make(*names, **options):
        made.append(Exporters(TelemetryConfig(exporters=names, **options), HERE, "https://schema/1"))
        return made[-1]

    yield make
    for each in made:
        each.shutdown(0.0)


@pytest.fixture
def entry_point(tmp_path, monkeypatch):
    """Install a distribution with one entry point, as pip would leave it."""

    def install(code):
        (tmp_path / "outside.py").write_text(code)
        info = tmp_path / "outside-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[lltm_ray.exporters]\nmine = outside:Mine\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "outside", raising=False)

    yield install
    sys.modules.pop("outside", None)


def test_a_span_becomes_the_sdks_with_all_it_has():
    event = SpanEvent("exception", 1_500, {"exception.type": "timeout"})
    given = span(error_type="timeout", status_error="too late", events=[event])
    made = Translator(HERE, "1.0", "https://schema/1").spans([given])[0]
    assert f"{made.context.trace_id:032x}" == given.trace_id
    assert f"{made.context.span_id:016x}" == given.span_id
    assert f"{made.parent.span_id:016x}" == given.parent_span_id
    assert made.parent.trace_id == made.context.trace_id
    assert (made.parent.is_remote, made.context.is_remote) == (True, False)
    assert (made.context.trace_flags, made.context.trace_state.to_header()) == (3, "vendor=1,other=2")
    assert (made.name, made.kind, made.start_time, made.end_time) == ("chat tiny", SpanKind.SERVER, 1_000, 2_000)
    assert (made.status.status_code, made.status.description) == (StatusCode.ERROR, "too late")
    assert dict(made.attributes) == given.attributes
    assert [(each.name, each.timestamp, dict(each.attributes)) for each in made.events] == [tuple(event)]
    assert (made.resource, made.instrumentation_scope.name) == (HERE, "lltm_ray")
    assert made.instrumentation_scope.schema_url == "https://schema/1"


def test_a_root_without_an_error_has_no_parent_and_no_status():
    made = Translator(HERE).spans([span(parent_span_id="", kind="internal", state="")])[0]
    assert made.parent is None
    assert made.status.status_code is StatusCode.UNSET


def test_a_log_row_becomes_the_sdks_with_its_trace():
    row = LogRow(7, "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "WARNING", "lltm_ray.x", "hot", '{"a": 1}')
    told, plain = Translator(HERE).logs([row, row._replace(trace_id="", span_id="", severity="NOTE", attributes="")])
    record = told.log_record
    assert (record.timestamp, record.body, record.severity_text) == (7, "hot", "WARNING")
    assert record.severity_number is SeverityNumber.WARN
    assert (f"{record.trace_id:032x}", f"{record.span_id:016x}", dict(record.attributes)) == (*row[1:3], {"a": 1})
    assert told.instrumentation_scope.name == "lltm_ray.x"
    assert (plain.log_record.trace_id, plain.log_record.severity_number) == (0, SeverityNumber.UNSPECIFIED)


def test_the_console_writes_one_json_object_a_line():
    file = io.StringIO()
    Console(file).export([span(events=[SpanEvent("e", 1, {"é": "ü"})]), span(span_id="1" * 16)])
    first, second = map(json.loads, file.getvalue().splitlines())
    assert first["attributes"]["stops"] == ["a", "b"]
    assert first["events"] == [{"name": "e", "at_unix_nano": 1, "attributes": {"é": "ü"}}]
    assert second["span_id"] == "1" * 16


def test_the_console_is_chosen_by_its_name(make, capsys):
    exporters = make("console")
    exporters.export([span()])
    assert exporters.flush(10)
    assert json.loads(capsys.readouterr().out)["name"] == "chat tiny"
    assert exporters.counts()["console"].sent == 1


def test_nothing_is_exported_where_the_environment_names_no_endpoint(make):
    assert make("otlp").counts() == {}
    assert not make("otlp").takes_spans


def test_an_endpoint_in_the_environment_is_enough(make, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", DEAD)
    assert set(make("otlp").counts()) == {"otlp-http traces", "otlp-http metrics", "otlp-http logs"}
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert set(make("otlp").counts()) == {"otlp-grpc traces", "otlp-http logs"}


def test_a_signals_own_endpoint_sends_that_signal_only(make, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{DEAD}/v1/traces")
    assert set(make("otlp").counts()) == {"otlp-http traces"}


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "grpc, http/protobuf"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "thrift", "grpc, http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "number of seconds"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "zip", "none, gzip"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem", "no such file"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(make, monkeypatch, variable, value, remedy):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", DEAD)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=remedy) as caught:
        make("otlp")
    assert (caught.value.field, caught.value.value) == (variable, value)


@pytest.mark.parametrize("protocol", ["otlp-grpc", "otlp-http"])
def test_no_compression_is_a_choice_too(make, monkeypatch, protocol):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    assert len(make(f"{protocol}={DEAD}").counts()) == 3


def test_an_exporter_that_is_not_there_is_named_with_those_that_are(make):
    with pytest.raises(ConfigError, match=r"exporters='zipkin'.*otlp-grpc, otlp-http, console"):
        make("console", "zipkin")


@pytest.mark.parametrize("protocol", ["otlp-grpc", "otlp-http"])
def test_no_credentials_of_an_endpoint_are_in_a_name(make, protocol):
    urls = ("http://u:secret@127.0.0.1:9/secret?t=secret", "http://v:secret@127.0.0.1:9", "http://[::1]:9", "//secret")
    names = make(*(f"{protocol}={url}" for url in ("http://127.0.0.1:1", *urls))).counts()
    assert not [name for name in names if "secret" in name]
    assert {name for name in names if "traces" in name} == {
        f"{protocol} traces",
        f"{protocol} traces http://127.0.0.1:9",
        f"{protocol} traces http://127.0.0.1:9 2",
        f"{protocol} traces http://[::1]:9",
        f"{protocol} traces 2",
    }


def test_an_entry_point_adds_an_exporter(make, entry_point):
    entry_point(
        "class Mine:\n"
        "    spans, ended = [], 0\n"
        "    def export(self, spans): self.spans += spans\n"
        "    def shutdown(self): type(self).ended += 1\n"
    )
    exporters = make("mine")
    exporters.export([span()])
    exporters.shutdown(10)
    import outside

    assert [each.name for each in outside.Mine.spans] == ["chat tiny"]
    assert outside.Mine.ended == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [("def Mine():\n    raise OSError('no disk')\n", "OSError: no disk"), ("class Mine:\n    pass\n", "no attribute")],
)
def test_an_entry_point_that_cannot_be_used_is_named(make, entry_point, code, why):
    entry_point(code)
    with pytest.raises(ConfigError, match=rf"exporters='mine'.*outside:Mine failed: .*{why}"):
        make("mine")


def test_all_of_opentelemetry_can_be_switched_off(make, monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert make(f"otlp-http={DEAD}").counts() == {}


def test_metric_readers_are_the_sdks_and_no_global_provider_is_set(make, monkeypatch):
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "600000")
    before = trace.get_tracer_provider(), metrics.get_meter_provider()
    readers = make(f"otlp-grpc={DEAD}", f"otlp-http={DEAD}").metric_readers()
    assert [type(each) for each in readers] == [PeriodicExportingMetricReader] * 2
    assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == before
    logging.disable(logging.WARNING)  # a reader without a provider says so when it ends
    for reader in readers:
        reader.shutdown(timeout_millis=100)
    logging.disable(logging.NOTSET)


def test_telemetry_is_set_in_toml_and_checked():
    config = build(FleetConfig, {"telemetry": {"exporters": ["console"], "sample_ratio": 0.1}})
    assert (config.telemetry.exporters, config.telemetry.sample_ratio) == (("console",), 0.1)
    assert FleetConfig().telemetry.enabled
    near = FleetConfig(telemetry=TelemetryConfig(segment_dir="rows")).with_absolute_paths()
    assert near.telemetry == TelemetryConfig(segment_dir=str(Path.cwd() / "rows"))
    with pytest.raises(ConfigError, match="sample_ratio"):
        TelemetryConfig(sample_ratio=1.5)
    with pytest.raises(ConfigError, match="exporters="):
        TelemetryConfig(exporters=("=http://x",))
