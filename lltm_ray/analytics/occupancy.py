"""Slots that attempts held, and what servers told of their requests meanwhile."""

from __future__ import annotations

from typing import Any, NamedTuple

from lltm_ray.analytics.answer import rows
from lltm_ray.analytics.frames import Array, Frame
from lltm_ray.analytics.overlaps import Timeline, count_overlaps
from lltm_ray.analytics.readings import GAP_S, sums
from lltm_ray.analytics.trace import Trace

_LONG = 0.99
"""Quantile of the time in the system: so long before the window's end its requests are known, for they have ended."""
CLOCKS_S = (0.0, *(sign * apart for apart in (2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0) for sign in (-1.0, 1.0)))
"""By so much the clock of an engine's node may be ahead of its gateway's."""
EDGE, EDGE_S = 0.05, 10.0
"""Samples may lack so much of the window, or so many seconds, at its ends."""


class Held(NamedTuple):
    """Attempts that an engine had, each as long as its array."""

    engine: Array
    model: Array
    sent: Array
    slot: Array
    """When its slot began; before, it waited in llama-server."""
    ended: Array
    wait: Array
    """Seconds without a slot, there and in the gateway."""
    computed: Array
    """Prompt tokens."""
    generated: Array
    failed: Array
    """0 or 1."""


def read_held(trace: Trace) -> Held:
    """Attempts that were sent to an engine, whatever became of them."""
    xp, frame = trace.engine.xp, trace.attempts
    frame = frame[(frame["engine"] >= 0) & frame["sent_s"].notna() & frame["ended_s"].notna()]
    names = ("engine", "model", "sent_s", "ended_s", "queue_s", "route_s", "error")
    engine, model, sent, ended, queue, route, error = (trace.engine.array(frame[name]) for name in names)
    ended, queue = xp.maximum(ended, sent), xp.nan_to_num(queue)
    slot = xp.minimum(sent + queue, ended)
    computed, generated = (trace.engine.array(frame[name]) for name in ("computed", "generated"))
    wait = queue + xp.nan_to_num(route)
    return Held(engine, model, sent, slot, ended, wait, computed, generated, (error >= 0) * 1.0)


def within(xp: Any, start: Array, end: Array, length_s: float) -> Array:
    """Seconds of each interval that are inside the window."""
    return xp.maximum(xp.minimum(end, length_s) - xp.maximum(start, 0.0), 0.0)


class Engines(NamedTuple):
    """By engine's code, on the host."""

    slots: list[int]
    model: list[int]
    there: list[tuple[float, float]]
    """From when to when of the window an engine was there."""

    def there_s(self, code: int) -> float:
        """For how many seconds."""
        return max(self.there[code][1] - self.there[code][0], 1e-9)

    def slots_within(self, model: int, from_s: float, until_s: float) -> float:
        """Of a model's engines, on average over a part of the window."""
        parts = (
            slots * max(min(until_s, there[1]) - max(from_s, there[0]), 0.0)
            for slots, served, there in zip(self.slots, self.model, self.there, strict=True)
            if served == model
        )
        return sum(parts) / max(until_s - from_s, 1e-9)


def slots_of(trace: Trace, changes: Frame | None = None) -> list[int]:
    """Engine -> slots: as its server tells, else one more than the last that was named, else the most at once.

    Args:
        trace: whose servers and attempts tell.
        changes: engine, busy: how many slots were held after each change; None: 0 for an engine that names none.
    """
    slots = [0] * len(trace.names.engine)
    sources = [(trace.servers, "slots_total", 0), (trace.attempts, "slot", 1)]
    sources += [(changes, "busy", 0)] if changes is not None else []
    for frame, column, more in sources:
        most = trace.engine.host(frame[["engine", column]].groupby("engine").agg({column: "max"}).reset_index())
        for engine, value in zip(most["engine"].tolist(), most[column].tolist(), strict=True):
            if engine >= 0 and not slots[engine]:
                slots[engine] = max(int(value) + more, 0)
    return slots


