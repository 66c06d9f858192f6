"""The tap: what a client gets does not depend on how bytes arrive, and what it told is what was said."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lltm_ray.gateway.tap import StreamTap, ask_details, is_eligible, is_exact, kind_of
from lltm_ray.gateway.told import DivergedError, Mark, Told

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NATIVE = "/completion"
ROUTES = (CHAT, TEXT, NATIVE)
HEAD = {"created": 1, "id": "chatcmpl-x", "model": 'a "{model}"', "system_fingerprint": "b1"}
TIMINGS = {"cache_n": 2, "prompt_n": 5, "prompt_ms": 1.5, "prompt_per_token_ms": 0.3, "prompt_per_second": 1e-07}
DONE = b"data: [DONE]\n\n"

Said = tuple[str, int, int]
"""Text, token, position."""


def timings(count: int) -> dict[str, Any]:
    """llama.cpp's timings after so many tokens."""
    return TIMINGS | {"predicted_n": count, "predicted_ms": 2.5, "predicted_per_token_ms": 1.0}


def line(value: Any) -> bytes:
    """An event as llama-server writes it."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def native(text: str, token: int, count: int) -> dict[str, Any]:
    """A partial event of /completion."""
    told = {"index": 0, "content": text, "tokens": [token], "stop": False, "id_slot": -1}
    return told | {"tokens_predicted": count, "tokens_evaluated": 7}


def final(count: int) -> dict[str, Any]:
    """The last event of /completion."""
    told = {"index": 0, "content": "", "tokens": [], "id_slot": 3, "stop": True, "tokens_predicted": count}
    return told | {"tokens_evaluated": 7, "prompt": 'a "__verbose":{} b', "timings": timings(count)}


def text_event(text: str, reason: str | None, verbose: Any) -> dict[str, Any]:
    """An event of /v1/completions."""
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
    event = {"choices": [choice], **HEAD}
    return event if verbose is None else event | {"__verbose": verbose}


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
    """An event of a chat."""
    choice = {"finish_reason": reason, "index": 0, "delta": delta} | more
    return {"choices": [choice], **HEAD, "object": "chat.completion.chunk"}


def probs(text: str, token: int) -> dict[str, Any]:
    """A chat token's logprobs."""
    one = {"id": token, "token": text, "bytes": list(text.encode("utf-8", "replace")), "prob": 1.0}
    return {"content": [one | {"top_probs": [one]}]}


def stream(path: str, said: list[Said], *, details: bool) -> list[bytes]:
    """A whole stream; `details`: with what the tap asks for."""
    last = said[-1][2] + 1 if said else 1
    if path == NATIVE:
        return [*(line(native(*each)) for each in said), line(final(last))]
    if path == TEXT:
        partial = [line(text_event(each[0], None, native(*each) if details else None)) for each in said]
        end = text_event("", "stop", final(last) if details else None) | {"timings": timings(last)}
        return [*partial, line(end), DONE]
    events = [line(chunk({"role": "assistant", "content": None}))]
    for text, token, count in said:
        if text and details:
            events.append(line(chunk({"content": text}, logprobs=probs(text, token)) | {"timings": timings(count)}))
        elif text:
            events.append(line(chunk({"content": text})))
    return [*events, line(chunk({}, "stop") | {"timings": timings(last)}), DONE]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
    ['"', "\\", '\\"', "\n\n", ',"__verbose":{"', '"},"logprobs":{"content":[{"id":', '}],"created":', "data: [DONE]"]
)
steps = st.lists(st.tuples(texts, st.integers(0, 10**6), st.sampled_from([1, 1, 1, 2, 3])), max_size=20)


def positions(drawn: list[Said]) -> list[Said]:
    """Steps made positions, so that some are missing."""
    at = itertools.accumulate(step for _, _, step in drawn)
    return [(text, token, count) for (text, token, _), count in zip(drawn, at, strict=True)]


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(ROUTES), drawn=steps, cuts=st.lists(st.integers(0, 20_000), max_size=12))
def test_any_splitting_of_the_bytes_gives_the_same_output_and_state(
    path: str, drawn: list[Said], cuts: list[int]
) -> None:
    said = positions(drawn)
    whole = b"".join(stream(path, said, details=True))
    places = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    tap = StreamTap(path, {})
    sent = b"".join(tap.feed(whole[start:end]) for start, end in itertools.pairwise(places)) + tap.rest()
    assert sent == b"".join(stream(path, said, details=False))
    heard = [each for each in said if each[0]] if path == CHAT else said
    ids = list(itertools.takewhile(lambda pair: pair[0] == pair[1][2], enumerate(heard, 1)))
    assert tap.known_ids == [each[1] for _, each in ids]
    assert tap.text == "".join(text for text, _, _ in said)
    assert tap.delivered_tokens == (said[-1][2] + 1 if said else 1)
    assert tap.prompt_tokens == 7
    assert (tap.is_finished, tap.can_continue) == (True, (True, ""))
    assert tap.timings is not None
    assert tap.timings["predicted_n"] == tap.delivered_tokens


