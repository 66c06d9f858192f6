"""`lltm-ray query`: ask the graph of a fleet's spans, dependencies or prompt prefixes, in Cypher or GFQL."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from lltm_ray import _optional
from lltm_ray.cli._endpoint import NameOption, fleet_meant
from lltm_ray.cli._output import ERR, JsonFlag, errors_end_the_command, print_json, print_table
from lltm_ray.cli._source import (
    MEMORY_GIB,
    AddressOption,
    MemoryOption,
    SegmentsOption,
    WindowOption,
    read_age,
    read_fleet,
    read_segments,
    service_of,
)

_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)))


class Graph(StrEnum):
    """Which one is asked."""

    SPANS = "spans"
    DEPENDENCIES = "dependencies"
    PREFIXES = "prefixes"


_MAKERS = {Graph.SPANS: "span_graph", Graph.DEPENDENCIES: "dependency_graph", Graph.PREFIXES: "prefix_graph"}
_Query = Annotated[str, typer.Argument(metavar="QUERY", help="Cypher, or a JSON list of GFQL operations.")]
_Graph = Annotated[Graph, typer.Option("--graph", help="What to ask.")]
_Engine = Annotated[str, typer.Option(help="pandas, or cudf on a GPU that has room; auto: cudf if usable.")]
_Limit = Annotated[int, typer.Option(min=1, help="Rows to show; JSON has all.")]


@errors_end_the_command()
def query(
    text: _Query,
    *,
    graph: _Graph = Graph.SPANS,
    window: WindowOption = "1h",
    segments: SegmentsOption = None,
    engine: _Engine = "pandas",
    memory_gib: MemoryOption = MEMORY_GIB,
    limit: _Limit = 100,
    name: NameOption = "default",
    address: AddressOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask a graph of the fleet's telemetry: which spans failed, what called them, who shares a prompt.

    Names that are missing are empty, numbers that are missing null; edges go from source to target.

    \b
    spans         nodes: node, name (request, route, attempt, queue, prefill, decode, or your
                  own), engine, slot, ms, start_unix_nano, error, trace_id, request_id, tenant;
                  edges: source, target, from a span to those below it
    dependencies  nodes: node, kind (client, gateway, engine, slot, gpu), requests, errors;
                  edges: source, target, calls, errors, error_ratio, p50_s, p95_s, seconds;
                  of a large fleet those that were called most
    prefixes      nodes: node (a prompt's beginning), depth_tokens, requests, prompt_tokens,
                  shared_tokens, cached_tokens, reusable_tokens, wasted_tokens, wasted_s,
                  best_engine, engines, evidence; edges: source, target, requests

    \b
    lltm-ray query "MATCH (n) WHERE n.error <> '' RETURN n.name, n.engine, n.error, n.trace_id"
    lltm-ray query "MATCH (n) WHERE n.ms > 500 RETURN n.engine, n.name, count(*) AS spans"
    lltm-ray query "MATCH (a)-[e]->(b) WHERE e.errors > 0 RETURN a.node, b.node, e.errors" --graph dependencies
    lltm-ray query '[{"type": "Node", "filter_dict": {"name": "decode", "ms": {"type": "GT", "val": 500}}}]'

    What Cypher's RETURN gives is rows; GRAPH { MATCH ... } and GFQL give a part of the graph.
    """  # noqa: D301 - click keeps lines as they are after the character \b
    window_s = read_age("window", window)
    name = name if segments or address else fleet_meant(name)
    tables = read_segments(segments, window_s) if segments else read_fleet(name, address)
    service = service_of(tables, engine, memory_gib, str(segments or name))
    asked = service.answer(_graphistry(_MAKERS[graph]), window_s)
    found = _graphistry("query")(asked, text)
    parts = {"nodes": _host(found._nodes)}
    if _graphistry("is_graph")(found, asked):
        parts["edges"] = _host(found._edges)
    if as_json:
        plain = {part: _records(frame) for part, frame in parts.items()}
        print_json(plain if "edges" in plain else plain["nodes"])
        return
    for part, frame in parts.items():
        _print(frame, limit, title=part if len(parts) > 1 else None)


def _graphistry(function: str) -> Any:
    return _optional.load(f"lltm_ray.integrations.graphistry:{function}", extra="graphistry", feature="graph queries")


def _host(frame: Any) -> Any:
    host = _graphistry("to_host")(frame)
    return host[[name for name in host.columns if not name.startswith("__")]]  # graphistry's own marks


def _records(frame: Any) -> list[dict[str, Any]]:
    return [{key: _plain(value) for key, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    """What JSON has: null for NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _print(frame: Any, limit: int, title: str | None) -> None:
    columns = list(frame.columns)
    rows = _records(frame.head(limit))
    print_table(columns, [[_cell(column, row[column]) for column in columns] for row in rows], title=title)
    if len(frame) > limit:
        ERR.print(f"{len(frame) - limit:,} more rows; show them with --limit {len(frame)}, or use --json", markup=False)


def _cell(column: str, value: Any) -> Any:
    if column.endswith("_unix_nano") and isinstance(value, int):
        return datetime.fromtimestamp(value / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    # a client chose some of the text; it must not be able to steer the terminal
    return value.translate(_CONTROLS) if isinstance(value, str) else value
