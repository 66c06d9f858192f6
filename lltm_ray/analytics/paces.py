"""How fast each engine is at the work that it and its peers do, and what that work should take."""

from __future__ import annotations

from typing import Any

import numpy as np

from lltm_ray.analytics.fit import fit_on_base
from lltm_ray.analytics.frames import Array
from lltm_ray.analytics.trace import Trace

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

_TURNS, _LEAST_STEP, _MOST_RATIO = 4, 0.005, 0.95
"""At most so many times; a smaller step is none; and steps are taken to shrink by no less than this."""


class Paces:
    """What peers' work should take: fitted to all of them, with each engine's own pace taken out.

    The fit is of thousands of attempts at most, in hundreds of small steps, so it runs on the host: launching them took
    seconds on a GPU.

    Args:
        trace: whose engine computes.
        kinds: how many groups of peers there are.
        engine, peers, took, beside: of each attempt: two codes, its seconds, and those beside prefills.
        terms: likewise, the amounts of work.
    """

    def __init__(
        self, trace: Trace, kinds: int, engine: Array, peers: Array, took: Array, beside: Array, *terms: Array
    ) -> None:
        given = {str(i): each for i, each in enumerate((engine, peers, took, beside, *terms))}
        held = trace.engine.host(trace.engine.frame(given))
        self._xp = trace.engine.xp
        self._terms = self._xp.asarray(
            _fit_in_turns(kinds, len(trace.names.engine), *(held[i].to_numpy() for i in given))
        )

    def pace(self, peers: Array, took: Array, beside: Array, *terms: Array) -> Array:
        """Logarithm of what attempts took over what they should on an engine like its peers."""
        return _pace(self._xp, self._terms[peers], took, beside, *terms)


def _fit_in_turns(
    kinds: int, engines: int, engine: Ids, peers: Ids, took: Floats, beside: Floats, *terms: Floats
) -> Floats:
    """Work and pace are fitted in turns; returns what the work takes, [kinds, len(terms) + 1].

    Where an engine alone has much at once, a pace looks like the price of that, and turns come near the truth only
    slowly; as each comes nearer by an equal part of the rest, three tell where they go (A. C. Aitken, 1926).
    """
    group = np.zeros(engines, np.int64)
    group[engine] = peers

    def fit(own: Floats) -> Floats:
        return _fit(kinds, peers, took, beside, [term * np.exp(own)[engine] for term in terms])

    def step(own: Floats) -> Floats:
        """Fit the work, with paces `own` taken out of it, then the paces: logarithms, the peers' mean of them 0."""
        paces = _medians(engine, _pace(np, fit(own)[peers], took, beside, *terms), engines, 0.0)
        total = np.bincount(peers, weights=paces[engine], minlength=kinds)
        return paces - (total / np.maximum(np.bincount(peers, minlength=kinds), 1))[group]

    own = np.zeros(engines)
    for _ in range(_TURNS if len(engine) else 0):
        first = step(own)
        second = step(first)
        steps = first - own, second - first
        is_large = np.abs(steps[0]) > _LEAST_STEP
        ratio = np.where(is_large, steps[1] / np.where(is_large, steps[0], 1.0), 0.0)
        ratio = np.clip(ratio, 0.0, _MOST_RATIO)
        own, before = second + steps[1] * ratio / (1.0 - ratio), own
        if float(np.abs(own - before).max()) <= _LEAST_STEP:
            break
    return fit(own)


def _fit(kinds: int, peers: Ids, took: Floats, beside: Floats, work: list[Floats]) -> Floats:
    """Tokens always cost something, and a second beside prefills at most that second.

    Errors are relative to what is expected, first by the tokens alone: relative to what each took, one that seems to
    have taken no time would count for all.
    """
    usual = np.maximum(_medians(peers, took / work[0], kinds, 1.0), 1e-9)[peers] * work[0]
    expected = usual
    for _ in range(2):
        scale = 1.0 / expected
        fit = fit_on_base(np, peers, kinds, [*work, beside], took, scale)
        is_all = fit.terms[:, -1] > 1
        if bool(is_all.any()):
            lost = beside * is_all[peers]
            fit = fit_on_base(np, peers, kinds, [*work, beside - lost], took - lost, scale)
        expected = np.maximum(fit.fitted, 0.2 * usual)
    terms: Floats = np.maximum(fit.terms, 0.0)
    terms[:, -1] = np.where(is_all, 1.0, terms[:, -1])
    return terms


def _pace(xp: Any, each: Array, took: Array, beside: Array, *terms: Array) -> Array:
    """With what the work takes of each attempt's peers."""
    expected = sum(each[:, i] * term for i, term in enumerate(terms))
    rest = took - xp.minimum(each[:, -1], 1.0) * beside
    return xp.log(xp.maximum(rest, 0.05 * took) / xp.maximum(expected, 1e-9))


def _medians(group: Ids, values: Floats, groups: int, none: float) -> Floats:
    """Of each group's values; `none` where it has none."""
    is_known = ~np.isnan(values)
    group, values = group[is_known], values[is_known]
    values = values[np.lexsort((values, group))]
    count = np.bincount(group, minlength=groups)
    some, first = count > 0, np.cumsum(count) - count
    found = np.full(groups, none)
    low, high = first[some] + (count[some] - 1) // 2, first[some] + count[some] // 2
    found[some] = (values[low] + values[high]) / 2
    return found
