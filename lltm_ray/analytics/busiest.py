"""Stretches of a window in which most happened: means over all of it hide a busy second in an idle hour.

Two kinds: the densest (`densest`), which a burst of a second may be, with what chance leaves open about its rate; and
those that last (`Stretches`), in which a queue would build up that engines should be added for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from lltm_ray.analytics.frames import Array

LEAST_S, LEAST_SERVICES, LEAST_EVENTS = 10.0, 5.0, 100
"""A stretch that lasts has at least so many seconds, service times and events: a queue for a shorter one is gone before
anybody notices."""
LASTING_S, LASTING_EVENTS = 30.0, 1000
"""Until there is either of both it goes on, where a rate is wanted that is right to a few percent."""
BURST_S = 1.0
"""The densest has at least so many seconds, and a service time: requests that come within one are in hand together,
in whichever order."""
_FEWEST, _STEP = 8, 2**0.25
"""Events of the shortest stretches that are looked at, and how many times as many the next longer ones have."""
_CHANCE = 1.6
"""Of 100 steady streams one has a stretch that `densest` takes for a burst: simulated, 30 to 20,000 events."""
USUAL = 1.96
"""Standard deviations: a normal number is farther from its mean once in twenty times."""
_NEARLY = 0.95
"""Of lower bounds that are so near to the highest, the longest stretch counts: it is less of a clump."""


class Stretch(NamedTuple):
    """A part of a window."""

    from_s: float
    until_s: float
    per_s: float
    """Events a second in it."""
    is_told: bool
    """False: fewer events than a stretch needs. It is the whole window then, and a part of it may have been fuller."""


class Burst(NamedTuple):
    """The part of a window that is the densest for certain; all of it where no part is."""

    from_s: float
    until_s: float
    per_s: float
    """Events a second in it."""
    low_per_s: float
    high_per_s: float
    """What the rate may have been that chance made this of, 19 times of 20 and more."""


def densest(xp: Any, at: Array, length_s: float, service_s: float) -> Burst:
    """The stretch whose rate is the highest for certain: that with the highest lower bound, over all lengths.

    The bound of k events out of n is the k-th arrival's gamma quantile at sqrt(2 log(e n / k)) + `_CHANCE` standard
    deviations, which holds for stretches of all lengths at once: shorter ones, of which there are more, have to be
    clearer (L. Dümbgen, V. Spokoiny: Multiscale testing of qualitative hypotheses, Ann. Statist. 29, 2001; for rates of
    Poisson processes: C. Rivera, G. Walther: Optimal detection of a jump in the intensity of a Poisson process, Scand.
    J. Statist. 40, 2013). Quantiles are by E. B. Wilson and M. M. Hilferty (PNAS 17, 1931). So the rate that is told
    is below no stretch's lower bound, and a random clump of a steady stream is no burst but in 1 of 100 streams.

    Args:
        xp: the arrays' module.
        at: moments of events, sorted; those outside of the window are left out.
        length_s: of the window.
        service_s: mean time of a service.
    """
    first, past = (int(xp.searchsorted(at, xp.asarray([edge]))[0]) for edge in (0.0, length_s))
    at, events, whole_s = at[first:past], past - first, max(length_s, 1e-9)
    found = []
    for begin_s, span_s, number in _candidates(xp, at, length_s, max(BURST_S, service_s)):
        deviations = math.sqrt(2 * math.log(math.e * events / max(number, 1))) + _CHANCE
        low, high = _low(number, deviations) / span_s, _high(number) / span_s
        found.append(Burst(begin_s, begin_s + span_s, number / span_s, low, high))
    least = max((each.low_per_s for each in found), default=0.0)
    if least <= events / whole_s:
        rates = (each / whole_s for each in (events, _low(events, USUAL), _high(events)))
        return Burst(0.0, length_s, *rates)
    near = [each for each in found if each.low_per_s >= _NEARLY * least and each.per_s >= least]
    return max(near, key=lambda each: each.until_s - each.from_s)


def _candidates(xp: Any, at: Array, length_s: float, least_s: float) -> Iterator[tuple[float, float, int]]:
    """Begin, length and events after the one it begins with, of the fullest stretch of each length."""
    if least_s >= length_s or not len(at):
        return
    begin = at[at + least_s <= length_s]
    if len(begin):
        number = xp.searchsorted(at, begin + least_s, side="right") - xp.arange(len(begin)) - 1
        best = int(number.argmax())
        yield float(begin[best]), least_s, int(number[best])
    yield length_s - least_s, least_s, len(at) - int(xp.searchsorted(at, xp.asarray([length_s - least_s]))[0])
    number = _FEWEST
    while number < len(at):
        span = at[number:] - at[:-number]
        best = int(span.argmin())
        if float(span[best]) >= least_s:
            yield float(at[best]), float(span[best]), number
        number = min(math.ceil(number * _STEP), max(len(at) - 1, number + 1))


def _low(events: int, deviations: float) -> float:
    """Of the mean number where so many came; Wilson and Hilferty's approximation."""
    return events * max(1 - 1 / (9 * events) - deviations / (3 * math.sqrt(events)), 0.0) ** 3 if events else 0.0


