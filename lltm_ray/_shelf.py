"""Slots that were saved before their engine ended, as the fleet knows them: no text, only salted hashes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSlot:
    """One file of llama-server's slot save, and what it holds."""

    name: str = field(repr=False)
    """Of the file; whoever knows it can have the conversation restored."""
    folder: str
    """Where it lies, on its node."""
    node_id: str
    model: str
    """Served name."""
    seal: str
    """As in `EngineInfo.slot_seal`: engines with another one must not restore it."""
    tokens: int
    size_bytes: int
    key_bytes: int
    """Length of the prompt's key whose tokens it holds."""
    whole: bytes
    """Salted hash of that key."""
    hashes: bytes
    """Of its beginnings; see `_prefix.hash_prefixes`."""
    saved_unix_nano: int
    """Of two that were saved together, what was used last has the later one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """An engine that is about to end: gateways move what it holds to others of its model, or save it."""

    engine: str
    folder: str
    """On the engine's node, to save into; empty: it is to be moved."""
    limit_bytes: int
    """Of what is saved."""
    deadline_s: float
    """From when a gateway hears of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """All that is saved, and what is to be."""

    files: tuple[SavedSlot, ...] = ()
    partings: tuple[Parting, ...] = ()

    def public(self) -> dict[str, Any]:
        """As JSON: only how much there is."""
        return {
            "files": len(self.files),
            "tokens": sum(each.tokens for each in self.files),
            "bytes": sum(each.size_bytes for each in self.files),
        }
