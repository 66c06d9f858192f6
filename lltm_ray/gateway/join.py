"""Non-streamed requests sent to llama-server as streams, and their events joined to the answer it would have sent.

llama-server notices that a client left only where it streams; a whole answer keeps its slot busy to its end. The joined
object is what the same server sends for the same request without `"stream": true`, key by key, in its order of keys.
"""

from __future__ import annotations

import json
from typing import Any

from lltm_ray.gateway.upstream import UpstreamBrokenError

_TEXT = "/v1/completions"
_CHATS = frozenset(("/chat/completions", "/v1/chat/completions"))
_NATIVE = frozenset(("/completion", "/completions", "/infill"))
_DETAILS = ("n_probs", "logprobs", "top_logprobs", "return_tokens", "verbose")
"""Asked for, these cannot be joined: a stream leaves out those of tokens whose text it holds back (half a character,
half a stop word) and, in a chat, of the one that ends the text."""
_PARSED = ("response_format", "json_schema", "tools")
"""A chat's stream and its whole answer read text of these forms differently where it is cut off at its limit."""
BRIEF_TOKENS = 16
"""Answers of at most so many tokens are asked for whole."""
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
_ANSWER_KEYS = ("created", "model", "system_fingerprint", "object", "usage", "id", "timings")


class BrokenStreamError(UpstreamBrokenError):
    """The stream ended before its last event, or holds what is no event of llama-server's."""


class UnjoinableError(ValueError):
    """The stream is whole but left out text that the whole answer has; the request must be sent as it came."""


