"""How many slots of one server were busy, look by look."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import inf

_MOST = 2400


class Looks:
    """In order of time, however they come; times are Unix seconds."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._busy: list[int] = []

    def __len__(self) -> int:
        return len(self._times)

    @property
    def last(self) -> float:
        """When the newest was; -inf without any."""
        return self._times[-1] if self._times else -inf

    def add(self, at: float, busy: int) -> None:
        """Note a look; two parts of one look add up."""
        place = bisect_left(self._times, at)
        if place < len(self._times) and self._times[place] == at:
            self._busy[place] += busy
            return
        self._times.insert(place, at)
        self._busy.insert(place, busy)
        if len(self._times) > _MOST:
            del self._times[0], self._busy[0]

    def between(self, start: float, end: float) -> list[tuple[float, int]]:
        """(time, busy) of looks at these moments or between them."""
        some = slice(bisect_left(self._times, start), bisect_right(self._times, end))
        return list(zip(self._times[some], self._busy[some], strict=True))

    def next_after(self, moment: float, within_s: float) -> float:
        """When the first look at or after a moment was; the moment itself where none was so soon."""
        place = bisect_left(self._times, moment)
        is_there = place < len(self._times) and self._times[place] <= moment + within_s
        return self._times[place] if is_there else moment

    def forget(self, before: float) -> None:
        """Drop looks older than a moment."""
        old = bisect_left(self._times, before)
        del self._times[:old], self._busy[:old]
