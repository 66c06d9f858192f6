"""The engines of one model, indexed by load: the few least loaded of 10,000 are found without looking at the others.

Engines lie in buckets of equal load, inside a bucket in the order they were last used. There are few different loads
(0/4, 1/4, ...), so the least loaded are the first entries of the first buckets. An update is two binary searches, or
none at a bucket's ends, and two moves inside an array of pointers (80 KB at 10,000 engines).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass, field
from math import exp
from typing import Generic, TypeVar

from lltm_ray.routing.adapters import Lora

__all__ = ["LONG_PREFILL_TOKENS", "EngineView", "Table"]

LONG_PREFILL_TOKENS = 512
"""Uncached prompt tokens from which a prefill counts as long: llama.cpp's default n_ubatch, one pass of the model."""
_FEW_HOLDERS = 64
"""Up to so many engines that hold an adapter are compared directly; more are met soon enough on a walk by load."""

_Key = tuple[int, str]


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
    prefilling_tokens: int = 0
    """Uncached prompt tokens of claims that have had no first byte yet."""
    long_prefills: int = 0
    """Claims among those with at least `LONG_PREFILL_TOKENS` to compute."""
    decoding: int = 0
    """Claims that have had their first byte."""
    waiting: int = 0
    """Requests that the router lets wait for a slot of just this engine."""
    spare_tokens: int = 0
    """Cached tokens that a new conversation would drive out of its slots."""
    warm: float = 0.0
    """Conversations that rest in its slots, as of `warm_s`; one whose pause is long counts for less."""
    warm_s: float = 0.0
    adapters: frozenset[str] = frozenset()
    """LoRA adapters it has loaded."""
    running: dict[Lora | None, int] = field(default_factory=dict)
    """Claims by what they choose of them; kept for engines that have any."""
    is_suspect: bool = False
    """It did not answer just now."""
    node_id: str = ""

    @property
    def load(self) -> float:
        """Share of its slots that are busy, 0..1; an engine without slots is full."""
        return self.busy / self.slots_total if self.busy < self.slots_total else 1.0

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return self.busy < self.slots_total

    def resting(self, now_s: float, fade_s: float) -> float:
        """Conversations of its idle slots that are still expected to go on."""
        return self.warm * exp(-max(now_s - self.warm_s, 0.0) / fade_s) if self.warm else 0.0

    def is_taken(self, lora: Lora | None) -> bool:
        """Whether requests with other adapters than these are there."""
        return any(running != lora for running in self.running)


T = TypeVar("T", bound=EngineView)


