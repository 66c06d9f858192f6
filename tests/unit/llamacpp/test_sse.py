from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import EngineExitedError, UpstreamError
from lltm_ray.llamacpp import replies, wire
from lltm_ray.llamacpp.sse import SseMessage, SseParser, StreamReader, collect
from lltm_ray.records import FinishReason, StreamEvent, ToolCall, Usage

USER = {"role": "user", "content": "hi"}
TIMINGS = {"cache_n": 25, "prompt_n": 1, "prompt_ms": 2.5, "predicted_n": 3, "predicted_ms": 0.5, "new_field": 1}
USAGE = {"prompt_tokens": 26, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 25}}


def sse(*messages: Any, end: str = "\n\n") -> bytes:
    """Messages as llama-server writes them; a text goes out as it is."""
    lines = (item if isinstance(item, str) else f"data: {json.dumps(item, ensure_ascii=False)}" for item in messages)
    return "".join(line + end for line in lines).encode()


def delta(content: str | None = None, finish: str | None = None, **rest: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "delta": {"content": content, **rest.pop("delta", {})}, **rest}
    return {"id": "chatcmpl-1", "model": "tiny", "choices": [choice]}


CHAT = [
    delta(delta={"role": "assistant"}),
    delta(delta={"reasoning_content": "hm "}),
    delta("Grüße"),
    delta(" 🙂"),
    delta(finish="length"),
    {"id": "chatcmpl-1", "model": "tiny", "choices": [], "usage": USAGE, "timings": TIMINGS},
    "data: [DONE]",
]
NATIVE = [
    {"content": "a", "tokens": [5], "stop": False, "id_slot": -1},
    {"content": "b", "tokens": [6], "stop": False, "id_slot": -1},
    {
        "content": "",
        "tokens": [],
        "stop": True,
        "id_slot": 1,
        "stop_type": "limit",
        "tokens_evaluated": 26,
        "tokens_predicted": 3,
        "tokens_cached": 28,
        "timings": TIMINGS,
        "model": "tiny",
    },
]


def read(call: wire.StreamCall, *pieces: bytes) -> list[StreamEvent]:
    reader = StreamReader(call.decode, queue_s=0.25)
    events = [event for at, piece in enumerate(pieces, 1) for event in reader.feed(piece, elapsed_s=float(at))]
    reader.finish()
    return events


def read_chat(*messages: Any) -> list[StreamEvent]:
    return read(wire.chat([USER]), sse(*messages))


@given(st.lists(st.integers(0, 10_000)), st.sampled_from(["\n\n", "\r\n\r\n"]), st.sampled_from(["chat", "native"]))
def test_any_split_of_the_bytes_gives_the_same_events(cuts: list[int], end: str, kind: str) -> None:
    call = wire.chat([USER]) if kind == "chat" else wire.complete("hi")
    stream = sse(":", ": ping", *(CHAT if kind == "chat" else NATIVE), end=end)
    edges = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    reader, whole = StreamReader(call.decode, queue_s=0.0), StreamReader(call.decode, queue_s=0.0)
    pieces = [stream[start:stop] for start, stop in pairwise(edges)]
    events = [event for piece in pieces for event in reader.feed(piece, elapsed_s=1.0)]
    assert events == list(whole.feed(stream, elapsed_s=1.0))
    assert reader.done


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=5))
def test_messages_come_out_of_the_parser_as_they_went_in(texts: list[str]) -> None:
    stream = "".join(f"event: e\r\ndata: {text}\r\nid: 7\r\n\r\n" for text in texts).encode()
    assert SseParser().feed(stream) == [SseMessage("e", text) for text in texts]


def test_data_lines_of_one_message_are_joined() -> None:
    assert SseParser().feed(b"data: a\ndata:b\n\ndata: unfinished\n") == [SseMessage("", "a\nb")]


def test_finish_reason_usage_and_timings_arrive_together_in_the_last_event() -> None:
    *deltas, last = read(wire.chat([USER]), sse(*CHAT[:2]), sse(*CHAT[2:]))
    assert [(event.text, event.reasoning) for event in deltas] == [("", "hm "), ("Grüße", ""), (" 🙂", "")]
    assert (last.finish_reason, last.id, last.model) == (FinishReason.LENGTH, "chatcmpl-1", "tiny")
    assert last.usage == Usage(input_tokens=26, output_tokens=3, cached_tokens=25)
    assert last.timings is not None
    assert (last.timings.cache_n, last.timings.predicted_per_second) == (25, 6000.0)
    assert (last.timings.queue_s, last.timings.ttft_s, last.timings.total_s) == (0.25, 1.0, 2.0)


