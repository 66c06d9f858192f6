"""What a front costs: a load of unique prompts on engines that answer at once, so that nothing but the front shows."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import install
from .peers import Front, Peer, front
from .processes import StartError, ask, cpu_s, rss_bytes, running

UPSTREAMS, SLOTS = 2, 64
WARM_S = 0.3


@dataclass(frozen=True)
class Shape:
    """One load."""

    name: str
    connections: int
    tokens: int
    streamed: bool
    pace_us: int = 0
    stretch: float = 1.0
    """How much longer than the others it runs."""


SHAPES = (
    Shape("1 token c=1", 1, 1, streamed=False),
    Shape("1 token c=16", 16, 1, streamed=False),
    Shape("64 events c=1", 1, 64, streamed=True),
    Shape("64 events c=8", 8, 64, streamed=True),
    Shape("64 paced streams", 64, 64, streamed=True, pace_us=16_000, stretch=2.0),
)


@contextlib.contextmanager
def upstreams(folder: Path) -> Iterator[tuple[str, ...]]:
    """Near-zero-work engines."""
    program = install.compiled("upstream.c")
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(running([str(program), "0"], folder / f"upstream-{i}.log", talks=True))
            for i in range(UPSTREAMS)
        ]
        yield tuple(f"http://127.0.0.1:{process.first_line()}" for process in processes)


def load(target: Front, shape: Shape, seconds: float) -> dict[str, Any]:
    """Run one load; the client's own counts and the front's CPU time.

    Raises:
        StartError: the client could not connect.
    """
    argv = [install.compiled("load.c"), seconds, shape.connections, shape.tokens, int(shape.streamed), shape.pace_us]
    process, peer = target.process, target.peer
    before = cpu_s(process.pid, peer.keep) if process else 0.0
    done = subprocess.run([str(part) for part in (*argv, *target.ports)], capture_output=True, text=True, check=False)
    spent = cpu_s(process.pid, peer.keep) - before if process else 0.0
    if done.returncode or not done.stdout:
        raise StartError(f"the load on {peer.name} failed: {done.stderr.strip()}")
    seen: dict[str, Any] = json.loads(done.stdout)
    answers, events = seen["requests"], seen["events"]
    seen["us_per_request"] = spent / answers * 1e6 if answers else None
    seen["us_per_event"] = spent / events * 1e6 if events else None
    return seen


def rest(target: Front) -> None:
    """Until it has done what its start and its first requests asked for: an actor's Ray goes on starting for seconds.

    Raises:
        StartError: it does not come to rest.
    """
    assert target.process is not None
    for _ in range(60):
        before = cpu_s(target.process.pid)
        time.sleep(0.5)
        if cpu_s(target.process.pid) - before < 0.05:
            return
    raise StartError(f"{target.peer.name} does not come to rest")


def measure(peer: Peer, folder: Path, urls: tuple[str, ...], seconds: float) -> dict[str, dict[str, Any]]:
    """All loads on one peer, after short ones that are not counted.

    Raises:
        StartError: it cannot be installed or started.
        RuntimeError: an upstream is dead, so nothing can be measured any more.
    """
    if any(ask(int(url.rpartition(":")[2]), b"", "/health")[0] != 200 for url in urls):
        raise RuntimeError(f"an upstream of {', '.join(urls)} is dead")
    with front(peer, folder / peer.name.replace("/", "-"), urls, SLOTS) as target:
        found = {}
        load(target, SHAPES[1], WARM_S)
        load(target, SHAPES[3], WARM_S)
        if target.process:
            rest(target)
        for shape in SHAPES:
            found[shape.name] = load(target, shape, seconds * shape.stretch)
        if target.process:
            found["memory"] = {"rss_bytes": rss_bytes(target.process.pid, peer.keep)}
        return found
