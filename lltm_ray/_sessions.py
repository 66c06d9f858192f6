"""Conversations that are kept under a name, as gateways, drivers and the command line know them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from lltm_ray._shelf import SavedSlot
from lltm_ray.errors import ConfigError

SESSION_HEADER = "x-lltm-session"
"""In a request: the session it goes on from. In its answer: what became of that, see `Offer.outcome`."""
HEAD_FIELDS = ("tools", "chat_template_kwargs", "reasoning_effort")
"""Fields of a chat that templates write before the first message: they are kept with it."""
RESTORED = "restored="
"""How an outcome begins; the tokens follow."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}\Z")


def check_name(name: str, field_name: str = "name") -> str:
    """A session's name; it becomes no path anywhere, but it must fit into a header.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise ConfigError(field_name, name, "letters, digits, '.', '_', '-', '@', '+'; at most 128, a letter first")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """A session as it is kept."""

    name: str
    model: str
    """Served name."""
    tokens: int = 0
    """In its file; 0: it has none, and its next request computes the prompt anew."""
    size_bytes: int = 0
    """On disk."""
    message_count: int = 0
    has_text: bool = True
    """Whether its messages are kept, too; where not, the file of its cache still holds their tokens."""
    saved_unix_s: float = 0.0
    used_unix_s: float = 0.0
    why: str = ""
    """Why nothing can be restored, where nothing can."""
    cached_tokens: int = 0
    """Of its prompt, found cached or restored when it was saved or restored just now."""
    computed_tokens: int = 0
    """Of its prompt, computed for that."""
    messages: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """All that was said, where one session is asked for."""
    fields: dict[str, Any] = field(default_factory=dict, repr=False)
    """`HEAD_FIELDS` of its requests."""


@dataclass(slots=True, eq=False, kw_only=True)
class Offer:
    """What a request that names a session brings along, and what came of it."""

    file: SavedSlot | None = None
    """None: there is nothing to restore."""
    salt: bytes = field(default=b"", repr=False)
    """What the file's own hashes are made with."""
    build: str = ""
    """Of the llama.cpp that wrote it."""
    outcome: str = "new"
    """`new`: nobody has saved it. `cached`: its slot still holds it. `restored=N` tokens. `computed; WHY`."""

    def refuse(self, why: str) -> None:
        """The request computes its prompt anew."""
        self.outcome = f"computed; {why}"

    def header(self) -> bytes:
        """The outcome in one short line."""
        return " ".join(self.outcome.split())[:300].encode("ascii", "replace")
