"""Telemetry over real sockets on loopback: two protocols, a collector that dies and comes back, one that hangs."""

import datetime
import gc
import ipaddress
import logging
import os
import socket
import time

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.context import new_span_id, new_trace_id
from lltm_ray.telemetry.hub import build_hub
from lltm_ray.telemetry.prometheus import PrometheusReader
from lltm_ray.telemetry.rows import LogRow
from tests.otlp_sink import attributes, grpc_sink, http_sink
from tests.unit.telemetry.rows_made import attempt_row, request_row

SINKS = {"otlp-grpc": grpc_sink, "otlp-http": http_sink}


@pytest.fixture
def port():
    """Where nothing listens, and which nobody but a sink here is given meanwhile."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def make(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "600000")
    made = []

    def make(*exporters, **options):
        made.append(build_hub(TelemetryConfig(exporters=exporters, **options), None))
        return made[-1]

    yield make
    for each in made:
        each.close(timeout_s=0.5)


def request(**changes):
    ids = {"trace_id": new_trace_id()}
    row = request_row(**ids, span_id=new_span_id(), arrived_unix_nano=time.time_ns() - 10**9, **changes)
    return row, attempt_row(**ids, request_span_id=row.span_id, span_id=new_span_id())


def batch(*pairs):
    return {"requests": pack("requests", [a for a, _ in pairs]), "attempts": pack("attempts", [b for _, b in pairs])}


def plain(span):
    """All of a protobuf span that must be the same by whichever way it came."""
    events = [(event.name, event.time_unix_nano, attributes(event)) for event in span.events]
    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.trace_state
    times = span.start_time_unix_nano, span.end_time_unix_nano
    return (*ids, span.name, span.kind, *times, attributes(span), events, span.status.code, span.status.message)


def tree_size(pairs):
    return 6 * len(pairs)


def exporter(hub, name):
    return hub.status()["exporters"][name]


def until(condition, timeout_s=60.0):
    """What `condition` returns once it is true."""
    end = time.monotonic() + timeout_s
    while not (seen := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
    return seen


def test_both_protocols_carry_the_same_spans_metrics_and_logs(make):
    ok, failed = request(), request(status=500, error_type="500", error="it broke", parent_span_id="00f067aa0ba902b7")
    row = LogRow(time.time_ns(), ok[0].trace_id, ok[0].span_id, "ERROR", "lltm_ray.x", "hot", '{"gpu": 1}')
    with grpc_sink() as one, http_sink() as other:
        hub = make(f"otlp-grpc={one.endpoint}", f"otlp-http={other.endpoint}")
        hub.put("gateway-0", batch(ok, failed) | {"logs": pack("logs", [row])})
        hub.close(timeout_s=60.0)
        assert sorted(map(plain, one.spans()), key=str) == sorted(map(plain, other.spans()), key=str)
        assert len(one.spans()) == tree_size([ok, failed])
        by_id = {span.span_id.hex(): span for span in one.spans()}
        assert by_id[ok[1].span_id].parent_span_id.hex() == ok[0].span_id
        assert by_id[failed[0].span_id].parent_span_id.hex() == "00f067aa0ba902b7"
        assert attributes(by_id[failed[0].span_id])["error.type"] == "500"
        names = [{metric.name for metric in sink.metrics()} for sink in (one, other)]
        assert names[0] == names[1] >= {"gen_ai.server.request.duration", "lltm.telemetry.rows"}
        logs = [
            [(log.body.string_value, log.trace_id.hex(), attributes(log)) for log in s.logs()] for s in (one, other)
        ]
        assert logs[0] == logs[1] == [("hot", ok[0].trace_id, {"gpu": 1})]


@pytest.mark.parametrize("protocol", SINKS)
def test_headers_and_compression_of_the_environment_arrive(make, monkeypatch, protocol):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20k3y,x-tenant=a")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-tenant=b")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc" if protocol == "otlp-grpc" else "http/protobuf")
    pairs = [request() for _ in range(20)]
    with SINKS[protocol]() as sink:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
        hub = make("otlp")
        hub.put("gateway-0", batch(*pairs))
        hub.close(timeout_s=60.0)
        assert len(sink.spans()) == tree_size(pairs)
        assert sink.of("traces")[0].headers["x-tenant"] == "b"
        metrics = sink.of("metrics")[0]
        assert (metrics.headers["x-tenant"], metrics.headers["authorization"]) == ("a", "Bearer k3y")
        if protocol == "otlp-http":  # gRPC's library keeps its own compression to itself
            assert metrics.headers["content-encoding"] == "gzip"
            assert metrics.size_bytes < metrics.message.ByteSize() / 2


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Files of a key and of its certificate, which signs itself for this host."""
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "collector")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder / "key.pem", folder / "certificate.pem"


