"""Joules of requests: what a GPU's own energy counter grew by, shared among those who used it meanwhile. Pure.

The counter's readings cut time into intervals. Of an interval's joules, the part in which some request was being worked
on is shared by the tokens that each got in it (prompt tokens computed and tokens generated, spread evenly over prefill
and decode); the rest is idle. So the shares and the idle part add up to the counter, to the joule.

Requests are known when they end, so an interval waits until all slots that were busy in it, or at the first look after
it, belong to ended requests, or `PATIENCE_S` has passed: then what nobody accounts for is told as unattributed.
Intervals settle in order, so each looks only at users that overlap it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf, isnan
from typing import NamedTuple

from lltm_ray.telemetry.looks import Looks
from lltm_ray.telemetry.rows import AttemptRow, GpuRow, RequestRow, ServerRow, SlotRow

SETTLE_S = 3.0
"""Rows of an interval are here so long after its end: a sampler's tick and a sender's pause."""
PATIENCE_S = 600.0
SKEW_S = 0.3
"""A look at slots is noted when the slowest server has answered, and servers free a slot a moment late."""
LOOKS_S = 10.0
"""Slots of an engine are looked at more often than this, or not any more."""
_LONGEST_GAP_S = 30.0
"""Readings further apart than this are not joined: the sampler was away, and so was what its servers did."""
_GONE_S = 3600.0
"""A GPU's balance is kept so long after its last reading."""
_MOST_OPEN = 660
"""Intervals of a GPU that wait; older ones are settled with what is known."""
_MOST_USERS = 20_000
"""Users of a GPU that wait for their intervals."""
_MOST_AT_ONCE = 200
"""Intervals of a GPU in one call; the rest is for the next."""

_COVERED_RATIO = 0.99


class EnergyShare(NamedTuple):
    """What one attempt took, of all its GPUs."""

    trace_id: str
    request_span_id: str
    span_id: str
    engine: str
    model: str
    joules: float
    tokens: int
    """Computed and generated."""


@dataclass(slots=True)
class Balance:
    """Of one GPU since the first reading: the three add up to its counter's growth."""

    attributed_j: float = 0.0
    idle_j: float = 0.0
    unattributed_j: float = 0.0
    """Busy slots whose requests never became known."""

    @property
    def total_j(self) -> float:
        """Of all intervals settled so far."""
        return self.attributed_j + self.idle_j + self.unattributed_j


@dataclass(slots=True, eq=False)
class _User:
    attempt: AttemptRow
    model: str
    phases: tuple[tuple[float, float, int], ...]
    """(start, end, tokens): Unix seconds."""
    waits_for: set[str]
    """GPUs whose intervals up to its end are not settled."""
    gpus: int
    joules: float = 0.0
    covered_s: float = 0.0
    """Of its time, over all its GPUs, in which they were read."""

    @property
    def start(self) -> float:
        return self.phases[0][0]

    @property
    def end(self) -> float:
        return self.phases[-1][1]

    @property
    def is_covered(self) -> bool:
        return self.covered_s > _COVERED_RATIO * self.gpus * (self.end - self.start)

    def tokens_in(self, start: float, end: float) -> float:
        """Tokens it got between two moments."""
        return sum(tokens * _share(phase, start, end) for *phase, tokens in self.phases)


class _Interval(NamedTuple):
    start: float
    end: float
    joules: float


@dataclass(slots=True)
class _Gpu:
    last: tuple[float, float] | None = None
    """Time and counter of the last reading."""
    open: deque[_Interval] = field(default_factory=deque)
    coming: list[tuple[float, int, _User]] = field(default_factory=list)
    """Heap of users by start, whose intervals are not reached."""
    users: list[_User] = field(default_factory=list)
    """Of the oldest open interval, and of the looks at its slots."""
    balance: Balance = field(default_factory=Balance)

    @property
    def reached(self) -> float:
        """All intervals up to this moment are settled."""
        if self.open:
            return self.open[0].start
        return self.last[0] if self.last else -inf

    @property
    def is_crowded(self) -> bool:
        return len(self.open) > _MOST_OPEN or len(self.coming) + len(self.users) > _MOST_USERS

    def bring(self, until: float) -> None:
        """Let users in who start before a moment."""
        while self.coming and self.coming[0][0] <= until:
            self.users.append(heappop(self.coming)[2])

    def part(self, now_s: float) -> list[_User]:
        """Drop users to whom nothing more can come, and return them."""
        reached, given_up = self.reached, -inf
        if not self.open:  # nothing is read any more, or nothing was yet
            given_up = now_s - (PATIENCE_S if self.last else _LONGEST_GAP_S)
        self.bring(max(reached, given_up))
        gone = [user for user in self.users if user.end <= max(reached, given_up)]
        # the next interval's looks may still see one who has just ended
        self.users = [user for user in self.users if user.end > max(reached - SKEW_S, given_up)]
        while self.is_crowded and not self.open and self.coming:
            heappop(self.coming)
        return gone


