"""Clients that never stop asking, and remember what became of every request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp

from tests.ray.conftest import HI


@dataclass(frozen=True)
class Outcome:
    """One request. `engine` is known once headers came; `got_bytes` whether any of an answer did, which no error is."""

    began: float
    ended: float
    engine: str
    error: str
    got_bytes: bool


class Load:
    """`clients` closed loops over one endpoint, half of them streaming, until the context ends."""

    def __init__(self, url: str, clients: int = 16) -> None:
        self.outcomes: list[Outcome] = []
        self._url = f"{url}/v1/chat/completions"
        self._clients = clients
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> Load:
        self._thread.start()
        self.wait_for(self._clients)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(110)
        assert not self._thread.is_alive(), "a client still waits for its answer"

    def wait_for(self, more: int, timeout_s: float = 60.0) -> None:
        """Until so many more requests have ended well."""
        goal = self.succeeded() + more
        deadline = time.monotonic() + timeout_s
        while self.succeeded() < goal:
            assert time.monotonic() < deadline, f"no progress: {Counter(out.error for out in self.outcomes)}"
            time.sleep(0.02)

    def succeeded(self) -> int:
        return sum(not outcome.error for outcome in self.outcomes)

    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error]

    async def _main(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=100)) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(self._clients)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            body = {"messages": HI, "max_tokens": 48, "ignore_eos": True, "seed": number, "stream": bool(number % 2)}
            self.outcomes.append(await self._ask(session, body))
            if self.outcomes[-1].error:
                await asyncio.sleep(0.1)  # a broken fleet is not helped by a busy loop

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, object]) -> Outcome:
        began, engine, error, got = time.monotonic(), "", "", False
        try:
            async with session.post(self._url, json=body) as answer:
                engine = answer.headers.get("x-lltm-engine", "")
                text = b""
                async for piece in answer.content.iter_any():
                    got, text = answer.status == 200, text + piece
                if answer.status != 200:
                    error = f"{answer.status}: {text[:200]!r}"
                elif body["stream"] and b"data: [DONE]" not in text:
                    error = "the stream ended without its end"
        except (aiohttp.ClientError, TimeoutError) as caught:
            error = type(caught).__name__
        return Outcome(began, time.monotonic(), engine, error, got)
