"""What operators are given (dashboards, rules) asks only for metrics that there are."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import pack
from lltm_ray.telemetry.service import TelemetryService
from tests.unit.telemetry.rows_made import attempt_row, gpu_row, node_row, queue_row, request_row, server_row

CLUSTER = Path(__file__).parents[2] / "cluster"
SECOND = 10**9
_WORD = re.compile(r"\b((?:gen_ai|hw|llamacpp|lltm|process|system)_[a-z0-9_]+)\b(?!\s*=)")
_NO_METRICS = re.compile(r"\b(?:by|without) \([^)]*\)|\{[^}]*\}|\w+(?::\w+)+")
"""Labels, and what recording rules make."""


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every sample's name of a fleet in which everything happened once."""
    service = TelemetryService(TelemetryConfig(exporters=()), None)
    now = time.time_ns()
    broken = attempt_row(outcome="continued", delivered_tokens=4, draft_tokens=9, accepted_tokens=3)
    attempts = [broken, attempt_row(number=2, span_id="2" * 16, is_continued=True)]
    refused = request_row(request_id="no", span_id="3" * 16, status=429, error_type="429", arrived_unix_nano=now)
    home = {"gpu_uuids": "GPU-1", "gpu_memory_bytes": 5, "gpu_memory_share_bytes": 6, "draft_tokens": 1.0}
    server = server_row(at_unix_nano=now, draft_accepted=1.0, **home)
    meters = [
        gpu_row(at_unix_nano=now - ago * SECOND, energy_j=100.0 * (9 - ago), ecc_corrected=0, pcie_sent_bytes=4)
        for ago in range(9, -1, -1)
    ]
    batches: list[dict[str, list[Any]]] = [
        {"servers": [server], "nodes": [node_row(at_unix_nano=now)], "queues": [queue_row(at_unix_nano=now)]},
        {"requests": [request_row(arrived_unix_nano=now - 8 * SECOND), refused], "attempts": attempts},
        {"gpus": meters},
    ]
    for batch in batches:
        service.put("g", {kind: pack(kind, rows) for kind, rows in batch.items()}, {"slots": 3})
    names = {sample.name for family in parse(service.metrics().decode()) for sample in family.samples}
    service.close()
    return names | {"lltm_ledger_drift_tokens", "lltm_telemetry_up"}


def asked_for(expression: str) -> set[str]:
    return set(_WORD.findall(_NO_METRICS.sub("", expression)))


@pytest.mark.parametrize("file", sorted((CLUSTER / "grafana").glob("*.json")), ids=lambda file: file.name)
def test_every_panel_asks_for_metrics_that_exist(file: Path, known: set[str]) -> None:
    board = json.loads(file.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert asked_for(target["expr"])
            assert asked_for(target["expr"]) <= known, panel["title"]


@pytest.mark.parametrize("file", sorted((CLUSTER / "grafana").glob("*.json")), ids=lambda file: file.name)
def test_panels_do_not_overlap(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.mark.parametrize("name", ["rules.yml", "alerts.yml"])
def test_every_rule_asks_for_metrics_that_exist(name: str, known: set[str]) -> None:
    text = (CLUSTER / "prometheus" / name).read_text(encoding="utf-8")
    expressions = re.findall(r"expr: (?:>-\n((?: {10}.*\n)+)|(.*)\n)", text)
    found = {word for parts in expressions for word in asked_for(" ".join(parts))}
    assert len(found) > 4
    assert found <= known
