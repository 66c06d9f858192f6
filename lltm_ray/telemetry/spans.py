"""Spans: the tree of a request, built from its rows after it ended; nothing of it exists while the request runs.

    {operation} {model}            SERVER    [arrived, ended]
      route                        INTERNAL  asked for a slot, got one       } of each attempt
      {operation} {model}          CLIENT    sent to an engine, ended        }
        lltm.queue                 INTERNAL  sent, slot started
        lltm.prefill               INTERNAL  slot started, first text
        lltm.decode                INTERNAL  first text, ended

The conventions' attributes are on the SERVER span (the whole request, as its client sees it) and on each CLIENT span
(one engine). Phases carry `lltm.*` only: who sums `gen_ai.usage.*` over one kind of span counts nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any, NamedTuple

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.context import derive_span_id
from lltm_ray.telemetry.figures import (
    GENERATING,
    Interval,
    Phases,
    Tokens,
    error_type_of,
    read_phases,
    seconds,
    tokens_of,
    tokens_of_all,
)
from lltm_ray.telemetry.parameters import read_parameters
from lltm_ray.telemetry.profiles import Profile
from lltm_ray.telemetry.rows import AttemptRow, RequestRow, SpanRow

_MAX_CHARS = 256
"""Of the client's own word for a model."""
_CONTENT = {
    "input": names.INPUT_MESSAGES,
    "output": names.OUTPUT_MESSAGES,
    "system": names.SYSTEM_INSTRUCTIONS,
    "tools": names.TOOL_DEFINITIONS,
}


class Place(NamedTuple):
    """Where an engine runs."""

    address: str = ""
    """Host its llama-server listens on; empty: not known."""
    port: int = 0
    gpu_uuids: tuple[str, ...] = ()
    node: str = ""
    model: str = ""
    """Served name."""


class SpanEvent(NamedTuple):
    """Something that happened within a span."""

    name: str
    at_unix_nano: int
    attributes: dict[str, Any]


@dataclass(slots=True)
class Span:
    """A finished span, as every exporter and the store take it."""

    trace_id: str
    """32 lower-case hex digits; span ids have 16."""
    span_id: str
    parent_span_id: str
    """Empty: a root."""
    name: str
    kind: str
    """`internal`, `server`, `client`, `producer`, `consumer`."""
    start_unix_nano: int
    end_unix_nano: int
    attributes: dict[str, Any] = field(default_factory=dict)
    """Values are strings, numbers, booleans or lists of one of them."""
    error_type: str = ""
    """Empty: no error. Else the status is ERROR with `status_error` as its description."""
    status_error: str = ""
    events: list[SpanEvent] = field(default_factory=list)
    scope: str = "lltm_ray"
    flags: int = 1
    """W3C trace flags, as they came."""
    state: str = ""
    """`tracestate`, as it came."""

    @property
    def is_error(self) -> bool:
        """Whether its status is ERROR."""
        return bool(self.error_type)

    def fail(self, error_type: str, error: str) -> None:
        """Status ERROR, `error.type` and an exception event at its end; nothing of an empty type."""
        if not error_type:
            return
        self.error_type, self.status_error = error_type, error
        self.attributes[names.ERROR_TYPE] = error_type
        told = {names.EXCEPTION_TYPE: error_type} | ({names.EXCEPTION_MESSAGE: error} if error else {})
        self.events.append(SpanEvent("exception", self.end_unix_nano, told))


NOWHERE = Place()


class Spans:
    """Makes spans of rows.

    Args:
        profile: the version of the conventions to speak.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def of_request(
        self, request: RequestRow, attempts: Sequence[AttemptRow], places: Mapping[str, Place]
    ) -> list[Span]:
        """A request's tree, root first; empty for a route that asks no model.

        Args:
            request: its row.
            attempts: its tries, in their order.
            places: engine's name -> where it runs; an engine that is not known has no address.
        """
        operation = names.OPERATIONS.get(request.route)
        if operation is None:
            return []
        tree = _Tree(request, operation, self._profile)
        phases = [read_phases(attempt, operation, request.total_s) for attempt in attempts]
        spans = [tree.server(attempts, phases)]
        for i, (attempt, of_attempt) in enumerate(zip(attempts, phases, strict=True)):
            if of_attempt.route:
                spans.append(tree.route(i, attempt, of_attempt.route))
            if of_attempt.client:
                client = tree.client(attempt, of_attempt.client, places.get(attempt.engine, NOWHERE), attempts[-1])
                spans += (client, *tree.inside(attempt, of_attempt))
        return spans

    def of_row(self, row: SpanRow) -> Span:
        """A span that somebody else timed, in the profile's words."""
        renamed = self._profile.renamed
        given = json.loads(row.attributes) if row.attributes else {}
        attributes = {renamed.get(name, name): value for name, value in given.items()}
        if row.engine:
            attributes.setdefault(names.ENGINE, row.engine)
        ids = (row.trace_id, row.span_id, row.parent_span_id)
        span = Span(*ids, row.name, row.kind, row.start_unix_nano, row.end_unix_nano, attributes)
        span.fail(row.error_type, row.error)
        return span


