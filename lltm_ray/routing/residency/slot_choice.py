"""Which slot of an engine a request should name: the one where most is cached and least is lost. Pure."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Literal, NamedTuple

from lltm_ray.routing.residency.calibration import Calibration
from lltm_ray.routing.residency.slots import (
    LENT_KEEP_RATIO,
    Path,
    Plan,
    Server,
    Slot,
    best_entry,
    lost_tokens,
    plan_own_choice,
    plan_slot,
    similar_slots,
)

__all__ = ["SlotChoice", "pick_slot"]

_MOST_WEIGHED = 4
"""Slots that are weighed without a host-memory cache, where what a slot loses is lost."""
_STEP_RATIO, _LEAST_STEP = 0.05, 16.0
"""Slots that differ by less, as a share of the prompt or in tokens, are equal: then one that needs no copy from RAM is
taken, and of several the one whose content is oldest."""
_LOSS_RATIO = 0.5
"""How much a token that is lost weighs against one that is found: its conversation may not come back."""


class SlotChoice(NamedTuple):
    """A slot to pin, or -1 for llama.cpp's own choice, and what the request would find there."""

    slot: int
    cached_tokens: int = 0
    source: Literal["slot", "ram", "none"] = "none"
    lost_tokens: int = 0
    """Tokens of the slot's old content, or of what is loaded from RAM, that would exist nowhere else afterwards."""


def pick_slot(
    server: Server,
    free: Collection[int],
    path: Path,
    learnt: Calibration,
    *,
    can_pin: bool,
    lent: Collection[int] = (),
) -> SlotChoice:
    """The free slot on which a request would find most, what it destroys counted against it.

    Args:
        server: the engine.
        free: slots that the caller may use.
        lent: slots that it may use only to go on from what they hold.
        path: the request's key.
        learnt: whom to trust.
        can_pin: whether the request can name a slot; otherwise the answer tells llama.cpp's own choice.
    """
    spare = server.spare(free)
    if spare is None:
        return SlotChoice(-1)
    name = server.name
    # Where similarity is 0 only an unpinned request has its slot's content saved: what is lost must be weighed.
    saves = server.similarity_ratio or spare.is_empty
    if saves and server.ram_tokens and not (path.is_known and _holds(name, path)):
        return SlotChoice(spare.id if can_pin else -1)
    entry, ram_tokens = best_entry(server, path)
    has_ram = entry is not None
    similar = _similar(server, free, lent, path) if can_pin and not learnt.is_off else []
    going_on = _going_on(server, similar, path, ram_tokens)
    if going_on is not None:
        return SlotChoice(going_on.slot.id, going_on.cached_tokens(1.0, path.prompt_tokens), "slot")
    options = _options(server, free, similar, spare, path, has_ram=has_ram) if can_pin and not learnt.is_off else []
    is_swapping = server.ram_tokens != 0 and not server.similarity_ratio
    if not options or is_swapping or (has_ram and all(plan.entry is None for _, plan in options)):
        own = plan_own_choice(server, server.idle(free), path)
        options += [] if own is None else [(-1, own)]
    return _best(server, options, path, learnt)


def _holds(name: str, path: Path) -> bool:
    return any(name in node.slots or name in node.ram for node in path.worthy())


def _similar(server: Server, free: Collection[int], lent: Collection[int], path: Path) -> list[Slot]:
    found = similar_slots(server, path)
    return [each for each in found if each.id in free or (each.id in lent and _goes_on(each, path))]


def _goes_on(slot: Slot, path: Path) -> bool:
    sequence = slot.sequence
    return sequence is not None and path.shared(sequence) >= LENT_KEEP_RATIO * sequence.tokens


def _going_on(server: Server, similar: list[Slot], path: Path, ram_tokens: float) -> Plan | None:
    """Where a conversation goes on: what shares most lies in a slot and nothing is lost, so no other can be better."""
    slot = next(iter(similar), None)
    plan = None if slot is None else plan_slot(server, slot, path, is_pinned=True)
    if plan is None or plan.entry is not None or plan.slot_tokens < ram_tokens or lost_tokens(server, plan):
        return None
    return plan


def _options(
    server: Server, free: Collection[int], similar: list[Slot], spare: Slot, path: Path, *, has_ram: bool
) -> list[tuple[int, Plan]]:
    """Pins worth weighing.

    Slots that share most with the prompt; the one missed least; and where RAM has something, the oldest that is not
    empty, for only such a one can take it.
    """
    weighed = {spare.id: spare} | {slot.id: slot for slot in similar}
    if not server.ram_tokens:
        weighed |= {slot.id: slot for slot in islice(server.rested(free), _MOST_WEIGHED)}
    oldest = server.spare(free, is_empty=False) if has_ram else None
    if oldest is not None:
        weighed[oldest.id] = oldest
    return [(slot.id, plan_slot(server, slot, path, is_pinned=True)) for slot in weighed.values()]


def _best(server: Server, options: list[tuple[int, Plan]], path: Path, learnt: Calibration) -> SlotChoice:
    rated = []
    step = max(_LEAST_STEP, path.prompt_tokens * _STEP_RATIO)
    for slot, plan in options:
        cached = plan.cached_tokens(learnt.ram_trust, path.prompt_tokens)
        lost = lost_tokens(server, plan)
        worth = (cached - _LOSS_RATIO * lost) // step
        rated.append((worth, plan.entry is None, plan.slot.is_empty, -plan.slot.last_used, slot, cached, lost, plan))
    *_, slot, cached, lost, plan = max(rated, key=lambda each: each[:4])
    if learnt.is_off or not cached:
        return SlotChoice(slot, 0, "none", lost)
    return SlotChoice(slot, cached, "slot" if plan.entry is None else "ram", lost)
