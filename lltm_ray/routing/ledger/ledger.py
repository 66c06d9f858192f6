"""The durable account of tokens per request and attempt.

The request path makes batches of what has ended; one thread writes them to SQLite. What a request in flight has got is
in a cell of `progress`, which is freed only when the request's row is on disk: whenever the process is killed, each
request that had begun is in the file, or in a cell that the next process reads.
"""

from __future__ import annotations

import logging
import sqlite3
import struct
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lltm_ray.routing.ledger import store
from lltm_ray.routing.ledger.batch import Batch
from lltm_ray.routing.ledger.entry import Attempt, Drift, LedgerEntry, Outcome, Sums, entry_of, find_drift
from lltm_ray.routing.ledger.progress import NO_CELL, Cell, Lost, Mark, Progress, count_active, take_over

__all__ = ["Attempt", "Drift", "Ledger", "LedgerEntry", "Outcome", "Sums", "find_drift"]

_log = logging.getLogger(__name__)
_NUMBERS = {str(outcome): number for number, outcome in enumerate(Outcome)}
_TOGETHER, _JOINED = 32, 256
"""Requests of a batch that the request path makes, and batches that are written at once."""
_PRUNINGS = 20
"""How often the oldest are forgotten while as many come as are kept."""
_FAILED = _NUMBERS[Outcome.FAILED]
_NO_NUMBER = "request %s has a number that no cell holds: %s"
_BAD_VALUE = (
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    ValueError,
    OverflowError,
)


