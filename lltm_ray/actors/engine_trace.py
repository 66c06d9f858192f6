"""What an engine's actor tells telemetry: calls that come by handle, past any gateway, and starts of its server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lltm_ray._prefix import BlockSampler, hash_prefixes
from lltm_ray.errors import ConfigError, DeadlineError, LltmRayError, UpstreamError
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.records import Adapter, Completion, Embeddings, StreamEvent, Timings, Usage
from lltm_ray.routing.adapters import Lora, by_ids
from lltm_ray.routing.ledger.entry import Outcome
from lltm_ray.routing.prompt import prompt_key
from lltm_ray.telemetry.context import (
    MOST_STATE_BYTES,
    TraceContext,
    new_span_id,
    new_trace_id,
    read_traceparent,
    write_traceparent,
)
from lltm_ray.telemetry.logs import at_work
from lltm_ray.telemetry.rows import NEVER, AttemptRow, RequestRow, SpanRow
from lltm_ray.telemetry.telling import cut_error, known_type, tell_error, tell_parameters

if TYPE_CHECKING:
    from lltm_ray.actors.engine import Engine
    from lltm_ray.actors.sender import Sender

Carrier = Mapping[str, str]
"""W3C's `traceparent` and `tracestate`, as a call's argument."""
_NO_PARENT = TraceContext("", "")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Seen:
    """What a call under way has given so far."""

    last: Completion | StreamEvent | Embeddings | None = None
    """What it gave at last."""
    timings: Timings = field(default_factory=Timings)
    usage: Usage = field(default_factory=Usage)
    events: int = 0
    """With generated text: at least as many tokens."""

    @property
    def output_tokens(self) -> int:
        """Exact once the answer is whole, before that at least so many."""
        return max(self.usage.output_tokens, self.events)

    def see(self, given: Completion | StreamEvent | Embeddings) -> None:
        """Note an answer, or an event of one."""
        self.last = given
        self.timings = getattr(given, "timings", None) or self.timings
        self.usage = given.usage or self.usage
        self.events += isinstance(given, StreamEvent) and bool(given.text or given.reasoning)


class EngineTrace:
    """Of one engine.

    Args:
        engine: whose calls.
        sender: where rows go; None: nowhere.
    """

    def __init__(self, engine: Engine, sender: Sender | None) -> None:
        self._engine = engine
        self._sender = sender
        self._blocks = BlockSampler()
        self.salt = b""
        """The fleet's, with which beginnings of prompts are hashed; until it is known they are not told."""

    @asynccontextmanager
    async def call(
        self,
        route: str,
        timeout_s: float,
        params: Mapping[str, Any],
        carrier: Carrier | None,
        *,
        is_stream: bool = False,
    ) -> AsyncIterator[tuple[AsyncLlamaClient, Seen]]:
        """A slot for a call, as `Engine.slot`, and a note to keep of what it gives; its rows go out when it is over.

        Args:
            route: llama-server's route of the same meaning.
            timeout_s: of the whole call.
            params: what the caller asked for, as fields of the route's body.
            carrier: the caller's trace.
            is_stream: whether it gets events.
        """
        began, began_unix_nano = time.monotonic(), time.time_ns()
        sent, failure = NEVER, _WHOLE
        seen, parent = Seen(), _parent(carrier)
        own = parent._replace(trace_id=parent.trace_id or new_trace_id(), span_id=new_span_id())
        attempt = own._replace(span_id=new_span_id())
        at_work.set(own)  # not reset: every call has its own context
        try:
            async with self._engine.slot(timeout_s) as client:
                sent = time.monotonic() - began
                yield client.sending(_headers(attempt if self._sender else parent)), seen
        except BaseException as caught:
            failure = _ending(caught)
            raise
        finally:
            told = _Told(route, params, is_stream, began_unix_nano, sent, time.monotonic() - began, failure)
            self._note(told, seen, parent, (own, attempt))

    def loaded(self, start_unix_nano: int, error: str = "") -> None:
        """The server has been started, or could not be."""
        if self._sender is None:
            return
        info = self._engine.info
        attributes = {
            "gen_ai.request.model": info.model,
            "lltm.engine": info.name,
            "lltm.server.pid": info.server_pid or 0,
        }
        row = SpanRow(
            trace_id=new_trace_id(),
            span_id=new_span_id(),
            parent_span_id="",
            name=f"load {info.model}",
            kind="internal",
            start_unix_nano=start_unix_nano,
            end_unix_nano=time.time_ns(),
            error_type="engine_start" if error else "",
            error=error,
            engine=info.name,
            attributes=json.dumps(attributes),
        )
        self._sender.outbox.add("spans", row)

    def _note(self, told: _Told, seen: Seen, parent: TraceContext, own: tuple[TraceContext, TraceContext]) -> None:
        """Tell of a call that is over."""
        if self._sender is None:
            return
        try:
            request, attempt = self._rows(told, seen, parent)
            call, sent = own
            attempt = attempt._replace(trace_id=call.trace_id, request_span_id=call.span_id, span_id=sent.span_id)
            self._sender.outbox.add("attempts", attempt)
            self._sender.outbox.add("requests", request._replace(trace_id=call.trace_id, span_id=call.span_id))
        except Exception as error:  # noqa: BLE001 - border: parameters of any shape; the call has had its answer
            _log.warning("a call could not be told (%s)", type(error).__name__)  # what it says may be of the prompt

    def _rows(self, told: _Told, seen: Seen, parent: TraceContext) -> tuple[RequestRow, AttemptRow]:
        key = _key(told.route, told.params, self._engine.info.adapters)
        prefix, blocks = b"", b""
        if self.salt:
            prefix, blocks = hash_prefixes(key, self.salt), self._blocks.of(key, self.salt)
        request = told.request(self._engine.info.model, seen, parent)
        return request._replace(prompt_bytes=len(key), prefix=prefix, blocks=blocks), told.attempt(self._engine, seen)


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a call ended."""

    status: int
    error_type: str
    error: str
    outcome: Outcome


_WHOLE = _Ending(200, "", "", Outcome.OK)


def _ending(caught: BaseException) -> _Ending:
    if isinstance(caught, GeneratorExit | asyncio.CancelledError):  # the caller left; a deadline is an error of ours
        return _Ending(0, "client_gone", "client gone", Outcome.CLIENT_GONE)
    error = cut_error(tell_error(caught))
    if isinstance(caught, LltmRayError):
        status, is_deadline = caught.http_status, isinstance(caught, DeadlineError)
        outcome = Outcome.DEADLINE if is_deadline else Outcome.of_status(status)
        return _Ending(status, _type(caught) if isinstance(caught, UpstreamError) else caught.code, error, outcome)
    return _Ending(500, type(caught).__name__, error, Outcome.FAILED)


def _type(caught: UpstreamError) -> str:
    """Of an error of llama-server's, as a gateway tells it: its own name for it, or else the status."""
    try:
        told = json.loads(caught.body)["error"]["type"]
    except (ValueError, KeyError, TypeError):
        told = ""
    return known_type(told) or str(caught.http_status)


