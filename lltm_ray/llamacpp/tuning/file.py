"""A chosen candidate as the TOML that `lltm-ray up --config` reads, with its reasons as comments. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lltm_ray.config import FleetConfig
from lltm_ray.llamacpp.tuning.plan import Candidate

SHARED = ("model", "llama_server", "memory_limit_bytes")
"""Settings that all candidates had from their fleet."""


def to_toml(candidate: Candidate, *, fleet: FleetConfig, notes: Iterable[str] = ()) -> str:
    """The file's text.

    Args:
        candidate: what the fleet is to be.
        fleet: what all candidates shared; with absolute paths, for a relative one is meant from the TOML's folder.
        notes: lines for its head, e.g. what was measured.
    """
    lines = [_comment(note) for note in notes]
    lines += [""]
    for name in SHARED:
        lines += _setting(name, getattr(fleet, name), "")
    for name, value in (("engines", candidate.engines), ("gpu_share", candidate.gpu_share)):
        lines += _setting(name, value, candidate.reasons.get(name, ""))
    changes = sorted(candidate.changes.items())
    lines += ["", "[engine]"] if changes else []
    for name, value in changes:
        lines += _setting(name, value, candidate.reasons.get(name, ""))
    return "\n".join(lines).lstrip("\n") + "\n"


def _setting(name: str, value: Any, reason: str) -> list[str]:
    if value is None:
        return []
    return [*([_comment(reason)] if reason else []), f"{name} = {_value(value)}"]


def _comment(text: str) -> str:
    """One line: a line break or control character would end the comment, or the file."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return f"# {plain}".rstrip()


def _value(value: Any) -> str:
    # A TOML basic string is a JSON string, where DEL is escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
