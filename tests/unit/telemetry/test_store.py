"""Rows in memory and on disk: bounded, behind a cursor, found again."""

import itertools
import logging
import os
import stat
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lltm_ray.telemetry import segments as telemetry_segments
from lltm_ray.telemetry import store as telemetry_store
from lltm_ray.telemetry.batch import SCHEMAS, pack, unpack
from lltm_ray.telemetry.segments import read_folder
from lltm_ray.telemetry.store import Store
from tests.unit.telemetry.rows_made import queue_row, request_row, slot_row


@pytest.fixture
def make_store():
    made = []

    def make(folder=None, **options):
        made.append(Store(folder, **{"flush_s": 3600.0, **options}))
        return made[-1]

    yield make
    for store in made:
        store.close()


def requests(*numbers):
    return pack("requests", [request_row(request_id=str(number)) for number in numbers])


def slots(*numbers):
    return pack("slots", [slot_row(task=number) for number in numbers])


def ids(page, kind="requests"):
    return [row.request_id for batch in page.tables[kind].to_batches() for row in unpack(kind, batch)]


def named(found):
    return [row.request_id for _, row in found]


def segments(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".parquet")


def test_a_reader_gets_each_row_once_and_in_order(make_store):
    store = make_store()
    store.add({"requests": requests(1, 2)})
    first = store.read_since()
    store.add({"requests": requests(3), "slots": slots(7)})
    second = store.read_since(first.cursor)
    assert (ids(first), ids(second)) == (["1", "2"], ["3"])
    assert second.tables["slots"].column("task").to_pylist() == [7]
    assert second.tables["slots"].schema.equals(SCHEMAS["slots"])
    assert ids(store.read_since(second.cursor)) == []


def test_pages_of_any_size_hold_every_row_of_every_kind_once(make_store):
    store = make_store()
    for number in range(50):
        store.add({"requests": requests(number), "slots": slots(number, number)})
    for limit in (1, 2, 7, 1000):
        cursor, found, tasks = 0, [], []
        for _ in range(200):
            page = store.read_since(cursor, ("requests", "slots"), limit)
            assert sum(map(len, page.tables.values())) <= limit
            cursor, found, tasks = page.cursor, found + ids(page), tasks + page.tables["slots"]["task"].to_pylist()
        assert found == [str(number) for number in range(50)]
        assert tasks == [number for number in range(50) for _ in range(2)]


def test_only_the_kinds_that_are_asked_for_are_read_and_counted(make_store):
    store = make_store(max_rows=4)
    store.add({"requests": requests(*range(10)), "slots": slots(1)})
    page = store.read_since(0, ["slots"])
    assert set(page.tables) == {"slots"}
    assert page.missed_rows == 0
    with pytest.raises(KeyError):
        store.read_since(0, ["nothing"])


def test_memory_is_bounded_and_the_oldest_go_first(make_store):
    store = make_store(max_rows=100)
    for number in range(1000):
        store.add({"requests": requests(number)})
    kept = ids(store.read_since())
    assert 80 <= len(kept) <= 100
    assert kept == [str(number) for number in range(1000 - len(kept), 1000)]
    assert store.counts() == {"kept": len(kept), "dropped": 1000 - len(kept), "refused": 0}


def test_a_batch_larger_than_the_ring_leaves_its_end(make_store):
    store = make_store(max_rows=3)
    store.add({"requests": requests(*range(10))})
    page = store.read_since()
    assert (ids(page), page.missed_rows) == (["7", "8", "9"], 7)


def test_missed_rows_are_exact_for_a_reader_that_fell_behind(make_store):
    store = make_store(max_rows=64)
    store.add({"requests": requests(*range(10)), "slots": slots(1)})
    cursor = store.read_since(0, ["requests"], limit=6).cursor
    for number in range(10, 500):
        store.add({"slots": slots(number), "requests": requests(number)})
    page = store.read_since(cursor, ["requests"])
    assert page.missed_rows == 500 - 6 - len(ids(page))


def test_a_sender_of_another_version_is_refused_without_raising(make_store, caplog):
    store = make_store()
    other = pa.RecordBatch.from_pydict({"a": [1]})
    for _ in range(3):
        assert store.add({"requests": other, "new-kind": other, "slots": slots(1)}) == 1
    assert store.counts()["refused"] == 6
    assert len([record for record in caplog.records if "refused" in record.message]) == 2