@dataclass(frozen=True, slots=True)
class _Told:
    """What is known of a call when it is over."""

    route: str
    params: Mapping[str, Any]
    is_stream: bool
    began_unix_nano: int
    sent_s: float
    ended_s: float
    ending: _Ending

    def request(self, model: str, seen: Seen, parent: TraceContext) -> RequestRow:
        ttft_s = seen.timings.ttft_s
        return RequestRow(
            trace_id="",
            span_id="",
            parent_span_id=parent.span_id,
            flags=parent.flags,
            state=parent.state,
            request_id=f"handle-{new_span_id()}",
            route=self.route,
            model_asked=model,
            model=model,
            tenant="",
            conversation="",
            status=self.ending.status,
            error_type=self.ending.error_type,
            error=self.ending.error,
            arrived_unix_nano=self.began_unix_nano,
            ttft_s=NEVER if ttft_s is None else self.sent_s + ttft_s,
            total_s=self.ended_s,
            delivered_tokens=seen.output_tokens,
            bytes_sent=0,
            is_stream=self.is_stream,
            parameters=tell_parameters(self.params),
            response_id=getattr(seen.last, "id", ""),
            response_model=getattr(seen.last, "model", ""),
            finish_reasons=getattr(seen.last, "finish_reason", "") or "",
            policy="",
            why="called by handle",
            content="",
        )

    def attempt(self, engine: Engine, seen: Seen) -> AttemptRow:
        timings, slot = seen.timings, getattr(seen.last, "slot_id", None)
        return AttemptRow(
            trace_id="",
            request_span_id="",
            span_id="",
            number=1,
            engine=engine.info.name,
            server_pid=engine.info.server_pid or 0,
            slot=-1 if slot is None else slot,
            asked_s=0.0,
            sent_s=self.sent_s,
            headers_s=NEVER if timings.queue_s is None else self.sent_s + timings.queue_s,
            first_s=NEVER if timings.ttft_s is None else self.sent_s + timings.ttft_s,
            ended_s=self.ended_s,
            predicted_cached_tokens=-1,
            cached_tokens=seen.usage.cached_tokens,
            computed_tokens=seen.usage.input_tokens - seen.usage.cached_tokens,
            generated_tokens=seen.output_tokens,
            delivered_tokens=seen.output_tokens,
            prompt_ms=timings.prompt_ms,
            predicted_ms=timings.predicted_ms,
            draft_tokens=timings.draft_n,
            accepted_tokens=timings.draft_n_accepted,
            outcome=str(self.ending.outcome),
            is_estimate=self.ending is not _WHOLE,
            is_continued=False,
        )


def _parent(carrier: Carrier | None) -> TraceContext:
    given = carrier or {}
    state, parent = (str(given.get(name) or "") for name in ("tracestate", "traceparent"))
    is_sound = state.isascii() and state.isprintable() and len(state) <= MOST_STATE_BYTES
    return read_traceparent(parent, state if is_sound else "") or _NO_PARENT


def _headers(parent: TraceContext) -> Carrier:
    """What makes the server's own spans, once it has some, children of `parent`; nothing of none."""
    if not parent.span_id:
        return {}
    headers = {"traceparent": write_traceparent(parent.trace_id, parent.span_id, parent.flags)}
    return headers | ({"tracestate": parent.state} if parent.state else {})


def _key(route: str, params: Mapping[str, Any], adapters: Sequence[Adapter]) -> bytes:
    """The prompt as a gateway's router compares it. A `lora` that says what the engine does anyway is no choice."""
    own = [{"id": id_, "scale": each.own} for id_, each in enumerate(adapters)]
    chosen = _choice(params.get("lora"), adapters)
    if chosen is None or chosen != _choice(own, adapters):
        return prompt_key(route, params, chosen)
    return prompt_key(route, {name: value for name, value in params.items() if name != "lora"})


def _choice(raw: Any, adapters: Sequence[Adapter]) -> Lora | None:
    try:
        return by_ids(raw, adapters) if raw and adapters else None
    except ConfigError:  # the server refuses it too
        return None
