"""Settings of telemetry; `config` is where to import them from."""

from __future__ import annotations

from dataclasses import dataclass

from lltm_ray._settings import check as _check
from lltm_ray._settings import check_range as _check_range


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """What is kept of requests, engines and devices, and where it is sent. Metrics are never sampled."""

    enabled: bool = True
    """False: nothing is noted and nothing is sent."""
    exporters: tuple[str, ...] = ("otlp",)
    """Any of `otlp` (as the environment says; nothing where no `OTEL_EXPORTER_OTLP_*ENDPOINT` is set), `otlp-grpc`,
    `otlp-http`, `console`, and the names of entry points in the group `lltm_ray.exporters`. The two OTLP ones take an
    endpoint of their own after `=`, as `otlp-grpc=http://collector:4317`; all else is OpenTelemetry's environment."""
    sample_ratio: float | None = None
    """Share of ordinary requests whose spans are exported, chosen by trace id; errors and the slowest are exported
    besides. None: as `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` say where the fleet is started, else 1."""
    slow_ratio: float = 0.01
    """Share of each model's requests that are exported for being its slowest."""
    keep_unsampled: bool = False
    """Export also what the caller's `traceparent` marks as not sampled."""
    redact: str | None = None
    """`package.module:function`, which every captured text goes through."""
    capture_content: bool | None = None
    """Whether prompts and answers are captured. None: where `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` is
    `span_only` or `span_and_event` in the environment of who starts the fleet."""
    queue_spans: int = 20_000
    """Spans that may wait for one exporter, a few KiB each; beyond them the oldest are dropped."""
    ring_rows: int = 100_000
    """Rows of one kind kept in memory; a request is two to six rows of about 300 bytes."""
    segment_dir: str | None = None
    """Folder of Parquet segments, private to its user. None: `<cache>/telemetry/<fleet>`."""
    max_age_s: float = 7 * 86_400.0
    """Segments older than this are deleted; a week shows last week's pattern."""
    max_bytes: int = 2**30
    """Segments in all; beyond this the oldest are deleted."""

    def __post_init__(self) -> None:
        _check_range(
            self,
            sample_ratio=(0, 1),
            slow_ratio=(0, 1),
            queue_spans=(1, 10**7),
            ring_rows=(1, 10**8),
            max_age_s=(1, 10**10),
            max_bytes=(1, 2**50),
        )
        for name in self.exporters:
            _check(bool(name.partition("=")[0]), "exporters", name, "must name an exporter")
