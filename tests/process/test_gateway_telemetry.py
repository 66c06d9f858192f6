"""What the gateway tells telemetry of real requests: every one once, where its time went, and nothing of its text."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from failover_harness import write_model
from gateway_harness import (
    CHAT,
    MODEL,
    STREAM_HEAD,
    Engine,
    FakeEngine,
    Gateway,
    engine_info,
    event,
    gateway,
    infos,
    real_engine,
    until,
    whole,
)

from lltm_ray._prefix import hash_blocks, hash_prefixes
from lltm_ray.config import TelemetryConfig
from lltm_ray.gateway.trace import Tracing
from lltm_ray.llamacpp.metrics import read_metrics
from lltm_ray.records import EngineInfo
from lltm_ray.routing.ledger import Ledger
from lltm_ray.telemetry.content import Capture
from lltm_ray.telemetry.logs import LogHandler
from lltm_ray.telemetry.outbox import Outbox
from lltm_ray.telemetry.parcel import unseal
from lltm_ray.telemetry.rows import KINDS, AttemptRow, LogRow, RequestRow, SpanRow
from lltm_ray.telemetry.service import TelemetryService
from lltm_ray.telemetry.spans import Place

PATH = "/v1/chat/completions"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STREAM = CHAT | {"stream": True}
LONG = {"prompt": "hello", "n_predict": 6000, "ignore_eos": True, "temperature": 0, "seed": 1, "stream": True}
SECRET_PROMPT, KEY = "the-heron-at-dusk", "gateway-key-0123"
NATIVE = {"model": MODEL, "prompt": "hello", "n_predict": 12, "temperature": 0, "seed": 1, "ignore_eos": True}
OWN_S = 0.002
NAMES = {PATH: f"chat {MODEL}", "/completion": f"text_completion {MODEL}", "/v1/embeddings": "embeddings embed"}


class Rows:
    """What was told, and the service that made spans of it."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.service = TelemetryService(TelemetryConfig(exporters=()), None)
        self.told: list[tuple[str, tuple[Any, ...]]] = []

    def add(self, kind: str, row: tuple[Any, ...]) -> None:
        self.told.append((kind, KINDS[kind]._make(row)))
        self.outbox.add(kind, row)

    def of(self, kind: str) -> list[Any]:
        return [row for each, row in self.told if each == kind]

    @property
    def requests(self) -> list[RequestRow]:
        return self.of("requests")

    @property
    def attempts(self) -> list[AttemptRow]:
        return self.of("attempts")

    @property
    def spans(self) -> list[SpanRow]:
        return self.of("spans")

    @property
    def logs(self) -> list[LogRow]:
        return self.of("logs")

    def timeline(self, id_: str) -> dict[str, Any]:
        """A request's spans, by way of the columns that rows travel in."""
        while parcel := self.outbox.take():
            batch, unsound = unseal(parcel)
            self.service.put("gateway", batch, dict(self.outbox.dropped), unsound)
            assert not unsound
        assert not self.outbox.dropped
        found = self.service.timeline(id_)
        assert found is not None, id_
        return found


