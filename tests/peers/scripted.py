"""Servers with llama-server's face and a speed that is known: prompts one after the other, tokens at a fixed pace.

`python -m tests.peers.scripted SLOTS COUNT`: so many of them in one process; tells their URLs as one JSON line. One
character is one token, prompts are computed one after the other, and `GET /stats` says what was done.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

PREFILL_TOKENS_S = 4000.0
TOKEN_S = 0.012
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_COMMON = {"created": 1, "id": "c", "model": "bench", "system_fingerprint": "b", "object": "chat.completion.chunk"}


@dataclass
class Scripted:
    """One such server.

    Args:
        slots: more requests than that at a time wait, and are counted.
    """

    slots: int
    busy: int = 0
    most: int = 0
    """Most requests that were there at a time."""
    served: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    url: str = ""
    together: list[int] = field(default_factory=list)
    """For each long prompt, how many decoded while it was computed."""
    _since_s: float = 0.0
    _prefilling: asyncio.Lock = field(default_factory=asyncio.Lock)
    _decoding: int = 0
    _room: asyncio.Semaphore = field(init=False)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.slots)

    async def start(self) -> str:
        """Listen; its URL."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self.url

    async def close(self) -> None:
        """Hang up on everybody."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    def stats(self) -> dict[str, Any]:
        """What was done so far, and `at_s`: its clock."""
        self._count(0)
        return {
            "busy_s": self.busy_s,
            "most": self.most,
            "served": self.served,
            "tokens": self.tokens,
            "at_s": time.monotonic(),
        }

    def _count(self, change: int) -> None:
        now_s = time.monotonic()
        self.busy_s += min(self.busy, self.slots) * (now_s - self._since_s) if self._since_s else 0.0
        self._since_s = now_s
        self.busy += change
        self.most = max(self.most, self.busy)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    _send_json(writer, self.stats())
                    continue
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await self._answer(json.loads(await reader.readexactly(length)), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # its client left
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self._count(1)
        try:
            async with self._room:
                await self._generate(body, writer)
        finally:
            self._count(-1)

    async def _generate(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        prompt = sum(len(message["content"]) for message in body["messages"])
        began_s = time.monotonic()
        async with self._prefilling:
            if prompt >= 512:
                self.together.append(self._decoding)
            await asyncio.sleep(prompt / PREFILL_TOKENS_S)
        prefilled_s = time.monotonic()
        writer.write(_HEAD)
        self._decoding += 1
        try:
            for number in range(body["max_tokens"]):
                await asyncio.sleep(max(0.0, prefilled_s + number * TOKEN_S - time.monotonic()))
                _send(writer, {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": "x"}}], **_COMMON})
                await writer.drain()
        finally:
            self._decoding -= 1
        timings = {
            "cache_n": 0,
            "prompt_n": prompt,
            "prompt_ms": (prefilled_s - began_s) * 1e3,
            "predicted_n": body["max_tokens"],
            "predicted_ms": (time.monotonic() - prefilled_s) * 1e3,
        }
        self.served += 1
        self.tokens += prompt + body["max_tokens"]
        last = {"choices": [{"finish_reason": "length", "index": 0, "delta": {}}], **_COMMON, "timings": timings}
        _send(writer, last)
        text = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text))


def _send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    text = b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode()
    writer.write(b"%x\r\n%b\r\n" % (len(text), text))


def _send_json(writer: asyncio.StreamWriter, value: Any) -> None:
    text = json.dumps(value).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text) + text)


async def _main(slots: int, count: int) -> None:
    servers = [Scripted(slots) for _ in range(count)]
    urls = [await server.start() for server in servers]
    sys.stdout.write(json.dumps(urls) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