def read_engines(trace: Trace) -> Engines:
    """An engine was there from its first sample or attempt to its last; its slots: see `slots_of`.

    Within `EDGE` or `EDGE_S` of the whole window, it was there all the time.
    """
    length, found = trace.length_s, len(trace.names.engine)
    engines = Engines(slots_of(trace), [-1] * found, [(0.0, length)] * found)
    used = trace.attempts[(trace.attempts["engine"] >= 0) & trace.attempts["sent_s"].notna()]
    used = used.assign(at_s=used["sent_s"], last_s=used["ended_s"])
    told = trace.servers[trace.servers["engine"] >= 0]
    told = told.assign(last_s=told["at_s"])
    by_engine: dict[int, list[Any]] = {}
    for frame in (used, told):
        most = {"model": "max", "at_s": "min", "last_s": "max"}
        for row in rows(trace.engine.host(frame.groupby("engine", sort=True).agg(most).reset_index())):
            by_engine.setdefault(int(row.engine), []).append(row)
    for code, each in by_engine.items():
        first, last = max(min(row.at_s for row in each), 0.0), min(max(row.last_s for row in each), length)
        engines.model[code] = next(int(row.model) for row in reversed(each) if row.model >= 0 or row is each[0])
        if last - first + max(EDGE_S, EDGE * length) < length:
            engines.there[code] = (first, last)
    return engines


class InSystem(NamedTuple):
    """By engine, each as long as its array."""

    known_s: Array
    """Seconds between samples."""
    told_s: Array
    counted_s: Array
    """Integrals over them: of what servers told, and of the attempts that are known."""
    told: Array
    counted: Array
    """Sums over the samples."""
    samples: Array


def in_system(trace: Trace, held: Held, ahead_s: float = 0.0) -> InSystem:
    """What servers told of their number of requests against what attempts make of it, over the same time.

    Up to the `_LONG` quantile of the attempts' time before the window's end: of later ones, not all are known yet.

    Args:
        trace: whose samples.
        held: its attempts.
        ahead_s: the samples' clock is so far ahead of the attempts'.
    """
    xp, found = trace.engine.xp, len(trace.names.engine)
    end = trace.length_s - (float(xp.percentile(held.ended - held.sent, 100 * _LONG)) if len(held.sent) else 0.0)
    frame = trace.servers
    frame = frame[(frame["engine"] >= 0) & frame["processing"].notna()].assign(at_s=frame["at_s"] - ahead_s)
    frame = frame[(frame["at_s"] <= end) & ((frame["at_s"] >= 0) | (ahead_s == 0))]
    frame = frame.sort_values(["engine", "at_s"]).reset_index(drop=True)
    engine, at = trace.engine.array(frame["engine"]), trace.engine.array(frame["at_s"])
    told = trace.engine.array(frame["processing"] + frame["deferred"].fillna(0.0))
    is_joined = (engine[1:] == engine[:-1]) & (at[1:] - at[:-1] <= GAP_S)
    until = xp.where(is_joined, at[1:], at[:-1])
    between = (engine[:-1], at[:-1], until)
    line = Timeline(xp, {"system": (held.engine, held.sent, held.ended), "samples": between})
    counted_s = line.within(line.level("system"), *between)
    counted = count_overlaps(xp, (engine, at, at), (held.engine, held.sent, held.ended))
    told_s = (told[1:] + told[:-1]) / 2 * (until - at[:-1])
    by_interval = (sums(xp, engine[:-1], each, found) for each in (until - at[:-1], told_s, counted_s))
    by_sample = (sums(xp, engine, each, found) for each in (told, counted * 1.0, told * 0.0 + 1.0))
    return InSystem(*by_interval, *by_sample)


def least_missing(trace: Trace, held: Held, enough: float) -> Array:
    """By engine, the share of what its server told that attempts do not make up for, if clocks may be `CLOCKS_S` apart.

    The smallest over all of them, and over both ways to count: of moments and of the time between; others are not
    looked at once none is above `enough`.
    """
    xp, least = trace.engine.xp, trace.engine.xp.full(len(trace.names.engine), 1.0)
    for ahead_s in CLOCKS_S:
        one = in_system(trace, held, ahead_s)
        for told, counted in ((one.told_s, one.counted_s), (one.told, one.counted)):
            least = xp.minimum(least, xp.where(told > 0, (told - counted) / xp.maximum(told, 1e-9), 0.0))
        if not bool((least > enough).any()):
            break
    return least
