"""Spans of a program's own work: every kind of function, the conventions' names, errors."""

import asyncio
import json

import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry import instrument, trace, uninstrument
from lltm_ray.telemetry.content import Capture


@pytest.fixture
def provider():
    with_exporter = TracerProvider()
    with_exporter.exporter = InMemorySpanExporter()
    with_exporter.add_span_processor(SimpleSpanProcessor(with_exporter.exporter))
    instrument(with_exporter)
    yield with_exporter
    uninstrument()
    with_exporter.shutdown()


@pytest.fixture
def spans(provider):
    return provider.exporter.get_finished_spans


def current():
    return api.get_current_span().get_span_context().span_id


def test_a_block_is_a_span_and_current_within(spans):
    with trace("load", **{"app.rows": 3}) as outer, trace("parse") as inner:
        inner.set_attribute("app.kind", "csv")
        outer.record_tokens(input=5, output=2, cached=1)
    parse, load = spans()
    assert (load.name, load.kind, parse.parent.span_id) == ("load", SpanKind.INTERNAL, load.context.span_id)
    assert dict(load.attributes) == {
        "app.rows": 3,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 1,
    }
    assert current() == 0


def test_a_function_keeps_its_name_its_answer_and_its_arguments(spans):
    @trace
    def add(a, *, b=1):
        """Adds."""
        return a + b

    assert (add(1, b=2), add(1), add.__name__, add.__doc__) == (3, 2, "add", "Adds.")
    assert [span.name.rpartition(".")[2] for span in spans()] == ["add", "add"]


async def test_a_coroutines_span_lasts_until_it_is_awaited(spans):
    @trace("slow")
    async def slow():
        await asyncio.sleep(0.05)
        return current()

    inside, other = await asyncio.gather(slow(), slow())
    assert {inside, other} == {span.context.span_id for span in spans()}
    assert all(span.end_time - span.start_time >= 45e6 for span in spans())


def test_a_generators_span_is_current_inside_it_only_and_ends_with_it(spans):
    @trace("items")
    def items():
        got = yield current()
        try:
            yield got
        except KeyError:
            yield current()
        return "end"

    def delegate():
        return (yield from items())

    each = delegate()
    inside = next(each)
    assert current() == 0
    assert (each.send("sent"), each.throw(KeyError("k"))) == ("sent", inside)
    assert spans() == ()
    with pytest.raises(StopIteration) as end:
        next(each)
    (span,) = spans()
    assert (end.value.value, span.context.span_id, span.status.status_code) == ("end", inside, StatusCode.UNSET)


async def test_an_async_generators_span_is_current_inside_it_only_and_ends_with_it(spans):
    @trace("items")
    async def items():
        for _ in range(3):
            await asyncio.sleep(0)
            yield current()

    seen = [(each, current()) async for each in items()]
    (span,) = spans()
    assert seen == [(span.context.span_id, 0)] * 3


async def test_a_generator_that_is_left_ends_its_span_without_an_error_and_cleans_up(spans):
    left = []

    @trace("sync")
    def one():
        try:
            yield 1
        finally:
            left.append("sync")

    @trace("async")
    async def two():
        try:
            yield 1
        finally:
            left.append("async")

    for _ in one():
        break
    events = two()
    await anext(events)
    await events.aclose()
    assert left == ["sync", "async"]
    assert [(span.name, span.status.status_code) for span in spans()] == [
        ("sync", StatusCode.UNSET),
        ("async", StatusCode.UNSET),
    ]


async def test_errors_pass_through_and_are_told_of(spans):
    @trace("sync")
    def one():
        raise LookupError("nothing")

    @trace("coroutine")
    async def two():
        raise LookupError("nothing")

    @trace("generator")
    def three():
        yield 1
        raise LookupError("nothing")

    @trace("async generator")
    async def four():
        yield 1
        raise LookupError("nothing")

    with pytest.raises(LookupError):
        one()
    with pytest.raises(LookupError):
        await two()
    with pytest.raises(LookupError):
        list(three())
    with pytest.raises(LookupError):
        [each async for each in four()]
    with pytest.raises(LookupError), trace("block"):
        raise LookupError("nothing")
    assert [span.name for span in spans()] == ["sync", "coroutine", "generator", "async generator", "block"]
    for span in spans():
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "nothing")
        assert span.attributes["error.type"] == "LookupError"
        assert [event.name for event in span.events] == ["exception"]


