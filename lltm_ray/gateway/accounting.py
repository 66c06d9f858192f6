"""What one request was: an append on the request path, read by whoever wants to know."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lltm_ray.records import Timings, Usage, timings_from

TAIL_BYTES = 4096
"""Enough for the last usage and timings objects of every llama-server answer; they close the body or the stream."""
_TAIL_PARTS = 8
_read_value = json.JSONDecoder().raw_decode


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request through the gateway, however it ended."""

    request_id: str
    route: str
    model: str = ""
    engine: str = ""
    """The last engine tried."""
    status: int = 0
    """What the client was sent; 0: it left before anything was."""
    attempts: int = 0
    queue_s: float = 0.0
    """Waiting for a slot, over all attempts."""
    ttft_s: float | None = None
    """From the request's arrival to the answer's first body bytes."""
    total_s: float = 0.0
    bytes_sent: int = 0
    delivered_tokens: int = 0
    """Generated tokens whose text the client was sent."""
    error: str = ""
    """Why it failed; `client gone` when the client closed first."""
    ends: bytes = field(default=b"", repr=False)
    """First and last bytes of the answer, where its counts are."""

    @property
    def timings(self) -> Timings | None:
        """llama-server's last `timings` object; parsed when asked for, not while the request runs."""
        raw = find_object(self.ends, b'"timings":')
        return None if raw is None else timings_from(raw)

    @property
    def usage(self) -> Usage | None:
        """Token counts, from `usage` in OpenAI's or Anthropic's words, else from `timings`."""
        return read_usage(self.ends)


_LAST_EVENTS = (b'"stop":true', b'"type":"message_stop"', b'"type":"response.completed"')
"""Of /completion, Anthropic's messages, and responses; in generated text their quotes are escaped."""


class Ends:
    """The first and the last few parts of a body, bounded, at the cost of one append a part."""

    __slots__ = ("_first", "_last")

    def __init__(self) -> None:
        self._first = b""
        self._last: deque[bytes] = deque(maxlen=_TAIL_PARTS)

    def add(self, part: bytes) -> None:
        """Note a part of the body."""
        if not self._first:
            self._first = part
        self._last.append(part)

    @property
    def is_final(self) -> bool:
        """Whether the last event says that a stream of them is over."""
        last = self.join().rstrip().rpartition(b"\n\n")[2]
        return last == b"data: [DONE]" or any(mark in last for mark in _LAST_EVENTS)

    def find(self, key: bytes) -> dict[str, Any] | None:
        """The JSON object after the last `key`."""
        return find_object(self.join(), key)

    def usage(self) -> Usage | None:
        """Token counts told so far."""
        return read_usage(self.join())

    def join(self) -> bytes:
        """At most `TAIL_BYTES` from the start and `TAIL_BYTES` from the end."""
        if not self._last:
            return b""
        if self._last[0] is self._first:
            whole = b"".join(self._last)
            return whole if len(whole) <= 2 * TAIL_BYTES else whole[:TAIL_BYTES] + b"\n" + whole[-TAIL_BYTES:]
        return self._first[:TAIL_BYTES] + b"\n" + b"".join(self._last)[-TAIL_BYTES:]


def find_object(text: bytes, key: bytes, *, last: bool = True) -> dict[str, Any] | None:
    """The JSON object after the last (or first) `key`, such as `"usage":`; None if it is absent, null or cut.

    Inside a JSON string the key's quotes would be escaped, so generated text cannot pass for a count.
    """
    at = text.rfind(key) if last else text.find(key)
    if at < 0:
        return None
    try:
        found, _ = _read_value(text[at + len(key) :].decode("utf-8", "replace").lstrip())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_usage(ends: bytes) -> Usage | None:
    """Token counts of an answer from its first and last bytes."""
    raw = find_object(ends, b'"usage":')
    if raw is None:
        timings = find_object(ends, b'"timings":')
        if timings is None:
            return None
        seen = timings_from(timings)
        return Usage(
            input_tokens=seen.cache_n + seen.prompt_n, output_tokens=seen.predicted_n, cached_tokens=seen.cache_n
        )
    opening = find_object(ends, b'"usage":', last=False) or {}
    merged = opening | raw  # Anthropic's stream counts the prompt in its first event and the answer in its last
    if "cache_read_input_tokens" in merged:
        cached = _count(merged, "cache_read_input_tokens")
        fresh = _count(merged, "input_tokens")
        return Usage(input_tokens=fresh + cached, output_tokens=_count(merged, "output_tokens"), cached_tokens=cached)
    details = merged.get("prompt_tokens_details") or merged.get("input_tokens_details") or {}
    return Usage(
        input_tokens=_count(merged, "prompt_tokens", "input_tokens"),
        output_tokens=_count(merged, "completion_tokens", "output_tokens"),
        cached_tokens=_count(details, "cached_tokens"),
    )


_MARKS: dict[str, tuple[bytes, bytes]] = {
    **dict.fromkeys(("/chat/completions", "/v1/chat/completions"), (b'"delta":{"', b'"delta":{"role"')),
    **dict.fromkeys(("/completion", "/completions", "/infill"), (b'"stop":false', b"")),
    **dict.fromkeys(("/responses", "/v1/responses"), (b'"delta":"', b"")),
    "/v1/completions": (b'"finish_reason":null', b""),
    "/v1/messages": (b'"delta":{"type"', b""),
}
"""By route: what every event with a token has, and what of it those without one have too."""


def count_events(path: str, part: bytes) -> int:
    """Events with a token, about one each, in a part of a stream; bytes that no text can hold tell them."""
    marks = _MARKS.get(path)
    if marks is None:
        return 0
    found = part.count(marks[0])
    return found - part.count(marks[1]) if found and marks[1] else found


def is_several(fields: Any) -> bool:
    """Whether a request has several answers: llama-server's counts are those of one of them."""
    if not isinstance(fields, dict):
        return False
    if fields.get("n", 1) not in (None, 1) or fields.get("n_cmpl", 1) not in (None, 1):
        return True
    prompt = fields.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and type(prompt[0]) is not int


def _count(raw: dict[str, Any], *names: str) -> int:
    for name in names:
        value = raw.get(name)
        if isinstance(value, int):
            return value
    return 0
