"""The gateway's own answers, as ASGI messages."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, Protocol

from lltm_ray.errors import LltmRayError
from lltm_ray.gateway.upstream import Headers

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientLink(Protocol):
    """What our own ASGI host offers beyond ASGI; other hosts have none of it and cost more."""

    is_gone: bool
    """The client left: what is written from now on reaches nobody."""

    def cork(self) -> None:
        """Hold the answer's head until its first body bytes, which must follow at once."""

    def answer(self, status: int, headers: Headers, body: bytes) -> bool:
        """Write a whole answer past ASGI; False where ASGI must do."""

    def pusher(self, on_writable: Callable[[], None]) -> Callable[[bytes], bool] | None:
        """A way to write parts of the running body past ASGI; None where ASGI must do."""

    def when_gone(self, call: Callable[[], None] | None) -> None:
        """Call this when the client's socket is lost; None takes it back."""


LINGER_S = 2.0
"""How long a refused body is read and dropped, so that the refusal reaches a client that only writes."""
JSON = b"application/json; charset=utf-8"
NOT_FOUND = b'{"error":{"message":"File Not Found","type":"not_found_error","code":404}}'
"""llama-server's own words, also for a known path with a wrong method."""


async def send_reply(send: Send, status: int, body: bytes, headers: Headers, *, content_type: bytes = JSON) -> None:
    """Send a whole answer."""
    head = [(b"content-type", content_type), (b"content-length", str(len(body)).encode("ascii")), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: Any, headers: Headers, *, status: int = 200) -> None:
    """Send a value as JSON, as compact as llama-server writes it."""
    await send_reply(send, status, encode(value), headers)


async def send_error(send: Send, error: LltmRayError, headers: Headers) -> None:
    """Send one of our errors in the shape that llama-server and OpenAI clients know."""
    if error.retry_after_s is not None:
        headers = [*headers, (b"retry-after", str(math.ceil(error.retry_after_s)).encode("ascii"))]
    await send_json(send, error.as_dict(), headers, status=error.http_status)


async def refuse_and_linger(send: Send, receive: Receive, error: LltmRayError, headers: Headers) -> bool:
    """Send a refusal whole, drop what the client still sends for a moment, and close; whether it stopped by itself."""
    body = encode(error.as_dict())
    head = [
        (b"content-type", JSON),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"connection", b"close"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": error.http_status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    has_stopped = False
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while not has_stopped:
                message = await receive()
                has_stopped = message["type"] != "http.request" or not message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})
    return has_stopped


def encode(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
