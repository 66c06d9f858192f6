"""Summaries of rows as DataFrames, against NumPy and by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry import summarize, timeline_frame
from lltm_ray.telemetry.batch import SCHEMAS, pack
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.rows import NEVER
from lltm_ray.telemetry.spans import Spans
from lltm_ray.telemetry.summary import BY, COLUMNS, TIMELINE_COLUMNS
from tests.unit.telemetry.rows_made import attempt_row, request_row

START = 1_700_000_040_000_000_000  # a minute begins
S = 10**9
SECONDS = st.floats(0.001, 1000, allow_nan=False)


def tables(*pairs):
    """Of requests with their attempts, which get ids of their own."""
    requests, attempts = [], []
    for i, (request, own) in enumerate(pairs):
        ids = {"span_id": f"{i + 1:016x}"}
        requests.append(request._replace(**ids))
        attempts += [each._replace(request_span_id=ids["span_id"]) for each in own]
    return {
        "requests": pa.Table.from_batches([pack("requests", requests)]),
        "attempts": pa.Table.from_batches([pack("attempts", attempts)]),
    }


def ended(seconds, total_s=0.25, **changes):
    """A request that ended so many seconds after the minute began."""
    return request_row(arrived_unix_nano=START + round((seconds - total_s) * S), total_s=total_s, **changes)


@given(st.lists(st.tuples(SECONDS, SECONDS | st.just(NEVER), st.booleans()), min_size=1, max_size=60))
def test_percentiles_are_numpys_of_what_each_is_of(drawn):
    made = tables(
        *(
            (ended(2000, total_s=total_s, ttft_s=ttft_s, error_type="500" if fails else ""), [])
            for total_s, ttft_s, fails in drawn
        )
    )
    (line,) = summarize(made).to_dict("records")
    expected = {
        "latency": [total_s for total_s, _, fails in drawn if not fails],
        "ttft": [ttft_s for _, ttft_s, _ in drawn if not math.isnan(ttft_s)],
        "queue": [],
    }
    for what, values in expected.items():
        for how, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            wanted = np.quantile(values, quantile) if values else NEVER
            assert line[f"{what}_{how}_s"] == pytest.approx(wanted, nan_ok=True)
        assert line[f"{what}_mean_s"] == pytest.approx(np.mean(values) if values else NEVER, nan_ok=True)
        assert line[f"{what}_max_s"] == pytest.approx(max(values, default=NEVER), nan_ok=True)
    assert line["requests"] == len(drawn)
    assert line["error_ratio"] == sum(fails for *_, fails in drawn) / len(drawn)


def test_counts_rates_and_tokens_are_those_of_the_window():
    made = tables(
        (ended(5), [attempt_row()]),  # too old
        (ended(55), [attempt_row(cached_tokens=30, computed_tokens=10, generated_tokens=8)]),
        (ended(60, error_type="500"), [attempt_row(cached_tokens=0, computed_tokens=40, generated_tokens=2)]),
    )
    (line,) = summarize(made, window_s=10).to_dict("records")
    assert (line["requests"], line["errors"], line["error_ratio"], line["requests_s"]) == (2, 1, 0.5, 0.2)
    assert (line["input_tokens"], line["cached_tokens"], line["output_tokens"]) == (80, 30, 10)
    assert (line["output_tokens_s"], line["reuse_ratio"]) == (1.0, 0.375)
    assert line["queue_max_s"] == pytest.approx(0.02)  # asked to sent, sent to headers


def test_a_window_may_end_when_nothing_ends():
    made = tables((ended(5), [attempt_row()]))
    (line,) = summarize(made, by=(), window_s=20, until_unix_s=START / S + 15).to_dict("records")
    assert line["requests_s"] == 0.05
    assert summarize(made, window_s=20, until_unix_s=START / S + 60).empty


def test_a_continued_request_is_the_last_engines_and_counts_its_prompt_once():
    attempts = [
        attempt_row(engine="e0", cached_tokens=0, computed_tokens=40, generated_tokens=5, delivered_tokens=4),
        attempt_row(number=2, engine="e1", slot=1, cached_tokens=40, computed_tokens=4, is_continued=True),
    ]
    (line,) = summarize(tables((ended(1), attempts[::-1])), by=("engine", "slot")).to_dict("records")
    assert (line["engine"], line["slot"]) == ("e1", 1)
    assert (line["input_tokens"], line["cached_tokens"], line["output_tokens"]) == (40, 0, 14)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("model", ["a", "b"]),
        ("engine", ["", "e0"]),
        ("route", ["/v1/chat/completions", "/v1/embeddings"]),
        ("tenant", ["t", "u"]),
        ("slot", [-1, 3]),
    ],
)
def test_requests_are_grouped_by_what_is_asked_for(by, expected):
    made = tables(
        (ended(1, model="a", tenant="u"), []),
        (ended(2, model="b", tenant="t", route="/v1/embeddings"), [attempt_row(engine="e0", slot=3)]),
    )
    frame = summarize(made, by=(by,))
    assert (list(frame[by]), list(frame["requests"])) == (expected, [1, 1])


def test_minutes_are_of_the_end_and_the_first_and_last_count_for_as_long_as_they_were():
    made = tables(*((ended(seconds, total_s=1.0), []) for seconds in (31, 50, 70, 80)))
    frame = summarize(made, by=("minute",))
    assert [minute.value for minute in frame["minute"]] == [START, START + 60 * S]
    assert str(frame["minute"].dt.tz) == "UTC"
    assert list(frame["requests_s"]) == [pytest.approx(2 / 30), pytest.approx(2 / 20)]


@pytest.mark.parametrize("by", [(), ("model",), BY])
@pytest.mark.parametrize("empty", [{}, {kind: SCHEMAS[kind].empty_table() for kind in ("requests", "attempts")}])
def test_nothing_gives_an_empty_frame_with_the_same_columns(by, empty):
    frame = summarize(empty, by=by)
    assert (len(frame), list(frame.columns)) == (0, [*by, *COLUMNS])
    assert list(summarize(tables((ended(1), [])), by=by).columns) == [*by, *COLUMNS]


def test_what_cannot_be_grouped_by_is_refused():
    for wrong in (("gpu",), "model", ("model", "model")):
        with pytest.raises(ConfigError, match="model, engine, route, tenant, slot, minute"):
            summarize({}, by=wrong)
    with pytest.raises(ConfigError, match="window_s"):
        summarize({}, window_s=0)


def test_a_timeline_is_a_table_with_depths():
    spans = Spans(PROFILES["1.41"]).of_request(request_row(), [attempt_row()], {})
    frame = timeline_frame(spans[::-1])
    assert list(frame.columns) == list(TIMELINE_COLUMNS)
    assert list(zip(frame["name"], frame["depth"], strict=True)) == [
        ("chat tiny", 0),
        ("route", 1),
        ("chat tiny", 1),
        ("lltm.queue", 2),
        ("lltm.prefill", 2),
        ("lltm.decode", 2),
    ]
    assert frame["duration_s"][0] == pytest.approx(0.25)
    assert frame["engine"][1] == "engine-0"
    assert timeline_frame([]).empty
