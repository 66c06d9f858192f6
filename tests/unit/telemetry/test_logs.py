"""Log lines become rows: with the request's ids, without secrets, and not too many."""

import json
import logging
from collections.abc import Iterator

import pytest

from lltm_ray.telemetry.context import TraceContext
from lltm_ray.telemetry.logs import EVERY_S, MOST_LINES, LogHandler, at_work, clean
from lltm_ray.telemetry.outbox import Outbox
from lltm_ray.telemetry.parcel import unseal
from lltm_ray.telemetry.rows import LogRow

log = logging.getLogger("lltm_ray.tests.logs")


class Heard:
    def __init__(self) -> None:
        self.rows: list[LogRow] = []
        self.now = 0.0
        self.handler = LogHandler(self.add, "gateway-0", lambda: self.now)

    def add(self, kind: str, row: tuple[object, ...]) -> None:
        assert kind == "logs"
        assert isinstance(row, LogRow)
        self.rows.append(row)


@pytest.fixture
def heard() -> Iterator[Heard]:
    made = Heard()
    with made.handler.installed():
        yield made


def test_a_line_has_the_ids_of_what_is_at_work(heard: Heard) -> None:
    before = at_work.set(TraceContext("a" * 32, "b" * 16))
    log.warning("slot %d of %s", 3, "engine-0", extra={"lltm.engine": "engine-0"})
    at_work.reset(before)
    log.error("alone")
    first, second = heard.rows
    assert (first.trace_id, first.span_id, first.severity) == ("a" * 32, "b" * 16, "WARNING")
    assert (first.logger, first.message) == ("lltm_ray.tests.logs", "slot 3 of engine-0")
    attributes = json.loads(first.attributes)
    assert attributes["code.function.name"].endswith(".test_a_line_has_the_ids_of_what_is_at_work")
    assert (attributes["lltm.process"], attributes["lltm.engine"]) == ("gateway-0", "engine-0")
    assert (second.trace_id, second.span_id) == ("", "")


def test_an_exception_is_told_with_its_trace(heard: Heard) -> None:
    try:
        raise ValueError("x" * 9000)
    except ValueError:
        log.exception("it failed")
    attributes = json.loads(heard.rows[0].attributes)
    assert attributes["exception.type"] == "builtins.ValueError"
    assert len(attributes["exception.message"]) == 2048
    assert attributes["exception.stacktrace"].endswith("xxx\n")
    assert len(attributes["exception.stacktrace"]) == 4096


def test_one_place_cannot_flood_and_says_what_was_left_out(heard: Heard) -> None:
    for round_ in range(2):
        for number in range(100):
            log.warning("again %d", number)
        log.warning("another place")
        heard.now += EVERY_S * (round_ + 1)
    again = [row for row in heard.rows if row.message.startswith("again")]
    assert len(again) == 2 * MOST_LINES
    assert len(heard.rows) == 2 * MOST_LINES + 2
    left_out = [json.loads(row.attributes).get("lltm.log.left_out", 0) for row in again]
    assert left_out == [0] * MOST_LINES + [100 - MOST_LINES] + [0] * (MOST_LINES - 1)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("authorization: Bearer abc.def-1", "authorization: Bearer ***"),
        ("got {'x-api-key': 'sk-123', 'a': 1}", "got {'x-api-key': '***', 'a': 1}"),
        ("api_key=hunter2 of tenant", "api_key=*** of tenant"),
        ("cannot reach http://user:hunter2@host:1/x", "cannot reach http://***@host:1/x"),
        ("password: hunter2", "password: ***"),
        ("12 tokens of /v1/models", "12 tokens of /v1/models"),
        ("half \ud800 a character", "half ? a character"),
    ],
)
def test_credentials_are_taken_out_of_lines(line: str, kept: str) -> None:
    assert clean(line) == kept


def test_lines_about_sending_and_lines_that_do_not_fit_are_no_rows(heard: Heard) -> None:
    logging.getLogger("lltm_ray.actors.sender").warning("not taken")
    logging.getLogger("lltm_ray.telemetry.outbox").warning("dropped")
    logging.getLogger("elsewhere").warning("not ours")
    heard.handler.emit(logging.LogRecord("lltm_ray.x", logging.WARNING, "x.py", 1, "%d", ("no number",), None))
    assert heard.rows == []
    assert heard.handler.faults == 1


def test_what_is_heard_can_travel() -> None:
    outbox = Outbox()
    with LogHandler(outbox.add, "engine-0").installed():
        log.warning("%s", "\ud800" * 3000, extra={"lltm.odd": object()})
    batch, unsound = unseal(outbox.take())
    assert (batch["logs"].num_rows, unsound, outbox.dropped) == (1, {}, {})
    log.warning("after the end")
    assert not len(outbox)
