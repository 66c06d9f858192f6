"""What the calls of llamatelemetry are here: the README's table is made of `migration.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Move:
    """Old calls and what takes their place."""

    area: str
    old: str
    new: str
    """`module:attribute`, or a command in backquotes."""
    tests: list[str]
    """`file::name` below tests/: what would fail on the old SDK where it was broken, and holds the place here."""
    note: str = ""
    """What is different."""

    @property
    def place(self) -> str:
        return self.new if self.new.startswith("`") else f"`{self.new.replace(':', '.')}`"


MOVES = [Move(**entry) for entry in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))["move"]]


def markdown() -> str:
    """The table as the README has it."""
    areas = list(dict.fromkeys(move.area for move in MOVES))
    moves = sorted(MOVES, key=lambda move: areas.index(move.area))
    rows = [f"| `{move.old}` | {move.place} | {move.note} |" for move in moves]
    return "\n".join(["| llamatelemetry | lltm_ray | |", "|---|---|---|", *rows]) + "\n"
