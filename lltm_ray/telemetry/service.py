"""One fleet's telemetry, whole: the hub, the live view, timelines of requests, Prometheus' text. Not thread-safe."""

from __future__ import annotations

import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import Batch
from lltm_ray.telemetry.collective import Collectives
from lltm_ray.telemetry.energy import Energy
from lltm_ray.telemetry.hardware import observe_samples
from lltm_ray.telemetry.hub import Receipt, build_hub
from lltm_ray.telemetry.joules import Joules
from lltm_ray.telemetry.live import Live
from lltm_ray.telemetry.profiles import read_profile
from lltm_ray.telemetry.prometheus import PrometheusReader
from lltm_ray.telemetry.roll import Roll
from lltm_ray.telemetry.rows import AttemptRow, RequestRow, ServerRow, SpanRow
from lltm_ray.telemetry.samples import Samples
from lltm_ray.telemetry.spans import Place, Span, Spans
from lltm_ray.telemetry.store import Page

_SAMPLES = ("servers", "slots", "gpus", "nodes", "queues")
_MOST_TIMELINES = 5000
_MOST_SPANS = 256
"""Of one trace beside its requests' own: clients choose trace ids, and need not change them."""
_TIDY_S = 1.0
_RECALL_S = 3.0
"""Less than a gateway waits for an answer; a gibibyte of segments takes about two."""


