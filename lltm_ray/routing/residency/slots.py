"""What one llama-server would do with a prompt: its slots, its host-memory ("RAM") prompt cache, and their rules.

They are those of llama.cpp's `get_available_slot` (server-context.cpp) and `server_prompt_cache` (server-task.cpp),
told in tokens. Nothing here changes anything: `residency` carries out what is planned here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice

from lltm_ray.routing.residency.radix import Node, Sequence

SLOT_KEEP_RATIO = 0.5
"""A similar slot that would keep less of its content is saved to RAM, and RAM is asked for something better."""
RAM_KEEP_RATIO = 0.25
"""A RAM entry of which the prompt would keep less is not loaded."""
LENT_KEEP_RATIO = 0.8
"""A slot of another router's part is used only by what goes on from its content: it keeps so much of it."""

LEAST_TOKENS = 16
"""Shared tokens below which a cache is not worth a look."""
_MOST_ENTRIES, _MOST_LOOKS = 8, 256
"""RAM entries that are weighed for one prompt, and nodes looked at to find them."""


@dataclass(slots=True)
class Path:
    """A key's way through the tree: for each node on it the tokens of the prefix that would be found cached there."""

    index: dict[Node, float]
    """Ascending; the root is first, with 0."""
    raw_tokens: dict[Node, float]
    """The same where a reply goes through, without the discount for those that may not come back as they were."""
    prompt_tokens: int
    version: int
    most_tokens: float
    """Of its last node."""
    loadable: dict[str, list[tuple[Sequence, float]]] = field(default_factory=dict)
    """Engine -> its RAM entries that may be loaded for this key and what they share with it; filled when asked."""

    @property
    def is_known(self) -> bool:
        """Whether any node shares enough to be looked at."""
        return self.most_tokens >= LEAST_TOKENS

    def worthy(self) -> Iterator[Node]:
        """Nodes that share enough to be looked at, deepest first."""
        for node, tokens in reversed(self.index.items()):
            if tokens < LEAST_TOKENS:
                return
            yield node

    def shared(self, sequence: Sequence) -> float:
        """Tokens that a sequence has in common with the key."""
        node, index = sequence.node, self.index
        while node not in index:
            above = node.parent
            if above is None:
                return 0.0
            node = above
        return index[node]


@dataclass(slots=True, eq=False)
class Use:
    """What a request in flight was assumed to find."""

    key: bytes
    guessed: bool
    cached_tokens: int = 0
    """Not scaled by trust."""
    ram_serial: int = -1
    """The RAM entry it loads; -1 for none."""
    reply: tuple[float, float] | None = None
    """(tokens where the last reply began, tokens matched) if the key matched into a reply."""
    kept: list[Sequence] = field(default_factory=list)
    """What the request took away: not usable, but its nodes and token counts stay until it ends."""


@dataclass(slots=True, eq=False)
class Slot:
    """One slot; content that is not known is neither empty nor a sequence."""

    id: int
    engine: str
    sequence: Sequence | None = None
    is_empty: bool = True
    last_used: int = -1
    use: Use | None = None


@dataclass(slots=True, eq=False)
class Server:
    """One engine as far as its caches go. `ram` is oldest first."""

    name: str
    slots: list[Slot]
    ram_tokens: int
    clears_idle: bool
    similarity_ratio: float
    """`--slot-prompt-similarity`: a slot that shares more of the prompt is used as it is; 0 asks no slot."""
    ram: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    ram_used_tokens: int = 0
    rest: OrderedDict[int, Slot] = field(init=False)
    """Slots in the order in which they are given away: empty ones, then those used longest ago; some may be in use."""
    unsaved: list[Slot] = field(default_factory=list)
    """Slots whose content may not be in RAM yet."""
    unplaced: int = 0
    """Requests in flight that named no slot and for which no idle one was known."""

    def __post_init__(self) -> None:
        self.rest = OrderedDict((slot.id, slot) for slot in self.slots)

    def spare(self, free: Collection[int], *, is_empty: bool = True) -> Slot | None:
        """The free slot that is missed least: an empty one if that will do, else the one used longest ago."""
        for slot in self.rest.values():
            if slot.use is None and slot.id in free and (is_empty or not slot.is_empty):
                return slot
        return None

    def rested(self, free: Collection[int]) -> Iterator[Slot]:
        """Free slots, those that are missed least first."""
        return (slot for slot in self.rest.values() if slot.use is None and slot.id in free)

    def idle(self, ids: Collection[int] | None = None) -> list[Slot]:
        """Slots without a request, of these ids or of all."""
        if ids is None:
            return [slot for slot in self.slots if slot.use is None]
        return [slot for slot in self.slots if slot.use is None and slot.id in ids]

    def guesses(self) -> list[Slot]:
        """Slots that requests in flight are assumed to run on, because they named none."""
        return [slot for slot in self.slots if slot.use is not None and slot.use.guessed]


@dataclass(slots=True)
class Plan:
    """What llama.cpp finds for a prompt on one slot."""

    slot: Slot
    slot_tokens: float
    """From the slot's own content."""
    entry: Sequence | None = None
    """The RAM entry that would be loaded instead."""
    entry_tokens: float = 0.0
    saves: bool = False
    """Whether the slot's content goes to RAM first."""

    def cached_tokens(self, trust: float, prompt_tokens: int) -> int:
        """The prediction: at least one token of a prompt is always computed."""
        best = self.slot_tokens if self.entry is None else max(self.slot_tokens, trust * self.entry_tokens)
        return max(0, min(round(best), prompt_tokens - 1))


