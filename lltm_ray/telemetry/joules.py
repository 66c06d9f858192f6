"""What energy comes to: joules and tokens by engine and model, joules of single requests, balances of GPUs."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from typing import Any

from opentelemetry.metrics import Observation

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.energy import Energy
from lltm_ray.telemetry.health import Meter

_MOST_REQUESTS = 5000
_MOST_SUMS = 10_000


class Joules:
    """Sums of what `Energy` settles; for one thread, but metrics are read from any.

    Args:
        energy: fed by the owner.
        meter: where the sums are read as metrics.
        clock: Unix seconds.
    """

    def __init__(self, energy: Energy, meter: Meter, clock: Callable[[], float] = time.time) -> None:
        self._energy, self._clock = energy, clock
        self._sums: dict[tuple[str, str], tuple[float, int]] = {}
        """By engine and model; without an engine: of all that are gone."""
        self._requests: OrderedDict[str, float] = OrderedDict()
        served = "Energy of requests, a GPU's counter shared by their tokens"
        meter.observe("lltm.energy.requests", "counter", "J", served, lambda _: self._observe(0))
        text = "Tokens, computed and generated, that this energy was for"
        meter.observe("lltm.energy.tokens", "counter", "{token}", text, lambda _: self._observe(1))
        text = "A GPU's energy by what it was for; the kinds add up to its counter's growth"
        meter.observe("lltm.energy.gpu", "counter", "J", text, self._observe_gpus)

    def settle(self) -> None:
        """Take what has become known, and forget who is gone."""
        now_s = self._clock()
        for share in self._energy.settle(now_s):
            self._add(share.engine, share.model, share.joules, share.tokens)
            self._requests[share.request_span_id] = self._requests.get(share.request_span_id, 0.0) + share.joules
        self._energy.forget(now_s)
        while len(self._requests) > _MOST_REQUESTS:
            self._requests.popitem(last=False)
        while len(self._sums) > _MOST_SUMS:
            del self._sums[next(iter(self._sums))]

    def forget(self, engines: Collection[str]) -> None:
        """Have engines that are gone in nothing but the sums of all such."""
        for engine, model in [key for key in self._sums if key[0] in engines]:
            self._add("", model, *self._sums.pop((engine, model)))

    def _add(self, engine: str, model: str, joules: float, tokens: int) -> None:
        before_j, before = self._sums.get((engine, model), (0.0, 0))
        self._sums[engine, model] = before_j + joules, before + tokens

    def of_request(self, span_id: str) -> float | None:
        """Joules of a request by its SERVER span; None: not known yet, or not any more, or of no GPU."""
        return self._requests.get(span_id)

    def look(self) -> dict[str, Any]:
        """As JSON: `{"engines": [{"engine", "model", "joules", "tokens"}], "gpus": {uuid: {"attributed_j", ...}}}`."""
        engines = [
            {"engine": engine, "model": model, "joules": joules, "tokens": tokens}
            for (engine, model), (joules, tokens) in sorted(self._sums.items())
        ]
        return {"engines": engines, "gpus": {uuid: asdict(each) for uuid, each in self._energy.balances.items()}}

    def _observe(self, place: int) -> Iterator[Observation]:
        for (engine, model), sums in self._sums.copy().items():
            if engine:
                yield Observation(sums[place], {names.ENGINE: engine, names.REQUEST_MODEL: model})

    def _observe_gpus(self, _: object) -> Iterator[Observation]:
        for uuid, balance in self._energy.balances.items():
            kinds = {"requests": balance.attributed_j, "idle": balance.idle_j, "unknown": balance.unattributed_j}
            for kind, joules in kinds.items():
                yield Observation(joules, {"hw.id": uuid, "kind": kind})
