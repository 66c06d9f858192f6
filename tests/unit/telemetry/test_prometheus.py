"""What is scraped is legal, complete, and leads to traces."""

import pytest
from opentelemetry.sdk.resources import Resource
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from lltm_ray.telemetry.hardware import observe_samples
from lltm_ray.telemetry.instruments import Instruments
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.prometheus import PrometheusReader, name_of
from lltm_ray.telemetry.samples import Samples
from tests.unit.telemetry.rows_made import SPAN_ID, TRACE_ID, attempt_row, gpu_row, request_row, server_row


@pytest.fixture
def reader() -> PrometheusReader:
    reader = PrometheusReader()
    instruments = Instruments(Resource({}), next(iter(PROFILES.values())), [reader])
    samples = Samples()
    samples.add("gpus", [gpu_row()])
    samples.add("servers", [server_row()])
    observe_samples(instruments, samples)
    instruments.record(request_row(), [attempt_row()])
    instruments.record(request_row(total_s=3.0), [attempt_row()])
    return reader


@pytest.mark.parametrize(
    ("name", "unit", "expected"),
    [
        ("gen_ai.server.request.duration", "s", "gen_ai_server_request_duration_seconds"),
        ("hw.gpu.memory.usage", "By", "hw_gpu_memory_usage_bytes"),
        ("hw.gpu.utilization", "1", "hw_gpu_utilization_ratio"),
        ("lltm.tokens", "{token}", "lltm_tokens"),
        ("a.seconds", "s", "a_seconds"),
        ("process.thread.count", "{thread}", "process_thread"),
    ],
)
def test_names_spell_their_units(name: str, unit: str, expected: str) -> None:
    assert name_of(name, unit) == expected


def test_the_text_is_read_back_with_the_conventions_bounds(reader: PrometheusReader) -> None:
    families = {family.name: family for family in parse(reader.text().decode())}
    duration = families["gen_ai_server_request_duration_seconds"]
    bounds = [sample.labels["le"] for sample in duration.samples if sample.name.endswith("_bucket")]
    assert bounds[:3] == ["0.01", "0.02", "0.04"]
    assert bounds[-2:] == ["81.92", "+Inf"]
    sums = {sample.name: sample.value for sample in duration.samples if not sample.name.endswith("_bucket")}
    assert sums["gen_ai_server_request_duration_seconds_count"] == 2
    assert sums["gen_ai_server_request_duration_seconds_sum"] == pytest.approx(3.25)


def test_buckets_are_cumulative(reader: PrometheusReader) -> None:
    families = {family.name: family for family in parse(reader.text().decode())}
    samples = families["gen_ai_server_request_duration_seconds"].samples
    counts = [sample.value for sample in samples if sample.name.endswith("_bucket")]
    assert counts == sorted(counts)
    assert counts[-1] == 2


def test_counters_and_gauges_are_what_they_say(reader: PrometheusReader) -> None:
    kinds = {family.name: family.type for family in parse(reader.text().decode())}
    assert kinds["hw_energy_joules"] == "counter"
    assert kinds["llamacpp_predicted_tokens"] == "counter"
    assert kinds["hw_gpu_memory_usage_bytes"] == "gauge"
    assert kinds["lltm_slots_busy"] == "gauge"


def test_exemplars_name_the_trace(reader: PrometheusReader) -> None:
    families = {family.name: family for family in parse_open(reader.text(is_open=True).decode())}
    duration = families["gen_ai_server_request_duration_seconds"]
    exemplars = {sample.labels["le"]: sample.exemplar for sample in duration.samples if sample.exemplar}
    assert {bound: each.value for bound, each in exemplars.items()} == {"0.32": 0.25, "5.12": 3.0}
    assert exemplars["5.12"].labels == {"trace_id": TRACE_ID, "span_id": SPAN_ID}


def test_a_second_scraper_finds_the_exemplars_too(reader: PrometheusReader) -> None:
    first, second = (reader.text(is_open=True) for _ in range(2))
    assert b"# {" in first
    assert first.count(b"# {") == second.count(b"# {")


def test_each_reading_shows_what_came_since() -> None:
    reader = PrometheusReader()
    instruments = Instruments(Resource({}), next(iter(PROFILES.values())), [reader])
    before = reader.text()
    instruments.record(request_row(), [attempt_row()])
    assert b"lltm_tokens_total" not in before
    assert b"lltm_tokens_total" in reader.text()
