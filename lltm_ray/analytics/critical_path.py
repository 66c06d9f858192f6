"""What bounds latency: the critical path of every request, walked backwards from its end.

From a span's end the walk goes to the child that finished last, follows it to its start, from there to the child that
finished last before, and so on; what no child of the walk covers is the span's own (as CRISP, Zhang et al., USENIX ATC
2022). Children reach no further than their parents. A request is the root of its own path, also where a span called it.

All trees are walked at once, a level of depth at a time, in whole nanoseconds: a request's parts sum to its latency.
"""

from __future__ import annotations

from typing import Any

from lltm_ray.analytics.answer import Answer, Finding, rows, table
from lltm_ray.analytics.frames import Array, Engine, Frame
from lltm_ray.analytics.trace import ATTEMPT, QUEUE, REQUEST, ROUTE, Trace
from lltm_ray.analytics.turned_away import REFUSED
from lltm_ray.analytics.units import count, percent, seconds

NAME = "critical path"
TOUCH_NS = 1000
"""A span that ends at most so long after the next one's start is before it: the times are sums of rounded floats, and
a route's end and its attempt's start are one event."""
WAITING = ("route", "queue")
"""Phases in which a request waits for a slot: at the gateway, and in llama-server."""
LONG_SHARE = 0.3
"""Busy fleets wait: by M/M/c, 16 slots so much at 91 % load and 4 at 72 %; beyond, it grows without a bound."""
LONG_WAIT_RATIO, LONG_WAIT_S = 1.0, 0.1
"""95th percentile of waits, over the mean time without waiting: nobody notices shorter ones beside an answer."""
FEWEST_REQUESTS = 50
"""Under so many the 95th percentile is one or two requests."""
_OWN = {REQUEST: "gateway", ATTEMPT: "engine other"}
"""Own time of these spans goes by another name than theirs."""
_MOST_PHASES, _MOST_ROWS, _MOST_EVIDENCE = 60, 300, 5


def analyze(trace: Trace) -> Answer:
    """Seconds of the critical path by phase and engine, and how much longer each kind of span could have taken."""
    walked = walk(trace)
    path = walked[(walked["is_on"] == 1) & (walked["own_s"] > 0)]
    parts = path.groupby(["r", "name"], sort=True).agg({"own_s": "sum"}).reset_index()
    phases, left_out = _phases(trace, parts)
    tables = {"phases": phases, "engines": _engines(trace, path), "slack": _slack(trace, walked)}
    return Answer(tables, {"phases_left_out": float(left_out), **_waits(trace, parts)})


def judge(answer: Answer) -> list[Finding]:
    """Waiting for slots, where it bounds latency. Which other phase does is no fault of itself."""
    told = answer.figures
    work_s = (told["path_s"] - told["wait_s"]) / max(told["requests"], 1.0)
    is_long = told["wait_p95_s"] > max(LONG_WAIT_RATIO * work_s, LONG_WAIT_S)
    if told["requests"] < FEWEST_REQUESTS or told["wait_share"] <= LONG_SHARE or not is_long:
        return []
    of = {row.phase: row for row in rows(answer.tables["phases"])}
    waits = sorted((of[name] for name in WAITING if name in of), key=lambda row: -row.seconds)
    where = "at the gateway" if waits[0].phase == "route" else "in llama-server"
    text = (
        f"Waiting for a slot takes {percent(told['wait_share'])} of the time of {count(told['requests'])} requests, "
        f"most of it {where}: half of them wait over {seconds(told['wait_p50_s'])}, one in twenty over "
        f"{seconds(told['wait_p95_s'])}."
    )
    advice = "Start more engines (`lltm-ray up --engines N`, or a higher `max_engines`)"
    advice += ", or give each more slots (`--n-parallel N`) where its memory and speed allow."
    figures = {name: told[name] for name in ("requests", "wait_share", "wait_s", "wait_p50_s", "wait_p95_s")}
    found = Finding(
        kind="waiting",
        subject="slots",
        text=text,
        advice=advice,
        impact_s=told["wait_s"],
        figures=figures,
        evidence=waits[0].evidence,
    )
    return [found]


