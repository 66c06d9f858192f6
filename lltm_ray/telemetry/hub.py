"""The hub: takes batches in and hands their rows to the store, the metrics, the exporters and whoever listens.

Without Ray; the telemetry actor is a thin face of it. `put` works in the thread that calls it, one batch at a time, so
that senders feel when it is busy; an event loop calls it through an executor of one thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from opentelemetry.sdk.metrics.export import MetricReader

from lltm_ray.config import TelemetryConfig
from lltm_ray.telemetry.batch import SCHEMAS, Batch, unpack
from lltm_ray.telemetry.exporters import Exporters
from lltm_ray.telemetry.health import Health, Meter, tell
from lltm_ray.telemetry.instruments import Instruments
from lltm_ray.telemetry.profiles import read_profile
from lltm_ray.telemetry.resource import make_resource
from lltm_ray.telemetry.rows import KINDS, AttemptRow, RequestRow, SpanRow
from lltm_ray.telemetry.sampling import Sampler, Share, read_share
from lltm_ray.telemetry.spans import Place, Span, Spans
from lltm_ray.telemetry.store import Page, Store

_log = logging.getLogger(__name__)
_MOST_ORPHANS = 10_000
_ENDS = {"requests": "arrived_unix_nano", "spans": "end_unix_nano"}

OnRequest = Callable[[RequestRow, Sequence[AttemptRow]], None]
OnRows = Callable[[Sequence[Any]], None]


class Recorder(Meter, Protocol):
    """Where metrics are made; `instruments.Instruments`."""

    def record(self, request: RequestRow, attempts: Sequence[AttemptRow], kept: Sequence[Span] | None = None) -> None:
        """Measure a finished request."""

    def forget(self, engines: Collection[str]) -> None:
        """Let go of sums of engines that are gone."""

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush and stop."""


class Receipt(NamedTuple):
    """What became of a batch."""

    rows: int
    lag_s: float


