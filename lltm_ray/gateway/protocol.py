"""uvicorn's protocol with what a streaming gateway lacks in it.

Bounds on what a client may send, and for how long: heads, trailers, pipelined requests, silence. An upgrade that is
offered is ignored, as RFC 9110, section 7.8 allows; the parser would take the body for another protocol, and the
host for the next request. HTTP/1.0 clients get no chunks. A call when the client's socket is gone, where ASGI would
cost a task for each request. And answers written past ASGI: whole ones, and a stream's head with its first body bytes,
in one packet and one system call instead of two. The last two reach the app as the ASGI extension `lltm_ray`; it runs
without them elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from lltm_ray.gateway.upstream import Headers

EXTENSION = "lltm_ray"
HEAD_TIMEOUT_S = 30.0
"""From connecting, or a head's first byte, to its last: a head is one packet or a few, even over a poor line."""
BODY_TIMEOUT_S = 60.0
"""Longest silence within a body while we read: TCP's own retries of a lost packet are over by then."""
PIPELINE_LIMIT = 16
"""Requests that may wait behind the one that runs; clients that pipeline at all send fewer."""
_HEAD_SLACK_BYTES = 512 * 1024
"""More than one read may bring beyond the head; the app itself refuses heads over the limit with 431."""
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_log = logging.getLogger(__name__)


class _RefusedError(Exception):
    """Raised in a parser's callback to stop the parser; the connection is closed without a word."""


class CorkedTransport(asyncio.Transport):
    """A client's socket that can hold one write until the next one."""

    def __init__(self, inner: asyncio.Transport) -> None:
        super().__init__()
        self.inner = inner
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
            self.inner.write(held + data)
        else:
            self.inner.write(data)

    def close(self) -> None:
        """See `asyncio.BaseTransport`; what is held goes out first."""
        if self._held:
            held, self._held = self._held, b""
            self.inner.write(held)
        self.inner.close()


