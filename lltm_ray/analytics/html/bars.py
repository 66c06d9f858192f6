"""Horizontal bars: names at their left, what they come to at their right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.html.figures import (
    ACCENT,
    HOVER,
    Figure,
    axis,
    figure,
    names_axis,
    numbers,
)

MOST_BARS = 24
BAR_PX = 26


@dataclass(frozen=True, slots=True)
class Bar:
    """One of them."""

    name: str
    value: float
    text: str
    hover: str
    colour: str = ACCENT


def bar_chart(given: Sequence[Bar], says: str, more: Sequence[Mapping[str, Any]] = (), **x: Any) -> Figure:
    """Horizontal ones, in the order given.

    Args:
        given: from the top; at most `MOST_BARS` are drawn.
        says: what they measure.
        more: marks over them, with a legend.
        x: of the axis.
    """
    shown = given[:MOST_BARS]
    data = {
        "type": "bar",
        "orientation": "h",
        "y": list(range(len(shown))),
        "x": numbers(bar.value for bar in shown),
        "width": 0.6,
        "hovertext": [bar.hover for bar in shown],
        "marker": {"color": [bar.colour for bar in shown]},
        "showlegend": False,
        **HOVER,
    }
    legend = {"showlegend": True, "legend": LEGEND} if more else {}
    height = 70 + BAR_PX * max(len(shown), 1) + 24 * bool(more)
    across = axis(says=says, nticks=5, tickangle=0, rangemode="tozero", **x)
    names = names_axis([bar.name for bar in shown])
    values, unseen = values_axis([bar.text for bar in shown])
    return figure([data, *more, unseen], height, xaxis=across, yaxis=names, yaxis2=values, **legend)


def values_axis(texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is written at the right of each bar, as an axis of its own, which a narrow screen leaves room for.

    And what an axis needs to be drawn at all: something that is on it.
    """
    values = names_axis(texts, overlaying="y", side="right") | {"tickfont": {"color": "var(--ink)", "size": 11}}
    unseen = {"type": "scatter", "mode": "markers", "x": [0], "y": [0], "yaxis": "y2", "opacity": 0}
    return values, unseen | {"hoverinfo": "skip", "showlegend": False}


def or_zero(value: Any) -> float:
    """A number to sort by."""
    return float(value) if units.is_known(value) else 0.0


def mark(values: Sequence[float], name: str, symbol: str, says: Sequence[str]) -> dict[str, Any]:
    """One on each bar: `diamond`, or `line-ns` for an upright line."""
    line = {"color": "var(--ink)", "width": 2.5} if symbol == "line-ns" else {"color": "var(--panel)", "width": 1.5}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "y": list(range(len(values))),
        "x": numbers(values),
        "marker": {"symbol": symbol, "size": 17 if symbol == "line-ns" else 11, "color": "var(--ink)", "line": line},
        "hovertext": list(says),
        "cliponaxis": False,
        **HOVER,
    }


LEGEND = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}}
