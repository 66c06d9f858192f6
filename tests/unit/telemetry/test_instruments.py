"""Metrics as they go out on the wire: names, bounds, labels, sums and exemplars."""

import math
from collections import Counter

import pytest
from opentelemetry import metrics
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import Histogram, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.instruments import METRICS, Instruments
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.spans import Spans
from tests.unit.telemetry import requests_made as made
from tests.unit.telemetry.rows_made import SPAN_ID, TRACE_ID, attempt_row, request_row
from tests.unit.telemetry.wire import points_of

DURATIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
SERVER = {
    "gen_ai.server.request.duration": DURATIONS,
    "gen_ai.server.time_to_first_token": TTFT,
    "gen_ai.server.time_per_output_token": TPOT,
    "lltm.queue.duration": (*TTFT, 30.0, 60.0, 120.0),
    "lltm.reuse.error": TOKENS,
}
CLIENT = {
    "1.41": {
        "gen_ai.client.operation.duration": DURATIONS,
        "gen_ai.client.operation.time_to_first_chunk": DURATIONS,
        "gen_ai.client.token.usage": TOKENS,
    },
    "genai-dev": {
        "gen_ai.client.inference.duration": DURATIONS,
        "gen_ai.client.inference.time_to_first_chunk": DURATIONS,
        "gen_ai.client.inference.operation.input_tokens": TOKENS,
        "gen_ai.client.inference.operation.output_tokens": TOKENS,
        "gen_ai.client.embeddings.duration": DURATIONS,
        "gen_ai.client.embeddings.operation.input_tokens": TOKENS,
        "gen_ai.client.operation.duration": DURATIONS,
    },
}


class Meter:
    """Instruments with a reader in memory."""

    def __init__(self, profile="1.41", **options):
        self.reader = InMemoryMetricReader(**options)
        self.instruments = Instruments(Resource({"service.name": "test"}), PROFILES[profile], [self.reader])

    def record(self, *makers):
        for make in makers:
            self.instruments.record(*make())
        return self

    def points(self):
        return points_of(self.reader)

    def sums(self, name, *labels):
        """A counter's sums by the values of some labels."""
        sums = Counter()
        for point in self.points().get(name, []):
            sums[tuple(point["attributes"].get(label) for label in labels)] += point["value"]
        return sums


@pytest.fixture
def make_meter():
    meters = []

    def make(*args, **options):
        meters.append(Meter(*args, **options))
        return meters[-1]

    yield make
    for meter in meters:
        meter.instruments.close()


@pytest.mark.parametrize("profile", PROFILES)
def test_every_histogram_has_the_conventions_bounds_on_the_wire(make_meter, profile):
    points = make_meter(profile).record(*made.REQUESTS).points()
    bounds = {name: told[0]["bounds"] for name, told in points.items() if "bounds" in told[0]}
    assert bounds == SERVER | CLIENT[profile]


def test_a_request_lands_in_the_right_buckets(make_meter):
    points = make_meter().record(made.chat).points()
    sums = {name: (told[0]["count"], told[0]["sum"]) for name, told in points.items() if "bounds" in told[0]}
    usage = {point["attributes"][names.TOKEN_TYPE]: point["sum"] for point in points["gen_ai.client.token.usage"]}
    assert sums["gen_ai.server.request.duration"] == (1, 0.25)
    assert sums["gen_ai.server.time_to_first_token"] == (1, 0.05)
    assert sums["gen_ai.server.time_per_output_token"] == (1, pytest.approx(0.190 / 9))
    assert sums["gen_ai.client.operation.duration"] == (1, pytest.approx(0.238))
    assert sums["gen_ai.client.operation.time_to_first_chunk"] == (1, pytest.approx(0.039))
    assert sums["lltm.queue.duration"] == (1, pytest.approx(0.02))
    assert usage == {"input": 40, "output": 10}
    (ttft,) = points["gen_ai.server.time_to_first_token"]
    assert ttft["buckets"].index(1) == TTFT.index(0.06)