class GatewayProtocol(HttpToolsProtocol):
    """One client connection; a `replies.ClientLink` for the request that runs on it."""

    head_limit_bytes = 2**20
    _head_bytes = 0
    _is_in_head = False
    _is_in_body = False
    _is_in_trailer = False
    """Perhaps: a chunk's size came and no bytes of it yet; the last chunk has none, and trailers follow it."""
    _is_upgrade = False
    is_gone = False
    """The client left: what is written from now on reaches nobody."""
    _gone: Callable[[], None] | None = None
    _on_writable: Callable[[], None] | None = None
    _timer: asyncio.TimerHandle | None = None
    _due = 0.0

    def cork(self) -> None:
        """Hold the answer's head until its first body bytes, which must follow at once."""
        self._corked.cork()

    def answer(self, status: int, headers: Headers, body: bytes) -> bool:
        """Write a whole answer past ASGI, whose two messages and their checks cost 14 us more.

        Args:
            status: its status.
            headers: fit to be sent as they are, `content-length` among them.
            body: all of it.

        Returns:
            False where ASGI must do: the client is slow or gone, sent more requests, or its connection ends with this.
        """
        cycle = self.cycle
        is_ours = cycle.keep_alive and not (cycle.response_started or cycle.disconnected)
        if not is_ours or self.pipeline or self.flow.write_paused:
            return False
        parts = [STATUS_LINE[status]]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", body)
        self._corked.inner.write(b"".join(parts))
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        cycle.on_response()
        return True

    def pusher(self, on_writable: Callable[[], None]) -> Callable[[bytes], bool] | None:
        """A way to write parts of the running answer's body past ASGI, without a task's turn for each.

        Args:
            on_writable: called when a client that was too slow takes more again.

        Returns:
            Takes a part, which must not be empty, and tells whether the client takes more now. Not for a client that is
            gone. None where the body has a length or no frame, or where other requests stand behind this one: ASGI must
            do then.
        """
        cycle = self.cycle
        if self.pipeline or not cycle.response_started or cycle.response_complete or not cycle.chunked_encoding:
            return None
        self._on_writable = on_writable
        flow, write = self.flow, self._corked.inner.write  # the head and a first part have gone: nothing is held

        def push(part: bytes) -> bool:
            write(b"%x\r\n%b\r\n" % (len(part), part))
            return not flow.write_paused

        return push

    def when_gone(self, call: Callable[[], None] | None) -> None:
        """Call this when the client's socket is lost; None takes it back."""
        self._gone = call
        self._on_writable = None
        if call is not None and self.is_gone:
            self.loop.call_soon(call)

    # --- asyncio.Protocol

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._on_writable is not None:
            self._on_writable()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        self._corked = CorkedTransport(transport)
        self._extensions = {EXTENSION: self}
        super().connection_made(self._corked)
        self._expect_bytes(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._expect_nothing()
        super().connection_lost(exc)
        self._lose()

    def eof_received(self) -> None:
        """See `asyncio.Protocol`; the transport closes itself."""
        if self.cycle is not None:  # else uvicorn calls it an error that its answer has no end
            self.cycle.disconnected = True
        self._lose()

    def _lose(self) -> None:
        if not self.is_gone:
            self.is_gone = True
            if self._gone is not None:
                self._gone()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._break(error)
            return
        if self._is_in_head or self._is_in_trailer:
            self._head_bytes += len(data)
            if self._head_bytes > self.head_limit_bytes + _HEAD_SLACK_BYTES:
                self._close(_TOO_LARGE)
                return
        self._watch()

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade() + data[upgrade.args[0] :]
                self._is_upgrade = False
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _without_upgrade(self) -> bytes:
        """The head that was just parsed, for a new parser: the old one does not read this request's body."""
        version = self.parser.get_http_version().encode("ascii")
        parts = [self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                parts += (name, b": ", value, b"\r\n")
        return b"".join((*parts, b"\r\n"))

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are dropped, for the app has read the headers by then."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's head is whole; the app starts."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _RefusedError("CONNECT, which asks for a proxy")
            self._is_upgrade = True
            return
        if len(self.pipeline) >= PIPELINE_LIMIT:
            raise _RefusedError(f"more than {PIPELINE_LIMIT} pipelined requests")
        self._is_in_head, self._is_in_body = False, True
        self._expect_nothing()
        self.scope["extensions"] = self._extensions  # type: ignore[typeddict-item]
        super().on_headers_complete()
        if self.scope["http_version"] != "1.1":
            _end_by_close(self.cycle)

    def on_chunk_header(self) -> None:
        """A chunk's size; the last chunk's is followed by trailers."""
        self._is_in_trailer, self._head_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        """Body bytes."""
        self._is_in_trailer = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request's last byte."""
        if not self._is_upgrade:
            self._is_in_body = self._is_in_trailer = False
            self._expect_nothing()
            super().on_message_complete()

    # --- time

    def _watch(self) -> None:
        """After each read: what does the client owe us now?"""
        if self._is_in_body:
            self._expect_bytes(BODY_TIMEOUT_S)
        elif self._timer is None and (self._is_in_head or not self._is_answering()):
            self._expect_bytes(HEAD_TIMEOUT_S)  # once: a head's time runs from its start, however it drips

    def _expect_bytes(self, timeout_s: float) -> None:
        self._due = self.loop.time() + timeout_s
        if self._timer is None:
            self._timer = self.loop.call_later(timeout_s, self._check_time)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_time(self) -> None:
        self._timer = None
        if not (self._is_in_body or self._is_in_head) and self._is_answering():
            return
        if self.flow.read_paused or (self._is_in_head and self._is_answering()):
            self._expect_bytes(BODY_TIMEOUT_S if self._is_in_body else HEAD_TIMEOUT_S)  # we do not read: not its fault
            return
        left_s = self._due - self.loop.time()
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._check_time)
        elif not self.transport.is_closing():
            _log.info("closing a connection from %s: its request did not come in time", self.client)
            self._close(_TOO_SLOW if self._is_in_head or self._is_in_body else b"")

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # --- the end

    def _break(self, error: httptools.HttpParserError) -> None:
        refusal = error.__context__
        if isinstance(refusal, _RefusedError):
            _log.warning("closing a connection from %s: %s", self.client, refusal)
            self.transport.close()
        elif self._may_write():
            self.send_400_response("Invalid HTTP request received.")
        else:
            _log.warning("closing a connection from %s: %s", self.client, error)
            self.transport.close()

    def _close(self, answer: bytes) -> None:
        if answer and self._may_write():
            self.transport.write(answer)
        self.transport.close()

    def _may_write(self) -> bool:
        """Whether an answer of our own would not stand within, or before, or after another one."""
        if self.pipeline or self.cycle is None:
            return not self.pipeline
        if self._is_in_body:
            return not self.cycle.response_started
        return self.cycle.response_complete


def _end_by_close(cycle: RequestResponseCycle) -> None:
    """Answers of unknown length to HTTP/1.0 end with the connection: chunks are of HTTP/1.1 (RFC 9112, section 7.1)."""
    inner = cycle.send
    cycle.keep_alive = False
    is_unframed = False

    async def send(message: Any) -> None:
        nonlocal is_unframed
        if message["type"] == "http.response.start":
            is_unframed = not any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if is_unframed:
                cycle.chunked_encoding = False
        elif is_unframed:  # the host counts down to 0, and compares at the end
            cycle.expected_content_length = len(message.get("body", b"")) + bool(message.get("more_body"))
        await inner(message)

    cycle.send = send  # type: ignore[method-assign]
