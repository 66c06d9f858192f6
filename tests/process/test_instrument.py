"""A program's own spans and metrics of its calls: both clients, a real server, a real gateway."""

import asyncio
import gc
import subprocess
import sys

import pytest
from gateway_harness import gateway, infos
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lltm_ray import _watch
from lltm_ray.errors import DeadlineError, EngineNotReadyError, UpstreamError
from lltm_ray.gateway.trace import Tracing
from lltm_ray.llamacpp.client import AsyncLlamaClient, LlamaClient
from lltm_ray.telemetry import instrument, trace, uninstrument
from lltm_ray.telemetry.content import Capture
from lltm_ray.telemetry.profiles import DURATION_BOUNDS
from lltm_ray.telemetry.rows import RequestRow
from tests.unit.telemetry.wire import points_of

HI = [{"role": "user", "content": "hi"}]
ASKED = {"max_tokens": 6, "temperature": 0.5, "seed": 1, "model": "tiny"}


class Told:
    """What a program's own providers got."""

    def __init__(self):
        self._exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self.reader])

    @property
    def spans(self):
        return self._exporter.get_finished_spans()

    def only(self):
        (span,) = self.spans
        return span


@pytest.fixture
def told():
    told = Told()
    instrument(told.tracer_provider, told.meter_provider)
    yield told
    uninstrument()
    told.tracer_provider.shutdown()
    told.meter_provider.shutdown()


async def test_a_chat_is_a_client_span_in_the_conventions_words(faces, server, told):
    done = await faces(**server.credentials)("chat", HI, **ASKED)
    span = told.only()
    port = int(server.url.rpartition(":")[2])
    ttft_s = span.attributes["gen_ai.response.time_to_first_chunk"]
    assert (span.name, span.kind, span.status.status_code) == ("chat tiny", SpanKind.CLIENT, StatusCode.UNSET)
    assert 0 < ttft_s < (span.end_time - span.start_time) / 1e9
    assert span.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.41.0"
    cached = {"gen_ai.usage.cache_read.input_tokens": done.usage.cached_tokens} if done.usage.cached_tokens else {}
    assert dict(span.attributes) == cached | {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llama_cpp",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 1,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": done.id,
        "gen_ai.response.model": done.model,
        "gen_ai.response.finish_reasons": (str(done.finish_reason),),
        "gen_ai.response.time_to_first_chunk": ttft_s,
        "gen_ai.usage.input_tokens": done.usage.input_tokens,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_creation.input_tokens": done.usage.input_tokens - done.usage.cached_tokens,
        "server.address": "127.0.0.1",
        "server.port": port,
    }


async def test_metrics_have_the_conventions_names_bounds_and_labels_and_point_at_the_span(faces, server, told):
    done = await faces(**server.credentials)("chat", HI, **ASKED)
    points = points_of(told.reader)
    assert set(points) == {
        "gen_ai.client.operation.duration",
        "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.client.token.usage",
    }
    (duration,) = points["gen_ai.client.operation.duration"]
    assert (duration["count"], duration["bounds"]) == (1, DURATION_BOUNDS)
    assert duration["attributes"] == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llama_cpp",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": done.model,
        "server.address": "127.0.0.1",
        "server.port": int(server.url.rpartition(":")[2]),
    }
    span = told.only()
    context = span.context
    assert duration["sum"] == pytest.approx((span.end_time - span.start_time) / 1e9, abs=1e-8)
    assert duration["exemplars"] == [(f"{context.trace_id:032x}", f"{context.span_id:016x}")]
    used = {each["attributes"]["gen_ai.token.type"]: each["sum"] for each in points["gen_ai.client.token.usage"]}
    assert used == {"input": done.usage.input_tokens, "output": 6}


async def test_embeddings_have_input_tokens_only(faces, embedding_server, told):
    answer = await faces(**embedding_server.credentials)("embed", ["one", "two"])
    attributes = told.only().attributes
    assert told.only().name == "embeddings"
    assert attributes["gen_ai.usage.input_tokens"] == answer.usage.input_tokens > 0
    assert "gen_ai.usage.output_tokens" not in attributes
    assert "gen_ai.request.stream" not in attributes


async def test_reranking_is_told_of_and_calls_that_ask_no_model_are_not(faces, rerank_server, told):
    face = faces(**rerank_server.credentials)
    await face("health")
    await face("tokenize", "hi")
    await face("slots")
    await face("rerank", "hi", ["a", "b"])
    assert told.only().name == "rerank"


def test_a_streams_span_begins_with_its_first_event_asked_for_and_ends_with_its_last(server, told):
    with LlamaClient(**server.credentials) as client:
        with trace("whole") as whole:
            events = client.chat_stream(HI, **ASKED)
            assert told.spans == ()
            count = sum(1 for _ in events)
        chat, outer = told.spans
        assert count > 1
        assert chat.parent.span_id == outer.context.span_id == whole.span.get_span_context().span_id
        assert outer.start_time <= chat.start_time <= chat.end_time <= outer.end_time


