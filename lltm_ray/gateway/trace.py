"""What a request tells telemetry when it is over: its row and its attempts' rows; and where such rows go."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

from lltm_ray._prefix import SALT_BYTES, BlockSampler, hash_prefixes
from lltm_ray.gateway.accounting import is_several
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.timeline import RequestTrace
from lltm_ray.gateway.upstream import Headers
from lltm_ray.gateway.work import Work
from lltm_ray.records import Timings
from lltm_ray.routing.ledger import Attempt
from lltm_ray.telemetry.content import Capture
from lltm_ray.telemetry.logs import sendable
from lltm_ray.telemetry.rows import NEVER
from lltm_ray.telemetry.telling import cut_error, known_type, tell_parameters

_CONVERSATION_HEADERS = (b"x-conversation-id", b"x-session-id")
_CONVERSATION_FIELDS = ("conversation", "session_id")
_MOST_CHARS = 256
_MOST_BODY_BYTES = 65_536
_log = logging.getLogger(__name__)
Rows = list[tuple[str, tuple[Any, ...]]]
"""With their kinds."""


@dataclass(slots=True)
class Tracing:
    """Where rows go, and what is captured besides. Nothing here raises into a request."""

    add: Callable[[str, tuple[Any, ...]], None]
    """Takes a kind and a row; quick."""
    capture: Capture | None = None
    """Makes a request's content; None: prompts and answers stay here."""
    salt: bytes = field(default=b"", repr=False)
    """What prompts are hashed with: the fleet's; empty: one that only this process knows."""
    later: Callable[[Callable[[], Rows]], None] | None = None
    """Calls what it is given when it suits, as `Outbox.later`; None: rows are made at once."""
    faults: int = 0
    """What could not be told, or not whole."""
    _blocks: BlockSampler = field(default_factory=BlockSampler, repr=False)

    def __post_init__(self) -> None:
        self.salt = self.salt or secrets.token_bytes(SALT_BYTES)

    def note(self, request: Request, trace: RequestTrace) -> None:
        """Tell of a request that is over; one with a large body at once, for it would wait with all that it holds."""
        try:
            if self.later is not None and len(request.body) <= _MOST_BODY_BYTES:
                self.later(partial(self._tell, request, trace))
                return
            for kind, row in self._tell(request, trace):
                self.add(kind, row)
        except Exception as error:  # noqa: BLE001 - border: the answer is the client's, whatever becomes of its trace
            self._fault("a request", error)

    def _tell(self, request: Request, trace: RequestTrace) -> Rows:
        """Rows of its attempts, and its own; never raises."""
        try:
            key = request.ask.key if request.ask is not None else b""
            hashes = hash_prefixes(key, self.salt), self._blocks.of(key, self.salt)
            row = request_row(request, trace, self._content(request), hashes)
            return [*(("attempts", attempt) for attempt in attempt_rows(request, trace)), ("requests", row)]
        except Exception as error:  # noqa: BLE001 - border, as above
            self._fault("a request", error)
            return []

    def span(self, work: Work) -> None:
        """Tell of work that is over."""
        try:
            self.add("spans", work.row())
        except Exception as error:  # noqa: BLE001 - border, as above
            self._fault(work.name, error)

    def _content(self, request: Request) -> str:
        if self.capture is None or not isinstance(request.body_json, dict):
            return ""
        try:
            reason = _finish_reasons(request.record.ends, are_several=False)
            return sendable(self.capture(request.body_json, request.reply_text or "", reason))
        except Exception as error:  # noqa: BLE001 - border: content of any shape, and the operator's redaction
            self._fault("a request's content", error)
            return ""

    def _fault(self, what: str, error: Exception) -> None:
        """By its type only: what it says may be of the prompt."""
        self.faults += 1
        if self.faults.bit_count() == 1:  # the 1st, 2nd, 4th, ...
            _log.warning("%s could not be told (%s); such there were: %d", what, type(error).__name__, self.faults)


