"""Rows of requests are made when it suits, and say what they would have said at once."""

from typing import Any

from lltm_ray.gateway.accounting import RequestRecord
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.timeline import begin_trace
from lltm_ray.gateway.trace import Tracing
from lltm_ray.routing.ledger import Attempt, LedgerEntry
from lltm_ray.telemetry.batch import unpack
from lltm_ray.telemetry.outbox import Outbox


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
    batches = [outbox.take() for outbox in (now, later)]
    texts = [repr({kind: columns.to_pylist() for kind, columns in batch.items()}) for batch in batches]
    assert texts[0] == texts[1]
    assert [row.request_id for row in unpack("requests", batches[1]["requests"])] == ["r-1", "r-2"]
    assert [row.generated_tokens for row in unpack("attempts", batches[1]["attempts"])] == [7, 7]


def test_a_request_with_a_large_body_does_not_wait_in_memory() -> None:
    outbox = Outbox()
    told(Tracing(outbox.add, later=outbox.later), finished("r-1", b" " * 2**20))
    assert len(outbox) == 2  # its row and its attempt's
