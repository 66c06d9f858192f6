"""A report as text for a terminal, and as JSON for a program."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, Finding, causes_of, rows
from lltm_ray.analytics.compare import Comparison
from lltm_ray.analytics.report import Report, Result
from lltm_ray.analytics.saturation import LONG_WAIT_RATIO
from lltm_ray.analytics.units import plain

_WIDTH = 100
_INDENT = " " * 4
_HEADROOM, _MOST, _ALL = "Queueing headroom", 10, 0.999
"""A headroom of 1,000 % is told as more than that; a stretch of nearly all of the window is all of it."""
_APART, _SAME = 1.5, 1.001
"""Of the ends of a knee's range: from the first on the range is told. Below the second, both are one rate."""
_LEAST_MORE = 0.05
"""A smaller headroom above what was seen is none that is known."""


def request_ids(report: Report) -> dict[str, str]:
    """Trace id -> what `lltm-ray explain` takes, of findings' evidence and of the requests whose id a table tells."""
    tables = [table for result in report.results.values() if result.answer for table in result.answer.tables.values()]
    told = (table for table in tables if {"trace_id", "request_id"} <= set(table.columns))
    ids = {str(row.trace_id): str(row.request_id) for table in told for row in rows(table) if row.request_id}
    return {trace: id_ for trace, id_ in report.request_ids.items() if id_} | ids


def verdict(report: Report) -> str:
    """What the list of findings is to be read as, in one sentence."""
    failed = sum(bool(result.error) for result in report.results.values())
    ran = f"{len(report.results) - failed} of {len(report.results)} analyses ran"
    if found := len(report.findings):
        lost = units.seconds(report.lost_s)
        text = f"{found} finding{'s'[: found > 1]}, the worst first; together at most {lost} of requests' time."
        return f"{text} Only {ran}." if failed else text
    if not report.requests:
        return "No request ended in this window: there was nothing to judge."
    about = f"in {units.count(report.requests)} requests"
    return f"Nothing found {about}, but only {ran}." if failed else f"Nothing found {about}: {ran}."


# --- text


def to_text(report: Report) -> str:
    """What an operator reads first: findings, the commands that follow from them, and a few figures."""
    lines = [*_head(report), "", verdict(report)]
    ids, causes = request_ids(report), causes_of(report.findings)
    for place, finding in enumerate(report.findings):
        lines += ["", *_finding((place, causes.get(place)), finding, ids)]
    for title, block in _figures(report):
        lines += ["", title, *block]
    return "\n".join(lines) + "\n"


def _head(report: Report) -> Iterator[str]:
    yield f"Fleet {plain(report.fleet)}" if report.fleet else "Fleet"
    spans = f", {units.count(report.rows['spans'])} spans" if "spans" in report.rows else ""
    window = units.window(report.start_unix_nano, report.end_unix_nano)
    yield f"{window}: {units.count(report.requests)} requests{spans}"
    yield f"Analysed with {report.engine} in {units.seconds(report.ms / 1000)} ({plain(report.reason)})"
    if report.missed_rows:
        yield f"{units.count(report.missed_rows)} rows had left memory before they were read: figures are too low."
    for result in report.results.values():
        if result.error:
            yield f"The analysis of {result.analysis} failed: {plain(result.error)}"


def _finding(place: tuple[int, int | None], finding: Finding, ids: Mapping[str, str]) -> Iterator[str]:
    number, cause = place
    lead = f"{number + 1:>2}. "
    lost = f": {units.seconds(finding.impact_s)} lost" if finding.impact_s else ""
    lost += "" if cause is None else f"; explained by {cause + 1}"
    yield f"{lead}{finding.kind.upper()} {plain(finding.subject)}{lost}"
    yield from _wrapped(plain(finding.text))
    yield from _wrapped(f"Do: {plain(finding.advice)}")
    known = [ids[trace] for trace in finding.evidence if trace in ids]
    if known:
        yield f"{_INDENT}See: lltm-ray explain {plain(known[0])}"
    if finding.evidence:
        yield from _wrapped(f"Traces: {', '.join(plain(trace) for trace in finding.evidence)}")


def _wrapped(text: str) -> list[str]:
    given = {"initial_indent": _INDENT, "subsequent_indent": _INDENT, "break_on_hyphens": False}
    return textwrap.wrap(text, _WIDTH, break_long_words=False, **given)  # type: ignore[arg-type]


