"""Charts of where time and errors go: phases, spans, nodes, origins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, rows
from lltm_ray.analytics.html.bars import BAR_PX, LEGEND, Bar, bar_chart, mark, values_axis
from lltm_ray.analytics.html.figures import (
    ACCENT,
    HELD,
    HOVER,
    MUTED,
    SOFT,
    SPAN_COLOURS,
    WAIT,
    About,
    Figure,
    axis,
    figure,
    hover,
    names_axis,
    numbers,
)
from lltm_ray.analytics.html.graphs import short


def waterfall(answer: Answer, about: About) -> Figure:
    """What a request's mean latency is made of, phase after phase."""
    phases = list(rows(answer.tables["phases"]))
    requests = max((phase.requests for phase in phases), default=0) or 1
    means = [phase.seconds / requests for phase in phases]
    starts = [sum(means[:place]) for place in range(len(means))]
    says = [
        hover(
            phase.phase,
            mean=units.seconds(mean),
            share=units.percent(phase.share),
            p50=units.seconds(phase.p50_s),
            p95=units.seconds(phase.p95_s),
        )
        for phase, mean in zip(phases, means, strict=True)
    ]
    texts = [f"{units.seconds(mean)}, {units.percent(row.share)}" for row, mean in zip(phases, means, strict=True)]
    values, unseen = values_axis([*texts, units.seconds(sum(means))])
    steps = {
        "type": "bar",
        "orientation": "h",
        "y": list(range(len(phases) + 1)),
        "base": numbers([*starts, 0]),
        "x": numbers([*means, sum(means)]),
        "width": 0.6,
        "marker": {"color": [*(SPAN_COLOURS.get(str(phase.phase), MUTED) for phase in phases), HELD]},
        "hovertext": [*says, hover("whole request", mean=units.seconds(sum(means)))],
        **HOVER,
    }
    names = names_axis([*(phase.phase for phase in phases), "whole request"])
    across = axis(says="mean seconds of a request", rangemode="tozero", nticks=5, tickangle=0)
    return figure([steps, unseen], 70 + BAR_PX * (len(phases) + 1), xaxis=across, yaxis=names, yaxis2=values)


def self_time(answer: Answer, about: About) -> Figure:
    """Where time was spent itself, without what was called from there."""
    spans = sorted(rows(answer.tables["self_time"]), key=lambda span: -span.self_s)
    return bar_chart(
        [
            Bar(
                str(span.span),
                span.self_s,
                units.percent(span.self_share),
                hover(
                    span.span,
                    itself=units.seconds(span.self_s),
                    with_all_below=units.seconds(span.total_s),
                    spans=units.count(span.count),
                    p50=units.seconds(span.p50_s),
                    p95=units.seconds(span.p95_s),
                ),
                SPAN_COLOURS.get(span.span, MUTED),
            )
            for span in spans
        ],
        "seconds of all requests",
    )


def bottlenecks(answer: Answer, about: About) -> Figure:
    """Nodes by the critical seconds that pass through them, beside two measures of the graph alone."""
    nodes = sorted(rows(answer.tables["nodes"]), key=lambda node: -node.critical_share)[:12]
    drawn = [
        Bar(
            short(node.node),
            node.critical_share,
            units.percent(node.critical_share),
            hover(
                node.node,
                kind=str(node.kind),
                critical=units.seconds(node.critical_s),
                pagerank=units.digits(node.pagerank),
                betweenness=units.digits(node.betweenness),
            ),
            about.colour(node.node, short(node.node), plain=SOFT),
        )
        for node in nodes
    ]
    scores = [
        _score([node.pagerank for node in nodes], "PageRank", "diamond", "var(--ink)", drawn),
        _score([node.betweenness for node in nodes], "betweenness", "circle", ACCENT, drawn),
    ]
    chart = bar_chart(drawn, "share of critical seconds", tickformat=".0%", domain=[0, 0.58])
    scored = axis(says="score, 0 to 1", domain=[0.72, 1], rangemode="tozero", nticks=3, tickangle=0)
    layout = {**chart["layout"], "xaxis2": scored, "showlegend": True, "legend": LEGEND}
    return {"data": [*chart["data"], *scores], "layout": layout, "height": chart["height"] + 24}


def _score(values: Sequence[float], name: str, symbol: str, colour: str, drawn: Sequence[Bar]) -> dict[str, Any]:
    given = mark(values, name, symbol, [bar.hover for bar in drawn])
    look = {"symbol": symbol, "size": 9, "color": colour, "line": {"color": "var(--panel)", "width": 1}}
    return given | {"xaxis": "x2", "marker": look}


def failures(answer: Answer, about: About) -> Figure:
    """Where errors began, by how many they were."""
    origins = sorted(rows(answer.tables["origins"]), key=lambda each: -each.errors)
    drawn = [
        Bar(
            f"{each.error} · {each.engine or each.span}",
            each.errors,
            f"{units.count(each.errors)}, {units.count(each.failed_requests)} failed",
            hover(
                each.error,
                at=f"{each.span} {each.engine}",
                errors=units.count(each.errors),
                requests=units.count(each.requests),
                failed_requests=units.count(each.failed_requests),
                lost=units.seconds(each.lost_s),
                from_to=f"{units.clock(each.first_unix_nano)} to {units.clock(each.last_unix_nano)} UTC",
            ),
            about.colour(each.engine, each.error, plain=WAIT),
        )
        for each in origins
    ]
    return bar_chart(drawn, "errors")
