import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.gateway.join import BrokenStreamError, Joiner, UnjoinableError, as_stream

CHAT = "/v1/chat/completions"


def chunk(delta: dict, finish: str | None = None, **more) -> dict:
    choice = {"finish_reason": finish, "index": 0, "delta": delta}
    head = {"created": 1, "id": "c", "model": "m", "system_fingerprint": "b", "object": "chat.completion.chunk"}
    return {"choices": [choice]} | head | more


def call(index: int, **fields) -> dict:
    return {"tool_calls": [{"index": index} | fields]}


USAGE = {"completion_tokens": 3, "prompt_tokens": 2, "total_tokens": 5}
EVENTS = [
    chunk({"role": "assistant", "content": None}),
    chunk({"reasoning_content": "hm"}),
    chunk({"reasoning_content": "m é"}),
    chunk(call(0, id="a", type="function", function={"name": "f", "arguments": ""})),
    chunk(call(0, function={"arguments": '{"x":'})),
    chunk(call(0, function={"arguments": "1}"})),
    chunk(call(1, id="b", type="function", function={"name": "g", "arguments": "{}"})),
    chunk({}, "tool_calls"),
    chunk({}) | {"choices": [], "usage": USAGE, "timings": {"predicted_n": 3}},
]


def sse(events: list[dict]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event, ensure_ascii=False).encode() for event in events)


STREAM = b": a comment\n\n" + sse(EVENTS) + b"data: [DONE]\n\n"
WHOLE = {
    "choices": [
        {
            "finish_reason": "tool_calls",
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hmm é",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": '{"x":1}'}, "id": "a"},
                    {"type": "function", "function": {"name": "g", "arguments": "{}"}, "id": "b"},
                ],
            },
        }
    ],
    "created": 1,
    "model": "m",
    "system_fingerprint": "b",
    "object": "chat.completion",
    "usage": USAGE,
    "id": "c",
    "timings": {"predicted_n": 3},
}


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_split_anywhere_gives_the_same_answer(cuts):
    joiner = Joiner(CHAT)
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        joiner.feed(STREAM[start:end])
    status, body = joiner.finish()
    assert status == 200
    assert json.dumps(json.loads(body)) == json.dumps(WHOLE), "same keys, same order"


@pytest.mark.parametrize("length", [0, 1, len(STREAM) // 2, len(STREAM) - len(b"data: [DONE]\n\n")])
def test_a_stream_without_its_end_is_broken(length):
    joiner = Joiner(CHAT)
    joiner.feed(STREAM[:length])
    with pytest.raises(BrokenStreamError, match="before its last event"):
        joiner.finish()


@pytest.mark.parametrize("line", [b"data: {bad\n", b"data: 5\n", b"data: {}\n", b'data: {"choices":[5]}\n'])
def test_what_is_no_event_is_a_broken_stream(line):
    with pytest.raises(BrokenStreamError, match="not an event"):
        Joiner(CHAT).feed(line)


@pytest.mark.parametrize("line", [b'data: {"error":%s}\n\n', b'error: {"error":%s}\n\n', b"error: %s\n\n"])
@pytest.mark.parametrize(("code", "status"), [(503, 503), (400, 400), ("x", 500), (7, 500)])
def test_an_error_event_becomes_the_answer_with_its_code(line, code, status):
    error = {"code": code, "message": "no", "type": "server_error"}
    joiner = Joiner("/completion")
    joiner.feed(sse([{"content": "a", "stop": False, "tokens_predicted": 1}]) + line % json.dumps(error).encode())
    got, body = joiner.finish()
    assert (got, json.loads(body)) == (status, {"error": error})


def test_text_held_back_for_a_stop_string_is_not_joined_without_it():
    joiner = Joiner("/completion", has_stops=True)
    final = {"content": "", "stop": True, "stop_type": "limit", "tokens_predicted": 2}
    joiner.feed(sse([{"content": "a", "stop": False, "tokens_predicted": 1}, final]))
    with pytest.raises(UnjoinableError):
        joiner.finish()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/messages", {"messages": []}),
        (CHAT, {"stream": True}),
        (CHAT, {"stream": "x"}),
        (CHAT, {"n": 2}),
        (CHAT, {"n_cmpl": 2}),
        (CHAT, {"logprobs": True}),
        (CHAT, {"verbose": True}),
        (CHAT, {"stream_options": 5}),
        (CHAT, {"stream_options": {"x": float("inf")}}),
        (CHAT, {}),
        (CHAT, [1]),
        ("/completion", {"prompt": ["a", "b"]}),
        ("/completion", {"prompt": [[1], [2]]}),
        ("/completion", {"prompt": [1, "a"]}),
        ("/completion", {}),
        ("/completion", {"prompt": "a", "n_probs": 1}),
        ("/completion", {"prompt": "a", "return_tokens": True}),
        ("/completion", {"prompt": "a", "response_fields": ["content"]}),
    ],
)
def test_what_cannot_be_joined_for_certain_is_passed_on_unchanged(path, body):
    assert as_stream(path, body, json.dumps(body).encode()) is None


def test_the_streamed_body_differs_only_in_what_makes_it_a_stream():
    body = {
        "messages": ["é\ud800"],
        "seed": 2**70,
        "stream": False,
        "stream_options": {"x": 1},
        "return_progress": True,
    }
    streamed = json.loads(as_stream(CHAT, body, json.dumps(body).encode()))
    assert streamed == {
        "messages": ["é\ud800"],
        "seed": 2**70,
        "return_progress": False,
        "stream": True,
        "stream_options": {"x": 1, "include_usage": True},
        "timings_per_token": True,
    }
    native = {"prompt": [1, 2]}
    streamed = json.loads(as_stream("/completion", native, b' {"prompt": [1, 2] }\n'))
    assert streamed == native | {"stream": True, "return_progress": False}
