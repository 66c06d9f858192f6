"""A finished request's line in the account."""

from __future__ import annotations

from lltm_ray.gateway.guard import Cause
from lltm_ray.gateway.request import Request
from lltm_ray.routing.ledger import LedgerEntry
from lltm_ray.routing.ledger.entry import Outcome
from lltm_ray.telemetry.telling import cut_error

_MODEL_CHARS = 96


def cut_off(entry: LedgerEntry, cause: Cause) -> None:
    """The last attempt ended from our side."""
    last = entry.attempts[-1] if entry.attempts else None
    if last is not None and last.outcome == Outcome.OK:
        last.outcome = Outcome.CLIENT_GONE if cause is Cause.CLIENT_GONE else Outcome.DEADLINE


def settle(request: Request, policy: str) -> LedgerEntry:
    """The request's line in the account, complete."""
    entry, record, ask = request.entry, request.record, request.ask
    entry.tenant, entry.policy = request.tenant, policy
    if not entry.model:  # refused: the client's own word, which may be of any length
        entry.model = ((ask.model if ask else request.model) or "")[:_MODEL_CHARS]
    entry.affinity = ask.affinity if ask else ""
    entry.wait_s, entry.ttft_s, entry.total_s = record.queue_s, record.ttft_s, record.total_s
    entry.status, entry.error = record.status, cut_error(record.error)
    entry.delivered_tokens = record.delivered_tokens
    if request.choice is not None:
        entry.why = request.choice.why
        entry.considered = [score._asdict() for score in request.choice.considered]
    return entry
