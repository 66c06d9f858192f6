"""Charts of who does the work: engines, models, classes of requests, GPUs."""

from __future__ import annotations

from typing import Any

from lltm_ray.analytics import text, units
from lltm_ray.analytics.answer import Answer, rows
from lltm_ray.analytics.html.bars import BAR_PX, LEGEND, MOST_BARS, Bar, bar_chart, mark, or_zero
from lltm_ray.analytics.html.figures import (
    ACCENT,
    HOVER,
    SOFT,
    About,
    Figure,
    axis,
    figure,
    hover,
    mix,
    names_axis,
    numbers,
)

_MOST_GPUS = 12


def stragglers(answer: Answer, about: About) -> Figure:
    """How fast each engine decodes, and what its peers need."""
    engines = sorted(rows(answer.tables["engines"]), key=lambda each: -or_zero(each.decode_ms_token))[:MOST_BARS]
    drawn = [
        Bar(
            str(each.engine),
            each.decode_ms_token,
            f"{units.digits(each.decode_ms_token)} ms, {units.times(each.ratio)}",
            hover(
                each.engine,
                model=str(each.model),
                decode=f"{units.digits(each.decode_ms_token)} ms a token",
                peers=f"{units.digits(each.peers_ms_token)} ms a token",
                ratio=units.times(each.ratio),
                z=units.digits(each.z),
                requests=units.count(each.requests),
                lost=units.seconds(each.lost_s),
            ),
            about.colour(each.engine),
        )
        for each in engines
    ]
    peers = mark(
        [each.peers_ms_token for each in engines], "median of its peers", "line-ns", [bar.hover for bar in drawn]
    )
    return bar_chart(drawn, "milliseconds a generated token", [peers])


def utilization(answer: Answer, about: About) -> Figure:
    """How busy slots are, beside how long requests wait for one."""
    engines = sorted(rows(answer.tables["engines"]), key=lambda each: -or_zero(each.utilization))
    return bar_chart(
        [
            Bar(
                str(each.engine),
                each.utilization,
                units.percent(each.utilization),
                hover(
                    each.engine,
                    model=str(each.model),
                    utilization=units.percent(each.utilization),
                    slots=units.count(each.slots),
                    arrivals=f"{units.digits(each.arrivals_per_s)} a second",
                    service=units.seconds(each.service_s),
                    waits=units.seconds(each.wait_s),
                    expected_wait=units.seconds(each.expected_wait_s),
                    error_of_Littles_law=units.percent(each.little_error),
                ),
                about.colour(each.engine),
            )
            for each in engines
        ],
        "share of its slots' time in use",
        tickformat=".0%",
    )


def headroom(answer: Answer, about: About) -> Figure:
    """Arrivals of each model at its busiest, against its knee and what it can carry at most.

    On average where its busiest time is not told.
    """
    models = sorted(rows(answer.tables["models"]), key=_room)[:MOST_BARS]
    drawn = [
        Bar(
            str(each.model),
            each.busiest_per_s if units.is_known(each.busiest_per_s) else each.arrivals_per_s,
            _pace(each),
            hover(
                each.model,
                at_its_busiest=_at_its_busiest(each),
                arrivals=f"{units.digits(each.arrivals_per_s)} a second",
                knee=_knee(each),
                capacity=f"{units.digits(each.capacity_per_s)} a second",
                headroom=text.headroom(each, is_found=str(each.model) in about.named) + text.likely(each),
                wait_p95=units.seconds(each.wait_p95_s),
                rejected=units.count(each.rejected),
                slots=units.count(each.slots),
            ),
            about.colour(each.model),
        )
        for each in models
    ]
    says = [bar.hover for bar in drawn]
    knee = mark([each.knee_per_s for each in models], "knee: waits grow fast from here", "diamond", says)
    most = mark([each.capacity_per_s for each in models], "capacity", "line-ns", says)
    return bar_chart(drawn, "requests a second", [knee, most])


