"""The most requests that came to a model, against the load that its slots can take before they wait for each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lltm_ray.analytics.busiest import USUAL, Burst, Stretch, Stretches, densest
from lltm_ray.analytics.saturation import LEAST_REQUESTS
from lltm_ray.analytics.trace import Trace, nanos
from lltm_ray.analytics.turned_away import REFUSED, models_of

_FAILED = 400
"""HTTP status from which a request was not served."""
_WIDEST = 2.5
"""The most that chance may leave open between the low and the high end of a headroom, as a factor."""
_TINY = 1e-12


class Peaks(NamedTuple):
    """When most requests of a model came, and were served."""

    burst: Burst
    burst_waits: tuple[float, float]
    """Of those who came then: the mean, and its 95th percentile."""
    lasting: Stretch
    lasting_waits: tuple[float, float]
    served_per_s: float
    """The most in any stretch that lasts."""
    freely_per_s: float
    """In one in which they waited for less than their service."""


def read_peaks(trace: Trace, model: int, service_s: float) -> Peaks:
    """Of one model.

    Args:
        trace: whose requests.
        model: its code.
        service_s: mean; NaN: not known.
    """
    xp, service_s = trace.engine.xp, 0.0 if math.isnan(service_s) else service_s
    mine = trace.requests.assign(model=models_of(trace))
    mine = mine[mine["model"] == model]
    names = ("arrived_s", "ended_s", "queue_s", "status", "engine")
    arrived, ended, wait, status, engine = (trace.engine.array(mine[name]) for name in names)
    wait, is_served = xp.nan_to_num(wait), (engine >= 0) & (status < _FAILED)
    came = xp.sort(arrived)
    burst = densest(xp, came, trace.length_s, service_s)
    lasting = Stretches(xp, came, trace.length_s, service_s).fullest()

    def waits(part: Burst | Stretch) -> tuple[float, float]:
        then = wait[(arrived >= part.from_s) & (arrived <= part.until_s) & (status != REFUSED)]
        return (float(then.mean()), float(xp.percentile(then, 95))) if len(then) else (math.nan, math.nan)

    order = xp.argsort(ended[is_served])
    done = Stretches(xp, ended[is_served][order], trace.length_s, service_s, is_lasting=True)
    freely = done.fullest(wait[is_served][order], service_s)
    return Peaks(burst, waits(burst), lasting, waits(lasting), done.fullest().per_s, freely.per_s)


class Came(NamedTuple):
    """Requests of a model, those included that gateways refused without a row."""

    per_s: float
    """Over the whole window."""
    number: int


def at_its_densest(trace: Trace, peaks: Peaks, came: Came, knee_per_s: float, error: float) -> dict[str, float]:
    """`queueing`'s columns `busiest_*`, and `headroom_*` to the knee; NaN where one cannot act on them.

    That is where chance leaves more than `_WIDEST` open, unless many requests came and are clearly on one side of the
    knee.

    Args:
        trace: for its time.
        peaks: of a model.
        came: what came to it.
        knee_per_s: at the slots of then; NaN: not known.
        error: standard error of the mean service time over it, and so of the knee.
    """
    burst, most = peaks.burst, max(peaks.burst.per_s, came.per_s)
    low, rate, high = (max(each, _TINY) for each in (burst.low_per_s, burst.per_s, burst.high_per_s))
    share, (less, more) = knee_per_s / max(most, _TINY), (low / rate, high / rate)
    down, up = (math.exp(math.hypot(math.log(each), USUAL * error)) for each in (more, less))
    told = {
        "headroom_ratio": share - 1,
        "headroom_low_ratio": share / down - 1,
        "headroom_high_ratio": share * up - 1,
        "busiest_per_s": most,
        "busiest_low_per_s": most * less,
        "busiest_high_per_s": most * more,
        "busiest_unix_nano": nanos(trace, burst.from_s),
        "busiest_s": burst.until_s - burst.from_s,
        "busiest_wait_s": peaks.burst_waits[0],
        "busiest_wait_p95_s": peaks.burst_waits[1],
    }
    is_sure = (more / less if math.isnan(error) else down * up) <= _WIDEST
    return told if is_sure or _is_clear(told, came) else dict.fromkeys(told, math.nan)


def _is_clear(told: Mapping[str, float], came: Came) -> bool:
    is_one_side = told["headroom_low_ratio"] > 0 or told["headroom_high_ratio"] < 0
    return is_one_side and came.number >= LEAST_REQUESTS


def while_it_lasts(trace: Trace, peaks: Peaks, came: Came, knee_per_s: float) -> dict[str, float]:
    """`queueing`'s columns `lasting_*` of what came; NaN where it is too little, unless it is past the knee still."""
    stretch, most = peaks.lasting, max(peaks.lasting.per_s, came.per_s)
    told = {
        "lasting_per_s": most,
        "lasting_unix_nano": nanos(trace, stretch.from_s),
        "lasting_s": stretch.until_s - stretch.from_s,
        "lasting_wait_s": peaks.lasting_waits[0],
        "lasting_wait_p95_s": peaks.lasting_waits[1],
    }
    is_past = most >= knee_per_s and came.number >= LEAST_REQUESTS
    return told if stretch.is_told or is_past else dict.fromkeys(told, math.nan)
