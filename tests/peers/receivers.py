"""Collectors for the telemetry benches: @elastic/mockotlpserver and our own sink, each by gRPC and by HTTP."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.otlp_sink import Sink, attributes, grpc_sink, http_sink

from .install import CACHE
from .processes import StartError, running

PACKAGE = "@elastic/mockotlpserver"
PIN = "0.10.0"
_KINDS = {"INTERNAL": 1, "SERVER": 2, "CLIENT": 3, "PRODUCER": 4, "CONSUMER": 5}


@dataclass(frozen=True)
class Seen:
    """One span as a collector has it."""

    trace_id: str
    span_id: str
    parent_span_id: str
    name: str
    kind: int
    """OTLP's number: 2 SERVER, 3 CLIENT."""
    start_unix_nano: int
    end_unix_nano: int
    is_error: bool
    attributes: dict[str, Any] = field(hash=False)

    @property
    def took_s(self) -> float:
        """From its start to its end."""
        return (self.end_unix_nano - self.start_unix_nano) / 1e9


@dataclass(frozen=True)
class Receiver:
    """A collector: exporter's name with its address, and what came in so far."""

    name: str
    exporter: str
    spans: Callable[[], list[Seen]]


@contextlib.contextmanager
def receivers(folder: Path, given: str | None = None) -> Iterator[list[Receiver]]:
    """Both collectors by both protocols.

    Args:
        folder: for logs.
        given: path of the `mockotlpserver` program; None: the one on PATH, else npm installs it into `.bench`.

    Raises:
        StartError: there is none, or it does not start.
    """
    package = find_package(given)
    with contextlib.ExitStack() as stack:
        mocks = [stack.enter_context(mock(package, service, folder)) for service in ("grpc", "http")]
        by_grpc, by_http = stack.enter_context(grpc_sink()), stack.enter_context(http_sink())
        yield [*mocks, _of_sink("grpc", by_grpc), _of_sink("http", by_http)]


def find_package(given: str | None) -> Path:
    """Folder of mockotlpserver's package.

    Raises:
        StartError: it is nowhere, and npm cannot install it.
    """
    program = given or shutil.which("mockotlpserver") or _install()
    folder = Path(program).resolve().parents[1]
    if not (folder / "lib/mockotlpserver.js").is_file():
        raise StartError(f"{program} is no program of {PACKAGE}")
    return folder


def _install() -> str:
    """By npm, into our cache."""
    folder = CACHE / "mockotlpserver"
    program = folder / "node_modules/.bin/mockotlpserver"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        if npm is None:
            raise StartError(f"{PACKAGE} is not on PATH, and there is no npm to install it")
        done = subprocess.run(
            [npm, "install", "--prefix", str(folder), f"{PACKAGE}@{PIN}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise StartError(f"npm could not install {PACKAGE}: {done.stderr[-400:].strip()}")
    return str(program)


@contextlib.contextmanager
def mock(package: Path, service: str, folder: Path) -> Iterator[Receiver]:
    """mockotlpserver in a process of its own, on a free port."""
    script, file = Path(__file__).with_name("mockotlp.js"), folder / f"mock-{service}.jsonl"
    file.touch()
    argv = ["node", str(script), str(package), service, str(file)]
    with running(argv, folder / f"mock-{service}.log", talks=True) as process:
        url = process.first_line().rstrip("/")
        yield Receiver(f"mockotlpserver {service}", f"otlp-{service}={url}", lambda: _of_lines(file))


def _of_lines(file: Path) -> list[Seen]:
    """Whole lines; the last one may still be written."""
    found = []
    for line in file.read_text().split("\n")[:-1]:
        for resource in json.loads(line)["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                found += [_seen_json(span) for span in scope["spans"]]
    return found


def _seen_json(span: dict[str, Any]) -> Seen:
    return Seen(
        span["traceId"],
        span["spanId"],
        span.get("parentSpanId") or "",
        span["name"],
        _KINDS[span["kind"].removeprefix("SPAN_KIND_")] if isinstance(span["kind"], str) else span["kind"],
        int(span["startTimeUnixNano"]),
        int(span["endTimeUnixNano"]),
        str((span.get("status") or {}).get("code", "")) in ("STATUS_CODE_ERROR", "2"),
        {name: _number(value) for name, value in (span.get("attributes") or {}).items()},
    )


def _number(value: Any) -> Any:
    """Whole numbers may come as text, as JSON has no 64 bits of them."""
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def _of_sink(service: str, sink: Sink) -> Receiver:
    def spans() -> list[Seen]:
        return [_seen_proto(span) for span in sink.spans()]

    return Receiver(f"our sink {service}", f"otlp-{service}={sink.endpoint}", spans)


def _seen_proto(span: Any) -> Seen:
    return Seen(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        attributes(span),
    )
