"""Where KV caches live: predicts how much of a prompt each engine would find cached, and learns from each reply.

Flow: `match` walks the prompt's key through the radix tree, `choose_slot` plays llama.cpp's rules on one engine,
`begin` carries them out in the model, `finish` corrects the model by what the reply told and inserts prompt and reply.
One event loop owns a `Residency`; there are no locks, no clocks and no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lltm_ray.routing.residency.calibration import Calibration
from lltm_ray.routing.residency.holdings import Holdings
from lltm_ray.routing.residency.outside import LEAST_SEQUENCE_TOKENS, Outside
from lltm_ray.routing.residency.radix import Node, Sequence, Step
from lltm_ray.routing.residency.slot_choice import SlotChoice, pick_slot
from lltm_ray.routing.residency.slots import (
    Path,
    Server,
    Slot,
    Use,
    best_entry,
    plan_own_choice,
    plan_slot,
)

__all__ = ["Held", "Match", "Residency", "SlotChoice"]


class Match(NamedTuple):
    """What is known of a key. `engines` are (engine, tokens that it would find cached), best first."""

    key: bytes
    engines: tuple[tuple[str, int], ...]
    prompt_tokens: int
    """How long the prompt is, as far as known."""
    matched_bytes: int
    shared_tokens: int
    """How many of its first tokens other prompts begin with, too, as a system prompt's."""
    path: Path


@dataclass(frozen=True, slots=True)
class Held:
    """What an idle slot holds: the length of its key in bytes, and its tokens."""

    slot: int
    key_bytes: int
    tokens: int
    node: Node | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> bytes:
        """What it holds: the key of the prompt, and what its reply added."""
        edges: list[bytes] = []
        above = self.node
        while above is not None:
            edges.append(above.edge)
            above = above.parent
        return b"".join(reversed(edges))


