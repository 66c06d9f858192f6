"""Tables in Markdown from the rows of all rounds: medians, and for what depends on the machine's mood, of differences
and ratios to `direct` in the same round."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from .cost import SHAPES
from .engines import settings
from .figures import Row, median
from .peers import BY_NAME
from .stress import DEADLINE_S, OVERLOAD

Rounds = list[dict[str, dict[str, Row]]]
"""For each round: peer -> workload -> row."""
Cell = Callable[[Row, Row], float | None]
"""A figure of a row, given direct's row of the same round too."""


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    parts = [_head(results)]
    if results["cost"]:
        parts += [_cost(results["cost"], results["peers"]), _latency(results["cost"], results["peers"])]
    for name, table in _TABLES.items():
        if any(name in rows for rows in _rows(results["real"])):
            parts.append(table(name, results["real"], results["peers"]))
    if results["failed"]:
        failed = "\n".join(f"- {peer}, {what}: {why}" for peer, what, why in results["failed"])
        parts.append(f"### Not installed, not started, or broken off\n{failed}")
    return "\n\n".join(parts) + "\n"


def _rows(rounds: Rounds) -> Iterable[dict[str, Row]]:
    return (rows for peers in rounds for rows in peers.values())


def _head(results: dict[str, Any]) -> str:
    peers = "\n".join(
        f"- {name}: {BY_NAME[name].version}{'; ' + BY_NAME[name].note if BY_NAME[name].note else ''}"
        f"; engines with --slot-prompt-similarity {BY_NAME[name].similarity:g}"
        for name in results["peers"]
    )
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}"
    )
    load = f"load average {results['load_before']:.1f} before and {os.getloadavg()[0]:.1f} after"
    return (
        f"## Side by side\n`{results['command']}`\n\n{machine}; {load}; llama.cpp of xllamacpp {version('xllamacpp')}; "
        f"{results['rounds']} round(s), {results['seconds']:.0f} s in all.\nReal engines: `{settings()}`.\n\n{peers}"
    )


def _table(title: str, columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"### {title}", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines])


