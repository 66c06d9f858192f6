"""`lltm-ray report`: what an operator should know of a fleet's last hour."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lltm_ray.cli._endpoint import NameOption, fleet_meant
from lltm_ray.cli._output import ERR, errors_end_the_command
from lltm_ray.cli._source import (
    MEMORY_GIB,
    AddressOption,
    MemoryOption,
    SegmentsOption,
    WindowOption,
    analytics,
    read_age,
    read_segments,
    service_of,
)
from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError, FleetError

if TYPE_CHECKING:
    from lltm_ray.analytics.compare import Comparison
    from lltm_ray.analytics.report import Report
    from lltm_ray.analytics.service import AnalyticsService
    from lltm_ray.driver import Cluster

    Windows = tuple[()] | tuple[tuple[float, float], tuple[float, float]]

_Html = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page with all charts.")]
_Json = Annotated[Path | None, typer.Option("--json", help="Write all findings, tables and figures; - is stdout.")]
_Compare = Annotated[
    tuple[str, str] | None,
    typer.Option("--compare", help="Two windows, before and after a change, each FROM..TO: 60m..30m 30m..now."),
]
_Engine = Annotated[
    str, typer.Option(help="With --segments: pandas, or cudf on a GPU that has room; auto: cudf if usable.")
]


@errors_end_the_command()
def report(
    *,
    window: WindowOption = "1h",
    html: _Html = None,
    json: _Json = None,
    compare: _Compare = None,
    segments: SegmentsOption = None,
    engine: _Engine = "pandas",
    memory_gib: MemoryOption = MEMORY_GIB,
    name: NameOption = "default",
    address: AddressOption = None,
) -> None:
    """What should an operator know? Findings in plain words, the worst first, with the setting to change.

    The text goes to standard output. Windows end with the newest row of telemetry. FROM and TO of --compare are a
    moment in UTC (2026-11-21T14:02:00), or an age (30m, now): counted back from this moment, with --segments from the
    newest row.
    """
    window_s, now_s = read_age("window", window), time.time()
    earliest_s = min((start for start, _ in _read_windows(compare, now_s)), default=now_s)
    if segments:
        tables = read_segments(segments, max(window_s, now_s - earliest_s))
        service = service_of(tables, engine, memory_gib, str(segments))
        answers = _ask(service, window_s, _read_windows(compare, service.newest_unix_nano / 1e9))
    else:
        if (engine, memory_gib) != ("pandas", MEMORY_GIB):
            why = "is for --segments; a fleet's is set by analytics.engine and analytics.gpu_share"
            raise ConfigError("engine", f"{engine}, {memory_gib:g} GiB", why)
        with closing(_connect(name if address else fleet_meant(name), address)) as cluster:
            answers = _ask(cluster, window_s, _read_windows(compare, now_s))
    _show(*answers, html, json)


def _connect(name: str, address: str | None) -> Cluster:
    from lltm_ray.driver import Cluster

    try:
        return Cluster.connect(name, address=address)
    except (ConfigError, FleetError) as error:
        left = read_environment().cache_dir / "telemetry" / name
        if not left.is_dir():
            raise
        raise FleetError(f"{error.message}; what fleet {name!r} left is read with --segments {left}") from error


def _ask(source: AnalyticsService | Cluster, window_s: float, windows: Windows) -> tuple[Report, Comparison | None]:
    comparison = source.compare(*windows) if windows else None
    return source.report(window_s), comparison


def _read_windows(compare: tuple[str, str] | None, now_s: float) -> Windows:
    return (read_window(compare[0], now_s), read_window(compare[1], now_s)) if compare else ()


def read_window(text: str, now_s: float) -> tuple[float, float]:
    """`FROM..TO` as seconds since the epoch; ages are counted back from `now_s`.

    Raises:
        ConfigError: it is not two moments, or they are in the wrong order.
    """
    start, dots, end = text.partition("..")
    window = _moment(text, start, now_s), _moment(text, end, now_s)
    if not dots or not window[0] < window[1]:
        raise ConfigError("compare", text, "must be FROM..TO, the earlier first, as in 60m..30m")
    return window


def _moment(window: str, text: str, now_s: float) -> float:
    if text == "now":
        return now_s
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return now_s - read_age("compare", text or window)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _show(found: Report, comparison: Comparison | None, html: Path | None, json: Path | None) -> None:
    if json is not None:
        text = analytics("text:to_json")(found, comparison)
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
