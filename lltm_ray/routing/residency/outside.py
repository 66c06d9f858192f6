"""What is known of slots otherwise than by this router's own replies: other routers' word, and the servers' own."""

from __future__ import annotations

from lltm_ray.routing.residency.calibration import Calibration
from lltm_ray.routing.residency.holdings import Holdings
from lltm_ray.routing.residency.radix import Sequence

LEAST_SEQUENCE_TOKENS = 32
"""Shorter content is not remembered: to compute it again costs less than to look for it."""
_SLACK_TOKENS, _SLACK_RATIO = 8, 1 / 16
"""A server may count so much otherwise than was concluded from its replies."""


class Outside:
    """Reads and corrects idle slots of one model's engines.

    Args:
        holdings: what is known of them.
        learnt: how long keys are in tokens.
    """

    def __init__(self, holdings: Holdings, learnt: Calibration) -> None:
        self._holdings = holdings
        self._learnt = learnt

    def content(self, engine: str, slot: int) -> tuple[bytes, int]:
        """The key of what an idle slot holds, and all its tokens; none where that is not known."""
        home = self._holdings.slot(engine, slot)
        sequence = None if home is None else home.sequence
        return (b"", 0) if sequence is None else (sequence.node.key, sequence.tokens)

    def learn(self, engine: str, slot: int, key: bytes, key_tokens: int, tokens: int) -> None:
        """Somebody else left this in an idle slot; what it held before is at most in RAM.

        Args:
            engine: whose slot.
            slot: its number; -1: RAM is all where it may be.
            key: of the content's beginning, or something that begins no prompt where nobody here knows it.
            key_tokens: of that beginning.
            tokens: of the content; 0: unknown.
        """
        server, home = self._holdings.servers.get(engine), self._holdings.slot(engine, slot)
        if server is None or (home is not None and home.use is not None):
            return
        tree, new = self._holdings.tree, None
        if tokens >= LEAST_SEQUENCE_TOKENS:
            new = Sequence(engine, slot, tree.insert(key, self._learnt.tokens_per_byte), tokens)
        self._holdings.replace(server, home, new)
        if new is not None:
            tree.anchor(new.node, len(key), key_tokens, exact=False)
        self._holdings.trim()

    def correct(self, engine: str, slot: int, tokens: int) -> None:
        """The server told how much an idle slot holds: what contradicts that is forgotten."""
        server, home = self._holdings.servers.get(engine), self._holdings.slot(engine, slot)
        if server is None or home is None or home.use is not None:
            return
        if not tokens:
            if not home.is_empty:
                self._holdings.empty(home, is_empty=True)
            return
        believed = tokens if home.sequence is None else home.sequence.tokens
        if home.is_empty or abs(tokens - believed) > max(_SLACK_TOKENS, tokens * _SLACK_RATIO):
            self._holdings.replace(server, home, None)

    def overwritten(self, engine: str, slot: int) -> None:
        """Somebody used the slot and did not tell for what."""
        self.learn(engine, slot, b"", 0, 0)
