"""A fleet that scales up and down: what engines leave behind in the metrics ends, and what is the fleet's does not."""

import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from prometheus_client.parser import text_string_to_metric_families as parse

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry import exporters
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.context import new_span_id
from lltm_ray.telemetry.instruments import Instruments
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.prometheus import PrometheusReader
from lltm_ray.telemetry.roll import GONE_AFTER_S
from lltm_ray.telemetry.service import TelemetryService
from lltm_ray.telemetry.spans import Place
from tests.unit.telemetry.rows_made import attempt_row, request_row

PLACE = Place("127.0.0.1", 8081, (), "n1", "tiny")


class Clock:
    """Stands still, however long a test takes, until it is put ahead."""

    def __init__(self) -> None:
        self.began_s = time.time()
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self.began_s + self.ahead_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Iterator[TelemetryService]:
    service = TelemetryService(TelemetryConfig(exporters=()), None, clock=clock)
    yield service
    service.close()


def serve(service: TelemetryService, engine: str, **changes: object) -> None:
    row = request_row(arrived_unix_nano=time.time_ns() - 10**9, span_id=new_span_id())
    attempt = attempt_row(engine=engine, request_span_id=row.span_id, **changes)
    service.put("gateway-0", {"requests": pack("requests", [row]), "attempts": pack("attempts", [attempt])}, {})


def series(service: TelemetryService) -> dict[tuple[str, str, str, str], float]:
    """(sample's name, engine, type of token, bound) -> value, of metrics of requests."""
    return {
        (each.name, *(each.labels.get(label, "") for label in ("lltm_engine", "gen_ai_token_type", "le"))): each.value
        for family in parse(service.metrics().decode())
        if family.name.startswith(("gen_ai_", "lltm_tokens", "lltm_fleet_tokens", "lltm_reuse"))
        for each in family.samples
    }


def test_series_of_an_engine_end_some_time_after_it_and_the_fleets_do_not_fall(
    service: TelemetryService, clock: Clock
) -> None:
    service.place({"engine-0": PLACE, "engine-1": PLACE})
    for engine in ("engine-0", "engine-1", "engine-1"):
        serve(service, engine)
    service.place({"engine-1": PLACE})
    before = series(service)
    clock.ahead_s = GONE_AFTER_S - 5
    assert series(service) == before
    clock.ahead_s = GONE_AFTER_S + 5
    service.metrics()
    after = series(service)
    assert {engine for _, engine, _, _ in before} == {"", "engine-0", "engine-1"}
    assert after == {key: value for key, value in before.items() if key[1] != "engine-0"}
    assert after["lltm_fleet_tokens_total", "", "output", ""] == 30
    assert "engine-0" not in service.metrics(is_open=True).decode()


def test_an_engine_that_idles_keeps_its_series_and_one_that_comes_back_begins_anew(
    service: TelemetryService, clock: Clock
) -> None:
    service.place({"engine-0": PLACE})
    serve(service, "engine-0")
    clock.ahead_s = 3 * GONE_AFTER_S
    assert series(service)["lltm_tokens_total", "engine-0", "output", ""] == 10
    service.place({})
    clock.ahead_s = 5 * GONE_AFTER_S
    service.metrics()
    assert not [key for key in series(service) if key[1]]
    serve(service, "engine-0")
    again = series(service)
    assert again["lltm_tokens_total", "engine-0", "output", ""] == 10
    assert again["gen_ai_client_operation_duration_seconds_count", "engine-0", "", ""] == 1
    assert again["lltm_fleet_tokens_total", "", "output", ""] == 20


def test_before_the_fleets_table_is_known_nobody_is_gone(service: TelemetryService, clock: Clock) -> None:
    serve(service, "engine-0")
    clock.ahead_s = 3 * GONE_AFTER_S
    service.metrics()
    assert series(service)["lltm_tokens_total", "engine-0", "output", ""] == 10


def test_the_newest_engine_has_series_of_its_own_though_thousands_went_before_and_nobody_scraped() -> None:
    reader = PrometheusReader()
    instruments = Instruments(Resource({}), PROFILES["1.41"], [reader])
    for number in range(2100):
        instruments.record(request_row(), [attempt_row(engine=f"engine-{number}")])
        gone = frozenset({f"engine-{number - 1}"})
        instruments.forget(gone)
        if number % 100 == 99:
            reader.forget(frozenset(f"engine-{each}" for each in range(number)))
    text = reader.text().decode()
    assert "overflow" not in text
    engines = {
        each.labels["lltm_engine"] for family in parse(text) for each in family.samples if "lltm_engine" in each.labels
    }
    assert engines == {"engine-2099"}
    assert 'lltm_fleet_tokens_total{gen_ai_operation_name="chat",gen_ai_provider_name="llama_cpp"' in text


class Collector(MetricExporter):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[MetricsData] = []

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_: object) -> MetricExportResult:
        self.got.append(metrics_data)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **_: object) -> None:
        """Nothing is held."""


def points(data: MetricsData) -> dict[tuple[str, str], tuple[object, ...]]:
    """(metric, engine) -> the histogram's figures."""
    metrics = [
        metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
    ]
    return {
        (metric.name, (point.attributes or {}).get("lltm.engine", "")): (
            *(point.count, point.sum, tuple(point.bucket_counts), point.min, point.max, point.attributes),
            metric.data.aggregation_temporality,
        )
        for metric in metrics
        for point in metric.data.data_points
        if hasattr(point, "bucket_counts")
    }


def test_a_collector_gets_the_same_sums_as_from_the_sdk_and_a_gone_engine_a_last_time() -> None:
    collector, theirs = Collector(), InMemoryMetricReader()
    wrapped = exporters._Metrics("mine", collector)
    ours = exporters.PeriodicExportingMetricReader(wrapped, export_interval_millis=1e9)
    instruments = Instruments(Resource({}), PROFILES["1.41"], [ours, theirs])
    for number, engine in enumerate(("engine-0", "engine-1", "engine-0")):
        total_s = 0.2 + 0.3 * number
        instruments.record(request_row(total_s=total_s), [attempt_row(engine=engine, ended_s=total_s)])
        ours.collect()
        assert points(collector.got[-1]) == points(theirs.get_metrics_data())
    starts = [point.start_time_unix_nano for point in durations(collector.got[-1])]
    ours.collect()
    assert points(collector.got[-1]) == points(collector.got[-2])
    assert [point.start_time_unix_nano for point in durations(collector.got[-1])] == starts
    assert min(point.time_unix_nano for point in durations(collector.got[-1])) > max(starts)
    wrapped.forget({"engine-0"})
    ours.collect()
    assert {engine for _, engine in points(collector.got[-1])} == {"", "engine-0", "engine-1"}
    ours.collect()
    assert {engine for _, engine in points(collector.got[-1])} == {"", "engine-1"}
    instruments.close()


def durations(data: MetricsData) -> list[object]:
    (scope,) = data.resource_metrics[0].scope_metrics
    return [point for metric in scope.metrics if metric.name.endswith("duration") for point in metric.data.data_points]
