"""Processes of one benchmark: started, waited for, their CPU time read, and ended by pid with all they started."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lltm_ray.llamacpp import _child

TICKS = os.sysconf("SC_CLK_TCK")


class StartError(Exception):
    """Something could not be installed or started; the message goes into the report."""


@dataclass(frozen=True)
class Running:
    """A process that was started here."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def pid(self) -> int:
        """Root of its tree."""
        return self.process.pid

    def first_line(self) -> str:
        """What it tells first.

        Raises:
            StartError: it ended instead.
        """
        assert self.process.stdout is not None
        if line := self.process.stdout.readline().strip():
            return line
        raise StartError(f"ended with {self.process.wait()}: {self.tail()}")

    def tail(self) -> str:
        """Its last words."""
        return self.log.read_text(errors="replace")[-800:].strip()


@contextlib.contextmanager
def running(
    argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None, *, talks: bool = False
) -> Iterator[Running]:
    """Start a process and end its whole tree afterwards; one that `talks` tells its first line by its stdout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", _child.__file__, str(os.getpid()), *map(str, argv)],  # dies with us
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if talks else sink,
            stderr=sink,
            text=True,
            env=os.environ | (env or {}),
            start_new_session=True,
        )
    try:
        yield Running(process, log)
    finally:
        end(process)


def end(process: subprocess.Popen[str], patience_s: float = 8.0) -> None:
    """SIGTERM to the root, some patience, then SIGKILL for whatever of its tree is left."""
    known = tree(process.pid)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    for pid, began in known.items():
        if _began(pid) == began:  # still the same process, not a later one of that number
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _began(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def tree(root: int) -> dict[int, str]:
    """A process and all its descendants: pid -> start time."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, rest = {}, [root]
    while rest:
        pid = rest.pop()
        if began := _began(pid):
            found[pid] = began
        rest += children.get(pid, [])
    return found


def cpu_s(root: int, keep: Callable[[str], bool] = lambda _: True) -> float:
    """CPU seconds, user and system, of a process tree; `keep` chooses by command line."""
    return sum(_cpu(pid) for pid in tree(root) if keep(cmdline(pid)))


def _cpu(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else 0.0


def cmdline(pid: int) -> str:
    """A process's command line; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def rss_bytes(root: int, keep: Callable[[str], bool] = lambda _: True) -> int:
    """Resident memory of a process tree."""
    pages = 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) if keep(cmdline(pid)) else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, body: bytes, path: str = "/v1/chat/completions", timeout_s: float = 5.0) -> tuple[int, bytes]:
    """One request on a connection of its own; status 0 and the reason when there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST" if body else "GET", path, body or None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error).encode()
    finally:
        connection.close()


def wait_for(process: Running, port: int, body: bytes, timeout_s: float) -> None:
    """Until a real request is answered with 200, twice in a row.

    Raises:
        StartError: the process ended, or the time is over; with its last words.
    """
    deadline, answers, last = time.monotonic() + timeout_s, 0, (0, b"")
    while answers < 2:
        if process.process.poll() is not None:
            raise StartError(f"ended with {process.process.returncode}: {process.tail()}")
        if time.monotonic() > deadline:
            raise StartError(f"no good answer within {timeout_s:.0f} s; the last: {last!r:.300}; {process.tail()}")
        last = ask(port, body)
        answers = answers + 1 if last[0] == 200 else 0
        time.sleep(0.0 if answers else 0.1)
