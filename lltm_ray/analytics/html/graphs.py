"""Charts of graphs: who calls whom, and which prompts begin alike. Layouts are ours: layers from left to right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lltm_ray.analytics import units
from lltm_ray.analytics.answer import Answer, rows
from lltm_ray.analytics.html.figures import (
    BAD,
    HEAT,
    HELD,
    HOVER,
    MUTED,
    About,
    Figure,
    axis,
    colour_bar,
    figure,
    heading,
    hover,
    label,
    mix,
    natural,
)

KINDS = ("client", "gateway", "engine", "slot", "gpu")
_MOST_IN_LAYER = 48
_SWEEPS = 6
_NODE_PX = 25
_WORST_RATIO = 0.1
"""So many errors are as red as it gets."""

Places = dict[str, tuple[float, float]]
Edge = tuple[str, str]


# --- who calls whom


def dependencies(answer: Answer, about: About) -> Figure:
    """Client to GPU; an edge is as wide as the seconds spent over it, and as red as its calls failed."""
    edges = sorted(rows(answer.tables["edges"]), key=lambda edge: -edge.seconds)
    weight: dict[str, float] = defaultdict(float)
    for edge in edges:
        weight[edge.source] += edge.seconds
        weight[edge.target] += edge.seconds
    nodes = [node for node in rows(answer.tables["nodes"]) if node.kind in KINDS]
    layers = [_heaviest([n.node for n in nodes if n.kind == kind], weight) for kind in KINDS]
    places = layered(layers, [(edge.source, edge.target) for edge in edges])
    drawn = [edge for edge in edges if edge.source in places and edge.target in places]
    most = max((edge.seconds for edge in drawn), default=1.0) or 1.0
    shapes = [_call(edge, places, most) for edge in reversed(drawn)]
    dots = [node for node in nodes if node.node in places]
    colours = [about.colour(node.node, short(node.node)) for node in dots]
    marks = _nodes(
        [places[node.node] for node in dots],
        [label(short(node.node), 22) for node in dots],
        [_node(node) for node in dots],
        {"size": 11, "color": colours, "line": {"color": "var(--panel)", "width": 2}},
    )
    heads = [
        {**heading(_head(kind, len(layers[at]), nodes), 1.0), "x": at, "xref": "x", "xanchor": "center"}
        for at, kind in enumerate(KINDS)
        if layers[at]
    ]
    tallest = max(map(len, layers), default=1)
    return figure(
        [_middles(drawn, places), marks | {"textposition": "top center"}],
        max(300, 70 + _NODE_PX * tallest),
        shapes=shapes,
        annotations=heads,
        xaxis=axis(visible=False, range=[-0.3, len(KINDS) - 0.65]),
        yaxis=axis(visible=False, range=[1.02, -0.02]),
        margin={"l": 8, "r": 8, "t": 24, "b": 8},
    )


def _head(kind: str, drawn: int, nodes: Sequence[Any]) -> str:
    there = sum(node.kind == kind for node in nodes)
    return kind if there == drawn else f"{kind}, the busiest {drawn} of {there}"


def _nodes(
    places: Sequence[tuple[float, float]], names: Sequence[str], says: Sequence[str], marker: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [x for x, _ in places],
        "y": [y for _, y in places],
        "text": list(names),
        "textposition": "middle right",
        "textfont": {"size": 11, "color": "var(--ink)"},
        "marker": dict(marker),
        "hovertext": list(says),
        "cliponaxis": False,
        **HOVER,
    }


def short(node: str) -> str:
    """Without its kind, which its layer tells."""
    kind, _, name = str(node).partition(" ")
    return name if name and kind in (*KINDS, "tenant") else str(node)


def _heaviest(names: Iterable[str], weight: Mapping[str, float]) -> list[str]:
    return sorted(names, key=lambda name: -weight.get(name, 0.0))[:_MOST_IN_LAYER]


def _call(edge: Any, places: Places, most: float) -> dict[str, Any]:
    colour = mix(BAD, edge.error_ratio / _WORST_RATIO, HELD) if edge.error_ratio > 0 else HELD
    width = 1 + 9 * (max(edge.seconds, 0.0) / most) ** 0.5
    return _curve(places[edge.source], places[edge.target], colour, width)


def _node(node: Any) -> str:
    return hover(node.node, kind=node.kind, requests=units.count(node.requests), errors=units.count(node.errors))


def _middles(edges: Sequence[Any], places: Places) -> dict[str, Any]:
    """Where the pointer finds an edge."""
    at = [(places[edge.source], places[edge.target]) for edge in edges]
    says = [
        hover(
            f"{short(edge.source)} → {short(edge.target)}",
            calls=units.count(edge.calls),
            total=units.seconds(edge.seconds),
            p50=units.seconds(edge.p50_s),
            p95=units.seconds(edge.p95_s),
            errors=units.percent(edge.error_ratio),
        )
        for edge in edges
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [(one[0] + other[0]) / 2 for one, other in at],
        "y": [(one[1] + other[1]) / 2 for one, other in at],
        "marker": {"size": 14, "opacity": 0},
        "hovertext": says,
        **HOVER,
    }


def _curve(start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> dict[str, Any]:
    middle = (start[0] + end[0]) / 2
    path = f"M{start[0]:g},{start[1]:.4g}C{middle:g},{start[1]:.4g} {middle:g},{end[1]:.4g} {end[0]:g},{end[1]:.4g}"
    return {"type": "path", "path": path, "layer": "below", "line": {"color": colour, "width": round(width, 1)}}


def layered(layers: Sequence[Sequence[str]], edges: Sequence[Edge]) -> Places:
    """A place for each node: x is its layer, y is spread over 0..1 so that neighbours are near (barycentre method).

    Sugiyama, Tagawa, Toda: Methods for visual understanding of hierarchical system structures (1981).
    """
    near: dict[str, list[str]] = defaultdict(list)
    for source, target in edges:
        near[source].append(target)
        near[target].append(source)
    orders = [sorted(layer, key=natural) for layer in layers]
    y = {name: place for order in orders for name, place in _spread(order).items()}

    def middle(name: str) -> tuple[float, str]:
        around = [y[other] for other in near[name] if other in y]
        return (sum(around) / len(around) if around else y[name], name)

    for sweep in range(_SWEEPS):
        for order in orders if sweep % 2 == 0 else reversed(orders):
            order.sort(key=middle)
            y.update(_spread(order))
    return {name: (float(at), y[name]) for at, order in enumerate(orders) for name in order}


def _spread(order: Sequence[str]) -> dict[str, float]:
    return {name: (place + 0.5) / len(order) for place, name in enumerate(order)}


# --- which prompts begin alike


def prefixes(answer: Answer, about: About) -> Figure:
    """Families of prompts by what they begin with: larger for requests, hotter for what was computed in vain."""
    families = {str(row.family): row for row in rows(answer.tables["families"])}
    links = [(str(row.parent), str(row.child)) for row in rows(answer.tables["links"])]
    links = [(parent, child) for parent, child in links if parent in families and child in families]
    places = forest(list(families), links)
    wasted = [_wasted(row) for row in families.values()]
    marks = _nodes(
        [places[name] for name in families],
        [label(name, 10) for name in families],
        [_family(row, share) for row, share in zip(families.values(), wasted, strict=True)],
        _sizes(list(families.values()), wasted, about),
    )
    curves = [_curve(places[parent], places[child], HELD, 1.5) for parent, child in links]
    deepest = max((at for at, _ in places.values()), default=0.0)
    leaves = max((row for _, row in places.values()), default=0.0)
    return figure(
        [marks],
        max(260, 60 + int(34 * (leaves + 1))),
        shapes=curves,
        xaxis=axis(visible=False, range=[-0.2, deepest + 0.6]),
        yaxis=axis(visible=False, range=[leaves + 0.7, -0.7]),
    )


def _sizes(families: Sequence[Any], wasted: Sequence[float], about: About) -> dict[str, Any]:
    most = max((row.requests for row in families), default=1) or 1
    named = [str(row.family) in about.named for row in families]
    return {
        "size": [9 + 26 * (row.requests / most) ** 0.5 for row in families],
        "color": list(wasted),
        "colorscale": HEAT,
        "cmin": 0,
        "cmax": max(0.25, *wasted, 0.0),
        "opacity": 1,
        "line": {"color": [BAD if each else MUTED for each in named], "width": [3 if each else 1 for each in named]},
        "colorbar": colour_bar("computed though held", tickformat=".0%"),
    }


def _wasted(row: Any) -> float:
    return float(row.wasted_tokens / row.prompt_tokens) if row.prompt_tokens > 0 else 0.0


def _family(row: Any, wasted: float) -> str:
    return hover(
        row.family,
        begins_alike_for=f"{units.count(row.depth_tokens)} tokens",
        requests=units.count(row.requests),
        cached=f"{units.count(row.cached_tokens)} tokens",
        computed_though_held=f"{units.count(row.wasted_tokens)} tokens, {units.percent(wasted)} of its prompts",
        best_engine=str(row.best_engine),
    )


def forest(names: Sequence[str], links: Sequence[Edge]) -> Places:
    """A place for each node: x is how deep below its root; y a row of its own for a leaf, else between its children."""
    children: dict[str, list[str]] = defaultdict(list)
    for parent, child in links:
        children[parent].append(child)
    below = {child for _, child in links}
    places: Places = {}
    leaf = 0
    stack = [(name, 0, False) for name in reversed(names) if name not in below]
    while stack:
        name, depth, is_back = stack.pop()
        if is_back:
            rows_below = [places[child][1] for child in children[name] if child in places]
            places[name] = (float(depth), (min(rows_below) + max(rows_below)) / 2)
        elif name not in places:
            places[name] = (float(depth), float(leaf))
            if children[name]:
                stack += [(name, depth, True), *((child, depth + 1, False) for child in reversed(children[name]))]
            else:
                leaf += 1
    return places | {
        name: (0.0, float(leaf + n)) for n, name in enumerate(each for each in names if each not in places)
    }