class _Tree:
    """The spans of one request."""

    def __init__(self, request: RequestRow, operation: str, profile: Profile) -> None:
        self._request = request
        self._operation = operation
        self._profile = profile
        self._generates = operation in GENERATING
        self._name = f"{operation} {request.model}" if request.model else operation
        self._asked: dict[str, Any] = {
            names.OPERATION_NAME: operation,
            names.PROVIDER_NAME: names.PROVIDER,
            **read_parameters(request.parameters),
        }
        if request.is_stream:
            self._asked[names.REQUEST_STREAM] = True
        if request.conversation:
            self._asked[names.CONVERSATION_ID] = request.conversation

    def server(self, attempts: Sequence[AttemptRow], phases: Sequence[Phases]) -> Span:
        """The whole request."""
        row = self._request
        below_s = sum(seconds(each.route) + seconds(each.client) for each in phases)
        of_request = {
            names.HTTP_ROUTE: row.route,
            names.REQUEST_ID: row.request_id,
            names.ATTEMPTS: sum(bool(each.engine) for each in attempts),
            names.LATENCY_E2E: row.total_s,
            names.LATENCY_QUEUE: sum(seconds(each.route) + seconds(each.queue) for each in phases),
            names.TIME_IN_GATEWAY: max(0.0, row.total_s - below_s),
        }
        optional = (
            (names.REQUEST_MODEL, row.model_asked[:_MAX_CHARS] or row.model),
            (names.HTTP_STATUS, row.status),
            (names.TENANT, row.tenant),
            (names.TOKENS_DELIVERED, row.delivered_tokens),
        )
        attributes = self._asked | of_request | {name: value for name, value in optional if value}
        attributes |= self._response(row.ttft_s, row.error_type) | self._usage(tokens_of_all(attempts))
        if self._generates:
            attributes |= _latencies(row, phases)
        if row.content:
            attributes |= content_attributes(row.content)
        span = self._span(row.span_id, row.parent_span_id, self._name, (0.0, row.total_s), "server", attributes)
        span.fail(row.error_type, row.error)
        return span

    def route(self, i: int, attempt: AttemptRow, interval: Interval) -> Span:
        """Choosing an engine, and the wait for its slot. Why is told of the first: later ones take what is left."""
        row = self._request
        attributes = {names.ATTEMPT_NUMBER: attempt.number, names.POLICY: row.policy}
        if attempt.engine:
            attributes[names.ENGINE] = attempt.engine
        if attempt.predicted_cached_tokens >= 0:
            attributes[names.TOKENS_PREDICTED] = attempt.predicted_cached_tokens
        if row.why and i == 0:
            attributes[names.WHY] = row.why
        span_id = derive_span_id(row.span_id, 8 * i + 1)
        return self._span(span_id, row.span_id, "route", interval, "internal", attributes)

    def client(self, attempt: AttemptRow, interval: Interval, place: Place, last: AttemptRow) -> Span:
        """One try on one engine; its id went to llama-server as `traceparent`."""
        row, is_last = self._request, attempt is last
        error_type = error_type_of(row, attempt, is_last)
        attributes = self._asked | self._usage(tokens_of(attempt))
        attributes |= {
            names.ENGINE: attempt.engine,
            names.ATTEMPT_NUMBER: attempt.number,
            names.ATTEMPT_OUTCOME: attempt.outcome,
        }
        optional = (
            (names.REQUEST_MODEL, row.model),
            (names.SERVER_ADDRESS, place.address),
            (names.SERVER_PORT, place.port),
            (names.GPU_UUIDS, list(place.gpu_uuids)),
            (names.NODE, place.node),
            (names.SERVER_PID, attempt.server_pid),
            (names.ATTEMPT_CONTINUED, attempt.is_continued),
            (names.TOKENS_ESTIMATED, attempt.is_estimate),
        )
        attributes |= {name: value for name, value in optional if value}
        if attempt.slot >= 0:
            attributes[names.SLOT_ID] = attempt.slot
        if is_last:
            attributes |= self._response(attempt.first_s - interval[0], error_type)
        elif self._generates:
            attributes[names.RESPONSE_FINISH_REASONS] = ["error"]
        span = self._span(attempt.span_id, row.span_id, self._name, interval, "client", attributes)
        span.fail(error_type, row.error if is_last else f"{attempt.engine}: {attempt.outcome}")
        return span

    def inside(self, attempt: AttemptRow, phases: Phases) -> Iterator[Span]:
        """An attempt's time in llama-server."""
        used = tokens_of(attempt)
        drafted = {names.TOKENS_DRAFTED: attempt.draft_tokens, names.TOKENS_ACCEPTED: attempt.accepted_tokens}
        told: tuple[tuple[str, Interval | None, dict[str, Any]], ...] = (
            ("lltm.queue", phases.queue, {}),
            ("lltm.prefill", phases.prefill, {names.TOKENS_CACHED: used.cached, names.TOKENS_COMPUTED: used.computed}),
            (
                "lltm.decode",
                phases.decode,
                {names.TOKENS_GENERATED: used.generated} | (drafted if attempt.draft_tokens > 0 else {}),
            ),
        )
        for number, (name, interval, attributes) in enumerate(told, 1):
            if interval is None:
                continue
            if phases.is_estimate:
                attributes[names.PHASES_ESTIMATED] = True
            span_id = derive_span_id(attempt.span_id, number)
            yield self._span(span_id, attempt.span_id, name, interval, "internal", attributes)

    def _span(
        self, span_id: str, parent: str, name: str, interval: Interval, kind: str, attributes: dict[str, Any]
    ) -> Span:
        row = self._request
        start, end = (row.arrived_unix_nano + round(offset * 1e9) for offset in interval)
        span = Span(row.trace_id, span_id, parent, name, kind, start, max(start, end), attributes)
        span.flags, span.state = row.flags, row.state
        return span

    def _response(self, first_s: float, error_type: str) -> dict[str, Any]:
        """What came back. A reason that is missing because of an error is `error`, as the conventions have it."""
        row = self._request
        reasons = [reason for reason in row.finish_reasons.split(",") if reason] or ["error"] * bool(error_type)
        is_timed = row.is_stream and not isnan(first_s)
        optional = (
            (names.RESPONSE_ID, row.response_id),
            (names.RESPONSE_MODEL, row.response_model),
            (names.RESPONSE_FINISH_REASONS, reasons if self._generates else []),
            (names.RESPONSE_TIME_TO_FIRST_CHUNK, first_s if is_timed else None),
        )
        return {name: value for name, value in optional if value}

    def _usage(self, used: Tokens) -> dict[str, Any]:
        """Nothing where nothing was told."""
        if not used.input and not used.generated:
            return {}
        if not self._generates:
            return {names.USAGE_INPUT_TOKENS: used.input}
        usage = {names.USAGE_INPUT_TOKENS: used.input, names.USAGE_OUTPUT_TOKENS: used.generated}
        if used.cached:
            usage[names.USAGE_CACHE_READ] = used.cached
        if used.computed:
            usage[self._profile.cache_write] = used.computed
        return usage


def _latencies(row: RequestRow, phases: Sequence[Phases]) -> dict[str, float]:
    prefill, decode = sum(seconds(each.prefill) for each in phases), sum(seconds(each.decode) for each in phases)
    latencies = {
        names.LATENCY_PREFILL: prefill,
        names.LATENCY_DECODE: decode,
        names.LATENCY_INFERENCE: prefill + decode,
    }
    return latencies if isnan(row.ttft_s) else latencies | {names.LATENCY_TTFT: row.ttft_s}


def content_attributes(text: str) -> dict[str, str]:
    """Captured content, each part as JSON text: what OpenTelemetry's own GenAI helpers put on spans."""
    given = json.loads(text)
    return {
        name: part if isinstance(part := given[key], str) else json.dumps(part, ensure_ascii=False)
        for key, name in _CONTENT.items()
        if given.get(key)
    }
