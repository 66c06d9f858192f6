"""Whose spans are exported."""

import random

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.telemetry.context import new_span_id, new_trace_id
from lltm_ray.telemetry.rows import SpanRow
from lltm_ray.telemetry.sampling import Sampler, Share, Slowest, read_share
from tests.unit.telemetry.rows_made import request_row

NEVER, ALWAYS = "0" * 32, "f" * 32


def span_row(trace_id=NEVER, error_type=""):
    return SpanRow(trace_id, new_span_id(), "", "load", "internal", 1, 2, error_type, "", "engine-0", "")


@pytest.mark.parametrize("changes", [{"status": 503}, {"status": 429}, {"error_type": "timeout"}])
def test_every_error_is_kept_whatever_the_share(changes):
    assert Sampler(0.0, 0.0).decide(request_row(trace_id=NEVER, **changes)) == "error"


def test_the_share_is_chosen_by_trace_id_alone():
    ids = [new_trace_id() for _ in range(4000)]
    kept = {each for each in ids if Sampler(0.25, 0.0).decide(request_row(trace_id=each))}
    assert kept == {each for each in ids if Sampler(0.25, 0.0).decide(request_row(trace_id=each, total_s=9.0))}
    assert 0.22 < len(kept) / len(ids) < 0.28
    more = {each for each in ids if Sampler(0.5, 0.0).decide(request_row(trace_id=each))}
    assert kept < more


def test_randomness_is_the_lowest_56_bits():
    half = Sampler(0.5, 0.0)
    assert half.decide(request_row(trace_id="0" * 18 + "80000000000000")) == "share"
    assert half.decide(request_row(trace_id="f" * 18 + "7fffffffffffff")) == ""


@pytest.mark.parametrize(("ratio", "trace_id", "why"), [(1.0, NEVER, "share"), (0.0, ALWAYS, "")])
def test_all_and_none_are_exact(ratio, trace_id, why):
    assert Sampler(ratio, 0.0).decide(request_row(trace_id=trace_id)) == why


def test_about_the_slowest_percent_of_each_model_is_kept_whatever_the_other_models_do():
    draw, sampler = random.Random(3), Sampler(0.0, 0.01)
    kept = {"fast": 0, "slow": 0}
    for _ in range(10_000):
        for model, scale in (("fast", 0.01), ("slow", 10.0)):
            row = request_row(trace_id=NEVER, model=model, total_s=scale * draw.expovariate(1))
            kept[model] += sampler.decide(row) == "slow"
    assert 70 <= kept["fast"] <= 140
    assert 70 <= kept["slow"] <= 140


def test_the_quantile_follows_a_load_that_changes():
    slowest, draw = Slowest(0.1), random.Random(5)
    for _ in range(1000):
        slowest.is_slow(draw.uniform(0, 1))
    assert sum(slowest.is_slow(draw.uniform(10, 11)) for _ in range(100)) == 100
    for _ in range(1000):
        slowest.is_slow(draw.uniform(10, 11))
    assert sum(slowest.is_slow(draw.uniform(10, 11)) for _ in range(1000)) < 150


def test_a_constant_load_has_no_slowest_ones():
    slowest = Slowest(0.01)
    assert not any(slowest.is_slow(1.0) for _ in range(3000))


def test_a_request_whose_caller_does_not_record_is_left_out_unless_configured():
    unsampled = request_row(flags=2, parent_span_id="00f067aa0ba902b7", status=500)
    assert Sampler().decide(unsampled) == ""
    assert Sampler(keep_unsampled=True).decide(unsampled) == "error"
    assert Sampler().decide(unsampled._replace(parent_span_id="")) == "error"


def test_other_spans_follow_their_request_or_their_own_error_or_the_share():
    sampler, trace_id = Sampler(0.0, 0.0), "1" * 32
    assert sampler.decide_span(span_row(trace_id)) == ""
    sampler.decide(request_row(trace_id=trace_id, status=500))
    assert sampler.decide_span(span_row(trace_id)) == "trace"
    assert sampler.decide_span(span_row(error_type="OSError")) == "error"
    assert Sampler(1.0).decide_span(span_row()) == "share"


@pytest.mark.parametrize(
    ("sampler", "argument", "share"),
    [
        ("", "0.2", Share()),
        ("always_on", "", Share(1.0, keep_unsampled=True)),
        ("always_off", "", Share(0.0)),
        ("traceidratio", "0.25", Share(0.25, keep_unsampled=True)),
        ("traceidratio", "", Share(1.0, keep_unsampled=True)),
        ("parentbased_always_on", "", Share(1.0, keep_sampled=True)),
        ("parentbased_always_off", "", Share(0.0, keep_sampled=True)),
        (" ParentBased_TraceIdRatio ", " 0.5 ", Share(0.5, keep_sampled=True)),
    ],
)
def test_the_environment_names_the_share_as_opentelemetry_does(sampler, argument, share):
    assert read_share({"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}) == share


@pytest.mark.parametrize(
    ("sampler", "argument", "field"),
    [
        ("jaeger_remote", "", "OTEL_TRACES_SAMPLER"),
        ("parentbased_xray", "", "OTEL_TRACES_SAMPLER"),
        ("traceidratio", "1.5", "OTEL_TRACES_SAMPLER_ARG"),
        ("traceidratio", "nan", "OTEL_TRACES_SAMPLER_ARG"),
        ("parentbased_traceidratio", "half", "OTEL_TRACES_SAMPLER_ARG"),
    ],
)
def test_a_sampler_that_is_not_ours_is_refused_by_the_name_of_its_variable(sampler, argument, field):
    with pytest.raises(ConfigError) as caught:
        read_share({"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert caught.value.field == field


def test_what_a_caller_records_is_exported_whole_where_the_share_is_its_callers():
    sampler = Sampler(0.0, 0.0, keep_sampled=True)
    called = request_row(trace_id="1" * 32, parent_span_id="00f067aa0ba902b7", flags=1)
    assert sampler.decide(called) == "share"
    assert sampler.decide_span(span_row(called.trace_id)) == "trace"
    assert sampler.decide(called._replace(flags=0)) == ""
    assert sampler.decide(called._replace(parent_span_id="")) == ""