class Hub:
    """One fleet's telemetry.

    Args:
        store: keeps rows.
        sampler: says whose spans are exported.
        exporters: take spans and logs.
        spans: makes spans of rows.
        instruments: makes metrics of requests.
    """

    def __init__(
        self, store: Store, sampler: Sampler, exporters: Exporters, spans: Spans, instruments: Recorder
    ) -> None:
        self.health = Health()
        self.places: Mapping[str, Place] = {}
        """Engine's name -> where it runs; the owner replaces it when the fleet changes."""
        self.on_request: list[OnRequest] = []
        """Called with each request and its attempts, in `put`'s thread."""
        self.on_rows: defaultdict[str, list[OnRows]] = defaultdict(list)
        """By kind, called with the rows of a batch, in `put`'s thread; kinds but requests and attempts."""
        self.instruments = instruments
        self._store, self._sampler, self._exporters, self._spans = store, sampler, exporters, spans
        self._orphans: OrderedDict[str, list[AttemptRow]] = OrderedDict()
        self._lock = threading.Lock()
        self._is_closed = False
        tell(self.health, exporters.counts, store.counts, instruments)

    def put(
        self,
        sender: str,
        batch: Batch,
        dropped: Mapping[str, int] | None = None,
        unsound: Mapping[str, int] | None = None,
    ) -> Receipt:
        """Take a batch in. Rows that cannot be understood are counted and cost only themselves.

        Args:
            sender: process that made it.
            batch: its rows.
            dropped: rows that it has lost since it started, by kind.
            unsound: rows of this batch that had to be left out, by kind.
        """
        with self._lock:
            rows = self._store.add(batch)
            sound = {kind: columns for kind, columns in batch.items() if _is_sound(kind, columns)}
            self.health.take(sender, {kind: len(columns) for kind, columns in sound.items()}, dropped or {})
            self.health.leave_out(sender, unsound or {})
            if sound:
                self.health.lag_s = self._guard(_lag_s, sound) or 0.0
            self._hand_on({kind: list(unpack(kind, columns)) for kind, columns in sound.items()})
            return Receipt(rows, self.health.lag_s)

    def read_since(
        self,
        cursor: int = 0,
        kinds: Sequence[str] | None = None,
        limit: int = 10_000,
        columns: Mapping[str, Collection[str]] | None = None,
    ) -> Page:
        """As `Store.read_since`."""
        return self._store.read_since(cursor, kinds, limit, columns)

    def find(self, kind: str, column: str, value: str, *, near: int | None, until_s: float) -> list[tuple[int, Any]]:
        """As `Store.find`; of any thread."""
        return self._store.find(kind, column, value, near=near, until_s=until_s)

    def forget(self, engines: frozenset[str]) -> None:
        """Let go of metrics of engines that are gone."""
        self.instruments.forget(engines)
        self._exporters.forget(engines)
        self.health.forget(engines)

    def status(self) -> dict[str, Any]:
        """For `/lltm/telemetry`: plain values."""
        exporters = {name: counts._asdict() for name, counts in self._exporters.counts().items()}
        return self.health.as_dict() | {"store": self._store.counts(), "exporters": exporters}

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush metrics, spans and rows, once; each of the first two until its own deadline."""
        if self._is_closed:
            return
        self._is_closed = True
        self.instruments.close(timeout_s)
        self._exporters.shutdown(timeout_s)
        self._store.close()

    def _hand_on(self, rows: dict[str, list[Any]]) -> None:
        attempts = self._join(rows.pop("attempts", []))
        kept: list[Span] = []
        for request in rows.pop("requests", []):
            own = sorted(attempts.pop(request.span_id, ()), key=lambda attempt: attempt.number)
            kept += self._guard(self._take, request, own)
        for span in rows.get("spans", ()):
            kept += self._guard(self._take_span, span)
        self._exporters.export(kept)
        self._exporters.export_logs(rows.get("logs", ()))
        for kind, some in rows.items():
            for listener in self.on_rows[kind]:
                self._guard(listener, some)
        while len(attempts) > _MOST_ORPHANS:
            attempts.popitem(last=False)

    def _join(self, attempts: Sequence[AttemptRow]) -> OrderedDict[str, list[AttemptRow]]:
        """By request; with those whose request is still to come."""
        for attempt in attempts:
            self._orphans.setdefault(attempt.request_span_id, []).append(attempt)
        return self._orphans

    def _take(self, request: RequestRow, attempts: Sequence[AttemptRow]) -> Sequence[Span]:
        why = self._sampler.decide(request)
        self.health.requests[why or "no"] += 1
        is_wanted = self._exporters.takes_spans
        spans = self._spans.of_request(request, attempts, self.places) if why and is_wanted else []
        self.instruments.record(request, attempts, spans if is_wanted else None)
        for listener in self.on_request:
            self._guard(listener, request, attempts)
        return spans

    def _take_span(self, row: SpanRow) -> Sequence[Span]:
        is_kept = self._sampler.decide_span(row) and self._exporters.takes_spans
        return [self._spans.of_row(row)] if is_kept else []

    def _guard(self, work: Callable[..., Any], *given: Any) -> Any:
        """What the work gives; nothing if it fails."""
        try:
            return work(*given)
        except Exception:  # noqa: BLE001 - border: one row must not cost the batch
            self.health.faults += 1
            if self.health.faults.bit_count() == 1:  # the 1st, 2nd, 4th, ...
                _log.exception("telemetry could not understand a row; such there were: %d", self.health.faults)
        return ()


def _is_sound(kind: str, columns: pa.RecordBatch) -> bool:
    return kind in KINDS and columns.schema.equals(SCHEMAS[kind])


def _lag_s(batch: Batch) -> float:
    """Now less the newest end; clocks of other hosts may be ahead."""
    ends = [_newest(kind, columns) for kind, columns in batch.items() if kind != "attempts" and len(columns)]
    return max(0.0, (time.time_ns() - max(ends)) / 1e9) if ends else 0.0


def _newest(kind: str, columns: pa.RecordBatch) -> int:
    ends = columns.column(_ENDS.get(kind, "at_unix_nano")).to_numpy()
    if kind == "requests":
        ends = ends + np.nan_to_num(columns.column("total_s").to_numpy() * 1e9).astype(np.int64)
    return int(ends.max())


def build_hub(
    config: TelemetryConfig,
    folder: Path | None,
    attributes: Mapping[str, str | int] | None = None,
    readers: Sequence[MetricReader] = (),
) -> Hub:
    """A hub of real parts, as the settings and the environment say.

    Args:
        config: the settings.
        folder: of segments; None: memory only.
        attributes: of the resource, such as the fleet's name.
        readers: of metrics, besides the exporters': Prometheus.

    Raises:
        ConfigError: a setting, or a variable of the environment, that cannot be used.
    """
    resource, profile = make_resource(attributes), read_profile(os.environ)
    share = read_share(os.environ) if config.sample_ratio is None else Share(config.sample_ratio)
    exporters = Exporters(config, resource, profile.schema_url)
    return Hub(
        Store(folder, max_rows=config.ring_rows, max_bytes=config.max_bytes, max_age_s=config.max_age_s),
        Sampler(
            share.ratio,
            config.slow_ratio,
            keep_unsampled=config.keep_unsampled or share.keep_unsampled,
            keep_sampled=share.keep_sampled,
        ),
        exporters,
        Spans(profile),
        Instruments(resource, profile, [*exporters.metric_readers(), *readers]),
    )