class Energy:
    """For one thread, but for `balances`."""

    def __init__(self) -> None:
        self._gpus: dict[str, _Gpu] = {}
        self._homes: dict[str, tuple[float, tuple[str, ...]]] = {}
        """Engine -> last seen (Unix seconds), its GPUs."""
        self._looks: defaultdict[str, Looks] = defaultdict(Looks)
        self._made = 0

    @property
    def balances(self) -> dict[str, Balance]:
        """By GPU's UUID; any thread may ask."""
        return {uuid: gpu.balance for uuid, gpu in self._gpus.copy().items() if gpu.last is not None}

    def add_gpus(self, rows: Iterable[GpuRow]) -> None:
        """Readings; a device without an energy counter is passed over."""
        for row in rows:
            if row.energy_j is None:
                continue
            gpu, at = self._gpus.setdefault(row.uuid, _Gpu()), row.at_unix_nano / 1e9
            if (
                gpu.last is not None
                and gpu.last[0] < at <= gpu.last[0] + _LONGEST_GAP_S
                and row.energy_j >= gpu.last[1]
            ):
                gpu.open.append(_Interval(gpu.last[0], at, row.energy_j - gpu.last[1]))
            gpu.last = at, row.energy_j

    def add_servers(self, rows: Iterable[ServerRow]) -> None:
        """Where engines are."""
        for row in rows:
            self._homes[row.engine] = row.at_unix_nano / 1e9, tuple(filter(None, row.gpu_uuids.split(",")))

    def add_slots(self, rows: Iterable[SlotRow]) -> None:
        """Which slots are busy; one look at a server is all its rows of one moment."""
        looks: defaultdict[tuple[str, int], int] = defaultdict(int)
        for row in rows:
            looks[row.engine, row.at_unix_nano] += row.is_processing
        for (engine, at_unix_nano), busy in looks.items():
            self._looks[engine].add(at_unix_nano / 1e9, busy)

    def add_request(self, request: RequestRow, attempts: Sequence[AttemptRow]) -> None:
        """A request has ended."""
        arrived = request.arrived_unix_nano / 1e9
        for attempt in attempts:
            _, homes = self._homes.get(attempt.engine, (0.0, ()))
            phases = _phases(request, attempt, arrived)
            if homes and phases:
                user = _User(attempt, request.model, phases, set(homes), len(homes))
                self._made += 1
                for uuid in homes:
                    heappush(self._gpus.setdefault(uuid, _Gpu()).coming, (user.start, self._made, user))

    def forget(self, now_s: float) -> None:
        """Drop engines, looks and GPUs that are gone; `now_s` in Unix seconds."""
        for engine in [engine for engine, (seen, _) in self._homes.items() if now_s - seen > PATIENCE_S]:
            del self._homes[engine]
        for looks in self._looks.values():
            looks.forget(now_s - PATIENCE_S - _LONGEST_GAP_S)
        for engine in [engine for engine, looks in self._looks.items() if not looks]:
            del self._looks[engine]
        for uuid, gpu in list(self._gpus.items()):
            is_unused = not gpu.coming and not gpu.users
            if is_unused and (gpu.last is None or now_s - gpu.last[0] > _GONE_S):
                del self._gpus[uuid]

    def settle(self, now_s: float) -> list[EnergyShare]:
        """Share what can be shared; `now_s` in Unix seconds.

        Returns:
            Attempts whose joules are complete; of one that ran while its GPUs were not read nothing is known.
        """
        done: list[_User] = []
        engines: defaultdict[str, list[str]] = defaultdict(list)
        for engine, (_, homes) in self._homes.items():
            for uuid in homes:
                engines[uuid].append(engine)
        for uuid, gpu in self._gpus.items():
            for user in self._settle_gpu(gpu, [each for each in engines[uuid] if each in self._looks], now_s):
                if uuid in user.waits_for:
                    user.waits_for.discard(uuid)
                    done += () if user.waits_for else (user,)
        return [_told(user) for user in done if user.is_covered]

    def _settle_gpu(self, gpu: _Gpu, engines: Sequence[str], now_s: float) -> list[_User]:
        """Users whose share of this GPU is complete; some twice."""
        done = gpu.part(now_s)
        for _ in range(_MOST_AT_ONCE):
            if not gpu.open or not self._is_settled(gpu, engines, now_s):
                break
            _share_out(gpu, gpu.open[0], self._missing(gpu, engines))
            gpu.open.popleft()
            done += gpu.part(now_s)
        return done

    def _is_settled(self, gpu: _Gpu, engines: Sequence[str], now_s: float) -> bool:
        _, end, _ = gpu.open[0]
        if now_s - end < SETTLE_S:
            return False
        looks = [self._looks[engine] for engine in engines]
        gpu.bring(max((each.next_after(end, LOOKS_S) for each in looks), default=end) + SKEW_S)
        if gpu.is_crowded or now_s - end > PATIENCE_S:
            return True
        if any(each.last < end and now_s - each.last < LOOKS_S for each in looks):
            return False
        return not self._missing(gpu, engines, is_next_counted=True)

    def _missing(self, gpu: _Gpu, engines: Sequence[str], *, is_next_counted: bool = False) -> float:
        """Busy slots on a GPU that no known request explains: the mean over the looks in its oldest interval.

        Where there are none, or where it is asked for, the first look after the interval counts: a request it saw may
        have begun before.
        """
        start, end, _ = gpu.open[0]
        missing = 0.0
        for engine in engines:
            noted = self._looks[engine]
            looks = noted.between(start, end)
            if is_next_counted or not looks:
                looks += noted.between(end, noted.next_after(end, LOOKS_S))[-1:]
            own = [user for user in gpu.users if user.attempt.engine == engine]
            for at, busy in looks:
                known = sum(user.start - SKEW_S <= at <= user.end + SKEW_S for user in own)
                missing += max(0, busy - known) / len(looks)
        return missing


