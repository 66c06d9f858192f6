"""What taking telemetry in costs: spans a second through one hub, in CPU time of one core.

`python -m tests.peers.telemetry [--requests N]`. Batches are as gateways send them: 250 requests, each with its
attempt, 6 spans each. Metrics, sampler and store are the real ones. `every span made` has an exporter that throws them
away. With OTLP, encoding runs in the exporter's thread, and "all CPU" holds the receiving sink's as well.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.context import new_span_id, new_trace_id
from lltm_ray.telemetry.exporters import Exporters
from lltm_ray.telemetry.hub import Hub, build_hub
from lltm_ray.telemetry.instruments import Instruments
from lltm_ray.telemetry.outbox import Outbox
from lltm_ray.telemetry.parcel import Parcel, Row, unseal
from lltm_ray.telemetry.profiles import read_profile
from lltm_ray.telemetry.resource import make_resource
from lltm_ray.telemetry.rows import AttemptRow, RequestRow
from lltm_ray.telemetry.sampling import Sampler
from lltm_ray.telemetry.spans import Spans
from lltm_ray.telemetry.store import Store
from tests.otlp_sink import http_sink
from tests.unit.telemetry.rows_made import attempt_row, request_row

BATCH, SPANS = 250, 6


def pair(draw: random.Random) -> tuple[RequestRow, AttemptRow]:
    """A streamed chat of some length."""
    ids = {"trace_id": new_trace_id()}
    total_s = draw.lognormvariate(0, 0.5)
    request = request_row(
        **ids,
        span_id=new_span_id(),
        request_id=f"req-{draw.getrandbits(48):x}",
        arrived_unix_nano=time.time_ns() - round(total_s * 1e9),
        total_s=total_s,
        ttft_s=total_s * 0.2,
        why="engine-2 holds 812 of 1024 prompt tokens; expected 31 ms against 92 ms on engine-0",
    )
    offsets = dict(zip(("sent_s", "headers_s", "first_s", "ended_s"), (0.05, 0.06, 0.2, 0.99), strict=True))
    attempt = attempt_row(
        **ids,
        request_span_id=request.span_id,
        span_id=new_span_id(),
        engine=f"engine-{draw.randrange(4)}",
        **{name: share * total_s for name, share in offsets.items()},
    )
    return request, attempt


def parcels(requests: int) -> list[Parcel]:
    """So many requests, as they travel."""
    draw = random.Random(1)
    outbox, made = Outbox(), []

    def tell() -> list[tuple[str, Row]]:
        request, attempt = pair(draw)
        return [("attempts", attempt), ("requests", request)]

    for _ in range(requests // BATCH):
        for _ in range(BATCH):
            outbox.later(tell)
        made.append(outbox.take())
    return made


class Nowhere(Exporters):
    """Takes spans and forgets them."""

    takes_spans = True

    def export(self, spans: Any) -> None:
        """Nothing."""


def discarding(folder: Path) -> Hub:
    """A hub that makes every span."""
    config, profile = TelemetryConfig(exporters=()), read_profile({})
    resource = make_resource()
    parts = Nowhere(config, resource), Spans(profile), Instruments(resource, profile)
    return Hub(Store(folder), Sampler(), *parts)


def measure(hub: Hub, load: list[Parcel]) -> dict[str, Any]:
    """Put everything in; CPU time of this thread and of the process, and the longest put."""
    longest_s, cpu_s, thread_s = 0.0, time.process_time(), time.thread_time()
    for parcel in load:
        began = time.perf_counter()
        batch, unsound = unseal(parcel)
        hub.put("bench", batch, {}, unsound)
        longest_s = max(longest_s, time.perf_counter() - began)
    thread_s = time.thread_time() - thread_s
    hub.close(timeout_s=60.0)
    cpu_s = time.process_time() - cpu_s
    spans = len(load) * BATCH * SPANS
    return {
        "spans": spans,
        "spans/s in put": round(spans / thread_s),
        "spans/s of all CPU": round(spans / cpu_s),
        "longest put ms": round(longest_s * 1e3, 1),
    }


def main() -> None:
    """Print one line for each set-up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    load = parcels(parser.parse_args().requests)
    with http_sink() as sink, tempfile.TemporaryDirectory() as folder:
        report("every span made", discarding(Path(folder) / "made"), load)
        for name, exporters, ratio in (
            ("store and metrics", (), 1.0),
            ("and OTLP, 10 % sampled", (f"otlp-http={sink.endpoint}",), 0.1),
            ("and OTLP, all sampled", (f"otlp-http={sink.endpoint}",), 1.0),
        ):
            config = TelemetryConfig(exporters=exporters, sample_ratio=ratio, queue_spans=10**6)
            report(name, build_hub(config, Path(folder) / name.replace(" ", "-")), load)


def report(name: str, hub: Hub, load: list[Parcel]) -> None:
    """One line."""
    print(f"{name:24}", *(f"{key}: {value:>8}" for key, value in measure(hub, load).items()), sep="  ")


if __name__ == "__main__":
    main()
