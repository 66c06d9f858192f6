"""Names: each is in the registry, each in the registry is emitted, and OpenTelemetry's own packages agree."""

import json
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.util.genai.environment_variables import OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT
from opentelemetry.util.genai.handler import TelemetryHandler
from opentelemetry.util.genai.types import FunctionToolDefinition, InputMessage, OutputMessage, Text

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.figures import GENERATING
from lltm_ray.telemetry.instruments import Instruments
from lltm_ray.telemetry.profiles import PROFILES, read_profile
from lltm_ray.telemetry.spans import Spans
from tests.unit.telemetry.requests_made import PLACES, REQUESTS, USER_ROWS, chat, embeddings
from tests.unit.telemetry.wire import points_of

TABLE = Path(names.__file__).parent / "attributes.md"
PUBLISHED = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
RENAMED = {names.USAGE_CACHE_WRITE, names.RETRIEVAL_TOP_K}


def of_spans(spans):
    return {name for span in spans for name in span.attributes}


def emitted_by_requests(profile):
    spans = Spans(PROFILES[profile])
    return set().union(*(of_spans(spans.of_request(*make(), PLACES)) for make in REQUESTS))


def emitted_by_metrics(profile):
    reader = InMemoryMetricReader()
    instruments = Instruments(Resource({}), PROFILES[profile], [reader])
    for make in REQUESTS:
        instruments.record(*make())
    points = points_of(reader)
    instruments.close()
    return {name for of_metric in points.values() for point in of_metric for name in point["attributes"]}


def emitted(profile):
    spans = Spans(PROFILES[profile])
    return emitted_by_requests(profile) | emitted_by_metrics(profile) | of_spans(map(spans.of_row, USER_ROWS))


@pytest.mark.parametrize("profile", PROFILES)
def test_requests_alone_emit_at_least_45_genai_attributes(profile):
    told = {name for name in emitted_by_requests(profile) if name.startswith("gen_ai.")}
    assert len(told) >= 45, sorted(told)


def test_the_registry_holds_what_is_emitted_and_nothing_else():
    assert emitted("1.41") | emitted("genai-dev") == {each.name for each in names.ATTRIBUTES}
    assert emitted("1.41") ^ emitted("genai-dev") == RENAMED | {names.USAGE_CACHE_CREATION, names.TOKEN_MODALITY}


@pytest.mark.parametrize("make", REQUESTS)
def test_the_registry_says_which_operation_has_an_attribute(make):
    row, attempts = make()
    operation = names.OPERATIONS[row.route]
    mine = {"request", "attempt", operation} | ({"inference"} if operation in GENERATING else set())
    declared = {each.name for each in names.ATTRIBUTES if mine & set(each.operations.split())}
    spans = Spans(PROFILES["1.41"]).of_request(row, attempts, PLACES)
    assert of_spans(span for span in spans if span.kind != "internal") <= declared


def test_the_registry_names_each_attribute_once_and_its_table_is_the_documented_one():
    listed = [each.name for each in names.ATTRIBUTES]
    assert len(listed) == len(set(listed))
    assert names.to_markdown() == TABLE.read_text(encoding="utf-8"), "write to_markdown() into attributes.md"


def test_names_of_the_published_conventions_are_in_their_package():
    for name, _, _, source in names.ATTRIBUTES:
        if name.startswith("gen_ai.") and source == "1.41":
            assert name in PUBLISHED, name
        if source in {"vLLM", "lltm"}:
            assert name not in PUBLISHED, name


def test_metrics_of_the_published_conventions_are_in_their_package():
    published = {value for name, value in vars(gen_ai_metrics).items() if name.startswith("GEN_AI_")}
    client = {each.name for told in PROFILES["1.41"].client.values() for many in told.values() for each in many}
    assert client < published
    assert {f"gen_ai.server.{each}" for each in ("request.duration", "time_to_first_token")} < published


