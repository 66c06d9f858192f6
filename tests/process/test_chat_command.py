"""`chat` against a real llama.cpp server: one-shot through pipes, the dialogue through a terminal of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lltm_ray.models.random_weights import ensure_random

_OWN_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
"""Also where the tests themselves run in a shell's background, whose children ignore Ctrl-C."""
CHAT = (sys.executable, "-c", f"{_OWN_CTRL_C}; from lltm_ray.cli import main; main()", "chat")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Arguments that lead `chat` to the embedded engine with the random model, guarded by a key."""
    folder = tmp_path_factory.mktemp("llama")
    keys = folder / "keys"
    keys.write_text("sesame\n", encoding="utf-8")
    argv = [sys.executable, "-m", "lltm_ray.llamacpp.embedded", "--model", str(ensure_random(folder))]
    argv += ["--host", "127.0.0.1", "--port", "0", "--api-key-file", str(keys)]
    argv += ["--threads", "1", "--threads-batch", "1"]  # more spin against each other on a small machine
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*argv, "--ctx-size", "8192", "--parallel", "1"], stdout=log, stderr=log)
        try:
            yield "--url", _address(process, folder / "log"), "--api-key-file", str(keys)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, once it serves."""
    deadline = time.monotonic() + 90
    while not (found := re.search(r"embedded: serving (\S+)\n", log.read_text(errors="replace"))):
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not become ready"
        time.sleep(0.05)
    return found[1]


def ask(*argv: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAT, *argv], input=text, capture_output=True, text=True, timeout=100, check=False, errors="replace"
    )


def test_a_question_prints_the_answer_alone_on_stdout_and_the_numbers_on_stderr(llama: tuple[str, ...]) -> None:
    done = ask("hello", "--max-tokens", "12", "--temperature", "0", "--system", "be brief", *llama)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 4
    assert re.search(r"12 tokens, first after \d+ ms, [\d.]+ tokens/s", done.stderr)
    assert (
        ask("hello", "--max-tokens", "12", "--temperature", "0", "--system", "be brief", *llama).stdout == done.stdout
    )


def test_a_piped_question_is_asked(llama: tuple[str, ...]) -> None:
    done = ask("--max-tokens", "3", *llama, text="hello\n")
    assert done.returncode == 0, done.stderr
    assert "3 tokens" in done.stderr


def test_an_empty_question_is_the_users_mistake(llama: tuple[str, ...]) -> None:
    done = ask(*llama, text="")
    assert done.returncode == 2
    assert "prompt" in done.stderr


def test_a_missing_key_is_the_endpoints_own_refusal(llama: tuple[str, ...]) -> None:
    done = ask("hello", *llama[:2])
    assert done.returncode == 1
    assert "401" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("url", "code"), [("http://127.0.0.1:1", 1), ("127.0.0.1", 2), ("http://", 2)])
def test_an_address_that_leads_nowhere_is_one_sentence(url: str, code: int) -> None:
    done = ask("hello", "--url", url)
    assert done.returncode == code
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


class _BreaksOff(BaseHTTPRequestHandler):
    """Streams one event with a terminal escape in it, then ends the body without [DONE]."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))  # what is left unread would reset the connection
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b'data: {"choices":[{"index":0,"delta":{"content":"one\\u001b[2Jtwo"}}]}\n\n')

    def log_message(self, *_args: object) -> None:
        """Quiet."""


def test_an_answer_that_breaks_off_is_an_error_and_cannot_steer_the_terminal() -> None:
    with HTTPServer(("127.0.0.1", 0), _BreaksOff) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        done = ask("hello", "--model", "m", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert done.returncode == 1
    assert done.stdout == "one[2Jtwo\n"
    assert "broke off" in done.stderr


@dataclass
class Terminal:
    """A dialogue in a pseudo-terminal."""

    pid: int
    fd: int
    seen: str = ""

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def read_until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """What came until `pattern`, which is taken off."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} did not come, only {self.seen[-300:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text


@contextmanager
def dialogue(*argv: str) -> Iterator[Terminal]:
    controller, inner = pty.openpty()
    process = subprocess.Popen([*CHAT, *argv], stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
    os.close(inner)
    try:
        terminal = Terminal(process.pid, controller)
        terminal.read_until(r"/quit")
        terminal.read_until(r"> ")
        yield terminal
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_a_dialogue_goes_on_after_ctrl_c_and_ends_with_quit(llama: tuple[str, ...]) -> None:
    with dialogue(*llama) as terminal:
        terminal.type("hello")  # no --max-tokens: random weights never end by themselves
        terminal.read_until(r"\n[^\n]{20,}")
        os.kill(terminal.pid, signal.SIGINT)
        terminal.read_until(r"stopped")
        terminal.read_until(r"> ")
        terminal.type("/what")
        terminal.read_until(r"/reset forgets")
        terminal.type("/quit")


def test_ctrl_d_ends_a_dialogue(llama: tuple[str, ...]) -> None:
    with dialogue(*llama) as terminal:
        os.write(terminal.fd, b"\x04")


class _Remembers(BaseHTTPRequestHandler):
    """Answers `fine` and keeps what it was sent."""

    asked: ClassVar[list[list[str]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append([message["content"] for message in body["messages"]])
        status = 503 if body["messages"][-1]["content"] == "fail" else 200
        self.send_response(status)
        self.send_header("content-type", "text/event-stream" if status == 200 else "application/json")
        self.send_header("x-lltm-engine", "e7")
        self.end_headers()
        events = ('{"choices":[{"index":0,"delta":{"content":"fine"}}]}', "[DONE]")
        stream = "".join(f"data: {event}\n\n" for event in events)
        self.wfile.write((stream if status == 200 else '{"error":{"message":"no room"}}').encode())

    def log_message(self, *_args: object) -> None:
        """Quiet."""


def test_a_dialogue_remembers_until_reset_forgets_failures_and_names_the_engine() -> None:
    _Remembers.asked.clear()
    with HTTPServer(("127.0.0.1", 0), _Remembers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        with dialogue("--model", "m", "--system", "sys", "--url", url) as terminal:
            for line, reply in (
                ("one", "engine e7"),
                ("fail", "no room"),
                ("two", "e7"),
                ("/reset", ""),
                ("three", "e7"),
            ):
                terminal.type(line)
                terminal.read_until(reply + r"(?s:.*)> ")
            terminal.type("/quit")
        server.shutdown()
        thread.join()
    exchange = ["sys", "one", "fine"]
    assert _Remembers.asked == [["sys", "one"], [*exchange, "fail"], [*exchange, "two"], ["sys", "three"]]
