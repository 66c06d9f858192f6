"""Readings of GPUs: integrals of their meters over any intervals, energy, and stretches of throttling.

Between two readings a value counts as the mean of both. So its integral up to any moment is a running sum, and over any
interval a difference of two: intervals and readings are never paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lltm_ray.analytics.answer import rows, table
from lltm_ray.analytics.frames import Array
from lltm_ray.analytics.overlaps import Intervals, Timeline
from lltm_ray.analytics.trace import Trace, nanos

THROTTLES = {
    "hardware thermal": 0x40,
    "software thermal": 0x20,
    "power brake": 0x80,
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "sync boost": 0x10,
    "display clock": 0x100,
}
"""NVML's `nvmlClocksEventReason*` bits (nvml.h) that slow a GPU down, the more telling first: `hardware slowdown` comes
along with the two of hardware. Being idle (0x1) and clocks that somebody chose (0x2) are no throttling."""
GAP_S = 30.0
"""Readings further apart are not joined: nobody looked meanwhile."""
POINTS = 120
"""Of a GPU's track, at most."""
_METERS = ("power_w", "utilization", "temperature_c", "memory_used_bytes")
_TRACK = ("at_s", "at_unix_nano", "gpu", *_METERS, "throttle", "tokens_per_s")


def sums(xp: Any, by: Array, values: Array, count: int) -> Array:
    """Of values, by code from 0 to count."""
    return xp.bincount(by, weights=values, minlength=count) if len(by) else xp.zeros(count)


