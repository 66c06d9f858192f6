"""Rows wait, travel, become columns, and are counted when they are lost."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from lltm_ray.telemetry.batch import SCHEMAS, Batch, unpack
from lltm_ray.telemetry.outbox import BATCH_ROWS, Outbox
from lltm_ray.telemetry.parcel import Row, unseal
from lltm_ray.telemetry.rows import LogRow, SlotRow, SpanRow
from tests.unit.telemetry.rows_made import attempt_row, request_row


def slot_row(slot: int, **changes: object) -> SlotRow:
    row = SlotRow(
        at_unix_nano=1, engine="e", slot=slot, is_processing=True, task=7, prompt_tokens=3, decoded_tokens=2, n_ctx=64
    )
    return row._replace(**changes)


def taken(outbox: Outbox) -> Batch:
    batch, unsound = unseal(outbox.take())
    assert not unsound
    return batch


def test_rows_come_back_as_they_were() -> None:
    outbox = Outbox()
    log_row = LogRow(2, "", "", "INFO", "a", "grün \u2713", "{}")
    outbox.add("slots", slot_row(0))
    outbox.add("logs", log_row)
    batch = taken(outbox)
    assert {kind: columns.schema for kind, columns in batch.items()} == {kind: SCHEMAS[kind] for kind in batch}
    assert list(unpack("slots", batch["slots"])) == [slot_row(0)]
    assert list(unpack("logs", batch["logs"])) == [log_row]
    assert taken(outbox) == {}


def test_rows_that_are_made_later_are_in_the_next_batch_after_those_that_came_before() -> None:
    outbox = Outbox()
    for slot in range(3):
        outbox.later(lambda slot=slot: [("slots", slot_row(slot))])
    assert len(outbox) == 3
    assert [row.slot for row in unpack("slots", taken(outbox)["slots"])] == [0, 1, 2]
    assert taken(outbox) == {}


def test_few_wait_to_be_made_even_if_nobody_takes_them() -> None:
    outbox = Outbox(limit_rows=100)
    made: list[int] = []
    waiting = []
    for slot in range(1000):
        outbox.later(lambda slot=slot: made.append(slot) or [("slots", slot_row(slot))])
        waiting.append(slot + 1 - len(made))
    assert max(waiting) < 100
    assert made == list(range(len(made)))
    kept = [row.slot for row in unpack("slots", taken(outbox)["slots"])]
    assert (len(made), outbox.dropped) == (1000, {"slots": 1000 - len(kept)})
    assert kept == list(range(1000 - len(kept), 1000))
    assert 60 < len(kept) <= 100


def test_a_row_of_the_wrong_types_costs_nobody_else_anything() -> None:
    outbox = Outbox()
    good = LogRow(1, "", "", "INFO", "a", "x", "{}")
    for row in (good, good._replace(message=None, logger=7), (1, "short"), good):
        outbox.add("logs", row)
    batch, unsound = unseal(outbox.take())
    assert list(unpack("logs", batch["logs"])) == [good, good]
    assert unsound == {"logs": 2}


def test_a_row_that_cannot_travel_costs_none_of_those_that_were_made_with_it() -> None:
    outbox = Outbox()
    for slot in (0, 1, 2):
        value = slot if slot != 1 else (lambda: None)
        outbox.later(lambda value=value: [("slots", slot_row(0)._replace(slot=value))])
    assert [row.slot for row in unpack("slots", taken(outbox)["slots"])] == [0, 2]
    assert outbox.dropped == {"slots": 1}


def test_one_wrong_row_among_many_costs_little_more_than_itself(caplog) -> None:
    outbox = Outbox()
    for slot in range(1000):
        outbox.later(lambda slot=slot: [("slots", slot_row(slot, task="seven" if slot == 700 else 7))])
    began = time.thread_time()
    whole, none = unseal(fresh(1000).take())
    usual_s, began = time.thread_time() - began, time.thread_time()
    batch, unsound = unseal(outbox.take())
    assert time.thread_time() - began < 60 * usual_s + 0.05
    assert (batch["slots"].num_rows, unsound, whole["slots"].num_rows, none) == (999, {"slots": 1}, 1000, {})
    assert [record.getMessage()[:16] for record in caplog.records] == ["1 rows of slots "]


def fresh(rows: int) -> Outbox:
    outbox = Outbox()
    for slot in range(rows):
        outbox.add("slots", slot_row(slot))
    return outbox


def test_a_maker_that_raises_costs_no_row_that_was_made_before_nor_those_that_come() -> None:
    outbox = Outbox()
    outbox.later(lambda: [("slots", slot_row(0))])
    outbox.later(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        outbox.take()
    outbox.add("slots", slot_row(1))
    assert [row.slot for row in unpack("slots", taken(outbox)["slots"])] == [0, 1]


@pytest.mark.parametrize("limits", [{"limit_bytes": 100_000}, {"limit_rows": 20}])
def test_what_has_no_room_by_itself_drives_nothing_out(limits: dict[str, int]) -> None:
    outbox = Outbox(**limits)
    for number in range(10):
        outbox.add("logs", LOG._replace(at_unix_nano=number))
    for _ in range(30):
        outbox.later(lambda: [("logs", LOG._replace(message="x" * 10_000))])
    assert [row.at_unix_nano for row in unpack("logs", taken(outbox)["logs"])] == list(range(10))
    assert outbox.dropped == {"logs": 30}


def test_attempts_travel_with_their_request_or_before_it_however_many_they_are() -> None:
    outbox = Outbox()
    for number in range(200):

        def tell(number: int = number) -> list[tuple[str, Row]]:
            tried = ("attempts", attempt_row(request_span_id=f"{number:016x}"))
            return [*[tried] * 60, ("requests", request_row(span_id=f"{number:016x}"))]

        outbox.later(tell)
    batch = taken(outbox)
    told = {row.request_span_id for row in unpack("attempts", batch["attempts"])}
    assert {row.span_id for row in unpack("requests", batch["requests"])} <= told


def test_many_threads_may_note_and_one_take() -> None:
    outbox, taken_rows, before = Outbox(limit_rows=50), 0, sys.getswitchinterval()

    def note() -> None:
        for slot in range(2000):
            outbox.add("slots", slot_row(slot))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            noting = [threads.submit(note) for _ in range(3)]
            while not all(each.done() for each in noting):
                taken_rows += sum(part.rows for part in outbox.take().values())
            for each in noting:
                each.result()
    finally:
        sys.setswitchinterval(before)
    taken_rows += sum(part.rows for part in outbox.take().values())
    assert taken_rows + outbox.dropped["slots"] == 6000
    assert len(outbox) == 0


def test_a_batch_is_bounded_and_keeps_the_order() -> None:
    outbox = Outbox()
    for slot in range(BATCH_ROWS + 5):
        outbox.add("slots", slot_row(slot))
    sizes = [[row.slot for row in unpack("slots", taken(outbox)["slots"])] for _ in range(2)]
    assert sizes == [list(range(BATCH_ROWS)), list(range(BATCH_ROWS, BATCH_ROWS + 5))]
    assert len(outbox) == 0


def test_without_room_the_oldest_go_and_are_counted() -> None:
    outbox = Outbox(limit_rows=3)
    for slot in range(10):
        outbox.add("slots", slot_row(slot))
    assert [row.slot for row in unpack("slots", taken(outbox)["slots"])] == [7, 8, 9]
    assert outbox.dropped == {"slots": 7}


LOG = LogRow(1, "", "", "INFO", "a", "x", "{}")
SPAN = SpanRow("t", "s", "", "load", "internal", 1, 2, "", "", "e", "{}")
LONG = [
    *(("requests", request_row(), name) for name in ("error", "parameters", "content")),
    *(("spans", SPAN, name) for name in ("name", "error", "engine", "attributes")),
    *(("logs", LOG, name) for name in ("logger", "message", "attributes")),
]
"""Kind, a row, and each of its texts that may be long."""


@pytest.mark.parametrize(("character", "count"), [("x", 10_000), ("\u5b57", 5_000)], ids=["ascii", "wide"])
@pytest.mark.parametrize(("kind", "row", "name"), LONG, ids=[f"{kind}.{name}" for kind, _, name in LONG])
def test_rows_with_long_texts_are_bounded_by_bytes_and_the_oldest_go(kind, row, name, character, count) -> None:
    outbox, text = Outbox(limit_bytes=100_000), character * count
    other = "logs" if kind == "spans" else "spans"
    outbox.add(other, LOG if kind == "spans" else SPAN)
    moment = next(each for each in row._fields if each.endswith("unix_nano"))
    for number in range(50):
        outbox.add(kind, row._replace(**{name: text, moment: number}))
    batch = taken(outbox)
    kept = [getattr(row, moment) for row in unpack(kind, batch[kind])]
    size = len(text.encode())
    assert 100_000 // (size + 1000) - 1 <= len(kept) <= 100_000 // size
    assert kept == list(range(50 - len(kept), 50))
    assert outbox.dropped == {kind: 50 - len(kept)}
    assert batch[other].num_rows == 1


def test_many_short_rows_of_requests_are_bounded_by_bytes_too() -> None:
    outbox = Outbox(limit_bytes=100_000)
    for _ in range(1000):
        outbox.add("requests", request_row())
    assert 200 <= taken(outbox)["requests"].num_rows <= 400


def test_a_batch_is_bounded_by_bytes_too_and_nothing_is_left_behind() -> None:
    outbox = Outbox()
    for number in range(1000):
        outbox.add("logs", LogRow(number, "", "", "INFO", "a", "x" * 16_000, "{}"))
    batches = []
    while batch := taken(outbox):
        batches.append(batch["logs"])
    assert max(columns.nbytes for columns in batches) < 2**21
    assert [row.at_unix_nano for columns in batches for row in unpack("logs", columns)] == list(range(1000))
    assert not outbox.dropped


def test_one_bad_row_does_not_take_the_others_with_it() -> None:
    outbox = Outbox()
    for each in (slot_row(0), slot_row(1, task="seven"), slot_row(2, task=2**70), slot_row(3, engine="\ud800")):
        outbox.add("slots", each)
    batch, unsound = unseal(outbox.take())
    assert [row.slot for row in unpack("slots", batch["slots"])] == [0]
    assert unsound == {"slots": 3}


def test_a_lost_batch_is_counted() -> None:
    outbox = Outbox()
    outbox.add("slots", slot_row(0))
    outbox.add("slots", slot_row(1))
    outbox.lose(outbox.take())
    assert outbox.dropped == {"slots": 2}


def test_absent_values_are_null_and_not_zero() -> None:
    schema = SCHEMAS["gpus"]
    assert schema.field("power_w").type == pa.float64()
    outbox = Outbox()
    outbox.add("gpus", (1, "n", 0, "GPU-1", "", "", *([None] * (len(schema) - 6))))
    columns = taken(outbox)["gpus"]
    assert columns.column("power_w").null_count == 1
