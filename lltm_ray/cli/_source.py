"""Telemetry for commands that analyze it: a window of stored segments, or of what a running fleet has in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lltm_ray import _optional
from lltm_ray.errors import ConfigError

if TYPE_CHECKING:
    from lltm_ray.analytics.trace import Trace

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

WindowOption = Annotated[str, typer.Option("--window", help="How far back: 90s, 30m, 1h, 2d.")]
SegmentsOption = Annotated[
    Path | None,
    typer.Option("--segments", help="Read a folder of telemetry's Parquet segments; no fleet is asked."),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster of the fleet.", show_default="where `up` started it")
]


def read_age(field: str, text: str) -> float:
    """Seconds of `90s`, `30m`, `1h`, `2d`.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    number, unit = text[:-1], text[-1:]
    try:
        age_s = float(number) * _UNITS_S[unit]
    except (ValueError, KeyError):
        age_s = 0.0
    if not 0 < age_s < float("inf"):
        raise ConfigError(field, text, "must be a number with s, m, h or d, as in 30m")
    return age_s


def read_segments(folder: Path) -> Mapping[str, Any]:
    """All that a folder has, kind -> rows.

    Raises:
        ConfigError: it is no folder.
    """
    from lltm_ray.telemetry.segments import read_folder

    return read_folder(folder)


def read_fleet(name: str, address: str | None) -> Mapping[str, Any]:
    """All that a running fleet's telemetry has in memory, kind -> rows.

    Raises:
        FleetError: there is no such fleet, or it runs without telemetry.
    """
    from lltm_ray.analytics.service import KINDS
    from lltm_ray.driver import Cluster

    cluster = Cluster.connect(name, address=address)
    try:
        return cluster.telemetry.tables(*KINDS)
    finally:
        cluster.close()


def last_window(tables: Mapping[str, Any], engine: str, window_s: float) -> Trace:
    """The last seconds, up to the end of the newest request.

    Raises:
        ConfigError: no request has ended.
    """
    newest = _newest(tables)
    return window_of(tables, engine, newest - round(window_s * 1e9), newest + 1)


def window_of(tables: Mapping[str, Any], engine: str, start_unix_nano: int, end_unix_nano: int) -> Trace:
    """What ended in a window."""
    build = analytics("ingest:build_trace")
    chosen = analytics("frames:choose_engine")(engine)
    found: Trace = build(tables, chosen, start_unix_nano=start_unix_nano, end_unix_nano=end_unix_nano)
    return found


def analytics(target: str) -> Any:
    """`module:name` of `lltm_ray.analytics`."""
    return _optional.load(f"lltm_ray.analytics.{target}", extra="analytics", feature="reports")


def _newest(tables: Mapping[str, Any]) -> int:
    if "requests" not in tables or not tables["requests"].num_rows:
        raise ConfigError("segments", "requests", "there are none; a fleet's folder is <cache>/telemetry/<fleet>")
    return int(analytics("columns:request_ends")(tables["requests"]).max())