def test_timings_of_each_token_do_not_hold_text_back() -> None:
    first, _ = read_chat(delta("a") | {"timings": TIMINGS}, delta(finish="stop"), "data: [DONE]")
    assert first.text == "a"
    assert first.timings is not None


def test_usage_is_taken_from_timings_where_the_server_sends_none() -> None:
    (last,) = read_chat(delta(finish="stop") | {"timings": TIMINGS}, "data: [DONE]")
    assert last.usage == Usage(input_tokens=26, output_tokens=3, cached_tokens=25)


def test_a_native_stream_ends_with_stop_and_its_slot() -> None:
    completion = collect(read(wire.complete("hi"), sse(*NATIVE)))
    assert (completion.text, completion.tokens, completion.slot_id) == ("ab", (5, 6), 1)
    assert completion.usage == Usage(input_tokens=26, output_tokens=3, cached_tokens=25)


@pytest.mark.parametrize(("stop_type", "reason"), [("limit", "length"), ("eos", "stop"), ("word", "stop")])
def test_stop_types_become_finish_reasons(stop_type: str, reason: str) -> None:
    (last,) = read(wire.complete("hi"), sse(NATIVE[-1] | {"stop_type": stop_type}))
    assert last.finish_reason == reason


def test_progress_of_the_prompt_is_not_generated_text() -> None:
    progress = {"content": "", "tokens": [0], "stop": False, "prompt_progress": {"total": 10, "processed": 4}}
    completion = collect(read(wire.complete("hi"), sse(progress), sse(*NATIVE)))
    assert completion.tokens == (5, 6)
    assert completion.timings.ttft_s == 2.0


def test_null_messages_are_skipped() -> None:
    assert collect(read(wire.complete("hi"), sse("data: null", "data:", *NATIVE))).text == "ab"


@pytest.mark.parametrize("upto", range(len(CHAT)))
def test_a_stream_without_its_end_is_an_error_and_never_a_short_text(upto: int) -> None:
    with pytest.raises(EngineExitedError):
        read_chat(*CHAT[:upto])


def test_a_native_stream_without_stop_is_an_error() -> None:
    with pytest.raises(EngineExitedError):
        read(wire.complete("hi"), sse(*NATIVE[:-1]))


@pytest.mark.parametrize(
    "line",
    [
        'data: {"error": {"code": 507, "message": "no room", "type": "server_error"}}',
        'error: {"code": 507, "message": "no room", "type": "server_error"}',
        'event: error\ndata: {"type": "error", "error": {"code": 507, "message": "no room"}}',
    ],
)
def test_an_error_in_mid_stream_is_raised_with_its_status_and_body(line: str) -> None:
    with pytest.raises(UpstreamError, match="no room") as caught:
        read_chat(CHAT[0], line)
    assert caught.value.http_status == 507
    assert json.loads(caught.value.body)


