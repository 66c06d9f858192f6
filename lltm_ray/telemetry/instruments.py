"""Instruments: metrics of every request, sampled or not, through an OpenTelemetry meter of our own.

The meter provider is never the process' global one. Bucket bounds are the conventions', given as advisory boundaries:
without them the SDK would put every latency in seconds into one bucket. A measurement is taken within the context of
its request's span, so the SDK's trace-based filter attaches exemplars: of traces that are kept.

A recording costs the SDK about 10 us, mostly for its labels. Sums need no exemplars, so they are kept here and given to
the SDK when it reads them (observable counters), which leaves it nine histograms of a request's sixteen figures.

Labels are bounded: operation, served model, engine, error class. Tenants are no label. Series of engines that are gone
are let go (`Instruments.forget`, `cumulation`); the fleet's own sums have no engine, so they never fall.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from math import isnan
from typing import Any, Final, NamedTuple

from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from lltm_ray import __version__
from lltm_ray.telemetry import profiles
from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.context import SAMPLED
from lltm_ray.telemetry.figures import GENERATING, Phases, error_type_of, read_phases, seconds, tokens_of, waited_s
from lltm_ray.telemetry.profiles import Metric, Profile
from lltm_ray.telemetry.rows import AttemptRow, RequestRow
from lltm_ray.telemetry.spans import Span

_log = logging.getLogger(__name__)

Callback = Callable[[CallbackOptions], Iterable[Observation]]
Labels = Mapping[str, str | bool]
_Record = Callable[[float, Labels, Context], None]
_Key = tuple[tuple[str, str | bool], ...]

_TOLD_APART = 256
"""Values of one label that are told apart; a fleet has fewer, a client's invention would have more."""
_REJECTING = frozenset((429, 503, 504))
_ALL: Final = View(instrument_name="*", aggregation_cardinality_limit=100_000)
"""The SDK goes on counting series of sums and gauges that nobody observes any more, some hundred bytes each, and what
comes after its limit (2000, unless told) shares one series: far more engines come and go than are there at once."""

METRICS: Final = (
    Metric("gen_ai.server.request.duration", "histogram", "s", "Duration of a request", profiles.DURATION_BOUNDS),
    Metric("gen_ai.server.time_to_first_token", "histogram", "s", "Arrival to first text", profiles.TTFT_BOUNDS),
    Metric("gen_ai.server.time_per_output_token", "histogram", "s", "Per token after the first", profiles.TPOT_BOUNDS),
    Metric("lltm.queue.duration", "histogram", "s", "Wait for a slot, ours and llama-server's", profiles.QUEUE_BOUNDS),
    Metric("lltm.requests.rejected", "counter", "{request}", "Requests that no engine was asked to serve"),
    Metric("lltm.errors", "counter", "{request}", "Requests that ended in an error"),
    Metric("lltm.failovers", "counter", "{attempt}", "Attempts after a request's first"),
    Metric("lltm.tokens", "counter", "{token}", "Tokens by type; input holds cached ones"),
    Metric("lltm.fleet.tokens", "counter", "{token}", "The same of all engines, also of those that are gone"),
    Metric("lltm.tokens.wasted", "counter", "{token}", "Tokens generated and not delivered"),
    Metric("lltm.reuse.predicted_tokens", "counter", "{token}", "Prompt tokens that routing expected in the cache"),
    Metric("lltm.reuse.actual_tokens", "counter", "{token}", "Prompt tokens that were in the cache"),
    Metric("lltm.reuse.error", "histogram", "{token}", "Tokens that prediction missed by", profiles.TOKEN_BOUNDS),
    Metric("lltm.speculative.drafted", "counter", "{token}", "Draft tokens"),
    Metric("lltm.speculative.accepted", "counter", "{token}", "Draft tokens that were accepted"),
)
"""Metrics of requests that are the same in every profile."""


class _Subject(NamedTuple):
    """What the measurements of one request have in common."""

    request: RequestRow
    operation: str
    model: str
    context: Context


