"""Two windows, before and after a change: what moved, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lltm_ray.analytics import units
from lltm_ray.analytics.html.figures import (
    ACCENT,
    BAD,
    HOVER,
    MUTED,
    Figure,
    axis,
    figure,
    hover,
    names_axis,
    numbers,
)
from lltm_ray.analytics.units import plain

if TYPE_CHECKING:
    from lltm_ray.analytics.compare import Comparison, Mix, Row

_COLUMNS = ("metric", "before", "after", "after / before", "interval", "effect", "verdict")
_UNITS = {"s": units.seconds, "ratio": units.percent, "/s": units.digits, "J": units.joules}
_WIDE = 3
"""Ratios further apart than this are on a logarithmic axis."""
_COLOURS = {"better": ACCENT, "worse": BAD}
_CLASSES = {"better": "better", "worse": "problem"}


def compared(comparison: Comparison) -> tuple[str, Figure | None]:
    """A section of the page, and the chart in it; None where no ratio is known."""
    fleet = [row for row in comparison.rows if not row.scope]
    engines = [row for row in comparison.rows if row.scope]
    windows = (units.window(*each) for each in (comparison.before_unix_nano, comparison.after_unix_nano))
    text = f"{' against '.join(windows)}; intervals of {comparison.confidence:.0%} confidence."
    drawn = _chart(fleet)
    says = "After over before, with its interval; on the line: no change."
    plot = f'<p class="note">{says}</p>{_plot(says, drawn)}' if drawn is not None else ""
    apart = f"<details><summary>Engine by engine</summary>{_table(engines)}</details>" if engines else ""
    return (
        '<section id="comparison" aria-labelledby="comparison-head"><h2 id="comparison-head">Before and after</h2>'
        f'<div class="panel"><p class="note">{escape(text)}</p>{_mixes(comparison.mix)}'
        f"{plot}{_table(fleet)}{apart}</div>"
        "</section>",
        drawn,
    )


def _plot(says: str, drawn: Figure) -> str:
    return (
        f'<div class="plot" data-chart="comparison" role="img" aria-label="{says}" style="height:{drawn["height"]}px">'
        "</div>"
    )


def _mixes(mixes: Sequence[Mix]) -> str:
    """Another load makes another latency: what must be known before any of it is believed."""
    other = [
        f"{plain(each.feature)} {units.digits(each.before)} → {units.digits(each.after)}"
        for each in mixes
        if not each.is_same
    ]
    if not other:
        return '<p class="note">Both windows had the same work.</p>'
    return f'<p class="problem">The work was not the same, which may be the cause: {escape("; ".join(other))}.</p>'


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return '<p class="empty">No data: the two windows have no figure in common.</p>'
    head = "".join(f'<th scope="col"{_kind(name)}>{name}</th>' for name in _COLUMNS)
    lines = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="Before and after"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _kind(name: str) -> str:
    return "" if name in ("metric", "verdict") else ' class="n"'


def _cells(row: Row) -> str:
    form = _UNITS.get(row.unit, units.digits)
    is_known = units.is_known(row.ratio_low) and units.is_known(row.ratio_high)
    interval = f"{units.times(row.ratio_low)} to {units.times(row.ratio_high)}" if is_known else units.NOTHING
    told = (_name(row), form(row.before), form(row.after), units.times(row.ratio), interval, units.digits(row.effect))
    cells = "".join(f"<td{_kind(name)}>{escape(text)}</td>" for name, text in zip(_COLUMNS, told, strict=False))
    return f'{cells}<td class="{_CLASSES.get(row.verdict, "same")}">{escape(row.verdict)}</td>'


def _name(row: Row) -> str:
    statistic = "" if row.statistic == "whole" else f", {row.statistic}"
    return plain(f"{row.scope} {row.metric}{statistic}".strip())


def _chart(rows: Sequence[Row]) -> Figure | None:
    found = [row for row in rows if all(units.is_known(each) and each > 0 for each in _interval(row))]
    if not found:
        return None
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(row.ratio for row in found),
        "y": list(range(len(found))),
        "marker": {"size": 9, "color": [_COLOURS.get(row.verdict, MUTED) for row in found]},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "color": MUTED,
            "thickness": 1.5,
            "width": 4,
            "array": numbers(row.ratio_high - row.ratio for row in found),
            "arrayminus": numbers(row.ratio - row.ratio_low for row in found),
        },
        "hovertext": [
            hover(_name(row), after_over_before=units.times(row.ratio), verdict=row.verdict) for row in found
        ],
        **HOVER,
    }
    ends = [*(end for row in found for end in _interval(row)), 0.95, 1.05]
    across = _log(ends) if max(ends) > _WIDE * min(ends) else axis(ticksuffix="×", nticks=6, tickangle=0)
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    one = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "layer": "below", "line": line}
    names = names_axis([_name(row) for row in found])
    return figure([marks], 60 + 26 * len(found), shapes=[one], xaxis=across, yaxis=names)


def _log(ends: Sequence[float]) -> dict[str, Any]:
    low, high = math.log10(min(ends)), math.log10(max(ends))
    return axis(type="log", range=[low - 0.05, high + 0.05], ticksuffix="×", dtick="D2")


def _interval(row: Row) -> tuple[float, float, float]:
    return row.ratio_low, row.ratio, row.ratio_high