def _high(events: int) -> float:
    return (events + 1) * (1 - 1 / (9 * (events + 1)) + USUAL / (3 * math.sqrt(events + 1))) ** 3


class Stretches:
    """One for each event, from it until there are enough of both seconds and events; one that ends with the window.

    Args:
        xp: the arrays' module.
        at: moments of events, sorted; those outside of the window are left out.
        length_s: of the window.
        service_s: mean time of a service.
        is_lasting: see `LASTING_S`.
    """

    def __init__(self, xp: Any, at: Array, length_s: float, service_s: float, *, is_lasting: bool = False) -> None:
        self._xp, self._length_s = xp, length_s
        self.first, past = (int(xp.searchsorted(at, xp.asarray([edge]))[0]) for edge in (0.0, length_s))
        self._at = at = at[self.first : past]
        least_s = max(LEAST_S, LEAST_SERVICES * service_s)
        until, last_s = xp.maximum(self._later(LEAST_EVENTS), at + least_s), length_s - least_s
        last_s = min(last_s, self._before_last(LEAST_EVENTS))
        if is_lasting:
            until = xp.maximum(until, xp.minimum(self._later(LASTING_EVENTS), at + LASTING_S))
            last_s = min(last_s, max(self._before_last(LASTING_EVENTS), length_s - LASTING_S))
        begin = xp.flatnonzero(until <= length_s)
        last = xp.asarray([last_s, length_s] if last_s >= 0 else [], dtype=float)
        self._begin = xp.concatenate([begin, xp.searchsorted(at, last[:1])])
        self._from, self._until = xp.concatenate([at[begin], last[:1]]), xp.concatenate([until[begin], last[1:]])
        self._end = xp.searchsorted(at, self._until, side="right")
        self._per_s = (self._end - self._begin - 1) / (self._until - self._from)

    def _later(self, events: int) -> Array:
        """By event, when so many more have come; infinite where there are fewer."""
        none = self._xp.full(min(events, len(self._at)), float("inf"))
        return self._xp.concatenate([self._at[events:], none])

    def _before_last(self, events: int) -> float:
        """When so many more were still to come."""
        return float(self._at[-1 - events]) if len(self._at) > events else -float("inf")

    def fullest(self, cost: Array | None = None, most: float = 0.0) -> Stretch:
        """The one with most events a second.

        Args:
            cost: of each event that was given; None: all stretches count.
            most: only stretches count in which events cost at most so much on average.

        Returns:
            Where none counts: the whole window, or with costs nothing a second.
        """
        per_s, whole = self._per_s, len(self._at) / max(self._length_s, 1e-9)
        if cost is not None:
            cost = cost[self.first : self.first + len(self._at)]
            total = self._xp.concatenate([self._xp.zeros(1), self._xp.cumsum(cost)])
            mean = (total[self._end] - total[self._begin]) / self._xp.maximum(self._end - self._begin, 1)
            per_s = self._xp.where(mean <= most, per_s, 0.0)
            whole = whole if len(cost) and float(cost.mean()) <= most else 0.0
        best = int(per_s.argmax()) if len(per_s) else -1
        if best < 0 or float(per_s[best]) <= whole:
            return Stretch(0.0, self._length_s, whole, is_told=len(self._at) > LEAST_EVENTS)
        return Stretch(float(self._from[best]), float(self._until[best]), float(per_s[best]), is_told=True)
