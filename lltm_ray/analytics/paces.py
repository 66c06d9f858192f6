"""How fast each engine is at the work that it and its peers do, and what that work should take."""

from __future__ import annotations

from lltm_ray.analytics.fit import fit_on_base
from lltm_ray.analytics.frames import Array
from lltm_ray.analytics.trace import Trace

_TURNS, _LEAST_STEP, _MOST_RATIO = 4, 0.005, 0.95
"""At most so many times; a smaller step is none; and steps are taken to shrink by no less than this."""


class Paces:
    """What peers' work should take: fitted to all of them, with each engine's own pace taken out.

    Work and pace are fitted in turns. Where an engine alone has much at once, a pace looks like the price of that, and
    turns come near the truth only slowly; as each comes nearer by an equal part of the rest, three tell where they go
    (A. C. Aitken, 1926).

    Args:
        trace: whose engine computes.
        kinds: how many groups of peers there are.
        engine, peers, took, beside: of each attempt: two codes, its seconds, and those beside prefills.
        terms: likewise, the amounts of work.
    """

    def __init__(
        self, trace: Trace, kinds: int, engine: Array, peers: Array, took: Array, beside: Array, *terms: Array
    ) -> None:
        self._engine, self._xp = trace.engine, trace.engine.xp
        xp = self._xp
        group = xp.zeros(len(trace.names.engine), "int64")
        group[engine] = peers

        def step(own: Array) -> Array:
            """Fit the work, with paces `own` taken out of it, then the paces: logarithms, the peers' mean of them 0."""
            self._fit(kinds, peers, took, beside, [term * xp.exp(own)[engine] for term in terms])
            frame = trace.engine.frame({"engine": engine, "pace": self.pace(peers, took, beside, *terms)})
            found, paces = trace.engine.quantiles(frame, ["engine"], "pace", [0.5]), xp.zeros(len(own))
            paces[trace.engine.array(found["engine"])] = trace.engine.array(found["q50"])
            total, count = (
                xp.bincount(peers, weights=paces[engine], minlength=kinds),
                xp.bincount(peers, minlength=kinds),
            )
            return paces - (total / xp.maximum(count, 1))[group]

        own = xp.zeros(len(group))
        for _ in range(_TURNS if len(engine) else 0):
            first = step(own)
            second = step(first)
            steps = first - own, second - first
            is_large = xp.abs(steps[0]) > _LEAST_STEP
            ratio = xp.where(is_large, steps[1] / xp.where(is_large, steps[0], 1.0), 0.0)
            ratio = xp.clip(ratio, 0.0, _MOST_RATIO)
            own, before = second + steps[1] * ratio / (1.0 - ratio), own
            if float(xp.abs(own - before).max()) <= _LEAST_STEP:
                break
        self._fit(kinds, peers, took, beside, [term * xp.exp(own)[engine] for term in terms])

    def _fit(self, kinds: int, peers: Array, took: Array, beside: Array, work: list[Array]) -> None:
        """Tokens always cost something, and a second beside prefills at most that second.

        Errors are relative to what is expected, first by the tokens alone: relative to what each took, one that seems
        to have taken no time would count for all.
        """
        xp = self._xp
        usual = self._rates(kinds, peers, took / work[0])[peers] * work[0]
        expected = usual
        for _ in range(2):
            scale = 1.0 / expected
            fit = fit_on_base(xp, peers, kinds, [*work, beside], took, scale)
            is_all = fit.terms[:, -1] > 1
            if bool(is_all.any()):
                lost = beside * is_all[peers]
                fit = fit_on_base(xp, peers, kinds, [*work, beside - lost], took - lost, scale)
            expected = xp.maximum(fit.fitted, 0.2 * usual)
        self._terms = xp.maximum(fit.terms, 0.0)
        self._terms[:, -1] = xp.where(is_all, 1.0, self._terms[:, -1])

    def _rates(self, kinds: int, peers: Array, rate: Array) -> Array:
        """By group of peers, the median of a rate."""
        frame = self._engine.frame({"peers": peers, "rate": rate})
        found, rates = self._engine.quantiles(frame, ["peers"], "rate", [0.5]), self._xp.full(kinds, 1.0)
        rates[self._engine.array(found["peers"])] = self._engine.array(found["q50"])
        return self._xp.maximum(rates, 1e-9)

    def pace(self, peers: Array, took: Array, beside: Array, *terms: Array) -> Array:
        """Logarithm of what attempts took over what they should on an engine like its peers."""
        xp, each = self._xp, self._terms[peers]
        expected = sum(each[:, i] * term for i, term in enumerate(terms))
        rest = took - xp.minimum(each[:, -1], 1.0) * beside
        return xp.log(xp.maximum(rest, 0.05 * took) / xp.maximum(expected, 1e-9))
