"""Rows as a `Trace`: for all of them at once the same as telemetry tells of each."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lltm_ray._prefix import END_BYTES, hash_blocks, hash_prefixes
from lltm_ray.analytics.columns import encode, find, floats, ints, seconds, span_ids
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.ingest import COLUMNS, build_trace
from lltm_ray.analytics.trace import FRAMES, Trace
from lltm_ray.telemetry import semconv
from lltm_ray.telemetry.batch import SCHEMAS, pack
from lltm_ray.telemetry.figures import GENERATING, read_phases, tokens_of_all
from lltm_ray.telemetry.figures import seconds as length_of
from lltm_ray.telemetry.profiles import PROFILES
from lltm_ray.telemetry.rows import AttemptRow, RequestRow, SpanRow
from lltm_ray.telemetry.spans import Spans
from tests.fleet_rows import Plan, fleet_rows, many_spans
from tests.unit.telemetry.rows_made import attempt_row, gpu_row, queue_row, request_row, server_row

NOW = 1_790_000_000_000_000_000
NAN = math.nan
ROUTES = ("/v1/chat/completions", "/v1/completions", "/infill", "/v1/embeddings", "/v1/rerank")
CLOSE_S = 1e-6
PHASE_NAMES = {"lltm.queue": "queue", "lltm.prefill": "prefill", "lltm.decode": "decode", "route": "route"}

Made = tuple[RequestRow, list[AttemptRow]]


def trace_of(rows: Mapping[str, Any], **window: int) -> Trace:
    tables = {kind: pa.Table.from_batches([pack(kind, noted)]) for kind, noted in rows.items()}
    return build_trace(tables, choose_engine("pandas"), **window)


def trace_of_made(made: list[Made], shuffle: random.Random | None = None) -> Trace:
    attempts = [attempt for _, tries in made for attempt in tries]
    if shuffle:
        shuffle.shuffle(attempts)
    return trace_of({"requests": [request for request, _ in made], "attempts": attempts})


def made_of(dice: random.Random, count: int) -> list[Made]:
    return [_made(dice) for _ in range(count)]


def _made(dice: random.Random) -> Made:
    """A request with some attempts, of which anything may be missing that a real course can lack."""
    trace, span = f"{dice.getrandbits(128):032x}", f"{dice.getrandbits(64) | 1:016x}"
    at, attempts, count = dice.uniform(0, 0.01), [], dice.choice((0, 1, 1, 1, 2, 3))
    for number in range(1, count + 1):
        moments = [at := at + dice.expovariate(20) for _ in range(5)]
        reached = dice.choice((1, 2, 3, 4, 4, 4, 4))
        asked, sent, headers, first = (each if i < reached else NAN for i, each in enumerate(moments[:4]))
        if dice.random() < 0.1:
            headers = NAN  # first text without a stream's headers
        ended = NAN if number == count and dice.random() < 0.2 else moments[4]
        is_told = dice.random() < 0.5
        attempts.append(
            attempt_row(
                trace_id=trace,
                request_span_id=span,
                span_id=f"{dice.getrandbits(64) | 1:016x}",
                number=number,
                engine=f"engine-{dice.randrange(3)}" if reached > 1 else "",
                slot=dice.randint(-1, 3),
                asked_s=NAN if dice.random() < 0.05 else asked,
                sent_s=sent,
                headers_s=headers,
                first_s=first,
                ended_s=ended,
                cached_tokens=dice.choice((-1, 0, 0, 64)),
                computed_tokens=dice.choice((-1, 0, 33)),
                generated_tokens=dice.choice((-1, 0, 7, 20)),
                delivered_tokens=dice.choice((-1, 0, 7)),
                prompt_ms=dice.choice((0.0, 12.0)) if is_told else NAN,
                predicted_ms=dice.choice((0.0, 15.0, 9000.0)) if is_told else NAN,
                outcome=dice.choice(("ok", "retried", "failed", "continued", "client gone", "deadline")),
                is_continued=dice.random() < (0.5 if number > 1 else 0.05),
            )
        )
    request = request_row(
        trace_id=trace,
        span_id=span,
        request_id=f"r-{span}",
        route=dice.choice(ROUTES),
        arrived_unix_nano=NOW + dice.randrange(10**10),
        total_s=at + dice.expovariate(50),
        ttft_s=dice.choice((NAN, 0.1)),
        tenant=dice.choice(("", "a", "b")),
    )
    return request, attempts


def _intervals(made: list[Made]) -> dict[tuple[str, str, str, int], tuple[float, float]]:
    """(trace, name, parent's name, which of those alike) -> start and end in seconds since NOW."""
    spans = Spans(PROFILES["1.41"])
    found: dict[tuple[str, str, str, int], tuple[float, float]] = {}
    for request, attempts in made:
        tree = spans.of_request(request, attempts, {})
        names = {
            each.span_id: PHASE_NAMES.get(each.name, "attempt" if each.kind == "client" else "request") for each in tree
        }
        for each in tree:
            key = (each.trace_id, names[each.span_id], names.get(each.parent_span_id, ""))
            _put(found, key, (each.start_unix_nano - NOW) / 1e9, (each.end_unix_nano - NOW) / 1e9)
    return found


def _put(found: dict[Any, tuple[float, float]], key: tuple[str, str, str], start: float, end: float) -> None:
    number = sum((*key, i) in found for i in range(4))
    found[(*key, number)] = (start, end)


def _intervals_of(trace: Trace) -> dict[tuple[str, str, str, int], tuple[float, float]]:
    frame = trace.engine.host(trace.spans)
    zero = (trace.start_unix_nano - NOW) / 1e9
    names = trace.names.decode("span", frame["name"])
    found: dict[tuple[str, str, str, int], tuple[float, float]] = {}
    for row, name in zip(frame.itertuples(), names, strict=True):
        parent = names[row.parent] if row.parent >= 0 else ""
        key = (trace.trace_ids[row.trace].as_py(), name, parent)
        _put(found, key, row.start_s + zero, row.end_s + zero)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_spans_have_the_names_parents_and_times_that_telemetry_tells(seed: int) -> None:
    made = made_of(random.Random(seed), 60)
    want, got = _intervals(made), _intervals_of(trace_of_made(made))
    assert set(got) == set(want)
    assert max(max(abs(got[k][0] - want[k][0]), abs(got[k][1] - want[k][1])) for k in want) < CLOSE_S


@pytest.mark.parametrize("seed", range(12))
def test_phases_last_as_long_as_telemetry_tells(seed: int) -> None:
    dice = random.Random(seed)
    made = made_of(dice, 60)
    trace = trace_of_made(made, dice)
    known = {(trace.request_ids[row.r].as_py(), row.number): row for row in trace.attempts.itertuples()}
    for request, attempts in made:
        operation = semconv.OPERATIONS[request.route]
        for attempt in attempts:
            phases, row = read_phases(attempt, operation, request.total_s), known[request.request_id, attempt.number]
            for name in ("queue", "prefill", "decode"):
                interval = getattr(phases, name)
                want = NAN if interval is None else max(length_of(interval), 0)
                assert getattr(row, f"{name}_s") == pytest.approx(want, abs=CLOSE_S, nan_ok=True), name
            want = NAN if phases.route is None else length_of(phases.route)
            assert row.route_s == pytest.approx(want, abs=CLOSE_S, nan_ok=True)


@pytest.mark.parametrize("seed", range(12))
def test_requests_have_the_tokens_and_the_wait_that_telemetry_tells(seed: int) -> None:
    dice = random.Random(seed)
    made = made_of(dice, 60)
    trace = trace_of_made(made, dice)
    for (request, attempts), row in zip(made, trace.requests.itertuples(), strict=True):
        tokens = tokens_of_all(attempts)
        assert (row.cached, row.computed, row.generated) == tuple(tokens)
        assert (row.prompt, row.attempts) == (tokens.input, len(attempts))
        phases = [read_phases(each, semconv.OPERATIONS[request.route], request.total_s) for each in attempts]
        waited = sum(max(length_of(each.route), 0) + max(length_of(each.queue), 0) for each in phases)
        assert row.queue_s == pytest.approx(waited if attempts else NAN, abs=CLOSE_S, nan_ok=True)
        assert trace.names.of("engine", row.engine) == (attempts[-1].engine if attempts else "")


def test_a_simulated_fleets_tokens_and_spans_are_those_of_its_rows() -> None:
    tables = fleet_rows(Plan(seconds=30, cascade="engine-1", cascade_s=5))
    trace = build_trace(tables, choose_engine("pandas"))
    attempts: dict[str, list[AttemptRow]] = {}
    for values in tables["attempts"].to_pylist():
        attempts.setdefault(values["request_span_id"], []).append(AttemptRow(**values))
    made = [(RequestRow(**each), attempts.get(each["span_id"], [])) for each in tables["requests"].to_pylist()]
    assert any(len(tries) > 1 for _, tries in made)
    want = [tuple(tokens_of_all(tries)) for _, tries in made]
    assert list(trace.requests[["cached", "computed", "generated"]].itertuples(index=False, name=None)) == want
    own = {(each["trace_id"], each["name"], "", 0) for each in tables["spans"].to_pylist()}
    assert set(_intervals_of(trace)) == set(_intervals(made)) | own


def test_codes_mean_the_names_of_the_rows() -> None:
    tables = fleet_rows(Plan(seconds=20, cascade="engine-1", cascade_s=4))
    trace = build_trace(tables, choose_engine("pandas"))
    for kind, column, of in (
        ("model", "model", "model"),
        ("tenant", "tenant", "tenant"),
        ("error", "error", "error_type"),
    ):
        assert trace.names.decode(kind, trace.requests[column]) == tables["requests"][of].to_pylist()
    assert trace.names.decode("engine", trace.servers["engine"]) == tables["servers"]["engine"].to_pylist()
    assert trace.names.decode("gpu", trace.gpus["gpu"]) == tables["gpus"]["uuid"].to_pylist()
    assert trace.request_ids.to_pylist() == tables["requests"]["request_id"].to_pylist()
    assert trace.evidence([3, 0]) == tuple(tables["requests"]["trace_id"][i].as_py() for i in (3, 0))
    outcomes = {trace.names.of("error", code) for code in trace.attempts["error"]}
    assert outcomes == {"", "retried", "failed"} | ({"continued"} & set(tables["attempts"]["outcome"].to_pylist()))


def test_attempts_know_the_gpu_of_their_engine() -> None:
    tables = fleet_rows(Plan(seconds=20))
    trace = build_trace(tables, choose_engine("pandas"))
    pairs = {
        (trace.names.of("engine", e), trace.names.of("gpu", g)) for e, g in trace.attempts[["engine", "gpu"]].to_numpy()
    }
    assert pairs == {("engine-0", "GPU-0"), ("engine-1", "GPU-0"), ("engine-2", "GPU-1"), ("engine-3", "GPU-1")}
    assert len(trace.engines) == 4


def test_engines_and_samples_know_the_product_of_their_gpu() -> None:
    samples = [gpu_row(uuid=uuid, name=name) for uuid, name in (("GPU-1", "Large"), ("GPU-2", "Small"), ("GPU-3", ""))]
    places = {"a": "GPU-2", "b": "GPU-1", "c": "", "d": "GPU-9", "e": "GPU-3"}
    servers = [server_row(engine=engine, gpu_uuids=uuid) for engine, uuid in places.items()]
    trace = trace_of({"servers": servers, "gpus": samples})
    assert trace.names.decode("device", trace.engines["device"]) == ["Small", "Large", "", "", ""]
    assert trace.names.decode("device", trace.gpus["device"]) == ["Large", "Small", ""]


def test_an_engine_on_two_gpus_has_a_row_for_each() -> None:
    trace = trace_of({"servers": [server_row(gpu_uuids="GPU-9"), server_row(gpu_uuids="GPU-1,GPU-2", share=2.0)]})
    assert trace.names.decode("gpu", trace.engines["gpu"]) == ["GPU-1", "GPU-2"]
    assert trace.engines["share"].tolist() == [2.0, 2.0]


def test_prefixes_are_the_hashes_of_the_rows_at_their_depths() -> None:
    prompts = [b"x" * 1000, b"", b"x" * 600 + b"y" * 600, b"z" * 255]
    hashes = [hash_prefixes(each, b"0123456789abcdef") for each in prompts]
    rows = [request_row(span_id=f"{i + 1:016x}", prefix=each) for i, each in enumerate(hashes)]
    frame = trace_of({"requests": rows}).prefixes
    assert frame["r"].tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert frame["depth"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert frame["end_bytes"].tolist() == [END_BYTES[depth] for depth in frame["depth"]]
    first, second = frame[frame["r"] == 0]["hash"].tolist(), frame[frame["r"] == 2]["hash"].tolist()
    assert [a == b for a, b in zip(first, second, strict=False)] == [True, True, False]


def test_blocks_stand_where_their_prompts_have_them() -> None:
    prompts = [bytes(range(256)) * 20, b"", b"x" * 127, bytes(range(256)) * 5]
    told = [hash_blocks(each, b"0123456789abcdef") for each in prompts]
    rows = [request_row(span_id=f"{i + 1:016x}", blocks=each) for i, each in enumerate(told)]
    frame = trace_of({"requests": rows}).blocks
    assert set(frame["r"]) == {0, 3}
    for r in (0, 3):
        own = frame[frame["r"] == r]
        assert own["place"].tolist() == list(range(len(own)))
        assert own["start"].tolist() == [0, *own["size"].cumsum().tolist()][:-1]
        assert [f"{block % 2**64:016x}" for block in own["block"]] == [
            told[r][at : at + 8].hex() for at in range(0, len(told[r]), 8)
        ]


def test_requests_generate_by_the_same_routes_as_telemetry_says() -> None:
    routes = [*semconv.OPERATIONS, "/v1/models", ""]
    rows = [request_row(span_id=f"{i + 1:016x}", route=route) for i, route in enumerate(routes)]
    generates = trace_of({"requests": rows}).requests["is_generating"].tolist()
    assert generates == [semconv.OPERATIONS.get(route) in GENERATING for route in routes]


# --- windows


def test_a_window_holds_what_ended_in_it_and_its_end_is_exclusive() -> None:
    def at(i: int, **told: Any) -> RequestRow:
        return request_row(span_id=f"{i:016x}", request_id=str(i), arrived_unix_nano=NOW + i * 10**9, **told)

    rows = [at(1, total_s=1.0), at(2, total_s=0.5), at(3, total_s=1.0), at(1, total_s=5.0)]
    attempts = [attempt_row(request_span_id=f"{i:016x}", span_id=f"{90 + i:016x}") for i in (1, 2, 3)]
    samples = [gpu_row(at_unix_nano=NOW + i * 10**9) for i in range(6)]
    kept = {"requests": rows, "attempts": attempts, "gpus": samples}
    trace = trace_of(kept, start_unix_nano=NOW + 2 * 10**9, end_unix_nano=NOW + 4 * 10**9)
    assert trace.request_ids.to_pylist() == ["1", "2"]
    assert (len(trace.attempts), len(trace.gpus)) == (2, 2)
    assert trace.length_s == 2.0
    assert trace.requests["arrived_s"].tolist() == [-1.0, 0.0]
    assert trace.attempts["r"].tolist() == [0, 1]


def test_without_a_window_all_rows_are_in_it() -> None:
    tables = fleet_rows(Plan(seconds=10))
    trace = build_trace(tables, choose_engine("pandas"))
    assert len(trace.requests) == tables["requests"].num_rows
    assert trace.start_unix_nano == min(tables["requests"]["arrived_unix_nano"].to_pylist()[0], NOW)
    assert (trace.requests["ended_s"] < trace.length_s).all()


def test_what_it_reads_is_told_by_kind_and_column() -> None:
    tables = fleet_rows(Plan(seconds=10))
    for kind, columns in COLUMNS.items():
        assert {name: SCHEMAS[kind].field(name).type for name in columns} == columns
    needed = {kind: tables[kind].select(list(columns)) for kind, columns in COLUMNS.items()}
    whole, part = (build_trace(each, choose_engine("pandas")) for each in (tables, needed))
    assert whole.names == part.names
    for name in FRAMES:
        assert getattr(whole, name).equals(getattr(part, name)), name


# --- rows that lack something


def test_nothing_makes_empty_frames_that_have_their_columns() -> None:
    full, empty = build_trace(fleet_rows(Plan(seconds=5)), choose_engine("pandas")), trace_of({})
    for name in FRAMES:
        assert list(getattr(empty, name).columns) == list(getattr(full, name).columns), name
        assert len(getattr(empty, name)) == 0
        assert (getattr(empty, name).dtypes == getattr(full, name).dtypes).all(), name


def test_empty_tables_and_any_kind_alone_can_be_read() -> None:
    alone: dict[str, tuple[Any, ...]] = {
        "requests": request_row(),
        "attempts": attempt_row(),
        "spans": SpanRow("ab", "1" * 16, "", "load", "internal", NOW, NOW + 5, "", "", "engine-0", ""),
        "gpus": gpu_row(),
        "servers": server_row(),
        "queues": queue_row(),
    }
    for kind, row in alone.items():
        rows: dict[str, list[tuple[Any, ...]]] = {other: [] for other in alone} | {kind: [row]}
        trace = trace_of(rows)
        assert len(getattr(trace, kind)) == (kind != "attempts"), kind  # attempts of no request are left out


def _with_nulls(kind: str, table: pa.Table) -> pa.Table:
    columns = {each.name: table[each.name] if each.name in table.column_names else None for each in SCHEMAS[kind]}
    filled = [pa.nulls(1, SCHEMAS[kind].field(name).type) if each is None else each for name, each in columns.items()]
    return pa.table(filled, schema=SCHEMAS[kind])


def test_columns_that_are_missing_or_null_read_as_nothing() -> None:
    ids = {"trace_id": ["a" * 32], "span_id": ["1" * 16], "arrived_unix_nano": [NOW], "total_s": [0.5]}
    older = {
        "requests": pa.table(ids),
        "attempts": pa.table({"request_span_id": ["1" * 16], "span_id": ["2" * 16], "sent_s": [0.1]}),
    }
    null = {kind: _with_nulls(kind, table) for kind, table in older.items()}
    for tables in (older, null):
        trace = build_trace(tables, choose_engine("pandas"))
        request, attempt = trace.requests.iloc[0], trace.attempts.iloc[0]
        assert (request["tenant"], request["prompt"], request["error"]) == (-1, 0, -1)
        assert (attempt["engine"], attempt["is_continued"], attempt["slot"]) == (-1, 0, -1)
        assert math.isnan(request["ttft_s"])
        assert math.isnan(attempt["decode_s"])
        assert len(trace.spans) == 2


def test_a_request_without_a_duration_does_no_harm() -> None:
    trace = trace_of({"requests": [request_row(total_s=NAN), request_row(span_id="2" * 16, total_s=1.0)]})
    assert trace.requests["total_s"].isna().tolist() == [True, False]


def test_a_row_that_came_twice_owns_its_attempts_once() -> None:
    trace = trace_of({"requests": [request_row(), request_row()], "attempts": [attempt_row()]})
    assert trace.requests["attempts"].tolist() == [1, 0]
    assert trace.requests["engine"].tolist() == [0, -1]


def test_parents_that_are_unknown_broken_or_the_span_itself_make_a_root() -> None:
    def own(span: str, parent: str, trace: str = "t") -> SpanRow:
        return SpanRow(trace, span, parent, "work", "internal", NOW, NOW + 10**9, "", "", "", "{}")

    known = request_row(span_id="c" * 16, parent_span_id="a" * 16, arrived_unix_nano=NOW)
    rows = [
        own("a" * 16, ""),
        own("b" * 16, "a" * 16),
        own("d" * 16, "d" * 16),
        own("e" * 16, "f" * 16),
        own("", "not hex"),
        own("9" * 16, "é" * 16),
        own("8" * 16, "c" * 16),
    ]
    trace = trace_of({"requests": [known], "attempts": [attempt_row(request_span_id="c" * 16)], "spans": rows})
    spans = trace.spans
    first = len(spans) - len(rows)
    assert spans["parent"].tolist()[first:] == [-1, first, -1, -1, -1, -1, 0]
    assert spans["parent"][0] == first
    assert spans["s"].tolist() == list(range(len(spans)))


def test_no_span_begins_before_its_parent_or_is_of_another_trace() -> None:
    trace = build_trace(many_spans(6000), choose_engine("pandas"))
    spans = trace.spans
    parents = spans["parent"].to_numpy()
    assert len(spans) == 6000
    below = parents >= 0
    assert (spans["start_s"].to_numpy()[below] >= spans["start_s"].to_numpy()[parents[below]] - CLOSE_S).all()
    assert (spans["trace"].to_numpy()[below] == spans["trace"].to_numpy()[parents[below]]).all()


# --- columns


def test_names_become_codes_and_back() -> None:
    names, (first, second) = encode([pa.array(["b", None, "", "a"]), pa.chunked_array([["c"], ["known"]])], ["known"])
    assert names == ("known", "a", "b", "c")
    assert (first.tolist(), second.tolist()) == ([2, -1, -1, 1], [3, 0])


def _ids(dice: random.Random) -> Iterator[str]:
    for _ in range(200):
        yield dice.choice(
            (f"{dice.getrandbits(64):016x}", f"{dice.getrandbits(64):016X}", "", "xyz", "0" * 17, "é" * 8)
        )


def test_span_ids_are_their_hex_digits_as_a_number() -> None:
    ids = [*_ids(random.Random(1)), "g" * 16, None]

    def number(text: str | None) -> int:
        is_hex = text is not None and len(text) == 16 and all(each in "0123456789abcdefABCDEF" for each in text)
        return int(np.uint64(int(text or "0", 16)).astype(np.int64)) if is_hex else 0

    assert span_ids(pa.chunked_array([ids[:50], ids[50:]])).tolist() == [number(each) for each in ids]
    assert span_ids(pa.array(ids).slice(7)).tolist() == [number(each) for each in ids[7:]]
    assert span_ids(pa.array([], pa.string())).tolist() == []


def test_a_key_is_found_at_its_first_place_and_zero_nowhere() -> None:
    dice = random.Random(2)
    keys = np.array([dice.randint(-5, 20) for _ in range(30)])
    wanted = np.arange(-7, 25)
    listed = keys.tolist()
    assert find(keys, wanted).tolist() == [listed.index(w) if w in listed and w else -1 for w in wanted.tolist()]
    assert find(np.empty(0, np.int64), wanted).tolist() == [-1] * len(wanted)


def test_numbers_keep_their_value_and_null_its_mark() -> None:
    assert ints(pa.array([3, None, True and 1])).tolist() == [3, -1, 1]
    assert floats(pa.array([True, None])).tolist() == pytest.approx([1.0, NAN], nan_ok=True)
    assert seconds(pa.array([NOW + 1, NOW + 10**9]), NOW).tolist() == [1e-9, 1.0]