@settings(max_examples=150, deadline=None)
@given(said=st.lists(texts.filter(bool), max_size=12), merged=st.sets(st.integers(0, 14)))
def test_a_chat_without_details_is_passed_on_as_it_came_and_its_text_is_known(
    said: list[str], merged: set[int]
) -> None:
    events = stream(CHAT, [(text, 1, count) for count, text in enumerate(said, 1)], details=False)
    tap = StreamTap(CHAT, {}, details=False)
    held = b""
    for index, event in enumerate(events):
        held += event
        if index not in merged:  # the others come together with what follows
            assert tap.feed(held) == held
            held = b""
    assert tap.feed(held) == held
    assert (tap.text, tap.delivered_tokens, tap.position) == ("".join(said), len(said), len(said))
    assert (tap.is_finished, tap.can_continue) == (True, (True, ""))


def test_a_chat_event_with_more_than_text_is_not_taken_for_one_like_the_event_before() -> None:
    tap = StreamTap(CHAT, {}, details=False)
    deltas = ({"content": "a"}, {"content": "b"}, {"content": "c", "reasoning_content": "d"}, {"content": "e"})
    for delta in deltas:
        tap.feed(line(chunk(delta)))
    assert tap.text == "abce"
    assert not tap.can_continue[0]


@pytest.mark.parametrize("path", ROUTES)
def test_only_whole_events_are_passed_on(path: str) -> None:
    events = stream(path, [("a", 1, 1), ("b", 2, 2)], details=True)
    tap = StreamTap(path, {})
    whole = b"".join(events[:2])
    for end in range(1, len(whole)):
        sent = StreamTap(path, {}).feed(whole[:end])
        assert sent == b"" or sent.endswith(b"\n\n")
    assert tap.feed(whole[:-1]).count(b"\n\n") == 1
    assert tap.feed(b"\n").count(b"\n\n") == 1


def test_a_chats_end_waits_for_its_usage() -> None:
    usage = line(chunk({}) | {"choices": [], "usage": {"completion_tokens": 1}})
    end = line(chunk({}, "stop"))
    tap = StreamTap(CHAT, {"stream_options": {"include_usage": True}})
    assert tap.feed(end) == b""
    assert not tap.is_finished
    assert tap.feed(usage) == end + usage
    assert tap.is_finished
    assert tap.ending() == DONE
    assert tap.feed(DONE) == DONE
    assert tap.ending() == b""


def test_a_usage_that_never_comes_does_not_swallow_the_end() -> None:
    end = line(chunk({}, "stop"))
    tap = StreamTap(CHAT, {"stream_options": {"include_usage": True}})
    assert tap.feed(end) + tap.rest() == end
    assert tap.is_finished


def test_timings_that_the_client_asked_for_stay() -> None:
    event = line(chunk({"content": "a"}, logprobs=probs("a", 9)) | {"timings": timings(1)})
    plain = line(chunk({"content": "a"}) | {"timings": timings(1)})
    for parts in ((event,), (event, event)):
        tap = StreamTap(CHAT, {"timings_per_token": True})
        assert tap.feed(b"".join(parts)) == plain * len(parts)


def test_text_that_a_parser_reworded_has_no_id() -> None:
    tap = StreamTap(CHAT, {})
    tap.feed(line(chunk({"content": "a"}, logprobs=probs("a", 9)) | {"timings": timings(1)}))
    tap.feed(line(chunk({"content": "b"}, logprobs=probs("b<", 8)) | {"timings": timings(2)}))
    assert (tap.known_ids, tap.text, tap.position) == ([9], "ab", 2)


@pytest.mark.parametrize("delta", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}])
def test_reasoning_and_tool_calls_cannot_be_continued(delta: dict[str, Any]) -> None:
    tap = StreamTap(CHAT, {})
    assert tap.feed(line(chunk(delta))) == line(chunk(delta))
    assert not tap.is_plain
    assert "tool calls" in tap.can_continue[1]


def test_an_error_of_the_engines_own_is_passed_on_and_final() -> None:
    for event in (line({"error": {"message": "no"}}), b'error: {"code":500}\n\n', b"data: nonsense\n\n"):
        tap = StreamTap(NATIVE, {})
        assert tap.feed(event) == event
        assert not tap.can_continue[0]


