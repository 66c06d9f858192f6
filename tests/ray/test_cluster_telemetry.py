"""`Cluster.telemetry` and watched calls of a driver, against a running fleet."""

import pytest
import ray
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lltm_ray.errors import UpstreamError
from lltm_ray.integrations.jupyter import Dashboard, generate_load
from lltm_ray.telemetry import instrument, timeline_frame, trace, uninstrument
from tests.ray.conftest import HI, post, until

CHAT = "/v1/chat/completions"


@pytest.fixture
def spans():
    exporter, provider, meters = InMemorySpanExporter(), TracerProvider(), MeterProvider([InMemoryMetricReader()])
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrument(provider, meters)
    yield exporter.get_finished_spans
    uninstrument()
    provider.shutdown()
    meters.shutdown()


def row_of(cluster, span):
    """The fleet's own row of what the span's call did, once it is there."""

    def find():
        rows = cluster.telemetry.read_since(0, ["requests"]).tables["requests"].to_pylist()
        return [row for row in rows if row["parent_span_id"] == f"{span.context.span_id:016x}"]

    (row,) = until(find)
    return row


def test_a_request_is_in_the_summary_the_list_the_timeline_and_the_metrics(cluster):
    telemetry = cluster.telemetry
    answer = post(f"{cluster.endpoint}{CHAT}", {"messages": HI, "max_tokens": 5})
    until(lambda: len(telemetry.requests()))
    (newest,) = telemetry.requests(1).to_dict("records")
    assert (newest["route"], newest["output_tokens"]) == (CHAT, 5)
    found = telemetry.timeline(newest["request_id"])
    assert found["request"]["response_id"] == answer["id"]
    assert timeline_frame(found["spans"])["depth"].max() == 2
    assert telemetry.timeline("nothing") is None
    assert 'gen_ai_server_request_duration_seconds_count{gen_ai_operation_name="chat"' in telemetry.metrics()
    assert telemetry.look()["totals"]["requests"] >= 1


def test_a_summary_is_of_all_rows_or_of_the_last_seconds(cluster):
    for _ in range(3):
        post(f"{cluster.endpoint}{CHAT}", {"messages": HI, "max_tokens": 2})

    until(lambda: cluster.telemetry.summary(by=())["requests"].sum() >= 3)
    frame = cluster.telemetry.summary(by=("route", "engine"))
    assert set(frame["engine"]) <= {"engine-0", "engine-1"}
    assert (frame["latency_p50_s"] > 0).all()
    assert cluster.telemetry.summary(window_s=1e-6).empty


def test_a_drivers_call_is_a_client_span_and_the_fleets_row_its_child(cluster, spans):
    with trace("work"):
        done = cluster.chat(HI, max_tokens=3, temperature=0.0)
    chat, work = spans()
    assert chat.parent.span_id == work.context.span_id
    assert chat.attributes["lltm.engine"] == done.engine != ""
    assert chat.attributes["gen_ai.usage.output_tokens"] == 3
    assert "server.address" not in chat.attributes
    row = row_of(cluster, chat)
    assert (row["route"], row["trace_id"]) == (CHAT, f"{chat.context.trace_id:032x}")


def test_a_prompt_is_known_again_whoever_brings_it_a_handle_the_driver_or_the_gateway(cluster):
    messages = [{"role": "user", "content": "The heron stands at dusk. " * 30}]

    def rows(ids):
        found = cluster.telemetry.read_since(0, ["requests"]).tables["requests"].to_pylist()
        return [row for row in found if row["response_id"] in ids]

    def told():
        done = [ray.get(cluster.engines[0].chat.remote(messages, max_tokens=1)), cluster.chat(messages, max_tokens=1)]
        answer = post(f"{cluster.endpoint}{CHAT}", {"messages": messages, "max_tokens": 1})
        ids = {*(each.id for each in done), answer["id"]}
        assert len(ids) == 3
        new = until(lambda: found if len(found := rows(ids)) == 3 else None)
        return {(row["prompt_bytes"], row["prefix"]) for row in new}

    # the fleet's salt is learnt a moment after an engine or a gateway is ready
    same = until(lambda: found if len(found := told()) == 1 else None)
    assert all(prefix for _, prefix in same)


def test_a_batch_is_a_span_for_each_prompt_and_a_stream_one_to_its_end(cluster, spans):
    with trace("work"):
        cluster.batch(["a", HI, "b"], max_tokens=2)
        text = "".join(event.text for event in cluster.stream(HI, max_tokens=4))
    *calls, work = spans()
    assert sorted(span.name for span in calls) == ["chat", "chat", "text_completion", "text_completion"]
    assert {span.parent.span_id for span in calls} == {work.context.span_id}
    stream = calls[-1]
    assert text
    assert stream.attributes["gen_ai.usage.output_tokens"] == 4
    assert stream.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert row_of(cluster, stream)["is_stream"]


def test_a_stream_that_is_left_and_a_call_that_fails_are_told_of(cluster, spans):
    for event in cluster.stream(HI, max_tokens=500):
        if event.text:
            break
    del event
    with pytest.raises(UpstreamError):
        cluster.chat([{"role": "nobody"}], max_tokens=1)
    told = until(lambda: spans() if len(spans()) == 2 else None)
    left, failed = sorted(told, key=lambda span: "error.type" in span.attributes)
    assert left.attributes["lltm.attempt.outcome"] == "client gone"
    assert failed.attributes["error.type"].isdigit()


def test_a_dashboard_of_a_cluster_and_one_of_its_url_show_the_same(cluster):
    load = generate_load(cluster, seconds=1, clients=2, max_tokens=4, prompt_tokens=16)
    result = load.wait(100)
    assert result.ok == result.requests > 0
    until(lambda: cluster.telemetry.look()["totals"]["requests"] >= result.requests)
    counts = ["requests", "errors", "output_tokens", "input_tokens"]

    def the_same():  # the last rows come within a sender's pause, and a gateway's look is up to a second old
        one, other = Dashboard(cluster), Dashboard(cluster.endpoint)
        return one.statistics()[counts].equals(other.statistics()[counts])

    until(the_same)