def walk(trace: Trace) -> Frame:
    """Every span of positive length at or below a request.

    Returns:
        s, r: of the request it is below; name, engine: codes; is_on: 1 on the critical path; own_s: seconds of it that
        no child on its own way covers; slack_s: how much longer it could have taken without a change of the path.
    """
    xp, spans = trace.engine.xp, trace.spans
    of = {name: trace.engine.array(spans[name]) for name in ("parent", "r", "a", "name", "engine", "start_s", "end_s")}
    is_request = (of["r"] >= 0) & (of["a"] < 0)
    root, depth = _roots(xp, of["parent"], is_request)
    times = (xp.rint(of[name] * 1e9).astype("int64") for name in ("start_s", "end_s"))
    trees = _Trees(trace.engine, of["parent"], *times)
    below = xp.flatnonzero(is_request[root])
    order = below[xp.argsort(depth[below], kind="stable")]
    done = 0
    for level, size in enumerate(xp.bincount(depth[below]).tolist() if len(below) else ()):
        trees.enter(order[done : done + size], is_root=level == 0)
        done += size
    own = trees.own()
    s = order[trees.end[order] > trees.begin[order]]
    return trace.engine.frame(
        {
            "s": s,
            "r": of["r"][root[s]],
            **{name: of[name][s] for name in ("name", "engine")},
            "is_on": trees.is_on[s].astype("int64"),
            "own_s": own[s] / 1e9,
            "slack_s": trees.slack[s] / 1e9,
        }
    )


def _roots(xp: Any, parent: Array, is_request: Array) -> tuple[Array, Array]:
    """The request above each span, and the steps to it; any other span where there is none, also in a ring."""
    here = xp.arange(len(parent))
    up = xp.where(is_request | (parent < 0), here, parent)
    depth = (up != here).astype("int64")
    for _ in range(len(parent).bit_length()):  # each time twice as far
        further = up[up]
        if bool((further == up).all()):
            break
        depth, up = depth + depth[up], further
    return up, depth


class _Trees:
    """What the walk knows of all spans; times are nanoseconds, cut to those of the spans above."""

    def __init__(self, engine: Engine, parent: Array, begin: Array, end: Array) -> None:
        xp = self.xp = engine.xp
        self._engine, self.parent = engine, parent
        self.begin, self.end = begin, end
        self.slack = xp.zeros(len(parent), dtype="int64")
        self.is_on = xp.zeros(len(parent), dtype=bool)
        self._is_taken = xp.zeros(len(parent), dtype=bool)
        """On its parent's own way."""
        self._line = xp.zeros(len(parent), dtype="int64")
        """Where each span's time begins on a line on which those of a level lie end to end: one sort orders all."""

    def enter(self, s: Array, *, is_root: bool) -> None:
        """Walk through a level's spans, after those above."""
        if is_root:
            self.is_on[s] = True
        else:
            s = self._cut(s)
            s = self._siblings(s) if len(s) else s
        length = self.end[s] - self.begin[s]
        self._line[s] = self.xp.cumsum(length) - length

    def own(self) -> Array:
        """What no child on its own way covers of each span."""
        length = self.end - self.begin
        taken = self.xp.flatnonzero(self._is_taken)
        if not len(taken):
            return length
        weights = length[taken].astype("float64")  # their sums are whole, and exact up to 100 days
        return length - self.xp.bincount(self.parent[taken], weights=weights, minlength=len(length))

    def _cut(self, s: Array) -> Array:
        """To the parent's time; those of which something is left."""
        low, high = self.begin[self.parent[s]], self.end[self.parent[s]]
        begin, end = self.xp.clip(self.begin[s], low, high), self.xp.clip(self.end[s], low, high)
        self.begin[s], self.end[s] = begin, end
        return s[end > begin]

    def _siblings(self, s: Array) -> Array:
        """Find each parent's way through its children."""
        xp = self.xp
        shift = self._line[self.parent[s]] - self.begin[self.parent[s]]
        begin, end = self.begin[s] + shift, self.end[s] + shift
        order = xp.lexsort(xp.stack([-begin, end]))  # of those that end together the longest is the last
        s, shift, begin, end = s[order], shift[order], begin[order], end[order]
        parent = self.parent[s]
        is_taken = _way(xp, parent, begin, end)
        at = xp.flatnonzero(is_taken)
        later = xp.cumsum(is_taken) - is_taken  # each one's place in `at`, or that of the taken one that outlasts it
        self.slack[s] = self.slack[parent] + end[at][later] - end
        self.is_on[s] = is_taken & self.is_on[parent]
        self._is_taken[s] = is_taken
        is_followed = xp.flatnonzero(parent[at[1:]] == parent[at[:-1]])
        back = self._engine.frame({"at": begin[at][::-1]})  # where the walk is after each, from the end on: they touch
        reached = self._engine.array(back["at"].cummin())[::-1]
        end[at[is_followed]] = xp.minimum(end[at], xp.concatenate([reached[1:], reached[-1:]]))[is_followed]
        begin[at] = reached
        self.end[s] = end - shift
        self.begin[s] = xp.minimum(begin, end) - shift
        return s