def test_a_stream_that_is_left_ends_its_span_with_what_came_of_it(server, told):
    with LlamaClient(**server.credentials) as client:
        events = client.chat_stream(HI, max_tokens=2000)
        for _ in range(3):
            next(events)
        assert told.spans == ()
        events.close()
    span = told.only()
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["lltm.attempt.outcome"] == "client gone"
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert span.attributes["lltm.tokens.estimated"]


def test_leaving_after_the_last_event_is_a_whole_answer(server, told):
    with LlamaClient(**server.credentials) as client:
        for event in client.chat_stream(HI, **ASKED):
            if event.finish_reason:
                break
        del event
        gc.collect()
    assert told.only().attributes["gen_ai.usage.output_tokens"] == 6
    assert "lltm.attempt.outcome" not in told.only().attributes


async def test_a_dropped_async_stream_ends_its_span_too(server, told):
    async with AsyncLlamaClient(**server.credentials) as client:
        events = client.chat_stream(HI, max_tokens=2000)
        await anext(events)
        del events
        gc.collect()
        async with asyncio.timeout(60):
            while not told.spans:
                await asyncio.sleep(0.01)
    assert told.only().attributes["lltm.attempt.outcome"] == "client gone"


async def test_a_cancelled_call_is_an_error_of_its_own_kind(server, told):
    async with AsyncLlamaClient(**server.credentials) as client:
        task = asyncio.create_task(client.chat(HI, max_tokens=20_000, ignore_eos=True))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    span = told.only()
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "cancelled")
    (duration,) = points_of(told.reader)["gen_ai.client.operation.duration"]
    assert duration["attributes"]["error.type"] == "cancelled"


async def test_errors_have_a_type_of_few_values_and_an_exception_event(faces, server, told):
    with pytest.raises(UpstreamError):
        await faces(url=server.url, api_key="wrong")("chat", HI)
    with pytest.raises(EngineNotReadyError):
        await faces(url="http://127.0.0.1:9")("chat", HI)
    with pytest.raises(DeadlineError):
        await faces(**server.credentials, timeout_s=0.3)("chat", HI, max_tokens=20_000, ignore_eos=True)
    assert [span.attributes["error.type"] for span in told.spans] == ["401", "unavailable_error", "timeout_error"]
    for span in told.spans:
        assert span.status.status_code is StatusCode.ERROR
        assert [event.name for event in span.events] == ["exception"]
    assert "secret" not in repr([dict(span.attributes) for span in told.spans])


async def test_the_gateways_request_is_a_child_of_the_clients_span(faces, pair, told):
    rows = []
    async with gateway(*infos(pair), tracing=Tracing(lambda kind, row: rows.append((kind, row)))) as gate:
        await faces(url=gate.url)("chat", HI, **ASKED)
    context = told.only().context
    (request,) = (RequestRow._make(row) for kind, row in rows if kind == "requests")
    assert request.parent_span_id == f"{context.span_id:016x}"
    assert request.trace_id == f"{context.trace_id:032x}"
    assert request.flags & 1


async def test_content_is_told_only_where_it_is_captured(faces, server, told):
    face = faces(**server.credentials)
    await face("chat", HI, **ASKED)
    instrument(told.tracer_provider, told.meter_provider, capture=Capture(lambda text: text.replace("hi", "***")))
    done = await face("chat", HI, **ASKED)
    plain, captured = told.spans
    assert not [name for name in plain.attributes if name.endswith("messages")]
    assert captured.attributes["gen_ai.input.messages"] == (
        '[{"role": "user", "parts": [{"type": "text", "content": "***"}]}]'
    )
    assert '"assistant"' in captured.attributes["gen_ai.output.messages"]
    assert done.text


def test_instrumenting_twice_tells_once_and_uninstrumenting_ends_it(server, told):
    instrument(told.tracer_provider, told.meter_provider)
    with LlamaClient(**server.credentials) as client:
        client.chat(HI, **ASKED)
        assert len(told.spans) == 1
        uninstrument()
        client.chat(HI, **ASKED)
    assert len(told.spans) == 1
    assert _watch.watch("", "/v1/chat/completions", {}) is _watch.IDLE


def test_telemetry_that_fails_costs_the_call_nothing(server, told, caplog):
    def break_(text):
        raise MemoryError(text)

    capture = Capture()
    capture.clean = break_
    instrument(told.tracer_provider, told.meter_provider, capture=capture)
    with LlamaClient(**server.credentials) as client:
        assert client.chat(HI, **ASKED).usage.output_tokens == 6
    assert "a call cannot be told of" in caplog.text


_PROGRAM = """
import sys
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from lltm_ray import LlamaClient
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk.metrics")]
from lltm_ray.telemetry import instrument, trace
instrument()
client = LlamaClient(sys.argv[1], api_key=sys.argv[2])
client.chat([{"role": "user", "content": "hi"}], max_tokens=1)
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
api.set_tracer_provider(provider)
with trace("mine"):
    client.chat([{"role": "user", "content": "hi"}], max_tokens=1)
assert api.get_tracer_provider() is provider
print([span.name for span in exporter.get_finished_spans()])
"""


def test_the_global_provider_is_used_as_it_is_at_the_call_and_never_set(server):
    given = [sys.executable, "-c", _PROGRAM, server.url, server.api_key]
    done = subprocess.run(given, check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("['chat', 'mine']", "")