@pytest.mark.parametrize("protocol", SINKS)
def test_tls_is_spoken_with_the_certificate_that_the_environment_names(make, monkeypatch, tls, protocol):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tls[1]))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", requests.certs.where())
    with SINKS[protocol](tls=tls) as sink:
        hub = make(f"{protocol}={sink.endpoint.replace('http:', 'https:')}")
        hub.put("gateway-0", batch(request()))
        hub.close(timeout_s=60.0)
        assert len(sink.spans()) == tree_size([1])


@pytest.mark.parametrize("protocol", SINKS)
def test_a_dead_collector_costs_nothing_and_export_goes_on_when_it_comes_back(
    make, port, protocol, monkeypatch, caplog
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5")
    hub = make(f"{protocol}=http://127.0.0.1:{port}", "console", queue_spans=300)
    spans = f"{protocol} traces"
    for _ in range(20):
        hub.put("gateway-0", batch(*(request() for _ in range(10))))
    state = until(lambda: found if (found := exporter(hub, spans))["failures"] >= 2 else None)
    assert state["error"]
    assert (state["queued"], state["sent"], state["dropped"]) == (300, 0, 900)
    assert exporter(hub, "console")["dropped"] + exporter(hub, "console")["sent"] == 1200
    late = request()
    with SINKS[protocol](port) as sink:
        hub.put("gateway-0", batch(late))
        sink.wait_for(lambda sink: any(span.span_id.hex() == late[0].span_id for span in sink.spans()), 60)
        until(lambda: exporter(hub, spans)["error"] == "")
        assert len({span.span_id for span in sink.spans()}) == 300, "one may come twice, where its answer came too late"
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING and spans in record.getMessage()]
    assert len(lines) == 1
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry.exporter")]


def test_put_is_as_quick_beside_a_collector_that_hangs(make, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    batches = [batch(*(request() for _ in range(20))) for _ in range(60)]

    def cpu_s(hub, some):
        gc.disable()  # a collection of the whole process's objects is the work of neither
        try:
            began = time.thread_time()
            for each in some:
                hub.put("gateway-0", each)
            return time.thread_time() - began
        finally:
            gc.enable()

    with http_sink() as quick, http_sink() as slow:
        slow.delay_s = 60.0
        hubs = make(f"otlp-http={quick.endpoint}"), make(f"otlp-http={slow.endpoint}", queue_spans=1000)
        for hub in hubs:
            cpu_s(hub, batches[:10])
        spent = [0.0, 0.0]
        for i in range(10, 60, 10):  # side by side
            for which, hub in enumerate(hubs):
                spent[which] += cpu_s(hub, batches[i : i + 10])
        assert spent[1] < 2 * spent[0]
        assert exporter(hubs[1], "otlp-http traces")["dropped"] > 0
        began = time.monotonic()
        hubs[1].close(timeout_s=0.5)
        assert time.monotonic() - began < 20.0


def test_a_collector_that_refuses_is_told_apart_by_its_reason(make):
    with http_sink() as sink:
        sink.status = 403
        hub = make(f"otlp-http={sink.endpoint}")
        hub.put("gateway-0", batch(request()))
        assert "403" in until(lambda: exporter(hub, "otlp-http traces")["error"])
        sink.status = 200
        sink.wait_for(lambda sink: len(sink.spans()) == tree_size([1]))


def test_the_end_keeps_its_rows_though_the_collector_is_away(make, port, tmp_path, caplog):
    away = f"otlp-http=http://127.0.0.1:{port}"
    hub = build_hub(TelemetryConfig(exporters=(away,)), tmp_path, None, [PrometheusReader()])
    hub.put("gateway-0", batch(request()))
    hub.close(timeout_s=0.3)
    again = build_hub(TelemetryConfig(exporters=()), tmp_path)
    assert again.read_since().tables["requests"].num_rows == 1
    again.close()
    assert "the last metrics were not sent everywhere" in caplog.text


def test_two_exporters_of_one_protocol_are_counted_apart(make):
    with http_sink() as one, http_sink() as other:
        hub = make(f"otlp-http={one.endpoint}", f"otlp-http={other.endpoint}")
        hub.put("gateway-0", batch(request()))
        for sink in (one, other):
            sink.wait_for(lambda sink: len(sink.spans()) == tree_size([1]))
        assert {"otlp-http traces", f"otlp-http traces {other.endpoint}"} <= set(hub.status()["exporters"])
