"""What analytics told a router, as its next decisions need it. Routing is right without: a hint only tips a choice.

Beginnings of prompts that other gateways have seen are known here too.
"""

from __future__ import annotations

import asyncio

from lltm_ray._prefix import END_BYTES, HASH_BYTES, hash_prefixes
from lltm_ray.records import Hints
from lltm_ray.routing.choice import Ask, Matches


class Advice:
    """Hints as one router uses them.

    Args:
        hints: as analytics made them.
        salt: what its prompts' beginnings were hashed with.
    """

    def __init__(self, hints: Hints, salt: bytes) -> None:
        self._families = {(family.end_bytes, family.hash): family.engines for family in hints.families}
        self._salt = salt
        self._most_bytes = max((family.end_bytes for family in hints.families), default=0)

    def widen(self, ask: Ask, matches: Matches) -> Matches:
        """The matches; where there are none, engines that other gateways know to hold a beginning of this prompt.

        What this router knows by itself is newer. A hinted beginning is shared: one more copy of it costs little.
        """
        if matches or not self._families or len(ask.key) < END_BYTES[0]:
            return matches
        if ask.hashes is None:  # a request that waits is looked at again and again
            ask.hashes = hash_prefixes(ask.key[: self._most_bytes], self._salt)
        best: dict[str, int] = {}
        for depth in range(len(ask.hashes) // HASH_BYTES):
            at = END_BYTES[depth], ask.hashes[depth * HASH_BYTES : (depth + 1) * HASH_BYTES]
            for engine, tokens in self._families.get(at, ()):
                best[engine] = max(best.get(engine, 0), min(tokens, ask.prompt_tokens or tokens))
        ask.shared_tokens = max(ask.shared_tokens, *best.values(), 0)
        return sorted(best.items(), key=lambda each: -each[1])


class Counsel:
    """A router's advice now: the last it was given, as long as that is valid. For one event loop."""

    def __init__(self) -> None:
        self.advice: Advice | None = None
        self._made_unix_nano = 0
        self._end: asyncio.TimerHandle | None = None

    def take(self, hints: Hints, salt: bytes) -> None:
        """Newer hints; those it has already are valid no longer than they were."""
        if hints.made_unix_nano == self._made_unix_nano:
            return
        self._made_unix_nano = hints.made_unix_nano
        if self._end is not None:
            self._end.cancel()
        self.advice = Advice(hints, salt)
        self._end = asyncio.get_running_loop().call_later(hints.valid_s, self._forget)

    def _forget(self) -> None:
        self.advice = None