class Instruments:
    """Records metrics of finished requests and asks for those that are sampled.

    Args:
        resource: who records.
        profile: the version of the conventions to speak.
        readers: where metrics go, each on its own: Prometheus, OTLP, memory.
    """

    def __init__(self, resource: Resource, profile: Profile, readers: Sequence[MetricReader] = ()) -> None:
        self._provider = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False, views=[_ALL])
        self._meter = self._provider.get_meter("lltm_ray", __version__, profile.schema_url or None)
        self._profile = profile
        self._models: set[str] = set()
        self._errors: set[str] = set()
        client = [metric for each in profile.client.values() for quantity in each.values() for metric in quantity]
        unique = {metric.name: metric for metric in (*METRICS, *client)}.values()
        self._sums: dict[str, dict[_Key, float]] = {}
        self._histograms: dict[str, _Record] = {}
        for metric in unique:
            self._make(metric)

    def record(self, request: RequestRow, attempts: Sequence[AttemptRow], kept: Sequence[Span] | None = None) -> None:
        """Measure a finished request; nothing for a route that asks no model.

        Args:
            request: its row.
            attempts: its tries, in their order.
            kept: the spans of it that are kept, for exemplars to point at; empty: none is, so none does. None: not
                known yet, the caller's trace flags decide.
        """
        operation = names.OPERATIONS.get(request.route)
        if operation is None:
            return
        context = Context() if kept is not None and not kept else _context(request, bool(kept))
        model = _bounded(self._models, request.model or names.OTHER)
        subject = _Subject(request, operation, model, context)
        phases = [read_phases(attempt, operation, request.total_s) for attempt in attempts]
        self._record_request(subject, attempts, phases)
        for attempt, of_attempt in zip(attempts, phases, strict=True):
            if of_attempt.client:
                self._record_attempt(subject, attempt, of_attempt, attempt is attempts[-1])

    def observe(self, name: str, kind: str, unit: str, description: str, callback: Callback) -> None:
        """Ask for a metric whenever it is read.

        Args:
            name: of the metric.
            kind: `gauge`, `counter` or `up_down_counter`.
            unit: as UCUM has it.
            description: one sentence.
            callback: yields the latest observations; nothing where nothing is known.

        Raises:
            ValueError: no such kind.
        """
        makers: dict[str, Callable[..., Any]] = {
            "gauge": self._meter.create_observable_gauge,
            "counter": self._meter.create_observable_counter,
            "up_down_counter": self._meter.create_observable_up_down_counter,
        }
        if kind not in makers:
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(makers)}")
        makers[kind](name, callbacks=[callback], unit=unit, description=description)

    def forget(self, engines: Collection[str]) -> None:
        """Let go of sums of engines that are gone; histograms are their readers' (`cumulation`)."""
        for sums in self._sums.values():
            for key in [key for key in sums if dict(key).get(names.ENGINE) in engines]:
                del sums[key]

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush every reader and stop it; what a collector that is away does not take is lost, and told in the log."""
        try:
            self._provider.shutdown(timeout_millis=timeout_s * 1e3)
        except Exception as error:  # noqa: BLE001 - the SDK raises no other, for a reader that had no time
            _log.warning("the last metrics were not sent everywhere: %s", error)

    def _make(self, metric: Metric) -> None:
        if metric.kind == "counter":
            sums = self._sums[metric.name] = {}
            self.observe(*metric[:4], lambda _: [Observation(sum_, dict(key)) for key, sum_ in sums.copy().items()])
            return
        self._histograms[metric.name] = self._meter.create_histogram(
            metric.name, metric.unit, metric.description, explicit_bucket_boundaries_advisory=list(metric.bounds)
        ).record

    def _take(self, subject: _Subject, name: str, value: float, labels: Labels) -> None:
        if record := self._histograms.get(name):
            record(value, labels, subject.context)
            return
        sums, key = self._sums[name], tuple(labels.items())
        sums[key] = sums.get(key, 0) + value

    def _record_request(self, subject: _Subject, attempts: Sequence[AttemptRow], phases: Sequence[Phases]) -> None:
        request = subject.request
        error_type = _bounded(self._errors, request.error_type)
        labels = _labels(subject.operation, subject.model)
        self._take(subject, "gen_ai.server.request.duration", request.total_s, _with_error(labels, error_type))
        queued_s = waited_s(phases)
        if not isnan(queued_s):
            self._take(subject, "lltm.queue.duration", queued_s, labels)
        elif request.status in _REJECTING:
            self._take(subject, "lltm.requests.rejected", 1, {**labels, names.REJECT_REASON: error_type})
        for attempt in filter(lambda each: each.engine, attempts[1:]):
            continued = {**labels, names.ATTEMPT_CONTINUED: attempt.is_continued}
            self._take(subject, "lltm.failovers", 1, continued)
        if error_type:
            self._take(subject, "lltm.errors", 1, _with_error(labels, error_type))
        elif attempts and subject.operation in GENERATING:
            self._record_speed(subject, attempts[-1], phases[-1], labels)

    def _record_speed(self, subject: _Subject, last: AttemptRow, phases: Phases, labels: Labels) -> None:
        """Times to and per token, of answers without an error as the conventions have it."""
        if phases.decode is None:  # a whole answer that told no times: its first byte is its last
            return
        first_s = phases.decode[0] if isnan(last.first_s) else subject.request.ttft_s
        if not isnan(first_s):
            self._take(subject, "gen_ai.server.time_to_first_token", first_s, labels)
        if last.generated_tokens > 1:
            decode_s = last.predicted_ms / 1e3 if last.predicted_ms > 0 else seconds(phases.decode)
            per_token_s = decode_s / (last.generated_tokens - 1)
            self._take(subject, "gen_ai.server.time_per_output_token", per_token_s, labels)

    def _record_attempt(self, subject: _Subject, attempt: AttemptRow, phases: Phases, is_last: bool) -> None:
        labels = _labels(subject.operation, subject.model, attempt.engine)
        error_type = _bounded(self._errors, error_type_of(subject.request, attempt, is_last))
        used = tokens_of(attempt)
        self._quantity(subject, "duration", seconds(phases.client), _with_error(labels, error_type))
        if phases.decode and phases.client and subject.request.is_stream and not phases.is_estimate:
            self._quantity(subject, "first_chunk", phases.decode[0] - phases.client[0], labels)
        tokens = (("input", used.input), ("cached", used.cached), ("output", used.generated))
        for kind, count in tokens:
            if count:
                self._quantity(subject, f"{kind}_tokens", count, labels)
                self._take(subject, "lltm.tokens", count, _with_type(labels, kind))
                fleet = _labels(subject.operation, subject.model)
                self._take(subject, "lltm.fleet.tokens", count, _with_type(fleet, kind))
        if used.computed:
            self._quantity(subject, "written_tokens", used.computed, labels)
        self._record_reuse(subject, attempt, labels)

    def _record_reuse(self, subject: _Subject, attempt: AttemptRow, labels: Labels) -> None:
        """What was foreseen and what came, what was drafted and what of it was good, what was made for nobody."""
        used, predicted = tokens_of(attempt), attempt.predicted_cached_tokens
        if attempt.generated_tokens > attempt.delivered_tokens:
            self._take(subject, "lltm.tokens.wasted", attempt.generated_tokens - attempt.delivered_tokens, labels)
        if attempt.draft_tokens > 0:
            self._take(subject, "lltm.speculative.drafted", attempt.draft_tokens, labels)
            self._take(subject, "lltm.speculative.accepted", attempt.accepted_tokens, labels)
        if predicted < 0 or not used.input or attempt.is_estimate or subject.operation not in GENERATING:
            return
        missed = predicted - used.cached
        direction = "over" if missed > 0 else "under" if missed < 0 else "exact"
        self._take(subject, "lltm.reuse.predicted_tokens", predicted, labels)
        self._take(subject, "lltm.reuse.actual_tokens", used.cached, labels)
        self._take(subject, "lltm.reuse.error", abs(missed), {**labels, names.REUSE_DIRECTION: direction})

    def _quantity(self, subject: _Subject, quantity: str, value: float, labels: Labels) -> None:
        for metric in self._profile.client[subject.operation].get(quantity, ()):
            self._take(subject, metric.name, value, {**labels, **metric.attributes} if metric.attributes else labels)


def _bounded(seen: set[str], value: str) -> str:
    """The value, or `_other` for one too many."""
    if value not in seen:
        if len(seen) >= _TOLD_APART:
            return names.OTHER
        seen.add(value)
    return value


@lru_cache(maxsize=4096)
def _labels(operation: str, model: str, engine: str = "") -> dict[str, str | bool]:
    """Not to be changed: the same dict for the same arguments."""
    labels: dict[str, str | bool] = {
        names.OPERATION_NAME: operation,
        names.PROVIDER_NAME: names.PROVIDER,
        names.REQUEST_MODEL: model,
    }
    return {**labels, names.ENGINE: engine} if engine else labels


def _with_error(labels: Labels, error_type: str) -> Labels:
    return {**labels, names.ERROR_TYPE: error_type} if error_type else labels


def _with_type(labels: Labels, kind: str) -> Labels:
    return {**labels, names.TOKEN_TYPE: kind}


def _context(request: RequestRow, is_kept: bool) -> Context:
    """A context in which the request's span is the current one, so that an exemplar points at it."""
    ids = int(request.trace_id, 16), int(request.span_id, 16)
    flags = TraceFlags(request.flags | SAMPLED if is_kept else request.flags)
    return set_span_in_context(NonRecordingSpan(SpanContext(*ids, is_remote=True, trace_flags=flags)), Context())
