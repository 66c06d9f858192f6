"""What a load run is told and what it tells: plan, one record a request, and the sums. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from lltm_ray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to send, and how fast."""

    url: str
    """Base URL; `/v1/chat/completions` is added."""
    model: str = ""
    """Empty takes the first that `/v1/models` lists."""
    api_key: str = field(default="", repr=False)
    requests: int | None = None
    """None: 200, or as many as `duration_s` lets through."""
    concurrency: int = 16
    """Requests in flight in the closed loop."""
    rate: float | None = None
    """Mean arrivals per second of the open loop; None is the closed loop."""
    duration_s: float | None = None
    """No request starts later than this; those that run are waited for."""
    prompt_tokens: int = 64
    max_tokens: int = 64
    stream: bool = True
    seed: int = 0
    """Of prompts and arrivals."""
    timeout_s: float = 600.0
    """For one request."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("url", self.url, "must look like http://127.0.0.1:8000")
        for name in ("requests", "concurrency", "rate", "duration_s", "prompt_tokens", "max_tokens", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(name, value, "must be more than 0")

    @property
    def request_limit(self) -> int | None:
        """Requests to send at most; None is bounded by the duration alone."""
        return 200 if self.requests is None and self.duration_s is None else self.requests


@dataclass(slots=True, kw_only=True)
class Sent:
    """One request. Times are seconds since the run's start."""

    due_s: float
    """When it was to be sent; all times of the result count from here."""
    started_s: float
    first_s: float | None = None
    """First generated content; streams only."""
    ended_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    engine: str = ""
    error: str = ""
    """Its kind; empty is success."""
    detail: str = ""
    reused: bool = False
    retried: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of one measured quantity, in milliseconds; linear interpolation between closest ranks."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a run measured. Times and token counts are those of successful requests."""

    model: str
    mode: str
    """`closed loop, 16 at a time` or `open loop, 50 req/s`."""
    seed: int
    requests: int
    """That ended: `ok` and failed ones."""
    ok: int
    cancelled: int
    """Were running when the run was interrupted."""
    retried: int
    """Sent once more because a kept connection had been closed meanwhile."""
    interrupted: bool
    wall_s: float
    requests_per_s: float
    """Successful ones."""
    output_tokens_per_s: float
    input_tokens: int
    output_tokens: int
    ttft_ms: Percentiles | None
    """To the first generated content; None without streaming."""
    latency_ms: Percentiles | None
    """To the end of the answer."""
    per_token_ms: Percentiles | None
    """Between the first and the last token, per token; None without streaming."""
    lateness_ms: Percentiles | None
    """How late the generator itself sent; open loop only. Near 0, or the generator was the bottleneck."""
    errors: dict[str, int]
    """How many of each kind."""
    error_examples: dict[str, str]
    """The first message of each kind."""
    engines: dict[str, int]
    """Successful requests per engine, as `x-lltm-engine` named it."""


def summarize(
    plan: LoadPlan, model: str, records: Sequence[Sent], *, wall_s: float, cancelled: int = 0, interrupted: bool = False
) -> LoadResult:
    """Sum the records of a run up that took `wall_s` seconds."""
    good = [record for record in records if not record.error]
    output_tokens = sum(record.output_tokens for record in good)
    examples: dict[str, str] = {}
    for record in records:
        if record.error:
            examples.setdefault(record.error, record.detail)
    return LoadResult(
        model=model,
        mode=f"open loop, {plan.rate:g} req/s" if plan.rate else f"closed loop, {plan.concurrency} at a time",
        seed=plan.seed,
        requests=len(records),
        ok=len(good),
        cancelled=cancelled,
        retried=sum(record.retried for record in records),
        interrupted=interrupted,
        wall_s=wall_s,
        requests_per_s=len(good) / wall_s if wall_s else 0.0,
        output_tokens_per_s=output_tokens / wall_s if wall_s else 0.0,
        input_tokens=sum(record.input_tokens for record in good),
        output_tokens=output_tokens,
        ttft_ms=percentiles([record.first_s - record.due_s for record in good if record.first_s is not None]),
        latency_ms=percentiles([record.ended_s - record.due_s for record in good]),
        per_token_ms=percentiles([pace for record in good if (pace := _pace_s(record)) is not None]),
        lateness_ms=percentiles([record.started_s - record.due_s for record in records]) if plan.rate else None,
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        error_examples=examples,
        engines=dict(sorted(Counter(record.engine for record in good if record.engine).items())),
    )


def _pace_s(record: Sent) -> float | None:
    if record.first_s is None or record.output_tokens < 2:
        return None
    return (record.ended_s - record.first_s) / (record.output_tokens - 1)


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """p50, p95 and p99 in milliseconds; None of nothing."""
    if not seconds:
        return None
    ranked = sorted(seconds)
    return Percentiles(p50=_at(ranked, 0.5), p95=_at(ranked, 0.95), p99=_at(ranked, 0.99))


def _at(ranked: Sequence[float], part: float) -> float:
    position = (len(ranked) - 1) * part
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return 1e3 * (ranked[low] + (ranked[high] - ranked[low]) * (position - low))
