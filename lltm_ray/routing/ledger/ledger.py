"""The durable account of tokens per request and attempt.

The request path appends to a deque; one thread writes batches to SQLite. What a request in flight has got is in a cell
of `progress`, which is freed only when the request's row is on disk: whenever the process is killed, each request that
had begun is in the file, or in a cell that the next process reads.
"""

from __future__ import annotations

import logging
import pickle
import sqlite3
import struct
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lltm_ray.routing.ledger import store
from lltm_ray.routing.ledger.entry import Attempt, Drift, LedgerEntry, Outcome, Sums, find_drift
from lltm_ray.routing.ledger.progress import NO_CELL, Cell, Lost, Mark, Progress, count_active, take_over

__all__ = ["Attempt", "Drift", "Ledger", "LedgerEntry", "Outcome", "Sums", "find_drift"]

_log = logging.getLogger(__name__)
_OUTCOMES = tuple(Outcome)
_NUMBERS = {str(outcome): number for number, outcome in enumerate(_OUTCOMES)}
_BATCH = 2_000
_FAILED = _NUMBERS[Outcome.FAILED]
_NO_NUMBER = "request %s has a number that no cell holds: %s"
_BAD_VALUE = (
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
    TypeError,
    ValueError,
    OverflowError,
    pickle.PicklingError,
)