class TelemetryService:
    """Takes batches, answers questions.

    Args:
        config: the settings.
        folder: of segments; None: memory only.
        attributes: of the resource, such as the fleet's name.
        clock: Unix seconds.

    Raises:
        ConfigError: a setting, or a variable of the environment, that cannot be used.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        folder: Path | None,
        attributes: Mapping[str, str | int] | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._tidied_s = clock, 0.0
        self._prometheus = PrometheusReader()
        self._hub = build_hub(config, folder, attributes, [self._prometheus])
        self._samples = Samples()
        self._live = Live(self._samples, clock)
        self._spans = Spans(read_profile(os.environ))
        self._requests: OrderedDict[str, tuple[RequestRow, Sequence[AttemptRow]]] = OrderedDict()
        self._others: OrderedDict[str, deque[SpanRow]] = OrderedDict()
        self._roll = Roll()
        self._hub.on_request += [self._live.add_request, self._keep]
        self._hub.on_rows["spans"] += [self._keep_spans, Collectives(self._hub.instruments).add]
        for kind in _SAMPLES:
            self._hub.on_rows[kind].append(partial(self._samples.add, kind))
        self._hub.on_rows["servers"].append(self._place_gpus)
        observe_samples(self._hub.instruments, self._samples)
        self._energy = Energy()
        self._joules = Joules(self._energy, self._hub.instruments, clock)
        self._hub.on_request.append(self._energy.add_request)
        self._hub.on_rows["servers"].append(self._energy.add_servers)
        self._hub.on_rows["slots"].append(self._energy.add_slots)
        self._hub.on_rows["gpus"].append(self._energy.add_gpus)

    def put(
        self, sender: str, batch: Batch, dropped: Mapping[str, int], unsound: Mapping[str, int] | None = None
    ) -> Receipt:
        """As `Hub.put`."""
        receipt = self._hub.put(sender, batch, dropped, unsound)
        if not 0 <= self._clock() - self._tidied_s < _TIDY_S:
            self._tidy()
        return receipt

    def place(self, places: Mapping[str, Place]) -> None:
        """Where the fleet's engines are now, by name; metrics of one that is not end 15 minutes after its last row."""
        self._roll.name(places)
        homes = {name: (place.node, place.gpu_uuids) for name, place in self._hub.places.items()}
        self._hub.places = {name: _with_gpus(place, *homes.get(name, ("", ()))) for name, place in places.items()}

    def _tidy(self) -> None:
        """Let go of what is gone, and share the joules that can be shared."""
        self._tidied_s = self._clock()
        self._live.forget(self._tidied_s)
        self._joules.settle()
        if gone := self._roll.gone(self._tidied_s):
            self._hub.forget(gone)
            self._joules.forget(gone)
            self._prometheus.forget(gone)

    def _place_gpus(self, rows: Sequence[ServerRow]) -> None:
        """Samplers know which devices an engine's share is."""
        homes = {row.engine: tuple(row.gpu_uuids.split(",")) for row in rows if row.gpu_uuids}
        self._hub.places = {
            name: place._replace(gpu_uuids=homes.get(name, place.gpu_uuids)) for name, place in self._hub.places.items()
        }

    def look(self) -> dict[str, Any]:
        """The fleet now, as JSON: `Live.look`, `energy` as `Joules.look`, and `telemetry`: this service's own state."""
        return self._live.look() | {"energy": self._joules.look(), "telemetry": self._hub.status()}

    def timeline(self, request_id: str) -> dict[str, Any] | None:
        """A request's spans: `{"request": row, "joules": float | None, "spans": [{"name", "start_s", ...}]}`.

        Times are seconds from its arrival. None: not among the latest 5000 since this process started; see `recall`.
        """
        found = self._requests.get(request_id)
        return None if found is None else self._told(*found, self._others.get(found[0].trace_id, ()))

    def recall(self, request_id: str, asked_s: float | None = None) -> dict[str, Any] | None:
        """As `timeline`, from the rows that are stored, the newest first; of any thread.

        None: not found within 3 s of `asked_s`, by the monotonic clock; of now if that is None.
        """
        find = partial(self._hub.find, until_s=(time.monotonic() if asked_s is None else asked_s) + _RECALL_S)
        found = find("requests", "request_id", request_id, near=None)
        if not found:
            return None
        near, request = found[-1]
        attempts = [row for _, row in find("attempts", "request_span_id", request.span_id, near=near)]
        others = [row for _, row in find("spans", "trace_id", request.trace_id, near=near)]
        return self._told(request, sorted(attempts, key=lambda each: each.number), others[-_MOST_SPANS:])

    def _told(self, request: RequestRow, attempts: Sequence[AttemptRow], others: Iterable[SpanRow]) -> dict[str, Any]:
        spans = self._spans.of_request(request, attempts, self._hub.places)
        spans += [self._spans.of_row(row) for row in others]
        shown = [_shown(span, request.arrived_unix_nano) for span in spans]
        row = {name: value if value == value else None for name, value in request._asdict().items()}  # noqa: PLR0124
        del row["prefix"], row["blocks"]  # for analytics alone
        return {"request": row, "joules": self._joules.of_request(request.span_id), "spans": shown}

    def metrics(self, *, is_open: bool = False) -> bytes:
        """All metrics as text; see `PrometheusReader.text`."""
        self._tidy()
        return self._prometheus.text(is_open=is_open)

    def read_since(
        self,
        cursor: int = 0,
        kinds: Sequence[str] | None = None,
        limit: int = 10_000,
        columns: Mapping[str, Collection[str]] | None = None,
    ) -> Page:
        """As `Store.read_since`."""
        return self._hub.read_since(cursor, kinds, limit, columns)

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush what is to be exported and stored."""
        self._hub.close(timeout_s)

    def _keep(self, request: RequestRow, attempts: Sequence[AttemptRow]) -> None:
        self._requests[request.request_id] = request, tuple(attempts)
        for engine in {attempt.engine for attempt in attempts if attempt.engine}:
            self._roll.see(engine, self._clock())
        while len(self._requests) > _MOST_TIMELINES:
            self._requests.popitem(last=False)

    def _keep_spans(self, rows: Sequence[SpanRow]) -> None:
        for row in rows:
            self._others.setdefault(row.trace_id, deque(maxlen=_MOST_SPANS)).append(row)
        while len(self._others) > _MOST_TIMELINES:
            self._others.popitem(last=False)


def _with_gpus(place: Place, node: str, gpu_uuids: tuple[str, ...]) -> Place:
    """With the devices that were known on its node; the fleet's directory does not tell them."""
    return place if place.gpu_uuids or place.node != node else place._replace(gpu_uuids=gpu_uuids)


def _shown(span: Span, arrived_unix_nano: int) -> dict[str, Any]:
    """A span for people, its times from the request's arrival."""
    told = {name: value for name, value in asdict(span).items() if name not in ("start_unix_nano", "end_unix_nano")}
    told["events"] = [
        {"name": event.name, "at_s": (event.at_unix_nano - arrived_unix_nano) / 1e9, "attributes": event.attributes}
        for event in span.events
    ]
    start_s, end_s = ((at - arrived_unix_nano) / 1e9 for at in (span.start_unix_nano, span.end_unix_nano))
    return told | {"start_s": start_s, "end_s": end_s}
