"""The most requests that came to a model, against the load that its slots can take before they wait for each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lltm_ray.analytics.busiest import USUAL, Burst, Stretch, Stretches, densest
from lltm_ray.analytics.frames import Array
from lltm_ray.analytics.saturation import LEAST_REQUESTS
from lltm_ray.analytics.trace import Trace, nanos
from lltm_ray.analytics.turned_away import REFUSED, models_of

_FAILED = 400
"""HTTP status from which a request was not served."""
_WIDEST = 2.5
"""The most that chance may leave open between the low and the high end of a headroom, as a factor."""
_TINY = 1e-12
_LONG_SERVICES = 10
"""Service times from which a stretch shows what slots serve: one at a time more ends in them than they can do."""


class Knee(NamedTuple):
    """Arrivals a second from which waits grow fast, and between what it is; NaN: not known."""

    low_per_s: float
    per_s: float
    high_per_s: float


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
    """The most that was served while requests waited for less than their service; see `_freely`."""


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

    rows = _Requests(xp, arrived, ended, wait, is_served)
    order = xp.argsort(ended[is_served])
    done = Stretches(xp, ended[is_served][order], trace.length_s, service_s, is_lasting=True)
    freely = max(done.fullest(wait[is_served][order], service_s).per_s, _freely(rows, burst, trace.length_s, service_s))
    served = max(done.fullest().per_s, freely)
    return Peaks(burst, waits(burst), lasting, waits(lasting), served, freely)


class _Requests(NamedTuple):
    """Of one model."""

    xp: Any
    arrived: Array
    ended: Array
    wait: Array
    is_served: Array


def _freely(of: _Requests, burst: Burst, length_s: float, service_s: float) -> float:
    """The most a second that came, or was done, in a stretch that need not last, and did not wait; 0: there is none.

    Of those that came the densest counts where so few waited that no queue can have built up; of those that were done
    the densest where they waited for less than their service on average.
    """
    xp, is_served = of.xp, of.is_served
    came = (of.arrived >= burst.from_s) & (of.arrived <= burst.until_s)
    done = densest(xp, xp.sort(of.ended[is_served]), length_s, _LONG_SERVICES * service_s)
    waited = of.wait[came & is_served], of.wait[is_served & (of.ended >= done.from_s) & (of.ended <= done.until_s)]
    if not (service_s and len(waited[0]) and len(waited[1])):
        return 0.0
    is_long = burst.until_s - burst.from_s >= _LONG_SERVICES * service_s
    has_room = is_long and float(xp.percentile(waited[0], 95)) <= service_s
    had_room = float(waited[1].mean()) <= service_s
    return max(has_room * burst.per_s * float(is_served[came].mean()), had_room * done.per_s)


class Came(NamedTuple):
    """Requests of a model, those included that gateways refused without a row."""

    per_s: float
    """Over the whole window."""
    number: int


def at_its_densest(trace: Trace, peaks: Peaks, came: Came, knee: Knee, error: float) -> dict[str, float]:
    """`queueing`'s columns `busiest_*`, and `headroom_*` to the knee; NaN where one cannot act on them.

    That is where more than `_WIDEST` is open, for `busiest_*` by chance alone, unless many requests came and are
    clearly on one side of the knee.

    Args:
        trace: for its time.
        peaks: of a model.
        came: what came to it.
        knee: at the slots of then.
        error: standard error of the mean service time over it, and so of the knee.
    """
    burst, most = peaks.burst, max(peaks.burst.per_s, came.per_s)
    low, rate, high = (max(each, _TINY) for each in (burst.low_per_s, burst.per_s, burst.high_per_s))
    share, (less, more) = knee.per_s / max(most, _TINY), (low / rate, high / rate)
    down = _joined(more, error, knee.per_s / max(knee.low_per_s, _TINY))
    up = _joined(less, error, knee.high_per_s / max(knee.per_s, _TINY))
    headroom = {
        "headroom_ratio": share - 1,
        "headroom_low_ratio": share / down - 1,
        "headroom_high_ratio": share * up - 1,
    }
    busiest = {
        "busiest_per_s": most,
        "busiest_low_per_s": most * less,
        "busiest_high_per_s": most * more,
        "busiest_unix_nano": nanos(trace, burst.from_s),
        "busiest_s": burst.until_s - burst.from_s,
        "busiest_wait_s": peaks.burst_waits[0],
        "busiest_wait_p95_s": peaks.burst_waits[1],
    }
    is_clear = _is_clear(headroom, came)
    told = {**headroom, **busiest}
    lost = () if is_clear or down * up <= _WIDEST else tuple(headroom)
    lost += () if is_clear or more / less <= _WIDEST else tuple(busiest)
    return told | dict.fromkeys(lost, math.nan)


def _joined(chance: float, error: float, knee: float) -> float:
    """A factor of which three parts know nothing of each other."""
    return math.exp(math.hypot(math.log(chance), USUAL * error, math.log(knee)))


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