def test_segments_are_private_and_whole_and_few(make_store, tmp_path):
    folder = tmp_path / "telemetry"
    store = make_store(folder, segment_rows=10)
    for number in range(25):
        store.add({"requests": requests(number)})
        store.flush()
    found = segments(folder)
    assert [len(pq.read_table(path)) for path in found] == [10, 10, 5]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}
    assert [path for path in folder.iterdir() if path not in found] == []
    assert store.counts()["written"] == 25


def test_rows_are_written_by_a_thread_of_its_own(make_store, tmp_path):
    store = make_store(tmp_path / "t", flush_s=0.01)
    store.add({"requests": requests(1)})
    end = time.monotonic() + 60
    while not store.counts()["written"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert pq.read_table(segments(tmp_path / "t")[0]).column("request_id").to_pylist() == ["1"]


def test_a_reader_that_names_columns_gets_no_others(make_store):
    store = make_store()
    store.add({"requests": requests(1, 2), "slots": slots(7)})
    page = store.read_since(0, ["requests", "slots"], columns={"requests": ("total_s", "request_id")})
    assert page.tables["requests"].column_names == ["total_s", "request_id"]
    assert page.tables["requests"]["request_id"].to_pylist() == ["1", "2"]
    assert page.tables["slots"].schema.equals(SCHEMAS["slots"])
    assert store.read_since(page.cursor, ["requests"], columns={"requests": ["model"]}).tables["requests"].num_rows == 0
    with pytest.raises(KeyError):
        store.read_since(0, ["requests"], columns={"requests": ["nothing"]})


def test_a_folder_is_read_only_as_far_back_and_as_wide_as_asked(make_store, tmp_path):
    folder = tmp_path / "t"
    store = make_store(folder, segment_rows=1)
    for number in range(4):
        store.add({"requests": requests(number), "slots": slots(number)})
        store.flush()
    written = [path for path in segments(folder) if path.name.startswith("requests")]
    for hours, path in enumerate(reversed(written)):
        os.utime(path, (time.time() - hours * 3600,) * 2)
    found = read_folder(folder, columns={"requests": ("request_id",)}, back_s=7300)
    assert list(found) == ["requests"]
    assert found["requests"].column_names == ["request_id"]
    assert found["requests"]["request_id"].to_pylist() == ["1", "2", "3"]
    whole = read_folder(folder)
    assert whole["requests"].schema.equals(SCHEMAS["requests"])
    assert [whole[kind].num_rows for kind in ("requests", "slots")] == [4, 4]


def test_a_folder_of_an_older_release_is_read_without_its_missing_columns(make_store, tmp_path, caplog):
    folder = tmp_path / "t"
    store = make_store(folder, segment_rows=1)
    for number in range(3):
        store.add({"requests": requests(number)})
        store.flush()
    older, strange, _ = segments(folder)
    pq.write_table(pq.read_table(older).drop_columns(["policy", "prefix"]), older)
    rows = pq.read_table(strange)
    column = rows.schema.get_field_index("status")
    pq.write_table(rows.set_column(column, "status", pa.array(["many"])), strange)
    found = read_folder(folder)["requests"]
    assert found["request_id"].to_pylist() == ["0", "2"]
    assert found["policy"].to_pylist()[0] is None
    assert "other columns is left out" in caplog.text
    assert strange.name in caplog.text


def test_a_store_finds_its_rows_again_and_its_cursors_go_on(make_store, tmp_path):
    first = make_store(tmp_path / "t", segment_rows=4)
    for number in range(6):
        first.add({"requests": requests(number), "slots": slots(number)})
        first.flush()
    cursor = first.read_since(0, limit=5).cursor
    head = first.read_since().cursor
    first.add({"slots": slots(99)})  # told to a reader, then lost by a kill
    lost_head = first.read_since().cursor
    second = make_store(tmp_path / "t")
    assert ids(second.read_since()) == [str(number) for number in range(6)]
    assert ids(second.read_since(cursor)) == ids(first.read_since(cursor))
    assert ids(second.read_since(head)) == []
    second.add({"requests": requests(6)})
    page = second.read_since(lost_head)
    assert ids(page) == ["6"]
    assert page.cursor > lost_head > head > cursor


def test_only_the_newest_rows_are_loaded_again(make_store, tmp_path):
    first = make_store(tmp_path / "t", segment_rows=10)
    for number in range(100):
        first.add({"requests": requests(number)})
        first.flush() if number % 10 == 9 else None
    second = make_store(tmp_path / "t", max_rows=20)
    assert ids(second.read_since())[-1] == "99"
    assert len(ids(second.read_since())) <= 20


def test_a_torn_segment_is_left_out_with_a_line(make_store, tmp_path, caplog):
    first = make_store(tmp_path / "t", segment_rows=2)
    for number in range(6):
        first.add({"requests": requests(number)})
        first.flush()
    torn = segments(tmp_path / "t")[1]
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    (tmp_path / "t" / "requests-00000000000000000001.draft").write_bytes(b"half")
    second = make_store(tmp_path / "t")
    assert ids(second.read_since()) == ["0", "1", "4", "5"]
    assert [record for record in caplog.records if torn.name in record.message]
    assert not list((tmp_path / "t").glob("*.draft"))


def test_a_segment_of_other_columns_is_left_out_with_a_line(make_store, tmp_path, caplog):
    folder = tmp_path / "t"
    folder.mkdir()
    pq.write_table(pa.table({"a": [1]}), folder / "requests-00000000000000000001.parquet")
    store = make_store(folder)
    assert store.counts()["kept"] == 0
    assert "other columns" in caplog.text


def test_old_segments_are_deleted(make_store, tmp_path):
    store = make_store(tmp_path / "t", segment_rows=1, max_age_s=3600.0)
    for number in range(3):
        store.add({"requests": requests(number)})
        store.flush()
    oldest, *rest = segments(tmp_path / "t")
    os.utime(oldest, (time.time() - 3601,) * 2)
    stranger = tmp_path / "t" / "mine.parquet"
    stranger.write_bytes(b"x")
    os.utime(stranger, (0, 0))
    store.flush()
    assert segments(tmp_path / "t") == [stranger, *rest]


def test_segments_together_stay_below_their_bytes(make_store, tmp_path):
    store = make_store(tmp_path / "t", segment_rows=1, max_bytes=40_000)
    for number in range(12):
        store.add({"requests": requests(number)})
        store.flush()
        time.sleep(0.01)  # apart in their time of writing
    left = segments(tmp_path / "t")
    assert sum(path.stat().st_size for path in left) <= 40_000
    assert pq.read_table(left[-1]).column("request_id").to_pylist() == ["11"]
    assert len(left) < 12


def test_a_disk_that_refuses_costs_rows_on_disk_only_and_one_line(make_store, tmp_path, caplog):
    folder = tmp_path / "t"
    folder.write_text("a file where the folder should be")
    store = make_store(folder, segment_rows=5)
    for number in range(30):
        store.add({"requests": requests(number)})
        store.flush()
    counts = store.counts()
    assert counts["write_errors"] >= 30
    assert counts["lost"] >= 15  # already now: memory is bounded while it refuses
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    folder.unlink()
    store.flush()
    written = list(itertools.chain(*(pq.read_table(path)["request_id"].to_pylist() for path in segments(folder))))
    counts = store.counts()
    assert written == [str(number) for number in range(30 - len(written), 30)]
    assert counts["written"] + counts["lost"] == 30
    assert len(written) <= 10
    assert ids(store.read_since()) == [str(number) for number in range(30)]


def test_a_kind_that_the_disk_refuses_does_not_hold_up_the_others(make_store, tmp_path):
    store = make_store(tmp_path / "t", segment_rows=5)
    store.flush()
    in_the_way = []
    for number in range(30):
        in_the_way.append(tmp_path / "t" / f"requests-{store.read_since().cursor:020d}.draft")
        in_the_way[-1].mkdir()
        store.add({"requests": requests(number)})
        store.add({"slots": slots(number)})
        store.flush()
    written = [path for path in segments(tmp_path / "t") if path.name.startswith("slots")]
    assert sum(len(pq.read_table(path)) for path in written) == 30
    counts = store.counts()
    assert counts["written"] == 30
    assert counts["lost"] >= 15
    for path in in_the_way:
        path.rmdir()
    store.flush()
    assert store.counts()["written"] + store.counts()["lost"] == 60


def test_rows_that_wait_for_a_flush_are_bounded_by_rows_and_by_bytes(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr("lltm_ray.telemetry.segments._MOST_NEW_ROWS", 10)
    store = make_store(tmp_path / "t")
    for number in range(25):
        store.add({"requests": requests(number)})
    assert store.counts()["lost"] == 15
    store.flush()
    assert [*pq.read_table(segments(tmp_path / "t")[0])["request_id"].to_pylist()] == [str(n) for n in range(15, 25)]
    monkeypatch.setattr("lltm_ray.telemetry.segments._SEGMENT_BYTES", 3 * requests(1).nbytes)
    for number in range(25):
        store.add({"requests": requests(number)})
    assert store.counts()["lost"] > 15 + 20


def test_a_segment_is_closed_by_its_bytes_too(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr("lltm_ray.telemetry.segments._SEGMENT_BYTES", 2 * requests(1).nbytes)
    store = make_store(tmp_path / "t")
    for number in range(6):
        store.add({"requests": requests(number)})
        store.flush()
    assert len(segments(tmp_path / "t")) >= 3


def test_many_threads_lose_nothing(make_store, tmp_path):
    store = make_store(tmp_path / "t", flush_s=0.005)
    seen = []

    def add():
        for number in range(50):
            store.add({"queues": pack("queues", [queue_row(waiting=number)] * 3)})

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    cursor = 0
    while any(thread.is_alive() for thread in threads) or len(seen) < 600:
        page = store.read_since(cursor, ["queues"], 50)
        cursor = page.cursor
        seen += page.tables["queues"]["waiting"].to_pylist()
        assert page.missed_rows == 0
    store.close()
    assert sorted(seen) == sorted([*range(50)] * 12)
    assert sum(len(pq.read_table(path)) for path in segments(tmp_path / "t")) == 600


def test_rows_are_found_by_a_value_in_memory_and_on_disk_each_once(make_store, tmp_path):
    store = make_store(tmp_path, max_rows=4, segment_rows=3)
    for number in range(12):
        store.add({"requests": requests(number, "twin" if number in {2, 11} else f"x{number}")})
        store.flush()
    assert named(store.find("requests", "request_id", "11")) == ["11"]
    assert named(store.find("requests", "request_id", "0")) == ["0"]
    assert named(store.find("requests", "request_id", "nobody")) == []
    ((newest, _),) = store.find("requests", "request_id", "twin")
    assert named(store.find("requests", "request_id", "twin", near=newest)) == ["twin", "twin"]
    assert [number for number, _ in store.find("requests", "request_id", "twin", near=newest)][-1] == newest
    assert named(store.find("requests", "request_id", "x10", near=newest)) == ["x10"]


def test_a_search_reads_the_newest_segments_first_and_only_those_that_may_hold_it(make_store, tmp_path, monkeypatch):
    store = make_store(tmp_path, max_rows=1, segment_rows=1)
    for number in range(6):
        store.add({"requests": requests(number)})
        store.flush()
    files, read = segments(tmp_path), []
    really = telemetry_segments._read_columns
    monkeypatch.setattr(
        telemetry_segments,
        "_read_columns",
        lambda path, *rest, **more: read.append(path) or really(path, *rest, **more),
    )
    ((third, _),) = store.find("requests", "request_id", "3")
    assert list(dict.fromkeys(read)) == [files[4], files[3]]
    read.clear()
    monkeypatch.setattr(telemetry_store, "_NEAR_ROWS", 1)
    assert named(store.find("requests", "request_id", "0", near=third)) == []
    assert set(read) <= {files[2], files[3], files[4]}
    read.clear()
    assert store.find("requests", "request_id", "0", until_s=time.monotonic() - 1) == []
    assert read == []


def test_a_search_passes_over_a_torn_segment_and_one_that_is_deleted_meanwhile(make_store, tmp_path, caplog):
    store = make_store(tmp_path, max_rows=1, segment_rows=1)
    for number in range(4):
        store.add({"requests": requests(number)})
        store.flush()
    segments(tmp_path)[1].write_bytes(b"PAR1 and then nothing")
    segments(tmp_path)[2].unlink()
    assert named(store.find("requests", "request_id", "0")) == ["0"]
    assert "torn" in caplog.text
