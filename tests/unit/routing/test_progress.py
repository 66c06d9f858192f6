from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from lltm_ray.routing.ledger import progress
from lltm_ray.routing.ledger.progress import MAX_CELLS, NO_CELL, Mark, Progress, count_active, take_over

DYING = """
import os, signal, sys
from pathlib import Path
from lltm_ray.routing.ledger.progress import Mark, Progress
table = Progress(Path(sys.argv[1]), "gateway", cells=4)
cells = [table.claim(Mark(f"r-{n}", f"e{n % 2}", "m", "t", "/v1/x", 10 + n, 20 + n, 77, n)) for n in range(10)]
for n, cell in enumerate(cells):
    for tokens in range(n + 1):
        cell.delivered(tokens)
cells[0].free()
cells[1].next_attempt(Mark("r-1", "e9", server_pid=99, slot=3), "e1", 77, 1)
cells[1].delivered(41)
cells[2].done((5, 6, 7, 3, True), 2, 200)
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_a_dead_process(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DYING, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "ready\n"), done.stderr


def test_what_was_delivered_outlives_a_killed_process(tmp_path):
    leave_a_dead_process(tmp_path)
    with take_over(tmp_path) as lost:
        by_id = {each.mark.request_id: each for each in lost}
    assert sorted(by_id) == [f"r-{n}" for n in range(1, 10)]
    for n in range(3, 10):
        assert (by_id[f"r-{n}"].delivered_tokens, by_id[f"r-{n}"].is_done) == (n, False)
    assert by_id["r-3"].mark == Mark("r-3", "e1", "m", "t", "/v1/x", 13, 23, 77, 3)
    ended = by_id["r-2"]
    assert (ended.is_done, ended.generated_tokens, ended.computed_tokens, ended.cached_tokens) == (True, 5, 6, 7)
    assert (ended.outcome, ended.is_estimate, ended.delivered_tokens, ended.status) == (3, True, 2, 200)


def test_a_failover_keeps_apart_what_each_attempt_delivered(tmp_path):
    leave_a_dead_process(tmp_path)
    with take_over(tmp_path) as lost:
        moved = next(each for each in lost if each.mark.request_id == "r-1")
    assert (moved.number, moved.delivered_before, moved.delivered_tokens) == (2, 1, 41)
    assert (moved.mark.engine, moved.mark.server_pid, moved.mark.slot) == ("e9", 99, 3)
    assert (moved.previous_engine, moved.previous_pid) == ("e1", 77)


def test_the_dead_are_read_once_and_only_if_the_reader_succeeds(tmp_path):
    leave_a_dead_process(tmp_path)
    with contextlib.suppress(ZeroDivisionError), take_over(tmp_path) as lost:
        assert len(lost) == 9 / 0
    with take_over(tmp_path) as lost:
        assert len(lost) == 9
        with take_over(tmp_path) as second:
            assert second == []
    assert list(tmp_path.iterdir()) == []


def test_the_living_are_left_alone(tmp_path):
    table = Progress(tmp_path, "gateway")
    cell = table.claim(Mark("r", "e0"))
    with take_over(tmp_path) as lost:
        assert lost == []
    cell.delivered(3)
    table.close()
    with take_over(tmp_path) as lost:
        assert [each.delivered_tokens for each in lost] == [3]
    cell.delivered(4)  # a stream that is being cancelled while the process ends


def test_a_process_that_ends_with_nothing_in_flight_leaves_no_file(tmp_path):
    table = Progress(tmp_path, "gate/way ü")
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    table.claim(Mark("r", "e0")).free()
    table.close()
    assert list(tmp_path.iterdir()) == []
    assert table.claim(Mark("late", "e0")) is NO_CELL


def test_cells_grow_by_doubling_keep_their_counts_and_end_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "MAX_CELLS", 12)
    table = Progress(tmp_path, "g", cells=4)
    cells = [table.claim(Mark(f"r-{n}", "e0")) for n in range(13)]
    for n, cell in enumerate(cells):
        cell.delivered(n)
    assert cells[12] is NO_CELL
    assert not NO_CELL
    assert table.unprotected == 1
    cells[5].free()
    again = table.claim(Mark("again", "e0"))
    again.delivered(100)
    cells[5].delivered(7)  # a freed cell takes nothing: the place is another request's
    table.close()
    with take_over(tmp_path) as lost:
        seen = {each.mark.request_id: each.delivered_tokens for each in lost}
    assert seen == {f"r-{n}": n for n in range(12) if n != 5} | {"again": 100}
    assert MAX_CELLS == 65_536


def test_requests_in_flight_are_counted_over_all_processes_of_the_node(tmp_path):
    one, two = Progress(tmp_path, "one"), Progress(tmp_path, "two")
    cells = [
        one.claim(Mark("a", "e0")),
        one.claim(Mark("b", "e1")),
        two.claim(Mark("c", "e0")),
        two.claim(Mark("d", "e10")),
    ]
    assert [count_active(tmp_path, name) for name in ("e0", "e1", "e10", "e")] == [2, 1, 1, 0]
    cells[0].done((0, 0, 0, 0, False), 0, 200)
    assert count_active(tmp_path, "e0") == 2  # not yet written down
    cells[0].free()
    assert count_active(tmp_path, "e0") == 1
    one.close()
    two.close()


def test_a_disk_without_room_leaves_requests_without_protection_and_running(tmp_path, monkeypatch, caplog):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    table = Progress(tmp_path, "g")
    cell = table.claim(Mark("r", "e0"))
    cell.delivered(5)
    cell.done((1, 1, 1, 0, False), 5, 200)
    cell.free()
    assert (cell, table.unprotected) == (NO_CELL, 1)
    assert "not protected" in caplog.text
    assert list(tmp_path.iterdir()) == []
    table.close()


def test_names_longer_than_a_cell_and_half_a_surrogate_pair_do_no_harm(tmp_path):
    table = Progress(tmp_path, "g")
    cell = table.claim(Mark("i" * 80, "e" * 62 + "üü", "\ud800", "t", "r"))
    assert cell
    assert table.claim(Mark("r", "e", server_pid=2**70)) is NO_CELL
    table.close()
    with take_over(tmp_path) as lost:
        mark = lost[0].mark
    assert (mark.request_id, mark.engine, mark.model) == ("i" * 64, "e" * 62 + "ü", "?")


def test_another_thread_may_free_cells_while_this_one_claims(tmp_path):
    table = Progress(tmp_path, "g", cells=2)
    waiting = [table.claim(Mark("first", "e0"))]
    stop = threading.Event()

    def free_them() -> None:
        while not stop.is_set() or waiting:
            if waiting:
                waiting.pop().free()

    thread = threading.Thread(target=free_them)
    thread.start()
    for n in range(20_000):
        cell = table.claim(Mark(f"r-{n}", "e0"))
        waiting.append(cell)
    stop.set()
    thread.join()
    assert count_active(tmp_path, "e0") == 0
    table.close()
    assert list(tmp_path.iterdir()) == []
