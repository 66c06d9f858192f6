"""A consistent hash ring over engines: keys keep their engine when others come and go, in every process alike."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from hashlib import blake2b
from struct import unpack

__all__ = ["MOST_STEPS", "Ring"]

MOST_STEPS = 64
"""Engines a walk looks at before it gives up."""


class Ring:
    """Engines on a circle of 64-bit hashes, each at 32 places; a place carries the engine's number in its low bits."""

    _NUMBER_BITS = 32

    def __init__(self) -> None:
        self._members: tuple[str, ...] = ()
        self._numbers: dict[str, int] = {}
        self._owners: dict[int, str] = {}
        self._next = 0
        self._points: list[int] = []

    def follow(self, members: tuple[str, ...]) -> None:
        """Have exactly these members; costs nothing as long as it is the very same tuple."""
        if members is self._members:
            return
        kept = set(members)
        gone = {number for name, number in self._numbers.items() if name not in kept}
        if gone:
            mask = (1 << self._NUMBER_BITS) - 1
            self._points = [point for point in self._points if point & mask not in gone]
            for number in gone:
                del self._numbers[self._owners.pop(number)]
        for name in members:
            if name not in self._numbers:
                self._numbers[name], self._owners[self._next] = self._next, name
                self._points += (place << self._NUMBER_BITS | self._next for place in _places(name))
                self._next += 1
        self._points.sort()
        self._members = members

    def walk(self, key: bytes) -> Iterator[str]:
        """Up to 64 different engines clockwise from a key's place."""
        points, mask = self._points, (1 << self._NUMBER_BITS) - 1
        most = min(MOST_STEPS, len(self._owners))
        place = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") << self._NUMBER_BITS
        at = bisect_right(points, place)
        seen: set[int] = set()
        while len(seen) < most:
            number = points[at % len(points)] & mask
            at += 1
            if number not in seen:
                seen.add(number)
                yield self._owners[number]


def _places(name: str) -> Iterator[int]:
    for turn in range(4):
        yield from unpack("<8Q", blake2b(name.encode(), salt=bytes([turn])).digest())
