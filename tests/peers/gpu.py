"""`python -m tests.peers.gpu --server /tmp/llama-server --model /tmp/m.gguf --gpus 2`: the runs that need GPUs.

Writes gpu.json and gpu.md into --out after every run, so that what was measured is kept whatever happens then.
Without a GPU: `--server embedded --gpus 0 --quick`, with a tiny model made on the spot where --model is not given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import engines
from .figures import Row
from .gpu_fleet import Host
from .gpu_kill import kill
from .gpu_multi import multi_turn
from .gpu_run import FULL, QUICK, Run
from .gpu_single import single
from .report import note

Rows = dict[str, list[Row]]
PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "single": (single, 0.22),
    "multi-turn": (multi_turn, 0.62),
    "kill": (kill, 0.16),
}
"""Each with its share of the time; what one leaves, the next may use."""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.peers.gpu", description=__doc__)
    parser.add_argument("--server", required=True, help="path of a CUDA llama-server, or `embedded`")
    parser.add_argument("--model", type=Path, help="GGUF (default: the benches' own tiny model)")
    parser.add_argument("--gpus", type=int, default=2, help="engines are spread over so many; 0: no GPU (default 2)")
    parser.add_argument("--vllm-router", default="", metavar="COMMAND", help="also play multi-turn through it")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all chosen parts together (default 6)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works")
    parser.add_argument("--rounds", type=int, help="of multi-turn")
    parser.add_argument("--think", type=float, nargs=2, metavar=("LOW_S", "HIGH_S"), help="pauses in multi-turn")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="further engine settings")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and the logs")
    chosen = parser.parse_args(argv)
    chosen.parts = chosen.parts.split(",")
    if wrong := [name for name in chosen.parts if name not in PARTS]:
        parser.error(f"unknown: {', '.join(wrong)}; known are {', '.join(PARTS)}")
    return chosen


class Bench:
    """Collects rows and writes them down."""

    def __init__(self, chosen: argparse.Namespace, command: str) -> None:
        self.chosen = chosen
        self.command = command
        self.out: Path = chosen.out
        self.began = time.monotonic()
        self.rows: dict[str, Rows] = {name: {} for name in chosen.parts}
        self.failed: dict[str, str] = {}
        changes: dict[str, Any] = {"rounds": chosen.rounds, "think_s": tuple(chosen.think) if chosen.think else None}
        base = QUICK if chosen.quick else FULL
        known = {name: value for name, value in changes.items() if value is not None}
        self.scale = type(base)(**asdict(base) | known)
        model = chosen.model or engines.model()
        self.host = Host(
            server=chosen.server,
            model=model.resolve(),
            gpus=chosen.gpus,
            vllm_router=chosen.vllm_router,
            engine=chosen.engine,
        )

    def play(self, folder: Path) -> None:
        """All chosen parts; a part that fails keeps its rows and leaves its reason."""
        shares = {name: PARTS[name][1] for name in self.chosen.parts}
        used = 0.0
        for name in self.chosen.parts:
            used += shares[name] / sum(shares.values())
            note(f"{name}, at {time.monotonic() - self.began:.0f} s")
            run = Run(
                host=self.host,
                scale=self.scale,
                folder=folder / name,
                deadline=self.began + used * self.chosen.minutes * 60,
                save=self._saver(name),
                seed=self.chosen.seed,
            )
            run.folder.mkdir(parents=True, exist_ok=True)
            try:
                PARTS[name][0](run)
            except Exception as error:
                self.failed[name] = f"{type(error).__name__}: {error}"[:800]
                note(f"  {name} broke off: {traceback.format_exc()}")
            self.write()

    def _saver(self, part: str) -> Callable[[str, Row], None]:
        def save(name: str, row: Row) -> None:
            rows = self.rows[part].setdefault(name, [])
            if part == "kill":
                rows.clear()  # each tells all of the last one
            rows.append(row)
            speed = f"{row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else "done"
            shown = row.get("failed") or speed
            note(f"  {time.monotonic() - self.began:5.1f} s  {name}: {shown}")
            self.write()

        return save

    def results(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "command": self.command,
            "machine": f"{os.cpu_count()} cores, {self.host.gpus} GPUs used, Python {platform.python_version()}",
            "model": self.host.model.name,
            "scale": asdict(self.scale),
            "seconds": round(time.monotonic() - self.began, 1),
            "rows": self.rows,
            "failed": self.failed,
        }

    def write(self) -> None:
        """What is known now."""
        self.out.mkdir(parents=True, exist_ok=True)
        results = self.results()
        (self.out / "gpu.json").write_text(json.dumps(_rounded(results), separators=(",", ":")))
        (self.out / "gpu.md").write_text(markdown(results))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def markdown(results: dict[str, Any]) -> str:
    """Tables of what there is."""
    parts = [f"## On GPUs\n`{results['command']}`\n\n{results['machine']}; {results['model']}; {results['seconds']} s"]
    rows: dict[str, Rows] = results["rows"]
    parts += [table(rows[name]) for name, table in _TABLES.items() if rows.get(name)]
    parts += [f"{name} broke off: {why}" for name, why in results["failed"].items()]
    return "\n\n".join(parts) + "\n"


def _table(title: str, columns: list[str], lines: Iterable[list[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"### {title}", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body])


def _median(rows: list[Row], name: str, place: int | None = None) -> float | None:
    found = [row[name] if place is None else row[name][place] for row in rows if row.get(name) is not None]
    return statistics.median(found) if found else None


def _show(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _pair(rows: list[Row], name: str) -> str:
    return " / ".join(_show(_median(rows, name, place), 1) for place in (0, 1))


def _single(rows: Rows) -> str:
    direct = _median(rows.get("direct", []), "tokens_per_s")

    def line(name: str, legs: list[Row]) -> list[str]:
        speed = _median(legs, "tokens_per_s")
        return [
            name,
            _show(speed),
            ", ".join(_show(leg["tokens_per_s"]) for leg in legs),
            _show(speed / direct if speed and direct else None, 3),
            _pair(legs, "ttft_ms"),
            _show(_median(legs, "gateway_us_per_token"), 1),
            _show(_median(legs, "gateway_busy"), 2),
            f"{sum(leg['ok'] for leg in legs)} of {sum(leg['requests'] for leg in legs)}",
            str(sum(leg["wrong_length"] for leg in legs)),
        ]

    columns = ["way", "tokens/s", "each leg", "to direct", "TTFT p50 / p95, ms", "gateway, us CPU a token"]
    columns += ["gateway, cores", "answered", "wrong length"]
    return _table("single: one engine, all slots busy", columns, (line(*pair) for pair in rows.items()))


def _multi(rows: Rows) -> str:
    def line(name: str, all_runs: list[Row]) -> list[str]:
        runs = [row for row in all_runs if "failed" not in row]
        if not runs:
            return [name, all_runs[-1]["failed"].replace("|", "/").replace("\n", " "), *["-"] * (len(columns) - 2)]
        told, prompt = sum(row["cached_tokens"] for row in runs), sum(row["prompt_tokens"] for row in runs)
        possible = sum(row["possible_tokens"] for row in runs)
        learnt = [row["residency"] for row in runs if "residency" in row]
        predicted = sum(each["predicted_tokens"] for each in learnt)
        actual = sum(each["actual_tokens"] for each in learnt)
        return [
            name,
            _pair(runs, "ttft_ms"),
            _pair(runs, "later_ttft_ms"),
            _show(_median(runs, "tokens_per_s")),
            _show(told / prompt if prompt else None, 3),
            _show(told / possible if possible else None, 3),
            _show(sum(row["computed_tokens"] for row in runs)),
            _show(_median(runs, "busiest_over_mean"), 2),
            _show(_median(learnt, "median_error_ratio"), 4),
            f"{predicted:,} / {actual:,}" if learnt else "-",
            _show(_median(runs, "front_us_per_token"), 1),
            f"{sum(row['ok'] for row in runs)} of {sum(row['requests'] for row in runs)}"
            + (" (cut)" if any(row["cut"] for row in runs) else ""),
            str(sum(row["wrong_length"] for row in runs)),
        ]

    columns = ["sessions/router", "TTFT p50 / p95, ms", "after the first turn, ms", "tokens/s"]
    columns += ["sum cache_n / sum prompt", "of what its own turns left", "prefill tokens computed"]
    columns += ["busiest engine to mean", "median error of predicted reuse", "predicted / actual (last ones)"]
    columns += ["front, us CPU a token", "answered", "wrong length"]
    ordered = sorted(rows.items(), key=lambda pair: int(pair[0].partition("/")[0]))
    return _table("multi-turn over four engines", columns, [line(*pair) for pair in ordered])


def _kill(rows: Rows) -> str:
    row = rows["kill"][-1]

    def line(title: str, name: str) -> list[str]:
        found = row.get(name)
        return (
            [title, *(str(found[each]) for each in ("identical", "different", "broken"))] if found else [title, *"---"]
        )

    lines = [
        line("undisturbed, a second time", "noise"),
        line("an engine killed", "killed"),
        line("the same, against the second run", "killed_against_second"),
    ]
    more = ("streams", "unfinished_at_kill", "on_the_victim", "identical_to_either", "differ_from", "longest_gap_s")
    facts = {name: _rounded(row[name]) for name in (*more, "undisturbed_longest_gap_s", "errors") if name in row}
    told = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return (
        _table("kill: -9 for one of four engines", ["run", "identical", "different", "broken"], lines) + f"\n\n{told}"
    )


_TABLES: dict[str, Callable[[Rows], str]] = {"single": _single, "multi-turn": _multi, "kill": _kill}


def main(argv: Sequence[str]) -> int:
    """Run, write, show; 1 when a part broke off."""
    chosen = _arguments(argv)
    bench = Bench(chosen, shlex.join(["python", "-m", "tests.peers.gpu", *argv]))
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        try:
            bench.play(Path(folder))
        finally:
            _keep_logs(Path(folder), chosen.out)
    bench.write()
    sys.stdout.write((chosen.out / "gpu.json").read_text() + "\n\n" + (chosen.out / "gpu.md").read_text())
    return int(bool(bench.failed))


def _keep_logs(folder: Path, out: Path) -> None:
    """The end of every log in one file."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "logs.txt").open("w") as sink:
        for log in sorted(folder.rglob("*.log")):
            sink.write(f"===== {log.relative_to(folder)}\n{log.read_text(errors='replace')[-3000:]}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
