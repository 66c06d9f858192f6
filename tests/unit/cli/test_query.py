from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.cli import app
from lltm_ray.cli.query import query
from lltm_ray.integrations.graphistry import dependency_graph, prefix_graph, span_graph
from lltm_ray.telemetry.batch import SCHEMAS
from lltm_ray.telemetry.segments import Segments
from tests.fleet_rows import Plan, fleet_rows

PLAN = Plan(seed=3, seconds=20, rate=10, cascade="engine-1", cascade_s=5)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What telemetry would have written."""
    folder = tmp_path_factory.mktemp("segments")
    segments = Segments(folder, 2**30, 1e9, 10**6)
    for kind, table in fleet_rows(PLAN).items():
        for batch in table.combine_chunks().to_batches():
            numbered = batch.append_column("seq", pa.array(range(len(batch)), pa.int64()))
            assert numbered.schema.names == [*SCHEMAS[kind].names, "seq"]
            segments.add(kind, numbered)
    segments.flush()
    return folder


def ask(folder: Path, *argv: str) -> Result:
    return CliRunner().invoke(app, ["query", *argv, "--segments", str(folder)])


def test_json_has_the_rows_that_a_query_asks_for(stored: Path) -> None:
    result = ask(stored, "MATCH (n) WHERE n.error <> '' RETURN n.node, n.engine, n.error ORDER BY n.node", "--json")
    assert result.exit_code == 0, result.output
    made = span_graph(build_trace(fleet_rows(PLAN), choose_engine("pandas")))._nodes
    failed = made[made["error"] != ""]
    assert len(failed) > 3
    assert [tuple(row.values()) for row in json.loads(result.stdout)] == list(
        failed[["node", "engine", "error"]].itertuples(index=False, name=None)
    )


def test_gfql_gives_a_graph_and_missing_numbers_are_null(stored: Path) -> None:
    result = ask(stored, '[{"type": "Node", "filter_dict": {"kind": "gateway"}}]', "--graph", "dependencies", "--json")
    found = json.loads(result.stdout)
    assert [node["node"] for node in found["nodes"]] == ["gateway"]
    assert found["edges"] == []
    nothing = ask(stored, "MATCH (n) WHERE n.ms > 1e9 RETURN max(n.ms) AS longest", "--json")
    assert nothing.exit_code == 0, nothing.output
    assert "NaN" not in nothing.stdout


def test_a_table_has_times_of_day_and_is_cut_at_the_limit(stored: Path) -> None:
    result = ask(stored, "MATCH (n) RETURN n.name, n.start_unix_nano", "--limit", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["n.name", "n.start_unix_nano"]
    assert len(lines) == 3
    assert re.fullmatch(r"request +2026-09-21T\d\d:\d\d:\d\d\.\d{3}Z *", lines[1])
    assert "more rows; show them with --limit" in result.stderr


def test_the_window_ends_with_the_newest_request(stored: Path) -> None:
    counts = [
        json.loads(ask(stored, "MATCH (n) RETURN count(n) AS n", "--window", window, "--json").stdout)[0]["n"]
        for window in ("5s", "1h")
    ]
    assert 0 < counts[0] < counts[1] / 2


def test_a_wrong_query_ends_with_a_sentence_and_2(stored: Path) -> None:
    result = ask(stored, "MATCH (n) WHERE n.colour = 'red' RETURN n")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert '"colour" does not exist' in result.stderr
    assert "Traceback" not in result.stderr
    assert ask(stored / "nowhere", "MATCH (n) RETURN n").exit_code == 2
    assert ask(stored, "MATCH (n) RETURN n", "--window", "soon").exit_code == 2


def test_help_names_every_column_and_its_examples_run(stored: Path) -> None:
    text = inspect.getdoc(query) or ""
    trace = build_trace(fleet_rows(PLAN), choose_engine("pandas"))
    for make in (span_graph, dependency_graph, prefix_graph):
        made = make(trace)
        for column in (*made._nodes.columns, *made._edges.columns):
            assert re.search(rf"\b{column}\b", text), column
    examples = [shlex.split(line) for line in text.splitlines() if line.startswith("lltm-ray query")]
    assert len(examples) == 4
    shown = CliRunner().invoke(app, ["query", "--help"], env={"COLUMNS": "100"}).stdout
    for example in examples:
        assert example[2] in shown
        result = ask(stored, *example[2:], "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)
