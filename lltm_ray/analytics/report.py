"""All analyses over one window, and what an operator should know of it, the worst first."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from lltm_ray.analytics.answer import Answer, Finding, causes_of, table
from lltm_ray.analytics.frames import Engine, choose_engine
from lltm_ray.analytics.trace import Trace

_log = logging.getLogger(__name__)
MODULES = (
    *("latency", "critical_path", "graph", "bottlenecks", "classes", "anomaly"),
    *("prefix", "shared_text", "failures", "interference", "hardware", "queueing", "conversations"),
)
"""Modules of this package, each an analysis, in the order they run."""
_MOST_TIMELINES = 60
"""Traces shown whole: each of some twenty findings has a few."""


class Analysis(Protocol):
    """A module of `MODULES`."""

    NAME: str

    def analyze(self, trace: Trace) -> Answer:
        """What the window tells."""

    def judge(self, answer: Answer) -> list[Finding]:
        """What of it an operator should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One analysis: what it found, on what, in which time."""

    analysis: str
    """Its `NAME`."""
    answer: Answer | None
    """None: it failed; `error` says how."""
    findings: tuple[Finding, ...] = ()
    engine: str
    """`pandas` or `cudf`."""
    reason: str
    """Why that engine; also where an analysis fell back to the other one."""
    rows: int
    """Of all frames it could read."""
    ms: float
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One window."""

    fleet: str = ""
    start_unix_nano: int
    end_unix_nano: int
    requests: int
    rows: Mapping[str, int]
    """Frame -> rows."""
    missed_rows: int = 0
    """Rows that had left telemetry's memory before they were read."""
    engine: str
    reason: str
    ms: float
    results: Mapping[str, Result]
    """By `NAME`, in the order they ran."""
    timelines: Mapping[str, Any] = field(default_factory=dict)
    """Trace id -> spans of each finding's evidence: DataFrame(span, depth, start_s, end_s, engine, error)."""
    request_ids: Mapping[str, str] = field(default_factory=dict)
    """Trace id -> what `lltm-ray explain` takes, of each finding's evidence; a trace's first request."""

    def __str__(self) -> str:
        """As text for a terminal."""
        from lltm_ray.analytics.text import to_text

        return to_text(self)

    @property
    def ranked(self) -> tuple[tuple[Result, Finding], ...]:
        """Findings with the analysis that made them, the worst first; those that one explains come right behind it."""
        told = [(result, finding) for result in self.results.values() for finding in result.findings]
        impacts, causes = [finding.impact_s for _, finding in told], causes_of([finding for _, finding in told])
        own = {place: causes.get(place, place) for place in range(len(told))}
        order = sorted(own, key=lambda each: (-impacts[own[each]], own[each], each in causes, -impacts[each]))
        return tuple(told[each] for each in order)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """As `ranked`."""
        return tuple(finding for _, finding in self.ranked)

    @property
    def lost_s(self) -> float:
        """Seconds that requests lost by all findings; those of explained ones are their causes', and count once."""
        findings = self.findings
        causes = causes_of(findings)
        return sum(each.impact_s for place, each in enumerate(findings) if place not in causes)


@cache
def load_analyses() -> tuple[Analysis, ...]:
    """The modules of `MODULES`."""
    return tuple(importlib.import_module(f"lltm_ray.analytics.{name}") for name in MODULES)


def make_report(trace: Trace, *, fleet: str = "", missed_rows: int = 0) -> Report:
    """Run every analysis. One that fails is reported as failed; one for which a GPU has no memory runs on the CPU.

    Args:
        trace: the window.
        fleet: its name, for the reader.
        missed_rows: that the window lacks.
    """
    began = time.perf_counter()
    results = {analysis.NAME: run(analysis, trace) for analysis in load_analyses()}
    findings = [finding for result in results.values() for finding in result.findings]
    wanted = dict.fromkeys(each for finding in findings for each in finding.evidence)
    return Report(
        fleet=fleet,
        start_unix_nano=trace.start_unix_nano,
        end_unix_nano=trace.start_unix_nano + round(trace.length_s * 1e9),
        requests=len(trace.requests),
        rows=trace.rows,
        missed_rows=missed_rows,
        engine=trace.engine.name,
        reason=trace.engine.reason,
        results=results,
        timelines=timelines(trace, list(wanted)[:_MOST_TIMELINES]),
        request_ids=request_ids(trace, wanted),
        ms=(time.perf_counter() - began) * 1e3,
    )


