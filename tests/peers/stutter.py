"""Servers on slower machines: a process stops and continues one, many times a second, by a known share of the time.

Its priority is raised where that is allowed: late at stopping, it would let the server run free.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .processes import Running, running

STOP_S, GO_S = 0.02, 0.01
_STUTTER = """
import os, signal, sys, time, threading
pid, stop_s, go_s, factor = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), 1.0
def listen():
    global factor
    for line in sys.stdin:
        factor = float(line)
threading.Thread(target=listen, daemon=True).start()
try:
    os.nice(-15)
except PermissionError:
    pass
print("ready", flush=True)
while True:
    pause_s = factor * (stop_s + go_s) - go_s
    if pause_s > 0:
        os.kill(pid, signal.SIGSTOP); time.sleep(pause_s)
    os.kill(pid, signal.SIGCONT); time.sleep(go_s)
"""


@dataclass(frozen=True)
class Stutter:
    """What slows one server down."""

    process: Running

    def slow_down(self, factor: float) -> None:
        """From now on it takes so many times as long as at first."""
        stdin = self.process.process.stdin
        assert stdin is not None
        stdin.write(f"{factor}\n")
        stdin.flush()


@contextlib.contextmanager
def stutter(pid: int, log: Path, *, stop_s: float = STOP_S, go_s: float = GO_S) -> Iterator[Stutter]:
    """A server, by its pid, is stopped for so long, then runs for so long; at the end it runs. It may die meanwhile."""
    try:
        with running([sys.executable, "-c", _STUTTER, *map(str, (pid, stop_s, go_s))], log, talks=True) as process:
            process.first_line()
            yield Stutter(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
