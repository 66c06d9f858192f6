"""uvicorn's protocol with what a streaming gateway lacks in it.

Three things: a bound on a request head that never ends; a call when the client's socket is gone, where ASGI would cost
a task for each request; and an answer's head written together with its first body bytes, one packet and one system
call instead of two. The last two reach the app as the ASGI extension `lltm_ray`, and it runs without them elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

EXTENSION = "lltm_ray"
_HEAD_SLACK_BYTES = 512 * 1024
"""More than one read may bring beyond the head; the app itself refuses heads over the limit with 431."""
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class CorkedTransport(asyncio.Transport):
    """A client's socket that can hold one write until the next one."""

    def __init__(self, inner: asyncio.Transport) -> None:
        super().__init__()
        self._inner = inner
        self._is_corked = False
        self._held = b""
        self.is_closing = inner.is_closing  # type: ignore[method-assign]
        self.pause_reading = inner.pause_reading  # type: ignore[method-assign]
        self.resume_reading = inner.resume_reading  # type: ignore[method-assign]
        self.get_extra_info = inner.get_extra_info  # type: ignore[method-assign]
        self.abort = inner.abort  # type: ignore[method-assign]

    def cork(self) -> None:
        """Hold the next write; the one after it takes it along."""
        self._is_corked = True

    def write(self, data: Any) -> None:
        """See `asyncio.WriteTransport`."""
        if self._is_corked:
            self._is_corked = False
            self._held = data
        elif self._held:
            held, self._held = self._held, b""
            self._inner.write(held + data)
        else:
            self._inner.write(data)

    def close(self) -> None:
        """See `asyncio.BaseTransport`; what is held goes out first."""
        if self._held:
            held, self._held = self._held, b""
            self._inner.write(held)
        self._inner.close()


class GatewayProtocol(HttpToolsProtocol):
    """One client connection; a `replies.ClientLink` for the request that runs on it."""

    head_limit_bytes = 2**20
    _head_bytes = 0
    _is_in_head = False
    _is_lost = False
    _gone: Callable[[], None] | None = None

    def cork(self) -> None:
        """Hold the answer's head until its first body bytes, which must follow at once."""
        self._corked.cork()

    def when_gone(self, call: Callable[[], None] | None) -> None:
        """Call this when the client's socket is lost; None takes it back."""
        self._gone = call
        if call is not None and self._is_lost:
            self.loop.call_soon(call)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        self._corked = CorkedTransport(transport)
        self._extensions = {EXTENSION: self}
        super().connection_made(self._corked)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._is_lost = True
        super().connection_lost(exc)
        if self._gone is not None:
            self._gone()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.head_limit_bytes + _HEAD_SLACK_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request's head is whole; the app starts."""
        self._is_in_head = False
        self.scope["extensions"] = self._extensions  # type: ignore[typeddict-item]
        super().on_headers_complete()