def test_a_tool_is_named_and_described_by_its_function(spans):
    @trace(operation="execute_tool", tool_type="function")
    def weather(city):
        """Tell the weather.

        At length.
        """
        return city

    weather("Rome")
    (span,) = spans()
    assert (span.name, span.kind) == ("execute_tool weather", SpanKind.INTERNAL)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "weather",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.description": "Tell the weather.",
    }


async def test_other_operations_have_the_conventions_names_kinds_and_attributes(spans):
    async with trace("helper", operation="invoke_agent", agent_id="a-1", conversation_id="c-1"):
        with trace("nightly", operation="invoke_workflow"), trace("helper", operation="plan"):
            pass
        with trace("docs", operation="retrieval", retrieval_top_k=5, provider_name="faiss"):
            pass
    told = {span.name: span for span in spans()}
    assert list(told) == ["plan helper", "invoke_workflow nightly", "retrieval docs", "invoke_agent helper"]
    assert told["retrieval docs"].kind is SpanKind.CLIENT
    assert dict(told["retrieval docs"].attributes) == {
        "gen_ai.operation.name": "retrieval",
        "gen_ai.data_source.id": "docs",
        "gen_ai.provider.name": "faiss",
        "gen_ai.request.top_k": 5,  # as 1.41 has it
    }
    assert dict(told["invoke_agent helper"].attributes) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "helper",
        "gen_ai.provider.name": "llama_cpp",
        "gen_ai.agent.id": "a-1",
        "gen_ai.conversation.id": "c-1",
    }
    assert told["invoke_workflow nightly"].attributes["gen_ai.workflow.name"] == "nightly"
    assert told["plan helper"].attributes["gen_ai.agent.name"] == "helper"


def test_arguments_and_results_are_content(provider, spans):
    def call():
        with trace("add", operation="execute_tool", tool_call_arguments={"a": 1}) as span:
            span.set_attribute("tool_call_result", "secret 2")

    call()
    instrument(provider, capture=Capture(lambda text: text.replace("secret", "***")))
    call()
    plain, captured = spans()
    assert set(plain.attributes) == {"gen_ai.operation.name", "gen_ai.tool.name"}
    assert json.loads(captured.attributes["gen_ai.tool.call.arguments"]) == {"a": 1}
    assert captured.attributes["gen_ai.tool.call.result"] == "*** 2"


def test_an_evaluation_is_an_event(spans):
    with trace("judge") as span:
        span.record_evaluation("relevance", score=0.5, explanation="half of it")
        with pytest.raises(ConfigError, match="score"):
            span.record_evaluation("relevance")
    (event,) = spans()[0].events
    assert (event.name, dict(event.attributes)) == (
        "gen_ai.evaluation.result",
        {
            "gen_ai.evaluation.name": "relevance",
            "gen_ai.evaluation.score.value": 0.5,
            "gen_ai.evaluation.explanation": "half of it",
        },
    )


def test_what_the_conventions_do_not_know_or_require_is_refused_at_once():
    with pytest.raises(ConfigError, match="must be one of execute_tool"):
        trace("x", operation="chat")
    with pytest.raises(ConfigError, match="tool_desciption"):
        trace("x", operation="execute_tool", tool_desciption="typo")
    with pytest.raises(ConfigError, match=r"gen_ai\.tool\.name"), trace(operation="execute_tool"):
        pass
    with pytest.raises(ConfigError, match="name"), trace():
        pass


def test_without_a_provider_nothing_is_told_and_everything_works():
    @trace(operation="execute_tool")
    def add(a, b):
        return a + b

    with trace("block") as span:
        span.record_tokens(input=1)
        assert add(1, 2) == 3
        assert not span.span.is_recording()
