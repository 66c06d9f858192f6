"""What each analysis takes on pandas and on cuDF, over more and more spans.

`python -m tests.peers.analytics [--spans 1e5,1e6] [--engines pandas,cudf] [--repeat 3] [--memory-gib N] [--json FILE]`.
Each engine and size is a process of its own. Of an analysis the best of the repeats after a first run that does not
count; of the build, which reads Arrow rows into frames, its only run. Memory is the most that was held for frames and
answers: of a CPU's process above what it had with the rows alone, of a GPU what was given out by its pool. Both are
given as they are, also where the CPU is faster.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.report import load_analyses, run
from lltm_ray.analytics.trace import Trace
from tests.fleet_rows import many_spans

MIB, GIB = 1 << 20, 1 << 30
Measured = dict[str, Any]


def measure(engine_name: str, spans: int, repeat: int, memory_bytes: int | None) -> Measured:
    """One engine and size, in this process.

    Raises:
        ConfigError: cuDF is not usable here.
    """
    engine = choose_engine(engine_name, memory_bytes=memory_bytes)
    rows = many_spans(spans)
    peak_bytes = _watch_memory(engine_name)
    began = time.perf_counter()
    trace = build_trace(rows, engine)
    build_ms = (time.perf_counter() - began) * 1e3
    analyses = {analysis.NAME: _best(analysis, trace, repeat) for analysis in load_analyses()}
    return {
        "engine": engine_name,
        "reason": engine.reason,
        "spans": len(trace.spans),
        "requests": len(trace.requests),
        "build_ms": build_ms,
        "analyses": analyses,
        "peak_mib": peak_bytes() / MIB,
    }


def _best(analysis: Any, trace: Trace, repeat: int) -> Measured:
    results = [run(analysis, trace) for _ in range(repeat + 1)][1:]
    best = min(results, key=lambda result: result.ms)
    return {"ms": best.ms, "ran_on": best.engine, "error": best.error}


def _watch_memory(engine_name: str) -> Callable[[], float]:
    """From now on; the function tells the most bytes held since."""
    if engine_name == "cudf":
        import rmm.statistics

        rmm.statistics.enable_statistics()
        return lambda: float(rmm.statistics.get_statistics().peak_bytes)
    pa.default_memory_pool().release_unused()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already shall count when it is taken again
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark falls to what is held now
    before = _high_water_bytes()
    return lambda: _high_water_bytes() - before


def _high_water_bytes() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return float(found[1]) * 1024


def measured_apart(engine_name: str, spans: int, chosen: argparse.Namespace) -> Measured:
    """As `measure`, in a new process; one that fails gives its last words as `failure`."""
    command = [sys.executable, "-m", "tests.peers.analytics", "--one", engine_name, "--spans", str(spans)]
    command += ["--repeat", str(chosen.repeat)]
    if chosen.memory_gib:
        command += ["--memory-gib", str(chosen.memory_gib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        return {"engine": engine_name, "spans": spans, "failure": words[-1] if words else f"exit {done.returncode}"}
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def report(spans: int, found: list[Measured]) -> None:
    """One table: a line an analysis, a column an engine."""
    print(f"\n{spans:,} spans")
    for each in found:
        print(f"  {each['engine']}: {each.get('failure') or each['reason']}")
    good = [each for each in found if "failure" not in each]
    if not good:
        return
    names = [each["engine"] for each in good]
    print(f"  {'':20}", *(f"{each['engine']:>12}" for each in good), "   faster")
    for name in good[0]["analyses"]:
        _line(name, [_told(each["analyses"][name], each["engine"]) for each in good], names)
    sums = [sum(part["ms"] for part in each["analyses"].values()) for each in good]
    _line("all analyses", [(total, "") for total in sums], names)
    _line("build of the frames", [(each["build_ms"], "") for each in good], names)
    print(f"  {'memory, MiB':20}", *(f"{each['peak_mib']:11.0f} " for each in good))


def _told(part: Measured, engine_name: str) -> tuple[float, str]:
    """Milliseconds, and a mark: `!` it failed, `c` the GPU lacked memory and the CPU did it."""
    return part["ms"], "!" if part["error"] else "" if part["ran_on"] == engine_name else "c"


def _line(name: str, told: list[tuple[float, str]], names: list[str]) -> None:
    cells = (f"{ms:9.1f} ms{mark:1}" for ms, mark in told)
    order = sorted(range(len(told)), key=lambda place: told[place][0])
    can_compare = len(told) > 1 and not any(mark == "!" for _, mark in told)
    verdict = f"   {names[order[0]]} {told[order[1]][0] / told[order[0]][0]:.1f}x" if can_compare else ""
    print(f"  {name:20}", *cells, verdict)


def main() -> int:
    """0: every engine that was asked for ran every analysis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", default="1e5,1e6", help="how many, one or more")
    parser.add_argument("--engines", default="pandas,cudf")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory-gib", type=float, help="of the GPU, at most")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sizes = [int(float(each)) for each in chosen.spans.split(",")]
    if chosen.one:
        logging.disable(logging.CRITICAL)
        memory_bytes = int(chosen.memory_gib * GIB) if chosen.memory_gib else None
        print(json.dumps(measure(chosen.one, sizes[0], chosen.repeat, memory_bytes)))
        return 0
    found = []
    for spans in sizes:
        found.append([measured_apart(engine, spans, chosen) for engine in chosen.engines.split(",")])
        report(spans, found[-1])
    every = [each for row in found for each in row]
    if chosen.json:
        chosen.json.write_text(json.dumps(every, indent=1), encoding="utf-8")
    is_whole = all("failure" not in each and not any(a["error"] for a in each["analyses"].values()) for each in every)
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