def _way(xp: Any, parent: Array, begin: Array, end: Array) -> Array:
    """Which children the walk takes, of those sorted by their end on the line."""
    size = len(end)
    nowhere = xp.full(1, size)
    before = xp.minimum(xp.searchsorted(end, begin + TOUCH_NS, side="right"), xp.arange(size)) - 1
    is_sibling = (before >= 0) & (parent[before] == parent)
    jump = xp.concatenate([xp.where(is_sibling, before, nowhere), nowhere])
    is_taken = xp.concatenate([parent[1:] != parent[:-1], xp.ones(2, dtype=bool)])  # the last of each; and `nowhere`
    for _ in range(size.bit_length()):  # each time twice as far
        if bool((jump == size).all()):
            break
        is_taken[jump[is_taken]] = True
        jump = jump[jump]
    return is_taken[:size]


def _phase(trace: Trace, names: Any) -> list[str]:
    return [_OWN.get(code, trace.names.of("span", code)) for code in names]


def _phases(trace: Trace, parts: Frame) -> tuple[Any, int]:
    """The table, and how many of the shortest phases it leaves out."""
    host = trace.engine.host
    found = host(parts.groupby("name", sort=True).agg({"own_s": "sum"}).reset_index())
    found = found.merge(host(trace.engine.quantiles(parts, ["name"], "own_s", [0.5, 0.95])), on="name")
    total = max(float(found["own_s"].sum()), 1e-9)
    shown = found.sort_values(["own_s", "name"], ascending=[False, True]).head(_MOST_PHASES)
    evidence = _longest(trace, parts)
    columns = {
        "phase": _phase(trace, shown["name"]),
        "seconds": shown["own_s"].tolist(),
        "share": (shown["own_s"] / total).tolist(),
        "p50_s": shown["q50"].tolist(),
        "p95_s": shown["q95"].tolist(),
        "requests": shown["count"].tolist(),
        "evidence": [evidence[code] for code in shown["name"]],
    }
    return table(columns), len(found) - len(shown)


def _longest(trace: Trace, parts: Frame) -> dict[int, tuple[str, ...]]:
    """Phase -> the requests in which it took the longest."""
    xp, array = trace.engine.xp, trace.engine.array
    name, own = array(parts["name"]), array(parts["own_s"])
    if not len(name):
        return {}
    order = xp.lexsort(xp.stack([-own, name.astype("float64")]))
    name = name[order]
    is_shown = xp.arange(len(name)) - xp.searchsorted(name, name) < _MOST_EVIDENCE
    ids = trace.evidence(array(parts["r"])[order[is_shown]].tolist())
    found: dict[int, tuple[str, ...]] = {}
    for code, id_ in zip(name[is_shown].tolist(), ids, strict=True):
        found[code] = (*found.get(code, ()), id_)
    return found


def _engines(trace: Trace, path: Frame) -> Any:
    """Without what is the gateway's own."""
    on_one = path[path["engine"] >= 0]
    found = trace.engine.host(on_one.groupby(["engine", "name"], sort=True).agg({"own_s": "sum"}).reset_index())
    shown = found.sort_values(["own_s", "engine", "name"], ascending=[False, True, True]).head(_MOST_ROWS)
    columns = {
        "engine": trace.names.decode("engine", shown["engine"]),
        "phase": _phase(trace, shown["name"]),
        "seconds": shown["own_s"].tolist(),
    }
    return table(columns)


def _slack(trace: Trace, walked: Frame) -> Any:
    below = walked[walked["name"] != REQUEST]
    found = trace.engine.host(trace.engine.quantiles(below, ["name"], "slack_s", [0.5, 0.95]))
    shown = found.sort_values(["count", "name"], ascending=[False, True]).head(_MOST_PHASES)
    columns = {
        "phase": trace.names.decode("span", shown["name"]),
        "p50_s": shown["q50"].tolist(),
        "p95_s": shown["q95"].tolist(),
        "spans": shown["count"].tolist(),
    }
    return table(columns)


def _waits(trace: Trace, parts: Frame) -> dict[str, float]:
    """How long requests waited for slots; those that did not at all count too, those that were refused do not."""
    xp, column = trace.engine.xp, trace.engine.array
    is_served = column(trace.requests["status"]) != REFUSED
    r, name, own = (column(parts[each]) for each in ("r", "name", "own_s"))
    own = own * is_served[r]
    waited = own * ((name == ROUTE) | (name == QUEUE))
    every = xp.bincount(r, weights=waited, minlength=len(is_served)) if len(r) else xp.zeros(len(is_served))
    waits, requests = every[is_served], int(is_served.sum())
    p50, p95 = (float(xp.percentile(waits, q)) if requests else 0.0 for q in (50, 95))
    wait_s, path_s = float(waited.sum()), float(own.sum())
    return {
        "requests": float(requests),
        "path_s": path_s,
        "wait_s": wait_s,
        "wait_share": wait_s / path_s if path_s else 0.0,
        "wait_p50_s": p50,
        "wait_p95_s": p95,
    }