def request_row(request: Request, trace: RequestTrace, content: str, hashes: tuple[bytes, bytes]) -> tuple[Any, ...]:
    """The request as a `RequestRow`'s values; it must be over, its record and its line in the account complete.

    `content` is the text of both sides, if the operator asked for it; `hashes`: of the prompt's beginnings, its blocks.
    """
    record, entry, fields = request.record, request.entry, request.body_json
    ends, error, body = record.ends, trace.error or record.error, fields if isinstance(fields, dict) else {}
    return (  # no `RequestRow`: only a plain tuple is pickled quickly
        trace.trace_id,
        trace.span_id,
        trace.parent_span_id,
        trace.flags,
        trace.state,
        request.id,
        record.route,
        sendable((request.model or "")[:_MOST_CHARS]),
        record.model,
        request.tenant,
        _conversation(request.headers, body),
        record.status,
        trace.error_type or _error_type(record.status, record.error, ends),
        cut_error(error) if error else "",
        entry.arrived_unix_nano,
        NEVER if record.ttft_s is None else record.ttft_s,
        record.total_s,
        record.delivered_tokens,
        record.bytes_sent,
        bool(body.get("stream")),
        tell_parameters(body),
        _string(ends, b'"id":"'),
        _string(ends, b'"model":"'),
        _finish_reasons(ends, are_several=is_several(fields)),
        entry.policy,
        entry.why,
        content,
        len(request.ask.key) if request.ask is not None else 0,
        hashes[0],
        hashes[1],
    )


def attempt_rows(request: Request, trace: RequestTrace) -> Iterator[tuple[Any, ...]]:
    """Its attempts as `AttemptRow`s' values, in their order."""
    arrived_at = request.arrived_at
    if len(trace.attempts) > len(request.entry.attempts):  # the last one waited for a slot and got none
        trace.running.is_continued = request.is_started
    for number, (seen, attempt) in enumerate(
        zip_longest(trace.attempts, request.entry.attempts, fillvalue=_REFUSED), 1
    ):
        timings = seen.timings or _UNTOLD
        yield (
            trace.trace_id,
            trace.span_id,
            seen.span_id,
            number,
            attempt.engine,
            attempt.server_pid,
            attempt.slot,
            seen.asked_at - arrived_at,
            seen.sent_at - arrived_at,
            seen.headers_at - arrived_at,
            seen.first_at - arrived_at,
            seen.ended_at - arrived_at,
            attempt.predicted_cached_tokens,
            attempt.cached_tokens,
            attempt.computed_tokens,
            attempt.generated_tokens,
            attempt.delivered_tokens,
            timings.prompt_ms,
            timings.predicted_ms,
            timings.draft_n,
            timings.draft_n_accepted,
            str(attempt.outcome),
            attempt.is_estimate,
            seen.is_continued,
        )


_REFUSED: Any = Attempt(engine="", predicted_cached_tokens=-1, outcome="refused")
_UNTOLD = Timings(prompt_ms=math.nan, predicted_ms=math.nan)


def _conversation(headers: Headers, body: dict[str, Any]) -> str:
    named = [pair for pair in headers if pair[0] in _CONVERSATION_HEADERS and pair[1]]
    if named:
        _, said = min(named, key=lambda pair: _CONVERSATION_HEADERS.index(pair[0]))
        return said.decode("utf-8", "replace")[:_MOST_CHARS]
    for field_name in _CONVERSATION_FIELDS:
        if field_name in body:
            value = body[field_name]
            value = value.get("id") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                return sendable(value[:_MOST_CHARS])
    return ""


def _error_type(status: int, error: str, ends: bytes) -> str:
    if error == "client gone" or not status:
        return "client_gone"
    if status < 400:
        return "stream_broken" if error else ""
    return known_type(_string(ends, b'"type":"')) or str(status)


def _string(ends: bytes, key: bytes) -> str:
    """The first such member's value; generated text cannot pass for one: its quotes would be escaped."""
    value, quote, _ = ends.partition(key)[2][:_MOST_CHARS].partition(b'"')
    return value.decode("utf-8", "replace") if quote else ""


def _finish_reasons(ends: bytes, *, are_several: bool) -> str:
    key = b'"finish_reason":"'
    if are_several:
        reasons = [part.partition(b'"')[0] for part in ends.split(key)[1:]]
        return ",".join(reason.decode("ascii", "replace") for reason in reasons)
    _, found, rest = ends.rpartition(key)
    if not found:
        return _string(ends, b'"stop_type":"')
    return rest.partition(b'"')[0].decode("ascii", "replace")
