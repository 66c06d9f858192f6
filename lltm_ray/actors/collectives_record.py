"""What a collective call took: bytes, seconds, bandwidth; as a row for telemetry."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lltm_ray.telemetry.rows import SpanRow


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRecord:
    """One call, of one rank or of all of them together."""

    operation: str
    backend: str
    """`nccl` or `gloo`."""
    dtype: str
    ranks: int
    nbytes: int
    """S of nccl-tests: a rank's tensor, for all_gather what each ends up with, for reduce_scatter what each puts in."""
    seconds: float
    """Of the slowest rank, from where all have agreed on the call to where the tensor is there."""
    began_unix_nano: int

    @property
    def algorithm_bytes_s(self) -> float:
        """S / t."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def bus_bytes_s(self) -> float:
        """What a link carries, whatever the number of ranks: compare it with the hardware's figure."""
        return self.algorithm_bytes_s * bus_factor(self.operation, self.ranks)

    def as_dict(self) -> dict[str, Any]:
        """With both bandwidths, for JSON."""
        return {**asdict(self), "algorithm_bytes_s": self.algorithm_bytes_s, "bus_bytes_s": self.bus_bytes_s}


def bus_factor(operation: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth, as in nccl-tests' doc/PERFORMANCE.md."""
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if operation in ("all_gather", "reduce_scatter"):
        return (ranks - 1) / ranks
    return 1.0


def together(records: Sequence[CollectiveRecord]) -> CollectiveRecord:
    """One call as its slowest rank saw it."""
    began = min(record.began_unix_nano for record in records)
    return replace(max(records, key=lambda record: record.seconds), began_unix_nano=began)


def span_of(record: CollectiveRecord, error: Exception | None = None) -> SpanRow:
    """The call as a row of telemetry: a trace of its own."""
    from lltm_ray.telemetry.collective import PREFIX, SPAN  # OpenTelemetry is not needed where nobody is told

    attributes = {PREFIX + name: value for name, value in record.as_dict().items() if name != "began_unix_nano"}
    return SpanRow(
        trace_id=secrets.token_hex(16),
        span_id=secrets.token_hex(8),
        parent_span_id="",
        name=f"{SPAN} {record.operation}",
        kind="internal",
        start_unix_nano=record.began_unix_nano,
        end_unix_nano=record.began_unix_nano + int(record.seconds * 1e9),
        error_type=type(error).__name__ if error else "",
        error=str(error) if error else "",
        engine="",
        attributes=json.dumps(attributes),
    )
