"""The fleet at this moment, from the rows as they come in: what the live page and `lltm-ray top` show.

All figures are of rows that have arrived, so they lag by a sender's pause. Totals count since this process started.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import numpy as np

from lltm_ray.telemetry import semconv
from lltm_ray.telemetry.figures import read_phases, waited_s
from lltm_ray.telemetry.rows import AttemptRow, GpuRow, RequestRow, ServerRow
from lltm_ray.telemetry.samples import THROTTLES, Samples

WINDOW_S = 60.0
"""Percentiles and ratios are of requests that ended in so many last seconds."""
RATE_S = 10
"""Rates are means over so many last whole seconds."""
HISTORY_S = 300
_MOST_REQUESTS = 20_000
_MOST_RECENT = 100
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Live:
    """Windows of requests beside the latest samples; for one thread.

    Args:
        samples: of servers, slots, GPUs, machines and queues.
        clock: Unix seconds.
    """

    def __init__(self, samples: Samples, clock: Callable[[], float] = time.time) -> None:
        self._samples = samples
        self._clock = clock
        self._requests: deque[tuple[float, RequestRow, int, int, float]] = deque(maxlen=_MOST_REQUESTS)
        self._recent: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._seconds: OrderedDict[int, Counter[str]] = OrderedDict()
        self._totals: Counter[str] = Counter()
        self._holders: dict[tuple[str, int], str] = {}

    def add_request(self, row: RequestRow, attempts: Sequence[AttemptRow]) -> None:
        """A request has ended."""
        served = [each for each in attempts if each.generated_tokens or each.computed_tokens or each.cached_tokens]
        cached = served[0].cached_tokens if served else 0
        prompt = served[0].cached_tokens + served[0].computed_tokens if served else 0
        operation = semconv.OPERATIONS.get(row.route, "")
        queue_s = waited_s([read_phases(each, operation, row.total_s) for each in attempts])
        ended_s = row.arrived_unix_nano / 1e9 + row.total_s
        self._requests.append((ended_s, row, prompt, cached, queue_s))
        counts = {
            "requests": 1,
            "errors": int(bool(row.error_type)),
            "rejected": int(row.status == 429),
            "failovers": sum(each.is_continued and bool(each.engine) for each in attempts),
            "input_tokens": prompt,
            "cached_tokens": cached,
            "output_tokens": row.delivered_tokens,
        }
        self._totals.update(counts)
        self._second(int(ended_s)).update(counts)
        for each in attempts:
            self._holders[each.engine, each.slot] = row.request_id
        self._recent[row.request_id] = _line(row, attempts, prompt, cached, queue_s)
        self._recent.move_to_end(row.request_id)
        while len(self._recent) > _MOST_RECENT:
            self._recent.popitem(last=False)

    def look(self) -> dict[str, Any]:
        """Everything, as JSON: `totals`, `rates`, `latency_s`, `ttft_s`, `queue_s`, `engines`, `gpus`, ..."""
        now, samples = self._clock(), self._samples
        self.forget(now)
        rows = [each for each in self._requests if each[0] >= now - WINDOW_S]
        prompts, cached = sum(each[2] for each in rows), sum(each[3] for each in rows)
        return {
            "at_unix_nano": int(now * 1e9),
            "window_s": WINDOW_S,
            "totals": dict(self._totals),
            "rates": self._rates(int(now)),
            "latency_s": _quantiles([row.total_s for _, row, *_ in rows if not row.error_type]),
            "ttft_s": _quantiles([row.ttft_s for _, row, *_ in rows if not isnan(row.ttft_s)]),
            "queue_s": _quantiles([queue_s for *_, queue_s in rows if not isnan(queue_s)]),
            "reuse_ratio": cached / prompts if prompts else None,
            "errors": dict(Counter(row.error_type for _, row, *_ in rows if row.error_type)),
            "queues": [row._asdict() for row in samples.queues.values()],
            "engines": [self._engine(row) for _, row in sorted(samples.servers.items())],
            "gpus": [_gpu(row) for row in sorted(samples.gpus.values(), key=lambda row: (row.node, row.gpu))],
            "nodes": [row._asdict() for _, row in sorted(samples.nodes.items())],
            "history": self._history(int(now)),
            "recent": list(reversed(self._recent.values())),
        }

    def forget(self, now_s: float) -> None:
        """Drop what is over or was not seen lately, samples too; `now_s` in Unix seconds."""
        self._samples.forget(now_s)
        self._holders = {key: each for key, each in self._holders.items() if key[0] in self._samples.servers}
        while self._requests and self._requests[0][0] < now_s - WINDOW_S:
            self._requests.popleft()

    def _second(self, second: int) -> Counter[str]:
        found = self._seconds.get(second)
        if found is None:
            found = self._seconds[second] = Counter()
            while len(self._seconds) > HISTORY_S + RATE_S:
                del self._seconds[min(self._seconds)]
        return found

    def _rates(self, now: int) -> dict[str, float]:
        last: Counter[str] = Counter()
        for second in range(now - RATE_S, now):
            last.update(self._seconds.get(second, {}))
        names = ("requests", "errors", "input_tokens", "cached_tokens", "output_tokens")
        return {f"{name}_s": last[name] / RATE_S for name in names}

    def _history(self, now: int) -> dict[str, list[int]]:
        seconds = range(now - HISTORY_S, now)
        names = ("requests", "errors", "output_tokens")
        series = {
            name: [self._seconds[each][name] if each in self._seconds else 0 for each in seconds] for name in names
        }
        return {"unix_s": list(seconds)} | series

    def _engine(self, row: ServerRow) -> dict[str, Any]:
        samples, name = self._samples, row.engine
        slots = sorted(key for key in samples.slots if key[0] == name)
        return row._asdict() | {
            "prompt_tokens_s": samples.rate(name, "prompt_tokens"),
            "predicted_tokens_s": samples.rate(name, "predicted_tokens"),
            "cpu_ratio": samples.rate(name, "cpu_s"),
            "slots": [samples.slots[key]._asdict() | {"request_id": self._holders.get(key, "")} for key in slots],
        }


def _line(row: RequestRow, attempts: Sequence[AttemptRow], prompt: int, cached: int, queue_s: float) -> dict[str, Any]:
    tried = [each for each in attempts if each.engine]
    last = tried[-1] if tried else None
    return {
        "request_id": row.request_id,
        "trace_id": row.trace_id,
        "arrived_unix_nano": row.arrived_unix_nano,
        "route": row.route,
        "model": row.model,
        "engine": last.engine if last else "",
        "slot": last.slot if last else -1,
        "attempts": len(tried),
        "status": row.status,
        "error_type": row.error_type,
        "input_tokens": prompt,
        "cached_tokens": cached,
        "output_tokens": row.delivered_tokens,
        "queue_s": _known(queue_s),
        "ttft_s": _known(row.ttft_s),
        "total_s": row.total_s,
        "why": row.why,
    }


def _gpu(row: GpuRow) -> dict[str, Any]:
    return row._asdict() | {"throttle": [reason for reason, bit in THROTTLES.items() if (row.throttle or 0) & bit]}


def _quantiles(values: list[float]) -> dict[str, float | None]:
    """By linear interpolation between order statistics (NumPy's default, Hyndman and Fan's type 7)."""
    if not values:
        return dict.fromkeys(_QUANTILES)
    found = np.quantile(values, list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, found.tolist(), strict=True))


def _known(value: float) -> float | None:
    """None for what did not happen."""
    return None if isnan(value) else value
