"""How long a request has its slot before its first byte, on the safe side: what a deadline must leave room for."""

from __future__ import annotations

from lltm_ray.routing.rates import Rates

__all__ = ["Lead"]

KNOWN = 8
"""First bytes that must have been seen before anybody is refused for it."""
WEIGHT = 0.05
"""Weight of the newest first byte: the last 40 or so tell how busy the engines are."""
MISSES = 0.005
"""Share of requests that may take longer; half of what is promised, as waits have misses of their own."""
MARGINS = (1.0, 5.0, 10.0)
"""Mean absolute deviations above the mean: least, first, most."""
STEP = 0.5
"""What the margin gains by a miss; it loses `MISSES` of that by each that was in time."""
LEAST_DEVIATION_S = 0.0005
"""So that a pace without any noise does not count each rounding as a miss."""


class Lead:
    """The estimate that the model's rates give, and a surplus: the 99.5th percentile of what comes on top of it.

    The estimate knows the prompt and a full engine, but not whose prefill comes in between. That does not depend on the
    own prompt, so it is added. The surplus is its mean and a margin in mean deviations (as RFC 6298 sets timers). Mean
    and deviation follow the load within seconds, down as well as up. The margin, which is the shape of the tail and
    hardly changes, is a Robbins-Monro quantile estimate ("A Stochastic Approximation Method", 1951).

    Args:
        rates: of the model.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._seen = 0
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._margin = MARGINS[1]

    def bound_s(self, uncached_tokens: float, slots: int) -> float:
        """Seconds from slot to first byte that 99 of 100 stay below; 0 while nothing is known.

        Args:
            uncached_tokens: what is to be computed.
            slots: of one engine.
        """
        surplus_s = self._margin * self._deviation_s if self._seen >= KNOWN else 0.0
        return self.mean_s(uncached_tokens, slots) + surplus_s

    def mean_s(self, uncached_tokens: float, slots: int) -> float:
        """The same on average."""
        expected_s = self._expected_s(uncached_tokens, slots) + self._mean_s
        return max(0.0, expected_s) if self._seen >= KNOWN else 0.0

    def learn(self, uncached_tokens: float, slots: int, took_s: float) -> None:
        """A first byte came, so many seconds after its slot was claimed."""
        if self._rates.requests < KNOWN:
            return
        surplus_s = took_s - self._expected_s(uncached_tokens, slots)
        if not self._seen:
            self._mean_s, self._deviation_s = surplus_s, abs(surplus_s) / 2
        self._seen += 1
        stray_s = surplus_s - self._mean_s
        self._margin += STEP * ((stray_s > self._margin * self._deviation_s) - MISSES)
        self._margin = min(max(self._margin, MARGINS[0]), MARGINS[2])
        self._mean_s += WEIGHT * stray_s
        self._deviation_s = max(LEAST_DEVIATION_S, self._deviation_s + WEIGHT * (abs(stray_s) - self._deviation_s))

    def _expected_s(self, uncached_tokens: float, slots: int) -> float:
        speed = self._rates.speed("")
        return speed.prefill_s(uncached_tokens) + speed.decode_s(slots)
