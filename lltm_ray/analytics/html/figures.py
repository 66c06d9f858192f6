"""What all charts share: colours by name, text that Plotly takes as text, numbers that JSON can hold."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics import units

Figure = Mapping[str, Any]
"""Plotly's `data` and `layout`, and `height` in pixels. Colours are CSS, resolved by the page: `var(--accent)`."""
_MOST_LETTERS = 34

HEAT = [[n / 4, f"var(--heat-{n})"] for n in range(5)]
"""Little to much."""
ACCENT, SOFT, HELD, WAIT, BAD, MUTED = (
    f"var(--{name})" for name in ("accent", "accent-soft", "held", "wait", "bad", "muted")
)
SPAN_COLOURS = {"route": WAIT, "queue": WAIT, "prefill": SOFT, "decode": ACCENT}
"""As the live page paints them."""


@dataclass(frozen=True, slots=True)
class About:
    """What a chart is told beside its tables."""

    named: frozenset[str]
    """Subjects of the findings that it shows: what they name is drawn in another colour."""
    start_unix_nano: int
    end_unix_nano: int

    def colour(self, name: str, *others: str, plain: str = ACCENT) -> str:
        """Of something with this name, or one of these."""
        return BAD if self.named & {str(name), *others} else plain


def label(text: Any, most: int = _MOST_LETTERS) -> str:
    """A name as Plotly shall show it, which takes some tags as such: cut and escaped."""
    shown = units.plain(text)
    return html.escape(shown if len(shown) <= most else f"{shown[: most - 1]}…", quote=False)


def natural(name: str) -> list[tuple[int, str]]:
    """To sort by, as people count: engine-2 comes before engine-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(name))]


def hover(title: Any, **told: str) -> str:
    """What the pointer reads: a name, and figures with their names (underscores for blanks)."""
    lines = (f"{name.replace('_', ' ')}: {label(value, 60)}" for name, value in told.items())
    return "<br>".join((f"<b>{label(title, 60)}</b>", *lines))


def number(value: Any) -> float | int | None:
    """Six digits of it; None: not known."""
    if not units.is_known(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{float(value):.6g}")


def numbers(values: Iterable[Any]) -> list[float | int | None]:
    """Each of them."""
    return [number(value) for value in values]


def moments(nanos: Iterable[Any]) -> list[str]:
    """Times as Plotly's dates, in UTC."""
    return [f"{units.moment(int(each)):%Y-%m-%d %H:%M:%S.%f}"[:-3] for each in nanos]


def mix(colour: str, share: float, other: str) -> str:
    """So much of one, the rest of the other."""
    return f"color-mix(in srgb, {colour} {max(0.0, min(share, 1.0)) * 100:.0f}%, {other})"


def axis(**told: Any) -> dict[str, Any]:
    """One that nobody can drag: a finger on a phone scrolls the page."""
    font = {"color": MUTED, "size": 11}
    return (
        {
            "fixedrange": True,
            "zeroline": False,
            "gridcolor": "var(--line)",
            "linecolor": "var(--line)",
            "tickfont": font,
            "automargin": True,
            "ticks": "",
        }
        | ({"title": {"text": told.pop("says"), "font": font, "standoff": 8}} if "says" in told else {})
        | told
    )


def names_axis(names: Sequence[Any], **told: Any) -> dict[str, Any]:
    """Names at 0, 1, ... from the top; two that look alike when cut stay two."""
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [label(each, 26) for each in names]}
    return axis(showgrid=False, range=[len(names) - 0.5, -0.5], **ticks, **told)


_TICKS = [
    {"dtickrange": [None, 999], "value": "%H:%M:%S.%3f\n%b %d"},
    {"dtickrange": [1000, 59_999], "value": "%H:%M:%S\n%b %d"},
    {"dtickrange": [60_000, None], "value": "%H:%M\n%b %d"},
]
"""Milliseconds between ticks -> what they say."""


def time_axis(about: About, **told: Any) -> dict[str, Any]:
    """The window, in UTC."""
    given = {
        "type": "date",
        "showgrid": False,
        "tickangle": 0,
        "tickformatstops": _TICKS,
        "hoverformat": "%H:%M:%S UTC",
    }
    return axis(range=moments((about.start_unix_nano, about.end_unix_nano)), **given, **told)


def colour_bar(says: str, **told: Any) -> dict[str, Any]:
    """A thin one."""
    font = {"color": MUTED, "size": 11}
    title = {"text": says, "side": "right", "font": font}
    return {"thickness": 10, "outlinewidth": 0, "tickfont": font, "title": title, "len": 0.9} | told


def heading(text: str, y: float) -> dict[str, Any]:
    """Words above one of several plots."""
    place = {"x": 0, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": text, **place, "showarrow": False, "font": {"color": MUTED, "size": 11}}


def figure(data: Sequence[Any], height: int, **layout: Any) -> Figure:
    """Everything that one chart is."""
    shown = {
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
    }
    return {"data": list(data), "layout": shown | layout, "height": height}


HOVER = {"hovertemplate": "%{hovertext}<extra></extra>"}


Cells = Sequence[Sequence[Any]]
"""Rows from the top of columns from the left."""


def heat(x: Sequence[Any], z: Cells, says: Cells, top: float, **told: Any) -> dict[str, Any]:
    """Cells coloured from 0 to `top`; None is no cell."""
    return {
        "type": "heatmap",
        "x": list(x),
        "y": list(range(len(z))),
        "z": [list(row) for row in z],
        "hovertext": [list(row) for row in says],
        "hoverongaps": False,
        "colorscale": HEAT,
        "zmin": 0,
        "zmax": top or 1,
        "xgap": 1,
        "ygap": 2,
        **HOVER,
    } | told
