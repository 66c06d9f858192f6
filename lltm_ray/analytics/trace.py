"""A window of telemetry as frames of numbers: requests, attempts, spans, prefixes, blocks, and samples beside them.

All times are float64 seconds since `Trace.start_unix_nano`, durations are seconds, counts are int64, names are int64
codes of `Trace.names` (-1: none), and what did not happen is NaN. A row's number (`r` of a request, `a` of an attempt,
`s` of a span) is its place in its frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lltm_ray.analytics.frames import Engine, Frame

PHASES = ("request", "route", "attempt", "queue", "prefill", "decode")
"""Names of the spans that a request's rows make, in the order of their codes; others' names follow. `queue`, `prefill`
and `decode` are below their `attempt`, which like `route` is below the `request`."""
REQUEST, ROUTE, ATTEMPT, QUEUE, PREFILL, DECODE = range(len(PHASES))
FRAMES = ("requests", "attempts", "spans", "prefixes", "blocks", "engines", "gpus", "servers", "queues")


@dataclass(frozen=True, slots=True)
class Names:
    """What codes mean: code -> name."""

    engine: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    tenant: tuple[str, ...] = ()
    route: tuple[str, ...] = ()
    """HTTP routes."""
    conversation: tuple[str, ...] = ()
    policy: tuple[str, ...] = ()
    error: tuple[str, ...] = ()
    """Classes of errors, and outcomes of attempts that failed."""
    span: tuple[str, ...] = PHASES
    gpu: tuple[str, ...] = ()
    """UUIDs."""
    device: tuple[str, ...] = ()
    """GPUs' products."""
    node: tuple[str, ...] = ()
    gateway: tuple[str, ...] = ()

    def of(self, kind: str, code: float) -> str:
        """A name; empty for -1 and NaN."""
        return str(getattr(self, kind)[int(code)]) if code >= 0 else ""

    def decode(self, kind: str, codes: Any) -> list[str]:
        """Names of a column of the host."""
        return [self.of(kind, code) for code in codes]


@dataclass(frozen=True, slots=True)
class Trace:
    """One window. Frames are never changed; who needs a column more makes a frame of its own."""

    engine: Engine
    """Where the frames are."""
    start_unix_nano: int
    """Zero of all times."""
    length_s: float
    """Of the window."""
    names: Names
    trace_ids: pa.Array
    """Code of a trace -> its id, in the host's memory."""
    request_ids: pa.Array
    """`r` -> what `lltm-ray explain` takes, in the host's memory."""
    requests: Frame
    """r; trace, model, tenant, route, conversation, policy, error: codes; is_generating: 0 or 1; status; arrived_s,
    which may be before the window; ended_s; total_s, ttft_s: durations; engine, slot, gpu: of the last attempt;
    attempts: how many; cached, computed, generated, delivered: tokens; prompt: cached + computed; prompt_bytes;
    queue_s: waiting for a slot, here and in llama-server, over all attempts."""
    attempts: Frame
    """a, r, number; engine, slot, gpu, model: codes; asked_s, sent_s, headers_s, first_s, ended_s: moments; route_s,
    queue_s, prefill_s, decode_s: durations; cached, computed, generated, delivered: tokens; prompt_ms, predicted_ms:
    llama-server's; error: a code; is_continued: 0 or 1."""
    spans: Frame
    """s, parent: a row, -1 for a root; trace; r, a: -1 where it is of none; name; start_s, end_s; error, engine: codes;
    slot."""
    prefixes: Frame
    """r; depth: from 0; hash: of the prompt's beginning up to `end_bytes`, salted; end_bytes."""
    blocks: Frame
    """r; place: from 0; block: equal for equal text, salted; start: in bytes of the prompt; size."""
    engines: Frame
    """engine, node, gpu, device, model, share: GPUs it asked for. One row for each GPU; gpu -1 where there is none,
    device -1 where no sample of it tells."""
    gpus: Frame
    """at_s, gpu, device, node, utilization, memory_used_bytes, power_w, energy_j: since the driver was loaded,
    temperature_c, throttle: NVML's bits, -1 unknown."""
    servers: Frame
    """at_s, engine, model, slots_total, processing, deferred."""
    queues: Frame
    """at_s, gateway, model, waiting, running, rejected."""

    def on(self, engine: Engine) -> Trace:
        """The same on another engine."""
        if engine.name == self.engine.name:
            return self
        moved = {}
        for name in FRAMES:
            frame = self.engine.host(getattr(self, name))
            moved[name] = engine.frame({column: frame[column].to_numpy() for column in frame.columns})
        return replace(self, engine=engine, **moved)

    def evidence(self, requests: Any) -> tuple[str, ...]:
        """Trace ids of requests by their `r`, in the host's memory."""
        traces = self.requests["trace"]
        host = self.engine.host(traces.to_frame())["trace"].to_numpy() if self.engine.name != "pandas" else traces
        return tuple(self.trace_ids[int(host[int(r)])].as_py() for r in requests)

    def request_id(self, request: float) -> str:
        """What `lltm-ray explain` takes, of a request by its `r`."""
        return str(self.request_ids[int(request)].as_py() or "")

    @property
    def rows(self) -> Mapping[str, int]:
        """Frame -> rows."""
        return {each.name: len(getattr(self, each.name)) for each in fields(self) if each.name in FRAMES}


def is_empty(trace: Trace) -> bool:
    """Whether no request ended in the window."""
    return len(trace.requests) == 0


def nanos(trace: Trace, at_s: float) -> int:
    """A moment of the window as nanoseconds since the epoch."""
    return trace.start_unix_nano + int(np.rint(at_s * 1e9))