def _show(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _over(rounds: Rounds, peer: str, workload: str, cell: Cell) -> float | None:
    values = []
    for peers in rounds:
        row, base = peers.get(peer, {}).get(workload), peers.get("direct", {}).get(workload)
        values.append(cell(row, base or {}) if row else None)
    return median(values)


def _at(name: str, place: int | None = None) -> Cell:
    def cell(row: Row, _: Row) -> float | None:
        value = row.get(name)
        return value if value is None or place is None else value[place]

    return cell


def _added(name: str, place: int) -> Cell:
    def cell(row: Row, base: Row) -> float | None:
        return row[name][place] - base[name][place] if row.get(name) and base.get(name) else None

    return cell


def _ratio(name: str) -> Cell:
    def cell(row: Row, base: Row) -> float | None:
        return row[name] / base[name] if row.get(name) is not None and base.get(name) else None

    return cell


def _cost(rounds: Rounds, peers: list[str]) -> str:
    def row(peer: str) -> list[str]:
        cells = [_show(_over(rounds, peer, shape.name, _cpu(shape.streamed)), 1) for shape in SHAPES]
        ttft = [_show(_over(rounds, peer, shape.name, _added("ttft_ms", 0)), 2) for shape in (SHAPES[0], SHAPES[2])]
        errors = sum(rows.get(shape.name, {}).get("errors", 0) for rows in _of(rounds, peer) for shape in SHAPES)
        memory = _over(rounds, peer, "memory", _at("rss_bytes"))
        return [peer, *cells, *ttft, _show(memory and memory / 2**20), str(errors)]

    columns = ["front", *(f"{shape.name}, us CPU {'an event' if shape.streamed else 'a request'}" for shape in SHAPES)]
    columns += ["TTFT p50 added at c=1, 1 token, ms", "the same, streamed, ms", "RSS, MiB", "errors"]
    return _table("Cost, before engines that answer at once", columns, map(row, peers))


def _cpu(streamed: bool) -> Cell:
    return _at("us_per_event" if streamed else "us_per_request")


def _of(rounds: Rounds, peer: str) -> Iterable[dict[str, Row]]:
    return (peers[peer] for peers in rounds if peer in peers)


def _latency(rounds: Rounds, peers: list[str]) -> str:
    def row(peer: str) -> list[str]:
        return [peer, *(_three(rounds, peer, shape.name, "total_ms", 2) for shape in SHAPES)]

    columns = ["front", *(shape.name for shape in SHAPES)]
    return _table("The same loads: latency p50 / p95 / p99, ms", columns, map(row, peers))


def _three(rounds: Rounds, peer: str, workload: str, name: str, digits: int = 0) -> str:
    return " / ".join(_show(_over(rounds, peer, workload, _at(name, place)), digits) for place in range(3))


def _errors(rounds: Rounds, peer: str, workload: str) -> str:
    found: dict[str, int] = {}
    for rows in _of(rounds, peer):
        for error, count in rows.get(workload, {}).get("errors", {}).items():
            found[error] = found.get(error, 0) + count
    return "; ".join(f"{count}x {error}" for error, count in found.items()).replace("|", "/") or "0"


def _sum(rounds: Rounds, peer: str, workload: str, name: str, place: int | None = None) -> str:
    values = [_at(name, place)(rows[workload], {}) for rows in _of(rounds, peer) if workload in rows]
    return _show(sum(value or 0 for value in values)) if values else "-"


def _conversations(name: str, rounds: Rounds, peers: list[str]) -> str:
    def row(peer: str) -> list[str]:
        return [
            peer,
            _three(rounds, peer, name, "ttft_ms"),
            _three(rounds, peer, name, "total_ms"),
            _show(_over(rounds, peer, name, _ratio("tokens_per_s")), 2),
            _show(_over(rounds, peer, name, _at("reuse")), 3),
            _show(_over(rounds, peer, name, lambda row, _: row["reuse"] / row["ideal"] if row["ideal"] else None), 3),
            _show(_over(rounds, peer, name, lambda row, _: _told(row)), 3),
            _show(_over(rounds, peer, name, _at("computed_tokens"))),
            _show(_over(rounds, peer, name, _at("front_us_per_token"))),
            _sum(rounds, peer, name, "wrong_length"),
            f"{_sum(rounds, peer, name, 'other_text')} of {_sum(rounds, peer, name, 'compared')}",
            _errors(rounds, peer, name),
        ]

    columns = ["front", "TTFT p50 / p95 / p99, ms", "latency p50 / p95 / p99, ms", "tokens/s to direct"]
    columns += ["reuse", "of the ideal", "sum cache_n / sum prompt (streams)", "prefill tokens computed"]
    columns += ["front, us CPU a token", "replies with tokens lost or doubled", "other greedy text", "errors"]
    return _table(f"{name}: real engines", columns, map(row, peers))


def _told(row: Row) -> float | None:
    known = row["cached_told"] is not None and row["prompt_tokens"]
    return row["cached_told"] / row["prompt_tokens"] if known else None


def _mixed(name: str, rounds: Rounds, peers: list[str]) -> str:
    def row(peer: str) -> list[str]:
        threes = [_three(rounds, peer, name, each) for each in ("ttft_ms", "longest_gap_ms", "long_ttft_ms")]
        long_ok = f"{_sum(rounds, peer, name, 'long_ok', 0)} of {_sum(rounds, peer, name, 'long_ok', 1)}"
        ratio = _show(_over(rounds, peer, name, _ratio("tokens_per_s")), 2)
        return [peer, *threes, ratio, long_ok, _errors(rounds, peer, name)]

    columns = ["front", "short: TTFT, ms", "short: longest gap in a stream, ms", "long: TTFT, ms"]
    columns += ["short: tokens/s to direct", "long: answered", "errors"]
    return _table("mixed: streams beside prefills of 3,000 tokens (p50 / p95 / p99)", columns, map(row, peers))


def _overload(name: str, rounds: Rounds, peers: list[str]) -> str:
    def row(peer: str) -> list[str]:
        rates = [_show(_over(rounds, peer, name, _at(each)), 1) for each in ("offered_per_s", "goodput_per_s")]
        counts = [_sum(rounds, peer, name, each) for each in ("requests", "ok", "late", "rejected")]
        threes = [_three(rounds, peer, name, each) for each in ("ttft_ms", "total_ms", "reject_ms")]
        return [peer, *rates, *counts, *threes, _errors(rounds, peer, name)]

    columns = ["front", "offered/s", f"goodput/s (within {DEADLINE_S:g} s)", "requests", "answered", "of them late"]
    columns += ["rejected", "TTFT, ms", "latency, ms", "time to a rejection, ms", "errors"]
    title = f"overload: {OVERLOAD:g} times what the engines can do (p50 / p95 / p99)"
    return _table(title, columns, map(row, peers))


def _aborts(name: str, rounds: Rounds, peers: list[str]) -> str:
    def row(peer: str) -> list[str]:
        threes = [_three(rounds, peer, name, each) for each in ("ttft_ms", "total_ms")]
        counts = [_sum(rounds, peer, name, each) for each in ("ok", "aborted", "wasted_tokens")]
        free = _show(_over(rounds, peer, name, _at("slots_free_s")), 2)
        return [peer, *threes, *counts, free, _errors(rounds, peer, name)]

    columns = ["front", "others: TTFT, ms", "others: latency, ms", "answered", "left by their clients"]
    columns += ["tokens made for nobody", "all slots free after, s", "errors"]
    return _table("aborts: every other client leaves (p50 / p95 / p99)", columns, map(row, peers))


def _kill(name: str, rounds: Rounds, peers: list[str]) -> str:
    def row(peer: str) -> list[str]:
        pairs = [_sum(rounds, peer, name, each, place) for place in (0, 1) for each in ("whole", "exact")]
        gap = _three(rounds, peer, name, "longest_gap_ms")
        caught = _sum(rounds, peer, name, "caught")
        return [peer, caught, *pairs, _sum(rounds, peer, name, "wrong_length"), gap, _errors(rounds, peer, name)]

    columns = [
        "front",
        "streams on the killed engine",
        "of the 16 running at the kill: whole",
        "with the exact text",
        "of the 16 sent after it: whole",
    ]
    columns += ["with the exact text", "ended well with tokens lost or doubled", "longest gap, ms", "errors"]
    return _table("kill: one of four engines, with -9, in the middle of 16 streams", columns, map(row, peers))


_TABLES: dict[str, Callable[[str, Rounds, list[str]], str]] = {
    "multi-turn": _conversations,
    "shared-prompt": _conversations,
    "mixed": _mixed,
    "overload": _overload,
    "aborts": _aborts,
    "kill": _kill,
}
"""In the order in which they are played and shown."""
WORKLOADS = ("cost", *_TABLES)


def note(message: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
