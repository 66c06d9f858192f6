"""Which gateway `chat`, `drain`, `bench` and `explain` talk to, and what they say when it wants a key."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from lltm_ray.actors.runstate import RunState
from lltm_ray.cli import app

COMMANDS = (("chat", "hi"), ("drain", "engine-0"), ("bench",), ("explain",))


@pytest.fixture
def gateway():
    """One that knows nobody, and remembers who asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            body = json.dumps({"error": {"message": "Invalid API Key", "code": 401}}).encode()
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_args):
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def start_fleet(name, url):
    RunState.of_this_process(name, "127.0.0.1:1", url, holds_fleet=True).save()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_fleet_is_found_by_its_name_and_the_remedy_for_a_missing_key_is_told(gateway, command):
    start_fleet("default", "http://127.0.0.1:9")
    start_fleet("mine", gateway.url)
    done = run(*command, "--name", "mine")
    assert gateway.asked, done.output
    assert done.exit_code == 1
    assert "Invalid API Key" in done.output
    assert "--api-key-file" in done.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_url_wins_over_the_running_fleet(gateway, command):
    start_fleet("default", "http://127.0.0.1:9")
    for end in ("/", "/v1", "/v1/"):
        gateway.asked.clear()
        done = run(*command, "--url", gateway.url + end)
        assert gateway.asked, done.output
        assert not any(path.startswith(("//", "/v1/v1", "/v1/lltm")) for path in gateway.asked)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_what_is_no_url_is_told_with_what_one_looks_like(command):
    done = run(*command, "--url", "127.0.0.1:8000")
    assert done.exit_code == 2
    assert "url='127.0.0.1:8000': must be the base URL of a llama-server, such as http://" in done.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_fleet_the_command_that_starts_one_is_told(command):
    done = run(*command, "--name", "gone")
    assert done.exit_code == 2
    assert "name='gone': no such fleet runs here; start it (lltm-ray up --name gone)" in done.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_fleet_without_a_gateway_is_told(command):
    start_fleet("default", None)
    done = run(*command)
    assert done.exit_code == 2
    assert "name='default': this fleet has no gateway" in done.output


def test_without_a_name_the_only_fleet_that_runs_here_is_meant(gateway, cache):
    runner = CliRunner()
    RunState.of_this_process("one", "", gateway.url, holds_fleet=True).save()
    assert "Invalid API Key" in runner.invoke(app, ["explain", "r-1"]).output
    assert gateway.asked == ["/lltm/explain/r-1"]
    assert "name='two': no such fleet runs here" in runner.invoke(app, ["explain", "r-1", "--name", "two"]).output
    RunState.of_this_process("other", "", gateway.url, holds_fleet=True).save()
    assert "give --name, one of one, other" in " ".join(runner.invoke(app, ["explain", "r-1"]).output.split())
    assert len(gateway.asked) == 1
    RunState.of_this_process("default", "", gateway.url, holds_fleet=True).save()
    runner.invoke(app, ["explain", "r-1"])
    assert len(gateway.asked) == 2
