"""Who may use which slot now: the table of engines, the claims on their slots, and the queue for them.

One event loop owns a `Router`; every method runs to its end without yielding except `acquire`, so there are no locks.
A claim is made in the same step that a slot is found free, or by whoever frees it, on behalf of the first waiter that
can use it: a newcomer can never overtake a waiter, and in-flight requests of an engine never exceed its slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from lltm_ray.errors import ConfigError, EngineNotReadyError, LltmRayError, ModelNotFoundError, OverloadedError
from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.routing.policy import choose
from lltm_ray.routing.queue import Lease, Queues, Row, Waiter, describe, identity, is_hopeless

__all__ = ["SUSPECT_S", "Lease", "Router"]

SUSPECT_S = 1.0
"""How long an engine is skipped after a failed connection, unless the directory shows a new server sooner."""
_SERVICE_WEIGHT = 0.1
"""Weight of the newest service time in its moving average: the last 20 or so requests decide."""


class Router:
    """Least-loaded routing over slots with a bounded FIFO queue for each model.

    Args:
        queue_limit: requests that may wait for one model; 0 rejects at once when every slot is busy.
        queue_timeout_s: longest wait when `acquire` is not told otherwise.
        clock: monotonic seconds, only to measure how long slots are held.
    """

    def __init__(self, queue_limit: int, queue_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._rows: dict[str, Row] = {}
        self._models: tuple[str, ...] = ()
        self._ready: dict[str, list[Row]] = {}
        self._queues = Queues(queue_limit)
        self._suspects = 0
        self._serial = 0
        self._rejected = 0
        self._service_s: dict[str, float] = {}

    # --- the table

    def update(self, engines: Iterable[EngineInfo]) -> None:
        """Take the directory's table. Engines that are missing from it take no more requests.

        Requests that wait for what cannot come any more get their `EngineNotReadyError` in this step.
        """
        fresh = {info.name: info for info in engines}
        for name, row in list(self._rows.items()):
            if name not in fresh:
                row.listed = False
                if not row.busy:
                    del self._rows[name]
        for name, info in fresh.items():
            self._merge(name, info)
        self._models = tuple(dict.fromkeys(row.model for row in self._rows.values() if row.listed))
        self._ready = {}
        for row in self._rows.values():
            if row.listed and row.info.state is EngineState.READY and row.slots_total > 0:
                self._ready.setdefault(row.model, []).append(row)
        for model in self._queues.models():
            self._dispatch(model)
            self._dismiss(model)

    def _merge(self, name: str, info: EngineInfo) -> None:
        row = self._rows.get(name)
        if row is None or row.identity != identity(info) or row.model != info.model:
            self._rows[name] = Row(name, info.model, info.slots_total, info=info)
            return
        row.info, row.slots_total, row.listed = info, info.slots_total, True

    def suspect(self, engine: EngineInfo | str) -> None:
        """A connection to this engine failed: skip it for `SUSPECT_S`, or until its server is another one.

        Args:
            engine: as it was when the connection failed; if its server is another one by now, nothing happens. A name
                means whatever server the engine has now.
        """
        row = self._rows.get(engine if isinstance(engine, str) else engine.name)
        if row is None or (isinstance(engine, EngineInfo) and row.identity != identity(engine)):
            return
        row.suspicions += 1
        self._suspects += 1
        asyncio.get_running_loop().call_later(SUSPECT_S, self._cooled, row)

    def _cooled(self, row: Row) -> None:
        row.suspicions -= 1
        self._suspects -= 1
        self._dispatch(row.model)

    # --- reading

    def models(self) -> tuple[str, ...]:
        """Served names in the order they were first seen, whether or not an engine of them is ready."""
        return self._models

    def engines(self, model: str | None = None) -> tuple[EngineInfo, ...]:
        """All known engines, or those of one model."""
        return tuple(row.info for row in self._rows.values() if row.listed and model in (None, row.model))

    def ready(self, model: str | None = None) -> tuple[EngineInfo, ...]:
        """Engines that take requests now, suspected ones included."""
        groups = self._ready.values() if model is None else [self._ready.get(model, [])]
        return tuple(row.info for rows in groups for row in rows)

    def resolve(self, model: str | None, only: str | None = None) -> str:
        """The served name that a request means.

        Args:
            model: the request's own word; None means the pinned engine's model, the only one, or the first.
            only: name of an engine the request is pinned to.

        Raises:
            ConfigError: `only` is no engine, or serves another model.
            ModelNotFoundError: nobody serves `model`.
            EngineNotReadyError: the fleet is empty.
        """
        if only is not None:
            return self._resolve_pinned(model, only)
        names = self.models()
        if not names:
            raise EngineNotReadyError("of any model", "missing: the fleet has no engines yet")
        if model is None:
            return names[0]
        if model not in names:
            raise ModelNotFoundError(model, f"this fleet serves {', '.join(names)}")
        return model

    def _resolve_pinned(self, model: str | None, only: str) -> str:
        row = self._rows.get(only)
        if row is None or not row.listed:
            known = ", ".join(sorted(info.name for info in self.engines())) or "none yet"
            raise ConfigError("engine", only, f"no such engine; known are {known}")
        if model not in (None, row.model):
            raise ConfigError("engine", only, f"serves {row.model!r}, the request asks for {model!r}")
        return row.model

    def pick(self, model: str | None, *, only: str | None = None, exclude: Collection[str] = frozenset()) -> EngineInfo:
        """A ready engine for a request that needs no slot; the one used longest ago.

        Suspected engines come last and, among equals in that, excluded ones: better one that may answer than none.

        Raises:
            ConfigError, ModelNotFoundError: as `resolve`.
            EngineNotReadyError: none is ready.
        """
        name = self.resolve(model, only)
        rows = [row for row in self._ready.get(name, []) if only in (None, row.name)]
        if not rows:
            raise self.not_ready(name, only)
        row = min(rows, key=lambda each: (each.suspicions > 0, each.name in exclude, each.last_used))
        self._serial += 1
        row.last_used = self._serial
        return row.info

    def snapshot(self) -> dict[str, Any]:
        """Claims and queues as JSON: `{"waiting": {model: n}, "rejected": n, "engines": {name: {...}}}`."""
        return {
            "waiting": {model: self._queues.count(model) for model in self._queues.models()},
            "rejected": self._rejected,
            "engines": {
                row.name: {
                    "model": row.model,
                    "state": str(row.info.state),
                    "slots_busy": row.busy,
                    "slots_total": row.slots_total,
                    "is_suspect": row.suspicions > 0,
                }
                for row in self._rows.values()
                if row.listed
            },
        }

    # --- claims

    async def acquire(
        self,
        model: str | None,
        *,
        timeout_s: float | None = None,
        exclude: Collection[str] = frozenset(),
        only: str | None = None,
    ) -> Lease:
        """Claim a slot, waiting in the model's FIFO queue if there is none.

        Args:
            model: served name; None as in `resolve`.
            timeout_s: longest wait; None is the router's own.
            exclude: engines to avoid as long as another one of the model has a free slot.
            only: pin the request to this engine.

        Raises:
            ConfigError, ModelNotFoundError: as `resolve`.
            OverloadedError: the queue is full, or no slot came free in time.
            EngineNotReadyError: no engine of the model was ready in time, or all have failed for good.
        """
        name = self.resolve(model, only)
        avoid = frozenset(exclude)
        lease = self._claim(name, avoid, only)
        if lease is not None:
            return lease
        if is_hopeless(self._listed(name, only)):
            raise self.not_ready(name, only)
        if self._queues.is_full(name):
            raise self._overloaded(name, f"all slots are busy and {self._queues.count(name)} requests wait")
        return await self._wait(name, avoid, only, self._queue_timeout_s if timeout_s is None else timeout_s)

    def release(self, lease: Lease) -> None:
        """Give a slot back; a second time does nothing. The next waiter that can use it gets it in this step."""
        if lease.released:
            return
        lease.released = True
        row = lease.row
        row.busy -= 1
        took_s = self._clock() - lease.claimed_at
        mean_s = self._service_s.get(row.model, took_s)
        self._service_s[row.model] = mean_s + _SERVICE_WEIGHT * (took_s - mean_s)
        if not row.listed and not row.busy and self._rows.get(row.name) is row:
            del self._rows[row.name]
        if self._queues:
            self._dispatch(row.model)

    async def _wait(self, model: str, exclude: frozenset[str], only: str | None, timeout_s: float) -> Lease:
        loop = asyncio.get_running_loop()
        waiter = Waiter(model, only, exclude, loop.create_future())
        self._queues.join(waiter)
        timer = loop.call_later(timeout_s, self._expire, waiter, timeout_s)
        try:
            return await waiter.grant
        except asyncio.CancelledError:
            # Cancelled in the very step that granted: the slot is ours and nobody else will give it back.
            if waiter.grant.done() and not waiter.grant.cancelled() and waiter.grant.exception() is None:
                self.release(waiter.grant.result())
            raise
        finally:
            timer.cancel()
            self._queues.leave(waiter)

    def _claim(self, model: str, exclude: frozenset[str], only: str | None) -> Lease | None:
        rows = self._candidates(model)
        if only is not None:
            rows = [row for row in rows if row.name == only]
            exclude = frozenset()
        name = choose(rows, model=model, exclude=exclude)
        if name is None and exclude:
            name = choose(rows, model=model)
        if name is None:
            return None
        row = self._rows[name]
        row.busy += 1
        self._serial += 1
        row.last_used = self._serial
        return Lease(row.info, model, self._clock(), row)

    def _candidates(self, model: str) -> list[Row]:
        rows = self._ready.get(model, [])
        return [row for row in rows if not row.suspicions] if self._suspects else rows

    def _listed(self, model: str, only: str | None) -> list[Row]:
        rows = self._rows.values()
        return [row for row in rows if row.listed and row.model == model and only in (None, row.name)]

    def _dispatch(self, model: str) -> None:
        for waiter in self._queues.of(model):
            if waiter.grant.done():
                continue
            lease = self._claim(model, waiter.exclude, waiter.only)
            if lease is not None:
                waiter.grant.set_result(lease)
                self._queues.leave(waiter)
            elif waiter.only is None:
                return  # nothing is free for a waiter without a pin, so nothing is free at all

    # --- refusals

    def not_ready(self, model: str, only: str | None = None) -> EngineNotReadyError:
        """The error that says why no engine of a model, or not the pinned one, can be used now."""
        return EngineNotReadyError(f"for model {model!r}", f"not ready: {describe(self._listed(model, only))}")

    def _dismiss(self, model: str) -> None:
        waiters = [waiter for waiter in self._queues.of(model) if not waiter.grant.done()]
        hopeless = {only for only in {waiter.only for waiter in waiters} if is_hopeless(self._listed(model, only))}
        for waiter in waiters:
            if waiter.only in hopeless:
                self._queues.leave(waiter)
                waiter.grant.set_exception(self.not_ready(model, waiter.only))

    def _expire(self, waiter: Waiter, waited_s: float) -> None:
        if waiter.grant.done():
            return
        self._queues.leave(waiter)
        error: LltmRayError
        if any(waiter.only in (None, row.name) for row in self._candidates(waiter.model)):
            error = self._overloaded(waiter.model, f"no slot came free within {waited_s:g} s")
        else:
            error = self.not_ready(waiter.model, waiter.only)
        waiter.grant.set_exception(error)

    def _overloaded(self, model: str, why: str) -> OverloadedError:
        self._rejected += 1
        slots = sum(row.slots_total for row in self._ready.get(model, [])) or 1
        ahead = self._queues.count(model) + 1
        return OverloadedError(why, max(1.0, self._service_s.get(model, 1.0) * ahead / slots))
