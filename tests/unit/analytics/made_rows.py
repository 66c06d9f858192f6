"""A few requests and attempts written down by hand, as the tables that telemetry would hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa

from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import build_trace
from lltm_ray.analytics.trace import Trace

ZERO = 1_790_000_000_000_000_000
PANDAS = choose_engine("pandas")


@dataclass(frozen=True, kw_only=True)
class Try:
    """An attempt; moments are seconds since the window's start."""

    engine: str = "engine-0"
    asked: float = 0.0
    headers: float = math.nan
    first: float = math.nan
    ended: float = 0.0
    computed: int = 0
    generated: int = 0
    outcome: str = "ok"
    is_continued: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that arrived with its first attempt and ended with its last."""

    tries: tuple[Try, ...]
    tenant: str = "t"
    model: str = "m"
    error: str = ""


def trace_of(
    requests: list[Asked], gpus: dict[str, str] | None = None, length_s: float | None = None, since_s: float = 0.0
) -> Trace:
    """A window of these requests, on engines that have these GPUs."""
    kinds = {"requests": _requests(requests), "attempts": _attempts(requests), "servers": _servers(gpus or {})}
    end = None if length_s is None else ZERO + int(length_s * 1e9)
    return build_trace(kinds, PANDAS, start_unix_nano=ZERO + int(since_s * 1e9), end_unix_nano=end)


def _requests(requests: list[Asked]) -> pa.Table:
    rows = [
        {
            "trace_id": f"{i + 1:032x}",
            "span_id": f"{i + 1:016x}",
            "request_id": f"r-{i}",
            "route": "/v1/chat/completions",
            "model": each.model,
            "tenant": each.tenant,
            "status": 200,
            "error_type": each.error,
            "arrived_unix_nano": ZERO + round(each.tries[0].asked * 1e9),
            "total_s": each.tries[-1].ended - each.tries[0].asked,
            "is_stream": True,
        }
        for i, each in enumerate(requests)
    ]
    return pa.Table.from_pylist(rows)


def _attempts(requests: list[Asked]) -> pa.Table:
    rows = [
        {
            "request_span_id": f"{i + 1:016x}",
            "span_id": f"{(i + 1) * 1000 + number:016x}",
            "number": number,
            "engine": each.engine,
            "slot": 0,
            "asked_s": each.asked - asked.tries[0].asked,
            "sent_s": each.asked - asked.tries[0].asked if each.engine else math.nan,
            "headers_s": each.headers - asked.tries[0].asked,
            "first_s": each.first - asked.tries[0].asked,
            "ended_s": each.ended - asked.tries[0].asked,
            "computed_tokens": each.computed,
            "generated_tokens": each.generated,
            "delivered_tokens": each.generated,
            "outcome": each.outcome,
            "is_continued": each.is_continued,
        }
        for i, asked in enumerate(requests)
        for number, each in enumerate(asked.tries, 1)
    ]
    return pa.Table.from_pylist(rows)


def _servers(gpus: dict[str, str]) -> pa.Table:
    names = list(gpus)
    columns = {
        "engine": pa.array(names, pa.string()),
        "gpu_uuids": pa.array([gpus[name] for name in names], pa.string()),
        "at_unix_nano": pa.array([ZERO] * len(names), pa.int64()),
    }
    return pa.table(columns)