@pytest.fixture
def rows() -> Iterator[Rows]:
    made = Rows()
    made.service.place({name: Place("127.0.0.1", 1, ("GPU-1",), "n1", MODEL) for name in ("e0", "e1")})
    yield made
    made.service.close()


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says the same on every engine."""
    return write_model(tmp_path_factory.mktemp("steady") / "tiny.gguf")


async def post(gate: Gateway, path: str, body: dict[str, Any], **headers: str) -> tuple[int, str, bytes]:
    """Status, request id and the whole answer; a broken one as far as it came."""
    got = b""
    async with gate.http.post(gate.url + path, json=body, headers=headers) as reply:
        try:
            async for part in reply.content.iter_any():
                got += part
        except aiohttp.ClientError:
            got += b"<broken>"
        return reply.status, reply.headers["x-request-id"], got


def own_s(row: RequestRow, timeline: dict[str, Any]) -> float:
    """Seconds of a request that no phase has: what the gateway took to read it, to choose, and to send the end.

    Between the first question for a slot and the last engine's end, phases may leave no gap and not overlap.
    """
    names = ("route", "lltm.queue", "lltm.prefill", "lltm.decode")
    phases = [span for span in timeline["spans"] if span["name"] in names]
    parents = {span["parent_span_id"] for span in phases}
    phases += [each for each in timeline["spans"] if each["kind"] == "client" and each["span_id"] not in parents]
    phases.sort(key=lambda span: (span["start_s"], span["end_s"]))
    between = [after["start_s"] - before["end_s"] for before, after in itertools.pairwise(phases)]
    handing_over = row.total_s if len(rows_of(timeline)) > 1 else 1e-6
    assert all(-1e-6 < gap < handing_over for gap in between), phases
    assert phases[0]["start_s"] >= 0
    assert phases[-1]["end_s"] <= row.total_s + 1e-6
    return row.total_s - sum(span["end_s"] - span["start_s"] for span in phases)


def rows_of(timeline: dict[str, Any], kind: str = "client") -> list[dict[str, Any]]:
    return [span for span in timeline["spans"] if span["kind"] == kind]


def check_one(rows: Rows, id_: str) -> tuple[RequestRow, dict[str, Any]]:
    """A request is one row and one SERVER span, and nothing of its tree hangs in the air."""
    (row,) = [each for each in rows.requests if each.request_id == id_]
    timeline = rows.timeline(id_)
    assert [span["span_id"] for span in rows_of(timeline, "server")] == [row.span_id]
    ids = {span["span_id"] for span in timeline["spans"]}
    assert all(span["parent_span_id"] in ids for span in timeline["spans"] if span["kind"] != "server")
    assert {span["trace_id"] for span in timeline["spans"]} == {row.trace_id}
    return row, timeline


@pytest.fixture
def embed(embedding_server: Any) -> EngineInfo:
    info = engine_info("emb", embedding_server.url, model="embed", slots=4)
    return info.with_(api_key=embedding_server.api_key, capabilities=("embeddings",))


ENDINGS = {
    "stream": (PATH, STREAM, 200),
    "stream without a tap": ("/completion", NATIVE | {"stream": True, "n_probs": 1}, 200),
    "joined": ("/completion", NATIVE | {"n_predict": 300}, 200),
    "whole": ("/completion", NATIVE | {"n_probs": 2}, 200),
    "embeddings": ("/v1/embeddings", {"model": "embed", "input": "a b c"}, 200),
    "the engine says 400": ("/completion", {"model": MODEL, "prompt": {"not": "text"}}, 400),
    "the gateway says 400": (PATH, {"model": 7}, 400),
    "no such model": (PATH, CHAT | {"model": "nobody"}, 404),
}


async def test_every_request_that_asks_a_model_is_told_of_once_however_it_ends(pair, embed, rows):
    async with gateway(*infos(pair), embed, tracing=Tracing(rows.add)) as gate:
        for name, (path, body, wanted) in ENDINGS.items():
            status, id_, answer = await post(gate, path, body)
            assert status == wanted, (name, answer)
            row, timeline = check_one(rows, id_)
            (server,) = rows_of(timeline, "server")
            assert (row.status, bool(row.error_type), bool(server["error_type"])) == (
                status,
                status >= 400,
                status >= 400,
            ), (name, row)
            if status == 200:
                assert server["name"] == NAMES[path]
                assert server["attributes"]["gen_ai.usage.input_tokens"] > 0, name
        for path in ("/health", "/v1/models", "/metrics", "/props"):
            async with gate.http.get(gate.url + path) as reply:
                await reply.read()
    assert len(rows.requests) == len({row.span_id for row in rows.requests}) == len(ENDINGS)
    assert len(rows.attempts) == sum(status == 200 for *_, status in ENDINGS.values()) + 2


async def test_phases_are_the_whole_time_but_for_what_the_gateway_takes(pair, embed, rows):
    async with gateway(*infos(pair), embed, tracing=Tracing(rows.add)) as gate:
        for name, (path, body, status) in ENDINGS.items():
            took: list[float] = []
            while status == 200 and sum(each < OWN_S for each in took[-7:]) < 4:  # others use this machine too
                assert len(took) < 50, (name, took)
                _, id_, _ = await post(gate, path, body)
                took.append(own_s(*check_one(rows, id_)))
            if os.environ.get("LLTM_SHOW"):
                print(name, [f"{each * 1e3:.2f} ms" for each in took])


async def five_for_two_slots(engine: Engine, rows: Rows) -> tuple[list[float], list[float], list[float]]:
    """Seconds that five requests waited, seconds that they say, and the parts of their times in the server's queue."""
    ended: dict[str, float] = {}

    async def one(gate: Gateway, number: int) -> str:
        body = LONG | {"prompt": f"{number} hello", "n_predict": 1200}
        async with gate.http.post(gate.url + "/completion", json=body) as reply:
            await reply.read()
            ended[reply.headers["x-request-id"]] = time.monotonic()
            return reply.headers["x-request-id"]

    async with gateway(engine.info, tracing=Tracing(rows.add)) as gate:
        began = time.monotonic()
        ids = await asyncio.gather(*(one(gate, number) for number in range(5)))
    done = sorted(ended.values())
    wanted = [0.0, 0.0, *(at - began for at in done[:3])]  # the third begins when the first has ended, and so on
    found, parts = [], []
    for id_ in ids:
        row, timeline = check_one(rows, id_)
        found.append(rows_of(timeline, "server")[0]["attributes"]["gen_ai.latency.time_in_queue"])
        inside = [span for span in timeline["spans"] if span["name"] == "lltm.queue"]
        parts.append((inside[0]["end_s"] - inside[0]["start_s"]) / row.total_s)
    return wanted, sorted(found), parts


