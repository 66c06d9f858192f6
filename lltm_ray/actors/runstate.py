"""Where the fleets of this machine run: a small file each, written by `up`, read by `status`, `down`, `connect`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lltm_ray.config import read_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a fleet runs. `pid` is the process that holds it, 0 when it lives on a Ray cluster of its own."""

    name: str
    ray_address: str
    endpoint: str
    ray_auth_mode: str = ""
    """RAY_AUTH_MODE of the cluster: Ray does not find it out by itself when it is given an address."""
    pid: int = 0
    pid_started: str = ""
    """The process's start time from the kernel: a reused pid has another."""

    def save(self) -> None:
        """Write it, whole or not at all."""
        path = _path(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.new")
        fresh.write_text(json.dumps(asdict(self)), encoding="utf-8")
        fresh.replace(path)

    def forget(self) -> None:
        """Remove it."""
        _path(self.name).unlink(missing_ok=True)

    @classmethod
    def of_this_process(cls, name: str, ray_address: str, endpoint: str | None, *, holds_fleet: bool) -> Self:
        """The state of a fleet that this process has just started."""
        return cls(
            name=name,
            ray_address=ray_address,
            endpoint=endpoint or "",
            ray_auth_mode=os.environ.get("RAY_AUTH_MODE", ""),
            pid=os.getpid() if holds_fleet else 0,
            pid_started=started_at(os.getpid()) if holds_fleet else "",
        )

    @property
    def is_alive(self) -> bool:
        """Whether the process that holds the fleet still runs; unknown and therefore true without one."""
        return not self.pid or started_at(self.pid) == self.pid_started

    @classmethod
    def load(cls, name: str) -> Self | None:
        """The fleet's state, or None when there is none or its process is gone."""
        try:
            state = cls(**json.loads(_path(name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        if not state.is_alive:
            state.forget()
            return None
        return state

    @classmethod
    def running(cls) -> list[Self]:
        """All fleets that run here, by their names."""
        names = sorted(path.stem for path in _path("").parent.glob("*.json"))
        return [state for state in map(cls.load, names) if state is not None]


def write_private(path: Path, value: Any) -> None:
    """JSON, whole and for its owner alone: a new file, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        json.dump(value, stream)
    fresh.replace(path)


def started_at(pid: int) -> str:
    """When a process started, in the kernel's ticks since boot; empty when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    after_name = stat.rpartition(")")[2].split()
    is_zombie = after_name[0] == "Z"
    return "" if is_zombie else after_name[19]


def _path(name: str) -> Path:
    return read_environment().cache_dir / "fleets" / f"{name}.json"
