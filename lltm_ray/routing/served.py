"""Everything routing knows of one served model: its engines, what they hold, how fast they are, and who waits.

Flow of a claim: `residency.match` says who holds the beginning of the prompt, `policy.choose` picks the engine,
`residency.choose_slot` the slot; when the request is on its way, `settle` tells residency and policy what became of it.
Flow of its end: the reply's timings correct residency, rates, the tenant's account.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from lltm_ray.records import EngineInfo, ModelInfo
from lltm_ray.routing.admission import Admission, Capacity
from lltm_ray.routing.choice import Matches
from lltm_ray.routing.hearsay import UNKNOWN, Heard, Hearsay
from lltm_ray.routing.hints import Counsel
from lltm_ray.routing.policy import Ask, Choice, make_policy
from lltm_ray.routing.rates import Rates
from lltm_ray.routing.residency import Held, Match, Residency
from lltm_ray.routing.rows import Lease, Row, Served, count, identity
from lltm_ray.routing.table import Table

LEAST_GAIN_TOKENS = 64
"""What another router knows of a prompt must be so much more than what this one knows to be looked up."""
KNOWN_REQUESTS = 8
"""Replies after which a model's pace counts as known; nobody is refused on a guess."""
LEARN_ALL, LEARN_EVERY = 256, 4
"""Every one of a model's first replies teaches its rates, later every so many: they change slowly."""


@dataclass(frozen=True, slots=True)
class SlotShare:
    """Which slots of every engine are this router's: those with `(id + offset) % count == index`."""

    index: int = 0
    count: int = 1

    def of(self, engine: str, slots_total: int) -> set[int]:
        """Slot ids of one engine; the offset by its name spreads what does not divide evenly."""
        offset = sum(engine.encode("utf-8"))
        if self.count > slots_total > 0:  # more routers than slots: several share one, and llama-server lets them wait
            return {(self.index + offset) % slots_total}
        return {slot for slot in range(slots_total) if (slot + offset) % self.count == self.index}


@dataclass(slots=True)
class Counts:
    """What happened to a model's requests since this router began."""

    requests: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0
    generated_tokens: int = 0
    delivered_tokens: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)


def _is_sample(number: int) -> bool:
    """One of `LEARN_EVERY`, scattered so that no pattern of requests always meets the same engine."""
    return (number * 0x9E3779B1 >> 16) % LEARN_EVERY == 0


