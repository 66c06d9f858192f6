"""Prompts and answers for traces: only where the operator asks for them, redacted, and short enough.

Shape: https://github.com/open-telemetry/semantic-conventions-genai, `gen_ai.input.messages` and its like: messages of
`{"role", "parts": [{"type": "text", "content"}]}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from lltm_ray._optional import load
from lltm_ray.config import TelemetryConfig
from lltm_ray.errors import ConfigError

VARIABLE: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_WORDS: Final = {
    "": False,
    "no_content": False,
    "false": False,
    "event_only": False,
    "span_only": True,
    "span_and_event": True,
    "true": True,
}
Redact = Callable[[str], str]
LIMIT_BYTES = 16_384
"""Of all captured content of one request."""
_LONGEST_CHARS = 4096
_CUT = " [... {} characters cut]"


class Capture:
    """Makes a request's content, in the process that has it, so that nothing unredacted leaves.

    Args:
        redact: what each text goes through; None: as it is. A text on which it fails is left out.
        limit_bytes: of the JSON; the oldest messages go first.
    """

    def __init__(self, redact: Redact | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        self._redact = redact
        self._limit_bytes = limit_bytes

    def __call__(self, body: Mapping[str, Any], answer: str, finish_reason: str = "") -> str:
        """`{"system": [part], "input": [message], "output": [message]}` as JSON.

        Args:
            body: the request's fields.
            answer: generated text.
            finish_reason: of the answer.
        """
        messages = [self._message(each) for each in _messages(body)]
        system = [part for each in messages if each["role"] in ("system", "developer") for part in each["parts"]]
        given = [each for each in messages if each["role"] not in ("system", "developer")]
        answered: list[dict[str, Any]] = []
        if answer:
            answered = [{"role": "assistant", "parts": self._parts(answer), "finish_reason": finish_reason or "error"}]
        return self._fit({"system": system, "input": given, "output": answered})

    def _message(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"role": self.clean(str(raw.get("role", "user"))), "parts": self._parts(raw.get("content"))}

    def _parts(self, content: Any) -> list[dict[str, str]]:
        """Text as it is, anything else (images, audio) by its type only."""
        pieces = content if isinstance(content, list) else [content]
        found = []
        for piece in pieces:
            text = piece.get("text") if isinstance(piece, Mapping) else piece
            if isinstance(text, str):
                found.append({"type": "text", "content": self.clean(text)})
            elif isinstance(piece, Mapping):
                found.append({"type": self.clean(str(piece.get("type", "unknown")))})
        return found

    def clean(self, text: str) -> str:
        """A text as it may be kept: redacted, and cut."""
        if self._redact is not None:
            try:
                text = str(self._redact(text))
            except Exception as error:  # noqa: BLE001 - border: foreign code; what it could not redact must not go out
                return f"[left out: the redaction failed with {type(error).__name__}]"
        cut = len(text) - _LONGEST_CHARS
        return text if cut <= 0 else text[:_LONGEST_CHARS] + _CUT.format(cut)

    def _fit(self, content: dict[str, list[Any]]) -> str:
        while True:
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            if len(text.encode("utf-8", "surrogatepass")) <= self._limit_bytes:
                return text
            longest = next((name for name in ("input", "system", "output") if content[name]), None)
            if longest is None:
                return ""
            del content[longest][0]


def read_capture(environ: Mapping[str, str], redact: str | None) -> Capture | None:
    """What the environment asks for; None: nothing is captured.

    Args:
        environ: its variable `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` as OpenTelemetry defines it; events
            are not emitted, so `event_only` captures nothing.
        redact: `package.module:function` that takes a text and returns what of it may be kept.

    Raises:
        ConfigError: a word that is none of these, or a function that cannot be loaded.
    """
    return make_capture(redact) if wants_content(environ) else None


def wants_content(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for content; raises ConfigError as `read_capture`."""
    word = environ.get(VARIABLE, "").strip().lower()
    if word not in _WORDS:
        raise ConfigError(VARIABLE, word, f"must be one of {', '.join(filter(None, _WORDS))}")
    return _WORDS[word]


def settle_content(config: TelemetryConfig | None, environ: Mapping[str, str]) -> TelemetryConfig | None:
    """`capture_content` as who starts the fleet wants it, so that its processes' own environments have no say.

    Raises:
        ConfigError: as `read_capture`, where the settings leave it to the environment.
    """
    if config is None or not config.enabled or config.capture_content is not None:
        return config
    return replace(config, capture_content=wants_content(environ))


def make_capture(redact: str | None) -> Capture:
    """With the function that `redact` names; see `read_capture`."""
    if redact is None:
        return Capture()
    try:
        function = load(redact, install="the package it is in", feature=f"telemetry.redact={redact}")
    except AttributeError as error:
        raise ConfigError("telemetry.redact", redact, f"cannot be loaded: {error}") from error
    if not callable(function):
        raise ConfigError("telemetry.redact", redact, "must name a function, as package.module:function")
    return Capture(function)


def _messages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of any of llama-server's routes."""
    found: list[Mapping[str, Any]] = []
    for name, role in (("system", "system"), ("instructions", "system")):
        if isinstance(body.get(name), str | list):
            found.append({"role": role, "content": body[name]})
    given = body.get("messages", body.get("input", body.get("prompt")))
    if isinstance(given, list) and all(isinstance(each, Mapping) for each in given):
        return found + given
    if isinstance(given, str):
        found.append({"role": "user", "content": given})
    elif isinstance(given, list) and all(isinstance(each, str) for each in given):
        found += [{"role": "user", "content": each} for each in given]
    return found
