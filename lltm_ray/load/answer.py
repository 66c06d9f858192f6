"""Reads one chat completion for its counts alone: much cheaper than parsing every event. Pure."""

from __future__ import annotations

import json
from typing import Any


class AnswerReader:
    """Feed it a streamed body piece by piece, or a whole one; then ask for counts and for what was wrong."""

    def __init__(self) -> None:
        self.pieces = 0
        """Events (or choices) with generated content."""
        self.input_tokens = 0
        self._counted = 0
        self._tail = b""
        self._ended = False
        self._error: tuple[str, str] | None = None

    @property
    def output_tokens(self) -> int:
        """As the server counted, else events with content."""
        return self._counted or self.pieces

    def error(self) -> tuple[str, str]:
        """Kind and message, empty when all is well; an answer without `[DONE]` or finish reason is `truncated`."""
        if self._error is None and not self._ended:
            return "truncated", "the answer ended without [DONE] or a finish reason"
        return self._error or ("", "")

    def feed(self, piece: bytes) -> None:
        """Take bytes of a `text/event-stream` as they come.

        Raises:
            ValueError: an event is not JSON.
        """
        *lines, self._tail = (self._tail + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip())
            elif line.startswith(b"error:"):  # llama.cpp before September 2025
                self._error = ("stream error", line[6:].decode("utf-8", "replace").strip())

    def take_whole(self, body: bytes) -> None:
        """Take a complete JSON answer.

        Raises:
            ValueError: it is not a JSON object.
        """
        self._read(json.loads(body))

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._ended = True
        elif self.pieces and b'"finish_reason":null' in data and b'"usage"' not in data and b'"error"' not in data:
            self.pieces += 1  # a plain delta after the first: all that counts is that it came
        else:
            self._read(json.loads(data))

    def _read(self, message: Any) -> None:
        if not isinstance(message, dict):
            raise ValueError(f"not a JSON object: {message!r:.100}")  # noqa: TRY004 - wrong data, not a wrong call
        if message.get("error"):
            self._error = ("stream error", json.dumps(message["error"])[:300])
        usage, timings = message.get("usage") or {}, message.get("timings") or {}
        self.input_tokens = usage.get("prompt_tokens") or self.input_tokens
        self._counted = usage.get("completion_tokens") or timings.get("predicted_n") or self._counted
        for choice in message.get("choices") or ():
            part = choice.get("delta") or choice.get("message") or choice
            self.pieces += any(part.get(name) for name in ("content", "reasoning_content", "tool_calls", "text"))
            self._ended = self._ended or bool(choice.get("finish_reason"))
