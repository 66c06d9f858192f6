"""Which charts a report has, in their order, and why one is not drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics.answer import Answer
from lltm_ray.analytics.html import costs, graphs, loads, pairs, times
from lltm_ray.analytics.html.figures import About, Figure
from lltm_ray.analytics.report import Report
from lltm_ray.analytics.units import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One place of the page."""

    key: str
    """Of its anchor: `chart-<key>`."""
    section: str
    analysis: str
    """`NAME` of what made its table."""
    table: str
    """What is drawn, and told as a table below."""
    title: str
    says: str
    """How to read it, in one sentence."""
    nothing: str
    """Why there is no such row, in a window that has none."""
    draw: Callable[[Answer, About], Figure]
    shows_all: bool = False
    """What any finding names is coloured, not only its own analysis' findings."""
    is_wide: bool = False
    least_px: int = 0
    """Narrower than this it scrolls in its own frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A chart of one report."""

    chart: Chart
    figure: Figure | None
    """None: `why` says so."""
    why: str = ""
    table: Any = None


SECTIONS = {
    "time": "Time",
    "where": "Where it goes",
    "engines": "Engines",
    "load": "Load and prompts",
    "hardware": "GPUs and energy",
}

CHARTS = (
    Chart(
        key="timeline",
        section="time",
        analysis="self time",
        table="timeline",
        title="Latency of each engine over time",
        says="p95 of the total time in each span of time; a red dot: requests failed there.",
        nothing="no request ended in this window",
        draw=times.heat_map,
        is_wide=True,
    ),
    Chart(
        key="phases",
        section="time",
        analysis="critical path",
        table="phases",
        title="What latency is made of",
        says="Phases on the critical path, which add up to the mean latency.",
        nothing="no request ended in this window",
        draw=costs.waterfall,
    ),
    Chart(
        key="self-time",
        section="time",
        analysis="self time",
        table="self_time",
        title="Time spent itself",
        says="Seconds of each kind of span without the spans below it.",
        nothing="no span ended in this window",
        draw=costs.self_time,
    ),
    Chart(
        key="dependencies",
        section="where",
        analysis="dependencies",
        table="edges",
        title="Who calls whom",
        says="Wider: more seconds spent there. Redder: more calls failed. A red dot: a finding names it.",
        nothing="no request reached an engine in this window",
        draw=graphs.dependencies,
        shows_all=True,
        is_wide=True,
        least_px=640,
    ),
    Chart(
        key="bottlenecks",
        section="where",
        analysis="bottlenecks",
        table="nodes",
        title="Bottlenecks",
        says="Share of critical seconds that pass through a node, beside its rank in the graph.",
        nothing="no request reached an engine in this window",
        draw=costs.bottlenecks,
        least_px=440,
    ),
    Chart(
        key="failures",
        section="where",
        analysis="failures",
        table="origins",
        title="Where errors begin",
        says="Errors by where they began, and how many requests failed for them in the end.",
        nothing="no error in this window",
        draw=costs.failures,
    ),
    Chart(
        key="stragglers",
        section="engines",
        analysis="anomalies",
        table="engines",
        title="Stragglers",
        says="Milliseconds each engine needs for a token, against its peers of the same model.",
        nothing="no engine generated enough tokens to be compared",
        draw=loads.stragglers,
    ),
    Chart(
        key="utilization",
        section="engines",
        analysis="queueing",
        table="engines",
        title="Utilization of slots",
        says="Share of slots' time in use; waits grow fast above three quarters.",
        nothing="no engine served a request in this window",
        draw=loads.utilization,
    ),
    Chart(
        key="requests",
        section="engines",
        analysis="anomalies",
        table="requests",
        title="Requests slower than expected",
        says="Against a model of prompt, cache, decode, queue and busy slots; on the dotted line: as expected.",
        nothing="no request was far from what its work explains",
        draw=pairs.odd_requests,
    ),
    Chart(
        key="interference",
        section="engines",
        analysis="interference",
        table="aggressors",
        title="Who stalled whom",
        says="Seconds of others' decoding that long prefills held up: from tenants, left, on engines, right.",
        nothing="no prefill held up a decode",
        draw=pairs.interference,
    ),
    Chart(
        key="headroom",
        section="load",
        analysis="queueing",
        table="models",
        title="Headroom",
        says="Arrivals of each model at its busiest, the knee where waits grow fast, and what its slots carry at most.",
        nothing="no model was asked for in this window",
        draw=loads.headroom,
    ),
    Chart(
        key="moves",
        section="load",
        analysis="conversations",
        table="moves",
        title="Conversations that moved",
        says="Turns that went to another engine than the turn before them.",
        nothing="no conversation moved to another engine",
        draw=pairs.moves,
    ),
    Chart(
        key="classes",
        section="load",
        analysis="workload classes",
        table="classes",
        title="Workload classes",
        says="Requests that are alike, by how many they are; stronger: more of the prompt was cached.",
        nothing="too few requests to tell classes apart",
        draw=loads.classes,
    ),
    Chart(
        key="prefixes",
        section="load",
        analysis="prefixes",
        table="families",
        title="Prompts that begin alike",
        says="From short beginnings, left, to longer ones. Larger: more requests. Stronger: more computed though held.",
        nothing="no two prompts began alike, or routing keeps no hashes of them",
        draw=graphs.prefixes,
        least_px=480,
    ),
    Chart(
        key="tracks",
        section="hardware",
        analysis="GPU and energy",
        table="track",
        title="GPUs over time",
        says="All on one time axis, so that what slowed down can be seen beside its cause.",
        nothing="no GPU was sampled in this window",
        draw=times.tracks,
        is_wide=True,
    ),
    Chart(
        key="energy",
        section="hardware",
        analysis="GPU and energy",
        table="gpus",
        title="Energy for a token",
        says="Joules of each GPU over the tokens its engines generated.",
        nothing="no GPU was sampled in this window",
        draw=loads.energy,
    ),
    Chart(
        key="used",
        section="hardware",
        analysis="GPU and energy",
        table="gpus",
        title="What keeps GPUs busy",
        says="Utilization while engines read prompts, and while they generate.",
        nothing="no GPU was sampled in this window",
        draw=loads.used,
    ),
)
"""A finding points to the first chart of its analysis that is drawn, or to the one of `_SHOWS`."""
_SHOWS = {"self time": "self-time", "queueing": "utilization"}


def draw_charts(report: Report) -> list[Drawn]:
    """Every one of `CHARTS`, drawn or with a reason why not."""
    return [_draw(chart, report) for chart in CHARTS]


def _draw(chart: Chart, report: Report) -> Drawn:
    result = report.results.get(chart.analysis)
    if result is None:
        return Drawn(chart=chart, figure=None, why=f"the analysis of {chart.analysis} did not run")
    if result.answer is None:
        return Drawn(chart=chart, figure=None, why=f"the analysis failed: {plain(result.error)}")
    table = result.answer.tables.get(chart.table)
    if table is None or not len(table):
        return Drawn(chart=chart, figure=None, why=chart.nothing)
    shown = report.findings if chart.shows_all else result.findings
    about = About(frozenset(each.subject for each in shown), report.start_unix_nano, report.end_unix_nano)
    return Drawn(chart=chart, figure=chart.draw(result.answer, about), table=table)


def anchor_of(analysis: str, drawn: list[Drawn]) -> str:
    """Key of the chart that shows what an analysis found; empty: none."""
    keys = [each.chart.key for each in drawn if each.chart.analysis == analysis and each.figure is not None]
    shows = _SHOWS.get(analysis, "")
    return shows if shows in keys else next(iter(keys), "")
