"""Prompts that share beginnings, as those of chats and agents do. Pure.

Conversations take turns: each prompt is the last one of its conversation and some words more, which stand for the
answer and the next question. All begin with the same words, a system prompt. So an engine that kept the last turn, or
at least the beginning, computes only the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from lltm_ray.load.prompts import PromptMaker

_SHARED_SEED = 7


class Prompts(Protocol):
    """What a run sends."""

    def make(self, number: int) -> str:
        """The prompt of this number."""


@dataclass(frozen=True, slots=True)
class ConversationPrompts:
    """Makes the prompts of `sessions` conversations at a time; lengths in words."""

    shared: int
    first: int
    grown: int
    """A turn adds so many."""
    turns: int
    sessions: int
    seed: int
    _own: PromptMaker = field(init=False, repr=False, compare=False)
    _beginning: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        longest = self.first + self.grown * (self.turns - 1)
        object.__setattr__(self, "_own", PromptMaker(longest, self.seed))
        shared = PromptMaker(self.shared, _SHARED_SEED).make(0).split()[: self.shared]
        object.__setattr__(self, "_beginning", " ".join(shared))

    @classmethod
    def sized(cls, longest: PromptMaker, shape: Shape) -> ConversationPrompts:
        """Lengths in words from a maker of prompts that are as long as a conversation's last one."""
        words = longest.words / shape.longest_tokens
        return cls(
            shared=round(words * shape.shared_tokens),
            first=max(4, round(words * shape.question_tokens)),
            grown=round(words * shape.grown_tokens),
            turns=shape.turns,
            sessions=shape.sessions,
            seed=longest.seed,
        )

    def make(self, number: int) -> str:
        """The prompt of this number; conversations are at different turns, as those of many people are."""
        wave, session = divmod(number, self.sessions)
        generation, turn = divmod(wave + session, self.turns)
        own = self._own.make(generation * self.sessions + session).split()[: self.first + self.grown * turn]
        return " ".join([self._beginning, *own]).lstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Lengths in tokens."""

    shared_tokens: int
    question_tokens: int
    grown_tokens: int
    turns: int
    sessions: int

    @property
    def longest_tokens(self) -> int:
        """A conversation's last prompt."""
        return self.shared_tokens + self.question_tokens + self.grown_tokens * (self.turns - 1)
