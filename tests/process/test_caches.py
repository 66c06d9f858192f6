"""What the router promises of a real server's caches, and what that server then finds there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from gateway_harness import MODEL, Gateway, gateway, real_engine

from lltm_ray.config import SIMILARITY_RATIO

SESSIONS, TURNS, SLOTS = 5, 4, 2
SYSTEM = "You answer briefly and never guess. " * 30


@dataclass
class Session:
    """A chat under the system prompt of all."""

    number: int
    messages: list[dict[str, str]] = field(default_factory=lambda: [{"role": "system", "content": SYSTEM}])
    known_tokens: int = 0
    """Length of its last prompt, all of which the server has computed for it."""

    async def ask(self, gate: Gateway, turn: int) -> tuple[int, int, int]:
        """One turn: tokens known before it, those that the router promised to be cached, and those that were."""
        text = f"Session {self.number}, question {turn}: " + f"{self.number}{turn} " * 50
        self.messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {"model": MODEL, "messages": self.messages, "max_tokens": 12, "temperature": 0}
        async with gate.http.post(f"{gate.url}/v1/chat/completions", json=body) as reply:
            answer = await reply.json()
        self.messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        told, known = answer["timings"], self.known_tokens
        self.known_tokens = told["cache_n"] + told["prompt_n"]
        return known, int(reply.headers["x-lltm-cached"].partition("/")[0]), told["cache_n"]


async def play(gate: Gateway) -> list[tuple[int, int, int]]:
    """All sessions in turns: when one comes back, others have taken its slot. All but the first turns."""
    sessions = [Session(number) for number in range(SESSIONS)]
    turns = [await session.ask(gate, turn) for turn in range(TURNS) for session in sessions]
    return turns[SESSIONS:]


@pytest.mark.parametrize("similarity", [0.0, 0.1, SIMILARITY_RATIO, 1.0])
async def test_what_is_promised_to_be_cached_is_what_a_server_finds_by_any_rule(tiny, tmp_path, similarity):
    with real_engine("e0", tiny, tmp_path, slots=SLOTS, similarity=similarity) as engine:
        async with gateway(engine.info) as gate:
            turns = await play(gate)
    assert max(abs(promised - found) for _, promised, found in turns) <= 24, "2 % of a prompt, an eighth of a turn"


async def test_a_session_under_a_shared_system_prompt_finds_its_last_turn_though_its_slot_was_taken(tiny, tmp_path):
    with real_engine("e0", tiny, tmp_path, slots=SLOTS, similarity=SIMILARITY_RATIO) as engine:
        async with gateway(engine.info) as gate:
            turns = await play(gate)
    assert all(found >= known - 16 > 1000 for known, _, found in turns)
