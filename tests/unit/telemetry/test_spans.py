"""A request's spans: their tree, their times, what they say; also when it fails, is cut off or moves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.context import derive_span_id
from lltm_ray.telemetry.figures import read_phases, seconds, tokens_of_all, wasted
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.spans import Spans
from tests.unit.telemetry import requests_made as made
from tests.unit.telemetry.rows_made import SPAN_ID, TRACE_ID, attempt_row, request_row

SPANS = Spans(PROFILES["1.41"])
LATENCIES = (names.LATENCY_QUEUE, names.LATENCY_PREFILL, names.LATENCY_DECODE)


def build(make, profile="1.41"):
    return Spans(PROFILES[profile]).of_request(*make(), made.PLACES)


def named(spans, *wanted):
    """Spans of some names, in their order; the CLIENT spans are `client`."""
    return [span for span in spans if (span.kind if span.kind != "internal" else span.name) in wanted]


def one(spans, wanted):
    (span,) = named(spans, wanted)
    return span


def lasted(span):
    return (span.end_unix_nano - span.start_unix_nano) / 1e9


def test_a_request_is_a_tree_of_six_spans_with_ids_that_anybody_can_derive():
    spans = build(made.chat)
    client = "00f067aa0ba902b7"
    assert [(span.name, span.kind, span.span_id, span.parent_span_id) for span in spans] == [
        ("chat tiny", "server", SPAN_ID, ""),
        ("route", "internal", derive_span_id(SPAN_ID, 1), SPAN_ID),
        ("chat tiny", "client", client, SPAN_ID),
        ("lltm.queue", "internal", derive_span_id(client, 1), client),
        ("lltm.prefill", "internal", derive_span_id(client, 2), client),
        ("lltm.decode", "internal", derive_span_id(client, 3), client),
    ]
    assert {span.trace_id for span in spans} == {TRACE_ID}
    assert len({span.span_id for span in spans}) == 6


def test_spans_begin_and_end_where_the_row_says():
    at = 1_700_000_000_000_000_000
    offsets = [(span.start_unix_nano - at, span.end_unix_nano - at) for span in build(made.chat)]
    ms = [(0, 250), (1, 11), (11, 249), (11, 21), (21, 50), (50, 249)]
    assert offsets == [(start * 1_000_000, end * 1_000_000) for start, end in ms]


@pytest.mark.parametrize("make", [made.chat, made.plain_chat, made.text, made.cancelled, made.failed, made.failed_over])
def test_phases_meet_and_sum_to_the_total_within_two_milliseconds(make):
    spans = build(make)
    phases = named(spans, "route", "lltm.queue", "lltm.prefill", "lltm.decode")
    outside_s = 0.001 + spans[0].end_unix_nano / 1e9 - phases[-1].end_unix_nano / 1e9
    assert sum(map(lasted, phases)) + outside_s == pytest.approx(lasted(spans[0]), abs=0.002)
    for client in named(spans, "client"):
        inside = [span for span in phases if span.parent_span_id == client.span_id]
        assert [span.start_unix_nano for span in inside[1:]] == [span.end_unix_nano for span in inside[:-1]]
        edges = (inside[0].start_unix_nano, inside[-1].end_unix_nano)
        assert edges == (client.start_unix_nano, client.end_unix_nano)


def test_latencies_are_those_of_the_phases():
    for make in (made.chat, made.failed_over):
        spans = build(make)
        queue, prefill, decode = (spans[0].attributes[name] for name in LATENCIES)
        assert queue == pytest.approx(sum(map(lasted, named(spans, "route", "lltm.queue"))), abs=1e-6)
        assert prefill == pytest.approx(sum(map(lasted, named(spans, "lltm.prefill"))), abs=1e-6)
        assert decode == pytest.approx(sum(map(lasted, named(spans, "lltm.decode"))), abs=1e-6)
        assert spans[0].attributes[names.LATENCY_INFERENCE] == pytest.approx(prefill + decode)
        assert spans[0].attributes[names.LATENCY_TTFT] == 0.05
        assert spans[0].attributes[names.LATENCY_E2E] == 0.25
        below_s = sum(map(lasted, (*named(spans, "route"), *named(spans, "client"))))
        assert spans[0].attributes[names.TIME_IN_GATEWAY] == pytest.approx(0.25 - below_s, abs=1e-6)


def test_phases_nobody_saw_are_counted_back_from_the_servers_own_times_and_say_so():
    spans = build(made.plain_chat)
    queue, prefill, decode = named(spans, "lltm.queue", "lltm.prefill", "lltm.decode")
    assert [lasted(span) for span in (queue, prefill, decode)] == pytest.approx([0.018, 0.03, 0.19], abs=1e-6)
    assert all(span.attributes[names.PHASES_ESTIMATED] is True for span in (queue, prefill, decode))
    assert names.RESPONSE_TIME_TO_FIRST_CHUNK not in spans[0].attributes
    assert not any(names.PHASES_ESTIMATED in span.attributes for span in build(made.chat))


def test_server_times_longer_than_the_attempt_leave_no_phase_before_it():
    late = attempt_row(first_s=math.nan, prompt_ms=900.0, predicted_ms=900.0)
    phases = read_phases(late, "chat", 0.25)
    assert [seconds(each) for each in (phases.queue, phases.prefill)] == [0.0, 0.0]
    assert phases.decode == phases.client


def test_headers_that_a_busy_gateway_read_with_the_first_text_leave_the_prompt_its_time():
    row = attempt_row(sent_s=0.01, headers_s=0.1, first_s=0.1, ended_s=0.2, prompt_ms=40.0)
    phases = read_phases(row, "chat", 0.25)
    assert [seconds(each) for each in (phases.queue, phases.prefill)] == pytest.approx([0.05, 0.04])
    early = row._replace(headers_s=0.03)
    assert seconds(read_phases(early, "chat", 0.25).prefill) == pytest.approx(0.07)
    cut_off = row._replace(first_s=math.nan, predicted_ms=math.nan)
    assert seconds(read_phases(cut_off, "chat", 0.25).queue) == pytest.approx(0.09)


@given(
    moments=st.lists(st.floats(0, 100), min_size=5, max_size=5).map(sorted),
    known=st.lists(st.booleans(), min_size=5, max_size=5),
    server_ms=st.tuples(*[st.one_of(st.just(math.nan), st.floats(0, 1e5))] * 2),
    route=st.sampled_from(["/v1/chat/completions", "/v1/embeddings"]),
)
def test_whatever_a_row_does_not_know_its_spans_lie_within_their_parents(moments, known, server_ms, route):
    asked, sent, headers, first, ended = (
        at if is_known else math.nan for at, is_known in zip(moments, known, strict=True)
    )
    row = request_row(total_s=moments[-1], route=route)
    attempt = attempt_row(asked_s=asked, sent_s=sent, headers_s=headers, first_s=first, ended_s=ended)
    attempt = attempt._replace(prompt_ms=server_ms[0], predicted_ms=server_ms[1])
    spans = SPANS.of_request(row, [attempt], {})
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans[1:]:
        parent = by_id[span.parent_span_id]
        assert parent.start_unix_nano <= span.start_unix_nano <= span.end_unix_nano <= parent.end_unix_nano


def test_embeddings_and_reranking_have_one_client_span_and_no_phases_as_their_headers_come_last():
    for make, operation in ((made.embeddings, "embeddings"), (made.rerank, "rerank")):
        spans = build(make)
        assert [span.name for span in spans] == [f"{operation} tiny", "route", f"{operation} tiny"]
        client = one(spans, "client").attributes
        assert client[names.USAGE_INPUT_TOKENS] == 12
        assert names.USAGE_OUTPUT_TOKENS not in client
        assert names.RESPONSE_FINISH_REASONS not in client


def test_the_first_span_tells_what_the_client_asked_and_got():
    told = build(made.chat)[0].attributes
    expected = {
        names.OPERATION_NAME: "chat", names.PROVIDER_NAME: "llama_cpp", names.REQUEST_MODEL: "tiny",
        names.REQUEST_STREAM: True, names.REQUEST_SEED: 0, names.REQUEST_TEMPERATURE: 0.0,
        names.CONVERSATION_ID: "conv-1", names.RESPONSE_FINISH_REASONS: ["length"],
        names.RESPONSE_TIME_TO_FIRST_CHUNK: 0.05, names.USAGE_INPUT_TOKENS: 40, names.USAGE_OUTPUT_TOKENS: 10,
        names.USAGE_CACHE_READ: 32, names.USAGE_CACHE_CREATION: 8, names.AGENT_NAME: "Tutor",
        names.HTTP_ROUTE: "/v1/chat/completions", names.HTTP_STATUS: 200, names.TENANT: "blue",
    }  # fmt: skip
    assert {name: told.get(name) for name in expected} == expected
    assert told[names.OUTPUT_MESSAGES] == (
        '[{"role": "assistant", "parts": [{"type": "text", "content": "Hoi"}], "finish_reason": "length"}]'
    )
    assert "kept out" not in str(told)


def test_an_attempt_tells_where_it_ran_and_its_phases_what_they_did():
    spans = build(made.chat)
    client, prefill, decode = (one(spans, name).attributes for name in ("client", "lltm.prefill", "lltm.decode"))
    where = (names.SERVER_ADDRESS, names.SERVER_PORT, names.GPU_UUIDS, names.NODE, names.ENGINE, names.SLOT_ID)
    assert [client[name] for name in where] == ["127.0.0.1", 8081, ["GPU-1"], "n1", "engine-0", 2]
    assert client[names.RESPONSE_TIME_TO_FIRST_CHUNK] == pytest.approx(0.039)
    assert prefill == {names.TOKENS_CACHED: 32, names.TOKENS_COMPUTED: 8}
    assert decode == {names.TOKENS_GENERATED: 10, names.TOKENS_DRAFTED: 8, names.TOKENS_ACCEPTED: 6}
    assert one(spans, "route").attributes[names.WHY] == "most is cached here"


def test_content_is_told_only_where_it_was_captured_and_only_once():
    with_content = [span for span in build(made.chat) if names.INPUT_MESSAGES in span.attributes]
    assert [span.kind for span in with_content] == ["server"]
    assert not any(names.INPUT_MESSAGES in span.attributes for span in build(made.text))


def test_a_client_that_left_is_an_error_with_true_counts():
    spans = build(made.cancelled)
    for span in named(spans, "server", "client"):
        assert (span.error_type, span.status_error) == ("client_gone", "the client left")
        assert span.attributes[names.ERROR_TYPE] == "client_gone"
        assert span.attributes[names.RESPONSE_FINISH_REASONS] == ["error"]
        assert span.attributes[names.USAGE_OUTPUT_TOKENS] == 9
    assert spans[0].attributes[names.TOKENS_DELIVERED] == 7
    assert not any(span.is_error for span in named(spans, "route", "lltm.queue", "lltm.prefill", "lltm.decode"))


def test_an_engine_that_cannot_be_reached_fails_with_an_exception_event_and_no_counts():
    spans = build(made.failed)
    server, client = named(spans, "server", "client")
    assert [span.name for span in spans] == ["chat tiny", "route", "chat tiny", "lltm.queue"]
    for span in (server, client):
        (event,) = span.events
        assert (event.name, event.at_unix_nano) == ("exception", span.end_unix_nano)
        assert event.attributes == {"exception.type": "engine_not_ready_error", "exception.message": "unreachable"}
        assert names.USAGE_INPUT_TOKENS not in span.attributes
    assert names.SLOT_ID not in client.attributes
    assert not set(server.attributes) & {names.LATENCY_TTFT, names.RESPONSE_TIME_TO_FIRST_CHUNK}


def test_a_rejected_request_is_one_span():
    (server,) = build(made.rejected)
    assert (server.error_type, server.attributes[names.HTTP_STATUS]) == ("overloaded_error", 429)
    assert server.attributes[names.ATTEMPTS] == 0


def test_a_request_that_gave_up_in_the_queue_has_a_route_but_no_client_span():
    row = request_row(error_type="timeout", status=504, ttft_s=math.nan)
    waiting = attempt_row(sent_s=math.nan, headers_s=math.nan, first_s=math.nan, ended_s=math.nan)
    spans = SPANS.of_request(row, [waiting], {})
    assert [span.name for span in spans] == ["chat tiny", "route"]
    assert lasted(spans[1]) == pytest.approx(0.249, abs=1e-6)


def test_a_failover_is_a_second_attempt_that_says_what_it_continued():
    spans = build(made.failed_over)
    first, second = named(spans, "client")
    assert [span.attributes[names.ATTEMPT_NUMBER] for span in (first, second)] == [1, 2]
    assert (first.error_type, first.status_error) == ("continued", "engine-0: continued")
    assert first.attributes[names.RESPONSE_FINISH_REASONS] == ["error"]
    assert names.RESPONSE_ID not in first.attributes
    assert names.ATTEMPT_CONTINUED not in first.attributes
    assert second.attributes[names.ATTEMPT_CONTINUED] is True
    assert second.attributes[names.GPU_UUIDS] == ["GPU-2", "GPU-3"]
    assert not second.is_error
    assert not spans[0].is_error
    routes = named(spans, "route")
    assert [span.span_id for span in routes] == [derive_span_id(SPAN_ID, 1), derive_span_id(SPAN_ID, 9)]
    assert [names.WHY in span.attributes for span in routes] == [True, False]
    assert len({span.span_id for span in spans}) == len(spans) == 11


def test_a_continued_answers_usage_counts_the_prompt_once_and_each_delivered_token_once():
    row, attempts = made.failed_over()
    assert tokens_of_all(attempts) == (32, 8, 10)
    assert wasted(attempts) == 1
    server = SPANS.of_request(row, attempts, {})[0].attributes
    assert (server[names.USAGE_INPUT_TOKENS], server[names.USAGE_OUTPUT_TOKENS]) == (40, 10)


def test_an_attempt_begun_anew_counts_alone():
    lost, again = attempt_row(outcome="retried", generated_tokens=3), attempt_row(number=2, cached_tokens=0)
    assert tokens_of_all([lost, again]) == (0, 8, 10)
    assert tokens_of_all([]) == (0, 0, 0)


def test_an_engine_that_is_not_known_has_no_address():
    client = one(SPANS.of_request(*made.text(), {}), "client")
    assert not {names.SERVER_ADDRESS, names.SERVER_PORT, names.NODE} & set(client.attributes)


@pytest.mark.parametrize("route", ["/health", "/v1/models", "/metrics", "/tokenize", "/slots/0"])
def test_a_route_that_asks_no_model_makes_no_span(route):
    assert SPANS.of_request(request_row(route=route), [], {}) == []


def test_flags_and_state_of_the_caller_are_kept():
    row = request_row(flags=3, state="vendor=1", parent_span_id="00f067aa0ba90200")
    spans = SPANS.of_request(row, [attempt_row()], {})
    assert {(span.flags, span.state) for span in spans} == {(3, "vendor=1")}
    assert spans[0].parent_span_id == "00f067aa0ba90200"


def test_each_profile_calls_an_attribute_by_its_own_name():
    old, new = (build(made.chat, profile)[0].attributes for profile in ("1.41", "genai-dev"))
    assert (old[names.USAGE_CACHE_CREATION], new[names.USAGE_CACHE_WRITE]) == (8, 8)
    assert names.USAGE_CACHE_WRITE not in old
    assert names.USAGE_CACHE_CREATION not in new


def test_a_span_of_somebody_elses_is_kept_as_told_in_the_profiles_words():
    tool, retrieval, *_ = made.USER_ROWS
    span = SPANS.of_row(tool)
    assert (span.name, span.kind, span.parent_span_id) == ("execute_tool weather", "internal", SPAN_ID)
    assert span.attributes[names.TOOL_CALL_ARGUMENTS] == '{"place":"Bern"}'
    assert not span.is_error
    assert SPANS.of_row(retrieval).attributes[names.REQUEST_TOP_K] == 3
    assert Spans(PROFILES["genai-dev"]).of_row(retrieval).attributes[names.RETRIEVAL_TOP_K] == 3
    load = SPANS.of_row(made.span_row("model load", error_type="OSError", engine="engine-0"))
    assert (load.error_type, load.status_error, load.attributes[names.ENGINE]) == ("OSError", "why", "engine-0")
    assert load.events[0].attributes == {"exception.type": "OSError", "exception.message": "why"}
