"""What `lltm-ray top` draws of one look; the terminal's twin of the live page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lltm_ray.cli._output import human_bytes

NOTHING = "–"
_SLOT_CELLS = 8
_MOST_BARS = 8
"""Slots of an engine that get a bar each; more get one character each."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
_ENDLESS = 10_000
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)))
_Row = dict[str, Any]
_ENGINE_COLUMNS = (
    *("engine", "model", ">busy", "slots", ">generates", ">reads", ">CPU"),
    *(">memory", ">GPU memory", ">energy"),
)
_GPU_COLUMNS = ("machine", ">GPU", "name", ">utilization", ">memory", ">power", ">temperature", "slowed by")
_REQUEST_COLUMNS = (
    *("time", "request", "status", "model", "engine/slot", ">tries", ">prompt tok", ">cached tok", ">out tok"),
    *(">wait", ">first token", ">total"),
)


def draw(look: _Row, *, most_requests: int = 20) -> RenderableType:
    """A look as rich shows it.

    Args:
        look: as `/dashboard/events` sends it.
        most_requests: rows of the table of recent requests.
    """
    blank = Text()
    parts: list[RenderableType] = [_now(look), _since(look), blank, _times(look), blank, _engines(look), blank]
    return Group(*parts, *_gpus(look), blank, _recent(look["recent"][:most_requests]))


# --- parts


def _now(look: _Row) -> Figures:
    rates, queues = look["rates"], look["queues"]
    computed = rates["input_tokens_s"] - rates["cached_tokens_s"]
    figures = [
        ("requests", f"{rate(rates['requests_s'])} per s"),
        ("generated", f"{rate(rates['output_tokens_s'])} tok/s"),
        ("prompts", f"{rate(rates['cached_tokens_s'])} cached + {rate(computed)} computed tok/s"),
        ("reuse", percent(look["reuse_ratio"])),
        ("waiting", count(sum(each["waiting"] for each in queues)) if queues else NOTHING),
        ("running", count(sum(each["running"] for each in queues)) if queues else NOTHING),
    ]
    return Figures(figures)


def _since(look: _Row) -> Figures:
    totals = look["totals"]
    names = {"requests": "requests", "errors": "errors", "rejected": "rejected", "failovers": "taken over"}
    tokens = {"input_tokens": "prompt tok", "cached_tokens": "cached tok", "output_tokens": "generated tok"}
    figures = [(text, count(totals.get(name, 0))) for name, text in (names | tokens).items()]
    energy = look.get("energy", {}).get("engines", [])
    used = sum(each["tokens"] for each in energy)
    joules = sum(each["joules"] for each in energy)
    return Figures([*figures, ("energy", joules_per_token(joules, used))], "since start: ")


def _times(look: _Row) -> Fitted:
    errors = sorted(look["errors"].items(), key=lambda each: -each[1])
    told = [f"{number:,} {plain(kind)}" for kind, number in errors] or ["none"]
    lines = (told[0], *told[1:2], "") if len(told) < 3 else (told[0], told[1], ", ".join(told[2:]))
    names = (("total time", "latency_s"), ("time to first token", "ttft_s"), ("wait for a slot", "queue_s"))
    rows: list[list[str | Text]] = [
        [text, *(seconds(look[name][each]) for each in ("p50", "p95", "p99")), Text(line, "red" if errors else "dim")]
        for (text, name), line in zip(names, (*lines, "")[:3], strict=True)
    ]
    return Fitted(f"last {look['window_s']:.0f} s", ("", ">p50", ">p95", ">p99", "errors"), rows)


def _engines(look: _Row) -> Fitted:
    energy = {(each["engine"], each["model"]): each for each in look.get("energy", {}).get("engines", [])}
    title = "engines" if look["engines"] else "engines: none has told of itself"
    rows = [_engine_cells(each, energy.get((each["engine"], each["model"]), {})) for each in look["engines"]]
    return Fitted(title, _ENGINE_COLUMNS, rows, ("GPU memory", "reads", "memory", "model", "CPU", "energy"))


def _engine_cells(engine: _Row, used: _Row) -> list[str | Text]:
    return [
        Text(plain(engine["engine"]), "bold"),
        plain(engine["model"]),
        f"{engine['slots_busy']}/{engine['slots_total']}",
        slot_bars(engine["slots"]),
        unit(engine["predicted_tokens_s"], "tok/s"),
        unit(engine["prompt_tokens_s"], "tok/s"),
        unit(engine["cpu_ratio"], "cores"),
        size(engine["memory_bytes"]),
        size(engine["gpu_memory_bytes"]),
        joules_per_token(used.get("joules", 0.0), used.get("tokens", 0)),
    ]


def _gpus(look: _Row) -> Iterator[RenderableType]:
    """GPUs, and of each machine without one the reason."""
    if look["gpus"]:
        yield Fitted("GPUs", _GPU_COLUMNS, [_gpu_cells(gpu) for gpu in look["gpus"]], ("name", "temperature"))
    having = {gpu["node"] for gpu in look["gpus"]}
    for node in look["nodes"]:
        if node["node"] not in having:
            yield Text(f"{plain(node['node'])} has no GPU: {plain(node['gpu_reason']) or 'none was told of'}", "dim")


