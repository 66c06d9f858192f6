"""`lltm-ray top` draws what a look says, and reads it from a gateway."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from lltm_ray.cli import app
from lltm_ray.cli._top_view import draw, slot_bars
from lltm_ray.cli.top import Screen
from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.service import TelemetryService
from tests.unit.telemetry.rows_made import (
    attempt_row,
    gpu_row,
    node_row,
    queue_row,
    request_row,
    server_row,
    slot_row,
)


def look_of(**changed: list[Any]) -> dict[str, Any]:
    """A look of a service that took these rows."""
    now = time.time_ns()
    rows: dict[str, list[Any]] = {
        "requests": [request_row(arrived_unix_nano=now - 3 * 10**9)],  # a second that is over
        "attempts": [attempt_row()],
        "servers": [server_row(at_unix_nano=now, gpu_memory_bytes=9 * 2**30)],
        "slots": [
            slot_row(at_unix_nano=now),
            slot_row(at_unix_nano=now, slot=3, is_processing=False, prompt_tokens=512),
        ],
        "gpus": [gpu_row(at_unix_nano=now, throttle=0x4)],
        "nodes": [node_row(at_unix_nano=now)],
        "queues": [queue_row(at_unix_nano=now)],
    }
    service = TelemetryService(TelemetryConfig(exporters=()), None)
    service.put("test", {kind: pack(kind, some) for kind, some in (rows | changed).items() if some}, {})
    look: dict[str, Any] = json.loads(json.dumps(service.look()))
    service.close()
    return look


def lines_of(look: dict[str, Any], width: int = 200) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(draw(look))
    return console.export_text().splitlines()


def line_with(word: str, lines: list[str]) -> str:
    return next(line for line in lines if word in line)


def test_every_figure_of_a_look_is_there_with_its_unit() -> None:
    lines = lines_of(look_of())
    assert "requests 0.10 per s" in lines[0]
    assert "generated 1.00 tok/s" in lines[0]
    assert "prompts 3.20 cached + 0.80 computed tok/s" in lines[0]
    assert "reuse 80.0%" in lines[0]
    assert "waiting 3" in lines[0]
    assert "prompt tok 40" in lines[1]
    assert line_with("total time", lines).split()[2:5] == ["250", "ms", "250"]
    assert line_with("time to first token", lines).split()[4:6] == ["50", "ms"]
    engine = line_with("engine-0 ", lines)
    assert [word in engine for word in ("tiny", "1/4", "95.4 MiB", "9.0 GiB")] == [True] * 4
    gpu = line_with("NVIDIA Test", lines)
    assert [word in gpu for word in ("50.0%", "4.0 GiB of 16.0 GiB", "70 W of 100 W", "55 °C", "power cap")] == [
        True
    ] * 5
    request = line_with("r-1 ", lines)
    assert request.split()[2:] == [
        "200",
        "tiny",
        "engine-0/2",
        "1",
        "40",
        "32",
        "10",
        "20",
        "ms",
        "50",
        "ms",
        "250",
        "ms",
    ]


def test_nothing_known_is_a_dash_and_never_zero() -> None:
    nothing: dict[str, list[Any]] = {
        kind: [] for kind in ("requests", "attempts", "servers", "slots", "gpus", "nodes", "queues")
    }
    lines = lines_of(look_of(**nothing))
    assert "waiting –" in lines[0]
    assert line_with("total time", lines).split()[2:5] == ["–", "–", "–"]
    assert "engines: none has told of itself" in "\n".join(lines)
    assert "recent requests: none has ended yet" in "\n".join(lines)


def test_a_machine_without_gpus_says_why() -> None:
    assert "n1 has no GPU: no NVIDIA driver is here" in lines_of(look_of(gpus=[]))


@pytest.mark.parametrize("width", [72, 80, 120, 200])
def test_a_narrow_terminal_loses_columns_and_no_figure_is_cut(width: int) -> None:
    lines = lines_of(look_of(), width=width)
    assert "…" not in "".join(lines)
    assert "250 ms" in line_with("r-1 ", lines)
    assert ("GPU memory" in line_with("busy", lines)) == (width > 100)


def test_a_look_that_is_not_live_is_told_with_its_age() -> None:
    now = [100.0]
    screen = Screen("http://127.0.0.1:1", clock=lambda: now[0])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(screen)
    screen.take(look_of())
    console.print(screen)
    screen.trouble = "telemetry does not answer"
    console.print(screen)
    screen.trouble, now[0] = "", 107.0
    console.print(screen)
    heads = [line for line in console.export_text().splitlines() if line.startswith("lltm_ray")]
    assert [head.split("  ", 1)[1].strip() for head in heads] == [
        "connecting …",
        "live",
        "telemetry does not answer; figures are 0 s old",
        "late; figures are 7 s old",
    ]


def test_errors_are_told_by_type() -> None:
    failed = request_row(arrived_unix_nano=time.time_ns(), status=429, error_type="overloaded_error", total_s=0.0)
    lines = lines_of(look_of(requests=[failed]))
    assert "1 overloaded_error" in line_with("total time", lines)
    assert "429 overloaded_error" in line_with("r-1 ", lines)


def test_names_made_by_clients_are_neither_commands_nor_markup() -> None:
    hostile = "\x1b]0;owned\x07[red]x[/red]\x9b31m"
    row = request_row(request_id=hostile, model=hostile, error_type=hostile, arrived_unix_nano=time.time_ns())
    text = "\n".join(lines_of(look_of(requests=[row]), width=400))
    assert "]0;owned[red]x[/red]31m" in text
    assert not set(text) & {"\x1b", "\x07", "\x9b"}


@pytest.mark.parametrize(("held", "bar"), [(0, "        "), (1, "▏       "), (512, "████    "), (1024, "████████")])
def test_a_slots_bar_is_as_long_as_what_it_holds(held: int, bar: str) -> None:
    slot = slot_row(prompt_tokens=held, decoded_tokens=0, n_ctx=1024)._asdict()
    assert slot_bars([slot]).plain == bar + " "
    assert len(slot_bars([slot] * 64).plain) == 64


# --- the command


class Gateway(BaseHTTPRequestHandler):
    """Only the stream of looks."""

    events = b""

    def do_GET(self) -> None:
        is_known = self.headers.get("Authorization") == "Bearer sesame"
        body = self.events if is_known else b'{"error":{"message":"Invalid API Key","code":401}}'
        self.send_response((200 if self.path == "/dashboard/events" else 404) if is_known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Callable[..., Result]]:
    key_file = tmp_path / "key"
    key_file.write_text("sesame\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = ("--url", f"http://127.0.0.1:{server.server_port}")

        def run(*arguments: str, key: bool = True) -> Result:
            given = ("--api-key-file", str(key_file)) if key else ()
            return CliRunner().invoke(app, ["top", *arguments, *url, *given])

        yield run
        server.shutdown()
        thread.join()


def events(*looks: dict[str, Any]) -> bytes:
    return b"".join(b"event: look\ndata: %b\n\n" % json.dumps(look).encode() for look in looks)


def test_one_look_is_printed_where_nobody_watches(top: Callable[..., Result]) -> None:
    Gateway.events = events(look_of())
    for arguments in (("--once",), ()):
        done = top(*arguments)
        assert (done.exit_code, "engine-0" in done.output) == (0, True)


def test_looks_are_json_for_programs(top: Callable[..., Result]) -> None:
    look = look_of()
    Gateway.events = events(look, look)
    assert json.loads(top("--once", "--json").stdout) == look
    endless = top("--json")
    assert [json.loads(line) for line in endless.stdout.splitlines()] == [look, look]
    assert (endless.exit_code, "ended the stream" in endless.output) == (1, True)


def test_telemetry_that_is_away_is_told(top: Callable[..., Result]) -> None:
    Gateway.events = b'event: away\ndata: "telemetry does not answer: ActorDiedError"\n\n'
    done = top("--once")
    assert (done.exit_code, "telemetry does not answer: ActorDiedError" in done.output) == (1, True)


def test_a_missing_key_is_told_with_its_remedy(top: Callable[..., Result]) -> None:
    done = top("--once", key=False)
    assert done.exit_code == 1
    assert "Invalid API Key" in done.output
    assert "--api-key-file" in done.output
