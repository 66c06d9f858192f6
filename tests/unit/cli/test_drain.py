import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from lltm_ray.cli import app

REPORT = {"engine": "e0", "moved": 3, "tokens": 900, "size_bytes": 2**20, "took_s": 0.5, "failed": [], "left": 0}
REPORT |= {"running": 0}
FAILED = [{"slot": 2, "tokens": 70, "why": "no other engine of model 'tiny' can take it"}]


@pytest.fixture
def endpoint():
    """A gateway that answers what it is told to; only the command is looked at here."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.seen.append((self.path, self.headers.get("authorization")))
            status, body = server.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_args):
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.answer = [], (200, REPORT)
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(*arguments):
    return CliRunner().invoke(app, ["drain", *arguments])


def test_a_drain_is_asked_for_and_its_report_shown(endpoint, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    done = run("e 0", "--url", endpoint.url + "/", "--timeout", "7", "--api-key-file", str(tmp_path / "key"), "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, REPORT)
    assert endpoint.seen == [("/lltm/drain?engine=e+0&timeout_s=7.0", "Bearer secret")]


def test_what_stayed_is_told_and_ends_with_1(endpoint):
    endpoint.answer = 200, REPORT | {"failed": FAILED, "left": 1}
    done = run("e0", "--url", endpoint.url)
    assert done.exit_code == 1
    assert "1.0 MiB" in done.output
    assert "slot 2, 70 tokens: no other engine of model 'tiny' can take it" in done.output


def test_a_model_that_nobody_serves_any_more_is_told(endpoint):
    warning = "no engine serves model 'tiny' now"
    endpoint.answer = 200, REPORT | {"warning": warning}
    done = run("e0", "--url", endpoint.url)
    assert (done.exit_code, done.stderr) == (0, f"warning: {warning}\n")
    assert "warning" not in run("e0", "--url", endpoint.url, "--json").stderr


def test_an_engine_is_opened_again(endpoint):
    done = run("e0", "--undrain", "--url", endpoint.url)
    assert (done.exit_code, done.stdout) == (0, "e0 takes requests again\n")
    assert endpoint.seen[0][0] == "/lltm/undrain?engine=e0"


def test_a_refusal_is_the_gateways_own_sentence(endpoint):
    message = "engine='e9': no such engine; known are e0"
    endpoint.answer = 400, {"error": {"message": message}}
    done = run("e9", "--url", endpoint.url)
    assert done.exit_code == 2
    assert message in done.output


def test_a_gateway_that_is_not_there_is_named():
    done = run("e0", "--url", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert "cannot reach http://127.0.0.1:9" in done.output
