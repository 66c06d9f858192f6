"""`instrument()`: spans and metrics of a program's own calls, in its own OpenTelemetry providers.

    {operation} {model}     CLIENT    child of the caller's current span; ends with the stream

Of each call of `LlamaClient`, `AsyncLlamaClient` or `Cluster` that asks a model; its `traceparent` goes along, so that
what the gateway or the engine tells of the call is below it. Other calls (health, slots, ...) make no span.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lltm_ray import _watch
from lltm_ray._watch import IDLE, Asked, Watch
from lltm_ray.records import StreamEvent, Usage
from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.content import Capture
from lltm_ray.telemetry.figures import GENERATING
from lltm_ray.telemetry.outlet import Outlet, error_type_of_exception, fail, set_outlet
from lltm_ray.telemetry.parameters import FIELDS, read_parameters
from lltm_ray.telemetry.profiles import Profile
from lltm_ray.telemetry.spans import content_attributes

log = logging.getLogger(__name__)
P = ParamSpec("P")
W = TypeVar("W", bound="_CallWatch")

CANCELLED = "cancelled"
"""`error.type` of a call whose task was cancelled."""
_propagator = TraceContextTextMapPropagator()


def instrument(
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    *,
    capture: Capture | None = None,
) -> None:
    """Tell of every call from now on; again with other arguments: those count.

    Args:
        tracer_provider: takes the spans. None: the global one, as it is at each call; it is never replaced.
        meter_provider: takes the metrics, likewise.
        capture: makes spans' content of prompts and answers. None: as
            `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` says.

    Raises:
        ConfigError: a variable of the environment cannot be used.
    """
    outlet = Outlet(tracer_provider, meter_provider, capture)
    set_outlet(outlet)

    def observe(asked: Asked) -> Watch:
        operation = names.OPERATIONS.get(asked.path)
        try:
            return IDLE if operation is None else _CallWatch(outlet, asked, operation)
        except Exception:  # border: what is told of a call must not cost the call
            log.exception("a call cannot be told of")
            return IDLE

    _watch.set_observer(observe)


def uninstrument() -> None:
    """Tell of nothing any more; calls under way are told of to their end."""
    _watch.set_observer(None)
    set_outlet(None)


def _guarded(method: Callable[Concatenate[W, P], None]) -> Callable[Concatenate[W, P], None]:
    def guarded(self: W, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:  # border, as above
            log.exception("a call cannot be told of")

    return guarded


class _CallWatch(Watch):
    """One call as a CLIENT span; it is never the current one, for a generator's caller runs in the same context."""

    def __init__(self, outlet: Outlet, asked: Asked, operation: str) -> None:
        self._outlet = outlet
        self._asked = asked
        self._operation = operation
        self._body: Mapping[str, Any] = asked.body if isinstance(asked.body, Mapping) else {}
        self._model = str(self._body.get("model") or "")
        self._server = _server(asked.url)
        self._text: list[str] = []
        self._first_s: float | None = None
        self._pieces = 0
        self._last: Any = None
        self._began_ns, self._began = time.time_ns(), time.perf_counter()
        name = f"{operation} {self._model}" if self._model else operation
        self._span = outlet.tracer.start_span(
            name, kind=SpanKind.CLIENT, attributes=self._known(), start_time=self._began_ns
        )
        self._context = set_span_in_context(self._span)
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, self._context)
        self.headers = carrier

    def _known(self) -> dict[str, Any]:
        """Before it is sent, so that samplers see it."""
        told = {name: value for name, value in self._body.items() if name in FIELDS}
        known: dict[str, Any] = {
            names.OPERATION_NAME: self._operation,
            names.PROVIDER_NAME: names.PROVIDER,
            **read_parameters(json.dumps(told, default=str) if told else ""),
            **self._server,
        }
        if self._model:
            known[names.REQUEST_MODEL] = self._model
        return known | ({names.REQUEST_STREAM: True} if self._asked.is_stream else {})

    def event(self, event: StreamEvent) -> None:
        """See `Watch`."""
        if event.text or event.reasoning or event.tool_calls:
            self._pieces += 1
            if self._first_s is None:
                self._first_s = time.perf_counter() - self._began
            if self._outlet.capture is not None:
                self._text.append(event.text)
        if event.usage is not None or event.finish_reason:
            self._last = event

    @_guarded
    def answer(self, answer: Any) -> None:
        """See `Watch`."""
        self._last = answer
        if self._outlet.capture is not None:
            self._text.append(getattr(answer, "text", ""))

    @_guarded
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `Watch`. Who leaves a stream had enough of it, which is no error."""
        total_s = time.perf_counter() - self._began
        self._span.set_attributes(self._response() | self._usage() | self._content())
        if isinstance(error, asyncio.CancelledError):
            self._span.set_attribute(names.ERROR_TYPE, CANCELLED)
            self._span.set_status(Status(StatusCode.ERROR, CANCELLED))
        elif isinstance(error, GeneratorExit):
            if self._last is None:
                self._span.set_attribute(names.ATTEMPT_OUTCOME, "client gone")
        elif error is not None:
            fail(self._span, error)
        self._measure(total_s, error)
        # As long as the metric says, also when the machine's clock was set meanwhile.
        self._span.end(self._began_ns + round(total_s * 1e9))

    def _response(self) -> dict[str, Any]:
        last, reason = self._last, getattr(self._last, "finish_reason", None)
        told = (
            (names.RESPONSE_ID, getattr(last, "id", "")),
            (names.RESPONSE_MODEL, getattr(last, "model", "")),
            (names.RESPONSE_FINISH_REASONS, [str(reason)] if reason else []),
            (names.RESPONSE_TIME_TO_FIRST_CHUNK, self._first_s if self._asked.is_stream else None),
            (names.ENGINE, getattr(last, "engine", "")),
        )
        found: dict[str, Any] = {name: value for name, value in told if value}
        slot = getattr(last, "slot_id", None)
        return found if slot is None else found | {names.SLOT_ID: slot}

    def _usage(self) -> dict[str, Any]:
        """As the server counted; of a stream that broke off, what came of it."""
        usage = getattr(self._last, "usage", None)
        if usage is not None:
            return usage_attributes(usage, self._outlet.profile, generates=self._operation in GENERATING)
        return {names.USAGE_OUTPUT_TOKENS: self._pieces, names.TOKENS_ESTIMATED: True} if self._pieces else {}

    def _content(self) -> dict[str, str]:
        if self._outlet.capture is None:
            return {}
        reason = str(getattr(self._last, "finish_reason", None) or "")
        text = self._outlet.capture(self._body, "".join(self._text), reason)
        return content_attributes(text) if text else {}

    def _measure(self, total_s: float, error: BaseException | None) -> None:
        last = self._last
        labels: dict[str, str | int] = {
            names.OPERATION_NAME: self._operation,
            names.PROVIDER_NAME: names.PROVIDER,
            **self._server,
        }
        models = ((names.REQUEST_MODEL, self._model), (names.RESPONSE_MODEL, getattr(last, "model", "")))
        labels |= {name: model for name, model in models if model}
        ended = labels if error is None else labels | _error_label(error)
        self._take("duration", total_s, ended)
        if self._first_s is not None and self._asked.is_stream:
            self._take("first_chunk", self._first_s, labels)
        usage = getattr(last, "usage", None) or Usage(output_tokens=self._pieces)
        tokens = {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "written_tokens": usage.input_tokens - usage.cached_tokens,
        }
        for quantity, count in tokens.items():
            if count:
                self._take(quantity, count, labels)

    def _take(self, quantity: str, value: float, labels: Mapping[str, str | int]) -> None:
        self._outlet.measure(self._operation, quantity, value, labels, self._context)


def usage_attributes(usage: Usage, profile: Profile, *, generates: bool) -> dict[str, Any]:
    """Tokens as attributes; those that nobody told are left out."""
    if not usage.input_tokens and not usage.output_tokens:
        return {}
    told: dict[str, Any] = {names.USAGE_INPUT_TOKENS: usage.input_tokens}
    if not generates:
        return told
    told[names.USAGE_OUTPUT_TOKENS] = usage.output_tokens
    computed = usage.input_tokens - usage.cached_tokens
    optional = ((names.USAGE_CACHE_READ, usage.cached_tokens), (profile.cache_write, computed))
    return told | {name: count for name, count in optional if count > 0}


def _error_label(error: BaseException) -> dict[str, str | int]:
    if isinstance(error, GeneratorExit):
        return {}
    is_cancelled = isinstance(error, asyncio.CancelledError)
    return {names.ERROR_TYPE: CANCELLED if is_cancelled else error_type_of_exception(error)}


def _server(url: str) -> dict[str, str | int]:
    """`server.address` and `server.port`; nothing of a call through Ray."""
    if not url:
        return {}
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return {names.SERVER_ADDRESS: parts.hostname or "", names.SERVER_PORT: port}