class Ledger:
    """One process's way into the ledger of its node. `begin` and `finish` are for one thread, the rest for any."""

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "gateway",
        keep_requests: int = 100_000,
        flush_s: float = 1.0,
        max_pending: int = 10_000,
        cells: int = 256,
    ) -> None:
        """Open or make the ledger, take over what dead processes of this node left, start the writer.

        A file that cannot be written never stops requests: they are counted as `dropped`, and the reason is logged.

        Args:
            path: the SQLite file. Several processes of one node share it; folder 0700, file 0600.
            name: of this process, for people who look at the folder.
            keep_requests: older ones are forgotten, up to a twentieth later; the sums of servers are not.
            flush_s: the writer's pause between batches.
            max_pending: finished requests that wait to be written; beyond it new ones are dropped and counted.
            cells: room for requests in flight to begin with.
        """
        self.path = Path(path)
        self._keep, self._flush_s, self._max_pending = keep_requests, flush_s, max_pending
        self._fresh, self._batches = deque[LedgerEntry](), deque[Batch]()
        self._lock = threading.RLock()
        self._finished = self._settled = 0
        self._since_pruned = keep_requests
        self._counts = dict.fromkeys(("written", "dropped", "unbalanced", "recovered", "write_errors", "in_flight"), 0)
        self._bare = 0
        self._at_rest: dict[tuple[str, int], tuple[float, float]] = {}
        self._foreign: dict[tuple[str, int], Drift] = {}
        self._is_failing = self._is_dropping = False
        self._closing, self._asked, self._turn = threading.Event(), threading.Event(), threading.Condition()
        self._begun = self._ended = 0
        self._make_folder()
        self._recover()
        self._progress = Progress(self.path.parent, f"{self.path.stem}-{name}", cells=cells)
        self._thread = threading.Thread(target=self._write_until_closed, name="ledger", daemon=True)
        self._thread.start()

    @property
    def counters(self) -> dict[str, int]:
        """`pending`, `written`, `dropped`, `unbalanced`, `recovered`, `write_errors`, `in_flight`, `unprotected`."""
        pending = self._finished - self._settled
        return self._counts | {"pending": pending, "unprotected": self._progress.unprotected}

    def begin(self, entry: LedgerEntry, attempt: Attempt) -> Cell:
        """An attempt starts: note it in the entry, and in its cell. Never blocks, never raises."""
        before = entry.attempts
        mark = Mark(
            entry.request_id, attempt.engine, entry.model, entry.tenant, entry.route, entry.arrived_unix_nano,
            attempt.started_unix_nano, attempt.server_pid, attempt.slot,
        )  # fmt: skip
        try:
            if not before:
                self._counts["in_flight"] += 1
                entry.cell = self._progress.claim(mark)
                self._bare += entry.cell is NO_CELL
            elif entry.cell is not NO_CELL:
                entry.cell.next_attempt(mark, before[-1].engine, before[-1].server_pid, _delivered(before))
        except struct.error as error:
            _log.warning(_NO_NUMBER, entry.request_id, error)
        before.append(attempt)
        return entry.cell

    def finish(self, entry: LedgerEntry) -> None:
        """The request has ended, and the entry is whole; leave it alone now. Never waits for the disk, never raises."""
        cell = entry.cell
        if entry.attempts:
            self._counts["in_flight"] -= 1
            self._bare -= cell is NO_CELL
        if self._finished - self._settled >= self._max_pending:
            self._drop(cell, "the writer cannot keep up")
            return
        if cell is not NO_CELL:
            last = entry.attempts[-1]
            number = _NUMBERS.get(last.outcome, _FAILED)
            counts = (last.generated_tokens, last.computed_tokens, last.cached_tokens, number, last.is_estimate)
            try:
                cell.done(counts, _delivered(entry.attempts), entry.status)
            except struct.error as error:
                _log.warning(_NO_NUMBER, entry.request_id, error)
        self._finished += 1
        self._fresh.append(entry)
        if len(self._fresh) >= _TOGETHER:
            self._pack()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until all that is finished now is on disk; False when it took too long or cannot be written."""
        with self._turn:
            wanted = self._begun + 1  # a turn under way may have begun before our last entry
            self._asked.set()
            self._turn.wait_for(lambda: self._ended >= wanted or not self._thread.is_alive(), timeout_s)
            return self._ended >= wanted and not self._is_failing

    def close(self) -> None:
        """Write what is finished, end the thread. Cells of requests in flight stay for the next process."""
        self._closing.set()
        self._asked.set()
        self._thread.join(10.0)
        self._progress.close()

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """All that is known of a request (the latest one of that id), or None. Blocks for milliseconds."""
        self.flush()
        with store.reading(self.path) as db:
            found = store.read_requests(db, "request_id = ?", (request_id,), 1)
        return found[0] if found else None

    def find(self, *, limit: int = 20, tenant: str = "") -> list[dict[str, Any]]:
        """The latest requests, of one tenant or of all. Blocks for milliseconds."""
        self.flush()
        with store.reading(self.path) as db:
            return store.read_requests(db, "? IN ('', tenant)", (tenant,), limit)

    def sums(self, engine: str, server_pid: int) -> Sums:
        """All finished attempts on one server, by every process of this node. Blocks for milliseconds."""
        self.flush()
        with store.reading(self.path) as db:
            return store.read_sums(db, engine, server_pid)

    def reconcile(
        self,
        server: tuple[str, int],
        prompt_tokens_total: float,
        tokens_predicted_total: float,
        *,
        busy: int = 0,
        asked_unix_nano: int = 0,
    ) -> Drift | None:
        """Compare a server's counters with what we account for. Blocks for milliseconds.

        Args:
            server: engine and server_pid.
            prompt_tokens_total: the server's counter of computed prompt tokens.
            tokens_predicted_total: its counter of generated tokens.
            busy: its requests processing and deferred, of the same scrape.
            asked_unix_nano: when the scrape was sent; 0: now.

        Returns:
            None while something runs there, or ended after the scrape was sent: nothing can be said then. Attempts that
            were cut off get their exact counts once two scrapes in a row saw the same counters at rest; not those that
            had been there before them, of calls that did not come this way.
        """
        asked = asked_unix_nano or time.time_ns()
        before = self._at_rest.pop(server, None)
        self.flush()
        # Cells first: a request that leaves its cell meanwhile is in the sums, and ended after the scrape.
        if busy or self._bare or count_active(self.path.parent, server[0]):
            return None
        counters = (prompt_tokens_total, tokens_predicted_total)
        with store.reading(self.path) as db:
            sums = store.read_sums(db, *server)
            if sums.last_end_unix_nano > asked:
                return None
            self._at_rest[server] = counters
            if sums.estimates:
                return self._shared_out(db, server, sums, counters, is_at_rest=before == counters)
            self._foreign[server] = find_drift(sums, *counters)
            return self._foreign[server]

    def _shared_out(
        self,
        db: sqlite3.Connection,
        server: tuple[str, int],
        sums: Sums,
        counters: tuple[float, float],
        *,
        is_at_rest: bool,
    ) -> Drift:
        """What attempts that were cut off cannot have made, now that they are given the rest if that is certain."""
        foreign = self._foreign.get(server, Drift())
        own = counters[0] - foreign.prompt_tokens, counters[1] - foreign.generated_tokens
        drift = find_drift(sums, *own)
        is_certain = is_at_rest and not (drift.prompt_tokens or drift.generated_tokens)
        return foreign if is_certain and _settle(db, server, sums, own) else foreign + drift

    def forget_servers(self, here: Collection[str]) -> None:
        """Only these engines are there; what was noted of others for `reconcile` goes."""
        self._at_rest = {server: seen for server, seen in self._at_rest.items() if server[0] in here}
        self._foreign = {server: seen for server, seen in self._foreign.items() if server[0] in here}

    def _make_folder(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            _log.warning("the ledger's folder cannot be made: %s", error)

    def _recover(self) -> None:
        """Write what dead processes had not; their files stay for another time if that fails."""
        try:
            with take_over(self.path.parent) as lost:
                if lost:
                    self._write_lost(lost)
        except (sqlite3.Error, OSError, OverflowError) as error:
            self._failed(error)

    def _write_lost(self, lost: Sequence[Lost]) -> None:
        with store.reading(self.path) as db:
            known = store.known_since(db, min(each.mark.arrived_unix_nano for each in lost))
            entries = [entry_of(each) for each in lost]
            fresh = [each for each in entries if (each.request_id, each.arrived_unix_nano) not in known]
            if fresh:
                self._write(db, Batch(fresh))
        self._counts["recovered"] += len(fresh)
        if fresh:
            _log.warning("%d requests of a gateway that died are now in the ledger", len(fresh))

    def _write_until_closed(self) -> None:
        db: sqlite3.Connection | None = None
        is_last = False
        while not is_last:
            self._asked.wait(self._flush_s)
            with self._turn:
                self._begun += 1
                self._asked.clear()
                is_last = self._closing.is_set()
            try:
                if self._finished > self._settled:
                    db = db or store.connect(self.path)
                    self._write_pending(db)
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
            with self._turn:
                self._ended = self._begun
                self._turn.notify_all()
        if db is not None:
            db.close()

    def _pack(self) -> None:
        """Make a batch of all that is fresh; on the request path, and in the writer before it writes.

        The lock can be taken twice: while rows are made the garbage collector may end an abandoned request, here.
        """
        unfit: list[tuple[Cell, str]] = []
        with self._lock:
            batch = Batch()
            while self._fresh:
                entry = self._fresh.popleft()
                try:
                    batch.add(entry)
                except Exception as error:  # noqa: BLE001 - pickle raises whatever a value's own code does
                    unfit.append((entry.cell, f"a value cannot be kept: {error}"))
            if batch:
                self._batches.append(batch)
            self._settled += len(unfit)
        for cell, why in unfit:
            self._drop(cell, why)

    def _write_pending(self, db: sqlite3.Connection) -> None:
        """What has ended so far, and not what ends meanwhile: on a busy machine there would be no end."""
        self._pack()
        for _ in range(-(-len(self._batches) // _JOINED)):
            batch = self._join()
            try:
                self._write(db, batch)
            except _BAD_VALUE as error:
                _log.warning("a request cannot be written: %s", error)
                self._write_singly(db)
            else:
                self._forget(batch)
        if self._since_pruned >= self._keep // _PRUNINGS:
            store.prune(db, self._keep)
            self._since_pruned = 0
        self._is_failing = self._is_dropping = False

    def _join(self) -> Batch:
        """Make one of the batches that wait; it stays the first of them until it is written."""
        count = min(len(self._batches), _JOINED)
        if count > 1:
            self._batches.appendleft(Batch.joined([self._batches.popleft() for _ in range(count)]))
        return self._batches[0]

    def _write(self, db: sqlite3.Connection, batch: Batch) -> None:
        store.write(db, batch)
        self._counts["written"] += len(batch)
        self._since_pruned += len(batch)
        unbalanced = batch.unbalanced
        if unbalanced:
            self._counts["unbalanced"] += len(unbalanced)
            _log.error("tokens of request %s do not add up over its attempts", unbalanced[0])

    def _write_singly(self, db: sqlite3.Connection) -> None:
        """After a value that SQLite refuses: keep the others, each once, also when the disk refuses in between."""
        alone = [*self._batches.popleft().singly()]
        self._batches.extendleft(reversed(alone))
        for batch in alone:
            try:
                self._write(db, batch)
            except _BAD_VALUE:
                with self._lock:
                    self._counts["dropped"] += 1
            self._forget(batch)

    def _forget(self, batch: Batch) -> None:
        """The first batch needs nothing more."""
        self._batches.popleft()
        with self._lock:
            self._settled += len(batch)
        for cell in batch.cells:
            cell.free()

    def _drop(self, cell: Cell, why: str) -> None:
        """Lose a request."""
        with self._lock:
            self._counts["dropped"] += 1
        cell.free()
        if not self._is_dropping:
            self._is_dropping = True
            _log.warning("requests are missing from the ledger: %s", why)

    def _failed(self, error: Exception) -> None:
        self._counts["write_errors"] += 1
        if not self._is_failing:
            self._is_failing = True
            _log.warning("the ledger %s cannot be written, it is tried again: %s", self.path, error)


def _settle(db: sqlite3.Connection, server: tuple[str, int], sums: Sums, counters: tuple[float, float]) -> bool:
    computed = max(round(counters[0]) - sums.computed_tokens, sums.estimated_computed_tokens)
    generated = max(round(counters[1]) - sums.generated_tokens, sums.estimated_generated_tokens)
    return store.settle(db, server, sums, computed, generated)


def _delivered(attempts: Sequence[Attempt]) -> int:
    return sum([attempt.delivered_tokens for attempt in attempts])
