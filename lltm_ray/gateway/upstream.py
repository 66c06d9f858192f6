"""Raw HTTP/1.1 to a llama-server: an asyncio protocol on httptools, one exchange at a time.

Body bytes are handed on as they came, one `bytes` per wake-up. What llama.cpp's server does and this file heeds: it
closes a connection after about 100 requests (with `Connection: close`) and, without saying so, after each chunked
answer; idle ones after 5 s; and it frees a slot when the connection of its request is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

import httptools

HIGH_WATER_BYTES = 256 * 1024
"""Unread body bytes above which the server is made to wait."""
MAX_HEAD_BYTES = 64 * 1024

Headers = list[tuple[bytes, bytes]]


class ConnectFailedError(ConnectionError):
    """Nobody answers at this address."""


class UpstreamBrokenError(ConnectionError):
    """The server closed, reset or garbled the connection before the end of its answer."""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time: `start`, `head`, then `read` until `b""`, or `pump`."""

    def __init__(self, forget: Callable[[Connection], None], url: str) -> None:
        self._forget = forget
        self.url = url
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._chunks: list[bytes] = []
        self.on_body = self._chunks.append  # the parser's callback: no Python of ours runs for a chunk
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._sink_error: Exception | None = None
        self._busy = False
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.content_length: int | None = None
        self.got_bytes = self.was_sent = False
        self._received_bytes = 0
        self._size_bytes = 0
        self._sink_error = None
        self._head_done = self._done = self._chunked = self._keep = self._paused = False
        self._error: ConnectionError | None = None

    # --- the exchange

    def start(self, request: Sequence[bytes]) -> None:
        """Send a whole request, head and body in one write."""
        self._reset()
        self._busy = True
        self.was_sent = self._transport is not None and not self._transport.is_closing()
        if self._transport is None or not self.was_sent:
            self._error = UpstreamBrokenError("the connection was closed while idle")
            return
        self._transport.writelines(request)

    async def head(self) -> None:
        """Wait for `status` and `headers`.

        Raises:
            UpstreamBrokenError: the connection ended before them, or they are not HTTP.
        """
        while not self._head_done:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def read(self) -> bytes:
        """All body bytes that have come, at least one; `b""` at the end of the body.

        Raises:
            UpstreamBrokenError: the connection ended before the body did.
        """
        while True:
            if self._chunks:
                data = self._take_chunks()
                self.unblock()
                return data
            if self._done:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()

    async def pump(self, sink: Callable[[bytes], bool]) -> bytes:
        """Hand what is left of the body to `sink` part by part, each in the very wake-up that brought it.

        Args:
            sink: takes a part; false makes the server wait until `unblock`. What it raises is raised here.

        Returns:
            The last part, so that the client's body can end in the same write.

        Raises:
            UpstreamBrokenError: as `read`.
        """
        self._sink = sink
        try:
            self.unblock()  # what came before us may have been too much at once, and nobody else would go on
            self._pour(sink)
            while not self._done:
                if self._error is not None:
                    raise self._sink_error or self._error
                await self._wait()
        finally:
            self._sink = None
        if self._sink_error is not None:
            raise self._sink_error
        return self._take_chunks()

    def unblock(self) -> None:
        """The sink takes more again."""
        was_paused, self._paused = self._paused, False
        if was_paused and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _take_chunks(self) -> bytes:
        data = b"".join(self._chunks)  # of one, it is that one
        self._chunks.clear()
        self._size_bytes = 0
        return data

    def _pour(self, sink: Callable[[bytes], bool]) -> None:
        chunks = self._chunks
        if not chunks or self._done:
            return
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        try:
            takes_more = sink(data)
        except Exception as error:  # noqa: BLE001 - raised again by `pump`; here it would end in the event loop's log
            self._sink_error = error
            self.abort()
            return
        if not takes_more and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    async def read_all(self, limit_bytes: int) -> bytes:
        """The rest of the body.

        Raises:
            UpstreamBrokenError: as `read`, or the body is longer than `limit_bytes`.
        """
        parts: list[bytes] = []
        size_bytes = 0
        while data := await self.read():
            size_bytes += len(data)
            if size_bytes > limit_bytes:
                self.abort()
                raise UpstreamBrokenError(f"the answer is longer than {limit_bytes} bytes")
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def is_drained(self) -> bool:
        """Whether the whole answer came in and was read."""
        return self._done and not self._chunks

    @property
    def is_reusable(self) -> bool:
        """Whether another request may follow, as far as the answer tells."""
        return self.is_drained and self._keep and self._transport is not None and not self._transport.is_closing()

    @property
    def is_chunked(self) -> bool:
        """Whether its last answer came in chunks, after which llama.cpp hangs up without having said so."""
        return self._chunked

    def park(self) -> None:
        """The exchange is over; what comes now is not ours."""
        self._busy = False
        self.idle_since = self._loop.time()

    def abort(self) -> None:
        """Close at once and drop what is unsent; llama.cpp frees the slot within one decode step."""
        self._fail(UpstreamBrokenError("aborted"))
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`; TCP_NODELAY is on by default in asyncio and uvloop for sockets they connect."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Feed the parser, then wake the reader once."""
        if not self._busy or self._done:
            self.abort()
            return
        self.got_bytes = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(UpstreamBrokenError(f"not an HTTP answer: {error}"))
            self.abort()
        if not self._head_done:
            self._received_bytes += len(data)
            if self._received_bytes > MAX_HEAD_BYTES:
                self._fail(UpstreamBrokenError(f"the answer's head is over {MAX_HEAD_BYTES} bytes"))
                self.abort()
        elif self._sink is not None:
            self._pour(self._sink)
            if not self._done and self._error is None:
                return
        else:
            self._size_bytes += len(data)
            if self._size_bytes > HIGH_WATER_BYTES and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone: an end only for a body that has no other end."""
        self._transport = None
        if not self._busy:
            self._forget(self)
            return
        unframed = self._head_done and not self._chunked and self.content_length is None
        if unframed and exc is None:
            self._done = True
        elif not self._done:
            self._fail(UpstreamBrokenError(f"closed before the end of the answer ({exc or 'end of stream'})"))
        self._wake()

    # --- httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, its name in lower case."""
        name = name.lower()
        if name == b"content-length":
            self.content_length = int(value)
        elif name == b"transfer-encoding":
            self._chunked = b"chunked" in value.lower()
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Note the status; an interim 1xx answer is dropped."""
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = []
            return
        self.status = status
        self._keep = self._parser.should_keep_alive()
        self._head_done = True

    def on_message_complete(self) -> None:
        """The answer ended where it said it would."""
        self._done = self._head_done

    # --- inside

    def _fail(self, error: ConnectionError) -> None:
        if self._error is None and not self._done:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


@lru_cache(maxsize=1024)
def origin(url: str) -> tuple[str, int, bytes]:
    """Host, port and `Host` header value of a base URL such as `http://127.0.0.1:8080`."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80, parts.netloc.encode("ascii")
