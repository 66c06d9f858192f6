"""Synthetic traces: five kinds of load, seeded, made while they are read, so that their length costs no memory.

What a session says is never stored: it is drawn anew from the seed and the session's number for each turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import shake_128
from heapq import heappop, heappush
from math import inf
from random import Random

from lltm_ray.errors import ConfigError
from lltm_ray.routing.replay.simulated import BLOCK_BYTES, EngineSpec
from lltm_ray.routing.replay.trace import Arrival

__all__ = ["BLOCK_TOKENS", "KINDS", "Shape", "request_rate", "shape_of", "synthetic"]

BLOCK_TOKENS = 16
"""Tokens of one block in synthetic traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What sessions look like. Lengths are in tokens, rounded to whole blocks of 16, and vary by `spread`.

    Raises:
        ConfigError: a value that is out of its range.
    """

    system_tokens: int = 0
    """Shared by all sessions."""
    first_tokens: int = 512
    """The first turn's own."""
    turn_tokens: int = 64
    """Each further turn's own."""
    output_tokens: int = 128
    turns: int = 1
    spread: float = 0.0
    """Each length is drawn evenly from 1 - spread to 1 + spread times its mean."""
    pause_s: float = 1.0
    """Mean think time between turns, exponential."""
    long_ratio: float = 0.0
    """Share of sessions that begin with `long_tokens` instead and get a short answer of 16 tokens."""
    long_tokens: int = 8192
    tenants: int = 1
    """The first one sends half of all, the others share the rest."""
    allowance_s: float = inf
    """Until an answer must have begun."""
    load: float = 0.7
    """Requests offered, as a share of what the fleet could do without any reuse within sessions."""

    def __post_init__(self) -> None:
        for name in ("first_tokens", "turn_tokens", "output_tokens", "turns", "tenants"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        for name in ("allowance_s", "load"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be above 0")
        for name, most in (("spread", 1.0), ("long_ratio", 1.0), ("pause_s", inf), ("system_tokens", inf)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(name, getattr(self, name), f"must be from 0 to {most:g}")

    @property
    def mean_prompt_tokens(self) -> float:
        """Of all turns, what is cached included."""
        own = self.long_ratio * self.long_tokens + (1 - self.long_ratio) * self.first_tokens
        return self.system_tokens + own + (self.turns - 1) / 2 * (self.turn_tokens + self.output_tokens)


_SHAPES = {
    "multi-turn": Shape(first_tokens=512, turn_tokens=64, output_tokens=128, turns=8, spread=0.5),
    "shared-prompt": Shape(system_tokens=2048, first_tokens=64, turns=2, spread=0.5),
    "unique": Shape(first_tokens=1024, spread=0.5),
    "mixed": Shape(first_tokens=128, output_tokens=64, spread=0.5, long_ratio=0.2),
    "overload": Shape(first_tokens=512, output_tokens=128, spread=0.5, tenants=8, allowance_s=2.0, load=1.5),
}
KINDS: tuple[str, ...] = tuple(_SHAPES)
"""Names of all kinds."""


def shape_of(kind: str, **changes: float | None) -> Shape:
    """The shape of a kind, with some fields changed; None leaves a field as it is.

    Raises:
        ConfigError: no such kind, or a value that is out of its range.
    """
    if kind not in _SHAPES:
        raise ConfigError("synthetic", kind, f"no such kind; known are {', '.join(KINDS)}")
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(_SHAPES[kind], **given)  # type: ignore[arg-type]


def request_rate(shape: Shape, engines: int, spec: EngineSpec) -> float:
    """Requests a second that make the shape's load on such a fleet."""
    output = shape.output_tokens * (1 - shape.long_ratio) + BLOCK_TOKENS * shape.long_ratio
    computed = shape.mean_prompt_tokens if shape.turns == 1 else shape.first_tokens + shape.turn_tokens
    return shape.load * engines * spec.requests_s(computed, output)


def synthetic(shape: Shape, *, requests: int, requests_s: float, seed: int) -> Iterator[Arrival]:
    """The requests of a synthetic trace in order of arrival; sessions begin as a Poisson process.

    Args:
        shape: of the sessions.
        requests: how many; the last sessions may be cut short.
        requests_s: how many a second on the mean.
        seed: the same seed makes the same trace.
    """
    draw = Random(seed)  # noqa: S311 - no secrets are made of it
    system = _blocks(seed, -1, shape.system_tokens // BLOCK_TOKENS)
    # time, number of the session, turn
    due: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    begun = 1
    for _ in range(requests):
        now_s, session, turn = heappop(due)
        if not turn:
            heappush(due, (now_s + draw.expovariate(requests_s / shape.turns), begun, 0))
            begun += 1
        talk = _Talk(shape, seed, session)
        pause_s = draw.expovariate(1 / shape.pause_s) if shape.pause_s else 0.0
        if turn + 1 < shape.turns:
            # the answer takes its time, too; `pause_s` holds the turn back where it takes longer
            heappush(due, (now_s + pause_s + 0.1, session, turn + 1))
        yield talk.turn(now_s, turn, system, pause_s)


class _Talk:
    """One session, drawn from the seed."""

    def __init__(self, shape: Shape, seed: int, session: int) -> None:
        self._shape, self._seed, self._session = shape, seed, session
        self._lengths = Random(seed << 32 ^ session)  # noqa: S311 - no secrets are made of it

    def turn(self, now_s: float, turn: int, system: bytes, pause_s: float) -> Arrival:
        """Its request number `turn`, from 0."""
        shape = self._shape
        is_long = self._lengths.random() < shape.long_ratio
        asked, answered = self._size(shape.long_tokens if is_long else shape.first_tokens), 0
        for number in range(turn + 1):
            asked += answered + (self._size(shape.turn_tokens) if number else 0)
            answered = 1 if is_long else self._size(shape.output_tokens)
        own = _blocks(self._seed, self._session, asked + answered)
        key = system + own[: asked * BLOCK_BYTES]
        heavy = self._session % 2 if shape.tenants > 1 else 0
        return Arrival(
            arrived_s=now_s,
            key=key,
            reply=own[asked * BLOCK_BYTES :],
            prompt_tokens=len(key) // BLOCK_BYTES * BLOCK_TOKENS,
            output_tokens=answered * BLOCK_TOKENS + 1,
            max_tokens=answered * BLOCK_TOKENS + 1,
            tenant=f"tenant-{1 + self._session // 2 % (shape.tenants - 1) if heavy else 0}",
            session=f"session-{self._session}" if shape.turns > 1 else "",
            allowance_s=shape.allowance_s,
            pause_s=pause_s if turn else None,
        )

    def _size(self, tokens: int) -> int:
        """A length in blocks."""
        ratio = 1 + self._shape.spread * (2 * self._lengths.random() - 1)
        return max(1, round(ratio * tokens / BLOCK_TOKENS))


def _blocks(seed: int, session: int, count: int) -> bytes:
    """The first so many block ids of what a session says."""
    return shake_128(f"{seed} {session}".encode()).digest(count * BLOCK_BYTES)