class Residency:
    """The caches of all engines of one model.

    Args:
        limit_bytes: how large the tree may grow before the content touched longest ago is forgotten.
    """

    def __init__(self, limit_bytes: int = 64 * 2**20) -> None:
        self._holdings = Holdings(limit_bytes)
        self._tree = self._holdings.tree
        self._servers = self._holdings.servers
        self._learnt = Calibration()
        self.outside = Outside(self._holdings, self._learnt)

    # --- engines

    def set_engine(
        self, name: str, *, slots: int, ram_tokens: int, clears_idle: bool = False, similarity_ratio: float = 0.1
    ) -> None:
        """A new or restarted server: nothing is cached there.

        Args:
            name: the engine.
            slots: its parallel sequences.
            ram_tokens: size of its host-memory prompt cache in tokens; 0 is off, negative has no limit.
            clears_idle: with `--kv-unified` llama.cpp moves idle slots to RAM instead of copying them.
            similarity_ratio: its `--slot-prompt-similarity`.
        """
        self.forget_engine(name)
        own = [Slot(index, name) for index in range(slots)]
        self._servers[name] = Server(name, own, ram_tokens, clears_idle, similarity_ratio)
        self._learnt.restarted()

    def forget_engine(self, name: str) -> None:
        """The engine is gone, and all that it held."""
        server = self._servers.get(name)
        if server is None:
            return
        for slot in server.slots:
            self._holdings.empty(slot, is_empty=True)
        for entry in list(server.ram):
            self._holdings.drop(entry)
        del self._servers[name]
        self._learnt.gone(name)

    # --- deciding

    def match(self, key: bytes, limit: int = 4) -> Match:
        """Who holds the beginning of a key in idle slots or RAM; at most `limit` engines, deepest first.

        The work depends on the length of the path and on `limit`, not on how many engines hold it.
        """
        steps = self._tree.walk(key)
        path = self._path(key, steps)
        engines = () if not path.is_known or self._learnt.is_off else self._holders(path, limit)
        depth = steps[-1][1] if steps else 0
        return Match(key, engines, path.prompt_tokens, depth, _shared_tokens(steps, len(key)), path)

    def choose_slot(
        self, engine: str, match: Match, free: Collection[int], *, can_pin: bool = True, lent: Collection[int] = ()
    ) -> SlotChoice:
        """The free slot on which a request would find most; of equals the one whose content is missed least.

        Args:
            engine: where the request goes.
            match: of the request's key.
            free: slots that the caller may use.
            can_pin: whether the request can name a slot; otherwise the answer tells llama.cpp's own choice.
            lent: slots that it may use only to go on from what they hold.
        """
        server = self._servers.get(engine)
        if server is None:
            return SlotChoice(-1)
        return pick_slot(server, free, self._fresh(match), self._learnt, can_pin=can_pin, lent=lent)

    def spare_tokens(self, engine: str, free: Collection[int]) -> int:
        """What a new conversation would drive out there, at the least: tokens of the free slot that is missed least."""
        server = self._servers.get(engine)
        spare = None if server is None else server.spare(free)
        return 0 if spare is None or spare.sequence is None else spare.sequence.tokens

    def estimate_tokens(self, key: bytes) -> int:
        """A prompt's length in tokens: exact where replies told it, by the learnt tokens per byte beyond."""
        return self._prompt_tokens(key, self._tree.walk(key))

    # --- a request's life

    def begin(self, engine: str, slot: int, match: Match) -> None:
        """A request starts there: its slot's content is in use, other idle slots are published to RAM.

        With slot -1 llama.cpp chooses; it is assumed to follow its own rule among the slots known to be idle.
        """
        server = self._servers.get(engine)
        if server is None:
            return
        self._learnt.begun()
        if slot < 0:
            path = self._fresh(match)
            plan = plan_own_choice(server, server.idle(), path)
            server.unplaced += plan is None
        else:
            home = self._holdings.slot(engine, slot)
            if home is None:
                return
            server.unplaced += home.use is not None and home.use.guessed
            self._holdings.end_use(home)
            path = self._fresh(match)
            plan = plan_slot(server, home, path, is_pinned=True)
        if plan is None:
            return
        if plan.saves and plan.slot.sequence is not None:
            # llama.cpp saves before it looks into RAM: what this evicts cannot be loaded any more.
            self._holdings.save(server, plan.slot.sequence)
            if path.version != self._tree.version:
                path = self._fresh(match)
                plan = plan_slot(server, plan.slot, path, is_pinned=slot >= 0)
        self._holdings.take(server, plan, path, Use(match.key, guessed=slot < 0))
        self._holdings.publish(server)
        self._holdings.trim()

    def finish(  # noqa: PLR0913 - one reply's numbers
        self,
        engine: str,
        slot: int,
        key: bytes,
        *,
        reply: bytes | None,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        predicted_tokens: int,
    ) -> None:
        """A request ended well: correct what was assumed, then its slot holds the prompt and the reply.

        Args:
            engine: where it ran.
            slot: as in `begin`; the real one if the reply told it, -1 otherwise.
            key: of the prompt.
            reply: what the reply adds to the key of the next turn; None if that is not known.
            prompt_tokens: `cache_n + prompt_n` of the reply.
            cached_tokens: its `cache_n`.
            output_tokens: its `predicted_n`; llama.cpp never decodes the last one into the slot.
            predicted_tokens: `SlotChoice.cached_tokens` of this request.
        """
        server = self._servers.get(engine)
        if server is None:
            return
        prompt_tokens = prompt_tokens if prompt_tokens > 0 else self.estimate_tokens(key)
        home = self._settle(server, slot, key)
        use = None if home is None else home.use
        self._learnt.measured(len(key), prompt_tokens)
        if self._learnt.finished(engine, prompt_tokens, cached_tokens, predicted_tokens, use):
            self._learnt.wait_for(self._servers)
        if use is not None and use.cached_tokens >= 16 and cached_tokens < use.cached_tokens / 2:
            self._forget_assumed(server, use)
        if home is not None:
            self._store(home, engine, key, reply or b"", (prompt_tokens, max(output_tokens - 1, 0)))

    def abort(self, engine: str, slot: int) -> None:
        """A request ended badly: nobody knows what its slot holds. With -1 it is the oldest that named no slot."""
        server = self._servers.get(engine)
        home = self._holdings.slot(engine, slot) if slot >= 0 or server is None else _guessed(server, None)
        if home is not None:
            self._holdings.empty(home, is_empty=False)
            self._holdings.stamp(home)

    def erase(self, engine: str, slot: int) -> None:
        """The slot was emptied by command; RAM copies stay."""
        home = self._holdings.slot(engine, slot)
        if home is not None:
            self._holdings.empty(home, is_empty=True)

    def moved(self, engine: str, slot: int, to_engine: str, to_slot: int) -> None:
        """The content of an idle slot was saved and restored elsewhere; from now on it counts there only."""
        source, target = self._holdings.slot(engine, slot), self._holdings.slot(to_engine, to_slot)
        if source is None or target is None or source is target or source.use is not None or target.use is not None:
            return
        if source.sequence is not None:
            self._holdings.store(target, Sequence(to_engine, to_slot, source.sequence.node, source.sequence.tokens))
            self._holdings.empty(source, is_empty=False)

    def _settle(self, server: Server, slot: int, key: bytes) -> Slot | None:
        """The slot that a finished request ran on."""
        if slot < 0:
            return _guessed(server, key)
        home = self._holdings.slot(server.name, slot)
        if home is None or (home.use is not None and home.use.key == key):
            return home
        guess = next((each for each in server.guesses() if each.use is not None and each.use.key == key), None)
        if guess is not None and home.use is not None:
            home.use, guess.use = guess.use, home.use
        elif guess is not None:
            self._holdings.empty(home, is_empty=False)
            home.use = Use(key, guessed=True)
            self._holdings.give_back(guess)
        return home

    def _forget_assumed(self, server: Server, use: Use) -> None:
        if use.ram_serial >= 0:
            self._holdings.forget_older(server, use.ram_serial)
        if use.guessed:
            # llama.cpp took another slot: by its own rule the one used longest ago, whose content is gone now.
            victim = min(server.idle(), key=lambda slot: (slot.last_used, -slot.id), default=None)
            if victim is not None:
                self._holdings.empty(victim, is_empty=False)

    def _store(self, home: Slot, engine: str, key: bytes, reply: bytes, tokens: tuple[int, int]) -> None:
        """Insert prompt and reply; `tokens` are those of the prompt and of the reply as the slot keeps them."""
        prompt_tokens, reply_tokens = tokens
        if sum(tokens) < LEAST_SEQUENCE_TOKENS:
            self._holdings.empty(home, is_empty=False)
            self._holdings.stamp(home)
            return
        ratio = self._learnt.tokens_per_byte
        node = self._tree.insert(key + reply, ratio)
        self._holdings.store(home, Sequence(engine, home.id, node, prompt_tokens + reply_tokens))
        self._tree.anchor(node, len(key), prompt_tokens)
        if reply:
            is_whole = self._learnt.retention >= 0.5
            shown = reply_tokens if is_whole else min(reply_tokens, math.ceil(len(reply) * ratio))
            self._tree.anchor(node, len(key) + len(reply), prompt_tokens + shown, exact=is_whole)
        self._tree.mark_reply(node, len(key), prompt_tokens)
        self._holdings.trim()

    # --- reading

    def held(self, engine: str) -> tuple[Held, ...]:
        """What the idle slots of an engine hold, as far as known, the one used longest ago first."""
        server = self._servers.get(engine)
        slots = [] if server is None else sorted(server.idle(), key=lambda slot: slot.last_used)
        contents = [slot.sequence for slot in slots if slot.sequence is not None]
        return tuple(Held(each.slot, each.node.depth, each.tokens, each.node) for each in contents)

    @property
    def is_off(self) -> bool:
        """Whether reuse proved 0 again and again (hybrid and SWA models): nothing is predicted but in short probes."""
        return self._learnt.is_off

    def calibration(self) -> dict[str, Any]:
        """How well predictions did lately, what was learnt, and how large the tree is."""
        entries = sum(len(server.ram) for server in self._servers.values())
        return self._learnt.snapshot() | {
            "engines": len(self._servers),
            "slot_sequences": self._holdings.usable - entries,
            "ram_sequences": entries,
            "nodes": self._tree.nodes,
            "bytes": self._tree.bytes,
        }

    # --- prediction

    def _path(self, key: bytes, steps: list[Step]) -> Path:
        index, raw, retention, before = {self._tree.root: 0.0}, {}, self._learnt.retention, 0.0
        for node, depth, tokens in steps:
            reply, found = node.reply, tokens
            if reply is not None:
                raw[node] = tokens
                if depth > reply[0]:
                    found = reply[1] + retention * max(tokens - reply[1], 0.0)
            before = index[node] = max(before, found)
        return Path(index, raw, self._prompt_tokens(key, steps), self._tree.version, before)

    def _fresh(self, match: Match) -> Path:
        if match.path.version == self._tree.version:
            return match.path
        return self._path(match.key, self._tree.walk(match.key))

    def _prompt_tokens(self, key: bytes, steps: list[Step]) -> int:
        _, depth, tokens = steps[-1] if steps else (None, 0, 0.0)
        return math.ceil(tokens + (len(key) - depth) * self._learnt.tokens_per_byte - 1e-6)

    def _holders(self, path: Path, limit: int) -> tuple[tuple[str, int], ...]:
        found: dict[str, float] = {}
        maybe: dict[str, float] = {}
        steps = [(node, path.index[node]) for node in path.worthy()]
        for node, tokens in steps:
            for engine in reversed(node.slots):
                if len(found) >= limit:
                    break
                found.setdefault(engine, tokens)
            self._ask_ram(node, path, found, maybe, limit)
            if len(found) >= limit:
                break
        for engine, tokens in maybe.items():
            own = next((there for node, there in steps if engine in node.slots), 0.0)
            found[engine] = max(own, tokens)
        most = path.prompt_tokens - 1
        rated = [(engine, min(round(tokens), most)) for engine, tokens in found.items()]
        rated.sort(key=lambda each: -each[1])
        return tuple(each for each in rated[:limit] if each[1] > 0)

    def _ask_ram(self, node: Node, path: Path, found: dict[str, float], maybe: dict[str, float], limit: int) -> None:
        for engine in reversed(node.ram):
            if len(found) + len(maybe) >= limit:
                return
            if engine not in found and engine not in maybe:
                maybe[engine] = self._learnt.ram_trust * best_entry(self._servers[engine], path)[1]


def _shared_tokens(steps: list[Step], key_bytes: int) -> int:
    """Tokens up to the last place where known prompts, this one among them, part.

    Where only the reply is another one it is the same session, whose template or tokenizer changed it.
    """
    for index, (node, depth, tokens) in enumerate(reversed(steps)):
        if index == 0 and depth < node.depth:
            if node.reply is None or depth <= node.reply[0]:
                return round(tokens)
        elif len(node.children) > (index > 0 or depth == key_bytes):
            return round(tokens)
    return 0


def _guessed(server: Server, key: bytes | None) -> Slot | None:
    """The slot of a request that named none: of this key, else of any; one guess goes with each such request."""
    slots = server.guesses()
    same = [slot for slot in slots if slot.use is not None and slot.use.key == key]
    if not same and server.unplaced:
        server.unplaced -= 1
        return None
    return min(same or slots, key=lambda slot: slot.last_used, default=None)
