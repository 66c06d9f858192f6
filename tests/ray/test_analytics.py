"""A fleet's report: asked for by its driver and by the command line, from an actor that nothing depends on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import requests

import lltm_ray
from lltm_ray.actors.analytics import find_analytics
from lltm_ray.analytics.report import MODULES
from lltm_ray.analytics.text import to_json, to_text
from lltm_ray.errors import ConfigError, FleetError
from lltm_ray.telemetry.segments import read_folder
from tests.ray.conftest import HI, until

SYSTEM = {"role": "system", "content": "You are the oldest librarian of a library that nobody has left yet. " * 20}


def chat(cluster, text: str) -> None:
    body = {"model": "tiny", "messages": [SYSTEM, {"role": "user", "content": text}], "max_tokens": 8}
    reply = requests.post(f"{cluster.endpoint}/v1/chat/completions", json=body, timeout=30)
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
    with pytest.raises(ConfigError):
        asked.compare((now - 7200, now - 7100), (now - 600, now))


def test_a_killed_analytics_actor_is_made_anew_by_the_next_question(asked):
    assert asked.report(600).requests >= 12
    ray.kill(find_analytics(asked.name))
    until(lambda: _answers(asked))
    chat(asked, "and after it?")


def _answers(cluster) -> bool:
    try:
        return cluster.report(600).requests >= 12
    except FleetError:
        return False


def test_the_command_reads_a_folder_of_segments_without_a_fleet(asked, cache, tmp_path):
    folder = cache / "telemetry" / asked.name
    until(lambda: "requests" in read_folder(folder))
    page = tmp_path / "report.html"
    command = ["-c", "from lltm_ray.cli import main; main()", "report", "--segments", str(folder), "--window", "1h"]
    done = subprocess.run(
        [sys.executable, *command, "--html", str(page)], capture_output=True, text=True, timeout=60, check=False
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