def test_the_profile_is_1_41_unless_the_environment_or_the_configuration_says_otherwise():
    opted = {"OTEL_SEMCONV_STABILITY_OPT_IN": "http, gen_ai_latest_experimental"}
    assert read_profile({}).name == "1.41"
    assert read_profile(opted).name == "genai-dev"
    assert read_profile(opted, "1.41").name == "1.41"
    assert read_profile({}, "genai-dev").name == "genai-dev"
    with pytest.raises(ConfigError, match=r"semconv='1\.30': must be one of 1\.41, genai-dev"):
        read_profile({}, "1.30")


@pytest.fixture
def helper(monkeypatch):
    """OpenTelemetry's own GenAI helper, and where its spans end."""
    monkeypatch.setenv(OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT, "span_only")
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield TelemetryHandler(tracer_provider=provider), exporter
    provider.shutdown()


def theirs_of_chat(handler):
    call = handler.inference(
        "llama_cpp", request_model="tiny", server_address="127.0.0.1", server_port=8081, conversation_id="conv-1"
    )
    told = {
        "request_stream": True, "temperature": 0.0, "top_p": 0.9, "top_k": 40, "frequency_penalty": 0.1,
        "presence_penalty": 0.2, "max_tokens": 10, "request_choice_count": 2, "seed": 0, "stop_sequences": ["END"],
        "reasoning_level": "low", "output_type": "json", "previous_response_id": "resp_1", "prompt_name": "greet",
        "prompt_version": "2", "conversation_compacted": True, "response_id": "chatcmpl-1",
        "response_model_name": "tiny", "finish_reasons": ["length"], "input_tokens": 40, "output_tokens": 10,
        "cache_read_input_tokens": 32, "cache_write_input_tokens": 8,
        "input_messages": [InputMessage("user", [Text("Grüezi")])],
        "output_messages": [OutputMessage("assistant", [Text("Hoi")], "length")],
        "system_instruction": [Text("Be brief.")],
        "tool_definitions": [FunctionToolDefinition("weather", None, None)],
    }  # fmt: skip
    for name, value in told.items():
        setattr(call, name, value)
    call.stop()


def without_nulls(given):
    return {key: value for key, value in given.items() if value is not None}


def plain(attributes):
    """Sequences as lists, JSON text as what it says."""
    told = {}
    for name, value in attributes.items():
        is_json = isinstance(value, str) and value.startswith("[{")
        told[name] = json.loads(value, object_hook=without_nulls) if is_json else value
    return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def test_a_chat_has_every_attribute_of_opentelemetrys_own_helper_with_the_same_value(helper):
    handler, exporter = helper
    theirs_of_chat(handler)
    (theirs,) = exporter.get_finished_spans()
    server, _, client, *_ = Spans(PROFILES["genai-dev"]).of_request(*chat(), PLACES)
    ours = plain({**server.attributes, **client.attributes})
    assert len(theirs.attributes) >= 30
    assert {name: ours.get(name) for name in theirs.attributes} == plain(theirs.attributes)
    assert (theirs.name, theirs.kind.name.lower()) == (client.name, client.kind)


def test_embeddings_have_every_attribute_of_opentelemetrys_own_helper_with_the_same_value(helper):
    handler, exporter = helper
    call = handler.embedding("llama_cpp", request_model="tiny", server_address="127.0.0.1", server_port=8081)
    call.dimension_count, call.encoding_formats = 256, ["base64"]
    call.response_model_name, call.input_tokens = "tiny", 12
    call.stop()
    (theirs,) = exporter.get_finished_spans()
    client = Spans(PROFILES["1.41"]).of_request(*embeddings(), PLACES)[2]
    assert len(theirs.attributes) >= 8
    assert {name: client.attributes.get(name) for name in theirs.attributes} == plain(theirs.attributes)
    assert (theirs.name, theirs.kind.name.lower()) == (client.name, client.kind)
