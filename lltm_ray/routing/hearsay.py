"""What other routers tell of one model's slots: salted hashes, never text.

A router that heard of a slot learns what it holds when a request comes by whose key has the hash: the key's own bytes
are the content then. Hashed are the ends of a key's last messages, for the next turn of a conversation has them too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from lltm_ray._prefix import HASH_BYTES
from lltm_ray.routing.prompt import find_cuts
from lltm_ray.routing.residency.slots import LENT_KEEP_RATIO

MOST_MARKS = 32_768
"""Of one model, that are remembered; those heard of longest ago are forgotten."""
UNKNOWN = b"\xff\xfe\xff"
"""Begins the key of content that only another router knows; no prompt's key begins so, for it is no UTF-8."""
_TOLD_CUTS, _ASKED_CUTS = 2, 8
"""Prompt and reply; the next turn may add some messages, as tools do."""

Mark = tuple[int, bytes]
"""(bytes from the start, salted hash of them)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDigest:
    """What became of one slot at one router."""

    engine: str
    server_pid: int | None
    slot: int
    at_unix_nano: int
    """When it was last used there."""
    is_busy: bool = False
    tokens: int = 0
    """What an idle one holds; 0: it is not known."""
    size_bytes: int = 0
    """Length of the key of that."""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSample:
    """One slot as its server shows it."""

    engine: str
    server_pid: int | None
    slot: int
    at_unix_nano: int
    """When the server was asked."""
    is_busy: bool
    tokens: int
    """What it holds, the task's or what its last one left."""
    task_id: int | None


class Heard(NamedTuple):
    """Who holds the beginning of a prompt."""

    digest: SlotDigest
    in_slot: bool
    """Whether its slot was not used since, as far as was heard; else the content may lie in host memory."""
    end_bytes: int
    """How much of the prompt."""
    tokens: int
    """That beginning's."""


def hash_cuts(key: bytes, salt: bytes, most: int = _TOLD_CUTS) -> tuple[Mark, ...]:
    """Hashes of a key up to each of its last cuts; see `prompt.find_cuts`."""
    state, start, marks = blake2b(digest_size=HASH_BYTES, key=salt), 0, []
    for end in find_cuts(key, most):
        state.update(key[start:end])
        marks.append((end, state.copy().digest()))
        start = end
    return tuple(marks)


class Hearsay:
    """The last digests, and which of them are still true of their slots."""

    def __init__(self) -> None:
        self.salt = b""
        """The fleet's."""
        self._slots: dict[tuple[str, int], SlotDigest] = {}
        self._marks: OrderedDict[Mark, SlotDigest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._marks)

    def take(self, digest: SlotDigest) -> None:
        """Remember this of its slot."""
        self.drop(digest.engine, digest.slot)
        if digest.marks:
            self._slots[digest.engine, digest.slot] = digest
        for mark in digest.marks:
            self._marks.pop(mark, None)
            self._marks[mark] = digest
        while len(self._marks) > MOST_MARKS:
            self._marks.popitem(last=False)

    def drop(self, engine: str, slot: int) -> None:
        """Somebody used the slot."""
        self._slots.pop((engine, slot), None)

    def forget(self, digest: SlotDigest) -> None:
        """It is known better, or not true any more."""
        if self._slots.get((digest.engine, digest.slot)) is digest:
            self.drop(digest.engine, digest.slot)
        for mark in digest.marks:
            if self._marks.get(mark) is digest:
                del self._marks[mark]

    def find(self, key: bytes, more_than_tokens: int) -> Iterator[Heard]:
        """Slots that hold a key's beginning and nearly nothing else, the longest first.

        Args:
            key: of a prompt.
            more_than_tokens: what is known to be cached anyway.
        """
        for mark in reversed(hash_cuts(key, self.salt, _ASKED_CUTS)):
            told = self._marks.get(mark)
            if told is None:
                continue
            tokens = round(told.tokens * mark[0] / told.size_bytes)
            if tokens > more_than_tokens and tokens >= LENT_KEEP_RATIO * told.tokens:
                yield Heard(told, self._slots.get((told.engine, told.slot)) is told, mark[0], tokens)
