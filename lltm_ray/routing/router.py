"""Who may use which slot now: the tables of engines, the claims on their slots, and those who wait for one.

One event loop owns a `Router`; every method runs to its end without yielding except `acquire`, so there are no locks.
A claim is made in the same step that a slot is found free, or by whoever frees it, on behalf of a waiter that can use
it; in-flight requests of an engine never exceed its slots.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from lltm_ray.errors import ConfigError, EngineNotReadyError, ModelNotFoundError, OverloadedError
from lltm_ray.records import Adapter, EngineInfo, EngineState, Hints, ModelDemand, ModelInfo
from lltm_ray.routing.adapters import check_name, split_model
from lltm_ray.routing.admission import Overload
from lltm_ray.routing.admission.waiting import Waiter, WaitingRoom
from lltm_ray.routing.gossip import Gossip
from lltm_ray.routing.hints import Counsel
from lltm_ray.routing.hope import Hope
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.residency import Held
from lltm_ray.routing.rows import Lease, Row, Served, identity
from lltm_ray.routing.served import ServedModel, SlotShare

__all__ = ["Lease", "Router", "Served"]


class Router:
    """Routes requests to slots.

    Args:
        queue_limit: requests that may wait for one model; 0 rejects at once when every slot is busy.
        queue_timeout_s: longest wait of a request that sets no deadline.
        policy: name of the policy that chooses engines.
        clock: monotonic seconds.
        wake: called with the name of a model that somebody waits for and no engine runs.
        record: told of every request that an engine answered.
    """

    def __init__(
        self,
        queue_limit: int,
        queue_timeout_s: float,
        *,
        policy: str = "residency",
        clock: Callable[[], float] = time.monotonic,
        wake: Callable[[str], None] | None = None,
        record: Callable[[Lease, Served], None] | None = None,
    ) -> None:
        self._queue_limit = queue_limit
        self._queue_timeout_s = queue_timeout_s
        self._policy = policy
        self._clock = clock
        self._wake = wake
        self._record = record
        self._models: dict[str, ServedModel] = {}
        self._rooms: dict[str, WaitingRoom] = {}
        self._names: tuple[str, ...] = ()
        self._engines: dict[str, Row] = {}
        self._share = SlotShare()
        self.gossip = Gossip(self._models, clock)
        self._counsel = Counsel()

    # --- the table

    def update(
        self, engines: Iterable[EngineInfo], models: Iterable[ModelInfo] = (), share: SlotShare | None = None
    ) -> None:
        """Take the directory's table. Engines that are missing from it take no more requests.

        Requests that wait for what cannot come any more get their `EngineNotReadyError` in this step.

        Args:
            engines: every engine of the fleet.
            models: every served model, also those without engines; none: the engines' own.
            share: which slots are this router's; None leaves that as it is.
        """
        self._share = share or self._share
        by_model: dict[str, list[EngineInfo]] = {info.name: [] for info in models}
        infos = {info.name: info for info in models}
        for engine in engines:
            by_model.setdefault(engine.model, []).append(engine)
        for name, listed in by_model.items():
            served = self._served(name)
            served.info = infos.get(name)
            served.update(listed, self._share)
        for name in [name for name in self._models if name not in by_model]:
            self._models[name].info = None
            self._models[name].update((), self._share)
        self._names = tuple(by_model)
        self._engines = {
            name: row for served in self._models.values() for name, row in served.rows.items() if row.listed
        }
        for name, room in self._rooms.items():
            room.dispatch()
            self._dismiss(name)
            room.keep_awake()

    def _served(self, name: str) -> ServedModel:
        if name not in self._models:
            served = self._models[name] = ServedModel(name, self._policy, self._queue_limit, counsel=self._counsel)
            wake = partial(self._wake, name) if self._wake is not None else None
            self._rooms[name] = WaitingRoom(served, self._clock, self._refusal, wake)
        return self._models[name]

    def hint(self, hints: Hints, salt: bytes) -> None:
        """Follow analytics' hints until newer ones come, or until they are no longer valid.

        Args:
            hints: as the directory tells them.
            salt: the fleet's, with which beginnings of prompts are hashed.
        """
        self._counsel.take(hints, salt)

    def suspect(self, engine: EngineInfo | str) -> None:
        """A connection to this engine failed: skip it for a second or more, or until its server is another one.

        Args:
            engine: as it was when the connection failed; if its server is another one by now, nothing happens. A name
                means whatever server the engine has now.
        """
        row = self._engines.get(engine if isinstance(engine, str) else engine.name)
        if row is None or (isinstance(engine, EngineInfo) and identity(row.info) != identity(engine)):
            return
        pause_s = row.relapse()
        self._models[row.model].suspect(row, 1)
        asyncio.get_running_loop().call_later(pause_s, self._cooled, row)

    def _cooled(self, row: Row) -> None:
        self._models[row.model].suspect(row, -1)
        self._rooms[row.model].dispatch(row.name)

    # --- reading

    def models(self) -> tuple[str, ...]:
        """Served names in the order of the settings, whether or not an engine of them is ready."""
        return self._names

    def model_info(self, name: str) -> ModelInfo | None:
        """What the directory says of a model."""
        served = self._models.get(name)
        return served.info if served else None

    def engines(self, model: str | None = None) -> tuple[EngineInfo, ...]:
        """All known engines, or those of one model."""
        return tuple(row.info for row in self._engines.values() if model in (None, row.model))

    def ready(self, model: str | None = None) -> tuple[EngineInfo, ...]:
        """Engines whose servers are ready, suspected and drained ones included."""
        return tuple(
            row.info
            for row in self._engines.values()
            if model in (None, row.model) and row.info.state is EngineState.READY and row.info.slots_total > 0
        )

    def resolve(self, model: str | None, only: str | None = None) -> str:
        """The served name that a request means.

        Args:
            model: the request's own word, with `:adapter` behind it for one of its LoRA adapters; None or empty means
                the pinned engine's model, the only one, or the first.
            only: name of an engine the request is pinned to.

        Raises:
            ConfigError: `only` is no engine, or serves another model.
            ModelNotFoundError: nobody serves `model`, or has that adapter.
            EngineNotReadyError: the fleet is empty.
        """
        if only is not None:
            return self._resolve_pinned(model, only)
        if model in self._names:
            return model
        if not self._names:
            raise EngineNotReadyError("of any model", "missing: the fleet has no engines yet")
        if not model:
            return self._names[0]
        served, adapter = split_model(model, self._names)
        if served not in self._names:
            raise ModelNotFoundError(model, f"this fleet serves {', '.join(self._names)}")
        if adapter:
            check_name(served, adapter, self.adapters(served))
        return served

    def _resolve_pinned(self, model: str | None, only: str) -> str:
        row = self._engines.get(only)
        if row is None:
            known = ", ".join(sorted(self._engines)) or "none yet"
            raise ConfigError("engine", only, f"no such engine; known are {known}")
        asked, adapter = split_model(model or row.model, (row.model,))
        if adapter:
            check_name(asked, adapter, row.info.adapters)
        if asked != row.model:
            raise ConfigError("engine", only, f"serves {row.model!r}, the request asks for {model!r}")
        return row.model

    def adapters(self, model: str) -> tuple[Adapter, ...]:
        """LoRA adapters that requests for a served model may choose from; those of its settings while nothing runs."""
        served = self._models[model]
        found = {each.name: each for row in served.rows.values() if row.listed for each in row.info.adapters}
        return tuple(found.values()) or (served.info.adapters if served.info else ())

    def rescale(self, name: str, scales: dict[int, float]) -> None:
        """An engine's own adapter scales by id are these now, those not named 0: what it has cached is of others."""
        row = self._engines.get(name)
        if row is not None and row.info.adapters:
            row.scales = scales
            self._models[row.model].forget_caches(row)

    def pick(self, model: str | None, *, only: str | None = None, exclude: Collection[str] = frozenset()) -> EngineInfo:
        """A ready engine for a request that needs no slot; the one used longest ago.

        Suspected engines come last and, among equals in that, excluded ones: better one that may answer than none.

        Raises:
            ConfigError, ModelNotFoundError: as `resolve`.
            EngineNotReadyError: none is ready.
        """
        name = self.resolve(model, only)
        served = self._models[name]
        rows = [row for row in served.rows.values() if row.is_usable and only in (None, row.name)]
        if not rows:
            raise self.not_ready(name, only)
        row = min(rows, key=lambda each: (each.suspicions > 0, each.name in exclude, each.last_used))
        served.table.touch(row)
        return row.info

    def snapshot(self) -> dict[str, Any]:
        """Claims, queues and what was learnt, as JSON: `{"waiting", "rejected", "engines", "models"}`."""
        waiting = {name: room.count for name, room in self._rooms.items() if room.count}
        return {
            "waiting": waiting,
            "rejected": sum(served.counts.rejected for served in self._models.values()),
            "engines": {row.name: row.snapshot() for row in self._engines.values()},
            "models": {name: served.snapshot() for name, served in self._models.items()},
        }

    def demand(self) -> tuple[ModelDemand, ...]:
        """What the fleet's controller scales by."""
        return tuple(room.demand() for room in self._rooms.values() if room.last_request_unix_nano)

    def loads(self, model: str) -> dict[str, tuple[int, int]]:
        """Claimed slots, and all that are this router's, of each engine of a model that can take requests."""
        rows = self._models[model].rows.values() if model in self._models else ()
        return {row.name: (row.busy, row.slots_total) for row in rows if row.is_usable}

    # --- claims

    async def acquire(self, ask: Ask, *, exclude: Collection[str] = frozenset()) -> Lease:
        """Claim a slot, waiting if there is none.

        Args:
            ask: the request; its `model` as in `resolve`.
            exclude: engines to avoid as long as another one of the model has a free slot.

        Raises:
            ConfigError, ModelNotFoundError: as `resolve`.
            OverloadedError: the queue is full, or no slot will come free in time.
            EngineNotReadyError: no engine of the model was ready in time, or none will be; see `hope`.
        """
        name = self.resolve(ask.model, ask.only)
        served, room, now_s = self._models[name], self._rooms[name], self._clock()
        if ask.deadline_s == math.inf:
            ask.deadline_s = now_s + self._queue_timeout_s
        match = served.match(ask)
        ask.arrived_s = now_s
        ask.model, ask.prompt_tokens, ask.shared_tokens = name, match.prompt_tokens, match.shared_tokens
        waiter = Waiter(ask, frozenset(exclude))
        lease = room.claim_now(waiter, match, now_s)
        if lease is not None:
            asyncio.get_running_loop().call_soon(served.settle)
            return lease
        if not served.table.slots_total or (ask.only is not None and ask.only not in served.table):
            self._check_hope(served, ask.only)
        return await room.wait(waiter, now_s)

    def began(self, lease: Lease) -> None:
        """The first byte of the answer came."""
        lease.row.recover()
        self._rooms[lease.model].began(lease)

    def release(self, lease: Lease, served: Served | None = None) -> None:
        """Give a slot back; a second time does nothing. A waiter that can use it gets it in this step.

        Args:
            lease: the claim.
            served: what the reply told; None: it was cut off, so nothing is known of the slot's content any more.
        """
        if lease.released:
            return
        lease.released = True
        self._models[lease.model].release(lease, served, self._clock())
        if self._record is not None and served is not None:
            self._record(lease, served)
        self._rooms[lease.model].dispatch(lease.engine.name)

    # --- moving engines and conversations

    def close_engine(self, name: str, *, is_leaving: bool = False) -> None:
        """No new claims there until `open_engine`, or until its server is another one; running ones go on.

        Who waits for it is refused if nobody else will come; `is_leaving`: who ends it sees to it that others do.
        """
        row = self._engines.get(name)
        if row is not None:
            row.closed, row.leaving = True, row.leaving or is_leaving
            self._models[row.model].sync(row)
            self._dismiss(row.model)

    def open_engine(self, name: str) -> None:
        """Take requests there again."""
        row = self._engines.get(name)
        if row is not None:
            row.closed = row.leaving = False
            self._models[row.model].sync(row)
            self._rooms[row.model].dispatch(name)

    def unserved(self, name: str) -> str:
        """What people are told when requests for this engine's model are refused now; empty when they are not."""
        row = self._engines.get(name)
        return self._hope(row.model).warning(name) if row is not None else ""

    def in_flight(self, name: str) -> int:
        """Claimed slots of an engine."""
        row = self._engines.get(name)
        return row.busy if row else 0

    def held(self, name: str) -> tuple[Held, ...]:
        """Idle slots of an engine that hold a conversation, coldest first."""
        row = self._engines.get(name)
        return self._models[row.model].held(name) if row else ()

    def hold_slot(self, name: str, slot: int) -> Lease | None:
        """Claim exactly this idle slot, on a closed engine too."""
        row = self._engines.get(name)
        if row is None or row.unpinned or slot not in self._models[row.model].holdable(row):
            return None
        return self._models[row.model].claim_slot(row, slot, Ask(model=row.model), self._clock())

    def claim_slot(self, model: str, *, exclude: Collection[str], tokens: int) -> Lease | None:
        """Claim the free slot of another engine that loses least; None when nothing is free or somebody waits."""
        served = self._models.get(model)
        if served is None or self._rooms[model].count:
            return None
        for row in served.table.least_loaded(8, exclude=frozenset(exclude)):
            fits = tokens <= row.info.n_ctx // max(1, row.info.slots_total) or not row.info.n_ctx
            free = row.free - row.taken
            if not fits or row.unpinned or not free:
                continue
            spot = served.residency.choose_slot(row.name, served.residency.match(b""), free)
            return served.claim_slot(row, max(spot.slot, min(free)), Ask(model=model), self._clock())
        return None

    def moved(self, source: str, slot: int, target: str, target_slot: int) -> None:
        """The target's slot now holds what the source's held, and the source's slot nothing."""
        row = self._engines.get(source)
        if row is not None:
            self._models[row.model].residency.moved(source, slot, target, target_slot)

    def erased(self, name: str, slot: int) -> None:
        """A slot turned out to be empty."""
        row = self._engines.get(name)
        if row is not None:
            self._models[row.model].residency.erase(name, slot)

    # --- refusals

    def not_ready(self, model: str, only: str | None = None) -> EngineNotReadyError:
        """The error that says why no engine of a model, or not the pinned one, can be used now."""
        return self._hope(model).error(only)

    def _hope(self, model: str) -> Hope:
        served = self._models[model]
        return Hope(model, [row for row in served.rows.values() if row.listed], served.info)

    def _check_hope(self, served: ServedModel, only: str | None) -> None:
        """Before waiting: refuse a model that cannot come, wake one that can start."""
        hope = self._hope(served.name)
        if hope.is_vain(only):
            raise hope.error(only)
        if served.is_startable and self._wake is not None and not served.table.slots_total:
            self._wake(served.name)

    def _dismiss(self, model: str) -> None:
        hope = self._hope(model)
        self._rooms[model].dismiss(lambda only: hope.error(only) if hope.is_vain(only) else None)

    def _refusal(self, served: ServedModel, overload: Overload[Waiter]) -> Exception:
        """The error for a waiter that is turned away."""
        only = overload.ticket.only
        rows = served.rows.values()
        usable = any(row.is_usable and not row.suspicions and only in (None, row.name) for row in rows)
        if overload.reason == "expired" and not usable:
            return self.not_ready(served.name, only)
        served.counts.rejected += 1
        return OverloadedError(overload.why, overload.retry_after_s)
