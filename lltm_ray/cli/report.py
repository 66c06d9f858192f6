"""`lltm-ray report`: what an operator should know of a fleet's last hour."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lltm_ray.cli._endpoint import NameOption
from lltm_ray.cli._output import ERR, errors_end_the_command
from lltm_ray.cli._source import (
    AddressOption,
    SegmentsOption,
    WindowOption,
    analytics,
    last_window,
    read_age,
    read_segments,
    window_of,
)
from lltm_ray.errors import ConfigError

if TYPE_CHECKING:
    from lltm_ray.analytics.compare import Comparison
    from lltm_ray.analytics.report import Report

_Html = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page with all charts.")]
_Json = Annotated[Path | None, typer.Option("--json", help="Write all findings, tables and figures; - is stdout.")]
_Compare = Annotated[
    tuple[str, str] | None,
    typer.Option("--compare", help="Two windows, before and after a change, each FROM..TO: 60m..30m 30m..now."),
]
_Engine = Annotated[str, typer.Option(help="With --segments: auto, cudf or pandas.")]


@errors_end_the_command()
def report(
    *,
    window: WindowOption = "1h",
    html: _Html = None,
    json: _Json = None,
    compare: _Compare = None,
    segments: SegmentsOption = None,
    engine: _Engine = "auto",
    name: NameOption = "default",
    address: AddressOption = None,
) -> None:
    """What should an operator know? Findings in plain words, the worst first, with the setting to change.

    The text goes to standard output. Windows end with the newest row of telemetry; FROM and TO of --compare are an
    age (30m, now) or a moment in UTC (2026-11-21T14:02:00).
    """
    window_s = read_age("window", window)
    windows = None if compare is None else (read_window(compare[0]), read_window(compare[1]))
    source = _Stored(segments, engine) if segments else _Running(name, address)
    try:
        comparison = None if windows is None else source.compare(*windows)
        found = source.report(window_s)
    finally:
        source.close()
    _show(found, comparison, html, json)


def read_window(text: str) -> tuple[float, float]:
    """`FROM..TO` as seconds since the epoch.

    Raises:
        ConfigError: it is not two moments, or they are in the wrong order.
    """
    start, dots, end = text.partition("..")
    window = _moment(text, start), _moment(text, end)
    if not dots or not window[0] < window[1]:
        raise ConfigError("compare", text, "must be FROM..TO, the earlier first, as in 60m..30m")
    return window


def _moment(window: str, text: str) -> float:
    if text == "now":
        return time.time()
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return time.time() - read_age("compare", text or window)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


class _Running:
    """A fleet's analytics."""

    def __init__(self, name: str, address: str | None) -> None:
        from lltm_ray.driver import Cluster

        self._cluster = Cluster.connect(name, address=address)

    def report(self, window_s: float) -> Report:
        return self._cluster.report(window_s)

    def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        return self._cluster.compare(before, after)

    def close(self) -> None:
        self._cluster.close()


@dataclass
class _Stored:
    """Segments on disk."""

    folder: Path
    engine: str

    def report(self, window_s: float) -> Report:
        trace = last_window(read_segments(self.folder), self.engine, window_s)
        report: Report = analytics("report:make_report")(trace, fleet=str(self.folder))
        return report

    def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        tables = read_segments(self.folder)
        windows = [(round(start * 1e9), round(end * 1e9)) for start, end in (before, after)]
        traces = [window_of(tables, self.engine, *window) for window in windows]
        found: Comparison = analytics("compare:compare")(*traces)
        return found

    def close(self) -> None:
        """Nothing is open."""


def _show(found: Report, comparison: Comparison | None, html: Path | None, json: Path | None) -> None:
    if json is not None:
        text = analytics("text:to_json")(found)
        if str(json) == "-":
            typer.echo(text)
        else:
            _write("json", json, text)
    if html is not None:
        _write("html", html, analytics("html:to_html")(found, comparison))
    if str(json) != "-":
        typer.echo(analytics("text:to_text")(found))
        if comparison is not None:
            typer.echo(comparison.text())


def _write(field: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be written: {error.strerror}") from error
    ERR.print(f"written: {path}", markup=False)