async def test_the_wait_of_five_requests_for_two_slots_is_what_it_was(tiny, tmp_path, rows):
    with real_engine("e0", tiny, tmp_path) as engine:
        for _ in range(4):  # a machine that stands still between two looks at the clock is no fault of the gateway
            wanted, found, parts = await five_for_two_slots(engine, rows)
            errors = [abs(got - want) for got, want in zip(found, wanted, strict=True)]
            if os.environ.get("LLTM_SHOW"):
                print(
                    "queue", [f"{each:.3f}" for each in wanted], "off by", [f"{each * 1e3:.1f} ms" for each in errors]
                )
            assert wanted[2] > 0.1
            if max(errors) < max(0.05, 0.1 * wanted[2]) and max(parts) < 0.1:
                return
    raise AssertionError((wanted, found, parts))


async def test_a_request_that_gets_no_slot_says_how_long_it_waited(rows):
    free = asyncio.Event()

    async def hold(_request: bytes, writer: asyncio.StreamWriter) -> None:
        await free.wait()
        writer.write(whole(b"{}"))

    async with (
        FakeEngine(hold) as fake,
        gateway(engine_info("e0", fake.url, slots=1), tracing=Tracing(rows.add), queue_limit=1) as gate,
    ):
        first = asyncio.create_task(post(gate, PATH, CHAT))
        await until(lambda: fake.requests, first)
        second = asyncio.create_task(post(gate, PATH, CHAT))
        await until(gate.waiting, second)
        status, id_, _ = await post(gate, PATH, CHAT)
        second.cancel()
        await until(lambda: not gate.waiting())
        assert status == 429
        row, timeline = check_one(rows, id_)
        assert (row.status, row.error_type, row.model) == (429, "overloaded_error", MODEL), row
        assert rows_of(timeline) == []
        _, id_, _ = await post(gate, PATH, CHAT, **{"x-lltm-deadline-ms": "200"})
        row, timeline = check_one(rows, id_)
        (server,) = rows_of(timeline, "server")
        assert 0.15 < server["attributes"]["gen_ai.latency.time_in_queue"] <= row.total_s
        assert server["attributes"]["lltm.attempts"] == 0
        assert [span["name"] for span in timeline["spans"]] == [f"chat {MODEL}", "route"]
        free.set()
        await first


async def counted(gate: Gateway, engine: Engine) -> float:
    async with gate.http.get(engine.info.url + "/metrics", headers=engine.headers) as reply:
        return read_metrics(await reply.text()).tokens_predicted_total or 0.0


