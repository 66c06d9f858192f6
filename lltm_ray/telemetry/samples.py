"""The latest sample of each server, slot, GPU, machine and queue, and counters that survive a server's restart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lltm_ray.telemetry.rows import GpuRow, NodeRow, QueueRow, ServerRow, SlotRow

GONE_AFTER_S = 10.0
"""What was not seen for so long is not there any more."""
_KEPT_S = 3600.0
"""Counters of an engine go on if it comes back within this time."""
_MOST_ENGINES = 10_000
COUNTED: Final = (
    *("prompt_tokens", "prompt_tokens_cached", "prompt_seconds", "predicted_tokens", "predicted_seconds", "decodes"),
    *("draft_tokens", "draft_accepted"),
)
"""Fields of `ServerRow` that begin at 0 with each server."""

THROTTLES: Final = {
    "application_clocks": 0x2,
    "power_cap": 0x4,
    "hardware_slowdown": 0x8,
    "sync_boost": 0x10,
    "thermal_software": 0x20,
    "thermal_hardware": 0x40,
    "power_brake": 0x80,
}
"""NVML's `nvmlClocksEventReason*` bits that slow a GPU down (nvml.h); being idle (0x1) does not."""


@dataclass(frozen=True, slots=True)
class _Counters:
    """Of one engine: what its present server told last, and what ended ones came to."""

    at_unix_nano: int = 0
    pid: int = 0
    told: Mapping[str, float] = field(default_factory=dict)
    ended: Mapping[str, float] = field(default_factory=dict)

    def next(self, row: ServerRow) -> _Counters:
        """After a row; one without counters does not say that a server has ended."""
        told = {name: value for name in COUNTED if (value := getattr(row, name)) is not None}
        if not told:
            return replace(self, at_unix_nano=row.at_unix_nano)
        # process ids come back; counters do not
        fell = any(value < self.told.get(name, 0.0) for name, value in told.items())
        if not fell and row.server_pid == self.pid:
            return _Counters(row.at_unix_nano, row.server_pid, {**self.told, **told}, self.ended)
        ended = {name: self.ended.get(name, 0.0) + self.told.get(name, 0.0) for name in COUNTED}
        return _Counters(row.at_unix_nano, row.server_pid, told, ended)


class Samples:
    """Changed by one thread; `total` and `rate` may be asked from any. Nothing absent is ever 0."""

    def __init__(self) -> None:
        self.servers: dict[str, ServerRow] = {}
        """By engine."""
        self.slots: dict[tuple[str, int], SlotRow] = {}
        self.gpus: dict[str, GpuRow] = {}
        """By UUID."""
        self.nodes: dict[str, NodeRow] = {}
        self.queues: dict[tuple[str, str], QueueRow] = {}
        """By gateway and model."""
        self._before: dict[str, ServerRow] = {}
        self._counters: OrderedDict[str, _Counters] = OrderedDict()
        """By engine, the one seen last at the end; they outlive `servers`."""

    def add(self, kind: str, rows: Iterable[Any]) -> None:
        """Take rows of a kind of `batch.KINDS`; those that are no samples are passed over."""
        if kind == "servers":
            for row in rows:
                self._add_server(row)
        elif kind == "slots":
            self.slots.update({(row.engine, row.slot): row for row in rows})
        elif kind == "gpus":
            self.gpus.update({row.uuid: row for row in rows})
        elif kind == "nodes":
            self.nodes.update({row.node: row for row in rows})
        elif kind == "queues":
            self.queues.update({(row.gateway, row.model): row for row in rows})

    def forget(self, now_s: float) -> None:
        """Drop what was not seen lately; `now_s` in Unix seconds."""
        oldest = (now_s - GONE_AFTER_S) * 1e9
        tables: tuple[dict[Any, Any], ...] = (self.servers, self.slots, self.gpus, self.nodes, self.queues)
        for table in tables:
            for key in [key for key, row in table.items() if row.at_unix_nano < oldest]:
                del table[key]
        for engine in [engine for engine in self._before if engine not in self.servers]:
            del self._before[engine]
        while self._counters:
            engine, counters = next(iter(self._counters.items()))
            if len(self._counters) <= _MOST_ENGINES and counters.at_unix_nano >= (now_s - _KEPT_S) * 1e9:
                break
            del self._counters[engine]

    def total(self, engine: str, name: str) -> float | None:
        """A counter of `COUNTED`, ended servers of this engine included; None: its server does not tell it."""
        row, counters = self.servers.get(engine), self._counters.get(engine)
        if counters is None or getattr(row, name, None) is None:
            return None
        return float(counters.told[name] + counters.ended.get(name, 0.0)) if name in counters.told else None

    def rate(self, engine: str, name: str) -> float | None:
        """A counter's growth per second between the last two samples of one server; None where there are not two."""
        row, before = self.servers.get(engine), self._before.get(engine)
        old, new = getattr(before, name, None), getattr(row, name, None)
        if row is None or before is None or old is None or new is None or new < old:
            return None
        if before.at_unix_nano >= row.at_unix_nano:
            return None
        return float((new - old) / (row.at_unix_nano - before.at_unix_nano) * 1e9)

    def _add_server(self, row: ServerRow) -> None:
        before, old = self.servers.get(row.engine), self._counters.get(row.engine, _Counters())
        self._counters[row.engine] = counters = old.next(row)
        self._counters.move_to_end(row.engine)
        self.servers[row.engine] = row
        if before is not None and before.server_pid == row.server_pid and counters.ended is old.ended:
            self._before[row.engine] = before
        else:
            self._before.pop(row.engine, None)
