"""A trace played against simulated engines: what a policy would have done, at any size of fleet.

The router is the product's own: `ServedModel` decides, learns and forgets, `WaitingRoom` lets wait and hands out slots.
Only engines and time are simulated: events in a heap, no event loop, and no clock but the one that measures what the
decisions cost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from math import inf
from time import perf_counter_ns, thread_time_ns
from typing import cast

from lltm_ray.errors import ConfigError
from lltm_ray.records import EngineInfo, EngineState, Timings
from lltm_ray.routing.admission import Overload
from lltm_ray.routing.admission.waiting import Waiter, WaitingRoom
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.replay.measure import Measured, Result, deep_bytes
from lltm_ray.routing.replay.simulated import EngineSpec, SimulatedEngine, Task
from lltm_ray.routing.replay.trace import Arrival
from lltm_ray.routing.rows import Lease, Served
from lltm_ray.routing.served import ServedModel, SlotShare

__all__ = ["Fleet", "Replay", "Result"]

_MODEL = "simulated"
_FIRST_LOOK, _NEXT_LOOK = 1024, 4
"""The router's memory is measured after so many requests, after so many times more, and so on, and at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What a trace is played against.

    Raises:
        ConfigError: a value that is out of its range.
    """

    engines: int = 4
    spec: EngineSpec = field(default_factory=EngineSpec)
    queue_limit: int = 256
    queue_timeout_s: float = 60.0
    """Longest wait of a request without a deadline, as in the gateway's settings."""
    residency_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name, least in (("engines", 1), ("queue_limit", 0), ("queue_timeout_s", 0), ("residency_bytes", 2**16)):
            if not getattr(self, name) >= least:
                raise ConfigError(name, getattr(self, name), f"must be at least {least}")


@dataclass(slots=True, eq=False)
class _Request:
    """One arrival on its way."""

    arrival: Arrival
    arrived_s: float
    lease: Lease | None = None


class _Grant:
    """Stands where a waiter's future stands, without an event loop."""

    def __init__(self, request: _Request, granted: deque[_Grant]) -> None:
        self.request = request
        self.lease: Lease | None = None
        self.error: Exception | None = None
        self._granted = granted
        self._is_done = False

    def done(self) -> bool:
        """Whether it has its slot, or never will."""
        return self._is_done

    def set_result(self, lease: Lease) -> None:
        """The slot."""
        self.lease, self._is_done = lease, True
        self._granted.append(self)

    def set_exception(self, error: Exception) -> None:
        """No slot."""
        self.error, self._is_done = error, True
        self._granted.append(self)


