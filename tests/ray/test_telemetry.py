"""A fleet's telemetry end to end: what callers did is told within two seconds, whoever dies meanwhile."""

import json
import os
import time
import urllib.error
import urllib.request

import psutil
import pytest
import ray
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

import lltm_ray
from lltm_ray.actors import names
from lltm_ray.telemetry.profiles import DURATION_BOUNDS
from tests.ray.conftest import HI, post, until
from tests.ray.load import Load

PARENT_ID = "00f067aa0ba902b7"
CHAT = {"messages": HI, "max_tokens": 8, "temperature": 0}
SOON_S = 30.0
"""Long before anything would tell rows that a sender forgot; two seconds where nobody shares the machine."""


def caller(number):
    """A trace of its own."""
    return f"{number:032x}", {"traceparent": f"00-{number:032x}-{PARENT_ID}-01"}


def get(url, accept="*/*"):
    with urllib.request.urlopen(urllib.request.Request(url, headers={"accept": accept}), timeout=60) as answer:
        return answer.read().decode()


def telemetry(fleet):
    return ray.get_actor(names.telemetry(fleet.name), namespace=names.NAMESPACE)


def ask(fleet, method, *args, **options):
    return ray.get(getattr(telemetry(fleet), method).remote(*args, **options), timeout=60)


def rows(fleet, kind):
    return ask(fleet, "read_since", 0, [kind], 100_000).tables[kind].to_pylist()


def soon(condition):
    """What it comes to within the time that rows may take."""
    return until(condition, SOON_S)


def known(fleet, trace_id):
    """The finished request of a trace, in the live view."""
    return [line for line in ask(fleet, "look")["recent"] if line["trace_id"] == trace_id]


def traces(fleet):
    return {row["trace_id"] for row in rows(fleet, "requests")}


def total(text, name):
    return sum(sample.value for family in parse(text) for sample in family.samples if sample.name == name)


def loads(fleet):
    return [row for row in rows(fleet, "spans") if row["name"] == "load random"]


@pytest.fixture(scope="module")
def fleet(cluster):
    """Once every process has sent something: Arrow and pandas take seconds to import, once."""
    trace_id, headers = caller(99)
    post(f"{cluster.endpoint}/v1/chat/completions", CHAT, headers.items())
    until(lambda: len(loads(cluster)) == 2 and known(cluster, trace_id))
    return cluster


def test_requests_by_gateway_and_by_handle_are_told_of_soon_with_their_callers_trace(fleet):
    by_http, headers = caller(1)
    answer = post(f"{fleet.endpoint}/v1/chat/completions", CHAT, headers.items())
    by_handle, carrier = caller(2)
    done = ray.get(fleet.engines[0].chat.remote(HI, max_tokens=8, temperature=0, carrier=carrier))
    by_stream, carrier = caller(3)
    events = fleet.engines[0].stream.options(num_returns="streaming").remote(HI, max_tokens=6, carrier=carrier)
    assert [ray.get(event) for event in events]
    lines = {trace: soon(lambda trace=trace: known(fleet, trace))[0] for trace in (by_http, by_handle, by_stream)}
    assert lines[by_http]["output_tokens"] == answer["usage"]["completion_tokens"]
    assert lines[by_handle]["output_tokens"] == done.usage.output_tokens
    assert [line["status"] for line in lines.values()] == [200, 200, 200]
    for trace, line in lines.items():
        timeline = ask(fleet, "timeline", line["request_id"])
        (server,) = [span for span in timeline["spans"] if span["kind"] == "server"]
        assert (server["trace_id"], server["parent_span_id"]) == (trace, PARENT_ID)
        assert {"route", "lltm.queue", "lltm.prefill", "lltm.decode"} <= {span["name"] for span in timeline["spans"]}
    stored = {row["trace_id"]: row for row in rows(fleet, "requests")}
    assert set(lines) <= set(stored)
    assert stored[by_stream]["is_stream"]
    page = json.loads(get(f"{fleet.endpoint}/dashboard/requests/{lines[by_http]['request_id']}"))
    assert page["request"]["trace_id"] == by_http


def test_each_engines_start_is_a_span(fleet):
    starts = loads(fleet)
    assert {row["engine"] for row in starts} == {"engine-0", "engine-1"}
    assert all(row["end_unix_nano"] > row["start_unix_nano"] and not row["error_type"] for row in starts)


def test_the_metrics_add_up_with_the_requests_and_never_wait_for_a_server(fleet):
    url = f"{fleet.endpoint}/metrics"
    post(f"{fleet.endpoint}/v1/chat/completions", CHAT)
    used = 0

    def settled():
        nonlocal used
        tables = ask(fleet, "read_since", 0, ["attempts"], 100_000).tables
        used = sum(tables["attempts"]["generated_tokens"].to_pylist())
        return used and total(get(url), "llamacpp_predicted_tokens_total") == used

    until(settled)
    servers = [psutil.Process(engine.server_pid) for engine in fleet.status().engines]
    took_s = []
    for server in servers:
        server.suspend()
    try:
        while min(took_s, default=1.0) >= 1.0 and len(took_s) < 4:  # others use this machine, too
            began = time.monotonic()
            text = get(url)
            took_s.append(time.monotonic() - began)
    finally:
        for server in servers:
            server.resume()
    assert min(took_s) < 1.0  # from servers that stand still nobody could have had an answer
    assert total(text, "llamacpp_predicted_tokens_total") == used
    (duration,) = [each for each in parse(text) if each.name == "gen_ai_server_request_duration_seconds"]
    bounds = sorted({float(each.labels["le"]) for each in duration.samples if "le" in each.labels})
    assert bounds == [*DURATION_BOUNDS, float("inf")]


