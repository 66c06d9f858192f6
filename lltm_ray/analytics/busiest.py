"""Stretches of a window in which most happened: means over all of it hide a busy minute in an idle hour."""

from __future__ import annotations

from typing import Any, NamedTuple

from lltm_ray.analytics.frames import Array

LEAST_S, LEAST_SERVICES, LEAST_EVENTS = 10.0, 5.0, 100
"""A stretch has at least so many seconds, service times and events: what is shorter is chance, and a queue for it is
gone before anybody notices."""
LASTING_S, LASTING_EVENTS = 30.0, 1000
"""One that lasts goes on until there is either of both, too: its rate is right to a few percent."""


class Stretch(NamedTuple):
    """A part of a window."""

    from_s: float
    until_s: float
    per_s: float
    """Events a second in it."""
    is_told: bool
    """False: fewer events than a stretch needs. It is the whole window then, and a part of it may have been fuller."""


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