def test_labels_are_the_operation_the_model_the_engine_and_the_class_of_error(make_meter):
    points = make_meter().record(made.chat, made.cancelled).points()
    base = {names.OPERATION_NAME: "chat", names.PROVIDER_NAME: "llama_cpp", names.REQUEST_MODEL: "tiny"}
    requests = [point["attributes"] for point in points["gen_ai.server.request.duration"]]
    attempts = [point["attributes"] for point in points["gen_ai.client.operation.duration"]]
    assert requests == [base, base | {names.ERROR_TYPE: "client_gone"}]
    assert attempts == [each | {names.ENGINE: "engine-0"} for each in requests]
    assert "blue" not in str(points)


def test_exemplars_carry_the_requests_ids_for_callers_that_record_only(make_meter):
    meter = make_meter().record(made.chat)
    points = meter.points()
    for name in SERVER | CLIENT["1.41"]:
        assert points[name][0]["exemplars"] == [(TRACE_ID, SPAN_ID)], name
    meter.instruments.record(request_row(flags=0), [attempt_row()])
    (point,) = meter.points()["gen_ai.server.request.duration"]
    assert (point["count"], point["exemplars"]) == (2, [])


def test_exemplars_point_at_traces_that_are_kept_whatever_the_caller_said(make_meter):
    meter, row, attempts = make_meter(), *made.chat()
    meter.instruments.record(row, attempts, [])
    assert meter.points()["gen_ai.server.request.duration"][0]["exemplars"] == []
    unsampled = row._replace(flags=0)
    meter.instruments.record(unsampled, attempts, Spans(PROFILES["1.41"]).of_request(unsampled, attempts, {}))
    assert meter.points()["gen_ai.server.request.duration"][0]["exemplars"] == [(TRACE_ID, SPAN_ID)]


def test_tokens_are_counted_by_type_per_engine_with_what_was_wasted_drafted_and_foreseen(make_meter):
    meter = make_meter().record(made.chat, made.cancelled)
    typed = meter.sums("lltm.tokens", names.TOKEN_TYPE, names.ENGINE)
    assert typed == {("input", "engine-0"): 80, ("cached", "engine-0"): 64, ("output", "engine-0"): 19}
    assert {each.name: meter.sums(each.name)[()] for each in METRICS if each.kind == "counter"} == {
        "lltm.requests.rejected": 0,
        "lltm.errors": 1,
        "lltm.failovers": 0,
        "lltm.tokens": 163,
        "lltm.fleet.tokens": 163,
        "lltm.tokens.wasted": 2,
        "lltm.reuse.predicted_tokens": 60,
        "lltm.reuse.actual_tokens": 64,
        "lltm.speculative.drafted": 8,
        "lltm.speculative.accepted": 6,
    }


@pytest.mark.parametrize(("predicted", "direction", "missed"), [(30, "under", 2), (40, "over", 8), (32, "exact", 0)])
def test_a_wrong_prediction_of_reuse_says_which_way_and_how_far(make_meter, predicted, direction, missed):
    meter = make_meter()
    meter.instruments.record(request_row(), [attempt_row(predicted_cached_tokens=predicted)])
    (point,) = meter.points()["lltm.reuse.error"]
    assert (point["attributes"][names.REUSE_DIRECTION], point["sum"]) == (direction, missed)


def test_rejections_errors_and_failovers_are_counted_with_their_reasons(make_meter):
    meter = make_meter().record(made.rejected, made.rejected, made.failed, made.failed_over)
    reasons = {("overloaded_error",): 2}
    assert meter.sums("lltm.requests.rejected", names.REJECT_REASON) == reasons
    assert meter.sums("lltm.errors", names.ERROR_TYPE) == reasons | {("engine_not_ready_error",): 1}
    assert meter.sums("lltm.failovers", names.ATTEMPT_CONTINUED) == {(True,): 1}
    durations = meter.points()["gen_ai.client.operation.duration"]
    told = [(point["attributes"][names.ENGINE], point["attributes"].get(names.ERROR_TYPE)) for point in durations]
    assert told == [("engine-0", "engine_not_ready_error"), ("engine-0", "continued"), ("engine-1", None)]


