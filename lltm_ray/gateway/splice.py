"""The seam of a continued stream: a survivor's events in the words of the stream that broke.

The client sees one reply: the first engine's id, time and model, one role, counts over the whole reply.
"""

from __future__ import annotations

import json
from typing import Any

from lltm_ray.gateway.continuable import limit_of
from lltm_ray.gateway.tap import StreamTap
from lltm_ray.gateway.told import DivergedError, Mark

_DONE = b"data: [DONE]\n\n"
_IDENTITY = ("created", "id", "model", "system_fingerprint")


def parse_event(event: bytes) -> dict[str, Any] | None:
    """An event's JSON object; None for comments, `[DONE]` and what is no object."""
    name, _, value = event.partition(b":")
    if name not in (b"data", b"error"):
        return None
    try:
        found = json.loads(value)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    return found if name == b"data" else {"error": found.get("error", found)}


def encode_event(value: dict[str, Any]) -> bytes:
    """An event's bytes, as llama-server writes them."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: %b\n\n" % text.encode("utf-8", "replace")


class Splice:
    """Turns the events of one survivor into the client's.

    Args:
        tap: what the client got so far; told what it gets from here.
        body: the client's request.
        mark: where the survivor takes the reply up.
    """

    def __init__(self, tap: StreamTap, body: dict[str, Any], mark: Mark) -> None:
        self._tap = tap
        self._mark = mark
        self._left = tap.told.chars
        self._first_timings = tap.timings or {}
        self._head = {key: value for key, value in tap.head.items() if key in _IDENTITY}
        self._text_before = tap.told.text[: mark.chars]
        options = body.get("stream_options")
        self._has_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self._limit = limit_of(body)
        self._before = tap.told.position
        self._prompt_tokens = tap.prompt_tokens

    # --- the same route again: only what the client has is left out

    def repeat(self, data: bytes) -> bytes:
        """A survivor's events on the request's own route, without what the client has."""
        return b"".join(self._repeat_event(event) for event in data.split(b"\n\n")[:-1])

    def _repeat_event(self, event: bytes) -> bytes:
        found = parse_event(event)
        if found is None:
            return event + b"\n\n"
        place, name, is_end = found, "content", found.get("stop")
        if self._tap.kind != "native":
            found.update(self._head)
            choice = (found.get("choices") or [{}])[0]
            is_end = choice.get("finish_reason")
            place, name = (choice.get("delta", {}), name) if self._tap.kind == "chat" else (choice, "text")
        if "role" in place:
            if self._tap.has_role:
                return b""
            self._tap.has_role = True
        text = place.get(name)
        if isinstance(text, str) and self._left:
            place[name] = text[self._left :]
            self._left -= min(len(text), self._left)
            if not place[name] and not is_end:
                return b""
        return encode_event(found)

    # --- /completion from known ids: its events in the client's form

    def say(self, found: dict[str, Any]) -> bytes:
        """One event of the survivor's /completion for the client; b"" where the client has it.

        Raises:
            DivergedError: the survivor says something else than the client has.
        """
        told = self._tap.told
        count = self._mark.tokens + found["tokens_predicted"]
        self._prompt_tokens = self._prompt_tokens or found["tokens_evaluated"] - self._mark.tokens
        if found["stop"]:
            if told.seen_chars < told.chars:
                raise DivergedError(f"the reply ended at character {told.seen_chars} of {told.chars}")
            return self._end(found, count)
        ids = found["tokens"]
        new = told.add(found["content"], ids[0] if len(ids) == 1 else None, count)
        if not new and (self._tap.kind == "chat" or found["content"] or count <= self._before):
            return b""
        return self._event(found, new, count)

    def _event(self, found: dict[str, Any], new: str, count: int) -> bytes:
        timings = {"timings": self._merge(found["timings"], count)} if "timings" in found else {}
        if self._tap.kind == "native":
            counts = {"content": new, "tokens_predicted": count, "tokens_evaluated": self._prompt_tokens}
            return encode_event(found | counts | timings)
        if self._tap.kind == "chat":
            return encode_event(self._chunk({"content": new}, None) | timings)
        return encode_event(self._text(new, None) | timings)

    def end_at_limit(self) -> bytes:
        """The end of a reply that had reached its limit when its engine died."""
        last: dict[str, Any] = {
            "index": 0,
            "content": "",
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": self._head.get("model"),
        }
        last |= {"tokens_predicted": 0, "tokens_evaluated": self._prompt_tokens, "stop_type": "limit"}
        return self._end(last, self._mark.tokens)

    def _end(self, found: dict[str, Any], count: int) -> bytes:
        tap = self._tap
        tap.told.finish("", count)
        tap.is_finished = tap.is_done = True
        timings = {"timings": self._merge(found["timings"], count)} if "timings" in found else {}
        if tap.kind == "native":
            return encode_event(self._native_end(found, count) | timings)
        reason = "length" if found["stop_type"] == "limit" else "stop"
        usage = {"usage": self._usage(found, count)}
        if tap.kind == "text":
            return encode_event(self._text("", reason) | usage | timings) + _DONE
        if not self._has_usage:
            return encode_event(self._chunk({}, reason) | timings) + _DONE
        counts = self._chunk({}, reason) | {"choices": []} | usage | timings
        return encode_event(self._chunk({}, reason)) + encode_event(counts) + _DONE

    def _native_end(self, found: dict[str, Any], count: int) -> dict[str, Any]:
        last = found | {"tokens_predicted": count, "tokens_evaluated": self._prompt_tokens}
        if "generation_settings" in last:
            limits = {"max_tokens": self._limit, "n_predict": self._limit}
            last["generation_settings"] = last["generation_settings"] | limits
            last["prompt"] = last["prompt"].removesuffix(self._text_before)
            last["has_new_line"] = last["has_new_line"] or "\n" in self._text_before
        return last

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"finish_reason": reason, "index": 0, "delta": delta}
        return {"choices": [choice], **self._head, "object": "chat.completion.chunk"}

    def _text(self, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
        return {"choices": [choice], **self._head, "object": "text_completion"}

    def _usage(self, found: dict[str, Any], count: int) -> dict[str, Any]:
        cached = min(found.get("timings", {}).get("cache_n", 0), self._prompt_tokens)
        return {
            "completion_tokens": count,
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": count + self._prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _merge(self, last: dict[str, Any], count: int) -> dict[str, Any]:
        """Timings of the whole reply: its prompt and its tokens, each once; the time that all known engines took.

        `cache_n` is the survivor's, cut to the prompt. The dead engine's times are known of chats only.
        """
        cached = min(last["cache_n"], self._prompt_tokens)
        prompt_ms = last["prompt_ms"] + self._first_timings.get("prompt_ms", 0.0)
        predicted_ms = last["predicted_ms"] + self._first_timings.get("predicted_ms", 0.0)
        fresh = self._prompt_tokens - cached
        return last | {
            "cache_n": cached,
            "prompt_n": fresh,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / fresh if fresh else 0.0,
            "prompt_per_second": 1000.0 * fresh / prompt_ms if prompt_ms else 0.0,
            "predicted_n": count,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / count if count else 0.0,
            "predicted_per_second": 1000.0 * count / predicted_ms if predicted_ms else 0.0,
        }
