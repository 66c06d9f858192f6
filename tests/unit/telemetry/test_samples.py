"""Counters go on over a server's restart, and what is absent stays absent."""

import pytest

from lltm_ray.telemetry.samples import Samples
from tests.unit.telemetry.rows_made import server_row

SECOND = 1_000_000_000


@pytest.fixture
def samples() -> Samples:
    return Samples()


def look(samples: Samples, at_s: int, tokens: float | None, pid: int = 41) -> None:
    samples.add("servers", [server_row(at_unix_nano=at_s * SECOND, predicted_tokens=tokens, server_pid=pid)])


def test_a_total_is_the_server_own_counter(samples: Samples) -> None:
    look(samples, 1, 200.0)
    assert samples.total("engine-0", "predicted_tokens") == 200.0


@pytest.mark.parametrize("pid", [42, 41])
def test_a_total_goes_on_where_a_restarted_server_begins_again(samples: Samples, pid: int) -> None:
    look(samples, 1, 200.0)
    look(samples, 2, 5.0, pid)
    assert samples.total("engine-0", "predicted_tokens") == 205.0
    look(samples, 3, 7.0, pid)
    assert samples.total("engine-0", "predicted_tokens") == 207.0
    assert samples.rate("engine-0", "predicted_tokens") == pytest.approx(2.0)


def test_a_counter_that_this_build_does_not_tell_is_none(samples: Samples) -> None:
    look(samples, 1, None)
    assert samples.total("engine-0", "predicted_tokens") is None
    look(samples, 2, None)
    assert samples.rate("engine-0", "predicted_tokens") is None


def test_no_rate_is_made_of_one_look_or_of_two_at_one_moment(samples: Samples) -> None:
    look(samples, 1, 10.0)
    assert samples.rate("engine-0", "predicted_tokens") is None
    look(samples, 1, 20.0)
    assert samples.rate("engine-0", "predicted_tokens") is None


def test_a_total_is_kept_for_an_engine_that_comes_back(samples: Samples) -> None:
    look(samples, 1, 10.0)
    look(samples, 2, 1.0, 42)
    samples.forget(60.0)
    assert samples.servers == {}
    look(samples, 61, 2.0, 42)
    assert samples.total("engine-0", "predicted_tokens") == 12.0
