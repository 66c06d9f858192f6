"""Rows of requests are made when it suits, and say what they would have said at once."""

from typing import Any

from lltm_ray.gateway.accounting import RequestRecord
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.timeline import begin_trace
from lltm_ray.gateway.trace import Tracing, attempt_rows, request_row
from lltm_ray.records import Timings
from lltm_ray.routing.ledger import Attempt, LedgerEntry
from lltm_ray.telemetry.batch import unpack
from lltm_ray.telemetry.outbox import Outbox
from lltm_ray.telemetry.parcel import unseal
from lltm_ray.telemetry.rows import AttemptRow, RequestRow


async def unused(*_: Any) -> Any:
    raise AssertionError


def finished(id_: str, body: bytes = b"{}") -> Request:
    request = Request(
        method="POST",
        path="/completion",
        query=b"",
        headers=[],
        receive=unused,
        send=unused,
        link=None,
        id=id_,
        arrived_at=1.0,
        record=RequestRecord(request_id=id_, route="/completion", model="m", status=200, total_s=2.0),
        entry=LedgerEntry(request_id=id_, attempts=[Attempt(engine="e0", generated_tokens=7)]),
        body=body,
        body_json={"model": "m", "temperature": 0},
    )
    request.trace = begin_trace(request.headers, lambda: 3.0)
    request.trace.attempt(1.5)
    request.trace.end()
    return request


def told(tracing: Tracing, request: Request) -> None:
    assert request.trace is not None
    tracing.note(request, request.trace)


def test_later_rows_are_those_made_at_once() -> None:
    now, later = Outbox(), Outbox()
    salt = b"s" * 32
    for request in (finished("r-1"), finished("r-2")):
        told(Tracing(now.add, salt=salt), request)
        told(Tracing(later.add, salt=salt, later=later.later), request)
    assert (len(now), len(later)) == (4, 2)
    batches = [unseal(outbox.take())[0] for outbox in (now, later)]
    texts = [repr({kind: columns.to_pylist() for kind, columns in batch.items()}) for batch in batches]
    assert texts[0] == texts[1]
    assert [row.request_id for row in unpack("requests", batches[1]["requests"])] == ["r-1", "r-2"]
    assert [row.generated_tokens for row in unpack("attempts", batches[1]["attempts"])] == [7, 7]


def test_a_request_with_a_large_body_does_not_wait_in_memory() -> None:
    outbox = Outbox()
    told(Tracing(outbox.add, later=outbox.later), finished("r-1", b" " * 2**20))
    assert len(outbox) == 2  # its row and its attempt's


def test_each_value_of_a_row_stands_under_its_own_name() -> None:
    request = finished("r-1")
    trace, record, entry = request.trace, request.record, request.entry
    assert trace is not None
    request.model, request.tenant, trace.parent_span_id, trace.state = "asked", "tenant", "5" * 16, "a=b"
    record.ttft_s, record.bytes_sent, record.delivered_tokens, record.error = 0.25, 12, 11, "why it failed"
    record.ends = b'{"id":"c-1","model":"answered","choices":[{"finish_reason":"stop"}]}'
    entry.arrived_unix_nano, entry.policy, entry.why = 13, "residency", "least loaded"
    told = RequestRow._make(request_row(request, trace, "content", (b"prefix", b"blocks")))._asdict()
    ids = {name: told.pop(name) for name in ("trace_id", "span_id", "parent_span_id")}
    assert ids == {"trace_id": trace.trace_id, "span_id": trace.span_id, "parent_span_id": "5" * 16}
    assert told == {
        "flags": 1,
        "state": "a=b",
        "request_id": "r-1",
        "route": "/completion",
        "model_asked": "asked",
        "model": "m",
        "tenant": "tenant",
        "conversation": "",
        "status": 200,
        "error_type": "stream_broken",
        "error": "why it failed",
        "arrived_unix_nano": 13,
        "ttft_s": 0.25,
        "total_s": 2.0,
        "delivered_tokens": 11,
        "bytes_sent": 12,
        "is_stream": False,
        "parameters": '{"temperature":0}',
        "response_id": "c-1",
        "response_model": "answered",
        "finish_reasons": "stop",
        "policy": "residency",
        "why": "least loaded",
        "content": "content",
        "prompt_bytes": 0,
        "prefix": b"prefix",
        "blocks": b"blocks",
    }


def test_each_value_of_an_attempts_row_stands_under_its_own_name() -> None:
    request = finished("r-1")
    trace = request.trace
    assert trace is not None
    seen = trace.running
    seen.sent_at, seen.headers_at, seen.first_at, seen.is_continued = 2.0, 2.25, 2.5, True
    seen.timings = Timings(prompt_ms=21.0, predicted_ms=22.0, draft_n=23, draft_n_accepted=24)
    request.entry.attempts[:] = [
        Attempt(
            engine="e0",
            server_pid=31,
            slot=32,
            predicted_cached_tokens=33,
            cached_tokens=34,
            computed_tokens=35,
            generated_tokens=36,
            delivered_tokens=37,
            is_estimate=True,
        )
    ]
    (told,) = (AttemptRow._make(row)._asdict() for row in attempt_rows(request, trace))
    assert told == {
        "trace_id": trace.trace_id,
        "request_span_id": trace.span_id,
        "span_id": seen.span_id,
        "number": 1,
        "engine": "e0",
        "server_pid": 31,
        "slot": 32,
        "asked_s": 0.5,
        "sent_s": 1.0,
        "headers_s": 1.25,
        "first_s": 1.5,
        "ended_s": 2.0,
        "predicted_cached_tokens": 33,
        "cached_tokens": 34,
        "computed_tokens": 35,
        "generated_tokens": 36,
        "delivered_tokens": 37,
        "prompt_ms": 21.0,
        "predicted_ms": 22.0,
        "draft_tokens": 23,
        "accepted_tokens": 24,
        "outcome": "ok",
        "is_estimate": True,
        "is_continued": True,
    }


def test_a_conversations_own_header_comes_before_that_of_its_session() -> None:
    request = finished("r-1")
    request.headers = [
        (b"x-session-id", b"session"),
        (b"x-conversation-id", b""),
        (b"x-conversation-id", b"conversation"),
    ]
    assert request.trace is not None
    row = request_row(request, request.trace, "", (b"", b""))
    assert RequestRow._make(row).conversation == "conversation"
    del request.headers[2]
    row = request_row(request, request.trace, "", (b"", b""))
    assert RequestRow._make(row).conversation == "session"