def plan_slot(server: Server, slot: Slot, path: Path, *, is_pinned: bool) -> Plan:
    """What happens on this slot if a request is pinned to it, or if llama.cpp chose it."""
    sequence = slot.sequence
    tokens = 0.0 if sequence is None else path.shared(sequence)
    plan = Plan(slot, tokens)
    if not server.similarity_ratio:
        stays = is_pinned
    elif sequence is None:
        stays = is_pinned and slot.is_empty
    else:
        is_similar = tokens > server.similarity_ratio * path.prompt_tokens
        stays = is_similar and tokens >= SLOT_KEEP_RATIO * sequence.tokens
    if stays or not server.ram_tokens:
        return plan
    plan.saves = sequence is not None
    keep = -1.0 if slot.is_empty else tokens / sequence.tokens if sequence is not None else 0.0
    plan.entry, plan.entry_tokens = best_entry(server, path, keep, tokens)
    return plan


def best_entry(server: Server, path: Path, keep: float = -1.0, tokens: float = 0.0) -> tuple[Sequence | None, float]:
    """The RAM entry that llama.cpp loads: better than (keep, tokens) in both, and each better one in its turn."""
    best: Sequence | None = None
    if not path.is_known:
        return None, 0.0
    entries = path.loadable.get(server.name)
    for entry, shared in _loadable(server, path) if entries is None else entries:
        if shared > tokens and shared > keep * entry.tokens:
            best, keep, tokens = entry, shared / entry.tokens, shared
    return best, tokens if best is not None else 0.0


def _loadable(server: Server, path: Path) -> list[tuple[Sequence, float]]:
    """Those that share most, in the order of their age; the work is bounded, however many RAM holds."""
    shared = ((entry, path.shared(entry)) for entry in _nearest(path, server.name, is_ram=True))
    found = [(entry, tokens) for entry, tokens in shared if tokens >= RAM_KEEP_RATIO * entry.tokens]
    found.sort(key=lambda each: each[0].serial)
    path.loadable[server.name] = found
    return found


def similar_slots(server: Server, path: Path) -> list[Slot]:
    """The few idle slots whose content shares most with the prompt."""
    return [server.slots[each.slot] for each in _nearest(path, server.name, is_ram=False)]


def _nearest(path: Path, engine: str, *, is_ram: bool) -> list[Sequence]:
    """What of an engine shares most with a key, most first; as many as are worth weighing."""
    found: list[Sequence] = []
    below: Node | None = None
    for node in path.worthy():
        if len(found) >= _MOST_ENTRIES:
            break
        if engine in (node.ram if is_ram else node.slots):
            found += islice(_ends_below(node, engine, below, is_ram=is_ram), _MOST_ENTRIES)
        below = node
    return found


def _ends_below(node: Node, engine: str, skipped: Node | None, *, is_ram: bool) -> Iterator[Sequence]:
    """Content of an engine that ends at a node or under it, but for one branch."""
    waiting = [node]
    looks = _MOST_LOOKS
    while waiting and looks:
        each = waiting.pop()
        if is_ram:
            if engine in each.ram_ends:
                yield each.ram_ends[engine]
        else:
            yield from each.slot_ends.get(engine, ())
        for child in each.children.values():
            looks -= 1
            if not looks:
                break
            if child is not skipped and engine in (child.ram if is_ram else child.slots):
                waiting.append(child)


def plan_own_choice(server: Server, idle: list[Slot], path: Path) -> Plan | None:
    """Without a pin llama.cpp takes the most similar one, else the one used longest ago (the last of equals)."""
    chosen, most = None, server.similarity_ratio * path.prompt_tokens
    for slot in idle if server.similarity_ratio else ():
        tokens = 0.0 if slot.sequence is None else path.shared(slot.sequence)
        if tokens > most:
            chosen, most = slot, tokens
    if chosen is None:
        chosen = min(idle, key=lambda slot: (slot.last_used, -slot.id), default=None)
    return None if chosen is None else plan_slot(server, chosen, path, is_pinned=False)


def lost_tokens(server: Server, plan: Plan) -> int:
    """Tokens that would then exist nowhere in the fleet: of the slot's content, and of the entry, which leaves RAM."""
    sequence, entry = plan.slot.sequence, plan.entry
    lost = 0.0 if entry is None else _lost(entry, plan.entry_tokens)
    if sequence is not None and not (plan.saves and sequence.tokens > 0 and fits(server, sequence)):
        lost += _lost(sequence, plan.slot_tokens if entry is None else 0.0)
    return round(lost)


def _lost(sequence: Sequence, kept: float) -> float:
    """What only this one has, when it is cut down to the tokens that are kept."""
    node: Node | None = sequence.node
    while node is not None and node.parent is not None:
        own, others = (node.ram, node.slots) if sequence.is_ram else (node.slots, node.ram)
        if others or len(own) > 1 or own.get(sequence.engine, 0) > 1:
            kept = max(kept, sequence.tokens if node is sequence.node else node.tokens)
            break
        node = node.parent
    return max(0.0, sequence.tokens - kept)


def fits(server: Server, sequence: Sequence) -> bool:
    """Whether RAM is large enough for it at all; a negative size has no limit."""
    return server.ram_tokens < 0 or sequence.tokens <= server.ram_tokens
