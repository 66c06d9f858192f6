"""One HTTP request as the gateway holds it, and how its body and model are read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableSequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from lltm_ray.errors import ConfigError, RequestTooLargeError
from lltm_ray.gateway.accounting import Ends, RequestRecord
from lltm_ray.gateway.headers import find
from lltm_ray.gateway.join import as_stream
from lltm_ray.gateway.replies import ClientLink, Receive, Send, send_json, send_reply
from lltm_ray.gateway.timeline import RequestTrace
from lltm_ray.gateway.upstream import Headers
from lltm_ray.routing.ledger import LedgerEntry
from lltm_ray.routing.policy import Ask, Choice
from lltm_ray.routing.router import Lease

INLINE_BYTES = 2**20
"""Bodies up to this are parsed on the event loop: a thread would cost more than it saves."""


Keep = Callable[[Lease], Awaitable[None]]
"""Does something with a claimed slot; must not raise."""


class ClientGoneError(ConnectionError):
    """The client closed before its request was whole."""


@dataclass(slots=True, kw_only=True)
class Request:
    """A request on its way through the gateway."""

    method: str
    path: str
    query: bytes
    headers: Headers
    """As ASGI has them: names in lower case."""
    receive: Receive
    send: Send
    link: ClientLink | None
    id: str
    arrived_at: float
    record: RequestRecord
    entry: LedgerEntry = field(default_factory=lambda: LedgerEntry(request_id=""))
    """Its line in the account."""
    tenant: str = ""
    choice: Choice | None = None
    """The policy's first decision."""
    ask: Ask | None = None
    """What routing needs to know of it; None: it needs no slot."""
    body: bytes = b""
    body_json: Any = None
    once: bool = False
    """Must not run twice: sent on a connection of its own, and to one engine."""
    streamed: bytes | None = None
    """What to send instead of `body` so that the engine streams an answer that goes to the client whole."""
    model: str | None = None
    only: str | None = None
    """Engine the request is pinned to."""
    is_accounted: bool = False
    """Whether its line belongs into the account, however it ends."""
    is_started: bool = False
    """Whether the client may have seen a part of the answer: no retry any more."""
    is_whole: bool = False
    """Whether the client left with all of its answer."""
    ends: Ends = field(default_factory=Ends)
    keep: Keep | None = None
    """Takes a copy of the slot between a whole answer and its next request; None: nobody does."""
    trace: RequestTrace | None = None
    """Its identity and clock readings; None: nobody keeps any."""
    reply_text: str | None = None
    """Generated text, for whoever captures content; None: nobody does."""

    @property
    def is_stream(self) -> bool:
        """Whether the client wants events."""
        return isinstance(self.body_json, dict) and bool(self.body_json.get("stream"))

    @property
    def target(self) -> bytes:
        """Path and query for the request line; the path is one of ours, so it needs no quoting."""
        path = self.path.encode("ascii")
        return path + b"?" + self.query if self.query else path

    def param(self, name: str) -> str | None:
        """A query parameter's first value."""
        if not self.query or name.encode("ascii") not in self.query:
            return None
        values = parse_qs(self.query.decode("ascii", "replace"), keep_blank_values=True).get(name)
        return values[0] if values else None

    def own_headers(self) -> Headers:
        """Headers of an answer that is the gateway's own."""
        headers = [(b"x-request-id", self.id.encode("ascii"))]
        origin = find(self.headers, b"origin")
        if origin is not None:
            headers.append((b"access-control-allow-origin", origin))
        return headers

    async def reply(self, status: int, body: bytes, **options: Any) -> None:
        """Answer with a body of our own."""
        self.begin(status)
        await send_reply(self.send, status, body, self.own_headers(), **options)

    async def reply_json(self, value: Any, status: int = 200) -> None:
        """Answer with JSON of our own."""
        self.begin(status)
        await send_json(self.send, value, self.own_headers(), status=status)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer whose headers are complete, past ASGI where the host can."""
        if self.link is not None and self.link.answer(status, headers, body):
            self.is_started, self.record.status = True, status
            return
        self.begin(status)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def begin(self, status: int) -> None:
        """The answer's head and first body bytes follow at once; from here on there is no way back."""
        self.is_started = True
        self.record.status = status
        if self.link is not None:
            self.link.cork()


Handler = Callable[[Request], Awaitable[None]]
"""Answers one request of a route."""


def read_pin(request: Request) -> str | None:
    """The engine named by `x-lltm-engine` or `?engine=`; None leaves the choice to the router."""
    pin = find(request.headers, b"x-lltm-engine")
    return pin.decode("utf-8", "replace") if pin is not None else request.param("engine")


async def read_body(receive: Receive, headers: Headers, limit_bytes: int) -> bytes:
    """Read a request's body, never holding more than the limit.

    Raises:
        RequestTooLargeError: at once where Content-Length says so, else as soon as the limit is passed.
        ClientGoneError: the client closed in the middle.
    """
    declared = find(headers, b"content-length")
    if declared is not None and int(declared) > limit_bytes:
        raise RequestTooLargeError("body", int(declared), limit_bytes)
    parts: MutableSequence[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError("the client closed before the end of its request")
        part: bytes = message.get("body", b"")
        size_bytes += len(part)
        if size_bytes > limit_bytes:
            raise RequestTooLargeError("body", size_bytes, limit_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return part if len(parts) == 1 else b"".join(parts)


async def understand(request: Request) -> None:
    """Parse the body, once: `body_json`, `model` and `streamed`; a long one off the event loop, which others use.

    Raises:
        ConfigError: as `read_model`.
    """
    if len(request.body) > INLINE_BYTES:
        await asyncio.to_thread(_understand, request)
    else:
        _understand(request)


def _understand(request: Request) -> None:
    request.body_json = parse_json(request.body)
    request.model = model_of(request.body_json)
    request.streamed = as_stream(request.path, request.body_json, request.body)


def parse_json(body: bytes) -> Any:
    """A body's value.

    Raises:
        ConfigError: not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        shown = body[:80].decode("utf-8", "replace")
        raise ConfigError("body", shown, f"is not JSON: {error or 'it is nested too deeply'}") from error


def read_model(body: bytes) -> str | None:
    """The `model` of a JSON body; None if it has none, or is no object (the engine says what it wants).

    Raises:
        ConfigError: not JSON, or `model` is no string.
    """
    return model_of(parse_json(body))


def model_of(parsed: Any) -> str | None:
    """The `model` of a parsed body; errors as `read_model`."""
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if model is not None and not isinstance(model, str):
        raise ConfigError("model", model, "must be a string that names a served model")
    return model or None