class Table(Generic[T]):
    """Engines of one model that can take requests. The rows given are kept, not copied.

    While a row is in a table its `busy`, `last_used`, `slots_total`, `is_suspect` and `adapters` are the table's index:
    change them through the methods here.

    Args:
        rows: first members.
    """

    def __init__(self, rows: Iterable[T] = ()) -> None:
        self._rows: dict[str, T] = {}
        self._loads: list[float] = []
        self._buckets: dict[float, list[_Key]] = {}
        self._holders: dict[str, set[str]] = {}
        self._names: tuple[str, ...] | None = ()
        self._serial = 0
        self.version = 0
        """Changes with the membership and with nothing else."""
        self.free_slots = 0
        """Slots that can be claimed now: not those of suspects."""
        self.slots_total = 0
        self.busy_total = 0
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[T]:
        return iter(self._rows.values())

    # --- reading

    @property
    def names(self) -> tuple[str, ...]:
        """All members, sorted; built again only after the membership changed."""
        if self._names is None:
            self._names = tuple(sorted(self._rows))
        return self._names

    def get(self, name: str) -> T | None:
        """The row of that name."""
        return self._rows.get(name)

    def holders(self, adapter: str) -> Set[str]:
        """Names of the members that have an adapter loaded and are not suspect."""
        return self._holders.get(adapter, frozenset())

    def least_loaded(self, k: int, exclude: Collection[str] = frozenset(), adapter: str = "") -> list[T]:
        """The `k` engines with the smallest share of busy slots, among equals those used longest ago, then by name.

        Args:
            k: how many at most.
            exclude: names to pass over.
            adapter: take only engines that have it loaded.

        Returns:
            Engines with a free slot, none of them suspect, best first.
        """
        holders = self.holders(adapter) if adapter else None
        if holders is not None and len(holders) <= _FEW_HOLDERS:
            rows = (self._rows[name] for name in holders if name not in exclude)
            free = (row for row in rows if row.has_room)
            return heapq.nsmallest(k, free, key=lambda row: (row.load, row.last_used, row.name))
        found: list[T] = []
        for load in self._loads:
            if load >= 1.0:
                break
            for _, name in self._buckets[load]:
                if len(found) >= k:
                    return found
                if name not in exclude and (holders is None or name in holders):
                    found.append(self._rows[name])
        return found

    # --- membership

    def add(self, row: T) -> None:
        """Take a row as it is, in place of one of the same name."""
        if row.name in self._rows:
            self.remove(row.name)
        self._rows[row.name] = row
        self._serial = max(self._serial, row.last_used)
        self._names = None
        self.version += 1
        self._enter(row)

    def remove(self, name: str) -> T | None:
        """Take a row out; None if there is none of that name."""
        row = self._rows.get(name)
        if row is None:
            return None
        self._leave(row)
        del self._rows[name]
        self._names = None
        self.version += 1
        return row

    # --- what happens to an engine

    def claim(self, engine: str | T, *, uncached_tokens: int = 0) -> T:
        """Take a slot of an engine. A full engine can be claimed too; that is the caller's decision.

        Args:
            engine: a member's name, or a row; a row that is no member changes its own counters and nothing else.
            uncached_tokens: what it will have to compute before its first byte.

        Raises:
            KeyError: no member has that name.
        """
        row = self._row(engine)
        row.prefilling_tokens += uncached_tokens
        row.long_prefills += uncached_tokens >= LONG_PREFILL_TOKENS
        self._serial += 1
        self._move(row, busy=row.busy + 1, last_used=self._serial)
        return row

    def began(self, engine: str | T, *, uncached_tokens: int = 0) -> None:
        """The first byte of a claim came: its prefill is done and it decodes.

        Args:
            engine: as in `claim`.
            uncached_tokens: what `claim` was told.
        """
        row = self._row(engine)
        self._prefilled(row, uncached_tokens)
        row.decoding += 1

    def release(self, engine: str | T, *, uncached_tokens: int = 0, is_decoding: bool = False) -> None:
        """Give a slot back.

        Args:
            engine: as in `claim`; an unknown name has nothing to give back.
            uncached_tokens: what `claim` was told, if the request never came to `began`.
            is_decoding: whether it came to `began`.
        """
        if isinstance(engine, str) and engine not in self._rows:
            return
        row = self._row(engine)
        if is_decoding:
            row.decoding = max(0, row.decoding - 1)
        else:
            self._prefilled(row, uncached_tokens)
        self._move(row, busy=max(0, row.busy - 1), last_used=row.last_used)

    def touch(self, engine: str | T) -> None:
        """Something that needs no slot was sent there."""
        row = self._row(engine)
        self._serial += 1
        self._move(row, busy=row.busy, last_used=self._serial)

    def suspect(self, name: str, is_suspect: bool) -> None:
        """An engine did not answer and is to be passed over, or is trusted again; unknown names are ignored."""
        row = self._rows.get(name)
        if row is not None and row.is_suspect != is_suspect:
            self._leave(row)
            row.is_suspect = is_suspect
            self._enter(row)

    def resize(self, name: str, slots_total: int) -> None:
        """An engine has another number of slots now; unknown names are ignored."""
        row = self._rows.get(name)
        if row is not None and row.slots_total != slots_total:
            self._leave(row)
            row.slots_total = slots_total
            self._enter(row)

    # --- the index

    def _row(self, engine: str | T) -> T:
        return self._rows[engine] if isinstance(engine, str) else engine

    @staticmethod
    def _prefilled(row: T, uncached_tokens: int) -> None:
        row.prefilling_tokens = max(0, row.prefilling_tokens - uncached_tokens)
        row.long_prefills = max(0, row.long_prefills - (uncached_tokens >= LONG_PREFILL_TOKENS))

    def _move(self, row: T, *, busy: int, last_used: int) -> None:
        if self._rows.get(row.name) is not row:
            row.busy, row.last_used = busy, last_used
            return
        before, total, is_listed = row.busy, row.slots_total, not row.is_suspect
        if is_listed:
            self._unlist(row)
            self.free_slots += (total - busy if busy < total else 0) - (total - before if before < total else 0)
        self.busy_total += busy - before
        row.busy, row.last_used = busy, last_used
        if is_listed:
            self._list(row)

    def _enter(self, row: T) -> None:
        self.slots_total += row.slots_total
        self.busy_total += row.busy
        if row.is_suspect:
            return
        self.free_slots += max(0, row.slots_total - row.busy)
        for adapter in row.adapters:
            self._holders.setdefault(adapter, set()).add(row.name)
        self._list(row)

    def _leave(self, row: T) -> None:
        self.slots_total -= row.slots_total
        self.busy_total -= row.busy
        if row.is_suspect:
            return
        self.free_slots -= max(0, row.slots_total - row.busy)
        for adapter in row.adapters:
            self._holders[adapter].discard(row.name)
            if not self._holders[adapter]:
                del self._holders[adapter]
        self._unlist(row)

    def _list(self, row: T) -> None:
        load = row.load
        bucket = self._buckets.get(load)
        if bucket is None:
            bucket = self._buckets[load] = []
            insort(self._loads, load)
        key = row.last_used, row.name
        if not bucket or bucket[-1] < key:  # always where it was claimed just now
            bucket.append(key)
        else:
            insort(bucket, key)

    def _unlist(self, row: T) -> None:
        load = row.load
        bucket = self._buckets[load]
        key = row.last_used, row.name
        del bucket[0 if bucket[0] == key else bisect_left(bucket, key)]
        if not bucket:
            del self._buckets[load]
            del self._loads[bisect_left(self._loads, load)]
