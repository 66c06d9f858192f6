"""How long a request has its slot before its first byte, on the safe side: what a deadline must leave room for."""

from __future__ import annotations

from lltm_ray.routing.rates import Rates

__all__ = ["Lead"]

KNOWN = 8
"""First bytes that must have been seen before anybody is refused for it."""
MISSES = 0.005
"""Share of requests that may take longer; half of what is promised, as waits have misses of their own."""
STEP = 0.1
"""By how much of itself the surplus grows by a miss; it loses `MISSES` of that by each that was in time."""
SURPLUS_S = (0.002, 0.1, 30.0)
"""Least, first and most."""


class Lead:
    """The estimate that the model's rates give, and a surplus: the 99.5th percentile of what comes on top of it.

    The estimate knows the prompt and a full engine, but not whose prefill comes in between. That does not depend on the
    own prompt, so it is added. The surplus is a Robbins-Monro quantile estimate (Robbins and Monro, "A Stochastic
    Approximation Method", 1951) in the logarithm.

    Args:
        rates: of the model.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._seen = 0
        self.surplus_s = SURPLUS_S[1]

    def bound_s(self, uncached_tokens: float, slots: int) -> float:
        """Seconds from slot to first byte that 99 of 100 stay below; 0 while nothing is known.

        Args:
            uncached_tokens: what is to be computed.
            slots: of one engine.
        """
        return self._expected_s(uncached_tokens, slots) + self.surplus_s if self._seen >= KNOWN else 0.0

    def learn(self, uncached_tokens: float, slots: int, took_s: float) -> None:
        """A first byte came, so many seconds after its slot was claimed."""
        if self._rates.requests < KNOWN:
            return
        self._seen += 1
        surplus_s = took_s - self._expected_s(uncached_tokens, slots)
        self.surplus_s *= 1.0 + STEP if surplus_s > self.surplus_s else 1.0 - STEP * MISSES
        self.surplus_s = min(max(self.surplus_s, SURPLUS_S[0]), SURPLUS_S[2])

    def _expected_s(self, uncached_tokens: float, slots: int) -> float:
        return self._rates.prefill_s("", uncached_tokens) + self._rates.decode_s("", max(1, slots))
