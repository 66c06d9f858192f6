"""The whole service: batches in; live view, timelines, text and pages out."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import Batch, pack
from lltm_ray.telemetry.rows import SpanRow
from lltm_ray.telemetry.service import TelemetryService
from lltm_ray.telemetry.spans import Place
from tests.unit.telemetry.rows_made import TRACE_ID, attempt_row, gpu_row, node_row, queue_row, request_row, server_row


class Clock:
    """Stands still, however long a test takes, until it is put ahead."""

    def __init__(self) -> None:
        self.began_s = time.time()
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self.began_s + self.ahead_s

    @property
    def unix_nano(self) -> int:
        """Its time, as rows tell it."""
        return int(self() * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Iterator[TelemetryService]:
    service = TelemetryService(TelemetryConfig(exporters=()), None, {"lltm.fleet": "f"}, clock=clock)
    service.place({"engine-0": Place("127.0.0.1", 8081, (), "n1", "tiny")})
    yield service
    service.close()


def batch(clock: Clock) -> Batch:
    now = clock.unix_nano
    rows = {
        "requests": [request_row(arrived_unix_nano=now - 10**9)],
        "attempts": [attempt_row()],
        "servers": [server_row(at_unix_nano=now, gpu_uuids="GPU-1")],
        "gpus": [gpu_row(at_unix_nano=now)],
        "nodes": [node_row(at_unix_nano=now)],
        "queues": [queue_row(at_unix_nano=now)],
    }
    return {kind: pack(kind, some) for kind, some in rows.items()}


def test_one_batch_shows_everywhere(service: TelemetryService, clock: Clock) -> None:
    service.put("gateway-0", batch(clock), {})
    look = json.loads(json.dumps(service.look(), allow_nan=False))
    assert look["totals"]["requests"] == 1
    assert [engine["engine"] for engine in look["engines"]] == ["engine-0"]
    assert look["telemetry"]
    text = service.metrics().decode()
    families = {family.name for family in parse(text)}
    wanted = {"gen_ai_server_request_duration_seconds", "hw_power_watts", "lltm_slots_busy", "lltm_queue_waiting"}
    assert wanted <= families
    page = service.read_since(0, ["requests", "attempts"])
    assert {kind: table.num_rows for kind, table in page.tables.items()} == {"requests": 1, "attempts": 1}


def test_a_timeline_has_the_whole_tree_and_is_json(service: TelemetryService, clock: Clock) -> None:
    service.put("gateway-0", batch(clock), {})
    found = service.timeline("r-1")
    assert found is not None
    spans = json.loads(json.dumps(found, allow_nan=False))["spans"]
    assert [span["name"] for span in spans if span["kind"] == "server"] == ["chat tiny"]
    names = {span["name"] for span in spans}
    assert {"route", "lltm.queue", "lltm.prefill", "lltm.decode"} <= names
    ids = {span["span_id"] for span in spans}
    assert all(span["parent_span_id"] in ids for span in spans if span["kind"] != "server")
    assert service.timeline("nobody's") is None


def test_a_timeline_shows_what_others_said_of_its_trace(service: TelemetryService, clock: Clock) -> None:
    service.put("gateway-0", batch(clock), {})
    span = SpanRow(TRACE_ID, "1" * 16, "", "slot save", "internal", 1, 2, "", "", "engine-0", '{"lltm.slot.id":2}')
    service.put("gateway-0", {"spans": pack("spans", [span])}, {})
    found = service.timeline("r-1")
    assert found is not None
    assert "slot save" in {each["name"] for each in found["spans"]}


def test_joules_reach_the_request_and_the_metrics(service: TelemetryService, clock: Clock) -> None:
    now = clock.unix_nano
    home = [server_row(at_unix_nano=now - 8 * 10**9, gpu_uuids="GPU-1", slots_busy=0)]
    meters = [gpu_row(at_unix_nano=now - (8 - tick) * 10**9, energy_j=100.0 * tick) for tick in range(4)]
    row = request_row(arrived_unix_nano=now - 8 * 10**9, total_s=1.0)
    attempt = attempt_row(asked_s=0.0, sent_s=0.0, headers_s=0.0, first_s=0.5, ended_s=1.0)
    service.put("node", {"servers": pack("servers", home)}, {})
    service.put("gateway", {"requests": pack("requests", [row]), "attempts": pack("attempts", [attempt])}, {})
    clock.ahead_s = 1.5
    service.put("node", {"gpus": pack("gpus", meters)}, {})
    found = service.timeline("r-1")
    assert found is not None
    assert found["joules"] == pytest.approx(100.0)
    families = {family.name: family for family in parse(service.metrics().decode())}
    gpu = {sample.labels["kind"]: sample.value for sample in families["lltm_energy_gpu_joules"].samples}
    assert gpu == pytest.approx({"requests": 100.0, "idle": 200.0, "unknown": 0.0}, abs=1e-6)


def test_what_is_gone_leaves_the_metrics_whether_or_not_others_send(service: TelemetryService, clock: Clock) -> None:
    service.put("node", batch(clock), {})
    assert b'lltm_engine="engine-0"' in service.metrics()
    assert service._live._holders
    clock.ahead_s = 60.0
    families = {family.name for family in parse(service.metrics().decode())}
    assert not families & {"hw_power_watts", "lltm_slots_busy", "lltm_queue_waiting"}
    assert service._live._holders == {}


def test_what_is_gone_leaves_while_others_send(service: TelemetryService, clock: Clock) -> None:
    service.put("node", batch(clock), {})
    clock.ahead_s = 60.0
    service.put("node", {}, {})
    samples = service._samples
    assert (samples.servers, samples.gpus, samples.queues, service._live._holders) == ({}, {}, {}, {})


def test_puts_settle_at_most_once_a_second(
    service: TelemetryService, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[float] = []
    monkeypatch.setattr(service._joules, "settle", lambda: settled.append(clock()))
    for tick in range(50):
        clock.ahead_s = tick / 10
        service.put("node", {}, {})
    assert 4 <= len(settled) <= 6


def test_one_trace_does_not_keep_spans_without_end(service: TelemetryService, clock: Clock) -> None:
    spans = [SpanRow(TRACE_ID, f"{each:016x}", "", "own", "internal", 1, 2, "", "", "", "{}") for each in range(1000)]
    service.put("gateway-0", batch(clock) | {"spans": pack("spans", spans)}, {})
    found = service.timeline("r-1")
    assert found is not None
    own = [span["span_id"] for span in found["spans"] if span["name"] == "own"]
    assert own == [f"{each:016x}" for each in range(744, 1000)]


def test_a_place_keeps_its_known_gpus_until_it_moves(service: TelemetryService, clock: Clock) -> None:
    service.put("node", batch(clock), {})
    place = Place("127.0.0.1", 8081, (), "n1", "tiny")
    service.place({"engine-0": place})
    kept = service._hub.places["engine-0"].gpu_uuids
    service.place({"engine-0": place._replace(node="n2")})
    assert (kept, service._hub.places["engine-0"].gpu_uuids) == (("GPU-1",), ())


def test_a_timeline_is_found_again_after_a_restart_in_memory_and_on_disk(tmp_path: Path) -> None:
    config = TelemetryConfig(exporters=(), ring_rows=8)
    row = request_row(request_id="old", arrived_unix_nano=time.time_ns())
    attempts = [attempt_row(number=2, span_id="2" * 16), attempt_row(number=1, span_id="1" * 16)]
    span = SpanRow(TRACE_ID, "3" * 16, "", "slot save", "internal", 1, 2, "", "", "engine-0", "{}")
    first = TelemetryService(config, tmp_path)
    for kind, rows in {"attempts": attempts, "spans": [span], "requests": [row]}.items():
        first.put("gateway-0", {kind: pack(kind, rows)}, {})
    told = first.timeline("old")
    first.close()
    at_leisure_s = time.monotonic() + 100  # a busy machine may take longer to read than one who waits is let wait
    for _ in range(2):  # reloaded into memory; then pushed out of it
        again = TelemetryService(config, tmp_path)
        assert again.timeline("old") is None
        assert again.recall("old", at_leisure_s) == told
        assert again.recall("nobody's", at_leisure_s) is None
        others = [row._replace(request_id=f"r-{each}", span_id=f"{each:016x}") for each in range(100)]
        tries = [attempt_row(request_span_id=each.span_id) for each in others]
        again.put("gateway-0", {"requests": pack("requests", others), "attempts": pack("attempts", tries)}, {})
        assert again.recall("old", at_leisure_s) == told
        again.close()
    assert told is not None
    assert len(told["spans"]) == 1 + 2 * 5 + 1
