"""What analytics told a router, as its next decisions need it. Routing is right without: a hint only tips a choice.

Three kinds, all of them soft (an engine that is avoided is still taken when no other has a free slot): engines that are
slower than their peers are spared, except for a few requests that show whether they still are; beginnings of prompts
that other gateways have seen are known here too; tenants whose long prompts hold others up keep to some engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from lltm_ray._prefix import END_BYTES, HASH_BYTES, hash_prefixes
from lltm_ray.records import Hints
from lltm_ray.routing.choice import Ask, Matches
from lltm_ray.routing.table import LONG_PREFILL_TOKENS

PROBE_EVERY = 16
"""One request in so many goes to a slow engine as if it were none: else nobody would see it recover."""


class Advice:
    """Hints as one router uses them.

    Args:
        hints: as analytics made them.
        salt: what its prompts' beginnings were hashed with.
    """

    def __init__(self, hints: Hints, salt: bytes) -> None:
        self._slow = frozenset(hints.slow)
        self._apart = {tenant: frozenset(engines) for tenant, engines in hints.apart.items()}
        self._families = {(family.end_bytes, family.hash): family.engines for family in hints.families}
        self._salt = salt
        self._most_bytes = max((family.end_bytes for family in hints.families), default=0)

    def avoid(self, ask: Ask, engines: Collection[str], uncached_tokens: int) -> frozenset[str]:
        """Engines that this request had better not take.

        Args:
            ask: the request, its arrival known.
            engines: of its model, that can take requests.
            uncached_tokens: what would have to be computed of its prompt, at best.
        """
        found: frozenset[str] = frozenset()
        if self._apart and uncached_tokens >= LONG_PREFILL_TOKENS and (own := self._apart.get(ask.tenant)):
            every = frozenset(engines)
            if not own.isdisjoint(every):  # else they are of another model
                found = every - own
        if self._slow and not _is_probe(ask):
            found |= self._slow
        return found

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


def _is_probe(ask: Ask) -> bool:
    """By the request's arrival alone: however often it is looked at, the answer is the same."""
    return int(ask.arrived_s * 1e6) % PROBE_EVERY == 0
