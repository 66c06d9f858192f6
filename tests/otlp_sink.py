"""A collector in this process: OTLP by gRPC and HTTP on loopback, all three signals, everything kept for assertions."""

from __future__ import annotations

import contextlib
import gzip
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

_REQUESTS: dict[str, Any] = {
    "traces": (trace_service_pb2.ExportTraceServiceRequest, trace_service_pb2.ExportTraceServiceResponse),
    "metrics": (metrics_service_pb2.ExportMetricsServiceRequest, metrics_service_pb2.ExportMetricsServiceResponse),
    "logs": (logs_service_pb2.ExportLogsServiceRequest, logs_service_pb2.ExportLogsServiceResponse),
}


@dataclass
class Received:
    """One request: its signal, what it came with, and its protobuf message."""

    signal: str
    headers: dict[str, str]
    message: Any
    size_bytes: int = 0
    """As it was on the wire, where HTTP tells."""


@dataclass
class Sink:
    """What came in. `delay_s` makes it slow; `status` makes the HTTP side refuse."""

    port: int = 0
    received: list[Received] = field(default_factory=list)
    delay_s: float = 0.0
    status: int = 200

    @property
    def endpoint(self) -> str:
        """Base address for the exporters."""
        return f"http://127.0.0.1:{self.port}"

    def take(self, received: Received) -> None:
        """Keep a request."""
        time.sleep(self.delay_s)
        self.received.append(received)

    def of(self, signal: str) -> list[Received]:
        """Requests of one signal."""
        return [each for each in list(self.received) if each.signal == signal]

    def spans(self) -> list[Any]:
        """Protobuf spans, in the order they came."""
        return [
            span
            for request in self.of("traces")
            for resource in request.message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def metrics(self) -> list[Any]:
        """Protobuf metrics, in the order they came."""
        return [
            metric
            for request in self.of("metrics")
            for resource in request.message.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]

    def logs(self) -> list[Any]:
        """Protobuf log records, in the order they came."""
        return [
            record
            for request in self.of("logs")
            for resource in request.message.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def wait_for(self, condition: Callable[[Sink], bool], timeout_s: float = 60.0) -> None:
        """Until the condition holds.

        Raises:
            TimeoutError: it did not in time.
        """
        end = time.monotonic() + timeout_s
        while not condition(self):
            if time.monotonic() > end:
                raise TimeoutError(f"the sink has {len(self.spans())} spans, {len(self.received)} requests")
            time.sleep(0.01)


def attributes(of: Any) -> dict[str, Any]:
    """A protobuf record's attributes as plain values."""
    return {each.key: _plain(each.value) for each in of.attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


@contextlib.contextmanager
def grpc_sink(port: int = 0, tls: tuple[Path, Path] | None = None) -> Iterator[Sink]:
    """OTLP/gRPC; port 0 takes a free one. `tls`: files of a key and its certificate."""
    sink = Sink()
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])

    def export(signal: str) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
        def take(_self: Any, request: Any, context: grpc.ServicerContext) -> Any:
            sink.take(Received(signal, dict(context.invocation_metadata()), request))
            return _REQUESTS[signal][1]()

        return take

    for signal, module, name in (
        ("traces", trace_service_pb2_grpc, "TraceService"),
        ("metrics", metrics_service_pb2_grpc, "MetricsService"),
        ("logs", logs_service_pb2_grpc, "LogsService"),
    ):
        servicer = type(name, (getattr(module, f"{name}Servicer"),), {"Export": export(signal)})
        getattr(module, f"add_{name}Servicer_to_server")(servicer(), server)
    if tls is None:
        sink.port = server.add_insecure_port(f"127.0.0.1:{port}")
    else:
        pair = tuple(file.read_bytes() for file in tls)
        sink.port = server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield sink
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def http_sink(port: int = 0, tls: tuple[Path, Path] | None = None) -> Iterator[Sink]:
    """OTLP/HTTP with protobuf bodies; arguments as of `grpc_sink`."""
    sink = Sink()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            signal = self.path.rpartition("/")[2]
            unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(
                self.headers.get("content-encoding", ""), bytes
            )
            request, response = _REQUESTS[signal]
            headers = {name.lower(): value for name, value in self.headers.items()}
            if sink.status == 200:
                sink.take(Received(signal, headers, request.FromString(unpack(body)), len(body)))
            answer = response().SerializeToString()
            self.send_response(sink.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls[1], tls[0])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    sink.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield sink
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
