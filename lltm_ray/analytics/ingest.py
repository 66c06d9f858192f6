"""Rows of telemetry, as Arrow tables, made into a `Trace`.

The kinds and columns are those of `lltm_ray.telemetry.rows`; a kind or a column that is missing reads as empty, so
that segments of an older release can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lltm_ray._prefix import END_BYTES, SIZE_BITS
from lltm_ray.analytics import phases
from lltm_ray.analytics.columns import NONE, Floats, Ints, encode, find, floats, ints, seconds, span_ids
from lltm_ray.analytics.frames import Engine
from lltm_ray.analytics.trace import PHASES, Names, Trace

_GENERATING = frozenset(
    (
        *("/chat/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/responses"),
        *("/completion", "/completions", "/v1/completions", "/infill"),
    )
)
_GPU = ("memory_used_bytes", "power_w", "energy_j", "temperature_c")
_HASH = np.dtype(">i8")
_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
COLUMNS: Mapping[str, Mapping[str, pa.DataType]] = {
    "requests": {
        **dict.fromkeys(("trace_id", "span_id", "parent_span_id", "request_id", "route", "model", "tenant"), _TEXT),
        **dict.fromkeys(("conversation", "error_type", "policy"), _TEXT),
        **dict.fromkeys(("arrived_unix_nano", "status", "delivered_tokens", "prompt_bytes"), _INT),
        **dict.fromkeys(("ttft_s", "total_s"), _FLOAT),
        **dict.fromkeys(("prefix", "blocks"), pa.binary()),
    },
    "attempts": {
        **dict.fromkeys(("request_span_id", "span_id", "engine", "outcome"), _TEXT),
        **dict.fromkeys(("number", "slot"), _INT),
        **dict.fromkeys(("cached_tokens", "computed_tokens", "generated_tokens", "delivered_tokens"), _INT),
        **dict.fromkeys(("asked_s", "sent_s", "headers_s", "first_s", "ended_s", "prompt_ms", "predicted_ms"), _FLOAT),
        "is_continued": pa.bool_(),
    },
    "spans": {
        **dict.fromkeys(("trace_id", "span_id", "parent_span_id", "name", "error_type", "engine"), _TEXT),
        **dict.fromkeys(("start_unix_nano", "end_unix_nano"), _INT),
    },
    "gpus": {
        **dict.fromkeys(("node", "uuid", "name"), _TEXT),
        **dict.fromkeys(("at_unix_nano", "memory_used_bytes", "throttle"), _INT),
        **dict.fromkeys(("utilization_ratio", "power_w", "energy_j", "temperature_c"), _FLOAT),
    },
    "servers": {
        **dict.fromkeys(("node", "engine", "model", "gpu_uuids"), _TEXT),
        **dict.fromkeys(("at_unix_nano", "slots_total"), _INT),
        **dict.fromkeys(("share", "processing", "deferred"), _FLOAT),
    },
    "queues": {
        **dict.fromkeys(("gateway", "model"), _TEXT),
        **dict.fromkeys(("at_unix_nano", "waiting", "running", "rejected"), _INT),
    },
}
"""Kind -> the columns that are read, with their types; no other kind is."""
_SAMPLES = ("gpus", "servers", "queues")


def build_trace(
    tables: Mapping[str, pa.Table],
    engine: Engine,
    *,
    start_unix_nano: int | None = None,
    end_unix_nano: int | None = None,
) -> Trace:
    """What ended, and what was sampled, within a window.

    Args:
        tables: kind -> rows, as the telemetry actor gives them.
        engine: where the frames shall be.
        start_unix_nano: the window's begin; None: the first arrival or sample.
        end_unix_nano: the window's end, exclusive; None: the last end or sample.
    """
    return _Ingest(tables, engine, start_unix_nano, end_unix_nano).trace()


class _Ingest:
    """One window in the making; arrays of the host until the end."""

    def __init__(self, tables: Mapping[str, pa.Table], engine: Engine, start: int | None, end: int | None) -> None:
        self._engine = engine
        self._tables = dict(tables)
        arrived = ints(self._of("requests", "arrived_unix_nano"))
        total = np.nan_to_num(floats(self._of("requests", "total_s")))
        ended = arrived + np.rint(total * 1e9).astype(np.int64)
        moments = [ints(self._of(kind, "at_unix_nano")) for kind in _SAMPLES]
        began, over = (ints(self._of("spans", f"{name}_unix_nano")) for name in ("start", "end"))
        starts = [each.min() for each in (arrived, *moments) if len(each)]
        starts += [began.min()] if len(began) and not starts else []
        ends = [each.max() for each in (ended, over, *moments) if len(each)]
        self._start = int(start if start is not None else min(starts, default=0))
        self._end = int(end if end is not None else max(ends, default=self._start) + 1)
        self._keep_window(ended)

    def _keep_window(self, ended: Ints) -> None:
        """Requests count by their end; their attempts go with them."""
        inside = (ended >= self._start) & (ended < self._end)
        if not inside.all():
            self._tables["requests"] = self._tables["requests"].filter(pa.array(inside))
        for kind, column in (("spans", "end_unix_nano"), *((kind, "at_unix_nano") for kind in _SAMPLES)):
            if kind in self._tables:
                at = self._of(kind, column)
                within = pc.and_(pc.greater_equal(at, self._start), pc.less(at, self._end))
                self._tables[kind] = self._tables[kind].filter(within)

    def _of(self, kind: str, name: str) -> Any:
        missing, table = COLUMNS[kind][name], self._tables.get(kind)
        if table is not None and name in table.column_names:
            return table[name]
        rows = 0 if table is None else table.num_rows
        return pa.chunked_array([pa.nulls(rows, missing)])

    def trace(self) -> Trace:
        """All of it."""
        self._encode()
        attempts = self._attempts()
        requests = self._requests(attempts)
        spans = phases.build_spans(requests, attempts, self._own_spans())
        frame = self._engine.frame
        hidden = {"span", "parent", "t"}
        shown = {name: column for name, column in requests.items() if name not in hidden}
        return Trace(
            engine=self._engine,
            start_unix_nano=self._start,
            length_s=(self._end - self._start) / 1e9,
            names=self._names,
            trace_ids=pa.array(self._trace_names, pa.string()),
            request_ids=self._of("requests", "request_id").combine_chunks(),
            requests=frame(shown),
            attempts=frame({name: column for name, column in attempts.items() if name != "span"}),
            spans=frame(spans),
            prefixes=frame(self._prefixes()),
            blocks=frame(self._blocks()),
            engines=frame(self._engines),
            **{kind: frame(columns) for kind, columns in self._samples().items()},
        )

    # --- names

    def _encode(self) -> None:
        of = self._of
        engines, found = encode([of(kind, "engine") for kind in ("attempts", "spans", "servers")])
        self._engine_codes = dict(zip(("attempts", "spans", "servers"), found, strict=True))
        models, found = encode([of(kind, "model") for kind in ("requests", "servers", "queues")])
        self._model_codes = dict(zip(("requests", "servers", "queues"), found, strict=True))
        outcomes = pc.if_else(pc.is_in(of("attempts", "outcome"), _FINE), "", of("attempts", "outcome"))
        errors, found = encode([of("requests", "error_type"), outcomes, of("spans", "error_type")])
        self._error_codes = dict(zip(("requests", "attempts", "spans"), found, strict=True))
        spans, (self._span_codes,) = encode([of("spans", "name")], PHASES)
        self._trace_names, found = encode([of("requests", "trace_id"), of("spans", "trace_id")])
        self._trace_codes = dict(zip(("requests", "spans"), found, strict=True))
        of_servers = pc.list_flatten(pc.split_pattern(pc.unique(pc.fill_null(of("servers", "gpu_uuids"), "")), ","))
        gpus, (self._gpu_codes, _) = encode([of("gpus", "uuid"), of_servers])
        devices, (self._device_codes,) = encode([of("gpus", "name")])
        nodes, found = encode([of(kind, "node") for kind in ("gpus", "servers")])
        self._node_codes = dict(zip(("gpus", "servers"), found, strict=True))
        singles = {}
        self._codes: dict[str, Ints] = {}
        for name in ("tenant", "route", "conversation", "policy"):
            singles[name], (self._codes[name],) = encode([of("requests", name)])
        gateways, (self._codes["gateway"],) = encode([of("queues", "gateway")])
        self._names = Names(
            engine=engines,
            model=models,
            error=errors,
            span=spans,
            gpu=gpus,
            device=devices,
            node=nodes,
            gateway=gateways,
            **singles,
        )
        self._engines = self._read_engines()

    def _read_engines(self) -> dict[str, Any]:
        """The last that servers told of where they are."""
        share = floats(self._of("servers", "share"))
        uuids = self._of("servers", "gpu_uuids").to_pylist()
        engine, node, model = (self._engine_codes["servers"], self._node_codes["servers"], self._model_codes["servers"])
        last = {int(code): row for row, code in enumerate(engine) if code >= 0}
        known = {name: code for code, name in enumerate(self._names.gpu)}
        rows = [
            (code, node[row], known.get(uuid, NONE), model[row], share[row])
            for code, row in sorted(last.items())
            for uuid in (uuids[row] or "").split(",")
        ]
        columns = list(zip(*rows, strict=True)) or [()] * 5
        kinds = (np.int64, np.int64, np.int64, np.int64, np.float64)
        names = ("engine", "node", "gpu", "model", "share")
        found = {name: np.array(each, kind) for name, each, kind in zip(names, columns, kinds, strict=True)}
        device = np.full(len(self._names.gpu) + 1, NONE, np.int64)
        device[self._gpu_codes] = self._device_codes
        device[NONE] = NONE
        return found | {"device": device[found["gpu"]]}

    # --- frames

    def _attempts(self) -> dict[str, Any]:
        of = self._of
        keys = span_ids(of("requests", "span_id"))
        r = find(keys, span_ids(of("attempts", "request_span_id")))
        keep = np.flatnonzero(r >= 0)
        number = ints(of("attempts", "number"))
        keep = keep[np.lexsort((number[keep], r[keep]))]
        arrived = seconds(of("requests", "arrived_unix_nano"), self._start)
        total = floats(of("requests", "total_s"))
        owner = r[keep]
        engine = self._engine_codes["attempts"][keep]
        columns: dict[str, Any] = {
            "a": np.arange(len(keep)),
            "r": owner,
            "number": number[keep],
            "engine": engine,
            "slot": ints(of("attempts", "slot"))[keep],
            "gpu": self._gpu_of(engine),
            "model": self._model_codes["requests"][owner],
            "error": self._error_codes["attempts"][keep],
            "span": span_ids(of("attempts", "span_id"))[keep],
        }
        offsets = {
            name: floats(of("attempts", name))[keep]
            for name in ("asked_s", "sent_s", "headers_s", "first_s", "ended_s")
        }
        for name in ("prompt_ms", "predicted_ms"):
            columns[name] = floats(of("attempts", name))[keep]
        for name in ("cached", "computed", "generated", "delivered"):
            columns[name] = np.maximum(ints(of("attempts", f"{name}_tokens"))[keep], 0)
        columns["is_continued"] = np.maximum(ints(of("attempts", "is_continued"))[keep], 0)
        is_generating = self._is_generating()[owner]
        columns |= phases.attempt_phases(offsets, columns, arrived[owner], total[owner], is_generating)
        return columns

    def _gpu_of(self, engine: Ints) -> Ints:
        """An engine's first GPU."""
        first = np.full(len(self._names.engine) + 1, NONE, np.int64)
        for code, gpu in zip(self._engines["engine"][::-1], self._engines["gpu"][::-1], strict=True):
            first[code] = gpu
        return first[engine]

    def _is_generating(self) -> Ints:
        known = np.array([name in _GENERATING for name in self._names.route] + [False])
        return known[self._codes["route"]].astype(np.int64)

    def _requests(self, attempts: Mapping[str, Any]) -> dict[str, Any]:
        of = self._of
        arrived = seconds(of("requests", "arrived_unix_nano"), self._start)
        total = floats(of("requests", "total_s"))
        columns: dict[str, Any] = {
            "r": np.arange(len(arrived)),
            "trace": self._trace_codes["requests"],
            "model": self._model_codes["requests"],
            **{name: self._codes[name] for name in ("tenant", "route", "conversation", "policy")},
            "error": self._error_codes["requests"],
            "is_generating": self._is_generating(),
            "status": ints(of("requests", "status")),
            "arrived_s": arrived,
            "ended_s": arrived + total,
            "total_s": total,
            "ttft_s": floats(of("requests", "ttft_s")),
            "delivered": np.maximum(ints(of("requests", "delivered_tokens")), 0),
            "prompt_bytes": np.maximum(ints(of("requests", "prompt_bytes")), 0),
            "span": span_ids(of("requests", "span_id")),
            "parent": span_ids(of("requests", "parent_span_id")),
        }
        return columns | phases.sum_up(attempts, len(arrived))

    def _own_spans(self) -> dict[str, Any]:
        of = self._of
        return {
            "span": span_ids(of("spans", "span_id")),
            "parent": span_ids(of("spans", "parent_span_id")),
            "trace": self._trace_codes["spans"],
            "name": self._span_codes,
            "start_s": seconds(of("spans", "start_unix_nano"), self._start),
            "end_s": seconds(of("spans", "end_unix_nano"), self._start),
            "error": self._error_codes["spans"],
            "engine": self._engine_codes["spans"],
        }

    def _prefixes(self) -> dict[str, Any]:
        r, depth, hashes = self._hashes("prefix")
        ends: Ints = np.asarray(END_BYTES, np.int64)
        return {"r": r, "depth": depth, "hash": hashes, "end_bytes": ends[depth]}

    def _blocks(self) -> dict[str, Any]:
        r, place, block = self._hashes("blocks")
        size = block & (2**SIZE_BITS - 1)
        before = np.cumsum(size) - size
        start = before - before[np.arange(len(r)) - place]
        return {"r": r, "place": place, "block": block, "start": start, "size": size}

    def _hashes(self, name: str) -> tuple[Ints, Ints, Ints]:
        """A request's stand one after the other, 8 bytes each: r, place within the request, value."""
        column = pc.fill_null(self._of("requests", name), b"")
        count = ints(pc.binary_length(column)) // _HASH.itemsize
        joined = b"".join(column.to_pylist()) if len(column) else b""
        r = np.repeat(np.arange(len(count)), count)
        first = np.repeat(np.cumsum(count) - count, count)
        return r, np.arange(len(r)) - first, np.frombuffer(joined, _HASH).astype(np.int64)

    def _samples(self) -> dict[str, dict[str, Any]]:
        of = self._of

        def at(kind: str) -> Floats:
            return seconds(of(kind, "at_unix_nano"), self._start)

        gpus: dict[str, Any] = {"at_s": at("gpus"), "gpu": self._gpu_codes, "device": self._device_codes}
        gpus |= {"node": self._node_codes["gpus"], "utilization": floats(of("gpus", "utilization_ratio"))}
        gpus |= {name: floats(of("gpus", name)) for name in _GPU}
        gpus["throttle"] = ints(of("gpus", "throttle"))
        servers: dict[str, Any] = {"at_s": at("servers"), "engine": self._engine_codes["servers"]}
        servers["model"] = self._model_codes["servers"]
        servers["slots_total"] = ints(of("servers", "slots_total"))
        servers |= {name: floats(of("servers", name)) for name in ("processing", "deferred")}
        queues: dict[str, Any] = {"at_s": at("queues"), "gateway": self._codes["gateway"]}
        queues["model"] = self._model_codes["queues"]
        queues |= {name: ints(of("queues", name)) for name in ("waiting", "running", "rejected")}
        return {"gpus": gpus, "servers": servers, "queues": queues}


_FINE = pa.array(["ok", "client gone", "engine refused", ""])
"""Outcomes of attempts that no engine is to blame for."""