def _gpu_cells(gpu: _Row) -> list[str | Text]:
    slowed = ", ".join(gpu["throttle"]).replace("_", " ")
    return [
        plain(gpu["node"]),
        str(gpu["gpu"]),
        plain(gpu["name"]),
        percent(gpu["utilization_ratio"]),
        f"{size(gpu['memory_used_bytes'])} of {size(gpu['memory_total_bytes'])}",
        f"{whole(gpu['power_w'], 'W')} of {whole(gpu['power_limit_w'], 'W')}",
        whole(gpu["temperature_c"], "°C"),
        Text(slowed or NOTHING, "red" if slowed else ""),
    ]


def _recent(rows: Sequence[_Row]) -> Fitted:
    title = "recent requests" if rows else "recent requests: none has ended yet"
    drop = ("tries", "model", "cached tok", "wait", "prompt tok", "first token")
    cells = [[Text(cell, "red" if row["error_type"] else "") for cell in _request_cells(row)] for row in rows]
    return Fitted(title, _REQUEST_COLUMNS, cells, drop)


def _request_cells(row: _Row) -> list[str]:
    slot = row["slot"] if row["slot"] >= 0 else NOTHING
    status = "left" if row["status"] == 0 else str(row["status"])
    return [
        f"{datetime.fromtimestamp(row['arrived_unix_nano'] / 1e9, UTC).astimezone():%H:%M:%S}",
        plain(row["request_id"]),
        f"{status} {plain(row['error_type'])}".rstrip() if row["error_type"] != status else status,
        plain(row["model"]) or NOTHING,
        f"{plain(row['engine'])}/{slot}" if row["engine"] else "none",
        *(count(row[name]) for name in ("attempts", "input_tokens", "cached_tokens", "output_tokens")),
        *(seconds(row[name]) for name in ("queue_s", "ttft_s", "total_s")),
    ]


def slot_bars(slots: Sequence[_Row]) -> Text:
    """What each slot holds of its context: a bar each, or one character each where they are many."""
    bars = Text()
    for slot in slots:
        held = min((slot["prompt_tokens"] + slot["decoded_tokens"]) / max(slot["n_ctx"], 1), 1.0)
        style = "cyan" if slot["is_processing"] else "bright_black"
        if len(slots) > _MOST_BARS:
            bars.append(_LEVELS[round(held * (len(_LEVELS) - 1))], style)
            continue
        bars.append(_bar(held), f"{style} on grey15")
        bars.append(" ")
    return bars


def _bar(ratio: float) -> str:
    eighths = round(ratio * _SLOT_CELLS * 8)
    full, rest = divmod(max(eighths, 1) if ratio else 0, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_SLOT_CELLS)


# --- words


class Fitted:
    """A table that gives up columns where it would not fit, instead of cutting all of them short.

    Args:
        title: above it.
        columns: names; one that starts with `>` is set to the right.
        rows: cells; text is shown as it is, without markup.
        drop: columns to do without, first one first.
    """

    def __init__(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], drop: Sequence[str] = ()
    ) -> None:
        self._title, self._columns, self._rows, self._drop = title, columns, rows, drop

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for number in range(len(self._drop) + 1):
            table = self._build(self._drop[:number])
            if console.measure(table, options=options.update_width(_ENDLESS)).maximum <= options.max_width:
                break
        yield table

    def _build(self, dropped: Sequence[str]) -> Table:
        title = Text(self._title, "bold")
        table = Table(
            title=title, title_justify="left", header_style="dim", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        kept = [at for at, name in enumerate(self._columns) if name.removeprefix(">") not in dropped]
        for name in (self._columns[at] for at in kept):
            justify: Literal["left", "right"] = "right" if name.startswith(">") else "left"
            table.add_column(name.removeprefix(">"), justify=justify, no_wrap=True)
        for row in self._rows:
            table.add_row(*(cell if isinstance(cell := row[at], Text) else Text(cell) for at in kept))
        return table


class Figures:
    """Names and values in as many lines as they need, none of them broken in two.

    Args:
        figures: names and values.
        start: before them.
    """

    def __init__(self, figures: Iterable[tuple[str, str]], start: str = "") -> None:
        told = (Text.assemble((f"{name} ", "dim"), (value, "bold"), "   ") for name, value in figures)
        self._parts = [Text(start, "dim"), *told]

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        line = Text()
        for part in self._parts:
            if line.cell_len + part.cell_len > options.max_width:
                yield line
                line = Text()
            line.append_text(part)
        yield line


def plain(text: str) -> str:
    """A name that a client made, without what a terminal would take for a command."""
    return text.translate(_CONTROLS)


def _known(form: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: NOTHING if value is None else form(value)


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.{1 if value >= 9.995 else 2}f}"


rate = _known(_digits)
count = _known("{:,}".format)
percent = _known("{:.1%}".format)
size = _known(human_bytes)
seconds = _known(
    lambda value: f"{value * 1000:.{1 if value < 0.00995 else 0}f} ms" if value < 0.9995 else f"{value:.2f} s"
)


def unit(value: float | None, name: str) -> str:
    """Three digits and a unit."""
    return NOTHING if value is None else f"{_digits(value)} {name}"


def whole(value: float | None, name: str) -> str:
    """A whole number and a unit."""
    return NOTHING if value is None else f"{value:.0f} {name}"


def joules_per_token(joules: float, tokens: float) -> str:
    """A dash where none were measured."""
    return f"{1000 * joules / tokens:,.3g} mJ/tok" if joules and tokens else NOTHING
