"""What `migrate` asks of a router and reports to its caller, and which conversations to move. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lltm_ray.records import EngineInfo

HOT_RATIO, COOL_RATIO = 0.75, 0.5
"""Busy slots of an engine that needs relief, and on average of the others that can give it.

An engine without an idle slot holds nothing that could move, so of four slots three must be enough.
"""


class HeldSlot(Protocol):
    """What an idle slot holds."""

    @property
    def slot(self) -> int:
        """Its number on the engine."""

    @property
    def tokens(self) -> int:
        """Length of what it holds, as far as is known."""


class SlotLease(Protocol):
    """A claim on one slot."""

    @property
    def engine(self) -> EngineInfo:
        """Whose slot."""

    @property
    def slot(self) -> int:
        """Its number on the engine."""


class MigrationRouter(Protocol):
    """What a migration needs of the router; nothing here waits."""

    def engines(self, model: str | None = None) -> tuple[EngineInfo, ...]:
        """All known engines, or those of one model."""

    def close_engine(self, name: str, *, is_leaving: bool = False) -> None:
        """No new claims until `open_engine`, or until the engine's server is another one.

        `is_leaving`: it is about to be ended by who starts others, for which requests wait.
        """

    def open_engine(self, name: str) -> None:
        """Take claims again."""

    def unserved(self, name: str) -> str:
        """What people are told when requests for this engine's model are refused now; empty when they are not."""

    def in_flight(self, name: str) -> int:
        """Claimed slots."""

    def held(self, name: str) -> Sequence[HeldSlot]:
        """Idle slots that hold a conversation, the coldest first."""

    def claim_slot(self, model: str, *, exclude: Collection[str], tokens: int) -> SlotLease | None:
        """A free slot with room for `tokens`, the one that loses least; None when there is none now."""

    def hold_slot(self, name: str, slot: int) -> SlotLease | None:
        """This idle slot, on a closed engine too, so that nobody uses it during the move; None when it is taken."""

    def moved(self, source: str, slot: int, target: str, target_slot: int) -> None:
        """The target's slot holds now what the source's held."""

    def erased(self, name: str, slot: int) -> None:
        """What this slot holds is unknown."""

    def release(self, lease: Any) -> None:
        """Give a claim back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A conversation that stayed where it was."""

    slot: int
    tokens: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveReport:
    """What a drain or a relief did."""

    engine: str
    moved: int = 0
    tokens: int = 0
    size_bytes: int = 0
    took_s: float = 0.0
    failed: tuple[Failure, ...] = ()
    left: int = 0
    """Conversations that are still on the engine's slots and nowhere else, failed ones included."""
    running: int = 0
    """Requests that were still running at the end."""
    warning: str = ""
    """That requests for the engine's model are refused now, and the remedy."""

    def public(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __add__(self, other: MoveReport) -> MoveReport:
        """What two gateways did with the same engine at the same time."""
        return MoveReport(
            engine=self.engine,
            moved=self.moved + other.moved,
            tokens=self.tokens + other.tokens,
            size_bytes=self.size_bytes + other.size_bytes,
            took_s=max(self.took_s, other.took_s),
            failed=self.failed + other.failed,
            left=self.left + other.left,
            running=self.running + other.running,
            warning=self.warning or other.warning,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy an engine is."""

    busy: int
    slots: int


def coldest(held: Sequence[HeldSlot], share: float) -> list[HeldSlot]:
    """The first conversations, whose tokens together come nearest to `share` of all; one at least, unless it is 0."""
    wanted = share * sum(each.tokens for each in held)
    chosen: list[HeldSlot] = []
    tokens = 0.0
    for each in held:
        if wanted <= 0 or (chosen and tokens + each.tokens / 2 > wanted):
            break
        chosen.append(each)
        tokens += each.tokens
    return chosen


def plan_relief(loads: Mapping[str, Load]) -> tuple[str, float] | None:
    """The engine of one model that is much hotter than the others, and the share of its conversations to move.

    Returns:
        Name and share such that its load would come down to the mean of all; None when nobody needs it or can give it.
    """
    ratios = {name: load.busy / load.slots for name, load in loads.items() if load.slots}
    if len(ratios) < 2:
        return None
    name = max(ratios, key=lambda each: ratios[each])
    others = (sum(ratios.values()) - ratios[name]) / (len(ratios) - 1)
    if ratios[name] < HOT_RATIO or others > COOL_RATIO:
        return None
    return name, 1 - sum(ratios.values()) / len(ratios) / ratios[name]
