"""The window that analytics keeps, whatever clocks say, and what its service answers of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pyarrow as pa
import pytest

from lltm_ray.analytics._pandas import PandasEngine
from lltm_ray.analytics.frames import choose_engine
from lltm_ray.analytics.service import COLUMNS, AnalyticsService
from lltm_ray.analytics.trace import Trace
from lltm_ray.analytics.window import Window, own
from lltm_ray.config import AnalyticsConfig
from lltm_ray.errors import ConfigError
from lltm_ray.telemetry.batch import pack
from tests.fleet_rows import START_UNIX_NANO, Plan, fleet_rows
from tests.unit.telemetry.rows_made import queue_row, request_row

SECOND = 10**9
NOW = START_UNIX_NANO + 10_000 * SECOND
PANDAS = choose_engine("pandas")
DAYS_AHEAD = NOW + 10 * 86_400 * SECOND
PLAN = Plan(seed=2, seconds=60)


def requests(*ends: float, length_s: float = 0.5) -> dict[str, pa.Table]:
    """Requests that ended so many seconds after `NOW`."""
    arrived = [NOW + round((end - length_s) * SECOND) for end in ends]
    rows = [request_row(arrived_unix_nano=at, total_s=length_s, content="said", why="said") for at in arrived]
    return {"requests": pa.Table.from_batches([pack("requests", rows)])}


def queues(*at: float) -> dict[str, pa.Table]:
    rows = [queue_row(at_unix_nano=NOW + round(each * SECOND)) for each in at]
    return {"queues": pa.Table.from_batches([pack("queues", rows)])}


def make_window(window_s: float = 600.0, max_bytes: int = 2**40) -> Window:
    return Window(window_s, max_bytes, lambda: NOW)


def make_service(engine: Any = PANDAS, **settings: Any) -> AnalyticsService:
    return AnalyticsService(AnalyticsConfig(**settings), engine, clock=lambda: NOW)


def ends(tables: Mapping[str, pa.Table]) -> list[int]:
    return sorted((tables["queues"]["at_unix_nano"].to_numpy() - NOW) // SECOND) if "queues" in tables else []


# --- the window


def test_one_clock_that_is_days_ahead_moves_neither_the_window_nor_its_end():
    window = make_window()
    window.add(queues(-300))
    window.add(queues(10 * 86_400))
    window.add(queues(-200, 10 * 86_400) | requests(10 * 86_400))
    assert window.newest_unix_nano == NOW - 200 * SECOND
    assert ends(window.since(NOW - 600 * SECOND, NOW))[:2] == [-300, -200]
    assert window.first_unix_nano == NOW - 300 * SECOND
    window.add(queues(-100))
    assert window.newest_unix_nano == NOW - 100 * SECOND


def test_rows_of_a_clock_that_is_ahead_age_by_when_they_came():
    now = [NOW]
    window = Window(600, 2**40, lambda: now[0])
    window.add(queues(10 * 86_400))
    for minute in range(1, 14):
        now[0] = NOW + minute * 60 * SECOND
        window.add(queues(minute * 60))
    assert window.rows == 12, "the first went with those of its time"
    assert max(ends(window.since(0, DAYS_AHEAD))) == 780


def test_where_all_rows_are_ahead_our_own_clock_is_behind_and_they_count():
    window = make_window()
    for number in range(20):
        window.add(queues(3600 + number * 60))
    assert window.newest_unix_nano == NOW + (3600 + 19 * 60) * SECOND
    assert window.rows == 20


def test_old_chunks_go_and_are_not_called_dropped():
    window = make_window(window_s=100)
    for at in range(-1000, 1, 10):
        window.add(queues(at))
    kept = ends(window.since(0, NOW))
    assert (kept[0], kept[-1], window.dropped_rows) == (-160, 0, 0)
    assert window.first_unix_nano == NOW - 160 * SECOND


def test_the_window_is_bounded_by_bytes_and_then_begins_with_what_is_left():
    window = make_window(max_bytes=10 * requests(0)["requests"].nbytes)
    for at in range(-50, 0):
        window.add(requests(at))
    assert window.bytes <= 10 * requests(0)["requests"].nbytes
    assert (window.rows, window.dropped_rows) == (10, 40)
    assert window.first_unix_nano == NOW - 10 * SECOND


def test_a_gap_ends_what_is_whole():
    window = make_window()
    window.add(queues(-300) | requests(-290))
    assert window.first_unix_nano == NOW - 300 * SECOND
    window.add(queues(-120) | requests(-100, -110), is_gap=True)
    window.add(queues(-50))
    assert window.first_unix_nano == NOW - 110 * SECOND
    assert make_window().first_unix_nano is None


def test_a_row_of_long_ago_is_not_where_the_window_begins():
    window = make_window()
    window.add(queues(-86_400, -30, -20))
    assert window.first_unix_nano == NOW - 30 * SECOND


def test_copies_are_whole_and_hold_nothing_of_what_they_were_cut_from():
    rows = pa.concat_tables([queues(*range(-50, 0))["queues"]] * 3)
    copied = own({"queues": rows.slice(40, 20), "spans": rows.slice(0, 0)})
    assert copied["queues"].equals(rows.slice(40, 20))
    theirs = {
        buffer.address for column in rows.columns for chunk in column.chunks for buffer in chunk.buffers() if buffer
    }
    for column in copied["queues"].columns:
        for chunk in column.chunks:
            assert not theirs & {buffer.address for buffer in chunk.buffers() if buffer}
    assert list(copied) == ["queues"]


# --- the service


def test_a_window_longer_than_what_is_kept_counts_what_is_kept():
    service = make_service()
    service.add(queues(*range(-180, 0)) | requests(*range(-170, 0)))
    whole = service.trace(3600)
    assert whole.length_s == pytest.approx(179, abs=0.1)
    assert len(whole.requests) / whole.length_s == pytest.approx(170 / 179, rel=0.01)
    assert service.report(3600).start_unix_nano == NOW - 180 * SECOND
    assert service.trace(60).length_s == 60
    assert service.trace().length_s == whole.length_s


def test_one_request_alone_makes_no_absurd_rate():
    service = make_service()
    service.add(requests(-5, length_s=0.001), missed_rows=3)
    assert service.trace(600).length_s == pytest.approx(1)
    assert service.status()["missed_rows"] == 3


def test_only_columns_that_are_read_are_kept():
    service = make_service()
    service.add(requests(-5) | {"slots": queues(-5)["queues"], "logs": queues(-5)["queues"]})
    assert service.status()["rows"] == 1
    kept = service._window.since(0, NOW)["requests"].column_names
    assert set(kept) == set(COLUMNS["requests"])
    assert not {"content", "why", "parameters", "error"} & set(kept)
    assert "slots" not in COLUMNS


def test_what_a_request_costs_in_memory_is_as_the_settings_say():
    service, rows = make_service(), fleet_rows(PLAN)
    service.add(own(rows))
    each = service.status()["bytes"] / rows["requests"].num_rows
    assert 300 < each < 1000, each


def test_two_windows_are_compared_only_where_rows_are_kept():
    service, now = make_service(), NOW / 1e9
    service.add(queues(*range(-100, 0)) | requests(*range(-100, 0)))
    with pytest.raises(ConfigError, match=r"before=.*rows exist from 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC on"):
        service.compare((now - 3600, now - 1800), (now - 50, now))
    with pytest.raises(ConfigError, match="before="):
        service.compare((now - 300, now - 60), (now - 50, now))
    found = service.compare((now - 120, now - 50), (now - 50, now))
    first = service.status()["first_unix_nano"]
    assert found.before_unix_nano[0] == first, "half of it is kept: that is compared"
    with pytest.raises(ConfigError, match="there are no rows"):
        make_service().compare((now - 120, now - 50), (now - 50, now))


def test_hints_end_with_the_newest_row_and_not_with_a_clock_that_is_off():
    rows, end = fleet_rows(PLAN), START_UNIX_NANO + 60 * SECOND
    told = []
    for late_s in (0, 45, 300):
        service = make_service(enabled=True, hints=True)
        service.add(rows)
        told.append(service.hints(end + late_s * SECOND).families)
    assert told[0] == told[1] != ()
    assert told[2] == (), "of rows that old nothing is told"


class _Full(PandasEngine):
    """Without memory: as a GPU's engine fails."""

    name = "cudf"

    def __init__(self, after: int) -> None:
        super().__init__("a small GPU")
        self._left = after

    def frame(self, columns: Mapping[str, Any]) -> Any:
        self._left -= 1
        if self._left < 0:
            raise MemoryError("std::bad_alloc: out_of_memory")
        return super().frame(columns)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)


