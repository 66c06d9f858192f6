"""What operators run, against a live fleet: promtool on `/metrics` and on our rules, Prometheus with our configuration.

`python -m tests.peers.prometheus [--seconds 40]`. Needs `prometheus` and `promtool` on PATH (Debian: prometheus). A
fleet of two engines is loaded with chats that succeed, fail and are left; Prometheus scrapes it each second. Every
recording rule and every expression of the dashboards is then asked for. Prints a table; exit 1 where something is
amiss.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lltm_ray
from lltm_ray.config import FleetConfig, GatewayConfig
from lltm_ray.telemetry.context import new_span_id, new_trace_id

from .otlp import CHAT, Findings, Sent, chat, send
from .processes import StartError, free_port, running

CLUSTER = Path(__file__).parents[2] / "cluster"
NEEDS_MORE = re.compile(
    r"hw_(gpu|power|temperature|energy|errors)|lltm_(gpu|energy|joules)"  # a GPU
    r"|lltm_speculative|lltm_failovers|lltm_tokens_wasted|lltm_requests_rejected"  # drafts, a failure, an overload
    r"|fleet_engine:lltm_joules"
)
"""Series that such a fleet has not: an expression of these may have no value."""


def promtool(*argv: str, given: bytes | None = None, cwd: Path | None = None) -> tuple[int, str]:
    """Exit status and what it says."""
    done = subprocess.run(["promtool", *argv], input=given, capture_output=True, check=False, cwd=cwd)
    return done.returncode, (done.stdout + done.stderr).decode().strip()


def check_files(into: Findings) -> None:
    """Our configuration and rules, as they lie there."""
    folder = CLUSTER / "prometheus"
    for argv in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml", "alerts.yml"),
        ("test", "rules", "tests.yml"),
    ):
        status, said = promtool(*argv, cwd=folder)
        into.add("promtool " + " ".join(argv), [said] if status else [], f"exit {status}")


def check_metrics(url: str, into: Findings) -> None:
    """The endpoint's text, in both formats."""
    for accept in ("text/plain", "application/openmetrics-text"):
        request = urllib.request.Request(f"{url}/metrics", headers={"accept": accept})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text, kind = answer.read(), answer.headers["content-type"]
        if accept == "text/plain":
            status, said = promtool("check", "metrics", given=text)
            into.add("promtool check metrics", [said] if status or said else [], f"exit {status}, {len(text)} bytes")
        else:
            exemplars = text.count(b" # {")
            into.add("OpenMetrics with exemplars", [] if exemplars else [kind], f"{exemplars} exemplars, {kind}")


def load(url: str, stop: threading.Event, number: int) -> None:
    """One client: whole answers, streams, some that it leaves, some that fail."""
    bodies = (
        (chat(), 0),
        (chat(stream=True), 0),
        (chat(stream=True, max_tokens=500, ignore_eos=True), 5),
        (b'{"model":"text","messages":"none"}', 0),
    )
    turn = number
    while not stop.is_set():
        body, leave = bodies[turn % len(bodies)]
        send(url, Sent("load", CHAT, body, f"load-{number}-{turn}", new_trace_id(), new_span_id(), leave))
        turn += 1


class Prometheus:
    """A running one."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, path: str, **options: str) -> Any:
        """An answer's data.

        Raises:
            StartError: it says no.
        """
        address = f"{self._base}/{path}?{urllib.parse.urlencode(options)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise StartError(error.read().decode()) from error

    def values(self, expression: str) -> list[float]:
        """Of every series now."""
        return [float(each["value"][1]) for each in self.ask("query", query=expression)["result"]]

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return bool(self.ask("status/runtimeinfo"))
        except OSError:
            return False


def configuration(folder: Path, target: str) -> Path:
    """Ours, with this target and shorter intervals."""
    for name in ("rules.yml", "alerts.yml"):
        shutil.copy(CLUSTER / "prometheus" / name, folder / name)
    text = (CLUSTER / "prometheus/prometheus.yml").read_text()
    changed = text.replace("127.0.0.1:8000", target).replace("interval: 5s", "interval: 1s")
    changed = changed.replace("interval: 15s", "interval: 1s")
    assert changed.count("interval: 1s") == 2
    path = folder / "prometheus.yml"
    path.write_text(changed)
    return path


def expressions() -> Iterator[tuple[str, str]]:
    """Title and expression of every panel's every target, with the variables at All."""
    for file in sorted((CLUSTER / "grafana").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{file.stem}: {panel['title']}", re.sub(r'"\$\w+"', '".*"', target["expr"])


def recording_rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    """As Prometheus has them."""
    return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]