@pytest.mark.parametrize("line", ["data: {", "data: [1]", 'data: {"choices": [5]}', 'data: {"choices": 5}'])
def test_a_message_that_cannot_be_read_is_an_upstream_error(line: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        read_chat(line, "data: [DONE]")
    assert caught.value.http_status == 502


def test_nothing_is_read_beyond_the_end() -> None:
    assert len(read_chat(delta("a"), "data: [DONE]", delta("b"))) == 2


def test_streamed_tool_calls_are_joined_by_index() -> None:
    def part(index: int, arguments: str, **rest: Any) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": rest.pop("name")} if "name" in rest else {})
        return delta(delta={"tool_calls": [{"index": index, "function": function, **rest}]})

    events = read_chat(
        part(0, "", name="add", id="c0"),
        part(1, "{", name="now", id="c1"),
        part(0, '{"a"'),
        part(0, ":1}"),
        part(1, "}"),
        delta(finish="tool_calls"),
        "data: [DONE]",
    )
    completion = collect(events)
    assert completion.tool_calls == (
        ToolCall(name="add", arguments='{"a":1}', id="c0", index=0),
        ToolCall(name="now", arguments="{}", id="c1", index=1),
    )
    assert completion.finish_reason == FinishReason.TOOL_CALLS
    assert completion.timings.ttft_s == 1.0


def test_logprobs_of_both_kinds_read_the_same() -> None:
    entry = {"id": 37, "token": '"', "bytes": [34], "logprob": -0.5}
    entry["top_logprobs"] = [dict(entry)]
    chat = collect(read_chat(delta('"', logprobs={"content": [entry]}), *CHAT[4:]))
    native = collect(read(wire.complete("hi"), sse(NATIVE[0] | {"completion_probabilities": [entry]}, NATIVE[-1])))
    assert chat.logprobs == native.logprobs
    assert (chat.logprobs[0].id, chat.logprobs[0].bytes, chat.logprobs[0].top[0].logprob) == (37, (34,), -0.5)


def test_probabilities_after_sampling_become_logarithms() -> None:
    zero = {"id": 2, "token": "b", "bytes": [], "prob": 0.0}
    (found,) = replies.read_logprobs([{"id": 1, "token": "a", "bytes": [97], "prob": 0.5, "top_probs": [zero]}])
    assert found.logprob == math.log(0.5)
    assert found.top[0].logprob == -math.inf


def named(*events: dict[str, Any]) -> bytes:
    """Events as the foreign APIs write them."""
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()


def test_a_response_brings_text_reasoning_and_function_calls() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
    usage = {"input_tokens": 26, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 25}}
    ended = {"id": "r", "model": "tiny", "status": "completed", "output": [{"type": "message"}, call], "usage": usage}
    stream = named(
        {"type": "response.created", "response": {"id": "r"}},
        {"type": "response.reasoning_text.delta", "delta": "hm"},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "response.output_text.delta", "delta": "b"},
        {"type": "response.output_text.done", "text": "ab"},
        {"type": "response.completed", "response": ended, "timings": TIMINGS},
    )
    found = collect(read(wire.responses("hi"), stream))
    assert (found.text, found.reasoning, found.id, found.model) == ("ab", "hm", "r", "tiny")
    assert found.tool_calls == (ToolCall(name="f", arguments="{}", id="c"),)
    assert found.finish_reason == FinishReason.TOOL_CALLS
    assert found.usage == Usage(input_tokens=26, output_tokens=2, cached_tokens=25)
    assert (found.timings.cache_n, found.timings.ttft_s) == (25, 1.0)


@pytest.mark.parametrize(("kind", "reason"), [("completed", "stop"), ("incomplete", "length")])
def test_a_response_says_how_it_ended(kind: str, reason: str) -> None:
    stream = named({"type": f"response.{kind}", "response": {"output": []}})
    assert collect(read(wire.responses("hi"), stream)).finish_reason == reason


def test_a_failed_response_is_an_upstream_error() -> None:
    with pytest.raises(UpstreamError, match="no room"):
        read(wire.responses("hi"), named({"type": "response.failed", "response": {"error": {"message": "no room"}}}))


@pytest.mark.parametrize(
    ("stop", "reason"), [("end_turn", "stop"), ("max_tokens", "length"), ("tool_use", "tool_calls")]
)
def test_an_anthropic_message_counts_cached_tokens_as_input(stop: str, reason: str) -> None:
    start = {"id": "m", "model": "tiny", "usage": {"cache_read_input_tokens": 25, "input_tokens": 1}}
    tool = {"type": "tool_use", "id": "t", "name": "f", "input": {}}

    def part(index: int, **delta: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": delta}

    stream = named(
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking"}},
        part(0, type="thinking_delta", thinking="hm"),
        part(0, type="signature_delta", signature="x"),
        part(1, type="text_delta", text="a"),
        {"type": "content_block_start", "index": 2, "content_block": tool},
        part(2, type="input_json_delta", partial_json='{"x"'),
        part(2, type="input_json_delta", partial_json=":1}"),
        {"type": "content_block_stop", "index": 2},
        {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    )
    found = collect(read(wire.messages([USER]), stream))
    assert (found.text, found.reasoning, found.finish_reason, found.id) == ("a", "hm", reason, "m")
    assert found.usage == Usage(input_tokens=26, output_tokens=2, cached_tokens=25)
    assert found.tool_calls == (ToolCall(name="f", arguments='{"x":1}', id="t", index=2),)
    with pytest.raises(EngineExitedError):
        read(wire.messages([USER]), stream[:-40])
