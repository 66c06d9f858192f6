"""What a reply has told: delivered text, token ids without a gap, and where both are known to agree.

One object lives through all engines that work on one reply. A second engine says part of the reply again: `rewind`
names the place it starts from, `add` checks what it says against what the client has and returns what is new.
"""

from __future__ import annotations

import json
from array import array
from typing import NamedTuple


class DivergedError(Exception):
    """What was said again is not what the client has."""


class Mark(NamedTuple):
    """A place in the reply where text and ids agree: all text of these tokens was sent, and no other."""

    tokens: int
    chars: int


_START = Mark(0, 0)
_ID_BYTES = 4


class Told:
    """The state of one reply.

    Args:
        limit_bytes: text and ids kept at most; beyond it only positions are counted.
    """

    __slots__ = (
        *("_anchor", "_limit_bytes", "_marks", "_parts", "chars", "ids", "is_gapless", "is_too_long"),
        *("position", "seen_chars", "seen_tokens"),
    )

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._parts: list[str] = []
        self._marks: list[Mark] = []
        self._anchor = _START
        self.ids: array[int] = array("i")
        self.is_gapless = True
        self.is_too_long = False
        self.chars = self.seen_chars = 0
        """Characters that the client has, and that the present engine has said."""
        self.position = self.seen_tokens = 0
        """Tokens whose events the client has, and that the present engine has told of."""

    @property
    def text(self) -> str:
        """All delivered text."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def mark(self, back: int = 1) -> Mark:
        """The last place (1), or the one before it (2), where text and ids agree; else where the engine began."""
        return self._marks[-back] if len(self._marks) >= back else self._anchor

    def rewind(self, mark: Mark) -> None:
        """The next engine starts here: from now on `add` expects what followed."""
        del self.ids[mark.tokens :]
        self.is_gapless = True
        self._anchor, self._marks = mark, []
        self.seen_tokens, self.seen_chars = mark

    def give_up_ids(self) -> None:
        """The next engine starts at the end of the text; which tokens made it is not known."""
        self.ids = array("i")
        self.is_gapless = False
        self._anchor, self._marks = _START, []
        self.seen_tokens, self.seen_chars = self.position, self.chars

    def add(self, content: str, id_: int | None, count: int | None) -> str:
        """Take one event's text, token and position; returns the part of the text that is new to the client.

        Raises:
            DivergedError: the client has other text at this place.
        """
        position = self.seen_tokens + bool(content) if count is None else count
        if self.is_too_long:
            self.position = self.seen_tokens = position
            return content
        if id_ is not None and count == len(self.ids) + 1 and self.is_gapless:
            self.ids.append(id_)
        else:
            self.is_gapless = False
        self.seen_tokens = position
        self.position = max(self.position, position)
        again = min(len(content), self.chars - self.seen_chars)
        if again and content[:again] != self.text[self.seen_chars : self.seen_chars + again]:
            raise DivergedError(f"the reply differs at character {self.seen_chars}")
        new = content[again:]
        self._keep(new)
        self.seen_chars += len(content)
        if content and self.is_gapless:
            self._marks = [*self._marks[-1:], Mark(len(self.ids), self.seen_chars)]
        return new

    def finish(self, content: str, count: int | None) -> None:
        """Take the final event: it may bring text, and counts a token that ends the reply without an event."""
        if content:
            self.add(content, None, None)
        if count is not None:
            self.seen_tokens = count
            self.position = max(self.position, count)

    def add_many(self, contents: list[bytes], ids: list[bytes], counts: list[bytes]) -> None:
        """Take many events at once, their texts as JSON has them between the quotes; `add` one by one where ids lack.

        Args:
            contents: their texts.
            ids: their tokens, b"" where unknown; an empty list: of all.
            counts: their positions; an empty list: unknown.
        """
        start = self.seen_tokens
        if self.is_too_long:
            self.position = self.seen_tokens = int(counts[-1]) if counts else start + len(contents)
            return
        if not counts and self.seen_chars == self.chars:
            self._keep(read_string(b"".join(contents)))
            self.is_gapless, self.seen_chars = False, self.chars
            self.position = self.seen_tokens = start + len(contents) - contents.count(b"")
            return
        is_even = len(ids) == len(contents) and b"" not in ids and b"" not in contents and self.is_gapless
        if is_even and self.seen_chars == self.chars:
            is_even = list(map(int, counts)) == list(range(len(self.ids) + 1, len(self.ids) + 1 + len(ids)))
        if not is_even or self.seen_chars != self.chars:
            for index, content in enumerate(contents):
                id_ = int(ids[index]) if ids and ids[index] else None
                self.add(read_string(content), id_, int(counts[index]) if counts else None)
            return
        before = self.chars + len(read_string(b"".join(contents[:-1])))
        self.ids.extend(map(int, ids))
        self._keep(read_string(b"".join(contents)))
        self.seen_chars = self.chars
        self.seen_tokens = start + len(ids)
        self.position = max(self.position, self.seen_tokens)
        last = Mark(len(self.ids), self.chars)
        self._marks = [Mark(len(self.ids) - 1, before), last] if len(ids) > 1 else [*self._marks[-1:], last]

    def _keep(self, text: str) -> None:
        if not text:
            return
        self.chars += len(text)
        self._parts.append(text)
        if self.chars + _ID_BYTES * len(self.ids) > self._limit_bytes:  # nobody will ask for it; count on
            self.is_too_long = True
            self._parts.clear()
            self.ids = array("i")
            self._marks = []
            self.is_gapless = False


def read_string(raw: bytes) -> str:
    """A JSON string's value from the bytes between its quotes."""
    if b"\\" not in raw:
        return raw.decode("utf-8", "surrogatepass")
    value: str = json.loads(b'"%b"' % raw)
    return value
