"""`chat` and `bench` before servers that are none, or mean ill."""

import http.server
import threading
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.cli.bench import show
from lltm_ray.load.result import LoadPlan, Sent, summarize

HTML = (200, "text/html", b"<html><body>It works!</body></html>")


class _Handler(http.server.BaseHTTPRequestHandler):
    answer = HTML

    def do_GET(self) -> None:
        status, kind, body = self.answer
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Not on the tests' stderr."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as listener:
        thread = threading.Thread(target=lambda: listener.serve_forever(poll_interval=0.01))
        thread.start()
        yield f"http://127.0.0.1:{listener.server_address[1]}"
        listener.shutdown()
        thread.join()


@pytest.mark.parametrize("model", [[], ["--model", "m"]], ids=["listing", "probe"])
@pytest.mark.parametrize("body", [HTML[2], b"[]", b'"x"', b'{"data": 3}', b"\xff"])
def test_bench_against_a_page_that_is_no_api_says_so(
    server: str, model: list[str], body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Handler, "answer", (200, "text/html", body))
    done = CliRunner().invoke(app, ["bench", "--url", server, "--requests", "1", *model])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    if body != b'{"data": 3}' or not model:  # an object without counts passes for a probe's answer
        assert "is no OpenAI-compatible server" in done.stderr


def test_an_upstreams_error_cannot_steer_the_terminal(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "a\u009b2Jb\x1b[2Jc [bold]d[/nothing]".encode()
    monkeypatch.setattr(_Handler, "answer", (500, "application/json", body))
    done = CliRunner().invoke(app, ["chat", "--url", server, "--model", "m", "hello"])
    assert done.exit_code == 1
    assert not {"\x9b", "\x1b"} & set(done.stderr)
    assert "a2Jb[2Jc [bold]d[/nothing]" in done.stderr


def test_an_answer_cannot_steer_the_terminal_by_c1_controls(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = '{"choices":[{"index":0,"delta":{"content":"a\\u009b2Jb"},"finish_reason":"stop"}]}'
    monkeypatch.setattr(_Handler, "answer", (200, "text/event-stream", f"data: {delta}\n\ndata: [DONE]\n\n".encode()))
    done = CliRunner().invoke(app, ["chat", "--url", server, "--model", "m", "hello"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "a2Jb\n"


@pytest.mark.parametrize("error", ["", "http 503"])
def test_the_table_says_that_failed_requests_are_left_out(error: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = [Sent(due_s=0, started_s=0, ended_s=1), Sent(due_s=0, started_s=0, ended_s=1, error=error)]
    show(summarize(LoadPlan(url="http://x"), "m", records, wall_s=1))
    assert ("of successful requests only" in capsys.readouterr().out) == bool(error)
