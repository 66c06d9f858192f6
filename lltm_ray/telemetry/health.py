"""How telemetry itself is: what came, what was lost and where, how late it is. Told as `lltm.telemetry.*` metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from opentelemetry.metrics import CallbackOptions, Observation

from lltm_ray.telemetry.pump import Counts

Figures = Iterable[tuple[float, dict[str, str]]]


class Meter(Protocol):
    """What `instruments.Instruments` offers."""

    def observe(
        self,
        name: str,
        kind: str,
        unit: str,
        description: str,
        callback: Callable[[CallbackOptions], Iterable[Observation]],
    ) -> None:
        """Ask for a metric whenever it is read."""


class Health:
    """Counts since this process started; for one thread, read by any."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        """Rows that came, by kind."""
        self.lost: Counter[tuple[str, str]] = Counter()
        """Rows that senders lost, or that could not be read, by sender's name and kind."""
        self.requests: Counter[str] = Counter()
        """Requests by what was decided on them: `Sampler.decide`'s words, `no` for none."""
        self.faults = 0
        """Requests or spans that could not be understood."""
        self.lag_s = 0.0
        """Between the end of the newest subject of the last batch and its arrival here."""
        self._told: dict[tuple[str, str], int] = {}

    def take(self, sender: str, counts: Mapping[str, int], dropped: Mapping[str, int]) -> None:
        """Note a batch.

        Args:
            sender: its process as `name/start`, where `start` is another whenever it starts again.
            counts: rows in it, by kind.
            dropped: rows the sender has lost since that start, by kind; fewer than before: the batch was overtaken.
        """
        self.rows.update(counts)
        name = sender.partition("/")[0]
        for kind, lost in dropped.items():
            before = self._told.get((sender, kind), 0)
            if lost > before:
                self.lost[name, kind] += lost - before
                self._told[sender, kind] = lost

    def leave_out(self, sender: str, counts: Mapping[str, int]) -> None:
        """Note rows of a batch, by kind, that were not of their kind's types."""
        for kind, lost in counts.items():
            self.lost[sender.partition("/")[0], kind] += lost

    def forget(self, senders: Collection[str]) -> None:
        """Let go of what these have lost; by their names."""
        self.lost = Counter({key: count for key, count in self.lost.items() if key[0] not in senders})
        self._told = {key: count for key, count in self._told.items() if key[0].partition("/")[0] not in senders}

    def as_dict(self) -> dict[str, Any]:
        """For the status page."""
        lost: dict[str, dict[str, int]] = {}
        for (sender, kind), count in sorted(self.lost.items()):
            lost.setdefault(sender, {})[kind] = count
        told = {"rows": dict(self.rows), "lost": lost, "requests": dict(self.requests)}
        return told | {"faults": self.faults, "lag_s": self.lag_s}


def tell(
    health: Health, exporters: Callable[[], dict[str, Counts]], store: Callable[[], dict[str, int]], meter: Meter
) -> None:
    """Have all that read as metrics.

    Args:
        health: what came in.
        exporters: counts of each, when asked.
        store: its counts, when asked.
        meter: makes the metrics.
    """

    def of_exporters(field: str) -> Callable[[], Figures]:
        return lambda: [(getattr(counts, field), {"exporter": name}) for name, counts in exporters().items()]

    def lost() -> Figures:
        return [(count, {"sender": sender, "kind": kind}) for (sender, kind), count in list(health.lost.items())]

    told: tuple[tuple[str, str, str, str, Callable[[], Figures]], ...] = (
        ("rows", "counter", "{row}", "Rows taken in", lambda: _labelled(health.rows, "kind")),
        ("rows.lost", "counter", "{row}", "Rows that senders lost", lost),
        ("requests", "counter", "{request}", "By sampling", lambda: _labelled(health.requests, "sampling")),
        ("faults", "counter", "{row}", "Rows that were not understood", lambda: [(health.faults, {})]),
        ("lag", "gauge", "s", "End of the newest subject to its arrival", lambda: [(health.lag_s, {})]),
        ("queued", "gauge", "{item}", "Waiting for an exporter", of_exporters("queued")),
        ("sent", "counter", "{item}", "Exported", of_exporters("sent")),
        ("dropped", "counter", "{item}", "Not exported", of_exporters("dropped")),
        ("export.failures", "counter", "{attempt}", "Exports that failed", of_exporters("failures")),
        ("store.rows", "gauge", "{row}", "Kept, written and lost", lambda: _labelled(store(), "state")),
    )
    for name, kind, unit, description, read in told:
        meter.observe(f"lltm.telemetry.{name}", kind, unit, description, _observing(read))


def _labelled(counts: Mapping[str, int], label: str) -> Figures:
    return [(count, {label: value}) for value, count in list(counts.items())]


def _observing(read: Callable[[], Figures]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(value, labels) for value, labels in read()]
