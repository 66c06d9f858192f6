"""The router's decision, and nothing else: which engine takes the next request. Pure: data in, a name out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class EngineView:
    """What a policy may know of one engine that can take requests now. Policies read it and never write."""

    name: str
    model: str
    slots_total: int
    busy: int = 0
    """Slots claimed through this router."""
    last_used: int = 0
    """Serial number of the last request sent there; 0 is never."""


def choose(engines: Iterable[EngineView], *, model: str, exclude: Collection[str] = frozenset()) -> str | None:
    """Least loaded first: the smallest share of busy slots, among equals the one used longest ago.

    Args:
        engines: candidates, in any order.
        model: only engines that serve it count.
        exclude: names that must not be chosen.

    Returns:
        The engine's name, or None when no candidate has a free slot.
    """
    best: EngineView | None = None
    best_load = 1.0
    for engine in engines:
        if engine.busy >= engine.slots_total or engine.model != model or engine.name in exclude:
            continue
        load = engine.busy / engine.slots_total
        if best is None or load < best_load or (load == best_load and engine.last_used < best.last_used):
            best, best_load = engine, load
    return None if best is None else best.name
