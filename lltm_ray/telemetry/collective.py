"""Metrics of collective calls, from their spans: how often, how much, how long, and the last bus bandwidth.

A call that failed is counted as that only: what it took says nothing about the wire.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from opentelemetry.metrics import CallbackOptions, Observation

from lltm_ray.telemetry.health import Meter
from lltm_ray.telemetry.rows import SpanRow

SPAN: Final = "collective"
"""Spans of calls are named `collective all_reduce` and so on."""
OPERATIONS = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "barrier", "send", "recv")
"""What the ranks of a group do together."""
PREFIX: Final = "lltm.collective."
"""Of their attributes."""
_Metric = tuple[str, str, str, str, str | None]
"""Name, kind, unit, description, attribute of the span (None: 1 a call)."""
_METRICS: Final[tuple[_Metric, ...]] = (
    ("calls", "counter", "{call}", "Calls of groups of actors", None),
    ("bytes", "counter", "By", "Size of their tensors, as nccl-tests count it", "nbytes"),
    ("duration", "counter", "s", "Time of their slowest ranks", "seconds"),
    ("bus_bandwidth", "gauge", "By/s", "What a link carried in the last call", "bus_bytes_s"),
)
_FAILURES: Final[_Metric] = ("failures", "counter", "{call}", "Calls of groups of actors that failed", None)
_LABELS: Final = ("operation", "backend")


class Collectives:
    """Sums by operation and backend.

    Args:
        meter: where the metrics are asked for.
    """

    def __init__(self, meter: Meter) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        for name, kind, unit, about, _ in (*_METRICS, _FAILURES):
            values = self._values[name] = {}

            def observe(_: CallbackOptions, values: Mapping[tuple[str, ...], float] = values) -> list[Observation]:
                return [Observation(value, _labels(key)) for key, value in dict(values).items()]

            meter.observe(PREFIX + name, kind, unit, about, observe)

    def add(self, rows: Sequence[SpanRow]) -> None:
        """Spans of any kind; those of calls are counted. A program's own may have any name, and other attributes."""
        for row in rows:
            kind, _, operation = row.name.partition(" ")
            if kind == SPAN and operation in OPERATIONS:
                told = json.loads(row.attributes)
                if _is_call(told, operation):
                    self._count(told, (_FAILURES,) if row.error_type else _METRICS)

    def _count(self, told: Mapping[str, Any], metrics: Sequence[_Metric]) -> None:
        key = tuple(str(told[PREFIX + name]) for name in _LABELS)
        for name, kind, _, _, field in metrics:
            values, value = self._values[name], 1.0 if field is None else float(told[PREFIX + field])
            values[key] = value if kind == "gauge" else values.get(key, 0.0) + value


def _is_call(told: Any, operation: str) -> bool:
    if not isinstance(told, dict) or told.get(f"{PREFIX}operation") != operation or f"{PREFIX}backend" not in told:
        return False
    return all(isinstance(told.get(PREFIX + field), int | float) for *_, field in _METRICS if field is not None)


def _labels(key: tuple[str, ...]) -> dict[str, str]:
    return {PREFIX + name: value for name, value in zip(_LABELS, key, strict=True)}
