"""What a replay measures, and what could have been reached at best."""

from __future__ import annotations

import gc
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from sys import getsizeof
from time import perf_counter_ns, thread_time_ns
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from lltm_ray.routing.replay.simulated import BLOCK_BYTES
from lltm_ray.routing.replay.trace import Arrival
from lltm_ray.routing.served import ServedModel

__all__ = ["Ideal", "Measured", "Result", "Spread", "deep_bytes", "quiet_gc"]

_IDEAL_BLOCKS = 4_000_000
"""Blocks that the unlimited server remembers before it forgets the oldest half: about 0.8 GiB."""
_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType)
"""Code, which is no state."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles and the largest value; 0 where nothing was measured."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Spread:
        """The nearest ranks of some values."""
        if not values:
            return cls()
        ranked = sorted(values)
        last = len(ranked) - 1
        return cls(*(ranked[round(last * each)] * scale for each in (0.5, 0.95, 0.99, 1.0)))


class Stopwatch:
    """What one kind of work took, each time."""

    def __init__(self) -> None:
        self._wall_ns, self._cpu_ns = array("q"), array("q")

    def add(self, began_ns: int, began_cpu_ns: int) -> None:
        """It ended just now.

        Args:
            began_ns: `perf_counter_ns` when it began.
            began_cpu_ns: `thread_time_ns` right after that.
        """
        cpu_ns = thread_time_ns() - began_cpu_ns
        self._wall_ns.append(perf_counter_ns() - began_ns)
        self._cpu_ns.append(cpu_ns)

    @property
    def wall_us(self) -> Spread:
        """Wall times."""
        return Spread.of(self._wall_ns, 1e-3)

    @property
    def cpu_us(self) -> Spread:
        """CPU times, which other processes do not lengthen."""
        return Spread.of(self._cpu_ns, 1e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one policy did. Times are simulated, but for those of the router: they are this machine's."""

    policy: str
    requests: int
    served: int
    rejected: dict[str, int]
    """Reason -> how many."""
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    reuse_ratio: float
    """Cached prompt tokens / prompt tokens, of served requests."""
    ttft_s: Spread
    good: int
    """Requests whose answer began before their deadline."""
    goodput_ratio: float
    """`good` / `requests`: refused ones count."""
    simulated_s: float
    decision_us: Spread
    """Wall time of match, choose and claim, or of joining the queue."""
    decision_cpu_us: Spread
    """The same in CPU time, which other processes do not lengthen."""
    settle_us: Spread
    """What a claim means for the model of the caches: done when the request is on its way."""
    settle_cpu_us: Spread
    release_us: Spread
    """Learning from a reply and handing the slot to a waiter."""
    release_cpu_us: Spread
    prediction_error_ratio: float
    """Median of |predicted - actual| cached tokens / prompt tokens."""
    state_peak_bytes: int
    """All that the router holds, measured."""
    residency_peak_bytes: int
    """The caches' index, by its own account."""
    residency_nodes: int


class Measured:
    """Collects what happens during one replay."""

    def __init__(self) -> None:
        self._good = self._state_bytes = self._residency_bytes = self._nodes = 0
        self._ttft_s, self._errors = array("d"), array("f")
        self.decisions, self.settlings, self.releases = Stopwatch(), Stopwatch(), Stopwatch()
        self._refused: Counter[str] = Counter()

    def refused(self, reason: str) -> None:
        """A request was turned away."""
        self._refused[reason] += 1

    def began(self, ttft_s: float, *, is_good: bool) -> None:
        """An answer began."""
        self._ttft_s.append(ttft_s)
        self._good += is_good

    def predicted(self, expected: int, actual: int, prompt_tokens: int) -> None:
        """Tokens that were expected to be cached, and were."""
        self._errors.append(abs(expected - actual) / prompt_tokens)

    def memory(self, state_bytes: int, residency: dict[str, Any]) -> None:
        """What the router holds just now."""
        self._state_bytes = max(self._state_bytes, state_bytes)
        self._residency_bytes = max(self._residency_bytes, residency["bytes"])
        self._nodes = max(self._nodes, residency["nodes"])

    def result(self, model: ServedModel, simulated_s: float) -> Result:
        """The whole."""
        counts = model.counts
        requests = len(self._ttft_s) + self._refused.total()
        return Result(
            policy=model.policy.name,
            requests=requests,
            served=counts.requests,
            rejected=dict(sorted(self._refused.items())),
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            computed_tokens=counts.prompt_tokens - counts.cached_tokens,
            reuse_ratio=counts.cached_tokens / max(1, counts.prompt_tokens),
            ttft_s=Spread.of(self._ttft_s),
            good=self._good,
            goodput_ratio=self._good / max(1, requests),
            simulated_s=simulated_s,
            decision_us=self.decisions.wall_us,
            decision_cpu_us=self.decisions.cpu_us,
            settle_us=self.settlings.wall_us,
            settle_cpu_us=self.settlings.cpu_us,
            release_us=self.releases.wall_us,
            release_cpu_us=self.releases.cpu_us,
            prediction_error_ratio=Spread.of(self._errors).p50,
            state_peak_bytes=self._state_bytes,
            residency_peak_bytes=self._residency_bytes,
            residency_nodes=self._nodes,
        )


@dataclass(slots=True)
class Ideal:
    """One server with unlimited slots and memory: a prompt reuses its longest common prefix with all that came before.

    Replies count from the arrival of their request on, so that no fleet can do better.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    _young: set[int] = field(default_factory=set)
    _old: set[int] = field(default_factory=set)

    @property
    def reuse_ratio(self) -> float:
        """Cached prompt tokens / prompt tokens."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    def watch(self, arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
        """Pass requests on and count them."""
        for arrival in arrivals:
            self.take(arrival)
            yield arrival

    def take(self, arrival: Arrival) -> None:
        """The next request."""
        young, old = self._young, self._old
        content = memoryview(arrival.key + arrival.reply).cast("q")
        blocks = len(arrival.key) // BLOCK_BYTES
        cached, prefix, is_known = 0, 0, True
        for position, block in enumerate(content):
            prefix = hash((prefix, block))
            if is_known and (prefix in young or prefix in old):
                cached = min(position + 1, blocks)
            else:
                is_known = False
            young.add(prefix)
        tokens = arrival.prompt_tokens * cached // blocks if blocks else 0
        self.prompt_tokens += arrival.prompt_tokens
        self.cached_tokens += min(tokens, arrival.prompt_tokens - 1)
        if len(young) > _IDEAL_BLOCKS:
            self._old, self._young = young, set()

    def forget(self) -> None:
        """Keep the sums, let go all content."""
        self._young, self._old = set(), set()


def deep_bytes(root: object) -> int:
    """Bytes of all objects that can be reached from one, each counted once; code does not count."""
    seen: set[int] = {id(root)}
    todo, total = [root], 0
    while todo:
        batch, todo = todo[:4096], todo[4096:]
        total += sum(map(getsizeof, batch))
        for each in gc.get_referents(*batch):
            if id(each) not in seen and not isinstance(each, _SHARED):
                seen.add(id(each))
                todo.append(each)
    return total


@contextmanager
def quiet_gc() -> Iterator[Callable[[], None]]:
    """No cyclic garbage collection meanwhile; yields what moves all that exists out of the collector's sight.

    A gateway does the same after it has started: else a full collection would look at all of the router's state.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield gc.freeze
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