@pytest.mark.parametrize("details", [{}, {"n_probs": 1}], ids=["tapped", "without a tap"])
async def test_a_cancelled_stream_keeps_its_true_token_counts(tiny, tmp_path, rows, details):
    with real_engine("e0", tiny, tmp_path) as engine:
        async with gateway(engine.info, tracing=Tracing(rows.add)) as gate:
            body = json.dumps(LONG | {"model": MODEL} | details).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
            writer.write(b"POST /completion HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
            writer.write(b"x-request-id: gone\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            got = b""
            while got.count(b'"stop":false') < 40:
                got += await reader.read(65_536)
            writer.write_eof()  # it leaves, and reads what had been sent to it
            got += await reader.read()
            writer.close()
            await gate.idle()
            async with asyncio.timeout(60):
                while not (server := await counted(gate, engine)):
                    await asyncio.sleep(0.02)
    row, timeline = check_one(rows, "gone")
    (attempt,) = rows.attempts
    assert (row.error_type, row.status, attempt.outcome) == ("client_gone", 200, "client gone"), (row, attempt)
    assert row.delivered_tokens == attempt.delivered_tokens == got.count(b'"stop":false') >= 40
    # What it wrote after the last part that we read, only its own counter knows: the ledger adds that later.
    assert attempt.delivered_tokens <= attempt.generated_tokens <= server < LONG["n_predict"]
    assert attempt.is_estimate
    assert rows_of(timeline)[0]["attributes"]["lltm.tokens.estimated"]
    own_s(row, timeline)


async def test_a_stream_that_is_continued_elsewhere_reads_well_in_its_timeline(steady, tmp_path, rows):
    with ExitStack() as stack:
        engines = {name: stack.enter_context(real_engine(name, steady, tmp_path)) for name in ("e0", "e1")}
        async with (
            gateway(*infos(engines.values()), tracing=Tracing(rows.add)) as gate,
            gate.http.post(gate.url + "/completion", json=LONG | {"n_predict": 1500}) as reply,
        ):
            dead = reply.headers["x-lltm-engine"]
            text = await reply.content.readuntil(b"\n\n")
            engines[dead].process.kill()
            text += await reply.read()
            id_ = reply.headers["x-request-id"]
    assert text.count(b'"stop":true') == 1
    row, timeline = check_one(rows, id_)
    assert (row.status, row.error_type, row.delivered_tokens) == (200, "", 1500)
    broken, went_on = rows_of(timeline)
    assert own_s(row, timeline) < max(0.05, 0.2 * row.total_s)
    assert broken["end_s"] <= went_on["start_s"]
    assert (broken["attributes"]["lltm.engine"], broken["error_type"]) == (dead, "continued")
    assert broken["attributes"]["lltm.attempt.outcome"] == "continued"
    assert went_on["attributes"]["lltm.attempt.continued"]
    assert (went_on["attributes"]["lltm.engine"], went_on["error_type"]) == (({"e0", "e1"} - {dead}).pop(), "")
    names = [[s["name"] for s in timeline["spans"] if s["parent_span_id"] == c["span_id"]] for c in (broken, went_on)]
    assert names == [["lltm.queue", "lltm.prefill", "lltm.decode"]] * 2
    assert sum(each.delivered_tokens for each in rows.attempts) == 1500


NATIVE_EVENT = (
    b'{"index":0,"content":"a","tokens":[68],"stop":false,"id_slot":0,"tokens_predicted":1,"tokens_evaluated":3}'
)


async def break_off(_request: bytes, writer: asyncio.StreamWriter) -> None:
    """A stream that ends in its middle."""
    writer.write(STREAM_HEAD + event(NATIVE_EVENT))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def test_a_broken_stream_names_its_request_in_the_log_and_every_engine_got_our_traceparent(rows):
    handler = LogHandler(rows.add, "gateway")
    async with FakeEngine(break_off) as one, FakeEngine(break_off) as two:
        engines = engine_info("e0", one.url), engine_info("e1", two.url)
        async with gateway(*engines, tracing=Tracing(rows.add)) as gate:
            with handler.installed():
                caller = f"00-{TRACE_ID}-{PARENT_ID}-01"
                status, id_, answer = await post(gate, "/completion", LONG, traceparent=caller)
    assert (status, answer[-8:]) == (200, b"<broken>")
    row, timeline = check_one(rows, id_)
    assert (row.trace_id, row.parent_span_id, row.error_type) == (TRACE_ID, PARENT_ID, "stream_broken")
    sent = {header(request, b"traceparent")[0] for fake in (one, two) for request in fake.requests}
    assert sent == {f"00-{TRACE_ID}-{each.span_id}-01" for each in rows.attempts}
    assert len(sent) == len(rows.attempts) == 3
    assert [span["error_type"] for span in rows_of(timeline)] == ["continued", "continued", "stream_broken"]
    (line,) = [each for each in rows.logs if "broken off" in each.message]
    assert (line.trace_id, line.span_id, line.severity) == (TRACE_ID, row.span_id, "WARNING")
    assert (line.logger, id_ in line.message) == ("lltm_ray.gateway.app", True)
    assert handler.faults == 0


def header(request: bytes, name: bytes) -> list[str]:
    lines = [line.split(b": ", 1) for line in request.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]]
    return [value.decode() for each, value in lines if each.lower() == name]


async def answer_at_once(_request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(b'{"ok":1}'))


TRACED = pytest.mark.parametrize(
    ("given", "state", "trace_id", "flags"),
    [
        (f"00-{TRACE_ID}-{PARENT_ID}-00", "a=1,b=2", TRACE_ID, 0),
        (f"00-{TRACE_ID}-{PARENT_ID}-01", "", TRACE_ID, 1),
        (f"00-{TRACE_ID}-{PARENT_ID}-03", "v=x", TRACE_ID, 3),
        ("00-0-0-01", "v=x", None, 1),
        ("", "", None, 1),
    ],
)


@TRACED
async def test_the_callers_trace_is_joined_and_the_engine_gets_the_attempts_span(rows, given, state, trace_id, flags):
    sent = {name: value for name, value in (("traceparent", given), ("tracestate", state)) if value}
    async with (
        FakeEngine(answer_at_once) as fake,
        gateway(engine_info("e0", fake.url), tracing=Tracing(rows.add)) as gate,
    ):
        await post(gate, PATH, CHAT, **sent)
    ((row,), (attempt,)) = rows.requests, rows.attempts
    assert trace_id in (row.trace_id, None)
    assert (row.parent_span_id, row.flags) == (PARENT_ID if trace_id else "", flags)
    assert header(fake.requests[0], b"traceparent") == [f"00-{row.trace_id}-{attempt.span_id}-{flags:02x}"]
    assert header(fake.requests[0], b"tracestate") == ([state] if trace_id and state else [])
    assert attempt.request_span_id == row.span_id != attempt.span_id


async def test_what_a_client_may_make_long_is_cut_before_it_waits_in_a_row(rows):
    sent = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "v=" + "x" * 9000}
    long = "m" * 100_000
    async with (
        FakeEngine(answer_at_once) as fake,
        gateway(engine_info("e0", fake.url), tracing=Tracing(rows.add)) as gate,
    ):
        await post(gate, PATH, CHAT, **sent, **{"x-session-id": long[:9000]})
        await post(gate, PATH, CHAT | {"model": long, "stop": [long]})
    assert [row.trace_id == TRACE_ID for row in rows.requests] == [True, False]
    assert header(fake.requests[0], b"tracestate") == []
    assert max(len(repr(row)) for row in rows.requests) < 4096