@dataclass(slots=True, eq=False)
class _Timer:
    """A call at a time of the simulation."""

    call: Callable[[], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        """It shall not come any more."""
        self.is_cancelled = True

    def fire(self) -> None:
        """Its time has come."""
        if not self.is_cancelled:
            self.call()


class _RefusedError(Exception):
    """The waiting room turned a request away."""

    def __init__(self, overload: Overload[Waiter]) -> None:
        super().__init__(overload.why)
        self.reason = str(overload.reason)


class Replay:
    """One policy over one trace.

    Args:
        policy: name of the policy.
        fleet: the engines and the queue before them.
    """

    def __init__(self, policy: str, fleet: Fleet) -> None:
        fleet = replace(fleet, spec=fleet.spec.under(policy))
        self.served = ServedModel(_MODEL, policy, fleet.queue_limit, fleet.residency_bytes)
        self.served.update(_infos(fleet), SlotShare())
        self.now_s = 0.0
        self._fleet = fleet
        self._room = WaitingRoom(self.served, lambda: self.now_s, _refusal, later=self._later)
        self._engines = {info.name: SimulatedEngine[_Request](info.name, fleet.spec) for info in _infos(fleet)}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = count()
        self._granted: deque[_Grant] = deque()
        self._running: dict[str, int] = {}
        self._parked: dict[str, deque[Arrival]] = {}
        self._measured = Measured()
        self._ended_s = 0.0

    def run(self, arrivals: Iterable[Arrival], progress: Callable[[int], None] | None = None) -> Result:
        """Play the trace to its end.

        Args:
            arrivals: in order of time.
            progress: told the number of requests that came so far, every 1,024.
        """
        look, number = _FIRST_LOOK, 0
        for number, arrival in enumerate(arrivals, 1):
            self._play_until(arrival.arrived_s)
            self._come(arrival)
            if number == look:
                self._look()
                look *= _NEXT_LOOK
            if progress is not None and not number % 1024:
                progress(number)
        self._play_until(inf)
        self._look()
        return self._measured.result(self.served, self._ended_s)

    # --- time

    def _play_until(self, until_s: float) -> None:
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, happen = heappop(events)
            happen()
        if until_s < inf:
            self.now_s = max(self.now_s, until_s)

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        heappush(self._events, (time_s, next(self._serials), happen))

    def _later(self, seconds: float, call: Callable[[], None]) -> _Timer:
        timer = _Timer(call)
        self._at(self.now_s + seconds, lambda: self._fire(timer))
        return timer

    def _fire(self, timer: _Timer) -> None:
        timer.fire()
        self._start_granted()

    def _watch(self, engine: SimulatedEngine[_Request]) -> None:
        next_s = engine.next_s
        if next_s < inf:
            version = engine.version
            self._at(next_s, lambda: self._happen(engine) if engine.version == version else None)

    # --- a request's life

    def _come(self, arrival: Arrival) -> None:
        if arrival.pause_s is not None and self._running.get(arrival.session):
            self._parked.setdefault(arrival.session, deque()).append(arrival)
            return
        if arrival.session:
            self._running[arrival.session] = self._running.get(arrival.session, 0) + 1
        self._ask(_Request(arrival, self.now_s))

    def _ask(self, request: _Request) -> None:
        arrival = request.arrival
        patience_s = min(arrival.allowance_s, self._fleet.queue_timeout_s)
        ask = Ask(
            model=_MODEL,
            key=arrival.key,
            max_tokens=arrival.max_tokens,
            tenant=arrival.tenant,
            priority=arrival.priority,
            deadline_s=self.now_s + patience_s,
            affinity=arrival.session,
        )
        began_ns, began_cpu_ns = perf_counter_ns(), thread_time_ns()
        # as `Router.acquire` does
        match = self.served.residency.match(ask.key)
        ask.prompt_tokens, ask.shared_tokens = match.prompt_tokens, match.shared_tokens
        waiter = Waiter(ask, frozenset(), since_unix_nano=1)
        lease = self._room.claim_now(waiter, match, self.now_s)
        if lease is None:
            waiter.grant = cast("asyncio.Future[Lease]", _Grant(request, self._granted))
            self._room.enter(waiter, self.now_s)
        self._measured.decisions.add(began_ns, began_cpu_ns)
        began_ns, began_cpu_ns = perf_counter_ns(), thread_time_ns()
        self.served.settle()
        self._measured.settlings.add(began_ns, began_cpu_ns)
        if lease is not None:
            self._start(request, lease)
        self._start_granted()

    def _start_granted(self) -> None:
        """What tasks do that wake up with a slot, or without."""
        while self._granted:
            grant = self._granted.popleft()
            if grant.lease is not None:
                self._start(grant.request, grant.lease)
            elif isinstance(grant.error, _RefusedError):
                self.served.counts.rejected += 1
                self._measured.refused(grant.error.reason)
                self._over(grant.request)

    def _start(self, request: _Request, lease: Lease) -> None:
        request.lease = lease
        arrival = request.arrival
        # what was refused when it was recorded has no length: it gets the model's mean
        output = arrival.output_tokens or round(self.served.rates.output_tokens(arrival.max_tokens))
        task = Task(request, arrival.key, arrival.reply, arrival.prompt_tokens, max(1, output), lease.slot)
        engine = self._engines[lease.row.name]
        engine.start(task, self.now_s)
        self._watch(engine)

    def _happen(self, engine: SimulatedEngine[_Request]) -> None:
        for task in engine.advance(self.now_s):
            if task.began_s == self.now_s:
                self._began(task)
            if task.has_ended:
                self._ended(task)
        self._start_granted()
        self._watch(engine)

    def _began(self, task: Task[_Request]) -> None:
        request, lease = task.payload, _claim_of(task)
        self._room.began(lease)
        waited_s = self.now_s - request.arrived_s
        self._measured.began(waited_s, is_good=waited_s <= request.arrival.allowance_s)
        self._measured.predicted(lease.cached_tokens, task.cached_tokens, task.prompt_tokens)

    def _ended(self, task: Task[_Request]) -> None:
        lease = _claim_of(task)
        timings = Timings(
            cache_n=task.cached_tokens,
            prompt_n=task.prompt_tokens - task.cached_tokens,
            prompt_ms=(task.began_s - task.begin_s) * 1e3,
            predicted_n=task.output_tokens,
            predicted_ms=(task.ended_s - task.began_s) * 1e3,
        )
        told = Served(timings=timings, reply=task.reply, delivered_tokens=task.output_tokens)
        began_ns, began_cpu_ns = perf_counter_ns(), thread_time_ns()
        # as `Router.release` does
        lease.released = True
        self.served.release(lease, told, self.now_s)
        self._room.dispatch(lease.engine.name)
        self._measured.releases.add(began_ns, began_cpu_ns)
        self._start_granted()
        self._over(task.payload)

    def _over(self, request: _Request) -> None:
        """Ended or refused: the session's next turn may come after its pause."""
        self._ended_s = self.now_s  # the clock goes on, to timers that were cancelled
        session = request.arrival.session
        if not session:
            return
        left = self._running.pop(session) - 1
        parked = None if left else self._parked.get(session)
        if parked:
            arrival = parked.popleft()
            if not parked:
                del self._parked[session]
            # it counts as running while it pauses, or the turn after it would come before it
            left = 1
            self._at(self.now_s + (arrival.pause_s or 0.0), lambda: self._ask(_Request(arrival, self.now_s)))
        if left:
            self._running[session] = left

    def _look(self) -> None:
        self._measured.memory(deep_bytes(self.served), self.served.residency.calibration())


def _claim_of(task: Task[_Request]) -> Lease:
    lease = task.payload.lease
    assert lease is not None, "a task runs on a claim"  # noqa: S101 - for the type checker
    return lease


def _refusal(_served: ServedModel, overload: Overload[Waiter]) -> Exception:
    return _RefusedError(overload)


def _infos(fleet: Fleet) -> list[EngineInfo]:
    spec, width = fleet.spec, len(str(fleet.engines - 1))
    return [
        EngineInfo(
            name=f"engine-{number:0{width}}",
            model=_MODEL,
            state=EngineState.READY,
            url=f"simulated://{number}",
            slots_total=spec.slots,
            server_pid=number + 1,
            cache_ram_tokens=spec.ram_tokens,
            slot_similarity_ratio=spec.slot_ratio,
        )
        for number in range(fleet.engines)
    ]