class ServedModel:
    """One model behind a router.

    Args:
        name: what clients write into `model`.
        policy: name of the routing policy.
        queue_limit: requests that may wait for it.
        residency_bytes: room for the index of what its engines have cached.
        counsel: what analytics tells the router.
    """

    def __init__(
        self,
        name: str,
        policy: str,
        queue_limit: int,
        residency_bytes: int = 64 * 2**20,
        *,
        counsel: Counsel | None = None,
    ) -> None:
        self.name = name
        self.info: ModelInfo | None = None
        self.table: Table[Row] = Table()
        self.rates = Rates()
        self._residency = Residency(residency_bytes)
        self._unsettled: tuple[Lease, Match] | None = None
        self.policy = make_policy(policy)
        self.admission: Admission[Any] = Admission(queue_limit)
        self.rows: dict[str, Row] = {}
        self.counts = Counts()
        self.hearsay = Hearsay()
        self.untold: dict[tuple[str, int], None] = {}
        """Slots by name of engine and number where claims of ours began or ended since other routers were told."""
        self._counsel = counsel or Counsel()
        self._pins = policy == "residency"

    # --- engines

    def update(self, engines: Iterable[EngineInfo], share: SlotShare) -> None:
        """Take the directory's word on all engines of this model."""
        fresh = {info.name: info for info in engines}
        for name, row in list(self.rows.items()):
            if name not in fresh:
                row.listed = False
                self.sync(row)
                self._drop_if_gone(row)
        for name, info in fresh.items():
            self._merge(name, info, share.of(name, info.slots_total))

    def _merge(self, name: str, info: EngineInfo, slots: set[int]) -> None:
        row = self.rows.get(name)
        if row is None or identity(row.info) != identity(info):
            if row is not None:
                row.listed = False  # nobody shall wait for this life any more
                self._forget_told(row)
            self._forget(name)
            row = Row(name, self.name, len(slots), info=info, owned=slots, free=set(slots), node_id=info.node_id)
            row.adapters = frozenset(each.name for each in info.adapters)
            self.rows[name] = row
            self.forget_caches(row)
        row.learn(info, self.forget_caches)
        if row.owned != slots:
            self._reshape(row, slots)
        row.lent = frozenset(range(info.slots_total)) - slots
        self.sync(row)

    def forget_caches(self, row: Row) -> None:
        """What its server has cached is not worth anything any more."""
        info, row.rests, row.warm = row.info, {}, 0.0
        if info.url:
            self.residency.set_engine(
                row.name,
                slots=info.slots_total,
                ram_tokens=info.cache_ram_tokens,
                clears_idle=info.kv_unified,
                similarity_ratio=info.slot_similarity_ratio,
            )

    def _reshape(self, row: Row, slots: set[int]) -> None:
        """Another part of the slots is ours; claims that run on those we lost end where they are."""
        self.table.remove(row.name)
        row.slots_total, row.owned, row.free = len(slots), slots, slots - row.pinned

    def _drop_if_gone(self, row: Row) -> None:
        """An engine that left is forgotten when its last claim ends: it may come back before."""
        if not row.listed and not row.busy and self.rows.get(row.name) is row:
            del self.rows[row.name]
            self._forget_told(row)
            self._forget(row.name, is_gone=True)

    def _forget(self, name: str, *, is_gone: bool = False) -> None:
        self.settle()
        self.table.remove(name)
        self.policy.forget(name, is_gone=is_gone)
        self.rates.forget(name)
        self.residency.forget_engine(name)

    def _forget_told(self, row: Row) -> None:
        for slot in range(row.info.slots_total):
            self.untold.pop((row.name, slot), None)
            self.hearsay.drop(row.name, slot)

    def sync(self, row: Row) -> None:
        """Let the table hold a row exactly as long as it can take requests."""
        if row.is_usable and row.name not in self.table:
            row.is_suspect = row.suspicions > 0
            self.table.add(row)
        elif not row.is_usable and row.name in self.table:
            self.table.remove(row.name)

    def suspect(self, row: Row, change: int) -> None:
        """One suspicion more or less."""
        row.suspicions += change
        if row.name in self.table and self.table.get(row.name) is row:
            self.table.suspect(row.name, row.suspicions > 0)

    # --- claims

    @property
    def residency(self) -> Residency:
        """What its engines have cached, all claims so far carried out."""
        if self._unsettled is not None:
            self.settle()
        return self._residency

    def settle(self) -> None:
        """Carry out what the last claim means for caches and sessions.

        No part of the decision, as the request need not wait for it: a router calls this when the request is on its
        way, and whatever asks about caches or sessions earlier than that calls it first.
        """
        if self._unsettled is None:
            return
        (lease, match), self._unsettled = self._unsettled, None
        self._residency.begin(lease.row.name, lease.slot, match)
        self._look_at_spare(lease.row)
        self.policy.placed(lease.ask, lease.row.name)

    def match(self, ask: Ask) -> Match:
        """What the engines have cached of a prompt, as far as is known here or was heard of."""
        match = self.residency.match(ask.key)
        if not (self.hearsay and self._pins and ask.can_pin):
            return match
        worth_tokens = LEAST_GAIN_TOKENS + (match.engines[0][1] if match.engines else 0)
        heard = self.hearsay.find(ask.key, worth_tokens) if match.prompt_tokens > worth_tokens else ()
        return self._residency.match(ask.key) if any(self._believe(each, ask.key) for each in heard) else match

    def _believe(self, heard: Heard, key: bytes) -> bool:
        """Take what was heard for known, now that a prompt told its bytes; False: it is not true any more."""
        told, row = heard.digest, self.rows.get(heard.digest.engine)
        self.hearsay.forget(told)
        if row is None or row.info.server_pid != told.server_pid or not (heard.in_slot or row.info.cache_ram_tokens):
            return False
        slot = told.slot if heard.in_slot else -1
        self._residency.outside.learn(row.name, slot, key[: heard.end_bytes], heard.tokens, told.tokens)
        return True

    def choose(self, ask: Ask, match: Match, exclude: Collection[str]) -> Choice | None:
        """Which engine should take a request; None: no slot is free for it."""
        self.settle()
        engines: Matches = match.engines
        advice = self._counsel.advice
        if advice is not None and ask.only is None and self._pins:
            engines = advice.widen(ask, engines)
        choice = self.policy.choose(ask, self.table, self.rates, engines, frozenset(exclude))
        return None if choice is None or self.rows[choice.engine].is_promised(ask.lora) else choice

    def _look_at_spare(self, row: Row) -> None:
        if self._pins:
            row.spare_tokens = self._residency.spare_tokens(row.name, row.free)

    def claim(self, ask: Ask, match: Match, choice: Choice, now_s: float) -> Lease:
        """Take the slot that a choice is about."""
        row = self.rows[choice.engine]
        free = row.free - row.taken if row.taken else row.free
        can_pin = self._pins and ask.can_pin and not row.unpinned and bool(free)
        spot = self.residency.choose_slot(row.name, match, free or row.free, can_pin=can_pin, lent=row.lent - row.taken)
        self.rates.returns.claimed(match, spot, row.rested_s(spot.slot, now_s))
        uncached = max(0, ask.prompt_tokens - spot.cached_tokens)
        lease = self._take(row, spot.slot, ask, now_s, uncached)
        lease.choice, lease.cached_tokens = choice, spot.cached_tokens
        lease.speed = self.rates.speed(row.name)
        self._unsettled = lease, match
        return lease

    def claim_slot(self, row: Row, slot: int, ask: Ask, now_s: float) -> Lease:
        """Take one slot for a migration."""
        lease = self._take(row, slot, ask, now_s, 0)
        lease.moves = True
        return lease

    def _take(self, row: Row, slot: int, ask: Ask, now_s: float, uncached: int) -> Lease:
        if row.adapters:
            count(row.running, ask.lora, 1)
            count(row.coming, ask.lora, 1)
        if slot >= 0:
            row.free.discard(slot)
            row.pinned.add(slot)
            row.wake(slot, now_s, self.rates.fade_s)
            self._touch(row, slot, now_s)
        else:
            row.unpinned += 1
        self.table.claim(row, uncached_tokens=uncached)
        return Lease(row.info, self.name, row, ask, now_s, slot, uncached_tokens=uncached, busy=row.busy)

    def _touch(self, row: Row, slot: int, now_s: float) -> None:
        row.touch(slot, now_s)
        self.untold[row.name, slot] = None
        self.hearsay.drop(row.name, slot)

    def began(self, lease: Lease) -> None:
        """The first byte of a claim's answer came."""
        if not lease.began:
            lease.began = True
            if lease.row.adapters:
                count(lease.row.coming, lease.ask.lora, -1)
            self.table.began(lease.row, uncached_tokens=lease.uncached_tokens)

    def release(self, lease: Lease, served: Served | None, now_s: float) -> None:
        """Give a slot back and learn from what its reply told."""
        self.settle()
        row = lease.row
        if row.adapters:
            count(row.running, lease.ask.lora, -1)
            count(row.coming, lease.ask.lora, -(not lease.began))
        self.table.release(row, uncached_tokens=0 if lease.began else lease.uncached_tokens, is_decoding=lease.began)
        if lease.slot >= 0:
            row.pinned.discard(lease.slot)
            if served is not None and not lease.moves:
                row.rest(lease.slot, now_s, self.rates.fade_s)
            self._touch(row, lease.slot, now_s)
            if lease.slot in row.owned:
                row.free.add(lease.slot)
        else:
            row.unpinned -= 1
            row.touched_s = dict.fromkeys(range(row.info.slots_total), now_s)  # nobody knows on which it ran
        self._drop_if_gone(row)
        if lease.moves:
            return
        is_current = self.rows.get(row.name) is row
        if served is None:
            if not lease.began:  # else it has cost something and nobody knows what: the charge stays as planned
                self._settle(lease, 0.0)
            if is_current:
                self._residency.abort(row.name, lease.slot)
        else:
            self._learn(lease, served, now_s, is_current=is_current)
        if is_current:
            self._look_at_spare(row)

    def _learn(self, lease: Lease, served: Served, now_s: float, *, is_current: bool) -> None:
        told, ask = served.timings, lease.ask
        self._count(lease, served)
        self._settle(lease, told.prompt_n + told.predicted_n)
        if not is_current:
            return
        if self.counts.requests < LEARN_ALL or _is_sample(self.counts.requests):
            busy = (lease.busy + lease.row.busy + 1) / 2
            self.rates.learn(lease.row.name, told, busy=busy, held_s=now_s - lease.claimed_s)
        self._residency.finish(
            lease.row.name,
            lease.slot,
            ask.key,
            reply=served.reply if ask.key else None,  # what follows an unknown prompt begins nothing
            prompt_tokens=told.cache_n + told.prompt_n,
            cached_tokens=told.cache_n,
            output_tokens=told.predicted_n,
            predicted_tokens=lease.cached_tokens,
        )

    def _settle(self, lease: Lease, tokens: float) -> None:
        """Correct what a tenant was charged when it was taken from the queue."""
        if lease.cost_tokens:
            self.admission.settle(lease.ask.tenant, lease.cost_tokens, tokens, priority=lease.ask.priority)

    def _count(self, lease: Lease, served: Served) -> None:
        told, counts = served.timings, self.counts
        counts.requests += 1
        counts.prompt_tokens += told.cache_n + told.prompt_n
        counts.cached_tokens += told.cache_n
        counts.predicted_tokens += lease.cached_tokens
        counts.generated_tokens += told.predicted_n
        counts.delivered_tokens += served.delivered_tokens

    # --- reading

    def capacity(self) -> Capacity:
        """How much of this model's work its engines do."""
        slots = self.table.slots_total
        mean_s = self.rates.service_s()
        is_known = self.rates.requests >= KNOWN_REQUESTS
        return Capacity(
            slots=slots,
            tokens_s=self.rates.throughput_tokens_s() * slots if is_known else 0.0,
            service_s=mean_s,
            service_dev_s=self.rates.service_s(1.0) - mean_s,
            free_slots=self.table.free_slots,
        )

    def held(self, engine: str) -> tuple[Held, ...]:
        """What the `holdable` slots of an engine hold, coldest first; what only another router knows is left to it."""
        row = self.rows.get(engine)
        if row is None or row.unpinned:
            return ()
        slots = self.holdable(row)
        return tuple(
            each for each in self.residency.held(engine) if each.slot in slots and not each.key.startswith(UNKNOWN)
        )

    def holdable(self, row: Row) -> set[int]:
        """Idle slots whose content may be moved: ours and, once nobody begins anything there, those of other parts."""
        return (row.free if row.is_usable else row.free | (row.lent - row.pinned)) - row.taken

    @property
    def is_startable(self) -> bool:
        """Whether a request may wait for an engine that does not run yet."""
        return self.info is not None and self.info.is_startable

    def snapshot(self) -> dict[str, Any]:
        """As JSON, for `/lltm/status`."""
        counts = self.counts
        return {
            "policy": self.policy.name,
            "requests": counts.requests,
            "rejected": counts.rejected,
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "predicted_cached_tokens": counts.predicted_tokens,
            "generated_tokens": counts.generated_tokens,
            "delivered_tokens": counts.delivered_tokens,
            "residency": self.residency.calibration(),
            "admission": self.admission.snapshot(),
            "rates": self.rates.snapshot(),
        }
