"""Joules of requests: what a GPU's own energy counter grew by, shared among those who used it meanwhile. Pure.

The counter's readings cut time into intervals. Of an interval's joules, the part in which some request was being worked
on is shared by the tokens that each got in it (prompt tokens computed and tokens generated, spread evenly over prefill
and decode); the rest is idle. So the shares and the idle part add up to the counter, to the joule.

Requests are known when they end, so an interval waits until all slots that were busy in it belong to ended requests, or
`PATIENCE_S` has passed: then what nobody accounts for is told as unattributed.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import NamedTuple

from lltm_ray.telemetry.rows import AttemptRow, GpuRow, RequestRow, ServerRow, SlotRow

SETTLE_S = 3.0
"""Rows of an interval are here so long after its end: a sampler's tick and a sender's pause."""
PATIENCE_S = 600.0
SKEW_S = 0.3
"""A look at slots is noted when the slowest server has answered, and servers free a slot a moment late."""
_LONGEST_GAP_S = 30.0
"""Readings further apart than this are not joined: the sampler was away, and so was what its servers did."""

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
    users: list[_User] = field(default_factory=list)
    balance: Balance = field(default_factory=Balance)


class Energy:
    """For one thread."""

    def __init__(self) -> None:
        self._gpus: defaultdict[str, _Gpu] = defaultdict(_Gpu)
        self._homes: dict[str, tuple[str, ...]] = {}
        self._busy: defaultdict[str, deque[tuple[float, int]]] = defaultdict(lambda: deque(maxlen=4 * int(PATIENCE_S)))

    @property
    def balances(self) -> dict[str, Balance]:
        """By GPU's UUID."""
        return {uuid: gpu.balance for uuid, gpu in self._gpus.items()}

    def add_gpus(self, rows: Iterable[GpuRow]) -> None:
        """Readings; a device without an energy counter is passed over."""
        for row in rows:
            if row.energy_j is None:
                continue
            gpu, at = self._gpus[row.uuid], row.at_unix_nano / 1e9
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
            self._homes[row.engine] = tuple(filter(None, row.gpu_uuids.split(",")))

    def add_slots(self, rows: Iterable[SlotRow]) -> None:
        """Which slots are busy; one look at a server is all its rows of one moment."""
        looks: defaultdict[tuple[str, int], int] = defaultdict(int)
        for row in rows:
            looks[row.engine, row.at_unix_nano] += row.is_processing
        for (engine, at_unix_nano), busy in looks.items():
            self._busy[engine].append((at_unix_nano / 1e9, busy))

    def add_request(self, request: RequestRow, attempts: Sequence[AttemptRow]) -> None:
        """A request has ended."""
        arrived = request.arrived_unix_nano / 1e9
        for attempt in attempts:
            homes, phases = self._homes.get(attempt.engine, ()), _phases(request, attempt, arrived)
            if homes and phases:
                user = _User(attempt, request.model, phases, set(homes), len(homes))
                for uuid in homes:
                    self._gpus[uuid].users.append(user)

    def settle(self, now_s: float) -> list[EnergyShare]:
        """Share what can be shared; `now_s` in Unix seconds.

        Returns:
            Attempts whose joules are complete; of one that ran while its GPUs were not read nothing is known.
        """
        done: list[_User] = []
        for uuid, gpu in self._gpus.items():
            while gpu.open and self._is_settled(uuid, gpu, gpu.open[0], now_s):
                self._share_out(uuid, gpu, gpu.open.popleft())
            # without an open interval before its end nothing more can come to a user
            reached = gpu.open[0].start if gpu.open else gpu.last[0] if gpu.last else 0.0
            for user in [each for each in gpu.users if each.end <= reached or now_s - each.end > PATIENCE_S]:
                gpu.users.remove(user)
                user.waits_for.discard(uuid)
                if not user.waits_for:
                    done.append(user)
        return [_told(user) for user in done if user.covered_s > _COVERED_RATIO * user.gpus * (user.end - user.start)]

    def _is_settled(self, uuid: str, gpu: _Gpu, interval: _Interval, now_s: float) -> bool:
        age_s = now_s - interval.end
        return age_s >= SETTLE_S and (age_s > PATIENCE_S or not self._missing(uuid, gpu, interval))

    def _missing(self, uuid: str, gpu: _Gpu, interval: _Interval) -> float:
        """Busy slots on a GPU that no known request explains: the mean over the looks in an interval."""
        missing = 0.0
        for engine in [engine for engine, homes in self._homes.items() if uuid in homes]:
            own = [user for user in gpu.users if user.attempt.engine == engine]
            looks = [each for each in self._busy[engine] if interval.start <= each[0] <= interval.end]
            for at, busy in looks:
                known = sum(user.start - SKEW_S <= at <= user.end + SKEW_S for user in own)
                missing += max(0, busy - known) / len(looks)
        return missing

    def _share_out(self, uuid: str, gpu: _Gpu, interval: _Interval) -> None:
        start, end, joules = interval
        users = [(user, user.tokens_in(start, end)) for user in gpu.users if user.start < end and user.end > start]
        missing = self._missing(uuid, gpu, interval)
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
    ended = request.total_s if isnan(attempt.ended_s) else attempt.ended_s
    begun = attempt.sent_s if isnan(attempt.headers_s) else attempt.headers_s
    if isnan(begun) or ended <= begun:
        return ()
    first = attempt.first_s
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
