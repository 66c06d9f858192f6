"""Prompts for load tests: unique each, and of about so many tokens. Pure.

A prompt is a row of short English words. Its first four words spell its number (in base 64, lowest digit first), so
any two prompts of a run differ from their first words on and no prefix cache helps; the rest is a seeded shuffle.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

_TEXT = (
    "able acid also area army away baby back ball band bank base bath bear beat been beer bell belt best bill "
    "bird blow blue boat body bone book both bowl bulk burn bush busy call calm came camp card care case cash "
    "cast cell chat chip city club coal coat code cold come cook cool cope copy core cost crew crop dark data date "
)
WORDS = tuple(_TEXT.split())
"""64 of them: six bits of a number each."""
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes prompts of `words` words (at least four, to be unique for 16 million of them)."""

    words: int
    seed: int
    _pool: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)  # noqa: S311 - filler, not secrets
        object.__setattr__(self, "_pool", rng.choices(WORDS, k=2 * self.words + 64))

    @classmethod
    def sized(cls, tokens: int, seed: int, seen: Mapping[int, int]) -> PromptMaker:
        """Size prompts to about `tokens`, the chat template's own included.

        Args:
            tokens: what the server should count.
            seed: of the words.
            seen: prompt tokens that the server counted for two prompts, by their words; zeros (a server that counts
                none) take a word for a token, which is near the truth for vocabularies of 32,000 and more.
        """
        (few, few_tokens), (many, many_tokens) = sorted(seen.items())
        per_word = (many_tokens - few_tokens) / (many - few)
        if per_word <= 0:
            return cls(max(_DIGITS, tokens), seed)
        template_tokens = few_tokens - per_word * few
        return cls(max(_DIGITS, round((tokens - template_tokens) / per_word)), seed)

    def make(self, number: int) -> str:
        """The prompt of this number."""
        value = number + self.seed * 1_000_003
        digits = [WORDS[(value >> 6 * place) % 64] for place in range(_DIGITS)]
        start = number % (self.words + 64)
        return " ".join(digits + self._pool[start : start + self.words - _DIGITS])