def check_prometheus(prometheus: Prometheus, into: Findings) -> None:
    """Its target, our rules, the dashboards' expressions."""
    targets = prometheus.ask("targets")["activeTargets"]
    wrong = [each["lastError"] for each in targets if each["health"] != "up"]
    into.add("the target is up", wrong or ([] if targets else ["none"]), targets[0]["scrapePool"] if targets else "")
    rules = recording_rules(prometheus)
    into.add(
        "rules evaluate",
        [(each["name"], each["lastError"]) for each in rules if each.get("lastError")],
        str(len(rules)),
    )
    for rule in rules:
        if rule["type"] == "recording":
            _check(into, f"rule {rule['name']}", prometheus, rule["name"])
    firing = [each["name"] for each in rules if each["type"] == "alerting" and each["state"] == "firing"]
    into.add("alerts that fire", [], ", ".join(firing) or "none")
    for title, expression in expressions():
        _check(into, title, prometheus, expression)
    exemplars = prometheus.ask(
        "query_exemplars",
        query="gen_ai_server_request_duration_seconds_bucket",
        start=str(time.time() - 60),
        end=str(time.time()),
    )
    into.add("exemplars in Prometheus", [] if exemplars else ["none"], f"{len(exemplars)} series with them")


def _check(into: Findings, what: str, prometheus: Prometheus, expression: str) -> None:
    try:
        values = prometheus.values(expression)
    except StartError as error:
        into.add(what, [str(error)], expression)
        return
    told = [value for value in values if not math.isnan(value)]
    is_missing = not told and not NEEDS_MORE.search(expression)
    seen = (
        f"{len(values)} series, {', '.join(f'{value:.4g}' for value in values[:3])}"
        if values
        else "no such series here"
    )
    into.add(what, [expression] if is_missing else [], seen)


def run(seconds: float, folder: Path, into: Findings) -> None:
    """Fleet, load, Prometheus."""
    config = FleetConfig(
        model="random",
        engines=2,
        name="prometheus",
        served_name="text",
        gpu_share=0.0,
        cpu_share=0.2,
        gateway=GatewayConfig(port=0),
        drain_timeout_s=1.0,
    )
    stop = threading.Event()
    with lltm_ray.Cluster.start(config) as cluster:
        url = cluster.endpoint
        port = free_port()
        argv = [
            "prometheus",
            f"--config.file={configuration(folder, url.removeprefix('http://'))}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        ]
        clients = [threading.Thread(target=load, args=(url, stop, number), daemon=True) for number in range(3)]
        with running(argv, folder / "prometheus.log") as process:
            for client in clients:
                client.start()
            prometheus = Prometheus(port)
            _wait(prometheus, process)
            time.sleep(seconds)
            check_metrics(url, into)
            check_prometheus(prometheus, into)
            stop.set()
            for client in clients:
                client.join(30)


def _wait(prometheus: Prometheus, process: Any) -> None:
    deadline = time.monotonic() + 30
    while not prometheus.is_up():
        if time.monotonic() > deadline or process.process.poll() is not None:
            raise StartError(process.tail())
        time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """0: all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0)
    chosen = parser.parse_args(argv)
    if missing := [name for name in ("prometheus", "promtool") if shutil.which(name) is None]:
        parser.error(f"{' and '.join(missing)}: not on PATH (Debian: apt-get install prometheus)")
    findings = Findings()
    check_files(findings)
    with tempfile.TemporaryDirectory() as name:
        run(chosen.seconds, Path(name), findings)
    return 0 if findings.show() else 1


if __name__ == "__main__":
    sys.exit(main())
