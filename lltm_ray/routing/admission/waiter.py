"""A request that wants a slot, and why it may rather wait although one is free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lltm_ray.routing.policy import Ask
from lltm_ray.routing.residency import Match
from lltm_ray.routing.rows import Lease, Row

__all__ = ["Hold", "Later", "Timer", "Waiter", "call_later", "is_frozen"]

HOME_TOKENS = 64
"""Cached tokens from which an engine counts as a waiter's own."""


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It shall not come any more."""


Later = Callable[[float, Callable[[], None]], Timer]
"""Calls something in so many seconds."""


def call_later(seconds: float, call: Callable[[], None]) -> Timer:
    """By the running event loop."""
    return asyncio.get_running_loop().call_later(seconds, call)


@dataclass(slots=True, eq=False)
class Hold:
    """A free slot is left to others for a while, because of one engine."""

    row: Row
    seconds: float
    is_paced: bool = False
    """For a long prefill there to end; else for one of its slots, as the prompt is cached there."""
    timer: Timer | None = None

    def start(self, later: Later, over: Callable[[], None]) -> None:
        """From now on, for its seconds; `over` is called at their end."""
        self.timer = later(self.seconds, over)
        self.row.waiting += not self.is_paced

    def stop(self) -> None:
        """The wait is over, whatever ended it."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.row.waiting -= not self.is_paced

    def is_moot(self, freed: Row | None) -> bool:
        """Whether it is worth while to ask the policy again.

        Args:
            freed: the engine where something changed; None: anywhere.
        """
        if self.is_paced:
            return freed is None or not is_frozen(freed) or not is_frozen(self.row)
        return self.row.has_room or self.row.is_suspect or not self.row.is_usable


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that wants a slot."""

    ask: Ask
    exclude: frozenset[str]
    grant: asyncio.Future[Lease] | None = None
    home: str = ""
    """Engine that holds most of its prompt."""
    cached_tokens: int = 0
    """What of the prompt is cached there."""
    hold: Hold | None = None
    has_held: bool = False
    """It waited by its own choice once already, and will not again."""
    passed: int = 0
    """How often it was overtaken by one whose prompt was cached where a slot came free."""
    since_unix_nano: int = field(default_factory=time.time_ns)

    @property
    def uncached_tokens(self) -> int:
        """What is left to compute at its home."""
        return max(0, self.ask.prompt_tokens - self.cached_tokens)

    def meet(self, match: Match) -> None:
        """Note who holds most of its prompt."""
        if match.engines:
            name, self.cached_tokens = match.engines[0]
            self.home = name if self.cached_tokens >= HOME_TOKENS else ""

    def end_hold(self) -> None:
        """Take any slot from now on."""
        if self.hold is not None:
            self.hold.stop()
            self.hold, self.has_held = None, True

    def reject(self, error: Exception) -> None:
        """Turn it away."""
        self.end_hold()
        if self.grant is not None and not self.grant.done():
            self.grant.set_exception(error)


def is_frozen(row: Row) -> bool:
    """Whether one more long prefill would stop those who decode there for even longer."""
    return row.long_prefills > 0 and row.decoding > 0
