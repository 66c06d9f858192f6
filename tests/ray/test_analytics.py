"""A fleet's report: asked for by its driver and by the command line, from an actor that nothing depends on."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import requests
from ray.util.placement_group import placement_group, remove_placement_group
from typer.testing import CliRunner

import lltm_ray
from lltm_ray.actors.analytics import find_analytics, make_analytics, wait_for_analytics
from lltm_ray.actors.crew import end_leftovers
from lltm_ray.actors.fleet import Fleet, find_fleet
from lltm_ray.actors.observe import FleetAnalytics
from lltm_ray.analytics.report import MODULES
from lltm_ray.analytics.text import to_json, to_text
from lltm_ray.cli import app
from lltm_ray.config import AnalyticsConfig, FleetConfig
from lltm_ray.errors import ConfigError, FleetError, PlacementError
from lltm_ray.telemetry.segments import read_folder
from tests.ray.conftest import HI, until

SYSTEM = {"role": "system", "content": "You are the oldest librarian of a library that nobody has left yet. " * 20}


def chat(cluster, text: str) -> None:
    body = {"model": "random", "messages": [SYSTEM, {"role": "user", "content": text}], "max_tokens": 8}
    reply = requests.post(f"{cluster.endpoint}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text


@pytest.fixture(scope="module")
def asked(cluster):
    for number in range(12):
        chat(cluster, f"question {number}")
    cluster.chat(HI, max_tokens=4)
    return cluster


def test_a_report_tells_of_the_requests_through_the_gateway(asked):
    report = until(lambda: found if (found := asked.report(600)).requests >= 12 else None)
    assert len(report.results) == len(MODULES)
    assert {result.error for result in report.results.values()} == {""}
    assert report.engine == "pandas"
    assert "no share of a GPU" in report.reason
    prefixes = report.results["prefixes"].answer
    assert prefixes.figures["reusable_ratio"] > 0.5, "a shared system prompt was not seen in the salted hashes"
    assert str(report.requests) in to_text(report)
    assert json.loads(to_json(report))


def test_a_window_and_two_of_them_that_cannot_be_are_told(asked):
    with pytest.raises(ConfigError, match="window_s"):
        asked.report(-1)
    now = time.time()
    with pytest.raises(ConfigError, match="rows exist from"):
        asked.compare((now - 7200, now - 7100), (now - 600, now))


def test_a_report_of_an_hour_of_a_fleet_that_is_younger_counts_its_age_only(asked):
    report = asked.report(3600)
    length_s = (report.end_unix_nano - report.start_unix_nano) / 1e9
    assert 0 < length_s < 1000, length_s
    status = ray.get(find_analytics(asked.name).status.remote())
    assert 0 < status["bytes"] < 5000 * report.requests + 200_000, status


def test_a_killed_analytics_actor_is_made_anew_for_two_drivers_that_ask_at_once(asked):
    assert asked.report(600).requests >= 12
    both = [FleetAnalytics(find_fleet(asked.name)) for _ in range(2)]
    ray.kill(find_analytics(asked.name))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda driver: driver.report(600, None), both))
    assert all(report.requests >= 12 for report in reports)
    chat(asked, "and after it?")


def test_analytics_that_finds_no_gpu_leaves_nothing_that_waits_for_one(asked, monkeypatch):
    monkeypatch.setattr("lltm_ray.actors.analytics.START_S", 1.0)
    taken = placement_group([{"GPU": ray.cluster_resources()["GPU"]}])
    ray.get(taken.ready(), timeout=60)
    config = FleetConfig(name="waiting", analytics=AnalyticsConfig(gpu_share=1.0))
    fleet = Fleet(config=config, run_id="", directory=None, telemetry=asked._fleet.telemetry)
    try:
        with pytest.raises(PlacementError, match=r"analytics\.gpu_share"):
            FleetAnalytics(fleet).report(None, None)
    finally:
        remove_placement_group(taken)
    assert fleet.analytics is None
    until(lambda: find_analytics("waiting") is None)


def test_an_earlier_fleets_analytics_is_ended_and_never_taken_over(ray_cluster):
    config = FleetConfig(name="earlier")
    left = make_analytics(config, detached=True)
    wait_for_analytics(left, config.analytics)
    with pytest.raises(ValueError, match="already"):
        make_analytics(config, detached=True)
    end_leftovers("earlier")
    assert find_analytics("earlier") is None
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(left.status.remote(), timeout=30)


def test_a_query_asks_what_a_running_fleet_has_in_memory(asked):
    question = "MATCH (n) WHERE n.name = 'request' RETURN n.tenant, count(*) AS requests"
    done = CliRunner().invoke(app, ["query", question, "--name", asked.name, "--window", "10m", "--json"])
    assert done.exit_code == 0, done.output
    assert sum(row["requests"] for row in json.loads(done.stdout)) >= 12
    assert len(asked.status().engines) == 2, "the command has let go of the fleet and not of the test's Ray"


def test_the_command_reads_a_folder_of_segments_without_a_fleet(asked, cache, tmp_path):
    folder = cache / "telemetry" / asked.name
    until(lambda: "requests" in read_folder(folder))
    page = tmp_path / "report.html"
    command = ["-c", "from lltm_ray.cli import main; main()", "report", "--segments", str(folder), "--window", "1h"]
    done = subprocess.run(
        [sys.executable, *command, "--html", str(page)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "requests" in done.stdout
    assert "plotly" in Path(page).read_text(encoding="utf-8").lower()


def test_a_fleet_without_telemetry_says_what_to_set(ray_cluster):
    with (
        lltm_ray.Cluster.start(name="blind", gpu_share=0.0, gateway=None, telemetry={"enabled": False}) as cluster,
        pytest.raises(FleetError, match=r"telemetry\.enabled"),
    ):
        cluster.report()
