"""All analyses over one window, and what an operator should know of it, the worst first."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lltm_ray.analytics.answer import Answer, Finding

_log = logging.getLogger(__name__)


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
    """Rows of the window that had left memory before they were read."""
    engine: str
    reason: str
    ms: float
    results: Mapping[str, Result]
    """By `NAME`, in the order they ran."""
    timelines: Mapping[str, Any] = field(default_factory=dict)
    """Trace id -> spans of each finding's evidence: DataFrame(span, depth, start_s, end_s, engine, error)."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The worst first."""
        found = (finding for result in self.results.values() for finding in result.findings)
        return tuple(sorted(found, key=lambda each: -each.impact_s))
