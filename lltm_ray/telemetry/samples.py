"""The latest sample of each server, slot, GPU, machine and queue, and counters that survive a server's restart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from lltm_ray.telemetry.rows import GpuRow, NodeRow, QueueRow, ServerRow, SlotRow

GONE_AFTER_S = 10.0
"""What was not seen for so long is not there any more."""
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


class Samples:
    """For one thread; nothing absent is ever 0."""

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
        self._ended: dict[tuple[str, str], float] = {}

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

    def total(self, engine: str, name: str) -> float | None:
        """A counter of `COUNTED`, ended servers of this engine included; None: its server does not tell it."""
        value = getattr(self.servers[engine], name)
        return None if value is None else float(value + self._ended.get((engine, name), 0.0))

    def rate(self, engine: str, name: str) -> float | None:
        """A counter's growth per second between the last two samples of one server; None where there are not two."""
        row, before = self.servers[engine], self._before.get(engine)
        old, new = getattr(before, name, None), getattr(row, name)
        if before is None or old is None or new is None or new < old or before.at_unix_nano >= row.at_unix_nano:
            return None
        return float((new - old) / (row.at_unix_nano - before.at_unix_nano) * 1e9)

    def _add_server(self, row: ServerRow) -> None:
        before = self.servers.get(row.engine)
        self.servers[row.engine] = row
        if before is None:
            return
        if before.server_pid == row.server_pid and not _restarted(before, row):
            self._before[row.engine] = before
            return
        self._before.pop(row.engine, None)
        for name in COUNTED:
            key = row.engine, name
            self._ended[key] = self._ended.get(key, 0.0) + (getattr(before, name) or 0.0)


def _restarted(before: ServerRow, row: ServerRow) -> bool:
    """Process ids come back; counters do not."""
    pairs = ((getattr(before, name), getattr(row, name)) for name in COUNTED)
    return any(old is not None and new is not None and new < old for old, new in pairs)
