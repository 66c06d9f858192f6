"""Evidence: one request's spans, drawn as the live page draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import rows
from lltm_ray.analytics.units import plain

KINDS = {
    "request": "server",
    "attempt": "client",
    "route": "route",
    "queue": "queue",
    "prefill": "prefill",
    "decode": "decode",
}
"""Span -> the class that colours it; the rest is `other`."""
_LEVEL_PX = 26
_MOST_SPANS = 300


def flame(frame: Any) -> str:
    """Spans of one trace: span, depth, start_s, end_s, engine, error."""
    spans = list(rows(frame))[:_MOST_SPANS]
    if not spans:
        return '<p class="empty">Its spans had left memory before they were read.</p>'
    start = min(0.0, *(span.start_s for span in spans)) if len(spans) > 1 else min(0.0, spans[0].start_s)
    length = max(max(span.end_s for span in spans) - start, 1e-6)
    height = (max(int(span.depth) for span in spans) + 1) * _LEVEL_PX
    bars = "".join(_bar(span, start, length) for span in sorted(spans, key=lambda span: (span.depth, span.start_s)))
    says = escape(", ".join(f"{plain(span.span)} {units.seconds(span.end_s - span.start_s)}" for span in spans[:12]))
    left_out = f'<p class="note">{len(frame) - _MOST_SPANS} more spans are not drawn.</p>' * (len(frame) > _MOST_SPANS)
    return (
        f'<div class="flame" role="img" aria-label="Spans: {says}">{_ticks(start, length)}'
        f'<div class="bars" style="height:{height}px">{bars}</div></div>{left_out}'
    )


def took(frame: Any) -> float:
    """Seconds from the first span's begin to the last one's end."""
    spans = list(rows(frame))
    return max(span.end_s for span in spans) - min(span.start_s for span in spans) if spans else 0.0


def _bar(span: Any, start: float, length: float) -> str:
    left, width = (span.start_s - start) / length * 100, (span.end_s - span.start_s) / length * 100
    name, lasted = plain(span.span), units.seconds(span.end_s - span.start_s)
    about = f"{name}, {lasted}, from {units.seconds(span.start_s)}"
    about += f", {plain(span.engine)}" * bool(span.engine) + f", error: {plain(span.error)}" * bool(span.error)
    shown = plain(span.engine) if name == "attempt" and span.engine else name
    return (
        f'<span class="span {KINDS.get(name, "other")}{" is-error" if span.error else ""}" title="{escape(about)}" '
        f'style="left:{left:.3f}%;width:{max(width, 0):.3f}%;top:{int(span.depth) * _LEVEL_PX}px">'
        f"{escape(shown)} <b>{lasted}</b></span>"
    )


def _ticks(start: float, length: float) -> str:
    marks = "".join(
        f'<span style="left:{(at - start) / length * 100:.3f}%">{units.seconds(at) if at else "0"}</span>'
        for at in _round_steps(start, length)
    )
    return f'<div class="ticks" aria-hidden="true">{marks}</div>'


def _round_steps(start: float, length: float) -> Iterator[float]:
    """About five."""
    size = 10.0 ** _floor_log10(length / 5)
    step = next(each * size for each in (1, 2, 5, 10) if each * size >= length / 5)
    at = -(-start // step)
    while at * step <= start + length:
        yield at * step
        at += 1


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def legend(kinds: Sequence[tuple[str, str]]) -> str:
    """What the colours mean."""
    marks = (f'<span><i class="swatch {kind}"></i>{escape(text)}</span>' for kind, text in kinds)
    return f'<p class="keys">{"".join(marks)}</p>'
