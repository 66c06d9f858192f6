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


def test_a_total_goes_on_though_the_old_server_told_nothing_at_its_end(samples: Samples) -> None:
    look(samples, 1, 200.0)
    gone = dict.fromkeys(("prompt_tokens", "prompt_tokens_cached", "prompt_seconds", "predicted_seconds", "decodes"))
    samples.add("servers", [server_row(at_unix_nano=2 * SECOND, predicted_tokens=None, server_pid=41, **gone)])
    assert samples.total("engine-0", "predicted_tokens") is None
    look(samples, 3, 5.0, 42)
    assert samples.total("engine-0", "predicted_tokens") == 205.0


def test_a_server_that_was_silent_for_a_moment_is_not_counted_twice(samples: Samples) -> None:
    look(samples, 1, 200.0)
    gone = dict.fromkeys(("prompt_tokens", "prompt_tokens_cached", "prompt_seconds", "predicted_seconds", "decodes"))
    samples.add("servers", [server_row(at_unix_nano=2 * SECOND, predicted_tokens=None, server_pid=0, **gone)])
    look(samples, 3, 210.0)
    assert samples.total("engine-0", "predicted_tokens") == 210.0


def test_a_total_goes_on_over_a_restart_that_takes_long(samples: Samples) -> None:
    look(samples, 1, 200.0)
    samples.forget(100.0)
    assert samples.total("engine-0", "predicted_tokens") is None
    look(samples, 120, 5.0, 42)
    assert samples.total("engine-0", "predicted_tokens") == 205.0


def test_counters_of_engines_that_never_come_back_are_dropped(samples: Samples) -> None:
    look(samples, 1, 200.0)
    samples.forget(7200.0)
    look(samples, 7200, 5.0, 42)
    assert samples.total("engine-0", "predicted_tokens") == 5.0
    samples.add("servers", [server_row(at_unix_nano=7201 * SECOND, engine=f"e{each}") for each in range(10_050)])
    samples.forget(7201.0)
    assert len(samples._counters) == 10_000


def test_what_is_asked_of_an_engine_that_is_gone_is_none(samples: Samples) -> None:
    assert samples.total("nobody", "predicted_tokens") is None
    assert samples.rate("nobody", "predicted_tokens") is None
