from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lltm_ray.routing.ledger import Attempt, Drift, Ledger, LedgerEntry, Outcome, Sums, find_drift, store
from lltm_ray.routing.ledger.batch import Batch
from lltm_ray.routing.ledger.entry import printed_error

NOW = 1_700_000_000_000_000_000


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "own" / "ledger.sqlite", flush_s=0.01)
    yield made
    made.close()


def run_one(ledger: Ledger, request_id: str, *, tokens: int = 8, engine: str = "e0", **attempt) -> LedgerEntry:
    """A request with one attempt that delivers all it generates, unless `attempt` says otherwise."""
    entry = LedgerEntry(request_id=request_id, tenant="team", model="tiny", arrived_unix_nano=NOW, total_s=0.5)
    counts = {"computed_tokens": 10, "cached_tokens": 3, "generated_tokens": tokens, "delivered_tokens": tokens}
    tried = Attempt(engine=engine, server_pid=7, **counts | attempt)
    ledger.begin(entry, tried).delivered(tried.delivered_tokens)
    entry.delivered_tokens = tried.delivered_tokens
    ledger.finish(entry)
    return entry


def test_a_request_is_explained_with_all_that_was_noted(ledger):
    entry = LedgerEntry(
        request_id="r-1", tenant="team", model="tiny", route="/v1/chat/completions", policy="residency",
        why="12 of 20 tokens are cached there", considered=[{"engine": "e0", "expected_s": 0.1}], affinity="ab12",
        arrived_unix_nano=NOW,
    )  # fmt: skip
    first = Attempt(engine="e0", server_pid=7, slot=1, predicted_cached_tokens=12)
    ledger.begin(entry, first).delivered(5)
    first.delivered_tokens, first.generated_tokens, first.outcome, first.is_estimate = 5, 6, Outcome.CONTINUED, True
    second = Attempt(engine="e1", server_pid=8, cached_tokens=2, computed_tokens=23)
    ledger.begin(entry, second).delivered(4)
    second.delivered_tokens, second.generated_tokens = 4, 4
    entry.delivered_tokens, entry.status, entry.is_exact, entry.ttft_s = 9, 200, True, 0.02
    ledger.finish(entry)
    shown = ledger.explain("r-1")
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["why"], shown["affinity"], shown["ttft_s"], shown["is_exact"]) == (entry.why, "ab12", 0.02, True)
    assert shown["considered"] == [{"engine": "e0", "expected_s": 0.1}]
    assert [each["engine"] for each in shown["attempts"]] == ["e0", "e1"]
    assert [each["wasted_tokens"] for each in shown["attempts"]] == [1, 0]
    assert (shown["delivered_tokens"], shown["generated_tokens"], shown["wasted_tokens"]) == (9, 10, 1)
    assert shown["is_balanced"] is True
    assert ledger.explain("r-2") is None


def test_the_file_is_for_its_owner_only(ledger):
    run_one(ledger, "r")
    assert ledger.flush()
    assert ledger.path.parent.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in ledger.path.parent.iterdir()} == {0o600}


def test_tokens_that_do_not_add_up_are_written_and_counted(ledger, caplog):
    entry = LedgerEntry(request_id="odd", delivered_tokens=9, attempts=[])
    ledger.begin(entry, Attempt(engine="e0", delivered_tokens=8, generated_tokens=8))
    ledger.finish(entry)
    assert ledger.explain("odd")["is_balanced"] is False
    assert ledger.counters["unbalanced"] == 1
    assert "odd" in caplog.text


def test_a_request_that_was_refused_has_no_attempt(ledger):
    ledger.finish(LedgerEntry(request_id="refused", status=429, error="the queue is full"))
    shown = ledger.explain("refused")
    assert (shown["attempts"], shown["status"], shown["considered"]) == ([], 429, [])
    assert ledger.counters["in_flight"] == 0


