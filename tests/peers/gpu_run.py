"""What every run on GPUs shares: its scale, its time, its prompts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import Client
from .engines import Server
from .figures import Row
from .gpu_fleet import Front, Host
from .workloads import WORDS

CHAT = {"temperature": 0, "ignore_eos": True}
ENGINES = 4
Save = Callable[[str, Row], None]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    streams: int = 64
    """Of `single`: as many as its engine has slots."""
    requests: int = 256
    warm_up: int = 64
    pairs: int = 3
    ask_tokens: tuple[int, int] = (128, 128)
    """Prompt and output of each request of `single`."""
    clients: int = 2
    slots: int = 8
    slot_tokens: int = 8192
    cache_ram_mib: int = 8192
    sessions: tuple[int, ...] = (32, 64)
    turns: int = 8
    turn_tokens: tuple[int, int, int] = (1500, 200, 64)
    """First message, each later one, each reply."""
    think_s: tuple[float, float] = (0.2, 0.7)
    rounds: int = 2
    kill_streams: int = 64
    kill_slots: int = 16
    kill_tokens: tuple[int, int] = (200, 256)


FULL = Scale()
QUICK = Scale(
    streams=8,
    requests=16,
    warm_up=8,
    pairs=2,
    ask_tokens=(64, 24),
    slots=2,
    slot_tokens=2048,
    cache_ram_mib=256,
    sessions=(4, 12),
    turns=3,
    turn_tokens=(300, 60, 16),
    think_s=(0.1, 0.3),
    rounds=1,
    kill_streams=8,
    kill_slots=3,
    kill_tokens=(64, 160),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every part is told."""

    host: Host
    scale: Scale
    folder: Path
    deadline: float
    """Monotonic: nothing new is begun after it, and what runs is cut."""
    save: Save
    seed: int = 1

    @property
    def left_s(self) -> float:
        """Until the deadline.

        Raises:
            TimeoutError: it is over.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the part's time is over")
        return left


def filler(rng: random.Random, server: Server, tokens: int) -> str:
    """Text of about so many tokens of this server's model, never the same twice."""
    size = max(1, round(tokens / tokens_per_word(server)))
    return " ".join([f"{rng.randrange(10**6):06d}", *rng.choices(WORDS, k=size)])


_SIZES: dict[str, float] = {}


def tokens_per_word(server: Server) -> float:
    """One for a real vocabulary, five for the tiny model's."""
    if server.url not in _SIZES:
        told = server.get("/tokenize", {"content": " ".join(WORDS * 4)})
        _SIZES[server.url] = len(told["tokens"]) / (4 * len(WORDS))
    return _SIZES[server.url]


async def within(play: Coroutine[Any, Any, object], client: Client, limit_s: float) -> bool:
    """Play; whether it had to be cut."""
    try:
        async with asyncio.timeout(limit_s):
            await play
        return False
    except TimeoutError:
        return True
    finally:
        client.close()


def told(front: Front) -> Row:
    """What our router learnt."""
    status = Server(f"http://127.0.0.1:{front.port}", 0).get("/lltm/status")
    learnt = status["router"]["models"]["bench"]
    names = ("n", "predicted_tokens", "actual_tokens", "median_error_ratio", "reply_retention", "ram_trust", "is_off")
    return {"residency": {name: learnt["residency"][name] for name in names}, "ledger": status["ledger"]}
