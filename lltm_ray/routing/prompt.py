"""What a request asks an engine to read, as bytes: prompt A begins prompt B for these bytes if it does for the tokens.

The bytes are no rendered template: the engine renders it. They only have to share beginnings where the tokens do, so a
message is its role, its text and what else a template shows of it, between separators that text does not contain.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from lltm_ray._prefix import END_BYTES
from lltm_ray.routing.adapters import Lora

_FIELD, _MESSAGE = b"\x1e", b"\x1f"
_CHATS = frozenset(("/chat/completions", "/v1/chat/completions", "/v1/messages", "/responses", "/v1/responses"))
_TEXTS = frozenset(("/completion", "/completions", "/v1/completions"))
_HEAD_FIELDS = ("tools", "chat_template_kwargs", "reasoning_effort", "system", "instructions")
"""What templates render before the first message."""
_MESSAGE_FIELDS = ("name", "tool_calls", "tool_call_id")


def prompt_key(path: str, body: Any, lora: Lora | None = None) -> bytes:
    """The key of a request; empty where no prompt is cached or its form is unknown.

    Args:
        path: the request's route.
        body: its parsed JSON.
        lora: the adapters it chooses, where it is known which ones there are.
    """
    if not isinstance(body, dict):
        return b""
    if path in _CHATS:
        key = _chat(body)
    elif path in _TEXTS:
        key = _text(body.get("prompt"))
    elif path == "/infill":
        key = b"infill" + _FIELD + _utf8(body.get("input_prefix")) + _FIELD + _utf8(body.get("input_suffix"))
    else:
        return b""
    adapters = body.get("lora") if lora is None else ["chosen", *lora]
    return _salt(adapters) + key if adapters and key else key


def reply_key(path: str, text: str) -> bytes:
    """What a reply adds to the key of the request that goes on from it.

    Args:
        path: the request's route.
        text: the reply's visible text.
    """
    if path in _CHATS:
        return b"assistant" + _FIELD + _utf8(text) + _MESSAGE
    return _utf8(text) if path in _TEXTS else b""


def find_cuts(key: bytes, most: int) -> list[int]:
    """Where the key of a later turn may go on from this one: its last ends of messages; of a text, of its last blocks.

    Returns:
        At most `most` lengths in bytes, ascending.
    """
    cuts: list[int] = []
    end = key.rfind(_MESSAGE) + 1
    while end and len(cuts) < most:
        cuts.append(end)
        end = key.rfind(_MESSAGE, 0, end - 1) + 1
    return cuts[::-1] or list(END_BYTES[: bisect_right(END_BYTES, len(key))][-most:])


def _chat(body: Mapping[str, Any]) -> bytes:
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        return b""
    parts = [_utf8(name) + _FIELD + _plain(body[name]) + _MESSAGE for name in _HEAD_FIELDS if body.get(name)]
    for message in messages:
        if not isinstance(message, dict):
            return b""
        content = message.get("content")
        parts += (_utf8(message.get("role")), _FIELD, _utf8(content) if isinstance(content, str) else _content(content))
        if len(message) > 2:
            parts += [_FIELD + _plain(message[name]) for name in _MESSAGE_FIELDS if message.get(name)]
        parts.append(_MESSAGE)
    return b"".join(parts)


def _content(content: Any) -> bytes:
    """Text parts as they are; anything long that is no text, such as an image, as a digest."""
    if not isinstance(content, list):
        return b"" if content is None else _plain(content)
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str):
            parts.append(_utf8(text))
        else:
            parts.append(_FIELD + blake2b(_plain(part), digest_size=16).digest())
    return b"".join(parts)


def _text(prompt: Any) -> bytes:
    if isinstance(prompt, str):
        return _utf8(prompt)
    if isinstance(prompt, dict):
        media = prompt.get("multimodal_data")
        digest = _FIELD + blake2b(_plain(media), digest_size=16).digest() if media else b""
        return _utf8(prompt.get("prompt_string")) + digest
    if isinstance(prompt, Sequence) and prompt and all(type(token) is int for token in prompt):
        return _tokens(prompt)
    return b""


def _tokens(tokens: Sequence[int]) -> bytes:
    try:
        return b"tokens" + _FIELD + array("i", tokens).tobytes()
    except OverflowError:  # no token id of any model: the engine will refuse it
        return b""


def _salt(adapters: Any) -> bytes:
    """Another adapter makes other keys and values of the same tokens."""
    return blake2b(_plain(adapters), digest_size=8).digest() + _FIELD


def _plain(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "surrogatepass")


def _utf8(text: Any) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b""