def _figures(report: Report) -> Iterator[tuple[str, list[str]]]:
    phases = table_of(report, "critical path", "phases")
    if len(phases):
        shown = [
            (row.phase, units.percent(row.share), units.seconds(row.p50_s), units.seconds(row.p95_s)) for row in phases
        ]
        yield "Latency on the critical path", _aligned([("phase", "share", "p50", "p95"), *shown])
    if told := highlights(report):
        yield "Figures", _aligned(_noted(told))


def _noted(told: list[Highlight]) -> Iterator[tuple[str, str, str]]:
    """Rows of a table whose notes go on below themselves."""
    taken = max(len(each.name) for each in told) + max(len(each.value) for each in told) + 2 * len("  ")
    for each in told:
        lines = textwrap.wrap(plain(each.note), max(_WIDTH - len(_INDENT) - taken, 1), break_long_words=False)
        yield each.name, each.value, lines[0] if lines else ""
        yield from (("", "", line) for line in lines[1:])


def _aligned(table: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [[plain(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [_INDENT + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


# --- figures that both the text and the page begin with


@dataclass(frozen=True, slots=True)
class Highlight:
    """One figure of the whole fleet."""

    name: str
    value: str
    """With its unit."""
    note: str
    """What to read it against."""
    is_bad: bool = False


def highlights(report: Report) -> list[Highlight]:
    """Reuse, errors, headroom and energy, as far as they are known."""
    found = []
    figures = _figures_of(report, "prefixes")
    if units.is_known(figures.get("reused_ratio")):
        reused, could = figures["reused_ratio"], figures.get("reusable_ratio", 0.0)
        note = "of prompt tokens" + f"; {units.percent(could)} could be" * (could > reused)
        found.append(Highlight("Cache reuse", units.percent(reused), note))
    figures = _figures_of(report, "failures")
    if units.is_known(figures.get("error_ratio")):
        note = "of requests, by the fleet's own fault"
        found.append(Highlight("Failures", units.percent(figures["error_ratio"]), note))
    found += _headroom(report)
    gpus = [
        row for row in table_of(report, "GPU and energy", "gpus") if units.is_known(row.joules) and row.generated > 0
    ]
    if gpus:
        per_token = sum(row.joules for row in gpus) / sum(row.generated for row in gpus)
        note = f"of {units.count(sum(row.generated for row in gpus))} generated on {len(gpus)} GPUs"
        found.append(Highlight("Joules per token", units.joules(per_token), note))
    return found


def _headroom(report: Report) -> list[Highlight]:
    """Of the model that has least; where none can be told, of the most asked for, and why."""
    models = table_of(report, "queueing", "models")
    told = [row for row in models if units.is_known(row.headroom_ratio)]
    if told:
        least = min(told, key=lambda row: row.headroom_ratio)
        is_found = any((each.kind, each.subject) == ("saturation", least.model) for each in report.findings)
        note = f"{_load(report, least)}, {knee(least)}. {_meaning(least)}"
        is_bad = is_found and least.headroom_high_ratio <= 0
        return [Highlight(_HEADROOM, headroom(least, is_found=is_found), note, is_bad)]
    asked = [row for row in models if row.requests and not units.is_known(row.busiest_per_s)]
    light = [row for row in models if units.is_known(row.busiest_per_s) and units.is_known(row.knee_per_s)]
    if not asked + light:
        return []
    most = max(asked + light, key=lambda row: row.requests)
    note = f"{plain(most.model)}: too few requests came to tell how busy it got, and how near to its knee"
    if most not in asked:
        note = f"{_load(report, most)}, {knee(most)}. How near that is cannot be told."
    return [Highlight(_HEADROOM, units.NOTHING, note)]


def _load(report: Report, model: Any) -> str:
    is_all = model.busiest_s * 1e9 >= _ALL * (report.end_unix_nano - report.start_unix_nano)
    when = "all through the window" if is_all else f"in its busiest {units.seconds(model.busiest_s)}"
    return f"{plain(model.model)}: {units.digits(model.busiest_per_s)} requests/s {when}"


def knee(model: Any) -> str:
    """Where a model's knee is, what that is, and how well it is known."""
    low, at, high = (units.digits(each) for each in (model.knee_low_per_s, model.knee_per_s, model.knee_high_per_s))
    if is_seen(model):
        return f"knee at {at} or more: so much was served without long waits"
    if model.knee_high_per_s > _APART * model.knee_low_per_s:
        where = f"knee somewhere from {low} to {high} (the load from which waits grow fast)"
        return f"{where}: too little was seen to tell it closer"
    return f"knee at {at} (the load from which waits grow fast)"


def is_seen(model: Any) -> bool:
    """Whether all that is known of a model's knee is that it is no less than what was served."""
    return bool(model.knee_high_per_s <= _SAME * model.seen_per_s)


def headroom(model: Any, *, is_found: bool) -> str:
    """Below the knee by how much; past it by how much only where a finding tells what to do about it."""
    if not _is_told(model):
        return units.NOTHING
    return _percent(model.headroom_ratio) if is_found or model.headroom_ratio > 0 else "none"


def _is_told(model: Any) -> bool:
    """Whether more is known of a headroom than that what was served left some, if any."""
    ratio = model.headroom_ratio
    return units.is_known(ratio) and not (is_seen(model) and ratio < _LEAST_MORE)


def _meaning(model: Any) -> str:
    """What a headroom says of the load, how far it is known, and whether requests waited."""
    low, ratio, high = model.headroom_low_ratio, model.headroom_ratio, model.headroom_high_ratio
    wait = f"{units.seconds(model.busiest_wait_s)} on average"
    if not _is_told(model):
        return f"How much more could come before they do was not seen; in that stretch they waited {wait}."
    if ratio > 0:
        times = f"{units.digits(1 + ratio)} times as much" if ratio <= _MOST else f"Over {_MOST} times as much"
        more, none = times if ratio > 1 else f"{_percent(ratio)} more", ", or none" if low <= 0 else ""
        said = f"{more} could come before they do{none}"
    else:
        said = "More came than that" if high < 0 else "More came than that, or nearly"
    if ratio <= 0 and model.busiest_wait_s < LONG_WAIT_RATIO * model.service_s:
        return f"{said}{likely(model)}, yet they waited only {wait}: they came evenly, or not for long."
    return f"{said}{likely(model)}; in that stretch they waited {wait}."


def likely(model: Any) -> str:
    """A headroom's range; empty where there is none to tell."""
    low, high = model.headroom_low_ratio, model.headroom_high_ratio
    is_known = units.is_known(low) and units.is_known(high) and _is_told(model)
    if not is_known or low > _MOST or high <= 0:
        return ""
    most = f"{high * 100:,.0f} %" if high <= _MOST else _percent(high)
    least = max(low, 0) if model.headroom_ratio > 0 else low
    return f" (likely {least * 100:,.0f} to {most})"


def _percent(ratio: float) -> str:
    """In percent; where it is far from mattering, that it is."""
    return f"over {units.count(_MOST * 100)} %" if ratio > _MOST else units.percent(ratio)


def table_of(report: Report, analysis: str, table: str) -> list[Any]:
    """A table's rows; none where the analysis failed or knows no such table."""
    answer = _answer(report, analysis)
    return list(rows(answer.tables[table])) if answer and table in answer.tables else []


def _figures_of(report: Report, analysis: str) -> Mapping[str, float]:
    answer = _answer(report, analysis)
    return answer.figures if answer else {}


def _answer(report: Report, analysis: str) -> Answer | None:
    result = report.results.get(analysis)
    return result.answer if result else None


# --- JSON


def to_json(report: Report, comparison: Comparison | None = None) -> str:
    """All of it: findings, tables as lists of records, timelines, the comparison. What cannot be told is null."""
    compared = {} if comparison is None else {"comparison": comparison.as_dict()}
    return json.dumps(_plain_json(_document(report) | compared), ensure_ascii=False, allow_nan=False, indent=1)


def _document(report: Report) -> dict[str, Any]:
    simple = ("fleet", "start_unix_nano", "end_unix_nano", "requests", "missed_rows", "engine", "reason", "ms")
    return {
        **{name: getattr(report, name) for name in simple},
        "rows": dict(report.rows),
        "findings": [
            {"analysis": result.analysis} | {name: getattr(finding, name) for name in Finding.__slots__}
            for result, finding in report.ranked
        ],
        "analyses": [_analysis(result) for result in report.results.values()],
        "request_ids": request_ids(report),
        "timelines": {trace: _records(frame) for trace, frame in report.timelines.items()},
    }


def _analysis(result: Result) -> dict[str, Any]:
    told = {name: getattr(result, name) for name in ("analysis", "engine", "reason", "rows", "ms", "error")}
    if result.answer is None:
        return told | {"figures": {}, "tables": {}}
    tables = {name: _records(frame) for name, frame in result.answer.tables.items()}
    return told | {"figures": dict(result.answer.figures), "tables": tables}


def _records(frame: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = frame.to_dict("records")
    return found


def _plain_json(value: Any) -> Any:
    """NumPy's numbers as Python's, sequences as lists, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain_json(each) for each in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if units.is_known(value) else None
    return _plain_json(value.tolist()) if hasattr(value, "tolist") else str(value)