def test_comments_pass() -> None:
    tap = StreamTap(TEXT, {})
    event = line(text_event("a", None, native("a", 5, 1)))
    assert tap.feed(b": ping\n\n" + event) == b": ping\n\n" + line(text_event("a", None, None))
    assert tap.known_ids == [5]


@pytest.mark.parametrize("path", ROUTES)
def test_beyond_the_limit_only_positions_are_counted(path: str) -> None:
    tap = StreamTap(path, {}, limit_bytes=9000)
    said = [("x", 7, count) for count in range(1, 3001)]
    for event in stream(path, said, details=True)[:-2]:
        tap.feed(event)
    assert tap.delivered_tokens >= 2999
    assert tap.text == ""
    assert "longer" in tap.can_continue[1]


def test_details_are_added_before_the_last_brace() -> None:
    for path in ROUTES:
        body = {"stream": True, "prompt": "}", "timings_per_token": False}
        data = json.dumps(body).encode() + b" \n"
        assert (
            json.loads(ask_details(path, body, data, 3)) | body == json.loads(ask_details(path, body, data, 3)) | body
        )
        assert json.loads(ask_details(path, body, data, 3))["id_slot"] == 3
        assert "id_slot" not in json.loads(ask_details(path, body, data))
    assert json.loads(ask_details(CHAT, body, data))["timings_per_token"] is True
    assert "n_probs" not in json.loads(ask_details(CHAT, body | {"top_k": 0}, data))


@pytest.mark.parametrize("text", [None, "", 'say "a" \u00e9'])
def test_a_bare_chats_first_event_names_the_role_and_may_hold_text(text: str | None) -> None:
    tap = StreamTap(CHAT, {"stream": True}, details=False)
    first = line(chunk({"role": "assistant", "content": text}))
    assert tap.feed(first) == first
    assert (tap.has_role, tap.text, tap.delivered_tokens) == (True, text or "", int(bool(text)))


GOOD = {"stream": True, "prompt": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "more",
    [
        *({"grammar": "root ::= x"}, {"json_schema": {"a": 1}}, {"response_format": {"type": "json_object"}}),
        *({"tools": [{}]}, {"logprobs": 2}, {"n_probs": 1}, {"n": 2}, {"stream": False}, {"max_tokens": "9"}),
        *({"prompt": ["a", "b"], "messages": [{"content": [{"type": "image_url"}]}]}, {"response_fields": ["x"]}),
    ],
)
def test_constrained_streams_are_not_eligible(path: str, more: dict[str, Any]) -> None:
    assert is_eligible(path, GOOD) == (True, "")
    is_good, why = is_eligible(path, GOOD | more)
    assert not is_good
    assert why


def test_other_routes_and_bodies_are_not_eligible() -> None:
    assert kind_of("/infill") is None
    assert not is_eligible("/v1/messages", GOOD)[0]
    assert not is_eligible(CHAT, [])[0]


@pytest.mark.parametrize(
    ("body", "exact"),
    [
        ({"temperature": 0}, True),
        ({"top_k": 1}, True),
        ({"temperature": -1.0, "repeat_penalty": 1.5, "dry_multiplier": 1}, True),
        ({}, False),
        ({"temperature": 0.1}, False),
        ({"temperature": True}, False),
        ({"temperature": 0, "mirostat": 2}, False),
        ({"temperature": 0, "xtc_probability": 0.5}, False),
        ({"temperature": 0, "dynatemp_range": 0.5}, False),
        ({"temperature": 0, "adaptive_target": 0.5}, False),
        ({"temperature": 0, "samplers": ["top_p"]}, False),
        ({"top_k": 1, "samplers": ["top_k"]}, True),
    ],
)
def test_only_greedy_replies_are_exact(body: dict[str, Any], exact: bool) -> None:
    assert is_exact(body) is exact


def test_what_is_said_again_is_checked_and_not_new() -> None:
    told = Told(10**6)
    for index, text in enumerate(("ab", "c", "", "de"), 1):
        assert told.add(text, index, index) == text
    assert told.mark(2) == Mark(2, 3)
    told.rewind(told.mark(2))
    assert told.add("d", 30, 3) == ""
    assert told.add("ef", 40, 4) == "f"
    assert (told.text, told.ids.tolist(), told.position) == ("abcdef", [1, 2, 30, 40], 4)
    told.rewind(told.mark(2))
    assert told.mark(2) == told.mark() == Mark(3, 4)
    told.rewind(Mark(0, 0))
    with pytest.raises(DivergedError, match="character 0"):
        told.add("x", 1, 1)