def _share_out(gpu: _Gpu, interval: _Interval, missing: float) -> None:
    start, end, joules = interval
    users = [(user, user.tokens_in(start, end)) for user in gpu.users if user.start < end and user.end > start]
    covered = 1.0 if missing else _covered([(user.start, user.end) for user, _ in users], start, end)
    known = len(users) / (len(users) + missing) if users else 0.0
    tokens = sum(weight for _, weight in users)
    shared = joules * covered * known if tokens else 0.0
    for user, weight in users:
        user.joules += shared * weight / tokens if tokens else 0.0
        user.covered_s += min(user.end, end) - max(user.start, start)
    gpu.balance.attributed_j += shared
    unknown = joules * covered * (1 - known) if missing else 0.0
    gpu.balance.unattributed_j += unknown
    gpu.balance.idle_j += joules - shared - unknown


def _phases(request: RequestRow, attempt: AttemptRow, arrived: float) -> tuple[tuple[float, float, int], ...]:
    """From when its slot starts; a whole answer's headers come with its end, so it begins when it was sent."""
    ended = request.total_s if isnan(attempt.ended_s) else attempt.ended_s
    first = attempt.first_s
    begun = attempt.sent_s if isnan(first) or isnan(attempt.headers_s) else attempt.headers_s
    if isnan(begun) or ended <= begun:
        return ()
    if isnan(first) or not begun < first < ended:
        return ((arrived + begun, arrived + ended, attempt.computed_tokens + attempt.generated_tokens),)
    prefill = arrived + begun, arrived + first, attempt.computed_tokens
    return prefill, (arrived + first, arrived + ended, attempt.generated_tokens)


def _share(phase: Sequence[float], start: float, end: float) -> float:
    """Part of a phase between two moments."""
    overlap = min(phase[1], end) - max(phase[0], start)
    return max(0.0, overlap) / (phase[1] - phase[0])


def _covered(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """Part of an interval in which at least one of these spans runs."""
    covered, reached = 0.0, start
    for begun, ended in sorted(spans):
        to = min(ended, end)
        covered += max(0.0, to - max(begun, reached))
        reached = max(reached, to)
    return covered / (end - start)


def _told(user: _User) -> EnergyShare:
    attempt = user.attempt
    tokens = attempt.computed_tokens + attempt.generated_tokens
    return EnergyShare(
        attempt.trace_id, attempt.request_span_id, attempt.span_id, attempt.engine, user.model, user.joules, tokens
    )