def run(analysis: Analysis, trace: Trace) -> Result:
    """One analysis, timed."""
    began = time.perf_counter()
    try:
        found = _run(analysis, trace)
    except Exception as error:  # noqa: BLE001 - border: one analysis must not cost the others
        if trace.engine.is_out_of_memory(error):
            again = run(analysis, trace.on(_without_gpu(trace.engine)))
            why = f"{trace.engine.name} had no memory left for it ({trace.engine.reason})"
            return replace(again, reason=why, ms=(time.perf_counter() - began) * 1e3)
        _log.warning("analysis %r failed", analysis.NAME, exc_info=True)
        found = Result(
            analysis=analysis.NAME,
            answer=None,
            engine=trace.engine.name,
            reason=trace.engine.reason,
            rows=sum(trace.rows.values()),
            ms=0.0,
            error=f"{type(error).__name__}: {error}",
        )
    return replace(found, ms=(time.perf_counter() - began) * 1e3)


def _run(analysis: Analysis, trace: Trace) -> Result:
    answer = analysis.analyze(trace)
    return Result(
        analysis=analysis.NAME,
        answer=answer,
        findings=tuple(analysis.judge(answer)),
        engine=trace.engine.name,
        reason=trace.engine.reason,
        rows=sum(trace.rows.values()),
        ms=0.0,
    )


def _without_gpu(engine: Engine) -> Engine:
    return choose_engine("pandas") if engine.name != "pandas" else engine


def timelines(trace: Trace, trace_ids: Iterable[str]) -> dict[str, Any]:
    """Spans of some traces, each in the order of their start.

    Returns:
        Trace id -> DataFrame(span, depth, start_s, end_s, engine, slot, error); seconds from the trace's first start.
    """
    known = _codes(trace, trace_ids)
    if not known:
        return {}
    spans = trace.engine.host(trace.spans[trace.spans["trace"].isin(list(known))])
    return {id_: _timeline(trace, spans[spans["trace"] == code]) for code, id_ in known.items()}


def request_ids(trace: Trace, trace_ids: Iterable[str]) -> dict[str, str]:
    """Trace id -> the request id of the trace's first request."""
    known = _codes(trace, trace_ids)
    if not known:
        return {}
    asked = trace.requests[["r", "trace", "arrived_s"]]
    asked = trace.engine.host(asked[asked["trace"].isin(list(known))]).sort_values(["arrived_s", "r"])
    first = asked.drop_duplicates("trace")
    pairs = zip(first["trace"].tolist(), first["r"].tolist(), strict=True)
    return {known[code]: trace.request_id(r) for code, r in pairs}


def _codes(trace: Trace, trace_ids: Iterable[str]) -> dict[int, str]:
    wanted = list(trace_ids)
    at = pc.index_in(pa.array(wanted, pa.string()), trace.trace_ids).to_pylist()
    return {code: id_ for code, id_ in zip(at, wanted, strict=True) if code is not None}


def _timeline(trace: Trace, spans: Any) -> Any:
    own = spans.sort_values(["start_s", "s"])
    parents = dict(zip(own["s"].tolist(), own["parent"].tolist(), strict=True))
    first = own["start_s"].min()
    return table(
        {
            "span": trace.names.decode("span", own["name"]),
            "depth": [_depth(s, parents) for s in own["s"].tolist()],
            "start_s": (own["start_s"] - first).tolist(),
            "end_s": (own["end_s"] - first).tolist(),
            "engine": trace.names.decode("engine", own["engine"]),
            "slot": own["slot"].tolist(),
            "error": trace.names.decode("error", own["error"]),
        }
    )


def _depth(span: int, parents: Mapping[int, int]) -> int:
    seen = {span}
    while (parent := parents[span]) in parents and parent not in seen:
        seen.add(parent)
        span = parent
    return len(seen) - 1