def _room(model: Any) -> tuple[bool, float]:
    """To sort by: least first, what is not known last."""
    return not units.is_known(model.headroom_ratio), or_zero(model.headroom_ratio)


def _knee(model: Any) -> str:
    """A second, with its range."""
    if text.is_seen(model):
        return f"{units.digits(model.knee_per_s)} a second or more"
    likely = f"{units.digits(model.knee_low_per_s)} to {units.digits(model.knee_high_per_s)}"
    return f"{units.digits(model.knee_per_s)} a second (likely {likely})"


def _pace(model: Any) -> str:
    if units.is_known(model.busiest_per_s):
        return f"{units.digits(model.busiest_per_s)} a second"
    return f"{units.digits(model.arrivals_per_s)} a second on average"


def _at_its_busiest(model: Any) -> str:
    if units.is_known(model.busiest_per_s):
        likely = f"{units.digits(model.busiest_low_per_s)} to {units.digits(model.busiest_high_per_s)} by chance"
        return f"{units.digits(model.busiest_per_s)} a second ({likely}) for {units.seconds(model.busiest_s)}"
    return "too few requests to tell"


def classes(answer: Answer, about: About) -> Figure:
    """Kinds of work by how many requests they are, and what these read and write."""
    found = sorted(rows(answer.tables["classes"]), key=lambda row: -row.share)
    drawn = [
        Bar(
            str(row.name),
            row.share,
            units.percent(row.share),
            hover(
                row.name,
                requests=units.count(row.requests),
                prompt=f"{units.count(row.prompt_p50)} tokens",
                cached=units.percent(row.cached_share),
                generated=f"{units.count(row.generated_p50)} tokens",
                first_token=units.seconds(row.ttft_p50_s),
                p50=units.seconds(row.p50_s),
                p95=units.seconds(row.p95_s),
            ),
            mix(ACCENT, or_zero(row.cached_share), SOFT),
        )
        for row in found
    ]
    return bar_chart(drawn, "share of requests", tickformat=".0%")


def energy(answer: Answer, about: About) -> Figure:
    """Joules for each generated token, by GPU."""
    gpus = sorted(rows(answer.tables["gpus"]), key=lambda each: -or_zero(each.joules_per_token))
    return bar_chart(
        [
            Bar(
                str(each.gpu),
                each.joules_per_token,
                units.joules(each.joules_per_token),
                hover(
                    each.gpu,
                    node=str(each.node),
                    engines=units.cell("engines", each.engines),
                    energy=units.joules(each.joules),
                    generated=f"{units.count(each.generated)} tokens",
                    in_prefill=units.percent(each.utilization_prefill),
                    in_decode=units.percent(each.utilization_decode),
                    slowed_down=f"{units.seconds(each.throttled_s)} {each.reasons}",
                ),
                about.colour(each.gpu),
            )
            for each in gpus
        ],
        "joules a generated token",
    )


def used(answer: Answer, about: About) -> Figure:
    """How busy each GPU was while its engines read prompts, and while they generated."""
    gpus = list(rows(answer.tables["gpus"]))[:_MOST_GPUS]
    names = [str(each.gpu) for each in gpus]
    pairs = (("reading prompts", "utilization_prefill", SOFT), ("generating", "utilization_decode", ACCENT))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": list(range(len(gpus))),
            "x": numbers(getattr(each, column) for each in gpus),
            "marker": {"color": colour},
            "hovertext": [hover(each.gpu, **{name: units.percent(getattr(each, column))}) for each in gpus],
            **HOVER,
        }
        for name, column, colour in pairs
    ]
    across = axis(says="utilization", tickformat=".0%", range=[0, 1.02])
    height = 94 + 2 * BAR_PX * max(len(gpus), 1)
    shown = {"showlegend": True, "legend": LEGEND, "barmode": "group", "bargap": 0.35}
    return figure(data, height, xaxis=across, yaxis=names_axis(names), **shown)
