"""Charts along a time: latency of each engine, and the GPUs' tracks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, rows
from lltm_ray.analytics.html.figures import (
    BAD,
    HOVER,
    About,
    Figure,
    axis,
    colour_bar,
    figure,
    heading,
    heat,
    hover,
    label,
    moments,
    names_axis,
    natural,
    number,
    numbers,
    time_axis,
)

_COLOURS = 6
"""Lines that are told apart by `--line-0` and so on."""
_SLOWING = 0xFE
"""NVML's clocks event reasons (nvml.h) but for the lowest bit: being idle slows nobody."""
_ALL = "all engines"
"""Rows without an engine count every request."""
_BRIGHTEST = 0.98
"""Share of the cells below the scale's end: one late answer must not make all others look alike."""


def heat_map(answer: Answer, about: About) -> Figure:
    """Engine x time: p95 of the latency; dots where requests failed."""
    cells = list(rows(answer.tables["timeline"]))
    names = sorted({str(cell.engine) for cell in cells}, key=natural)
    ats = sorted({int(cell.at_unix_nano) for cell in cells})
    x, place = moments(_middles(ats, about)), {at: number for number, at in enumerate(ats)}
    z: list[list[Any]] = [[None] * len(ats) for _ in names]
    says: list[list[str]] = [[""] * len(ats) for _ in names]
    for cell in cells:
        row, column = names.index(str(cell.engine)), place[int(cell.at_unix_nano)]
        z[row][column], says[row][column] = number(cell.p95_s), _said(cell)
    known = sorted(value for row in z for value in row if value is not None) or [1.0]
    top = known[int(_BRIGHTEST * (len(known) - 1))]
    failed = [cell for cell in cells if cell.errors > 0]
    squares = heat(x, z, says, top, colorbar=colour_bar("p95 latency", ticksuffix=" s"))
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [x[place[int(cell.at_unix_nano)]] for cell in failed],
        "y": [names.index(str(cell.engine)) for cell in failed],
        "hovertext": [_said(cell) for cell in failed],
        "marker": {"color": BAD, "size": 7, "line": {"color": "var(--panel)", "width": 1.5}},
        **HOVER,
    }
    bands = names_axis([name or _ALL for name in names])
    return figure([squares, dots], 96 + 26 * min(len(names), 40), xaxis=time_axis(about), yaxis=bands)


def _middles(ats: Sequence[int], about: About) -> list[int]:
    """Buckets are told by their begin."""
    steps = [later - at for at, later in pairwise(ats)]
    half = min(steps, default=about.end_unix_nano - about.start_unix_nano) // 2
    return [at + half for at in ats]


def _said(cell: Any) -> str:
    return hover(
        f"{cell.engine or _ALL}, {units.clock(cell.at_unix_nano)} UTC",
        p95=units.seconds(cell.p95_s),
        p50=units.seconds(cell.p50_s),
        first_token_p95=units.seconds(cell.ttft_p95_s),
        requests=units.count(cell.requests),
        errors=units.count(cell.errors),
    )


_TRACKS = (
    ("utilization", "utilization, %", 100.0, 2.0),
    ("power_w", "power, W", 1.0, 2.0),
    ("temperature_c", "temperature, °C", 1.0, 2.0),
    ("memory_used_bytes", "memory, GiB", 1 / 2**30, 2.0),
    ("throttle", "slowed down by its power or heat", 1.0, 1.0),
    ("tokens_per_s", "generated, tokens/s", 1.0, 2.0),
)
"""Column, what it is called, what it is shown times, and its height among the others."""
_GAP = 0.045
_SERIES = {"type": "scatter", "mode": "lines", "connectgaps": False}


def tracks(answer: Answer, about: About) -> Figure:
    """What each GPU did, one plot below the other on one time axis."""
    points = sorted(rows(answer.tables["track"]), key=lambda row: (str(row.gpu), row.at_unix_nano))
    gpus = {
        name: [point for point in points if str(point.gpu) == name] for name in sorted({str(p.gpu) for p in points})
    }
    shown = [track for track in _TRACKS if any(units.is_known(getattr(point, track[0], None)) for point in points)]
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"annotations": []}
    bottom, unit = 1.0, (1 - _GAP * len(shown)) / sum(track[3] for track in shown)
    for place, (column, says, factor, height) in enumerate(shown, 1):
        bottom, top = bottom - unit * height - _GAP, bottom - _GAP
        name = f"y{place if place > 1 else ''}"
        layout[name.replace("y", "yaxis")] = _track_axis(column, len(gpus), [max(bottom, 0), top])
        layout["annotations"].append(heading(says, top))
        for order, (gpu, mine) in enumerate(gpus.items()):
            line = _slowed(mine, order) if column == "throttle" else _line(mine, column, factor)
            look = {"color": f"var(--line-{order % _COLOURS})", "width": 7 if column == "throttle" else 1.5}
            data.append(
                _SERIES
                | {
                    "x": moments(point.at_unix_nano for point in mine),
                    "name": label(gpu, 20),
                    "line": look,
                    "yaxis": name,
                }
                | {"legendgroup": str(order), "showlegend": place == 1, **line}
            )
    legend = {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font": {"size": 11}}
    last = f"y{len(shown) if len(shown) > 1 else ''}"
    return figure(
        data,
        60 + int(52 * sum(track[3] for track in shown)),
        showlegend=True,
        legend=legend,
        hovermode="x unified",
        hoversubplots="axis",
        xaxis=time_axis(about, anchor=last, showspikes=False),
        **layout,
    )


def _track_axis(column: str, gpus: int, domain: list[float]) -> dict[str, Any]:
    if column == "throttle":
        return axis(domain=domain, range=[gpus - 0.5, -0.5], showgrid=False, showticklabels=False)
    top = {"range": [0, 105]} if column == "utilization" else {}
    mode = "normal" if column == "temperature_c" else "tozero"
    return axis(domain=domain, rangemode=mode, nticks=4, **top)


def _line(points: Sequence[Any], column: str, factor: float) -> dict[str, Any]:
    values = numbers(getattr(point, column, None) for point in points)
    return {"y": numbers(None if each is None else each * factor for each in values), "hovertemplate": "%{y:,.4~g}"}


def _slowed(points: Sequence[Any], order: int) -> dict[str, Any]:
    """A bar while it is slowed; a sample counts until the next."""
    is_slowed = [units.is_known(p.throttle) and p.throttle > 0 and bool(int(p.throttle) & _SLOWING) for p in points]
    text = ["slowed" if each else "" for each in is_slowed]
    return {"y": [order if each else None for each in is_slowed], "text": text, "hovertemplate": "%{text}"}
