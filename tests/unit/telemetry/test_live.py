"""What the live page shows is what the rows say."""

import json
import math
from collections.abc import Callable

import pyarrow as pa
import pytest

from lltm_ray.telemetry import semconv, summarize
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.live import HISTORY_S, Live
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.rows import AttemptRow, RequestRow
from lltm_ray.telemetry.samples import Samples
from lltm_ray.telemetry.spans import Spans
from tests.unit.telemetry import requests_made as made
from tests.unit.telemetry.rows_made import attempt_row, gpu_row, node_row, queue_row, request_row, server_row, slot_row

NOW_S = 1_700_000_010.0
SECOND = 1_000_000_000


class Clock:
    now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def at(seconds_ago: float) -> int:
    return int((NOW_S - seconds_ago) * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def samples() -> Samples:
    return Samples()


@pytest.fixture
def live(samples: Samples, clock: Clock) -> Live:
    return Live(samples, clock)


def add(live: Live, number: int, *, ago_s: float = 2.0, **changes: object) -> None:
    row = request_row(request_id=f"r-{number}", arrived_unix_nano=at(ago_s), **changes)
    live.add_request(row, [attempt_row()])


def test_nothing_yet_is_told_as_nothing_and_not_as_zero_latency(live: Live) -> None:
    look = live.look()
    assert look["latency_s"] == {"p50": None, "p95": None, "p99": None}
    assert look["reuse_ratio"] is None
    assert (look["engines"], look["gpus"], look["recent"]) == ([], [], [])


def test_a_look_is_json(live: Live, samples: Samples) -> None:
    add(live, 1, ttft_s=math.nan)
    samples.add("servers", [server_row(at_unix_nano=at(1))])
    samples.add("gpus", [gpu_row(at_unix_nano=at(1))])
    assert json.loads(json.dumps(live.look(), allow_nan=False))["recent"][0]["ttft_s"] is None


def test_totals_count_every_request_and_window_forgets_old_ones(live: Live, clock: Clock) -> None:
    add(live, 1, status=429, error_type="429", delivered_tokens=0)
    add(live, 2)
    look = live.look()
    assert look["totals"] | {"requests": 2, "errors": 1, "rejected": 1, "output_tokens": 10} == look["totals"]
    assert look["errors"] == {"429": 1}
    clock.now_s += 61
    later = live.look()
    assert later["totals"] == look["totals"]
    assert later["latency_s"]["p50"] is None


def test_percentiles_are_of_requests_that_did_not_fail(live: Live) -> None:
    for number in range(1, 101):
        add(live, number, total_s=number / 100)
    add(live, 101, total_s=9.0, error_type="timeout")
    look = live.look()["latency_s"]
    assert look["p50"] == pytest.approx(0.505)
    assert look["p99"] == pytest.approx(0.9901)


def test_rates_are_means_over_whole_seconds(live: Live) -> None:
    for number in range(20):
        add(live, number, ago_s=3.0, total_s=0.5)
    rates = live.look()["rates"]
    assert rates["requests_s"] == pytest.approx(2.0)
    assert rates["output_tokens_s"] == pytest.approx(20.0)


def test_history_has_a_place_for_each_second(live: Live) -> None:
    add(live, 1, ago_s=5.0, total_s=0.0)
    history = live.look()["history"]
    assert {len(series) for series in history.values()} == {HISTORY_S}
    assert history["requests"][-5] == 1
    assert sum(history["requests"]) == 1


def test_reuse_is_cached_tokens_over_prompt_tokens(live: Live) -> None:
    add(live, 1)
    assert live.look()["reuse_ratio"] == pytest.approx(32 / 40)


def test_rates_of_a_server_come_from_its_counters_and_not_across_a_restart(live: Live, samples: Samples) -> None:
    samples.add("servers", [server_row(at_unix_nano=at(3))])
    samples.add("servers", [server_row(at_unix_nano=at(1), predicted_tokens=300.0, cpu_s=4.0)])
    engine = live.look()["engines"][0]
    assert engine["predicted_tokens_s"] == pytest.approx(50.0)
    assert engine["cpu_ratio"] == pytest.approx(0.5)
    samples.add("servers", [server_row(at_unix_nano=at(0), predicted_tokens=5.0, server_pid=42)])
    assert live.look()["engines"][0]["predicted_tokens_s"] is None


def test_a_slot_shows_whose_tokens_it_holds(live: Live, samples: Samples) -> None:
    samples.add("servers", [server_row(at_unix_nano=at(1))])
    samples.add("slots", [slot_row(at_unix_nano=at(1))])
    add(live, 7)
    (slot,) = live.look()["engines"][0]["slots"]
    assert (slot["slot"], slot["prompt_tokens"], slot["request_id"]) == (2, 40, "r-7")


def test_what_is_gone_is_not_shown(live: Live, samples: Samples, clock: Clock) -> None:
    samples.add("servers", [server_row(at_unix_nano=at(1))])
    samples.add("slots", [slot_row(at_unix_nano=at(1))])
    samples.add("gpus", [gpu_row(at_unix_nano=at(1))])
    samples.add("queues", [queue_row(at_unix_nano=at(1))])
    samples.add("nodes", [node_row(at_unix_nano=at(1))])
    names = ("engines", "gpus", "queues", "nodes")
    assert [len(live.look()[name]) for name in names] == [1, 1, 1, 1]
    clock.now_s += 11
    look = live.look()
    assert [len(look[name]) for name in names] == [0, 0, 0, 0]


def test_a_machine_without_gpus_says_why(live: Live, samples: Samples) -> None:
    samples.add("nodes", [node_row(at_unix_nano=at(1))])
    look = live.look()
    assert (look["gpus"], look["nodes"][0]["gpu_reason"]) == ([], "no NVIDIA driver is here")


def test_throttling_is_told_in_words(live: Live, samples: Samples) -> None:
    samples.add("gpus", [gpu_row(at_unix_nano=at(1), throttle=0x1 | 0x4 | 0x40)])
    assert live.look()["gpus"][0]["throttle"] == ["power_cap", "thermal_hardware"]


def test_recent_requests_are_bounded_and_newest_first(live: Live) -> None:
    for number in range(150):
        add(live, number)
    recent = live.look()["recent"]
    assert (len(recent), recent[0]["request_id"]) == (100, "r-149")
    assert recent[0]["queue_s"] == pytest.approx(0.02)


@pytest.mark.parametrize("make", [made.chat, made.plain_chat, made.embeddings, made.failed_over, made.rejected])
def test_the_wait_is_ours_and_llama_servers_as_in_spans_and_summaries(
    live: Live, make: Callable[[], tuple[RequestRow, list[AttemptRow]]]
) -> None:
    row, attempts = make()
    row = row._replace(arrived_unix_nano=at(2))
    live.add_request(row, attempts)
    look = live.look()
    is_asked = any(each.engine for each in attempts)
    server = Spans(PROFILES["1.41"]).of_request(row, attempts, {})[0]
    own = [each._replace(request_span_id=row.span_id) for each in attempts]
    tables = {"requests": pack("requests", [row]), "attempts": pack("attempts", own)}
    (summed,) = summarize({kind: pa.Table.from_batches([some]) for kind, some in tables.items()})["queue_mean_s"]
    waits = [look["recent"][0]["queue_s"], look["queue_s"]["p50"]]
    assert waits == ([pytest.approx(server.attributes[semconv.LATENCY_QUEUE])] * 2 if is_asked else [None, None])
    assert waits[0] == pytest.approx(summed) if is_asked else math.isnan(summed)
