"""`python -m tests.peers [--quick] [--peers ...] [--workloads ...]`: what `make bench` runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import cost, runs
from .figures import Row
from .install import CACHE
from .peers import ALL, BY_NAME, Peer
from .processes import StartError
from .report import WORKLOADS, markdown, note
from .stress import Setting

DEFAULT = tuple(peer.name for peer in ALL if peer.by_default)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("--peers", default=",".join(DEFAULT), help=f"of {', '.join(BY_NAME)}; direct is always run")
    parser.add_argument("--workloads", help=f"of {', '.join(WORKLOADS)}; default: all, with --quick the first three")
    parser.add_argument("--rounds", type=int, default=3, help="each plays every peer in turn (default 3)")
    parser.add_argument("--quick", action="store_true", help="shorter runs; the figures are rough")
    parser.add_argument("--hints", action="store_true", help="clients say which session they are (user, X-Session-ID)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--out", type=Path, help="folder for report.md and report.json (default: .bench/results)")
    chosen = parser.parse_args(argv)
    chosen.peers = list(dict.fromkeys(["direct", *chosen.peers.split(",")]))
    chosen.workloads = chosen.workloads.split(",") if chosen.workloads else WORKLOADS[: 3 if chosen.quick else None]
    for given, known in ((chosen.peers, BY_NAME), (chosen.workloads, WORKLOADS)):
        if wrong := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(wrong)}; known are {', '.join(known)}")
    return chosen


class Bench:
    """One run: collects rows, and what could not be had; each round is on disk as soon as it is over."""

    def __init__(self, chosen: argparse.Namespace, argv: Sequence[str], folder: Path) -> None:
        self.chosen, self.argv, self.folder = chosen, argv, folder
        self.out = chosen.out or CACHE / "results"
        self.out.mkdir(parents=True, exist_ok=True)
        self.began, self.load = time.monotonic(), os.getloadavg()[0]
        self.cost: list[dict[str, dict[str, Row]]] = []
        self.real: list[dict[str, dict[str, Row]]] = []
        self.failed: list[tuple[str, str, str]] = []

    def _order(self, number: int) -> list[str]:
        """Another peer first in every round, so that none always runs on the warmest or the quietest machine."""
        peers: list[str] = self.chosen.peers
        start = number % len(peers)
        return peers[start:] + peers[:start]

    def run_cost(self) -> None:
        """The near-zero-work engines, all rounds."""
        seconds = 0.3 if self.chosen.quick else 2.0
        with cost.upstreams(self.folder) as urls:
            for number in range(self.chosen.rounds):
                note(f"cost, round {number + 1}")
                self.cost.append(
                    self._round(number, "cost", lambda peer: cost.measure(peer, self.folder, urls, seconds))
                )
                self.write()

    def run_real(self, names: list[str]) -> None:
        """The real engines, all rounds; prompts are new in each."""
        for number in range(self.chosen.rounds):
            note(f"{', '.join(names)}, round {number + 1}")
            setting = Setting(seed=self.chosen.seed + number, quick=self.chosen.quick)
            given = runs.prepare(names, setting, self.folder, hints=self.chosen.hints)
            self.real.append(self._round(number, "real engines", partial(self._play, names, given)))
            self.write()

    def write(self) -> str:
        """The report of all rounds so far, as it was written."""
        results = {
            "command": shlex.join(["python", "-m", "tests.peers", *self.argv]),
            "peers": self.chosen.peers,
            "rounds": max(len(self.cost), len(self.real)),
            "load_before": self.load,
            "seconds": time.monotonic() - self.began,
            "cost": self.cost,
            "real": self.real,
            "failed": self.failed,
        }
        told = markdown(results)
        (self.out / "report.json").write_text(json.dumps(results, indent=1))
        (self.out / "report.md").write_text(told)
        return told

    def _play(self, names: list[str], given: runs.Reference, peer: Peer) -> dict[str, Row]:
        return runs.play(peer, names, given, self.folder)

    def _round(self, number: int, what: str, measure: Callable[[Peer], dict[str, Row]]) -> dict[str, dict[str, Row]]:
        rows = {name: self._attempt(name, what, measure) for name in self._order(number)}
        return {name: row for name, row in rows.items() if row}

    def _attempt(self, name: str, what: str, measure: Callable[[Peer], dict[str, Row]]) -> dict[str, Row] | None:
        """A peer that failed once is not tried again: the report says why."""
        if any(entry[:2] == (name, what) for entry in self.failed):
            return None
        began = time.monotonic()
        try:
            found = measure(BY_NAME[name])
        except (StartError, OSError) as error:
            self.failed.append((name, what, " ".join(str(error).split())[-600:]))
            note(f"  {name}: FAILED: {error}")
            return None
        note(f"  {name}: {time.monotonic() - began:.0f} s")
        return found


def main(argv: Sequence[str]) -> int:
    """Run, write the report, show it; 1 when lltm_ray or direct could not be measured."""
    chosen = _arguments(argv)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        bench = Bench(chosen, argv, Path(folder))
        if "cost" in chosen.workloads:
            bench.run_cost()
        if real := [name for name in WORKLOADS if name in chosen.workloads and name != "cost"]:
            bench.run_real(real)
        sys.stdout.write(bench.write())
    return int(any(peer in ("direct", "lltm_ray") for peer, _, _ in bench.failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
