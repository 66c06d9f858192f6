"""Batches in; rows, spans, metrics and figures of its own health out. All parts are real."""

import json
import os
import time

import pyarrow as pa
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.context import new_span_id, new_trace_id
from lltm_ray.telemetry.hub import build_hub
from lltm_ray.telemetry.rows import LogRow, SpanRow
from lltm_ray.telemetry.spans import Place
from tests.unit.telemetry.rows_made import attempt_row, request_row, slot_row


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def make(reader, monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    made = []

    def make(*exporters, folder=None, **options):
        config = TelemetryConfig(exporters=exporters, **options)
        made.append(build_hub(config, folder, {"lltm.fleet": "f"}, [] if made else [reader]))
        return made[-1]

    yield make
    for each in made:
        each.close(timeout_s=5.0)


def request(**changes):
    """A request that ended just now, and its attempt."""
    ids = {"trace_id": new_trace_id()}
    row = request_row(**ids, span_id=new_span_id(), arrived_unix_nano=time.time_ns() - 10**9, **changes)
    return row, attempt_row(**ids, request_span_id=row.span_id, span_id=new_span_id())


def batch(*pairs):
    return {"requests": pack("requests", [a for a, _ in pairs]), "attempts": pack("attempts", [b for _, b in pairs])}


def told(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def measured(reader):
    """Metric's name -> list of (attributes, value or count)."""
    found = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found[metric.name] = [
                    (dict(point.attributes), getattr(point, "value", None) or getattr(point, "count", 0))
                    for point in metric.data.data_points
                ]
    return found


def test_a_request_is_kept_measured_and_exported_as_one_tree(make, reader, capsys):
    hub = make("console")
    hub.places = {"engine-0": Place("10.0.0.1", 4321, ("GPU-1",), "n1", "tiny")}
    row, attempt = request()
    receipt = hub.put("gateway-0", batch((row, attempt)))
    assert receipt.rows == 2
    assert 0.7 < receipt.lag_s < 10
    page = hub.read_since(0, ["requests"])
    assert page.tables["requests"].column("request_id").to_pylist() == ["r-1"]
    assert measured(reader)["gen_ai.server.request.duration"][0][1] == 1
    hub.close()
    spans = told(capsys)
    assert [span["kind"] for span in spans].count("server") == 1
    assert {span["trace_id"] for span in spans} == {row.trace_id}
    client = next(span for span in spans if span["kind"] == "client")
    assert client["attributes"]["server.address"] == "10.0.0.1"
    assert {span["name"] for span in spans} >= {"route", "lltm.queue", "lltm.prefill", "lltm.decode"}


def test_metrics_are_not_sampled_and_spans_are(make, reader, capsys):
    hub = make("console", sample_ratio=0.0, slow_ratio=0.0)
    bad = request(status=503, error_type="503")
    hub.put("gateway-0", batch(*(request() for _ in range(20)), bad))
    assert hub.health.requests == {"no": 20, "error": 1}
    durations = measured(reader)["gen_ai.server.request.duration"]
    assert sum(count for _, count in durations) == 21
    hub.close()
    assert {span["trace_id"] for span in told(capsys)} == {bad[0].trace_id}


@pytest.mark.parametrize(("settings", "kept"), [({}, 0), ({"sample_ratio": 1.0}, 20)])
def test_the_environments_sampler_holds_where_the_settings_do_not_say(
    make, reader, capsys, monkeypatch, settings, kept
):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    hub = make("console", slow_ratio=0.0, **settings)
    hub.put("gateway-0", batch(*(request() for _ in range(20))))
    hub.close()
    assert len({span["trace_id"] for span in told(capsys)}) == kept
    assert measured(reader)["gen_ai.server.request.duration"][0][1] == 20


def test_attempts_join_their_request_in_order_also_from_an_earlier_batch(make):
    hub, seen = make(), []
    hub.on_request.append(lambda row, attempts: seen.append((row.request_id, [each.number for each in attempts])))
    row, attempt = request(request_id="early")
    lonely, _ = request(request_id="lonely")
    hub.put("gateway-0", {"attempts": pack("attempts", [attempt._replace(number=2)])})
    hub.put("gateway-0", batch((row, attempt)) | {"slots": pack("slots", [slot_row()])})
    hub.put("gateway-0", {"requests": pack("requests", [lonely])})
    assert seen == [("early", [1, 2]), ("lonely", [])]


def test_listeners_get_rows_by_kind_and_their_faults_stay_theirs(make, caplog, capsys):
    hub, seen = make("console"), []
    hub.on_request.append(lambda row, attempts: attempts[5])
    hub.put("gateway-0", batch(request()))
    hub.on_rows["slots"] += [lambda rows: rows[5], seen.extend]
    hub.put("node-0", {"slots": pack("slots", [slot_row(task=8)])})
    assert [row.task for row in seen] == [8]
    assert hub.health.faults == 2
    hub.close()
    assert len(told(capsys)) == 6
    assert "IndexError" in caplog.text


def test_a_row_that_makes_no_sense_costs_only_itself(make, capsys, caplog):
    hub = make("console")
    ids = new_trace_id(), new_span_id()
    broken = SpanRow(*ids, "", "load", "internal", 1, 2, "", "", "engine-0", "{not json")
    hub.put("node-0", {"spans": pack("spans", [broken, broken._replace(attributes='{"a": 1}')])})
    hub.put("gateway-0", batch(request(content="{no json"), request()))
    assert hub.health.faults == 2
    hub.close()
    names = [span["name"] for span in told(capsys)]
    assert (names.count("load"), names.count("route")) == (1, 1)


def test_a_batch_of_strange_columns_is_refused_and_the_rest_taken(make):
    hub = make()
    strange = pa.RecordBatch.from_pydict({"a": [1]})
    receipt = hub.put("node-0", {"servers": strange, "odd": strange, "slots": pack("slots", [slot_row()])})
    assert receipt.rows == 1
    assert hub.status()["store"]["refused"] == 2


def test_its_health_is_told_as_status_and_as_metrics(make, reader):
    hub = make("console")
    hub.put("gateway-0/a", batch(request(), request()), {"requests": 3})
    hub.put("gateway-0/a", batch(request()), {"requests": 5})
    hub.put("gateway-0/b", {}, {"requests": 1})  # it started again
    hub.put("gateway-0/a", {}, {"requests": 4})  # overtaken by the one before
    hub.put("gateway-0/a", {}, {"requests": 5})
    hub.put("node-0", {"logs": pack("logs", [LogRow(time.time_ns(), "", "", "INFO", "x", "hello", "")])})
    status = json.loads(json.dumps(hub.status()))
    assert status["rows"] == {"requests": 3, "attempts": 3, "logs": 1}
    assert status["lost"] == {"gateway-0": {"requests": 6}}
    assert status["store"]["kept"] == 7
    assert status["exporters"]["console"]["dropped"] == 0
    metrics = measured(reader)
    assert ({"sender": "gateway-0", "kind": "requests"}, 6) in metrics["lltm.telemetry.rows.lost"]
    assert ({"kind": "attempts"}, 3) in metrics["lltm.telemetry.rows"]
    assert metrics["lltm.telemetry.dropped"] == [({"exporter": "console"}, 0)]
    assert 0 < metrics["lltm.telemetry.lag"][0][1] < 10


def test_what_a_hub_kept_is_there_after_it_started_again(make, tmp_path):
    first = make(folder=tmp_path / "t")
    first.put("gateway-0", batch(request()))
    first.close()
    assert len(make(folder=tmp_path / "t").read_since(0, ["requests"]).tables["requests"]) == 1
