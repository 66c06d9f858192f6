"""`tune`: measure candidates in rounds, within a time, and say which is best, or that none is.

Candidates go in rounds, each in another order, so that what an hour does to a machine is not taken for what a setting
does. From the second round on, clear losers leave (`tuning.choice.survivors`). A candidate that fails is a row of the
result and the end of nothing. What measures is handed in: a fleet (`tune_fleet`), or a test's own figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lltm_ray.errors import CancelledError, LltmRayError
from lltm_ray.llamacpp.tuning.choice import Gain, Measured, choose, survivors, weigh
from lltm_ray.llamacpp.tuning.plan import Candidate

LEAST_ROUNDS = 3
"""Two tell too little of the noise to name anybody."""
MOST_ROUNDS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one measurement of one candidate said."""

    figure: float
    """Tokens per second, or seconds; more than 0."""
    prepare_s: float = 0.0
    """Of its time, what another visit need not spend again."""


@dataclass(slots=True, kw_only=True)
class Row:
    """A candidate and how it went."""

    candidate: Candidate
    figures: list[float] = field(default_factory=list)
    """One of each round."""
    gain: Gain | None = None
    """Over the baseline; None for the baseline itself and for who has no figure."""
    expected: float | None = None
    """The gain that was expected before."""
    state: str = "no time was left for it"
    """`measured`, `dropped after round 2`, `failed: ...`."""

    @property
    def figure(self) -> float | None:
        """The geometric mean of its rounds."""
        logs = [math.log(figure) for figure in self.figures]
        return math.exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """All that was found."""

    rows: tuple[Row, ...]
    """In the plan's order."""
    baseline: Candidate
    """What the others are held against: the default, unless that failed."""
    chosen: Candidate
    """The best, or the baseline where no gain is beyond the noise."""
    gain: Gain | None
    """Of the chosen one; None when it is the baseline."""
    rounds: int
    interrupted: bool
    wall_s: float


Measure = Callable[[Candidate, int], Visit]
Told = Callable[[str], None]


def tune(
    candidates: Sequence[Candidate],
    measure: Measure,
    *,
    seconds: float,
    higher_is_better: bool,
    clock: Callable[[], float] = time.monotonic,
    tell: Told = lambda _: None,
) -> Tuned:
    """Measure, halve, choose.

    Args:
        candidates: the default first, then the most promising; those for whom no time is left are not measured.
        measure: figure of a candidate in a round; `LltmRayError` makes it a failed row, a second one in a row where it
            was measured before; `CancelledError` ends it all.
        seconds: about how long; the first two that start get `LEAST_ROUNDS` rounds in any case.
        higher_is_better: tokens/s; else seconds.
        clock: monotonic seconds.
        tell: hears what is being done.

    Raises:
        LltmRayError: none could be measured; the default's reason.
    """
    run = _Run(list(candidates), measure, seconds, 1 if higher_is_better else -1, clock, tell)
    return run.carry_out()


@dataclass(slots=True)
class _Run:
    candidates: list[Candidate]
    measure: Measure
    seconds: float
    sign: int
    clock: Callable[[], float]
    tell: Told
    measured: list[Measured] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    errors: dict[str, LltmRayError] = field(default_factory=dict)
    """Candidate -> its last failure."""
    prepare_s: float = 0.0
    """What the last first visit took beside."""
    repeat_s: float = 0.0
    """What one more visit takes, the slowest so far."""
    began: float = 0.0

    def carry_out(self) -> Tuned:
        self.rows = {each.name: Row(candidate=each) for each in self.candidates}
        self.began, interrupted, rounds = self.clock(), False, 0
        try:
            alive = self._first_round()
            for rounds in range(1, MOST_ROUNDS):
                if not self._goes_on(alive, rounds):
                    break
                alive = self._round(alive, rounds)
        except CancelledError:
            interrupted = True
        return self._result(interrupted)

    def _first_round(self) -> list[str]:
        """As many as there will be time for to come back to."""
        alive: list[str] = []
        for candidate in self.candidates:
            ahead = self.repeat_s * (1 + (LEAST_ROUNDS - 1) * (len(alive) + 1))
            if len(alive) >= 2 and self._left() < ahead + self.prepare_s:
                break
            self._visit(candidate, 0)
            alive += [candidate.name] if self.rows[candidate.name].figures else []
        return alive

    def _goes_on(self, alive: list[str], rounds: int) -> bool:
        enough = rounds >= LEAST_ROUNDS and self._left() < self.repeat_s * len(alive)
        return len(alive) > 1 and not enough

    def _round(self, alive: list[str], number: int) -> list[str]:
        turn = number % len(alive)
        for name in alive[turn:] + alive[:turn]:
            self._visit(self.rows[name].candidate, number)
        alive = [name for name in alive if self.rows[name].state == "measured"]
        if len(alive) < 2:
            return alive
        kept = survivors(self._of(alive), alive[0], alive)
        for name in set(alive) - set(kept):
            self.rows[name].state = f"dropped after round {number + 1}"
        return kept

    def _visit(self, candidate: Candidate, number: int) -> None:
        row = self.rows[candidate.name]
        self.tell(f"round {number + 1}: {candidate.name}")
        before = self.clock()
        visit = self._attempt(candidate, number)
        if visit is None and row.figures:  # it was fine before: one stall of the machine shall not cost its figures
            self.tell(f"round {number + 1}: {candidate.name} again: {self.errors[candidate.name].message}")
            before = self.clock()
            visit = self._attempt(candidate, number)
        if visit is None:
            row.state = f"failed: {self.errors[candidate.name].message}"
            return
        row.state = "measured"
        row.figures.append(visit.figure)
        self.prepare_s = visit.prepare_s if number == 0 else self.prepare_s
        self.repeat_s = max(self.repeat_s, self.clock() - before - visit.prepare_s)
        self.measured.append(Measured(candidate=candidate.name, round=number, score=self.sign * math.log(visit.figure)))

    def _attempt(self, candidate: Candidate, number: int) -> Visit | None:
        try:
            return self.measure(candidate, number)
        except CancelledError:
            raise
        except LltmRayError as error:
            self.errors[candidate.name] = error
            return None

    def _left(self) -> float:
        return self.seconds - (self.clock() - self.began)

    def _of(self, names: Sequence[str]) -> list[Measured]:
        """Figures of those that did not fail; dropped ones tell of the noise too."""
        failed = {name for name, row in self.rows.items() if row.state.startswith("failed")}
        return [each for each in self.measured if each.candidate not in failed or each.candidate in names]

    def _result(self, interrupted: bool) -> Tuned:
        sound = [name for name, row in self.rows.items() if row.figures and not row.state.startswith("failed")]
        if not sound:
            reasons = [self.errors[name] for name in self.rows if name in self.errors]
            raise reasons[0] if reasons else CancelledError("stopped before anything was measured")
        baseline, figures = sound[0], self._of(sound)
        for gain in weigh(figures, baseline):
            self.rows[gain.candidate].gain = gain
        best = choose(figures, baseline)
        return Tuned(
            rows=tuple(self.rows.values()),
            baseline=self.rows[baseline].candidate,
            chosen=self.rows[best.candidate if best else baseline].candidate,
            gain=best,
            rounds=max(each.round for each in figures) + 1,
            interrupted=interrupted,
            wall_s=self.clock() - self.began,
        )