class Readings:
    """Of all GPUs of a window, in the order of GPU and time.

    Attributes:
        gpu, at, end: each reading, and the time of the next one of its GPU; its own time where none came soon.
        gpus: how many GPUs have names; arrays by GPU are so long.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._xp = xp = trace.engine.xp
        known = trace.gpus[trace.gpus["gpu"] >= 0]
        self._frame = known.sort_values(["gpu", "at_s"]).reset_index(drop=True)
        self.gpus = len(trace.names.gpu)
        self.gpu, self.at = self.meter("gpu"), self.meter("at_s")
        self._is_last = xp.concatenate([self.gpu[1:] != self.gpu[:-1], xp.full(min(len(self.gpu), 1), 1) > 0])
        is_soon = ~self._is_last & (self._next(self.at) - self.at <= GAP_S)
        self.end = xp.where(is_soon, self._next(self.at), self.at)
        self._line = Timeline(xp, {"readings": (self.gpu, self.at, self.end)})

    def __len__(self) -> int:
        return len(self.gpu)

    def meter(self, name: str) -> Array:
        """A column of `Trace.gpus`."""
        return self._trace.engine.array(self._frame[name])

    def throttled(self, bits: int = sum(THROTTLES.values())) -> Array:
        """Whether any of these bits is set, 0 or 1; NaN where the GPU does not tell."""
        told = self.meter("throttle")
        return self._xp.where(told >= 0, ((told & bits) > 0) * 1.0, float("nan"))

    def _next(self, values: Array) -> Array:
        return self._xp.concatenate([values[1:], values[-1:]])

    def integral(self, values: Array) -> tuple[Array, Array]:
        """Of a meter over the whole window, by GPU, and the seconds in which it is known."""
        xp, mean, length = self._xp, (values + self._next(values)) / 2, self.end - self.at
        area = sums(xp, self.gpu, xp.nan_to_num(mean) * length, self.gpus)
        return area, sums(xp, self.gpu, ~xp.isnan(mean) * length, self.gpus)

    def within(self, values: Array, over: Intervals) -> tuple[Array, Array]:
        """Of a meter over each interval, grouped by GPU, and the seconds in which it is known."""
        mean = (values + self._next(values)) / 2
        if not len(self):
            return over[1] * 0.0, over[1] * 0.0
        level = self._line.level("readings", self._xp.nan_to_num(mean))
        known = self._line.level("readings", ~self._xp.isnan(mean) * 1.0)
        return self._line.within(level, *over), self._line.within(known, *over)

    def energy(self) -> tuple[Intervals, Array]:
        """Intervals between readings and their joules.

        The growth of the GPU's counter, whatever the gap; power over time where it has none. A counter that fell has
        begun anew: that interval counts nothing.
        """
        xp, counter = self._xp, self.meter("energy_j")
        has = sums(xp, self.gpu, ~xp.isnan(counter) * 1.0, self.gpus)[self.gpu] > 0
        keep = ~has | ~xp.isnan(counter)
        gpu, at, counter, has = self.gpu[keep], self.at[keep], counter[keep], has[keep]
        watts = ((self.meter("power_w") + self._next(self.meter("power_w"))) / 2 * (self.end - self.at))[keep]
        is_last = xp.concatenate([gpu[1:] != gpu[:-1], xp.full(min(len(gpu), 1), 1) > 0])
        grown = xp.where(is_last, 0.0, xp.maximum(self._next(counter) - counter, 0.0))
        return (gpu, at, xp.where(is_last, at, self._next(at))), xp.where(has, grown, xp.nan_to_num(watts))

    def span(self) -> tuple[Array, Array]:
        """First and last reading of each GPU; 0 for none."""
        first, last = self._xp.zeros(self.gpus), self._xp.zeros(self.gpus)
        is_first = self._xp.concatenate([self._is_last[-1:], self._is_last[:-1]])
        first[self.gpu[is_first]], last[self.gpu[self._is_last]] = self.at[is_first], self.at[self._is_last]
        return first, last

    def highest(self) -> Any:
        """Host table gpu, node, memory_used_bytes, temperature_c: the last two at their highest, -1 if unknown."""
        known = {name: self._frame[name].fillna(-1.0) for name in ("memory_used_bytes", "temperature_c")}
        most = dict.fromkeys(("node", *known), "max")
        return self._trace.engine.host(self._frame.assign(**known).groupby("gpu", sort=True).agg(most).reset_index())

    def longest_throttled(self) -> Mapping[int, tuple[float, float]]:
        """GPU -> begin and end of its longest stretch of throttling."""
        xp, hot = self._xp, self._xp.nan_to_num(self.throttled())
        is_new = (self.gpu[1:] != self.gpu[:-1]) | (hot[1:] != hot[:-1]) | (self.end[:-1] != self.at[1:])
        stretch = xp.concatenate([xp.zeros(min(len(hot), 1)), xp.cumsum(is_new * 1.0)])
        frame = self._trace.engine.frame({"gpu": self.gpu, "at_s": self.at, "end_s": self.end, "stretch": stretch})
        found = frame[hot > 0].groupby(["gpu", "stretch"], sort=True).agg({"at_s": "min", "end_s": "max"})
        found = found.reset_index()
        found["length"] = found["end_s"] - found["at_s"]
        longest = found.sort_values(["gpu", "length", "stretch"]).drop_duplicates("gpu", keep="last")
        return {int(row.gpu): (row.at_s, row.end_s) for row in rows(self._trace.engine.host(longest))}

    def track(self, replies: Intervals, tokens_per_s: Array) -> Any:
        """At most `POINTS` of each GPU, for charts.

        Args:
            replies: grouped by GPU, while tokens were generated.
            tokens_per_s: by each of them.
        """
        trace, xp = self._trace, self._xp
        width = max(trace.length_s, 1e-9) / POINTS
        bucket = self.gpu * POINTS + xp.minimum(xp.maximum(self.at // width, 0), POINTS - 1).astype("int64")
        count = self.gpus * POINTS
        place = xp.arange(count)
        start = place % POINTS * width
        every = (place // POINTS, start, start + width)
        line = Timeline(xp, {"replies": replies, "points": every})
        tokens = line.within(line.level("replies", tokens_per_s), *every) / width
        columns = {"gpu": place // POINTS, "at_s": start + width / 2, "tokens_per_s": tokens}
        columns["readings"] = sums(xp, bucket, bucket * 0.0 + 1.0, count)
        for name in _METERS:
            values = self.meter(name)
            known = sums(xp, bucket, ~xp.isnan(values) * 1.0, count)
            total = sums(xp, bucket, xp.nan_to_num(values), count)
            columns[name] = xp.where(known > 0, total / xp.maximum(known, 1.0), float("nan"))
        columns["throttle"] = xp.where(sums(xp, bucket, (self.meter("throttle") >= 0) * 1.0, count) > 0, 0, -1)
        for bit in THROTTLES.values():
            columns["throttle"] += bit * (sums(xp, bucket, xp.nan_to_num(self.throttled(bit)), count) > 0)
        host = trace.engine.host(trace.engine.frame(columns))
        return _named(trace, host[host["readings"] > 0])


def _named(trace: Trace, track: Any) -> Any:
    told = {name: track[name].tolist() for name in _TRACK if name in track}
    told["gpu"] = trace.names.decode("gpu", track["gpu"])
    told["at_unix_nano"] = [nanos(trace, at) for at in told["at_s"]]
    return table({name: told[name] for name in _TRACK})
