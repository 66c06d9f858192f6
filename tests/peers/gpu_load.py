"""A client process that is never the bottleneck: `python -m tests.peers.gpu_load JOB.json`.

It tells `ready` by its stdout, begins with the first line of its stdin, and tells one JSON line when all is answered.
Nothing is parsed while the answers run: their bytes are kept, and read when the last of them is here.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

TIMEOUT_S = 60.0
_TEXT = re.compile(rb'"(?:content|reasoning_content)":"[^"]')
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)")
_END = b"\r\n0\r\n\r\n"


@dataclass(slots=True, kw_only=True)
class Answer:
    """What one request gave; times are monotonic seconds, which all processes of a machine share."""

    sent_s: float
    first_s: float | None = None
    """The first bytes with text."""
    ended_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    events: int = 0
    error: str = ""


class _Line(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.pieces: list[bytes] = []
        self.first_s: float | None = None
        self.done: asyncio.Future[None] | None = None
        self.is_open = False
        self.has_head = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)
        if self.first_s is None and _TEXT.search(data):
            self.first_s = time.monotonic()
        if not self.has_head:
            self.pieces = [b"".join(self.pieces)]
            self.has_head = b"\r\n\r\n" in self.pieces[0]
        if self.has_head and self._is_whole(data):
            self._finish()

    def _is_whole(self, data: bytes) -> bool:
        head, _, rest = self.pieces[0].partition(b"\r\n\r\n")
        if _is_streamed(head):
            tail = data if len(data) >= len(_END) else b"".join(self.pieces[-len(_END) :])
            return tail.endswith(_END)
        length = _LENGTH.search(head)
        return length is not None and len(rest) + sum(map(len, self.pieces[1:])) >= int(length[1])

    def connection_lost(self, _: Exception | None) -> None:
        self.is_open = False
        self._finish()

    def _finish(self) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(None)

    async def ask(self, request: bytes) -> bytes:
        """Send it; all bytes of the answer."""
        self.pieces, self.first_s, self.has_head = [], None, False
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        async with asyncio.timeout(TIMEOUT_S):
            await self.done
        return b"".join(self.pieces)


def _is_streamed(head: bytes) -> bool:
    return b"transfer-encoding: chunked" in head.lower()


async def _stream(port: int, requests: Iterator[bytes], found: list[tuple[Answer, bytes]]) -> None:
    """One user: the next request when the last is answered, over one connection while it stays open."""
    line = None
    for request in requests:
        answer, raw = Answer(sent_s=time.monotonic()), b""
        try:
            line, raw = await _ask(port, line, request)
            answer.first_s = line.first_s
        except (OSError, TimeoutError) as error:
            answer.error, line = f"{type(error).__name__}: {error}"[:100], None
        answer.ended_s = time.monotonic()
        found.append((answer, raw))


async def _ask(port: int, line: _Line | None, request: bytes) -> tuple[_Line, bytes]:
    """The answer and the connection it came by; one that was closed while idle is opened anew."""
    if line is not None and line.is_open and (raw := await line.ask(request)):
        return line, raw
    _, line = await asyncio.get_running_loop().create_connection(_Line, "127.0.0.1", port)
    return line, await line.ask(request)


def _body(raw: bytes) -> tuple[int, bytes]:
    """Status and de-chunked body."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    status = int(head[9:12] or 0)
    if not _is_streamed(head):
        return status, rest
    parts = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size.split(b";")[0] or b"0", 16)
        if not length:
            break
        parts.append(rest[:length])
        rest = rest[length + 2 :]
    return status, b"".join(parts)


def read(answer: Answer, raw: bytes) -> Answer:
    """Take its counts; a broken or refused one gets an error."""
    status, body = _body(raw) if raw else (0, b"")
    answer.events = body.count(b'"content":')
    counts = [line[5:] for line in body.split(b"\n") if line.startswith(b"data:") and b'"usage":{' in line]
    if status != 200:
        answer.error = answer.error or f"HTTP {status} {body[:100].decode(errors='replace')}"
    elif b"data: [DONE]" not in body or not counts:
        answer.error = answer.error or "the stream ended before [DONE]"
    else:
        told = json.loads(counts[-1])
        answer.prompt_tokens, answer.output_tokens = told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]
        answer.cached_tokens = (told.get("timings") or {}).get("cache_n", 0)
    return answer


def request_bytes(port: int, body: dict[str, Any]) -> bytes:
    """A whole HTTP request."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def play(port: int, bodies: list[dict[str, Any]], streams: int) -> list[Answer]:
    """All requests over so many streams."""
    requests = iter([request_bytes(port, body) for body in bodies])
    found: list[tuple[Answer, bytes]] = []
    await asyncio.to_thread(_say, "ready")
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(_stream(port, requests, found) for _ in range(streams)))
    return [read(answer, raw) for answer, raw in found]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Play the job of the command line."""
    job = json.loads(Path(sys.argv[1]).read_text())
    answers = uvloop.run(play(job["port"], job["bodies"], job["streams"]))
    _say(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
