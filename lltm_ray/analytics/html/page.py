"""The page around the charts: findings, evidence, analyses, a comparison; and the one file that it all goes into."""

from __future__ import annotations

import base64
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING, Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Finding, causes_of, rows
from lltm_ray.analytics.html.charts import SECTIONS, Drawn, anchor_of, draw_charts
from lltm_ray.analytics.html.compared import compared
from lltm_ray.analytics.html.flame import flame, legend, took
from lltm_ray.analytics.report import Report, Result
from lltm_ray.analytics.text import Highlight, highlights, request_ids, verdict
from lltm_ray.analytics.units import plain

if TYPE_CHECKING:
    from lltm_ray.analytics.compare import Comparison

_MOST_ROWS = 60
"""Of a table below a chart; the JSON has them all."""
_POLICY = "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:"
"""Nothing from outside, no script but ours; Plotly styles its elements inline, and draws in images."""
_SCROLLS = ' tabindex="0" role="group" aria-label="{}"'
"""For the keyboard: what is wider than the screen can be reached and moved."""
_SPANS = (
    *(("server", "request"), ("client", "attempt"), ("route", "waits"), ("prefill", "reads the prompt")),
    *(("decode", "generates"), ("other", "other")),
)


def to_html(report: Report, comparison: Comparison | None = None) -> str:
    """One file that needs nothing else, neither a network nor a server.

    Args:
        report: what it tells.
        comparison: of two windows, told after the findings.
    """
    page = _Page(report)
    drawn = page.drawn
    figures = {each.chart.key: each.figure for each in drawn if each.figure is not None}
    before, chart = compared(comparison) if comparison is not None else ("", None)
    if chart is not None:
        figures["comparison"] = chart
    plotly, script = _read("plotly.package_data", "plotly.min.js"), _read(_HERE, "report.js")
    parts = {
        "title": escape(
            f"{report.fleet or 'Fleet'} report, {units.window(report.start_unix_nano, report.end_unix_nano)}"
        ),
        "policy": _POLICY.format(scripts=f"{_hash(plotly)} {_hash(script)}"),
        "style": _read(_HERE, "report.css"),
        "plotly": plotly,
        "script": script,
        "figures": _json(figures),
        "head": page.head(),
        "nav": page.nav(bool(before)),
        "tiles": page.tiles(),
        "findings": page.findings(),
        "comparison": before,
        "charts": "".join(page.section(key, title) for key, title in SECTIONS.items()),
        "evidence": page.evidence(),
        "analyses": page.analyses(),
        "foot": escape(_foot(report)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read(_HERE, "report.html"))


_HERE = "lltm_ray.analytics.html.static"


@cache
def _read(package: str, name: str) -> str:
    folder, _, below = package.partition(".static")
    del below
    place = importlib.resources.files(folder)
    return (place / "static" / name if package == _HERE else place / name).read_text(encoding="utf-8")


@cache
def _hash(script: str) -> str:
    """How the page's own policy names a script: no other will run, whatever a name in the report says."""
    return f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that stays in its script element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _foot(report: Report) -> str:
    told = ", ".join(f"{units.count(number)} {name}" for name, number in report.rows.items() if number)
    return f"Made from {told or 'no rows'} in {units.seconds(report.ms / 1000)}."


class _Page:
    """One report on its way to HTML."""

    def __init__(self, report: Report) -> None:
        self.drawn = draw_charts(report)
        self._report = report
        self._ranked = report.ranked
        self._requests = request_ids(report)
        cited = dict.fromkeys(trace for _, finding in self._ranked for trace in finding.evidence)
        known = [trace for trace in (*cited, *report.timelines) if trace in report.timelines]
        self._places = {trace: f"trace-{place}" for place, trace in enumerate(dict.fromkeys(known), 1)}

    # --- top

    def head(self) -> str:
        """Which window, and how it was analysed."""
        report = self._report
        window = escape(units.window(report.start_unix_nano, report.end_unix_nano))
        lines = [
            f'<p class="window">{window}</p>',
            f'<p class="note">{units.count(report.requests)} requests, analysed with <b>{escape(report.engine)}</b>'
            f" in {units.seconds(report.ms / 1000)}: {escape(plain(report.reason))}</p>",
        ]
        if report.missed_rows:
            missed = units.count(report.missed_rows)
            lines.append(
                f'<p class="problem">{missed} rows had left memory before they were read: figures are too low.</p>'
            )
        name = escape(plain(report.fleet)) or "Fleet"
        return f"<h1>{name} <span>report</span></h1>{''.join(lines)}"

    def nav(self, is_comparing: bool) -> str:
        """Links to the parts of the page."""
        parts = {"findings": "Findings", **({"comparison": "Before and after"} if is_comparing else {}), **SECTIONS}
        parts |= {"evidence": "Evidence"} if self._places else {}
        links = (f'<a href="#{key}">{escape(text)}</a>' for key, text in (parts | {"analyses": "Analyses"}).items())
        return "".join(links)

    def tiles(self) -> str:
        """Figures of the whole fleet."""
        lost = units.seconds(self._report.lost_s)
        note = f"at most {lost} of requests' time" if self._ranked else "nothing stands out"
        told = [Highlight("Findings", str(len(self._ranked)), note), *highlights(self._report)]
        return "".join(
            f'<article class="tile"><h2>{escape(each.name)}</h2>'
            f'<p class="big{" problem" if each.is_bad else ""}"><b>{escape(each.value)}</b></p>'
            f'<p class="note">{escape(each.note)}</p></article>'
            for each in told
        )

    # --- findings

    def findings(self) -> str:
        """The worst first."""
        cards = "".join(self._card(n, result, finding) for n, (result, finding) in enumerate(self._ranked, 1))
        failed = [result for result in self._report.results.values() if result.error]
        problems = "".join(
            f'<li class="problem">The analysis of {escape(result.analysis)} failed: {escape(plain(result.error))}</li>'
            for result in failed
        )
        problems = f"<ul>{problems}</ul>" if problems else ""
        cards = f'<ol class="findings">{cards}</ol>' if cards else ""
        return f'<p class="verdict">{escape(verdict(self._report))}</p>{problems}{cards}'

    def _card(self, number: int, result: Result, finding: Finding) -> str:
        figures = "".join(
            f"<div><dt>{escape(units.heading(name))}</dt><dd>{escape(units.cell(name, value))}</dd></div>"
            for name, value in finding.figures.items()
        )
        return (
            f'<li class="finding" id="finding-{number}"><header><span class="rank" aria-hidden="true">{number}</span>'
            f'<h3><span class="kind">{escape(finding.kind)}</span> {escape(plain(finding.subject))}</h3>'
            f"{self._impact(finding)}</header>{self._cause(number)}"
            f"<p>{escape(plain(finding.text))}</p>"
            f'<p class="advice"><b>Do</b> {_marked(finding.advice)}</p>'
            f"{f'<dl>{figures}</dl>' if figures else ''}{self._links(result, finding)}</li>"
        )

    def _impact(self, finding: Finding) -> str:
        """Beside that of the worst; some findings cost no time that rows tell of."""
        if not finding.impact_s:
            return ""
        share = finding.impact_s / max(each.impact_s for _, each in self._ranked)
        return (
            f'<p class="impact"><b>{units.seconds(finding.impact_s)}</b> lost<span class="bar" aria-hidden="true">'
            f'<i style="width:{share * 100:.1f}%"></i></span></p>'
        )

    def _cause(self, number: int) -> str:
        """The finding that explains this one, and counts the same time."""
        cause = causes_of([each for _, each in self._ranked]).get(number - 1)
        if cause is None:
            return ""
        return f'<p class="note">Explained by <a href="#finding-{cause + 1}">finding {cause + 1}</a>.</p>'

    def _links(self, result: Result, finding: Finding) -> str:
        found = []
        if key := anchor_of(result.analysis, self.drawn):
            title = next(each.chart.title for each in self.drawn if each.chart.key == key)
            found.append(f'<a href="#chart-{key}">{escape(title)}</a>')
        found += [self._trace(trace) for trace in finding.evidence]
        command = next((self._requests[trace] for trace in finding.evidence if trace in self._requests), "")
        told = f"<code>lltm-ray explain {escape(plain(command))}</code>" if command else ""
        return f'<p class="links"><span class="unseen">See </span>{"".join(found)}{told}</p>'

    def _trace(self, trace: str) -> str:
        """A link to its spans, where they are in the page."""
        shown = f"<span>trace {escape(plain(trace)[:8])}</span>"
        place = self._places.get(trace)
        return (
            f'<a class="trace" href="#{place}" title="{escape(plain(trace))}">{shown}</a>'
            if place
            else (f'<span class="trace" title="{escape(plain(trace))}">{shown}</span>')
        )

    # --- charts

    def section(self, key: str, title: str) -> str:
        """One group of charts."""
        charts = "".join(self._chart(each) for each in self.drawn if each.chart.section == key)
        head = f'<h2 id="{key}-head">{escape(title)}</h2>'
        return f'<section id="{key}" aria-labelledby="{key}-head">{head}<div class="charts">{charts}</div></section>'

    def _chart(self, drawn: Drawn) -> str:
        chart = drawn.chart
        wide = " wide" if chart.is_wide else ""
        head = f'<figcaption><h3>{escape(chart.title)}</h3><p class="note">{escape(chart.says)}</p></figcaption>'
        if drawn.figure is None:
            body = f'<p class="empty">No data: {escape(drawn.why)}.</p>'
        else:
            says = f"{chart.title}. {chart.says}"
            least = f"min-width:{chart.least_px}px;" if chart.least_px else ""
            body = (
                f'<div class="frame"{_SCROLLS.format(escape(chart.title)) if chart.least_px else ""}>'
                f'<div class="plot" data-chart="{chart.key}" role="img" aria-label="{escape(says)}" '
                f'style="{least}height:{drawn.figure["height"]}px"></div></div>{self._table(drawn.table)}'
            )
        return f'<figure class="panel{wide}" id="chart-{chart.key}">{head}{body}</figure>'

    def _table(self, frame: Any) -> str:
        """The same as numbers."""
        names = list(frame.columns)
        lines = [self._row(names, row) for row, _ in zip(rows(frame), range(_MOST_ROWS), strict=False)]
        more = f", the first {_MOST_ROWS} of {units.count(len(frame))}" if len(frame) > _MOST_ROWS else ""
        head = "".join(f'<th scope="col">{escape(units.heading(name))}</th>' for name in names)
        return _details(f"As a table{more}", f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>")

    def _row(self, names: Sequence[str], row: Iterable[Any]) -> str:
        return f"<tr>{''.join(self._cell(name, value) for name, value in zip(names, row, strict=True))}</tr>"

    def _cell(self, name: str, value: Any) -> str:
        if name in ("evidence", "trace_id"):
            traces = (value,) if isinstance(value, str) else tuple(value)
            return f'<td class="links">{"".join(self._trace(str(trace)) for trace in traces)}</td>'
        kind = "" if isinstance(value, (str, tuple, list)) else ' class="n"'
        return f"<td{kind}>{escape(units.cell(name, value))}</td>"

    # --- evidence, analyses

    def evidence(self) -> str:
        """Spans of each trace that a finding points to."""
        shown = "".join(self._evidence(trace, place) for trace, place in self._places.items())
        if not shown:
            return ""
        text = "Requests that findings point to, span by span."
        return (
            '<section id="evidence" aria-labelledby="evidence-head"><h2 id="evidence-head">Evidence</h2>'
            f'<div class="panel">{legend(_SPANS)}<p class="note">{text}</p>{shown}</div></section>'
        )

    def _evidence(self, trace: str, place: str) -> str:
        frame = self._report.timelines[trace]
        shows = [(n, finding) for n, (_, finding) in enumerate(self._ranked, 1) if trace in finding.evidence]
        back = "".join(
            f'<a href="#finding-{n}">{n}. {escape(finding.kind)} {escape(plain(finding.subject))}</a>'
            for n, finding in shows
        )
        request = plain(self._requests.get(trace, ""))
        ids = f"<code>lltm-ray explain {escape(request)}</code>" if request else ""
        names = ("span", "start_s", "end_s", "engine", "error")
        return (
            f'<details class="trace"><summary><code>{escape(plain(trace))}</code> <b>{units.seconds(took(frame))}</b> '
            f"<span>{escape(', '.join(f'{n}. {finding.kind}' for n, finding in shows))}</span></summary>"
            f'<div id="{place}" class="spans" tabindex="-1">{flame(frame)}<p class="links">{back}{ids}</p>'
            f"{self._table(frame[list(names)])}</div></details>"
        )

    def analyses(self) -> str:
        """What ran, on what, for how long."""
        lines = "".join(self._analysis(result) for result in self._report.results.values())
        names = (("analysis", ""), ("found", "n"), ("engine", ""), ("rows", "n"), ("time", "n"), ("why there", ""))
        head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in names)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'

    def _analysis(self, result: Result) -> str:
        why = (
            f'<span class="problem">failed: {escape(plain(result.error))}</span>'
            if result.error
            else escape(plain(result.reason))
        )
        key = anchor_of(result.analysis, self.drawn)
        name = f'<a href="#chart-{key}">{escape(result.analysis)}</a>' if key else escape(result.analysis)
        return (
            f'<tr><th scope="row">{name}</th><td class="n">{len(result.findings) or units.NOTHING}</td>'
            f'<td>{escape(result.engine)}</td><td class="n">{units.count(result.rows)}</td>'
            f'<td class="n">{units.seconds(result.ms / 1000)}</td><td class="why">{why}</td></tr>'
        )


def _details(summary: str, table: str) -> str:
    scroll = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(summary)}"><table>{table}</table></div>'
    )
    return f"<details><summary>{escape(summary)}</summary>{scroll}</details>"


def _marked(advice: str) -> str:
    """Commands and settings, which advice has between backticks, as code."""
    parts: Iterator[tuple[int, str]] = enumerate(plain(advice).split("`"))
    return "".join(f"<code>{escape(part)}</code>" if place % 2 else escape(part) for place, part in parts)