async def test_without_tracing_the_callers_headers_pass_as_they_came():
    sent = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-03", "tracestate": "v=x"}
    async with FakeEngine(answer_at_once) as fake, gateway(engine_info("e0", fake.url)) as gate:
        await post(gate, PATH, CHAT, **sent)
    assert header(fake.requests[0], b"traceparent") == [sent["traceparent"]]
    assert header(fake.requests[0], b"tracestate") == [sent["tracestate"]]


SAID = {
    "stream": STREAM | {"messages": [{"role": "user", "content": SECRET_PROMPT}], "max_tokens": 40},
    "joined": CHAT | {"messages": [{"role": "user", "content": SECRET_PROMPT}], "max_tokens": 300},
    "wrong field": CHAT | {"model": [SECRET_PROMPT]},
    "wrong message": CHAT | {"messages": [{"role": SECRET_PROMPT, "content": {"x": SECRET_PROMPT}}]},
    "half a character": CHAT | {"model": "\ud800", "messages": [{"role": "user", "content": SECRET_PROMPT}]},
}


async def say_all(gate: Gateway) -> list[str]:
    """The answers' texts."""
    said = []
    for body in SAID.values():
        _, _, answer = await post(gate, PATH, body, authorization=f"Bearer {KEY}", **{"x-api-key": KEY})
        events = [line.removeprefix(b"data: ") for line in answer.split(b"\n") if line.startswith((b"data: {", b"{"))]
        choices = [choice for each in events for choice in json.loads(each).get("choices", ())]
        said.append("".join((c.get("message") or c.get("delta") or {}).get("content") or "" for c in choices))
    broken = b'{"prompt": "' + SECRET_PROMPT.encode()
    async with gate.http.post(gate.url + PATH, data=broken, headers={"x-api-key": KEY}) as reply:
        assert reply.status == 400
    return said


