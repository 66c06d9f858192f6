"""The notebook's dashboard by URL (the gateway's real routes before a made fleet), and loads on real servers."""

import asyncio
import sys

import plotly.graph_objects as go
import pytest
from gateway_harness import gateway, infos, until

from lltm_ray.errors import ConfigError, FleetError, LltmRayError
from lltm_ray.integrations.jupyter import Dashboard, Load, generate_load
from tests.browser.fleet_made import MadeFleet
from tests.browser.page_host import Host, serving


@pytest.fixture
async def fleet():
    made = MadeFleet()
    made.sample(busy=0.5)
    yield made
    made.close()


@pytest.fixture
async def url(fleet):
    host = Host(fleet)
    async with serving(host):
        yield host.url


def traces(dashboard):
    return {trace.name: trace for trace in dashboard.figure.data}


async def test_the_panels_show_the_looks_figures(fleet, url):
    served = [fleet.serve() for _ in range(5)]
    dashboard = await asyncio.to_thread(Dashboard, url)
    (look,) = fleet.looks.values()
    drawn = traces(dashboard)
    assert list(drawn["requests/s"].y) == look["history"]["requests"]
    assert list(drawn["tokens/s"].y) == look["history"]["output_tokens"]
    assert list(drawn["latency p95"].y) == [look["latency_s"]["p95"]]
    assert list(drawn["utilization"].y) == [100 * gpu["utilization_ratio"] for gpu in look["gpus"]]
    slots = [slot for engine in look["engines"] for slot in engine["slots"]]
    assert list(drawn["slots"].text) == [slot["request_id"] for slot in slots]
    columns = dict(zip(drawn["recent"].header["values"], drawn["recent"].cells["values"], strict=True))
    assert list(columns["request"]) == served[::-1]


async def test_updates_go_into_the_same_figure_and_latency_is_remembered(fleet, url):
    dashboard = await asyncio.to_thread(Dashboard, url)
    figure = dashboard.figure
    assert list(traces(dashboard)["latency p50"].y) == [None]
    fleet.serve()
    await asyncio.to_thread(dashboard.run, 1.2)
    assert dashboard.figure is figure
    drawn = traces(dashboard)["latency p50"]
    assert drawn.y[0] is None
    assert drawn.y[-1] > 0
    assert len(set(drawn.x)) == len(drawn.y) == len(fleet.looks)


async def test_statistics_are_the_last_looks_as_one_line(fleet, url):
    for _ in range(20):
        fleet.serve()
    dashboard = await asyncio.to_thread(Dashboard, url)
    (line,) = dashboard.statistics().to_dict("records")
    (look,) = fleet.looks.values()
    assert line["requests"] == look["totals"]["requests"] == 20
    assert line["latency_p99_s"] == look["latency_s"]["p99"]
    assert line["reuse_ratio"] == look["reuse_ratio"]


async def test_without_gpus_their_panel_says_why():
    bare = MadeFleet(gpus=0)
    bare.sample()
    host = Host(bare)
    async with serving(host):
        dashboard = await asyncio.to_thread(Dashboard, host.url)
    bare.close()
    assert any("libnvidia-ml.so.1" in note.text for note in dashboard.figure.layout.annotations)


async def test_what_keeps_a_dashboard_from_its_figures_is_said(fleet, url):
    fleet.away = "telemetry does not answer: TimeoutError"
    with pytest.raises(FleetError, match="does not answer"):
        await asyncio.to_thread(Dashboard, url)
    bare = Host(None)
    async with serving(bare):
        with pytest.raises(FleetError, match="without telemetry"):
            await asyncio.to_thread(Dashboard, bare.url)
    with pytest.raises(FleetError, match="cannot reach"):
        Dashboard("http://127.0.0.1:9")


async def test_the_figure_is_alive_with_anywidget_and_still_without(url, monkeypatch):
    alive = await asyncio.to_thread(Dashboard, url)
    assert isinstance(alive.figure, go.FigureWidget)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    still = await asyncio.to_thread(Dashboard, url)
    assert type(still.figure) is go.Figure


async def test_a_load_runs_beside_and_tells_what_it_measured(pair):
    async with gateway(*infos(pair)) as gate:
        load = generate_load(gate.url, seconds=0.5, clients=2, max_tokens=4, prompt_tokens=16)
        assert load.is_running
        result = await asyncio.to_thread(load.wait, 100)
        (line,) = load.statistics().to_dict("records")
    assert not load.is_running
    assert (line["requests"], line["ok"], line["model"]) == (result.requests, result.requests, "tiny")
    assert line["latency_p95_ms"] == result.latency_ms.p95 >= line["ttft_p50_ms"] > 0


async def test_a_load_can_be_stopped(pair):
    async with gateway(*infos(pair)) as gate:
        load = generate_load(gate.url, seconds=600, clients=2, max_tokens=4)
        await asyncio.sleep(0.5)
        result = await asyncio.to_thread(load.stop)
        assert await asyncio.to_thread(load.stop) is result
    assert result.interrupted


async def test_a_load_that_ends_while_it_is_stopped_tells_how(monkeypatch):
    load = generate_load("http://127.0.0.1:9", seconds=1)
    await until(load._loop.is_closed)
    monkeypatch.setattr(Load, "is_running", True)  # as it was when it was looked at
    with pytest.raises(LltmRayError, match="cannot reach"):
        await asyncio.to_thread(load.stop)


def test_a_load_that_cannot_start_says_so():
    load = generate_load("http://127.0.0.1:9", seconds=1)
    with pytest.raises(LltmRayError, match="cannot reach"):
        load.statistics()
    with pytest.raises(ConfigError, match="concurrency"):
        generate_load("http://127.0.0.1:9", clients=0)