def all_answers(engine: Any) -> tuple[Any, Any, Any, Trace]:
    service = make_service(engine, enabled=True, hints=True)
    service.add(fleet_rows(PLAN))
    middle, end = (START_UNIX_NANO + each * SECOND for each in (30, 60))
    windows = (START_UNIX_NANO / 1e9, middle / 1e9), (middle / 1e9, end / 1e9)
    return service.report(600), service.compare(*windows), service.hints(end), service.trace(600)


@cache
def answers_of_pandas() -> tuple[Any, Any, Any, Trace]:
    return all_answers(PANDAS)


@pytest.mark.parametrize("after", [0, 5, 12])
def test_a_gpu_without_memory_costs_no_answer_and_the_reason_says_so(after):
    report, comparison, hints, trace = all_answers(_Full(after))
    wanted, compared, told, _ = answers_of_pandas()
    assert [each.subject for each in report.findings] == [each.subject for each in wanted.findings]
    assert [each.verdict for each in comparison.rows] == [each.verdict for each in compared.rows]
    assert hints == told
    if after == 0:
        assert (report.engine, trace.engine.name) == ("pandas", "pandas")
        assert "cudf had no memory left for it (a small GPU)" in report.reason
    for result in report.results.values():
        assert result.error == ""


def test_an_error_of_another_kind_is_not_tried_again():
    service, tries = make_service(), []

    def fail(trace: Trace) -> None:
        tries.append(trace)
        raise RuntimeError("of another kind")

    service.add(requests(-1))
    with pytest.raises(RuntimeError, match="of another kind"):
        service.answer(fail)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ((20.0, 10.0), (30.0, 40.0), "before"),
        ((10.0, 20.0), (15.0, 40.0), "after"),
        (("3m", "1m"), (1.0, 2.0), "before"),
    ],
)
def test_windows_that_are_none_or_out_of_order_are_told_apart(before, after, field):
    service = AnalyticsService(AnalyticsConfig(), choose_engine("pandas"))
    with pytest.raises(ConfigError) as told:
        service.compare(before, after)
    assert told.value.field == field


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda service: service.report("10m"), r"window_s='10m': must be a number of seconds above 0"),
        (lambda service: service.report(0), r"window_s=0: must be a number of seconds above 0"),
        (lambda service: service.report(60, "now"), r"until_unix_s='now': must be seconds since the epoch"),
        (lambda service: service.compare(1.0, (2.0, 3.0)), r"before=1\.0: must be start and end"),
        (lambda service: service.compare((1.0, 2.0), ("3", 4.0)), r"after=\('3', 4\.0\): must be start and end"),
    ],
)
def test_windows_of_wrong_types_are_told_by_field_and_value(ask, told):
    service = AnalyticsService(AnalyticsConfig(), choose_engine("pandas"))
    with pytest.raises(ConfigError, match=told):
        ask(service)