async def test_no_row_has_a_word_of_prompt_or_answer_nor_a_key(pair, rows):
    handler = LogHandler(rows.add, "gateway")
    async with gateway(*infos(pair), keys=(KEY,), tracing=Tracing(rows.add)) as gate:
        with handler.installed():
            said = await say_all(gate)
    texts = [each for each in said if each]
    assert len(rows.requests) == len(SAID) + 1
    assert len(texts) == 2
    assert min(map(len, texts)) > 8
    assert not {secret for secret in (SECRET_PROMPT, KEY, "engine-key", *texts) if secret in repr(rows.told)}
    assert {row.tenant for row in rows.requests} == {rows.requests[0].tenant}
    batch, unsound = unseal(rows.outbox.take())  # every row can travel, whatever its client said
    assert (batch["requests"].num_rows, unsound, rows.outbox.dropped) == (len(SAID) + 1, {}, {})


QUOTED = b'{"error":{"code":400,"type":"invalid_request_error","message":"cannot parse the-heron-at-dusk"}}'


async def refuse_with_a_quote(_request: bytes, writer: asyncio.StreamWriter) -> None:
    """As a survivor may that cannot read what it is to go on with."""
    writer.write(whole(QUOTED, status=400))


async def test_a_survivors_error_is_told_by_status_and_type_and_quotes_nothing(rows, tmp_path):
    handler = LogHandler(rows.add, "gateway")
    parts = itertools.chain((break_off,), itertools.repeat(refuse_with_a_quote))

    async def script(request: bytes, writer: asyncio.StreamWriter) -> None:
        await next(parts)(request, writer)

    async with FakeEngine(script) as one, FakeEngine(script) as two:
        engines = engine_info("e0", one.url), engine_info("e1", two.url)
        with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
            async with gateway(*engines, tracing=Tracing(rows.add), ledger=ledger) as gate:
                with handler.installed():
                    _, id_, answer = await post(gate, "/completion", LONG | {"prompt": SECRET_PROMPT})
                await gate.idle()
                (record,) = gate.app.records
                entry = ledger.explain(id_)
    assert answer.endswith(b"<broken>")
    assert "it answered 400 invalid_request_error" in record.error
    assert rows.requests[0].error == record.error == entry["error"]
    assert SECRET_PROMPT not in repr((rows.told, record, entry))
    assert rows.logs


async def test_the_account_has_no_word_of_the_prompt(rows, tmp_path):
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        async with gateway(engine_info("e0", "http://127.0.0.1:9"), tracing=Tracing(rows.add), ledger=ledger) as gate:
            for body in (b'{"prompt": "' + SECRET_PROMPT.encode(), json.dumps({"model": [SECRET_PROMPT]}).encode()):
                async with gate.http.post(gate.url + PATH, data=body) as reply:
                    assert reply.status == 400
                    assert SECRET_PROMPT in await reply.text()  # its own client may read it
                    id_ = reply.headers["x-request-id"]
                await gate.idle()
                entry = ledger.explain(id_)
                assert entry["error"] == rows.requests[-1].error != ""
                assert SECRET_PROMPT not in repr((entry, gate.app.records, rows.told))


async def test_prompts_that_begin_alike_share_salted_hashes_and_none_of_them_is_told(pair, rows):
    start = f"{SECRET_PROMPT} " * 40  # 720 bytes
    prompts = [f"{start}one" * 2, f"{start}two" * 2, f"another {start}"]
    salt = b"of this fleet".ljust(32)
    async with gateway(*infos(pair), tracing=Tracing(rows.add, salt=salt)) as gate:
        for prompt in prompts:
            status, _, answer = await post(gate, "/completion", NATIVE | {"prompt": prompt})
            assert status == 200, answer
        await post(gate, "/v1/embeddings", {"model": MODEL, "input": SECRET_PROMPT * 40})
    one, two, other, embedding = rows.requests
    assert [row.prompt_bytes for row in rows.requests[:3]] == [len(prompt) for prompt in prompts]
    assert [one.prefix, two.prefix] == [hash_prefixes(prompt.encode(), salt) for prompt in prompts[:2]]
    assert [one.blocks, two.blocks] == [hash_blocks(prompt.encode(), salt) for prompt in prompts[:2]] != [b"", b""]
    same = [one.prefix[at : at + 8] == two.prefix[at : at + 8] for at in range(0, len(one.prefix), 8)]
    assert same == [True, True, False, False, False]
    assert other.prefix
    assert other.prefix[:8] not in (one.prefix[:8], two.prefix[:8])
    assert (embedding.prompt_bytes, embedding.prefix, embedding.blocks) == (0, b"", b"")
    assert SECRET_PROMPT not in repr(rows.told)
    assert salt.hex() not in repr(rows.told)
    assert "of this fleet" not in repr((rows.told, Tracing(rows.add, salt=salt)))


