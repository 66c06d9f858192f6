"""Content is captured on demand only, redacted before it goes anywhere, and stays valid JSON however it is cut."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError, MissingExtraError
from lltm_ray.telemetry.content import VARIABLE, Capture, read_capture

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "x"}}]},
    ]
}


def shout(text: str) -> str:
    return text.upper()


def fail(text: str) -> str:
    raise RuntimeError(text)


def test_nothing_is_captured_unless_asked_for() -> None:
    for word in ("", "no_content", "NO_CONTENT", "event_only", "false"):
        assert read_capture({VARIABLE: word}, None) is None
    assert read_capture({}, None) is None


def test_a_chat_is_told_in_the_conventions_shape() -> None:
    capture = read_capture({VARIABLE: "span_only"}, None)
    assert capture is not None
    assert json.loads(capture(CHAT, "Hello", "stop")) == {
        "system": [{"type": "text", "content": "Be brief."}],
        "input": [{"role": "user", "parts": [{"type": "text", "content": "Hi"}, {"type": "image_url"}]}],
        "output": [
            {"role": "assistant", "parts": [{"type": "text", "content": "Hello"}], "finish_reason": "stop"},
        ],
    }


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ({"prompt": "a"}, ["a"]),
        ({"prompt": ["a", "b"]}, ["a", "b"]),
        ({"input": "a"}, ["a"]),
        ({"prompt": [1, 2, 3]}, []),
        ({}, []),
    ],
)
def test_other_routes_prompts_are_found(body: dict[str, Any], texts: list[str]) -> None:
    messages = json.loads(Capture()(body, ""))["input"]
    assert [part["content"] for message in messages for part in message["parts"]] == texts


def test_every_text_goes_through_the_redaction() -> None:
    capture = read_capture({VARIABLE: "span_only"}, f"{__name__}:shout")
    assert capture is not None
    text = capture(CHAT, "Hello")
    assert "HELLO" in text
    assert "BE BRIEF." in text
    assert "Hello" not in text


def test_what_cannot_be_redacted_is_left_out() -> None:
    text = Capture(fail)(CHAT, "secret")
    assert "secret" not in text
    assert "Be brief" not in text
    assert "RuntimeError" in text


@pytest.mark.parametrize("redact", [f"{__name__}:missing", f"{__name__}:CHAT"])
def test_a_redaction_that_is_no_function_is_refused(redact: str) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.redact"):
        read_capture({VARIABLE: "true"}, redact)


def test_a_redaction_of_a_package_that_is_not_there_is_refused() -> None:
    with pytest.raises(MissingExtraError, match="no_such_package"):
        read_capture({VARIABLE: "true"}, "no_such_package:redact")


def test_a_word_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="span_only"):
        read_capture({VARIABLE: "maybe"}, None)


@given(texts=st.lists(st.text(max_size=300), max_size=12), limit=st.integers(60, 2000))
def test_content_is_valid_json_within_its_limit(texts: list[str], limit: int) -> None:
    body = {"messages": [{"role": "user", "content": text} for text in texts]}
    text = Capture(limit_bytes=limit)(body, "answer")
    assert len(text.encode()) <= limit
    assert set(json.loads(text)) == {"system", "input", "output"}


def test_the_newest_messages_stay_when_there_is_no_room() -> None:
    body = {"messages": [{"role": "user", "content": f"{number}" * 300} for number in range(9)]}
    found = json.loads(Capture(limit_bytes=1000)(body, "end"))
    assert found["input"][-1]["parts"][0]["content"].startswith("8")
    assert found["output"]
