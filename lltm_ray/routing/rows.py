"""What the router's tables are made of: one row for each server's life, and the claims on its slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp
from typing import Any

from lltm_ray.records import EngineInfo, EngineState, Timings
from lltm_ray.routing.adapters import Lora, lora_field
from lltm_ray.routing.policy import Ask, Choice, EngineView
from lltm_ray.routing.rates import Speed

SUSPECT_S = 1.0
"""How long an engine is skipped after a failed connection, unless the directory shows a new server sooner."""
MAX_SUSPECT_S = 16.0
"""The longest of it: it doubles with each further failure, until the engine begins an answer."""
LATE_DETAIL = "no heartbeat"
"""How the directory's `detail` of an engine begins that failed only by its silence: it may be back within seconds."""


@dataclass(slots=True, eq=False)
class Row(EngineView):
    """One server's life. A restarted server gets a new row, so old claims die with the old one."""

    info: EngineInfo = field(kw_only=True)
    owned: set[int] = field(kw_only=True)
    """Ids of slots that this router may use."""
    free: set[int] = field(kw_only=True)
    """Those of them that are idle."""
    pinned: set[int] = field(default_factory=set)
    """Ids of slots that are claimed."""
    lent: frozenset[int] = frozenset()
    """Ids of slots of other routers' parts: they may be used by what goes on from their content."""
    taken: set[int] = field(default_factory=set)
    """Ids of slots that somebody else uses, ours among them."""
    touched_s: dict[int, float] = field(default_factory=dict)
    """Slot -> since when something is known of it, by this router's clock: the last claim's begin or end, or word."""
    rests: dict[int, float] = field(default_factory=dict)
    """Slot -> since when a conversation of ours rests there, by this router's clock."""
    tasks: dict[int, int] = field(default_factory=dict)
    """Slot -> llama-server's number of the task that left what is known to be there."""
    unpinned: int = 0
    """Claims whose slot llama-server chose: as long as there are some, nobody knows for sure which slots are idle."""
    suspicions: int = 0
    """Failed connections whose cool-down is not over."""
    skip_s: float = 0.0
    """Its last cool-down; 0: it has begun an answer since."""
    listed: bool = True
    scales: dict[int, float] | None = None
    """Its adapters' own scales by id, where they were changed since it started."""
    coming: dict[Lora | None, int] = field(default_factory=dict)
    """Claims without a first byte by what they choose of its adapters."""
    closed: bool = False
    """Takes no new claims: it is being drained, or was."""
    leaving: bool = False
    """It is drained to be ended, or to make room: somebody sees to it that others come."""

    @property
    def is_usable(self) -> bool:
        """Whether it can take requests at all."""
        return self.listed and not self.closed and self.info.state is EngineState.READY and self.slots_total > 0

    def rested_s(self, slot: int, now_s: float) -> float | None:
        """For how long a conversation has rested in a slot; None where none does."""
        return max(now_s - self.rests[slot], 0.0) if slot in self.rests else None

    def wake(self, slot: int, now_s: float, fade_s: float) -> None:
        """What rested in a slot is gone from there: it goes on, or is driven out, moved or erased."""
        rested_s = self.rested_s(slot, now_s)
        if rested_s is not None:
            del self.rests[slot]
            left = self.resting(now_s, fade_s) - exp(-rested_s / fade_s)
            self.warm, self.warm_s = max(left, 0.0) if self.rests else 0.0, now_s

    def rest(self, slot: int, now_s: float, fade_s: float) -> None:
        """A conversation rests in a slot from now on."""
        self.warm, self.warm_s = self.resting(now_s, fade_s) + 1.0, now_s
        self.rests[slot] = now_s

    def touch(self, slot: int, now_s: float) -> None:
        """Something is known of a slot from now on."""
        self.touched_s[slot] = now_s
        self.taken.discard(slot)
        self.tasks.pop(slot, None)

    def relapse(self) -> float:
        """Seconds to skip it for one more failed connection; failures at the same time count once."""
        if not self.suspicions:
            self.skip_s = min(2 * self.skip_s or SUSPECT_S, MAX_SUSPECT_S)
        return self.skip_s

    def recover(self) -> None:
        """It has answered: its next failure is a first one."""
        self.skip_s = 0.0

    def learn(self, info: EngineInfo, forget: Callable[[Row], None]) -> None:
        """The directory's newest word of the same server; at other scales what it has cached is of others."""
        is_rescaled, self.info, self.listed = info.adapters != self.info.adapters, info, True
        if is_rescaled:
            self.scales = None
            forget(self)

    def is_promised(self, lora: Lora | None) -> bool:
        """Whether requests with other adapters wait there: who came after them would go before them, for ever."""
        return bool(self.coming) and any(other != lora for other in self.coming)

    def snapshot(self) -> dict[str, Any]:
        """As JSON, for `/lltm/status`."""
        return {
            "model": self.model,
            "state": str(self.info.state),
            "slots_busy": self.busy,
            "slots_total": self.slots_total,
            "is_suspect": self.suspicions > 0,
            "is_closed": self.closed,
        }


@dataclass(slots=True, kw_only=True)
class Served:
    """How a claim ended that the engine answered: what its reply told."""

    timings: Timings
    reply: bytes | None = None
    """What the reply adds to the key of the session's next turn; None: unknown."""
    delivered_tokens: int = 0


@dataclass(slots=True, eq=False)
class Lease:
    """A claimed slot. Give it back with `Router.release`, in a `finally`."""

    engine: EngineInfo
    model: str
    row: Row = field(repr=False)
    ask: Ask = field(repr=False)
    claimed_s: float
    slot: int = -1
    """The slot to name in `id_slot`; -1: llama-server chooses."""
    cached_tokens: int = 0
    """Prompt tokens that should be found cached."""
    choice: Choice | None = field(default=None, repr=False)
    speed: Speed | None = field(default=None, repr=False)
    """How fast the engine was taken to be."""
    uncached_tokens: int = 0
    cost_tokens: float = 0.0
    """What the tenant was charged."""
    busy: int = 1
    """Claimed slots of the engine at the claim, this one included."""
    began: bool = False
    released: bool = False
    moves: bool = False
    """A migration's: no request, so nothing is learnt from it."""

    @property
    def lora(self) -> bytes:
        """What the engine is to be told of adapters, as a field of the request's body; empty where it has none."""
        return lora_field(self.ask.lora, self.engine.adapters, self.row.scales)


def count(counts: dict[Lora | None, int], lora: Lora | None, change: int) -> None:
    """So many more; none leave nothing behind."""
    counts[lora] = counts.get(lora, 0) + change
    if not counts[lora]:
        del counts[lora]


def identity(info: EngineInfo) -> tuple[str, int | None]:
    """What tells one server's life from the next one's."""
    return info.url, info.server_pid