class Ledger:
    """One process's way into the ledger of its node. `begin` and `finish` are for one thread, the rest for any."""

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "gateway",
        keep_requests: int = 100_000,
        flush_s: float = 0.25,
        max_pending: int = 10_000,
        cells: int = 256,
    ) -> None:
        """Open or make the ledger, take over what dead processes of this node left, start the writer.

        A file that cannot be written never stops requests: they are counted as `dropped`, and the reason is logged.

        Args:
            path: the SQLite file. Several processes of one node share it; folder 0700, file 0600.
            name: of this process, for people who look at the folder.
            keep_requests: older ones are forgotten; the sums of servers are not.
            flush_s: the writer's pause between batches.
            max_pending: finished requests that wait to be written; beyond it new ones are dropped and counted.
            cells: room for requests in flight to begin with.
        """
        self.path = Path(path)
        self._keep, self._flush_s, self._max_pending = keep_requests, flush_s, max_pending
        self._pending: deque[LedgerEntry] = deque()
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
        return self._counts | {"pending": len(self._pending), "unprotected": self._progress.unprotected}

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
        """The request has ended, and the entry is whole; do not touch it afterwards. Never blocks, never raises."""
        cell = entry.cell
        if entry.attempts:
            self._counts["in_flight"] -= 1
            self._bare -= cell is NO_CELL
        if len(self._pending) >= self._max_pending:
            self._drop(entry, "the writer cannot keep up")
            return
        if cell is not NO_CELL:
            last = entry.attempts[-1]
            number = _NUMBERS.get(last.outcome, _FAILED)
            counts = (last.generated_tokens, last.computed_tokens, last.cached_tokens, number, last.is_estimate)
            try:
                cell.done(counts, _delivered(entry.attempts), entry.status)
            except struct.error as error:
                _log.warning(_NO_NUMBER, entry.request_id, error)
        self._pending.append(entry)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until all that is finished now is on disk; False when it took too long or cannot be written."""
        with self._turn:
            wanted = self._begun + 1  # a turn under way may have begun before our last entry
            self._asked.set()
            ended = self._turn.wait_for(lambda: self._ended >= wanted or not self._thread.is_alive(), timeout_s)
        return ended and not self._is_failing

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
        except (sqlite3.Error, OSError) as error:
            self._failed(error)

    def _write_lost(self, lost: Sequence[Lost]) -> None:
        with store.reading(self.path) as db:
            known = store.known_since(db, min(each.mark.arrived_unix_nano for each in lost))
            entries = [entry_of(each) for each in lost]
            fresh = [each for each in entries if (each.request_id, each.arrived_unix_nano) not in known]
            self._write(db, fresh)
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
                if self._pending:
                    db = db or store.connect(self.path)
                    self._write_pending(db)
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
            with self._turn:
                self._ended = self._begun
                self._turn.notify_all()
        if db is not None:
            db.close()

    def _write_pending(self, db: sqlite3.Connection) -> None:
        while self._pending:
            batch = [self._pending[position] for position in range(min(len(self._pending), _BATCH))]
            try:
                self._write(db, batch)
            except _BAD_VALUE as error:
                _log.warning("a request cannot be written: %s", error)
                self._write_singly(db, batch)
            else:
                self._forget(batch)
        store.prune(db, self._keep)
        self._is_failing = self._is_dropping = False

    def _write(self, db: sqlite3.Connection, entries: Sequence[LedgerEntry]) -> None:
        sums: dict[tuple[str, int], Sums] = {}
        for entry in entries:
            ended = entry.ended_unix_nano
            for attempt in entry.attempts:
                key = (attempt.engine, attempt.server_pid)
                if key not in sums:
                    sums[key] = Sums()
                sums[key].add(attempt, ended)
        store.write(db, entries, sums)
        self._counts["written"] += len(entries)
        unbalanced = [entry.request_id for entry in entries if not entry.is_balanced]
        if unbalanced:
            self._counts["unbalanced"] += len(unbalanced)
            _log.error("tokens of request %s do not add up over its attempts", unbalanced[0])

    def _write_singly(self, db: sqlite3.Connection, batch: Sequence[LedgerEntry]) -> None:
        """After a value that SQLite refuses: keep the others, each once, also when the disk refuses in between."""
        for entry in batch:
            try:
                self._write(db, [entry])
            except _BAD_VALUE:
                self._counts["dropped"] += 1
            self._forget([entry])

    def _forget(self, written: Sequence[LedgerEntry]) -> None:
        for entry in written:
            self._pending.popleft()
            entry.cell.free()

    def _drop(self, entry: LedgerEntry, why: str) -> None:
        self._counts["dropped"] += 1
        entry.cell.free()
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


def entry_of(lost: Lost) -> LedgerEntry:
    """The account of a request whose gateway died, from its cell."""
    mark = lost.mark
    outcome = _OUTCOMES[lost.outcome] if lost.is_done and lost.outcome < len(_OUTCOMES) else Outcome.GATEWAY_LOST
    last = Attempt(
        engine=mark.engine,
        server_pid=mark.server_pid,
        slot=mark.slot,
        started_unix_nano=mark.started_unix_nano,
        cached_tokens=lost.cached_tokens,
        computed_tokens=lost.computed_tokens,
        generated_tokens=max(lost.generated_tokens, lost.delivered_tokens),
        delivered_tokens=lost.delivered_tokens,
        outcome=outcome,
        is_estimate=lost.is_estimate or not lost.is_done,
    )
    earlier = [_earlier(lost)] if lost.number > 1 else []
    return LedgerEntry(
        request_id=mark.request_id,
        tenant=mark.tenant,
        model=mark.model,
        route=mark.route,
        arrived_unix_nano=mark.arrived_unix_nano,
        status=lost.status,
        error="" if lost.is_done else "the gateway process died",
        delivered_tokens=lost.delivered_before + lost.delivered_tokens,
        attempts=[*earlier, last],
    )


def _earlier(lost: Lost) -> Attempt:
    """All attempts before the last one in one: a cell has no room for more."""
    return Attempt(
        engine=lost.previous_engine,
        server_pid=lost.previous_pid,
        generated_tokens=lost.delivered_before,
        delivered_tokens=lost.delivered_before,
        outcome=Outcome.CONTINUED if lost.delivered_before else Outcome.RETRIED,
        is_estimate=True,
    )


def _delivered(attempts: Sequence[Attempt]) -> int:
    return sum([attempt.delivered_tokens for attempt in attempts])
