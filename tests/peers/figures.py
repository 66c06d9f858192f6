"""Figures of one row, from the replies of one run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .client import Reply

Row = dict[str, Any]


def percentiles(values: Iterable[float]) -> list[float] | None:
    """p50, p95, p99 in milliseconds."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1e3 for p in (50, 95, 99)] if ordered else None


def median(values: Iterable[float | None]) -> float | None:
    """Of what there is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summarize(replies: Sequence[Reply], wall_s: float) -> Row:
    """What the client alone can tell."""
    good = [reply for reply in replies if reply.ok]
    told = [reply for reply in good if reply.cached_tokens is not None]
    return {
        "requests": len(replies),
        "ok": len(good),
        "errors": dict(Counter(reply.error[:60] for reply in replies if reply.error)),
        "ttft_ms": percentiles(reply.ttft_s for reply in good if reply.ttft_s is not None),
        "total_ms": percentiles(reply.took_s for reply in good),
        "tokens_per_s": sum(reply.output_tokens or 0 for reply in good) / wall_s,
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in good),
        "cached_told": sum(reply.cached_tokens or 0 for reply in told) if told else None,
        "wrong_length": sum(len(reply.text) != reply.max_tokens for reply in good),
        "other_text": sum(reply.expected is not None and reply.text != reply.expected for reply in good),
        "compared": sum(reply.expected is not None for reply in good),
        "wall_s": wall_s,
    }
