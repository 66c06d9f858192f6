"""Figures over one program's requests: percentiles of what is remembered, totals of everything."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from lltm_ray.sdk.result import InferResult


class Figures:
    """Thread-safe; memory is bounded by `keep`.

    Args:
        keep: requests whose times are remembered.
        clock: monotonic seconds.
    """

    def __init__(self, keep: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.RLock()  # the garbage collector may end a stream, and so call `add`, inside of it
        self._clock = clock
        self._latency_ms: deque[float] = deque(maxlen=keep)
        self._ttft_ms: deque[float] = deque(maxlen=keep)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._latency_ms.clear()
            self._ttft_ms.clear()
            self._requests = self._failed = self._tokens = 0
            self._first_s = self._last_s = 0.0

    def add(self, result: InferResult) -> None:
        """Count a request that has just ended; of one that failed only that it did."""
        now_s = self._clock()
        with self._lock:
            began_s = now_s - result.latency_ms / 1e3
            self._first_s = min(self._first_s, began_s) if self._requests else began_s
            self._last_s = now_s
            self._requests += 1
            self._failed += not result.success
            self._tokens += result.tokens_generated
            if result.success:
                self._latency_ms.append(result.latency_ms)
                if result.ttft_ms is not None:
                    self._ttft_ms.append(result.ttft_ms)

    def summary(self) -> dict[str, dict[str, float]]:
        """`latency` and `ttft` of the answers that came, in ms, and `throughput` of all.

        Rates are over the time from the first request's start to the last one's end: concurrent requests add up.
        """
        with self._lock:
            elapsed_s = self._last_s - self._first_s
            return {
                "latency": _distribution(list(self._latency_ms)),
                "ttft": _distribution(list(self._ttft_ms)),
                "throughput": {
                    "total_requests": self._requests,
                    "failed_requests": self._failed,
                    "total_tokens": self._tokens,
                    "requests_per_sec": self._requests / elapsed_s if elapsed_s else 0.0,
                    "tokens_per_sec": self._tokens / elapsed_s if elapsed_s else 0.0,
                },
            }


def _distribution(values: Sequence[float]) -> dict[str, float]:
    """Percentiles by linear interpolation (NumPy's default); zeros without a value."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p95", "p99", "min", "max"), 0.0) | {"sample_count": 0}
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    low, high, mean = min(values), max(values), float(np.mean(values))
    return {"mean": mean, "p50": p50, "p95": p95, "p99": p99, "min": low, "max": high, "sample_count": len(values)}
