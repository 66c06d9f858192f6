"""Waits of M/M/c queues: Poisson arrivals, exponential service, c servers, first come first served.

Source: A. K. Erlang, 1917; D. Gross, J. F. Shortle, J. M. Thompson, C. M. Harris: Fundamentals of Queueing Theory,
4th ed., 2008, sections 2.3 and 2.4.
"""

from __future__ import annotations

import math

KNEE_UTILIZATION = 0.8
"""Highest utilization to plan for: that of an M/M/c queue of many slots hardly waits there yet, but conversations come
in bursts, and slots slow each other down."""


def waiting_probability(load: float, servers: int) -> float:
    """Erlang's C formula: the share of arrivals of an M/M/c queue that wait.

    By the recursion of his B formula, which does not overflow.

    Args:
        load: arrivals a second times the mean service time.
        servers: at least 1.
    """
    if load >= servers:
        return 1.0
    blocked = 1.0
    for each in range(1, servers + 1):
        blocked = load * blocked / (each + load * blocked)
    return blocked / (1.0 - load / servers * (1.0 - blocked))


def expected_wait(arrivals_per_s: float, service_s: float, servers: int) -> float:
    """Mean wait in an M/M/c queue, seconds; infinite where more arrives than is served, NaN where it is not known."""
    if not (arrivals_per_s >= 0 and service_s >= 0 and servers >= 1):
        return math.nan
    load = arrivals_per_s * service_s
    if load >= servers:
        return math.inf
    return waiting_probability(load, servers) * service_s / (servers - load)


def knee(service_s: float, servers: int) -> float:
    """Arrivals a second to plan for: where M/M/c waits would double the latency, at most `KNEE_UTILIZATION`.

    The first binds for up to three slots: there, waits are as long as the service before 80 % are held.
    """
    if not (service_s > 0 and servers >= 1):
        return math.nan
    low, high = 0.0, KNEE_UTILIZATION
    if expected_wait(high * servers / service_s, service_s, servers) > service_s:
        for _ in range(50):
            middle = (low + high) / 2
            is_low = expected_wait(middle * servers / service_s, service_s, servers) <= service_s
            low, high = (middle, high) if is_low else (low, middle)
    return high * servers / service_s


def slots_for(arrivals_per_s: float, service_s: float, headroom_ratio: float) -> int:
    """The fewest slots whose knee is by `headroom_ratio` above the arrivals."""
    wanted = arrivals_per_s * (1 + headroom_ratio)
    slots = max(math.ceil(wanted * service_s), 1)
    while knee(service_s, slots) < wanted * (1 - 1e-9):
        slots += 1
    return slots
