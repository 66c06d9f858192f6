"""From measurements of candidates in rounds to a choice, or to none: `weigh`, `survivors`, `choose`. Pure.

Every figure is a logarithm, so differences are ratios. A figure is taken as candidate + round + noise: what a round's
hour did to all its candidates cancels. A gain over the baseline comes with an interval that holds for all candidates
at once (Dunnett), so that the best of many does not win by chance. Its width is drawn (a parametric bootstrap of the
largest error): with three rounds, drawing whole measurements would give intervals far too narrow.

Sources: C. W. Dunnett: A multiple comparison procedure for comparing several treatments with a control. J. Am. Stat.
Assoc. 50 (1955). K. Jamieson, A. Talwalkar: Non-stochastic best arm identification. AISTATS 2016 (successive halving).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
DRAWS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One candidate in one round."""

    candidate: str
    round: int
    score: float
    """Logarithm of the figure, the higher the better: log(tokens/s), or -log(seconds)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How many times as good as the baseline; 1 is alike. The interval is None while nothing tells the noise."""

    candidate: str
    ratio: float
    low: float | None = None
    high: float | None = None
    rounds: int = 0

    @property
    def is_certain(self) -> bool:
        """Better than the baseline beyond the noise."""
        return self.low is not None and self.low > 1


@dataclass(frozen=True, slots=True)
class _Fit:
    """Effects of all candidates against the first, by least squares."""

    names: list[str]
    effects: Any
    variance: float
    freedom: int
    spread: Any
    """Covariance of the effects in units of `variance`, that of the first included (zeros)."""


def weigh(measured: Sequence[Measured], baseline: str) -> list[Gain]:
    """Every other candidate against the baseline, the best first.

    Args:
        measured: at most one for a candidate and round.
        baseline: a candidate that was measured.
    """
    import numpy as np

    fit = _fit(measured, baseline)
    errors = np.sqrt(fit.variance * np.diag(fit.spread))
    reach = _reach(fit, LEVEL) if fit.freedom > 0 else math.inf
    rounds = [sum(each.candidate == name for each in measured) for name in fit.names]
    found = [
        _gain(name, float(effect), float(reach * error) if math.isfinite(reach) else None, count)
        for name, effect, error, count in zip(fit.names, fit.effects, errors, rounds, strict=True)
    ]
    return sorted(found[1:], key=lambda gain: -gain.ratio)


def choose(measured: Sequence[Measured], baseline: str) -> Gain | None:
    """The candidate to take instead of the baseline; None: no gain is beyond the noise."""
    certain = [gain for gain in weigh(measured, baseline) if gain.is_certain]
    return certain[0] if certain else None


def survivors(measured: Sequence[Measured], baseline: str, among: Sequence[str]) -> list[str]:
    """Who is worth another round: the baseline, the better half, and of the others those that may yet be the best.

    Plain halving drops the worse half whatever the noise; here one goes only when its gap to the leader is beyond it.

    Args:
        measured: until now.
        baseline: stays.
        among: candidates that are still in, in the plan's order, which is kept.
    """
    import numpy as np

    fit = _fit(measured, baseline)
    if fit.freedom < 1 or len(among) < 3:
        return list(among)
    place = {name: at for at, name in enumerate(fit.names)}
    ranked = sorted(among, key=lambda name: -fit.effects[place[name]])
    leader, kept = place[ranked[0]], set(ranked[: -(-len(ranked) // 2)]) | {baseline}
    reach = _reach(fit, LEVEL)
    for name in ranked:
        at = place[name]
        unit = fit.spread[at, at] + fit.spread[leader, leader] - 2 * fit.spread[at, leader]
        gap = fit.effects[leader] - fit.effects[at]
        if gap <= reach * float(np.sqrt(max(0.0, fit.variance * unit))):
            kept.add(name)
    return [name for name in among if name in kept]


def _gain(name: str, effect: float, reach: float | None, rounds: int) -> Gain:
    if reach is None:
        return Gain(candidate=name, ratio=math.exp(effect), rounds=rounds)
    return Gain(
        candidate=name,
        ratio=math.exp(effect),
        low=math.exp(effect - reach),
        high=math.exp(effect + reach),
        rounds=rounds,
    )


def _fit(measured: Sequence[Measured], baseline: str) -> _Fit:
    """Least squares of score = candidate + round."""
    import numpy as np

    names = [baseline, *dict.fromkeys(each.candidate for each in measured if each.candidate != baseline)]
    rounds = sorted({each.round for each in measured})
    design = np.zeros((len(measured), len(names) - 1 + len(rounds)))
    for row, each in enumerate(measured):
        if each.candidate != baseline:
            design[row, names.index(each.candidate) - 1] = 1
        design[row, len(names) - 1 + rounds.index(each.round)] = 1
    scores = np.array([each.score for each in measured])
    inverse = np.linalg.pinv(design.T @ design)
    found = inverse @ design.T @ scores
    freedom = len(measured) - int(np.linalg.matrix_rank(design))
    left = float(((scores - design @ found) ** 2).sum())
    count = len(names)
    spread: np.ndarray[Any, Any] = np.zeros((count, count))
    spread[1:, 1:] = inverse[: count - 1, : count - 1]
    effects = np.concatenate([[0.0], found[: count - 1]])
    return _Fit(names, effects, left / freedom if freedom > 0 else math.nan, freedom, spread)


def _reach(fit: _Fit, level: float) -> float:
    """Standard errors that the largest of all errors stays within, in `level` of the draws (two-sided)."""
    import numpy as np

    spread = fit.spread[1:, 1:]
    if not len(spread):
        return 0.0
    dice = np.random.default_rng(0)
    errors = dice.multivariate_normal(np.zeros(len(spread)), spread, DRAWS, check_valid="ignore")
    scale = np.sqrt(dice.chisquare(fit.freedom, DRAWS) / fit.freedom)
    largest = np.abs(errors / np.sqrt(np.diag(spread))).max(axis=1) / scale
    return float(np.quantile(largest, level))
