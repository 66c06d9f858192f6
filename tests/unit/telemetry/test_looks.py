"""Looks stay in order of time and do not pile up."""

from math import inf

from lltm_ray.telemetry.looks import Looks


def test_looks_are_found_by_time_however_they_came() -> None:
    looks = Looks()
    for at, busy in ((3.0, 1), (1.0, 2), (2.0, 0), (2.0, 3)):
        looks.add(at, busy)
    assert looks.between(1.0, 2.5) == [(1.0, 2), (2.0, 3)]
    assert looks.last == 3.0
    assert (looks.next_after(2.5, 10.0), looks.next_after(2.5, 0.1)) == (3.0, 2.5)


def test_old_looks_are_dropped() -> None:
    looks = Looks()
    for at in range(5000):
        looks.add(at, 0)
    assert len(looks) == 2400
    looks.forget(4999.0)
    assert looks.between(0.0, inf) == [(4999.0, 0)]
    looks.forget(inf)
    assert looks.last == -inf