def as_stream(path: str, body: Any, data: bytes) -> bytes | None:
    """The body to send upstream so that its answer comes as a stream; None: pass the request on unchanged.

    Args:
        path: the request's route.
        body: its parsed JSON.
        data: its bytes. They are added to, not written anew: llama-server takes the last of several of one name.
    """
    is_native = path in _NATIVE
    if not (is_native or path == _TEXT or path in _CHATS) or not isinstance(body, dict) or not body:
        return None
    if body.get("stream") not in (None, False) or not _is_single(path, body) or _is_brief(body):
        return None
    if any(body.get(name) for name in _DETAILS) or (is_native and body.get("response_fields")):
        return None
    added: dict[str, Any] = {"stream": True, "return_progress": False}
    if not is_native:
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            return None
        added["stream_options"] = options | {"include_usage": True}
        # The counts tell whether the last token's text was held back; where a parser holds it back, they cannot.
        added["timings_per_token"] = path == _TEXT or not any(body.get(name) for name in _PARSED)
    try:
        fields = json.dumps(added, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (ValueError, RecursionError):
        return None  # what Python reads and JSON lacks, such as NaN or 1e999: the server's to refuse
    return b"%b,%b" % (data[: data.rindex(b"}")], fields[1:])


def _is_brief(body: dict[str, Any]) -> bool:
    """An answer that is over before a client that leaves matters; as a stream it costs a connection of its own."""
    limits = [body[name] for name in _LIMITS if type(body.get(name)) is int]
    return bool(limits) and 0 <= min(limits) <= BRIEF_TOKENS


def _is_single(path: str, body: dict[str, Any]) -> bool:
    if any(type(body.get(name, 1)) is not int or body.get(name, 1) != 1 for name in ("n", "n_cmpl")):
        return False
    if path in _CHATS:
        return True
    prompt = body.get("prompt", "" if path == "/infill" else None)
    if isinstance(prompt, list):
        return bool(prompt) and all(type(token) is int for token in prompt)
    return isinstance(prompt, (str, dict))


def may_hold_back(path: str, body: dict[str, Any]) -> bool:
    """Whether a stream of this request that ends at its limit may lack text that the whole answer has."""
    return bool(body.get("stop")) or (path in _CHATS and any(body.get(name) for name in _PARSED))


class Joiner:
    """Takes the bytes of one stream, in any pieces, and makes the whole answer.

    Args:
        path: the request's route.
        has_stops: what `may_hold_back` says of the request.
    """

    def __init__(self, path: str, *, has_stops: bool = False) -> None:
        self._events = _Chat(has_stops) if path in _CHATS else _Text(has_stops) if path == _TEXT else _Native(has_stops)
        self._rest = b""
        self._error: dict[str, Any] | None = None
        self._is_done = False
        self._ends_itself = path in _NATIVE

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            BrokenStreamError: they hold no event of llama-server's.
        """
        *lines, self._rest = (self._rest + data if self._rest else data).split(b"\n")
        for line in lines:
            kind, colon, value = line.partition(b":")
            if colon and kind in (b"data", b"error"):
                self._take(kind, value.strip())

    def _take(self, kind: bytes, value: bytes) -> None:
        if value == b"[DONE]":
            self._is_done = True
            return
        try:
            event = json.loads(value)
            if event is None:
                return
            if kind == b"error" or "error" in event:
                error = event.get("error", event)
                self._error = error if isinstance(error, dict) else {"message": str(error), "code": 500}
            else:
                self._events.add(event)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise BrokenStreamError(f"not an event of llama-server's: {value[:80]!r}") from error

    def finish(self) -> tuple[int, bytes]:
        """Status and JSON body of the answer; an error event's own code and words where there was one.

        Raises:
            BrokenStreamError: the last event is missing.
            UnjoinableError: text that could have become a stop string was held back to the end, and lost.
        """
        if self._error is not None:
            code = self._error.get("code")
            status = code if type(code) is int and 400 <= code <= 599 else 500
            return status, _encode({"error": self._error})
        if not self._events.is_whole or not (self._is_done or self._ends_itself):
            raise BrokenStreamError("the stream ended before its last event")
        return 200, _encode(self._events.join())

    @property
    def text(self) -> str | None:
        """The reply's visible text; None where it has more than that, such as reasoning or tool calls."""
        return self._events.text


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class _Native:
    """Events of /completion: the last one has everything but what the earlier ones already brought."""

    def __init__(self, has_stops: bool) -> None:
        self._has_stops = has_stops
        self._text: list[str] = []
        self._told = 0
        self._last: dict[str, Any] = {}

    def add(self, event: dict[str, Any]) -> None:
        self._text.append(event["content"])
        if event["stop"]:
            self._last = event
        else:
            self._told = event["tokens_predicted"] if event["content"] or not self._has_stops else 0

    @property
    def is_whole(self) -> bool:
        return bool(self._last)

    @property
    def text(self) -> str | None:
        return "".join(self._text)

    def join(self) -> dict[str, Any]:
        held = self._last["stop_type"] == "limit" and self._told < self._last["tokens_predicted"]
        joined = self._last | {"content": "".join(self._text) + _held_text(held, self._has_stops)}
        if "stream" in joined.get("generation_settings", ()):
            joined["generation_settings"]["stream"] = False
        return joined


class _OpenAI:
    """What both OpenAI forms share: one choice, and the counts at the end."""

    def __init__(self, has_stops: bool) -> None:
        self._has_stops = has_stops
        self._told = 0
        self._finish: str | None = None
        self._fields: dict[str, Any] = {}

    def _add(self, event: dict[str, Any]) -> dict[str, Any]:
        self._fields.update((key, event[key]) for key in _ANSWER_KEYS if key in event)
        if "usage" not in event and "timings" in event:
            self._told = event["timings"]["predicted_n"]
        choices = event["choices"]
        choice: dict[str, Any] = choices[0] if choices else {}
        if self._has_stops and choice.get("text") == "":
            self._told = 0  # the last token's event comes even if its text does not
        self._finish = choice.get("finish_reason") or self._finish
        return choice

    @property
    def is_whole(self) -> bool:
        return self._finish is not None and "usage" in self._fields

    @property
    def _is_held(self) -> bool:
        return self._finish == "length" and self._told < self._fields["usage"]["completion_tokens"]

    def _answer(self, choice: dict[str, Any], kind: str) -> dict[str, Any]:
        fields = self._fields | {"object": kind}
        return {"choices": [choice], **{key: fields[key] for key in _ANSWER_KEYS if key in fields}}


class _Text(_OpenAI):
    """Events of /v1/completions."""

    def __init__(self, has_stops: bool) -> None:
        super().__init__(has_stops)
        self._text: list[str] = []

    def add(self, event: dict[str, Any]) -> None:
        self._text.append(self._add(event).get("text", ""))

    @property
    def text(self) -> str | None:
        return "".join(self._text)

    def join(self) -> dict[str, Any]:
        text = "".join(self._text) + _held_text(self._is_held, self._has_stops)
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": self._finish}
        return self._answer(choice, "text_completion")


class _Chat(_OpenAI):
    """Events of /v1/chat/completions."""

    def __init__(self, has_stops: bool) -> None:
        super().__init__(has_stops)
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}

    def add(self, event: dict[str, Any]) -> None:
        delta = self._add(event).get("delta", {})
        self._content.append(delta.get("content") or "")
        self._reasoning.append(delta.get("reasoning_content") or "")
        for part in delta.get("tool_calls") or ():
            call = self._calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
            function = part.get("function", {})
            call["id"] += part.get("id") or ""
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""

    @property
    def text(self) -> str | None:
        return None if self._calls or any(self._reasoning) else "".join(self._content)

    def join(self) -> dict[str, Any]:
        _held_text(self._is_held and self._has_stops, self._has_stops)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content)}
        reasoning = "".join(self._reasoning)
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = [_call(self._calls[index]) for index in sorted(self._calls)]
        choice = {"finish_reason": self._finish, "index": 0, "message": message}
        return self._answer(choice, "chat.completion")


def _held_text(is_held: bool, has_stops: bool) -> str:
    """What a stream that ended at its limit did not tell: half a character, which the whole answer shows as U+FFFD."""
    if is_held and has_stops:
        raise UnjoinableError("the end of the text was held back, for it could have become a stop string")
    return "\ufffd" if is_held else ""


def _call(call: dict[str, str]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"type": "function", "function": function} | ({"id": call["id"]} if call["id"] else {})
