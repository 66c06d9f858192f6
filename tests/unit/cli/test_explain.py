from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from typer.testing import CliRunner, Result

from lltm_ray.cli import app
from lltm_ray.routing.ledger import Attempt, Ledger, LedgerEntry, Outcome


class Gateway(BaseHTTPRequestHandler):
    """The two routes that the command asks, over a real ledger."""

    ledger: ClassVar[Ledger]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if self.headers.get("Authorization") != "Bearer sesame":
            self.answer(401, {"error": {"message": "no such key"}})
        elif parts.path == "/lltm/explain":
            asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
            found = self.ledger.find(limit=int(asked["limit"]), tenant=asked.get("tenant", ""))
            self.answer(200, {"requests": found})
        else:
            one = self.ledger.explain(unquote(parts.path.removeprefix("/lltm/explain/")))
            self.answer(404 if one is None else 200, one or {"error": {"message": "not in the ledger"}})

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path / "cache"))
    key_file = tmp_path / "key"
    key_file.write_text("sesame\n")
    Gateway.ledger = Ledger(tmp_path / "l.sqlite", flush_s=0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield lambda *argv: explain(*argv, "--url", url, "--api-key-file", str(key_file))
        server.shutdown()
        thread.join()
    Gateway.ledger.close()


def explain(*argv: str) -> Result:
    return CliRunner().invoke(app, ["explain", *argv])


def add_failover() -> None:
    entry = LedgerEntry(
        request_id="r 1/ü", tenant="team-a", model="tiny", route="/v1/chat/completions", policy="residency",
        why="12 of 20 tokens are cached there", arrived_unix_nano=1_700_000_000_000_000_000, wait_s=0.002, ttft_s=0.02,
        considered=[{"engine": "e0", "expected_s": 0.01}, {"engine": "e1", "expected_s": 0.25, "why_not": "busy"}],
        total_s=0.5, status=200, is_exact=True, delivered_tokens=9,
    )  # fmt: skip
    ledger = Gateway.ledger
    first = Attempt(engine="e0", slot=1, generated_tokens=6, delivered_tokens=5, outcome=Outcome.CONTINUED)
    first.is_estimate = True
    ledger.begin(entry, first)
    second = Attempt(engine="e1", slot=2, predicted_cached_tokens=12, cached_tokens=14, computed_tokens=6)
    second.generated_tokens = second.delivered_tokens = 4
    ledger.begin(entry, second)
    ledger.finish(entry)


def test_a_request_is_told_for_people(ask) -> None:
    add_failover()
    result = ask("r 1/ü")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert "went to    e1, slot 2" in lines
    assert "because    12 of 20 tokens are cached there (residency)" in lines
    assert "reuse      12 of 20 prompt tokens expected in the cache, 14 found" in lines
    assert "waits      for a slot 2.0 ms, first text 20.0 ms, total 500.0 ms" in lines
    assert "tokens     9 delivered, at least 10 generated, at least 1 wasted" in lines
    assert "outcome    ok, status 200, continued exactly" in lines
    rows = [line.split() for line in lines]
    assert ["1", "e0", "1", "0", "0", "0", "0", "6", "5", "1", "continued", "(estimate)"] in rows
    assert ["2", "e1", "2", "0", "12", "14", "6", "4", "4", "0", "ok"] in rows
    assert ["engine", "expected", "s", "why", "not"] in rows
    assert ["e1", "0.25", "busy"] in rows


@pytest.mark.parametrize(
    ("why", "policy", "told"),
    [("pinned", "", ["because    pinned"]), ("", "residency", []), ("", "", []), ("a", "b", ["because    a (b)"])],
)
def test_a_choice_is_told_with_its_policy_and_none_is_left_away(ask, why, policy, told) -> None:
    Gateway.ledger.finish(LedgerEntry(request_id="one", policy=policy, why=why, status=400, error="no such model"))
    lines = [line.rstrip() for line in ask("one").stdout.splitlines()]
    assert [line for line in lines if line.startswith("because")] == told
    assert "went to    no engine" in lines


def test_json_is_what_the_ledger_says(ask) -> None:
    add_failover()
    assert json.loads(ask("r 1/ü", "--json").stdout) == Gateway.ledger.explain("r 1/ü")
    assert json.loads(ask("--json").stdout) == Gateway.ledger.find()


def test_without_an_id_the_last_requests_are_listed_the_latest_first(ask) -> None:
    add_failover()
    for number in range(3):
        Gateway.ledger.finish(LedgerEntry(request_id=f"refused-{number}", tenant="team-b", status=429))
    listed = [line.split()[0] for line in ask("--limit", "2").stdout.splitlines()[1:]]
    assert listed == ["refused-2", "refused-1"]
    table = ask("--tenant", "team-a").stdout
    assert "2023-11-14T22:13:20Z" in table
    assert "refused" not in table


def test_a_refused_request_went_to_no_engine(ask) -> None:
    Gateway.ledger.finish(LedgerEntry(request_id="refused", status=429, error="the queue is full"))
    result = ask("refused")
    assert "went to    no engine" in result.stdout
    assert "outcome    status 429, the queue is full" in result.stdout


def test_an_unknown_request_is_a_sentence_and_no_result(ask) -> None:
    result = ask("never")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no request 'never' in the ledger" in result.stderr


def test_a_name_cannot_steer_the_terminal(ask) -> None:
    entry = LedgerEntry(request_id="evil", model="\x1b[2Jm\x9b1m", error="[red]x\x07", status=500)
    Gateway.ledger.begin(entry, Attempt(engine="e0"))
    Gateway.ledger.finish(entry)
    for shown in (ask("evil").stdout, ask().stdout):
        assert not {"\x1b", "\x9b", "\x07"} & set(shown)
    assert "[red]x" in ask("evil").stdout


def test_a_wrong_key_is_told_with_the_gateways_words(ask, tmp_path) -> None:
    (tmp_path / "key").write_text("open")
    result = ask("r")
    assert result.exit_code == 1
    assert "no such key" in result.stderr


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [("http://127.0.0.1:9", 1, "cannot reach"), ("nonsense", 2, "must be the base URL"), ("", 2, "no such fleet runs")],
)
def test_an_endpoint_that_is_not_there_is_a_sentence(tmp_path, monkeypatch, url, code, words) -> None:
    monkeypatch.setenv("LLTM_RAY_CACHE", str(tmp_path))
    result = explain("r", "--url", url)
    assert result.exit_code == code
    assert words in result.stderr