def test_the_latest_are_found_first_and_by_tenant(ledger):
    for number in range(5):
        run_one(ledger, f"r-{number}")
    other = LedgerEntry(request_id="theirs", tenant="them", status=429)
    ledger.finish(other)
    assert [each["request_id"] for each in ledger.find(limit=3)] == ["theirs", "r-4", "r-3"]
    assert [each["request_id"] for each in ledger.find(tenant="them")] == ["theirs"]


def test_many_requests_at_once_are_written_each_in_its_place(tmp_path):
    entries = [
        LedgerEntry(
            request_id=f"r{number}", attempts=[Attempt(engine=f"e{number}-{tried}") for tried in range(1 + number % 2)]
        )
        for number in range(137)
    ]
    with store.reading(tmp_path / "ledger.sqlite") as db:
        store.write(db, Batch(entries))
        shown = store.read_requests(db, "true", (), 1000)[::-1]
    assert [each["request_id"] for each in shown] == [entry.request_id for entry in entries]
    tried = [[each["engine"] for each in one["attempts"]] for one in shown]
    assert tried == [[each.engine for each in entry.attempts] for entry in entries]


def test_what_ended_on_the_way_and_what_the_writer_finds_is_one_account(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", flush_s=60.0)
    odd = {40, 41, 99}
    for number in range(100):
        entry = LedgerEntry(request_id=f"r{number}", arrived_unix_nano=NOW + number, total_s=0.5, delivered_tokens=2)
        for tried in range(1 + number % 2):
            counts = {"generated_tokens": 2 - 2 * tried, "delivered_tokens": 2 * (not tried) + (number in odd)}
            ledger.begin(entry, Attempt(engine=f"e{tried}", server_pid=7, is_estimate=bool(tried), **counts))
        ledger.finish(entry)
    assert ledger.counters["pending"] == 100
    assert ledger.flush()
    counters = ledger.counters
    assert (counters["pending"], counters["written"], counters["unbalanced"]) == (0, 100, 3)
    assert [each["request_id"] for each in ledger.find(limit=200)] == [f"r{number}" for number in range(99, -1, -1)]
    first = Sums(attempts=100, generated_tokens=200, delivered_tokens=203, last_end_unix_nano=NOW + 99 + 500_000_000)
    again = Sums(
        attempts=50, delivered_tokens=2, estimates=50, estimated_generated_tokens=2,
        last_end_unix_nano=NOW + 99 + 500_000_000,
    )  # fmt: skip
    assert (ledger.sums("e0", 7), ledger.sums("e1", 7)) == (first, again)
    ledger.close()
    assert not list(tmp_path.glob("*.cells")), "every place was given back"


def test_the_request_path_makes_the_rows(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", flush_s=60.0)
    for number in range(100):
        run_one(ledger, f"r{number}")
    assert [len(each) for each in ledger._batches] == [32, 32, 32]
    ledger.close()
    assert ledger.counters["written"] == 100


def test_a_long_line_of_requests_is_written_to_its_end(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", flush_s=60.0, max_pending=20_000)
    for number in range(16_500):
        run_one(ledger, f"r{number}", tokens=1)
    ledger.close()
    with store.reading(tmp_path / "l.sqlite") as db:
        assert [each["request_id"] for each in store.read_requests(db, "true", (), 2)] == ["r16499", "r16498"]
        assert store.read_sums(db, "e0", 7).generated_tokens == ledger.counters["written"] == 16_500


def test_requests_that_end_while_others_are_written_wait_for_the_next_turn(tmp_path, monkeypatch):
    ledger, write, more = Ledger(tmp_path / "l.sqlite", flush_s=60.0), store.write, iter(range(100_000))

    def busy(db, batch):
        write(db, batch)
        for _ in range(40):
            run_one(ledger, f"r{next(more)}")

    monkeypatch.setattr(store, "write", busy)
    run_one(ledger, "first")
    assert ledger.flush(timeout_s=2.0)
    assert (ledger.counters["written"], ledger.counters["pending"]) == (1, 40)
    monkeypatch.setattr(store, "write", write)
    ledger.close()
    assert ledger.counters["written"] == 41


def test_a_request_that_ends_while_rows_are_made_does_not_stop_the_gateway(ledger):
    """As one does that the garbage collector ends."""

    class Ends:
        def __reduce__(self):
            for number in range(70):
                run_one(ledger, f"r{number}")
            return str, ("e0",)

    ledger.finish(LedgerEntry(request_id="odd", considered=[{"engine": Ends()}]))
    done = threading.Thread(target=ledger._pack, daemon=True)
    done.start()
    done.join(5.0)
    assert not done.is_alive()
    assert ledger.flush()
    assert ledger.counters["written"] == 71


def test_beside_a_value_that_sqlite_refuses_all_others_are_kept_whole(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", flush_s=60.0)
    for number in range(10):
        entry = LedgerEntry(request_id="same" if number < 3 else f"r{number}", delivered_tokens=3 + (number == 1))
        for tried in range(3):
            ledger.begin(entry, Attempt(engine=f"e{tried}", server_pid=number, generated_tokens=1, delivered_tokens=1))
        ledger.finish(entry)
        if number in (0, 7):
            ledger.finish(LedgerEntry(request_id=f"huge{number}", status=2**70))
    assert ledger.flush()
    shown = ledger.find()[::-1]
    assert [each["request_id"] for each in shown] == ["same"] * 3 + [f"r{number}" for number in range(3, 10)]
    assert [each["is_balanced"] for each in shown] == [True, False, *[True] * 8]
    assert {tuple(each["engine"] for each in one["attempts"]) for one in shown} == {("e0", "e1", "e2")}
    assert [ledger.sums("e2", number).attempts for number in range(10)] == [1] * 10
    assert (ledger.counters["dropped"], ledger.counters["unbalanced"]) == (2, 1)
    ledger.close()


def test_counts_that_no_server_can_have_do_not_stop_the_writer(ledger):
    for name in ("one", "two"):
        run_one(ledger, name, computed_tokens=2**62)
    run_one(ledger, "none", cached_tokens=None)
    run_one(ledger, "good")
    assert ledger.flush()
    assert {each["request_id"] for each in ledger.find()} >= {"one", "two", "good"}


def test_half_a_surrogate_pair_of_a_client_costs_no_request(ledger):
    ledger.finish(LedgerEntry(request_id="r", model="m\ud800", status=404, error="there is no model m\ud800"))
    assert ledger.explain("r")["model"] == "m?"
    assert ledger.counters["dropped"] == 0


def test_after_its_end_nothing_is_said_to_be_written(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.close()
    ledger.finish(LedgerEntry(request_id="late"))
    assert ledger.flush(timeout_s=1.0) is False


def test_a_value_that_cannot_be_pickled_loses_one_request_only(ledger, caplog):
    run_one(ledger, "before")
    ledger.finish(LedgerEntry(request_id="odd", considered=[{"engine": lambda: None}]))
    run_one(ledger, "after")
    assert ledger.flush()
    assert {each["request_id"] for each in ledger.find()} == {"before", "after"}
    counters = ledger.counters
    assert (counters["dropped"], counters["written"], counters["pending"]) == (1, 2, 0)
    assert "a value cannot be kept" in caplog.text


def test_a_small_limit_of_values_takes_more_statements(tmp_path):
    with store.reading(tmp_path / "ledger.sqlite") as db:
        db.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
        for count in (1, 9, 100):
            attempts = [Attempt(engine="e", server_pid=1, generated_tokens=1, delivered_tokens=1)]
            entries = [LedgerEntry(request_id=f"r{n}", attempts=attempts, delivered_tokens=1) for n in range(count)]
            store.write(db, Batch(entries))
        shown = store.read_requests(db, "true", (), 1000)
        assert (len(shown), {len(each["attempts"]) for each in shown}) == (110, {1})
        assert store.read_sums(db, "e", 1).attempts == 110


def test_an_id_used_twice_shows_its_latest_request(ledger):
    run_one(ledger, "same", tokens=1)
    run_one(ledger, "same", tokens=2)
    assert ledger.explain("same")["delivered_tokens"] == 2


def test_the_oldest_are_forgotten_but_not_their_sums(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", keep_requests=100, flush_s=0.01)
    for number in range(500):
        run_one(ledger, f"r-{number}", tokens=2)
        if number % 50 == 0:
            ledger.flush()
    kept = ledger.find(limit=1000)
    assert 100 <= len(kept) <= 150
    assert kept[0]["request_id"] == "r-499"
    assert ledger.sums("e0", 7).generated_tokens == 1000
    ledger.close()
    with sqlite3.connect(ledger.path) as db:
        assert db.execute("SELECT count(*) FROM attempts").fetchone()[0] == len(kept)
    db.close()
    again = Ledger(tmp_path / "l.sqlite")
    assert (again.sums("e0", 7).attempts, again.sums("e0", 8)) == (500, Sums())
    again.close()


def test_several_processes_write_one_file(tmp_path):
    code = (
        "import sys; from lltm_ray.routing.ledger import *\n"
        "ledger = Ledger(sys.argv[1], name=sys.argv[2], flush_s=0.001)\n"
        "for n in range(300):\n"
        "    entry = LedgerEntry(request_id=f'{sys.argv[2]}-{n}', delivered_tokens=1)\n"
        "    ledger.begin(entry, Attempt(engine='e0', server_pid=7, generated_tokens=1, delivered_tokens=1))\n"
        "    ledger.finish(entry)\n"
        "    n % 10 or ledger.flush()\n"
        "ledger.close(); print(ledger.counters['written'])\n"
    )
    path = str(tmp_path / "l.sqlite")
    children = [subprocess.Popen([sys.executable, "-c", code, path, name], stdout=subprocess.PIPE) for name in "abc"]
    assert [child.communicate()[0] for child in children] == [b"300\n"] * 3
    ledger = Ledger(path)
    assert len({each["request_id"] for each in ledger.find(limit=2000)}) == 900
    assert ledger.sums("e0", 7).delivered_tokens == 900
    ledger.close()


KILLED = """
import random, sys, time
from lltm_ray.routing.ledger import Attempt, Ledger, LedgerEntry
ledger = Ledger(sys.argv[1], flush_s=float(sys.argv[3]))
random.seed(int(sys.argv[2]))
running, begun = {}, 0
while True:
    if len(running) < 20 and begun < 400:  # more than the pipe holds: it is killed on its way, however late
        entry = LedgerEntry(request_id=f"r-{begun}", tenant="t", model="m", arrived_unix_nano=1_700_000_000_000 + begun)
        ledger.begin(entry, Attempt(engine=f"e{begun % 3}", server_pid=7))
        running[begun] = entry
        print("begin", begun, flush=True)
        begun += 1
    number, entry = random.choice(list(running.items()))
    attempt = entry.attempts[-1]
    attempt.delivered_tokens += 1
    entry.delivered_tokens += 1
    entry.cell.delivered(attempt.delivered_tokens)
    print("token", number, flush=True)
    if entry.delivered_tokens >= 30:
        attempt.generated_tokens = attempt.delivered_tokens
        ledger.finish(running.pop(number))
        print("finish", number, flush=True)
        if begun == 400 and not running:
            time.sleep(60)
    elif random.random() < 0.01 and len(entry.attempts) < 2:
        attempt.generated_tokens, attempt.outcome, attempt.is_estimate = attempt.delivered_tokens, "continued", True
        ledger.begin(entry, Attempt(engine="e9", server_pid=9))
"""


@pytest.mark.parametrize(("seed", "flush_s"), [(1, 0.001), (2, 0.05), (3, 30.0)])
def test_a_killed_gateway_loses_no_request_and_no_token(tmp_path, seed, flush_s):
    path = tmp_path / "l.sqlite"
    command = [sys.executable, "-c", KILLED, str(path), str(seed), str(flush_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        lines = [child.stdout.readline() for _ in range(random.Random(seed).randint(600, 1400))]
        child.kill()
        lines += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    words = [line.split() for line in lines if line.endswith("\n")]
    begun = {int(number) for word, number in words if word == "begin"}
    finished = {int(number) for word, number in words if word == "finish"}
    told = {number: sum(word == "token" and int(of) == number for word, of in words) for number in begun}

    ledger = Ledger(path)
    found = {int(each["request_id"][2:]): each for each in ledger.find(limit=1000)}
    ledger.close()
    assert len(begun) > len(finished) > 0
    assert set(found) >= begun
    assert len(set(found) - begun) <= 1  # begun, and killed before it could say so
    surplus = {number: found[number]["delivered_tokens"] - told[number] for number in begun}
    assert sorted(surplus.values())[:-1] == [0] * (len(begun) - 1)
    assert max(surplus.values()) <= 1  # delivered, and killed before it could say so
    assert all(each["is_balanced"] for each in found.values())
    for number in begun - finished:
        last = found[number]["attempts"][-1]
        assert last["outcome"] in ("gateway lost", "ok")
        assert last["outcome"] == "gateway lost" or told[number] >= 29
    for number in finished:
        assert found[number]["attempts"][-1]["outcome"] == "ok"
        assert found[number]["delivered_tokens"] == 30
    assert not list(tmp_path.glob("*.cells"))


def test_what_a_dead_process_had_written_is_not_written_again(tmp_path):
    """Killed between the commit and the freeing of its cells."""
    first = Ledger(tmp_path / "l.sqlite")
    written = run_one(first, "r", tokens=4)
    first.flush()
    entry = LedgerEntry(request_id="r", arrived_unix_nano=written.arrived_unix_nano)
    first.begin(entry, Attempt(engine="e0", server_pid=7)).delivered(4)
    first.close()
    again = Ledger(tmp_path / "l.sqlite")
    assert (len(again.find()), again.counters["recovered"], again.sums("e0", 7).attempts) == (1, 0, 1)
    again.close()


def test_a_disk_that_refuses_stops_no_request_and_every_lost_one_is_counted(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    ledger = Ledger(tmp_path / "file" / "l.sqlite", flush_s=0.01, max_pending=5)
    for number in range(12):
        run_one(ledger, f"r-{number}")
    assert ledger.flush() is False
    counters = ledger.counters
    assert (counters["pending"], counters["dropped"], counters["written"]) == (5, 7, 0)
    assert counters["write_errors"] > 0
    assert counters["unprotected"] == 12
    assert caplog.text.count("it is tried again") == 1
    ledger.close()


def test_what_waited_for_the_disk_is_written_when_it_is_back(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "l.sqlite", flush_s=0.01)
    monkeypatch.setattr("lltm_ray.routing.ledger.store.BUSY_S", 0.05)
    blocker = sqlite3.connect(tmp_path / "l.sqlite", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    run_one(ledger, "r")
    assert ledger.flush() is False
    blocker.execute("ROLLBACK")
    blocker.close()
    assert ledger.flush()
    assert ledger.explain("r")["delivered_tokens"] == 8
    assert ledger.counters["dropped"] == 0
    ledger.close()


def test_one_value_that_sqlite_refuses_loses_one_request_only(ledger):
    run_one(ledger, "before")
    ledger.finish(LedgerEntry(request_id="half \ud800 pair"))
    ledger.finish(LedgerEntry(request_id="huge", status=2**70))
    run_one(ledger, "after")
    assert ledger.flush()
    assert {each["request_id"] for each in ledger.find()} == {"before", "after"}
    assert (ledger.counters["dropped"], ledger.counters["written"]) == (2, 2)


def test_a_disk_that_refuses_in_between_writes_nothing_twice(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.sqlite", flush_s=60.0)
    calls, write = [], store.write

    def refuse_once(db, batch):
        calls.append(batch)
        if len(calls) == 4:  # all, the first, the second, the third
            raise sqlite3.OperationalError("disk I/O error")
        write(db, batch)

    monkeypatch.setattr(store, "write", refuse_once)
    run_one(ledger, "good")
    ledger.finish(LedgerEntry(request_id="bad", status=2**70))
    run_one(ledger, "last")
    assert not ledger.flush()
    assert ledger.flush()
    assert [each["request_id"] for each in ledger.find()] == ["last", "good"]
    assert ledger.counters["written"] == 2
    ledger.close()


def test_a_file_cannot_bring_code_with_it(ledger):
    ledger.finish(LedgerEntry(request_id="r", considered=[{"engine": Path("/")}]))
    with pytest.raises(Exception, match="no plain value"):
        ledger.explain("r")


def test_counters_equal_to_the_ledger_show_no_drift(ledger):
    for number in range(3):
        run_one(ledger, f"r-{number}", tokens=4)
    assert ledger.reconcile(("e0", 7), 30, 12) == Drift()
    assert ledger.reconcile(("e0", 7), 33, 10) == Drift(prompt_tokens=3, generated_tokens=-2)
    assert ledger.reconcile(("e0", 8), 5, 1) == Drift(prompt_tokens=5, generated_tokens=1)


def test_nothing_is_said_while_something_runs_or_has_run_since(ledger, tmp_path):
    run_one(ledger, "r", tokens=4)
    assert ledger.reconcile(("e0", 7), 10, 4, busy=1) is None
    assert ledger.reconcile(("e0", 7), 10, 4, asked_unix_nano=NOW + 400_000_000) is None
    running = LedgerEntry(request_id="running", arrived_unix_nano=NOW)
    ledger.begin(running, Attempt(engine="e0", server_pid=7))
    assert ledger.reconcile(("e0", 7), 10, 4) is None
    assert ledger.reconcile(("e1", 7), 0, 0) == Drift()
    ledger.finish(running)
    neighbour = Ledger(ledger.path, name="neighbour")
    theirs = LedgerEntry(request_id="theirs", arrived_unix_nano=NOW)
    neighbour.begin(theirs, Attempt(engine="e0", server_pid=7))
    assert ledger.reconcile(("e0", 7), 10, 4) is None
    neighbour.finish(theirs)
    neighbour.close()
    assert ledger.reconcile(("e0", 7), 10, 4) == Drift()


def test_what_others_had_made_there_before_is_not_charged_to_an_attempt_that_was_cut_off(ledger):
    run_one(ledger, "whole", tokens=4)
    assert ledger.reconcile(("e0", 7), 110, 904) == Drift(prompt_tokens=100, generated_tokens=900)
    run_one(ledger, "gone", tokens=5, outcome=Outcome.CLIENT_GONE, is_estimate=True, computed_tokens=0)
    assert ledger.reconcile(("e0", 7), 122, 912) == Drift(prompt_tokens=100, generated_tokens=900, estimates=1)
    assert ledger.reconcile(("e0", 7), 122, 912) == Drift(prompt_tokens=100, generated_tokens=900)
    gone = ledger.explain("gone")["attempts"][0]
    assert (gone["computed_tokens"], gone["generated_tokens"]) == (12, 8)


def test_one_attempt_cut_off_learns_its_exact_counts_from_the_counter_at_rest(ledger):
    run_one(ledger, "whole", tokens=4)
    run_one(ledger, "gone", tokens=5, outcome=Outcome.CLIENT_GONE, is_estimate=True, computed_tokens=0)
    assert ledger.reconcile(("e0", 7), 22, 12) == Drift(estimates=1)
    assert ledger.explain("gone")["attempts"][0]["is_estimate"] is True
    assert ledger.reconcile(("e0", 7), 22, 12) == Drift()
    gone = ledger.explain("gone")["attempts"][0]
    assert (gone["computed_tokens"], gone["generated_tokens"], gone["wasted_tokens"]) == (12, 8, 3)
    assert gone["is_estimate"] is False
    assert ledger.reconcile(("e0", 7), 22, 13) == Drift(generated_tokens=1)


def test_what_was_noted_of_an_engine_goes_with_it(ledger):
    run_one(ledger, "gone", tokens=5, outcome=Outcome.CLIENT_GONE, is_estimate=True)
    assert ledger.reconcile(("e0", 7), 12, 8) == Drift(estimates=1)
    ledger.forget_servers({"e1"})
    assert ledger.reconcile(("e0", 7), 12, 8) == Drift(estimates=1), "as for the first time"
    ledger.forget_servers({"e0"})
    assert ledger.reconcile(("e0", 7), 12, 8) == Drift()


def test_several_cut_off_are_settled_together_and_stay_estimates(ledger):
    for number in range(2):
        run_one(ledger, f"gone-{number}", tokens=5, outcome=Outcome.CLIENT_GONE, is_estimate=True)
    assert [ledger.reconcile(("e0", 7), 25, 17) for _ in range(2)] == [Drift(estimates=2), Drift()]
    assert all(each["attempts"][0]["is_estimate"] for each in ledger.find())
    run_one(ledger, "next", tokens=1)
    assert ledger.reconcile(("e0", 7), 35, 18) == Drift()


def test_a_counter_below_what_cut_off_attempts_delivered_is_drift(ledger):
    run_one(ledger, "gone", tokens=5, outcome=Outcome.CLIENT_GONE, is_estimate=True)
    assert [ledger.reconcile(("e0", 7), 10, 4).generated_tokens for _ in range(2)] == [-1, -1]


def test_counters_over_a_million_are_compared_as_far_as_they_are_printed():
    sums = Sums(computed_tokens=1_234_567, generated_tokens=999_999)
    assert find_drift(sums, float(f"{1_234_567:.6g}"), float(f"{999_999:.6g}")) == Drift()
    assert find_drift(sums, 1_234_580, 999_998) == Drift(prompt_tokens=13, generated_tokens=-1)
    assert [printed_error(value) for value in (999_999, 1_000_000, 98_765_400)] == [0, 5, 50]


@pytest.mark.parametrize("seed", range(20))
def test_no_count_below_ten_million_drifts_by_being_printed(seed):
    count = random.Random(seed).randint(0, 10_000_000)
    assert find_drift(Sums(computed_tokens=count), float(f"{count:.6g}"), 0) == Drift()


def test_sums_of_two_nodes_add_up():
    one, two = Sums(attempts=1, computed_tokens=5, last_end_unix_nano=9), Sums(attempts=2, last_end_unix_nano=4)
    assert one + two == Sums(attempts=3, computed_tokens=5, last_end_unix_nano=9)


def test_the_request_path_does_not_wait_for_the_disk(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", flush_s=0.001)
    ledger.flush()
    blocker = sqlite3.connect(tmp_path / "l.sqlite", isolation_level=None)
    run_one(ledger, "warm")
    ledger.flush()
    blocker.execute("BEGIN EXCLUSIVE")
    started = time.perf_counter()
    for number in range(1000):
        run_one(ledger, f"r-{number}")
    assert time.perf_counter() - started < store.BUSY_S, "one wait for the disk takes as long"
    assert ledger.counters["pending"] == 1000
    blocker.execute("ROLLBACK")
    blocker.close()
    ledger.close()
    assert ledger.counters["written"] == 1001


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        *((0, "ok"), (200, "ok"), (400, "engine refused"), (422, "engine refused"), (501, "engine refused")),
        *((429, "failed"), (500, "failed"), (502, "failed"), (503, "failed")),
    ],
)
def test_an_attempt_ends_as_the_status_of_its_answer_says(status, outcome):
    assert Outcome.of_status(status) == outcome
