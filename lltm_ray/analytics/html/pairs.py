"""Charts of two measures, or of two ends: took and expected, read and wrote, who and whom, from and to."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, rows
from lltm_ray.analytics.html.figures import (
    BAD,
    HOVER,
    MUTED,
    About,
    Figure,
    axis,
    colour_bar,
    figure,
    heat,
    hover,
    label,
    names_axis,
    natural,
    number,
    numbers,
)


def odd_requests(answer: Answer, about: About) -> Figure:
    """Requests that took longer than a model of their work expects; on the line: as expected."""
    found = [row for row in rows(answer.tables["requests"]) if row.seconds > 0 and row.expected_s > 0]
    ends = [each for row in found for each in (row.seconds, row.expected_s)]
    low, high = (min(ends, default=1) * 0.8, max(ends, default=10) * 1.25)
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": numbers((low, high)),
        "y": numbers((low, high)),
        "line": {"color": MUTED, "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(row.expected_s for row in found),
        "y": numbers(row.seconds for row in found),
        "marker": {
            "size": 10,
            "color": [about.colour(row.engine, row.trace_id) for row in found],
            "line": {"color": "var(--panel)", "width": 1},
        },
        "hovertext": [
            hover(
                row.request_id or row.trace_id,
                engine=str(row.engine),
                took=units.seconds(row.seconds),
                expected=units.seconds(row.expected_s),
                why=str(row.why),
            )
            for row in found
        ],
        **HOVER,
    }
    span = {"type": "log", "range": [math.log10(low), math.log10(high)], "nticks": 5, "ticksuffix": " s", "dtick": "D2"}
    return figure([line, marks], 250, xaxis=axis(says="expected", **span), yaxis=axis(says="took", **span))


def interference(answer: Answer, about: About) -> Figure:
    """Whose long prefills held up how many seconds of decoding, on which engine."""
    flows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows(answer.tables["aggressors"]):
        flow = flows[str(row.tenant) or "no tenant", str(row.engine)]
        flow[0] += row.stalled_s
        flow[1] += 1
    tenants, engines = (sorted({pair[side] for pair in flows}) for side in (0, 1))
    says = [
        hover(f"{tenant} → {engine}", stalled=units.seconds(seconds), long_prefills=units.count(requests))
        for (tenant, engine), (seconds, requests) in flows.items()
    ]
    sankey = {
        "type": "sankey",
        "arrangement": "fixed",
        "textfont": {"color": "var(--ink)", "size": 12, "shadow": "none"},
        "node": {
            "label": [label(name, 24) for name in (*tenants, *engines)],
            "thickness": 12,
            "pad": 18,
            "color": [about.colour(name, plain=MUTED) for name in tenants] + [about.colour(n) for n in engines],
            "line": {"width": 0},
            "hovertemplate": "%{label}: %{value:,.3~g} s of decoding<extra></extra>",
        },
        "link": {
            "source": [tenants.index(tenant) for tenant, _ in flows],
            "target": [len(tenants) + engines.index(engine) for _, engine in flows],
            "value": numbers(seconds for seconds, _ in flows.values()),
            "color": [
                "var(--accent-faint)" if about.colour(tenant) != BAD else "var(--bad-soft)" for tenant, _ in flows
            ],
            "customdata": says,
            "hovertemplate": "%{customdata}<extra></extra>",
        },
    }
    margin = {"l": 8, "r": 8, "t": 16, "b": 16}
    return figure([sankey], max(220, 60 + 44 * max(len(tenants), len(engines))), margin=margin)


_MOST_WRITTEN = 12
"""Engines up to which a cell has room for its number."""


def moves(answer: Answer, about: About) -> Figure:
    """Turns of conversations that went to another engine than the one before: from, to."""
    found = list(rows(answer.tables["moves"]))
    names = sorted({str(name) for row in found for name in (row.from_engine, row.to_engine)}, key=natural)[:40]
    place = {name: at for at, name in enumerate(names)}
    z: list[list[Any]] = [[None] * len(names) for _ in names]
    says: list[list[str]] = [[""] * len(names) for _ in names]
    for row in found:
        if str(row.from_engine) in place and str(row.to_engine) in place:
            at, to = place[str(row.from_engine)], place[str(row.to_engine)]
            z[at][to] = number(row.turns)
            says[at][to] = hover(
                f"{row.from_engine} → {row.to_engine}",
                turns=units.count(row.turns),
                lost=f"{units.count(row.lost_tokens)} tokens, {units.seconds(row.lost_s)}",
            )
    top = max((each for row in z for each in row if each is not None), default=1)
    written = {"texttemplate": "%{z}" if len(names) <= _MOST_WRITTEN else "", "textfont": {"size": 11}}
    cells = heat(range(len(names)), z, says, top, colorbar=colour_bar("turns"), xgap=2, **written)
    across = names_axis(names, says="to", side="bottom") | {"range": [-0.5, len(names) - 0.5]}
    return figure([cells], 110 + 30 * max(len(names), 3), xaxis=across, yaxis=names_axis(names, says="from"))
