"""Workloads on real engines. Each is data made from a seed, and one coroutine that plays it through a client.

The engines' model speaks one printable character a token and never ends by itself, so at temperature 0 the length of a
reply is known and its text can be compared.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

from .client import Client, Reply

WORDS = ("able", "acid", "area", "army", "away", "baby", "back", "ball", "band", "bank", "base", "bath", "bear", "beat")
Messages = list[dict[str, str]]


def filler(rng: random.Random, characters: int) -> str:
    """Text of so many characters, which are as many tokens; never the same twice."""
    words = [f"{rng.randrange(10**6):06d}"]
    while sum(map(len, words)) + len(words) < characters:
        words.append(rng.choice(WORDS))
    return " ".join(words)[:characters]


@dataclass(frozen=True)
class Session:
    """One conversation: when it starts, what it says, and how long its user thinks before each turn."""

    number: int
    start_s: float
    system: str
    turns: tuple[str, ...]
    thinks_s: tuple[float, ...]
    max_tokens: int


@dataclass(frozen=True)
class Conversations:
    """Sessions of several turns; each reply is appended verbatim."""

    sessions: tuple[Session, ...]

    async def play(self, client: Client, expected: dict[str, str] | None = None) -> None:
        """All sessions side by side."""
        await asyncio.gather(*(self._converse(session, client, expected) for session in self.sessions))

    async def recite(self, client: Client) -> None:
        """One session after the other, without pauses: the undisturbed run."""
        for session in self.sessions:
            await self._converse(replace(session, start_s=0.0, thinks_s=(0.0,) * len(session.turns)), client, None)

    async def _converse(self, session: Session, client: Client, expected: dict[str, str] | None) -> None:
        messages: Messages = [{"role": "system", "content": session.system}] if session.system else []
        await asyncio.sleep(session.start_s)
        for turn, (text, think_s) in enumerate(zip(session.turns, session.thinks_s, strict=True)):
            await asyncio.sleep(think_s)
            messages = [*messages, {"role": "user", "content": text}]
            reply = Reply(session.number, turn, messages, session.max_tokens)
            reply.expected = (expected or {}).get(key(messages))
            await client.chat(reply)
            messages = [*messages, {"role": "assistant", "content": reply.text}]
            if not reply.ok:
                return


def key(messages: Messages) -> str:
    """Names a prompt."""
    return "\x1f".join(f"{message['role']}\x1e{message['content']}" for message in messages)


def multi_turn(seed: int, *, quick: bool) -> Conversations:
    """16 sessions of 8 turns that grow from 400 to about 1,600 tokens, with pauses so that slots change hands."""
    rng, turns = random.Random(f"multi-turn {seed}"), 4 if quick else 8
    return Conversations(
        tuple(
            Session(
                number=number,
                start_s=rng.uniform(0.0, 0.4),
                system="",
                turns=(filler(rng, 400), *(filler(rng, 120) for _ in range(turns - 1))),
                thinks_s=tuple(rng.uniform(0.1, 0.5) for _ in range(turns)),
                max_tokens=32,
            )
            for number in range(16)
        )
    )


def shared_prompt(seed: int, *, quick: bool) -> Conversations:
    """64 sessions of 3 turns under one system prompt of 1,500 tokens, arriving one after the other."""
    rng, count = random.Random(f"shared {seed}"), 16 if quick else 64
    system = filler(rng, 1500)
    return Conversations(
        tuple(
            Session(
                number=number,
                start_s=number * 0.4,
                system=system,
                turns=tuple(filler(rng, 80) for _ in range(3)),
                thinks_s=(0.0, *(rng.uniform(0.2, 0.8) for _ in range(2))),
                max_tokens=16,
            )
            for number in range(count)
        )
    )


CONVERSATIONS = {"multi-turn": multi_turn, "shared-prompt": shared_prompt}