def test_a_whole_answer_has_the_times_that_its_server_told_or_none(make_meter):
    never = float("nan")
    whole = {"first_s": never, "headers_s": 20.0, "ended_s": 20.0}
    row = request_row(is_stream=False, ttft_s=20.0, total_s=20.0)
    untold = attempt_row(**whole, prompt_ms=never, predicted_ms=never)
    points = make_meter().record(lambda: (row, [untold])).points()
    assert not {"gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token"} & set(points)
    timed = attempt_row(**whole, prompt_ms=100.0, predicted_ms=900.0)
    points = make_meter().record(lambda: (row, [timed])).points()
    assert points["gen_ai.server.time_to_first_token"][0]["sum"] == pytest.approx(19.1)
    assert points["gen_ai.server.time_per_output_token"][0]["sum"] == pytest.approx(0.1)


def test_times_per_token_are_of_good_answers_only(make_meter):
    points = make_meter().record(made.cancelled, made.failed, made.embeddings).points()
    assert not {"gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token"} & set(points)
    assert "gen_ai.server.request.duration" in points


def test_the_newest_conventions_count_usage_by_counters_with_a_modality(make_meter):
    meter = make_meter("genai-dev").record(made.chat, made.text)
    usage = "gen_ai.client.inference.usage."
    by = (names.OPERATION_NAME, names.TOKEN_MODALITY)
    for name, count in {"input_tokens": 40, "output_tokens": 10, "cache_read.input_tokens": 32}.items():
        assert meter.sums(usage + name, *by) == {("chat", "unknown"): count, ("text_completion", "unknown"): count}
    assert meter.sums(usage + "cache_write.input_tokens") == {(): 16}
    assert "gen_ai.client.token.usage" not in meter.points()


def test_models_nobody_serves_and_errors_without_number_make_no_labels_without_number(make_meter):
    meter = make_meter()
    meter.instruments.record(request_row(model="", model_asked="x" * 99, error_type="e0", status=404), [])
    for i in range(1000):
        meter.instruments.record(request_row(model=f"m{i}", error_type=f"e{i}"), [])
    points = meter.points()["gen_ai.server.request.duration"]
    assert sum(point["count"] for point in points) == 1001
    assert len({point["attributes"][names.REQUEST_MODEL] for point in points}) == 256
    assert points[0]["attributes"][names.REQUEST_MODEL] == "_other"
    assert "_other" in {point["attributes"][names.ERROR_TYPE] for point in points}
    assert "xxx" not in str(points)


def test_a_route_that_asks_no_model_is_not_measured(make_meter):
    meter = make_meter()
    meter.instruments.record(request_row(route="/health", ttft_s=math.nan), [])
    assert meter.points() == {}


@pytest.mark.parametrize("kind", ["gauge", "counter", "up_down_counter"])
def test_a_metric_may_be_asked_for_when_it_is_read(make_meter, kind):
    meter, latest = make_meter(), [70.0]
    meter.instruments.observe("hw.power", kind, "W", "Power", lambda _: [Observation(each) for each in latest])
    assert [point["value"] for point in meter.points()["hw.power"]] == [70.0]
    latest.clear()
    assert "hw.power" not in meter.points()


def test_an_unknown_kind_of_metric_is_refused(make_meter):
    with pytest.raises(ValueError, match="kind='meter': must be one of gauge, counter, up_down_counter"):
        make_meter().instruments.observe("x", "meter", "1", "X", lambda _: [])


def test_a_reader_that_wants_deltas_gets_them_of_our_sums_too(make_meter):
    delta = dict.fromkeys((Histogram, ObservableCounter), AggregationTemporality.DELTA)
    meter = make_meter(preferred_temporality=delta).record(made.chat)
    assert meter.sums("lltm.tokens", names.TOKEN_TYPE)[("output",)] == 10
    meter.record(made.chat, made.chat)
    assert meter.sums("lltm.tokens", names.TOKEN_TYPE)[("output",)] == 20


def test_the_global_meter_provider_is_left_alone(make_meter):
    before = metrics.get_meter_provider()
    make_meter().record(made.chat)
    assert metrics.get_meter_provider() is before
