"""Telemetry for commands that analyze it: stored segments, or what a running fleet has in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lltm_ray import _optional
from lltm_ray.config import AnalyticsConfig
from lltm_ray.errors import ConfigError

if TYPE_CHECKING:
    from lltm_ray.analytics.service import AnalyticsService

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_EVERYTHING = AnalyticsConfig(window_s=10**8, max_bytes=2**50)

WindowOption = Annotated[str, typer.Option("--window", help="How far back: 90s, 30m, 1h, 2d.")]
SegmentsOption = Annotated[
    Path | None,
    typer.Option("--segments", help="Read a folder of telemetry's Parquet segments; no fleet is asked."),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster of the fleet.", show_default="where `up` started it")
]
MemoryOption = Annotated[
    float, typer.Option("--memory-gib", min=0.1, help="Of the GPU, at most, with cudf: engines may need the rest.")
]
MEMORY_GIB = 4.0
"""Holds the spans of about 5 million."""


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
        raise ConfigError(field, text, "must be a number above 0 with s, m, h or d, as in 30m")
    return age_s


def read_segments(folder: Path, back_s: float) -> Mapping[str, Any]:
    """What analyses need of a folder, kind -> rows; segments that end `back_s` before the newest are left out.

    Raises:
        ConfigError: it is no folder.
    """
    from lltm_ray.telemetry.segments import read_folder

    return read_folder(folder, columns=analytics("service:COLUMNS"), back_s=back_s)


def read_fleet(name: str, address: str | None) -> Mapping[str, Any]:
    """What analyses need of all that a running fleet's telemetry has in memory, kind -> rows.

    Raises:
        FleetError: there is no such fleet, or it runs without telemetry.
    """
    from lltm_ray.driver import Cluster

    columns = analytics("service:COLUMNS")
    cluster = Cluster.connect(name, address=address)
    try:
        return cluster.telemetry.tables(*columns, columns=columns)
    finally:
        cluster.close()


def service_of(tables: Mapping[str, Any], engine: str, memory_gib: float, where: str) -> AnalyticsService:
    """Analytics of these rows, in this process.

    Args:
        tables: kind -> rows.
        engine: auto, cudf or pandas.
        memory_gib: of the GPU.
        where: they come from, for the reader.

    Raises:
        ConfigError: there are no rows; no such engine, or it is not usable.
        MissingExtraError: pandas or NetworkX is not installed.
    """
    if not any(rows.num_rows for rows in tables.values()):
        raise ConfigError("telemetry", where, "there are no rows; a fleet's folder is <cache>/telemetry/<fleet>")
    chosen = analytics("frames:choose_engine")(engine, memory_bytes=round(memory_gib * 2**30))
    found: AnalyticsService = analytics("service:AnalyticsService")(_EVERYTHING, chosen, where)
    found.add(tables)
    return found


def analytics(target: str) -> Any:
    """`module:name` of `lltm_ray.analytics`."""
    return _optional.load(f"lltm_ray.analytics.{target}", extra="analytics", feature="reports")
