"""The notebook's panels: a look at the fleet in, one Plotly figure drawn or brought up to date."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

HISTORY_S = 300
_HEIGHT_PX = 900
_LATENCIES: Final = {
    "latency p50": ("latency_s", "p50"),
    "latency p95": ("latency_s", "p95"),
    "latency p99": ("latency_s", "p99"),
    "first token p50": ("ttft_s", "p50"),
    "first token p95": ("ttft_s", "p95"),
}
_TABLE: Final[dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "ended": lambda each: _clock(each["arrived_unix_nano"] + each["total_s"] * 1e9),
    "model": lambda each: each["model"],
    "engine": lambda each: _slot_name(each["engine"], each["slot"]),
    "status": lambda each: each["error_type"] or each["status"],
    "input": lambda each: each["input_tokens"],
    "cached": lambda each: each["cached_tokens"],
    "output": lambda each: each["output_tokens"],
    "queue s": lambda each: _seconds(each["queue_s"]),
    "TTFT s": lambda each: _seconds(each["ttft_s"]),
    "total s": lambda each: _seconds(each["total_s"]),
    "request": lambda each: each["request_id"],
}
_SHOWN_REQUESTS = 20
_COLOURS: Final = {
    "requests/s": "#2563eb",
    "errors/s": "#dc2626",
    "tokens/s": "#0d9488",
    "latency p50": "#2563eb",
    "latency p95": "#7c3aed",
    "latency p99": "#c026d3",
    "first token p50": "#0d9488",
    "first token p95": "#65a30d",
    "utilization": "#2563eb",
    "memory": "#93c5fd",
    "busy": "#2563eb",
    "idle": "#cbd5e1",
}
_TITLES = (
    "requests/s and output tokens/s",
    "latency, s",
    "GPUs, %",
    "slots: context in use, % (busy ones blue)",
    "recent requests",
)
_NO_GPU = "no GPU"


class Panels:
    """Draws looks into one figure, and remembers what a look does not: how latency went.

    Args:
        figure_class: `plotly.graph_objects.FigureWidget`, which updates where it is shown, or `Figure`.
    """

    def __init__(self, figure_class: Any) -> None:
        self._times: deque[int] = deque(maxlen=HISTORY_S)
        self._latencies = {name: deque[float | None](maxlen=HISTORY_S) for name in _LATENCIES}
        self.figure = figure_class(_empty())
        self._traces = {trace.name: trace for trace in self.figure.data}

    def draw(self, look: Mapping[str, Any]) -> None:
        """Bring the figure up to date, all panels at once.

        Args:
            look: as `telemetry.live.Live.look` has it.
        """
        if not self._times or look["at_unix_nano"] > self._times[-1]:  # a gateway gives the same look for a second
            self._times.append(look["at_unix_nano"])
            for name, (what, quantile) in _LATENCIES.items():
                self._latencies[name].append(look[what][quantile])
        with self.figure.batch_update():
            self._draw_rates(look["history"])
            for name, values in self._latencies.items():
                self._set(name, x=_moments(self._times), y=list(values))
            self._draw_gpus(look["gpus"], look["nodes"])
            self._draw_slots(look["engines"])
            recent = look["recent"][:_SHOWN_REQUESTS]
            self._traces["recent"].cells.values = [[tell(each) for each in recent] for tell in _TABLE.values()]

    def _draw_rates(self, history: Mapping[str, Sequence[int]]) -> None:
        moments = _moments([second * 10**9 for second in history["unix_s"]])
        self._set("requests/s", x=moments, y=history["requests"])
        self._set("errors/s", x=moments, y=history["errors"])
        self._set("tokens/s", x=moments, y=history["output_tokens"])

    def _draw_gpus(self, gpus: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]]) -> None:
        labels = [f"{each['node']}:{each['gpu']}" for each in gpus]
        used = [_percent(each["memory_used_bytes"], each["memory_total_bytes"]) for each in gpus]
        self._set("utilization", x=labels, y=[_percent(each["utilization_ratio"], 1) for each in gpus])
        self._set("memory", x=labels, y=used, text=[_power(each) for each in gpus])
        reasons = sorted({each["gpu_reason"] for each in nodes if each["gpu_reason"]})
        for note in self.figure.layout.annotations:
            if note.name == _NO_GPU:
                note.text = "" if gpus else "; ".join(reasons) or _NO_GPU

    def _draw_slots(self, engines: Sequence[Mapping[str, Any]]) -> None:
        slots = [(_slot_name(engine["engine"], slot["slot"]), slot) for engine in engines for slot in engine["slots"]]
        self._set(
            "slots",
            x=[_percent(each["prompt_tokens"] + each["decoded_tokens"], each["n_ctx"]) for _, each in slots],
            y=[label for label, _ in slots],
            text=[each["request_id"] for _, each in slots],
            marker={"color": [_COLOURS["busy" if each["is_processing"] else "idle"] for _, each in slots]},
        )

    def _set(self, name: str, **values: Any) -> None:
        self._traces[name].update(values, overwrite=True)


def _empty() -> Any:
    """All panels without figures, as wide as where they are shown."""
    specs = [[{"secondary_y": True}, {}], [{}, {}], [{"type": "table", "colspan": 2}, None]]
    heights = {"row_heights": [0.3, 0.3, 0.4], "vertical_spacing": 0.09}
    figure: Any = make_subplots(rows=3, cols=2, specs=specs, subplot_titles=_TITLES, **heights)
    for name in ("requests/s", "errors/s"):
        figure.add_trace(_line(name), row=1, col=1)
    figure.add_trace(_line("tokens/s"), row=1, col=1, secondary_y=True)
    for name in _LATENCIES:
        figure.add_trace(_line(name, mode="lines+markers", marker_size=3), row=1, col=2)
    for name in ("utilization", "memory"):
        figure.add_trace(go.Bar(name=name, marker_color=_COLOURS[name]), row=2, col=1)
    figure.add_trace(go.Bar(name="slots", orientation="h", showlegend=False), row=2, col=2)
    widths = [2 if name in ("engine", "request") else 1 for name in _TABLE]
    figure.add_trace(go.Table(name="recent", header={"values": list(_TABLE)}, columnwidth=widths), row=3, col=1)
    figure.add_annotation(name=_NO_GPU, text="", showarrow=False, x=0.5, y=0.5, xref="x3 domain", yref="y4 domain")
    for axis in ("yaxis", "yaxis2", "yaxis3"):
        figure.layout[axis].rangemode = "tozero"
    figure.layout.yaxis4.range = figure.layout.xaxis4.range = (0, 100)
    figure.layout.yaxis5.update(type="category", autorange="reversed")
    margin = {"l": 40, "r": 20, "t": 40, "b": 20}
    figure.update_layout(template="plotly_white", barmode="group", height=_HEIGHT_PX, margin=margin, uirevision="kept")
    return figure


def _line(name: str, **options: Any) -> Any:
    return go.Scatter(name=name, line={"color": _COLOURS[name], "width": 1.5}, **{"mode": "lines"} | options)


def _moments(unix_nano: Sequence[int] | deque[int]) -> Any:
    return np.asarray(unix_nano, dtype="int64").astype("datetime64[ns]").astype("datetime64[ms]")


def _clock(unix_nano: float) -> str:
    return f"{np.datetime64(int(unix_nano), 'ns').astype('datetime64[s]')}"[-8:]


def _slot_name(engine: str, slot: int) -> str:
    return f"{engine}:{slot}" if slot >= 0 else engine


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100 * part / whole


def _power(gpu: Mapping[str, Any]) -> str:
    told = ((gpu["power_w"], "W"), (gpu["temperature_c"], "°C"))
    return " ".join(f"{value:.0f} {unit}" for value, unit in told if value is not None)