async def test_captured_content_is_there_on_both_ends_and_redacted(pair, rows):
    capture = Capture(lambda text: text.replace("heron", "[bird]"))
    async with gateway(*infos(pair), keys=(KEY,), tracing=Tracing(rows.add, capture)) as gate:
        said = await say_all(gate)
    assert "heron" not in repr(rows.told)
    for name, row in zip(SAID, rows.requests, strict=False):
        content = json.loads(row.content)
        if name in ("stream", "joined"):
            assert content["input"][0]["parts"][0]["content"] == "the-[bird]-at-dusk"
            assert content["output"][0]["parts"][0]["content"] == said[list(SAID).index(name)]
    assert KEY not in repr(rows.told)


async def test_what_goes_wrong_in_telemetry_costs_no_request_anything(pair, caplog):
    def refuse(_kind: str, _row: tuple[Any, ...]) -> None:
        raise RuntimeError(SECRET_PROMPT)

    class Broken(Capture):
        def __call__(self, body: Any, answer: str, finish_reason: str = "") -> str:
            raise RecursionError(answer or str(body))

    rows = Outbox()
    for tracing, told in ((Tracing(refuse), 0), (Tracing(rows.add, Broken()), 2)):
        async with gateway(*infos(pair), tracing=tracing) as gate:
            for body in (STREAM, CHAT):
                status, _, answer = await post(gate, PATH, body)
                assert (status, b"<broken>" in answer) == (200, False)
        assert tracing.faults == 2
        assert len(rows) == 2 * told
    lines = [record.getMessage() for record in caplog.records if "could not be told" in record.getMessage()]
    assert len(lines) == 4
    assert SECRET_PROMPT not in "".join(lines)


async def test_slots_that_move_are_spans_of_whoever_asked_for_it(tiny, tmp_path, rows):
    caller = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    with ExitStack() as stack:
        engines = [stack.enter_context(real_engine(name, tiny, tmp_path)) for name in ("e0", "e1")]
        async with gateway(*infos(engines), tracing=Tracing(rows.add)) as gate:
            async with gate.http.post(gate.url + "/completion", json=NATIVE | {"prompt": "hello " * 40}) as reply:
                await reply.read()
                home = reply.headers["x-lltm-engine"]
            async with gate.http.post(f"{gate.url}/lltm/drain?engine={home}", headers=caller) as reply:
                assert (await reply.json())["moved"] == 1
            away = ({"e0", "e1"} - {home}).pop()
            async with gate.http.post(f"{gate.url}/slots/0?action=erase&engine={away}", headers=caller) as reply:
                assert reply.status == 200, await reply.text()
    spans = {span.name: span for span in rows.spans}
    assert set(spans) == {"drain", "move slot", "slot save", "slot carry", "slot restore", "slot erase"}
    assert {span.trace_id for span in rows.spans} == {TRACE_ID}
    assert spans["drain"].parent_span_id == spans["slot erase"].parent_span_id == PARENT_ID
    assert spans["move slot"].parent_span_id == spans["drain"].span_id
    inside = [spans[name] for name in ("slot save", "slot carry", "slot restore")]
    assert {span.parent_span_id for span in inside} == {spans["move slot"].span_id}
    ends = [at for span in inside for at in (span.start_unix_nano, span.end_unix_nano)]
    assert ends == sorted(ends)
    saved, restored = (json.loads(span.attributes) for span in (inside[0], inside[2]))
    assert saved["lltm.slot.tokens"] == restored["lltm.slot.tokens"] > 40
    assert [span.engine for span in inside] == [home, away, away]
    assert not any(span.error_type for span in rows.spans)
