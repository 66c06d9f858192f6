"""The pure parts of `bench`: prompts, the answer reader, plans and sums."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError
from lltm_ray.load.answer import AnswerReader
from lltm_ray.load.prompts import WORDS, PromptMaker
from lltm_ray.load.result import LoadPlan, Sent, percentiles, summarize

PLAN = LoadPlan(url="http://h")


def event(**choice: Any) -> bytes:
    choice = {"index": 0, "finish_reason": None, "delta": {}} | choice
    return b"data: " + json.dumps({"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def content(text: str | None) -> bytes:
    return event(delta={"content": text})


def test_the_words_of_prompts_are_64_different_ones() -> None:
    assert len(set(WORDS)) == len(WORDS) == 64


@given(seed=st.integers(0, 2**40), first=st.integers(0, 10**6), second=st.integers(0, 10**6), words=st.integers(4, 60))
def test_two_prompts_differ_within_their_first_four_words(seed: int, first: int, second: int, words: int) -> None:
    maker = PromptMaker(words, seed)
    one, other = maker.make(first).split(), maker.make(second).split()
    assert len(one) == len(other) == words
    assert (one[:4] == other[:4]) == (first == second)
    assert maker.make(first) == PromptMaker(words, seed).make(first)


@given(template=st.integers(0, 40), per_word=st.integers(1, 7), tokens=st.integers(100, 5000))
def test_prompts_are_sized_by_what_the_server_counted(template: int, per_word: int, tokens: int) -> None:
    maker = PromptMaker.sized(tokens, 0, {8: template + 8 * per_word, 24: template + 24 * per_word})
    assert abs(template + per_word * maker.words - tokens) <= per_word


def test_without_counts_a_word_is_a_token() -> None:
    assert PromptMaker.sized(50, 0, {8: 0, 24: 0}).words == 50


def test_a_prompt_too_short_to_be_unique_gets_four_words() -> None:
    assert PromptMaker.sized(1, 0, {8: 18, 24: 34}).words == 4


STREAM = content(None) + content("a") + content("b") + event(finish_reason="stop") + b"data: [DONE]\n\n"


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_a_stream_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    reader = AnswerReader()
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        reader.feed(STREAM[start:end])
    assert (reader.output_tokens, reader.error()) == (2, ("", ""))


def test_usage_wins_over_counting_events() -> None:
    reader = AnswerReader()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\r\n\r\n'
    reader.feed(content("ab") + content("c") + event(finish_reason="length") + usage)
    assert (reader.input_tokens, reader.output_tokens, reader.error()) == (7, 5, ("", ""))


def test_timings_count_where_usage_is_missing() -> None:
    reader = AnswerReader()
    reader.take_whole(b'{"choices":[{"finish_reason":"stop","message":{"content":"x"}}],"timings":{"predicted_n":9}}')
    assert reader.output_tokens == 9


def test_generated_text_that_looks_like_our_markers_is_only_text() -> None:
    reader = AnswerReader()
    reader.feed(content("a") + content('"error" "usage" [DONE] "finish_reason":"stop"') + content("data: [DONE]"))
    assert (reader.pieces, reader.error()[0]) == (3, "truncated")


@pytest.mark.parametrize("delta", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}, {"content": "x"}])
def test_thinking_and_tool_calls_are_content_too(delta: dict[str, Any]) -> None:
    reader = AnswerReader()
    reader.feed(event(delta={"role": "assistant", "content": None}) + event(delta=delta))
    assert reader.pieces == 1


def test_an_error_in_mid_stream_is_kept_with_its_message() -> None:
    for line in (b'data: {"error":{"message":"slot lost"}}\n\n', b'error: {"message":"slot lost"}\n\n'):
        reader = AnswerReader()
        reader.feed(content("a") + line + b"data: [DONE]\n\n")
        assert reader.error()[0] == "stream error"
        assert "slot lost" in reader.error()[1]


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'"text"'])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"Expecting|JSON object"):
        AnswerReader().take_whole(body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "127.0.0.1:8000"),
        ("url", "ftp://h"),
        ("rate", 0.0),
        ("rate", float("nan")),
        ("concurrency", 0),
        ("duration_s", -1.0),
        ("requests", 0),
    ],
)
def test_a_plan_that_cannot_be_carried_out_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        LoadPlan(**{"url": "http://h", field: value})


def test_the_default_is_200_requests_unless_a_duration_bounds_the_run() -> None:
    limits = [plan.request_limit for plan in (PLAN, LoadPlan(url="http://h", duration_s=1.0))]
    assert limits == [200, None]
    assert LoadPlan(url="http://h", duration_s=1.0, requests=5).request_limit == 5


def test_times_count_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    late = Sent(due_s=1.0, started_s=3.0, first_s=3.5, ended_s=4.5, output_tokens=11)
    result = summarize(LoadPlan(url="http://h", rate=1.0), "m", [late], wall_s=5.0)
    assert result.ttft_ms is not None
    assert result.latency_ms is not None
    assert result.per_token_ms is not None
    assert result.lateness_ms is not None
    times = (result.ttft_ms.p50, result.latency_ms.p50, result.per_token_ms.p50, result.lateness_ms.p50)
    assert times == pytest.approx((2500, 3500, 100, 2000))


def test_failed_requests_are_counted_by_kind_and_their_times_left_out() -> None:
    records = [
        Sent(due_s=0, started_s=0, ended_s=1, output_tokens=4, engine="a"),
        Sent(due_s=0, started_s=0, ended_s=1, output_tokens=4, engine="b", retried=True),
        Sent(due_s=0, started_s=0, ended_s=60, output_tokens=3, error="timeout", detail="first"),
        Sent(due_s=0, started_s=0, ended_s=60, error="timeout", detail="second"),
    ]
    result = summarize(PLAN, "m", records, wall_s=2.0, cancelled=3, interrupted=True)
    assert (result.requests, result.ok, result.cancelled, result.retried) == (4, 2, 3, 1)
    assert (result.errors, result.error_examples) == ({"timeout": 2}, {"timeout": "first"})
    assert (result.requests_per_s, result.output_tokens_per_s) == (1.0, 4.0)
    assert result.engines == {"a": 1, "b": 1}
    assert result.latency_ms is not None
    assert result.latency_ms.p99 == 1000


def test_a_run_in_which_nothing_ended_has_no_times() -> None:
    result = summarize(PLAN, "m", [], wall_s=0.0)
    assert (result.ttft_ms, result.latency_ms, result.requests_per_s) == (None, None, 0.0)


def test_percentiles_interpolate_between_closest_ranks() -> None:
    measured = percentiles([number / 1000 for number in range(101)])
    assert measured is not None
    assert (measured.p50, measured.p95, measured.p99) == pytest.approx((50, 95, 99))
