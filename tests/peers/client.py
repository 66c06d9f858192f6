"""The one client of all workloads on real engines: streamed chats over raw sockets, every answer checked.

Connections are kept open where the other side keeps them; one that was closed while idle is opened anew, as any HTTP
client does. Times include connecting. TTFT ends with the first event that has text.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

LIMIT_BYTES = 2**20
TIMEOUT_S = 60.0


@dataclass
class Reply:
    """One request and what came of it."""

    session: int
    turn: int
    messages: list[dict[str, str]]
    max_tokens: int
    kind: str = ""
    sent_s: float = 0.0
    """Monotonic."""
    ttft_s: float | None = None
    took_s: float = 0.0
    status: int = 0
    text: str = ""
    pieces: int = 0
    gap_s: float = 0.0
    """Longest pause between two events with text."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """`timings.cache_n`; None where the peer drops it."""
    output_tokens: int | None = None
    error: str = ""
    aborted: bool = False
    expected: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it came whole."""
        return not self.error and not self.aborted


class _BrokenError(Exception):
    """The answer cannot be read to its end."""


@dataclass
class _Line:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False


@dataclass
class Client:
    """Asks a front, or several engines in turns.

    Args:
        ports: where; several are used round robin.
        hints: also say who asks: `user` in the body and an `X-Session-ID` header.
    """

    ports: tuple[int, ...]
    hints: bool = False
    replies: list[Reply] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request's body."""
    _idle: dict[int, list[_Line]] = field(default_factory=dict)
    _turn: int = 0

    async def chat(self, reply: Reply, *, abort_after: int | None = None) -> Reply:
        """Send one request and read its answer into `reply`; never raises for what the other side does."""
        self.replies.append(reply)
        port = self.ports[self._turn % len(self.ports)]
        self._turn += 1
        reply.sent_s = time.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._exchange(port, reply, abort_after)
        except TimeoutError:
            reply.error = f"no end within {TIMEOUT_S:.0f} s"
        except (OSError, _BrokenError, asyncio.IncompleteReadError, ValueError) as error:
            reply.error = f"{type(error).__name__}: {error}"[:200]
        reply.took_s = time.monotonic() - reply.sent_s
        return reply

    def close(self) -> None:
        """Let all connections go."""
        for lines in self._idle.values():
            for line in lines:
                line.writer.transport.abort()
        self._idle.clear()

    async def _exchange(self, port: int, reply: Reply, abort_after: int | None) -> None:
        data = self._request(port, reply)
        while True:
            line = await self._open(port)
            try:
                line.writer.write(data)
                head = await line.reader.readuntil(b"\r\n\r\n")
                break
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                line.writer.transport.abort()
                if not line.used or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                    raise
        done = False
        try:
            done = await _read(line.reader, head, reply, abort_after)
        finally:
            line.used = True
            if done and b"connection: close" not in head.lower():
                self._idle.setdefault(port, []).append(line)
            else:
                line.writer.transport.abort()

    async def _open(self, port: int) -> _Line:
        idle = self._idle.get(port, [])
        while idle:
            line = idle.pop()
            if not (line.reader.at_eof() or line.writer.is_closing()):
                return line
            line.writer.transport.abort()
        return _Line(*await asyncio.open_connection("127.0.0.1", port, limit=LIMIT_BYTES))

    def _request(self, port: int, reply: Reply) -> bytes:
        body: dict[str, Any] = {
            "model": "bench",
            "messages": reply.messages,
            "max_tokens": reply.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        hint = ""
        if self.hints:
            body["user"] = f"session-{reply.session}"
            hint = f"X-Session-ID: session-{reply.session}\r\n"
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        return f"{head}{hint}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def _read(reader: asyncio.StreamReader, head: bytes, reply: Reply, abort_after: int | None) -> bool:
    """The rest of an answer; whether the connection can be used again."""
    reply.status = int(head[9:12])
    events = _Events(reply)
    async for piece in _body(reader, head.lower()):
        events.feed(piece)
        if abort_after is not None and reply.pieces >= abort_after:
            reply.aborted = True
            return False
    if reply.status != 200:
        raise _BrokenError(f"HTTP {reply.status} {events.rest[:120].decode(errors='replace')}")
    if not events.ended:
        raise _BrokenError("the stream ended before [DONE]")
    return b"transfer-encoding" in head.lower() or b"content-length" in head.lower()


async def _body(reader: asyncio.StreamReader, head: bytes) -> Any:
    if b"transfer-encoding: chunked" in head:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
    elif b"content-length:" in head:
        yield await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
    else:
        while piece := await reader.read(65536):
            yield piece


class _Events:
    """Reads SSE events into a reply."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.rest = b""
        self.ended = False
        self._last_s = 0.0

    def feed(self, piece: bytes) -> None:
        *lines, self.rest = (self.rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip())

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        event, reply = json.loads(data), self.reply
        if "error" in event:
            raise _BrokenError(f"error event: {event['error']!r:.150}")
        for choice in event.get("choices") or ():
            text = choice.get("delta", {}).get("content")
            if text:
                self._note(text)
        if usage := event.get("usage"):
            reply.prompt_tokens = usage["prompt_tokens"]
            reply.output_tokens = usage["completion_tokens"]
        if timings := event.get("timings"):
            reply.cached_tokens = timings["cache_n"]
            reply.output_tokens = timings["predicted_n"]
            reply.prompt_tokens = timings["cache_n"] + timings["prompt_n"]

    def _note(self, text: str) -> None:
        now, reply = time.monotonic(), self.reply
        if reply.ttft_s is None:
            reply.ttft_s = now - reply.sent_s
        else:
            reply.gap_s = max(reply.gap_s, now - self._last_s)
        self._last_s = now
        reply.text += text
        reply.pieces += 1