def test_exemplars_name_the_traces_of_requests(fleet):
    trace_id, headers = caller(6)
    post(f"{fleet.endpoint}/v1/chat/completions", CHAT, headers.items())
    soon(lambda: known(fleet, trace_id))
    opened = get(f"{fleet.endpoint}/metrics", accept="application/openmetrics-text")
    marks = {s.exemplar.labels["trace_id"] for f in parse_open(opened) for s in f.samples if s.exemplar}
    assert trace_id in marks
    assert marks <= traces(fleet)


def test_a_warning_is_a_row_with_the_trace_of_whoever_caused_it(fleet):
    trace_id, headers = caller(7)
    try:
        for engine in ("engine-0", "engine-1"):  # the second has nowhere to move what it holds
            url = f"{fleet.endpoint}/lltm/drain?engine={engine}&timeout_s=0.3"
            post(url, {}, headers.items())
    finally:
        for engine in ("engine-0", "engine-1"):
            post(f"{fleet.endpoint}/lltm/undrain?engine={engine}", {})
    lines = soon(lambda: [row for row in rows(fleet, "logs") if row["trace_id"] == trace_id])
    assert [(line["logger"], line["severity"]) for line in lines][-1] == ("lltm_ray.gateway.migrate", "WARNING")
    assert json.loads(lines[-1]["attributes"])["lltm.process"] == "gateway-0"

    def drains():
        return [row for row in rows(fleet, "spans") if (row["trace_id"], row["name"]) == (trace_id, "drain")]

    spans = soon(lambda: found if len(found := drains()) == 2 else None)  # the second may come after its warning
    assert [span["parent_span_id"] for span in spans] == [PARENT_ID, PARENT_ID]


def telemetry_process():
    """Of the only telemetry actor here."""
    names_ = {each: " ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)}
    (found,) = [process for process, name in names_.items() if "TelemetryActor" in name]
    return found


def test_the_actor_is_killed_under_load_and_no_request_feels_it(fleet):
    trace_id, headers = caller(4)
    post(f"{fleet.endpoint}/v1/chat/completions", CHAT, headers.items())
    soon(lambda: known(fleet, trace_id))
    began_with = ask(fleet, "look")["telemetry"]["store"]["written"]
    until(lambda: ask(fleet, "look")["telemetry"]["store"]["written"] > began_with)  # it is on the disk
    known_before = len(rows(fleet, "requests"))
    with Load(fleet.endpoint, clients=4) as load:
        load.wait_for(20)
        early = len(load.outcomes)
        killed_at = time.monotonic()
        telemetry_process().kill()
        until(lambda: alive(fleet))
        back_s, during = time.monotonic() - killed_at, load.outcomes[early:]
        late_id, headers = caller(5)
        post(f"{fleet.endpoint}/v1/chat/completions", CHAT, headers.items())
        until(lambda: late_id in traces(fleet))
        told_s = time.monotonic() - killed_at
    assert not load.failures()
    longest_s = max(each.ended - each.began for each in during)
    away = [each for each in during if killed_at < each.began and each.ended < killed_at + back_s]
    assert len(away) >= 4, "they waited for it"

    def missing():
        lost = ask(fleet, "look")["telemetry"]["lost"].get("gateway-0", {}).get("requests", 0)
        return len(load.outcomes) + 1 - lost - (len(rows(fleet, "requests")) - known_before)

    until(lambda: 0 <= missing() <= early)  # but for what it had and had not written, all is told or counted
    assert trace_id in traces(fleet)  # read from the segments
    if os.environ.get("LLTM_SHOW"):
        lost = ask(fleet, "look")["telemetry"]["lost"]
        print(f"back {back_s:.1f} s, told {told_s:.1f} s, longest {longest_s:.2f} s of {len(during)}, {lost=}")


def alive(fleet):
    try:
        return ask(fleet, "look")
    except ray.exceptions.RayError:
        return None


def test_a_fleet_without_telemetry_has_no_actor_and_says_so(ray_cluster):
    off = {"name": "mute", "gateway": {"port": 0}, "gpu_share": 0.0, "telemetry": {"enabled": False}}
    with lltm_ray.Cluster.start(model="random", engines=1, **off) as fleet:
        post(f"{fleet.endpoint}/v1/chat/completions", CHAT)
        named = {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)}
        assert names.telemetry("mute") not in named
        assert total(get(f"{fleet.endpoint}/metrics"), "llamacpp:tokens_predicted_total") == CHAT["max_tokens"]
        with pytest.raises(urllib.error.HTTPError, match="501"):
            get(f"{fleet.endpoint}/dashboard/events")
