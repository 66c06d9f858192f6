"""Who holds what: the tree, the servers, and every change to them. `residency` decides, this carries out."""

from __future__ import annotations

from collections import OrderedDict

from lltm_ray.routing.residency.radix import Node, Sequence, Tree
from lltm_ray.routing.residency.slots import Path, Plan, Server, Slot, Use, fits


class Holdings:
    """All known content of all servers of one model, bounded in memory.

    Args:
        limit_bytes: beyond it the sequences touched longest ago are forgotten, except those in use.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.tree = Tree()
        self.servers: dict[str, Server] = {}
        self._ages: OrderedDict[Sequence, None] = OrderedDict()
        self._serial = 0

    @property
    def usable(self) -> int:
        """How many sequences could be reused."""
        return len(self._ages)

    def slot(self, engine: str, slot: int) -> Slot | None:
        """A slot by its id; None if there is no such slot."""
        server = self.servers.get(engine)
        return server.slots[slot] if server is not None and 0 <= slot < len(server.slots) else None

    def stamp(self, slot: Slot) -> None:
        """The slot was used just now."""
        self._serial += 1
        slot.last_used = self._serial
        self.servers[slot.engine].rest.move_to_end(slot.id)

    # --- slots

    def empty(self, slot: Slot, *, is_empty: bool) -> None:
        """Forget a slot's content and its request; it is empty now, or holds something unknown."""
        self.end_use(slot)
        if slot.sequence is not None:
            self.drop(slot.sequence)
        slot.is_empty = is_empty
        if is_empty:
            self.servers[slot.engine].rest.move_to_end(slot.id, last=False)

    def end_use(self, slot: Slot) -> None:
        """The slot's request is over: let go what was kept for it."""
        use, slot.use = slot.use, None
        for sequence in () if use is None else use.kept:
            self.tree.release(sequence)

    def give_back(self, slot: Slot) -> None:
        """The request never was on this slot: its old content is still there."""
        use, slot.use = slot.use, None
        for sequence in [] if use is None else use.kept:
            if sequence.slot != slot.id or slot.sequence is not None:
                self.tree.release(sequence)
            else:
                slot.sequence = sequence
                self._activate(sequence)
                self.servers[sequence.engine].unsaved.append(slot)

    def take(self, server: Server, plan: Plan, path: Path, use: Use) -> None:
        """A request starts on the planned slot and loads what llama.cpp loads."""
        slot, old, entry = plan.slot, plan.slot.sequence, plan.entry
        source = old if entry is None else entry
        if source is not None:
            use.reply = _reply_matched(source.node, path)
        matched = plan.slot_tokens if entry is None else plan.entry_tokens
        use.cached_tokens = max(0, min(round(matched), path.prompt_tokens - 1))
        if old is not None:
            use.kept.append(old)
            self._deactivate(old)
        if entry is not None:
            use.ram_serial = entry.serial
            use.kept.append(entry)
            self._deactivate(entry)
        slot.sequence, slot.is_empty, slot.use = None, False, use

    def publish(self, server: Server) -> None:
        """What llama.cpp does with idle slots whenever a task starts (`--cache-idle-slots`)."""
        if not server.ram_tokens:
            server.unsaved = []
            return
        place = -1  # a slot whose copy goes to make room for one of a lower id is saved again in the same pass
        while waiting := [each.id for each in server.unsaved if each.id > place]:
            place = min(waiting)
            slot = server.slots[place]
            server.unsaved = [each for each in server.unsaved if each is not slot]
            if slot.use is None and slot.sequence is not None:
                self.save(server, slot.sequence)
                if server.clears_idle:
                    self.empty(slot, is_empty=True)

    def store(self, slot: Slot, new: Sequence) -> None:
        """The slot holds this now, instead of whatever it held or was lent for."""
        self.tree.hold(new)
        self.empty(slot, is_empty=False)
        slot.sequence = new
        self._activate(new)
        self.stamp(slot)
        self.servers[new.engine].unsaved.append(slot)

    def replace(self, server: Server, home: Slot | None, new: Sequence | None) -> None:
        """Somebody else used a slot: llama.cpp has saved what it held, and it holds this now, or something unknown.

        Without a slot it is RAM alone that may hold this.
        """
        if new is not None:
            self.tree.hold(new)  # first, for what goes must not take its node along
        if home is not None and home.sequence is not None and server.ram_tokens:
            self.save(server, home.sequence)
        if home is None:
            if new is not None and server.ram_tokens:
                self.save(server, new)
        elif new is not None:
            self.store(home, new)
        else:
            self.empty(home, is_empty=False)
        if new is not None:
            self.tree.release(new)

    # --- RAM

    def forget_older(self, server: Server, serial: int) -> None:
        """An entry was not there: llama.cpp evicts oldest first, so all older ones are gone as well."""
        while server.ram:
            oldest = next(iter(server.ram))
            if oldest.serial >= serial:
                return
            self.drop(oldest)

    def save(self, server: Server, sequence: Sequence) -> None:
        """Copy into RAM as llama.cpp's `server_prompt_cache::alloc` does."""
        node: Node = sequence.node
        if server.name in node.ram or not sequence.tokens or not fits(server, sequence):
            return
        above: Node | None = node
        while above is not None:
            contained = above.ram_ends.get(server.name)
            above = above.parent
            if contained is not None:
                self.drop(contained)
        while server.ram and 0 <= server.ram_tokens < server.ram_used_tokens + sequence.tokens:
            self.drop(next(iter(server.ram)))
        self._serial += 1
        copy = Sequence(server.name, -1, sequence.node, sequence.tokens, self._serial)
        self.tree.hold(copy)
        self._activate(copy)

    # --- sequences

    def drop(self, sequence: Sequence) -> None:
        """Forget a usable sequence."""
        self._deactivate(sequence)
        self.tree.release(sequence)

    def _activate(self, sequence: Sequence) -> None:
        self._ages[sequence] = None
        self.tree.activate(sequence)
        if sequence.is_ram:
            server = self.servers[sequence.engine]
            server.ram[sequence] = None
            server.ram_used_tokens += sequence.tokens

    def _deactivate(self, sequence: Sequence) -> None:
        del self._ages[sequence]
        self.tree.deactivate(sequence)
        server = self.servers[sequence.engine]
        if sequence.is_ram:
            del server.ram[sequence]
            server.ram_used_tokens -= sequence.tokens
            server.unsaved += [server.slots[each.slot] for each in self.tree.within(sequence)]  # copied again
        else:
            server.slots[sequence.slot].sequence = None

    def trim(self) -> None:
        """Hold the limit."""
        while self._ages and self.tree.bytes > self._limit_bytes:
            self.drop(next(iter(self._ages)))


def _reply_matched(node: Node, path: Path) -> tuple[float, float] | None:
    """Where the last reply in this content began and how far the key matched, in tokens, if it matched into it."""
    below: Node | None = node
    while below is not None and below not in path.index:
        below = below.parent
    if below is None or below.reply is None:
        return None
    began, matched = below.reply[1], path.raw_tokens.get(below, 0.0)
    return (began, matched) if matched > began else None
