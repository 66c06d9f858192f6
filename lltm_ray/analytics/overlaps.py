"""Intervals that overlap in time, for all of them at once: one sort, then running sums; no pair is ever made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lltm_ray.analytics.frames import Array

Intervals = tuple[Array, Array, Array]
"""group: int64 from 0; start and end: float64 seconds without NaN, end >= start."""

_LEAST_S = 1e-9


class Timeline:
    """Layers of intervals, in groups that know nothing of each other (engines, GPUs).

    Between two events (an interval starts or ends) nothing changes. A level is a number for the time after each event,
    and its integral over any interval is the difference of two running sums. Before the first event of all layers and
    after the last one levels are 0.

    Args:
        xp: the arrays' module.
        layers: name -> intervals; at least one layer, empty ones among them.
    """

    def __init__(self, xp: Any, layers: Mapping[str, Intervals]) -> None:
        self._xp = xp
        times = xp.concatenate([xp.zeros(1), *(each for _, *both in layers.values() for each in both)])
        self._zero_s, self._last_s = float(times.min()), float(times.max())
        self._stride_s = self._last_s - self._zero_s + 1.0
        self._places: dict[str, slice] = {}
        keys, first = [], 0
        for name, (group, start, end) in layers.items():
            keys += [self._key(group, start), self._key(group, end)]
            self._places[name] = slice(first, first + 2 * len(start))
            first += 2 * len(start)
        joined = xp.concatenate(keys)
        self._order = xp.argsort(joined)
        self._keys = joined[self._order]

    def _key(self, group: Array, at_s: Array) -> Array:
        """Moments of all groups on one axis; a nanosecond apart still, for 1000 groups of a day.

        Moments outside the layers' time go to its ends: on the axis they would be another group's.
        """
        return group * self._stride_s + (self._xp.clip(at_s, self._zero_s, self._last_s) - self._zero_s)

    def level(self, layer: str, weight: Array | None = None) -> Array:
        """How many intervals of a layer run after each event, or the sum of their weights."""
        xp, place = self._xp, self._places[layer]
        half = (place.stop - place.start) // 2
        change = xp.zeros(len(self._keys))
        weights = xp.full(half, 1.0) if weight is None else weight
        change[place.start : place.start + half] = weights
        change[place.start + half : place.stop] = -weights
        return xp.cumsum(change[self._order])

    def within(self, level: Array, group: Array, start: Array, end: Array) -> Array:
        """Integral of a level over each interval, in its unit times seconds."""
        if not len(self._keys):
            return self._xp.zeros(len(start))
        xp = self._xp
        steps = level[:-1] * xp.diff(self._keys)
        area = xp.concatenate([xp.zeros(1), xp.cumsum(steps)])
        return self._until(level, area, self._key(group, end)) - self._until(level, area, self._key(group, start))

    def mean(self, level: Array, group: Array, start: Array, end: Array) -> Array:
        """Of a level over each interval; 0 for one without length."""
        return self.within(level, group, start, end) / self._xp.maximum(end - start, _LEAST_S)

    def _until(self, level: Array, area: Array, key: Array) -> Array:
        at = self._xp.searchsorted(self._keys, key, side="right") - 1
        last = self._xp.maximum(at, 0)
        return self._xp.where(at >= 0, area[last] + level[last] * (key - self._keys[last]), 0.0)


def count_overlaps(xp: Any, of: Intervals, among: Intervals) -> Array:
    """With how many intervals of `among`, in its group, each one of `of` shares some time; ends that touch do not."""
    times = xp.concatenate([xp.zeros(1), of[1], of[2], among[1], among[2]])
    zero_s = float(times.min())
    stride_s = float(times.max()) - zero_s + 1.0
    starts = xp.sort(among[0] * stride_s + (among[1] - zero_s))
    ends = xp.sort(among[0] * stride_s + (among[2] - zero_s))
    begun = xp.searchsorted(starts, of[0] * stride_s + (of[2] - zero_s), side="left")
    over = xp.searchsorted(ends, of[0] * stride_s + (of[1] - zero_s), side="right")
    return xp.maximum(begun - over, 0)
