"""The ledger's file: SQLite in WAL mode, one row a request, one row of sums a server. For `ledger` only.

There is no index on the request's id: ids that clients choose are random, and such an index costs 7 us a request, as
much as all other writing, while reading through 100,000 rows takes a person who asks some tens of milliseconds. The
engines that were considered are pickled, because JSON would cost as much again. Sums only grow: pruning leaves them.
"""

from __future__ import annotations

import io
import pickle
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lltm_ray.routing.ledger.batch import ATTEMPT_COLUMNS, REQUEST_COLUMNS, Batch
from lltm_ray.routing.ledger.entry import ATTEMPT_FIELDS, SUM_FIELDS, Attempt, Sums

BUSY_S = 5.0
"""How long one process waits for another of its node that is writing."""
_KEY = "engine, server_pid"
_ADDED = ", ".join(f"{name} = {name} + excluded.{name}" for name in SUM_FIELDS if name != "last_end_unix_nano")
_ROWS = (1, 8, 64, 512, 2048)
"""Of one statement; SQLite needs 9 us a row to make such a statement ready, once, and 2 to run it."""
_SUMMED = {
    "attempts": "count(*)",
    "cached_tokens": "sum(cached_tokens)",
    "computed_tokens": "sum((NOT is_estimate) * computed_tokens)",
    "generated_tokens": "sum((NOT is_estimate) * generated_tokens)",
    "delivered_tokens": "sum(attempts.delivered_tokens)",
    "estimates": "sum(is_estimate)",
    "estimated_computed_tokens": "sum(is_estimate * computed_tokens)",
    "estimated_generated_tokens": "sum(is_estimate * max(generated_tokens, attempts.delivered_tokens))",
    "last_end_unix_nano": "max(arrived_unix_nano + CAST(total_s * 1e9 AS INTEGER))",
}
_ADD_SUMS = (
    f"INSERT INTO sums ({_KEY}, {', '.join(_SUMMED)}) SELECT {_KEY}, {', '.join(_SUMMED.values())} "  # noqa: S608
    f"FROM attempts JOIN requests USING (seq) WHERE seq > (SELECT max(seq) FROM requests) - ? GROUP BY {_KEY} "
    f"ON CONFLICT ({_KEY}) DO UPDATE SET {_ADDED}, "
    "last_end_unix_nano = max(last_end_unix_nano, excluded.last_end_unix_nano)"
)
Row = tuple[Any, ...]
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS requests (seq INTEGER PRIMARY KEY, {", ".join(REQUEST_COLUMNS)});
CREATE TABLE IF NOT EXISTS attempts (seq INTEGER, number INTEGER, {", ".join(ATTEMPT_FIELDS)},
    PRIMARY KEY (seq, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sums ({_KEY}, {", ".join(f"{name} INTEGER NOT NULL" for name in SUM_FIELDS)},
    PRIMARY KEY ({_KEY})) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


def connect(path: Path) -> sqlite3.Connection:
    """Open the file, made with its tables if missing; transactions are ours to begin.

    Raises:
        sqlite3.Error: it is no database, or cannot be opened.
    """
    path.touch(mode=0o600)
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            db.executescript(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


def write(db: sqlite3.Connection, batch: Batch) -> None:
    """Add requests and what they add to the sums, all or nothing.

    Raises:
        OverflowError: together they have more tokens than SQLite can count.
        sqlite3.Error: a value that it does not take, or the disk.
    """
    attempts = batch.attempts.copy()
    attempts[:: len(ATTEMPT_COLUMNS)] = [place - len(batch) for place in attempts[:: len(ATTEMPT_COLUMNS)]]
    try:
        with _transaction(db):
            _insert(db, "requests", REQUEST_COLUMNS, batch.requests)
            _insert(db, "attempts", ("seq", *ATTEMPT_COLUMNS[1:]), attempts)
            db.execute(_ADD_SUMS, (len(batch),))
    except sqlite3.OperationalError as error:
        if str(error) == "integer overflow":
            raise OverflowError("more tokens than fit 64 bits") from error
        raise


def _insert(db: sqlite3.Connection, table: str, columns: tuple[str, ...], values: list[Any]) -> None:
    limit = db.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // len(columns)
    most = max(size for size in _ROWS if size <= limit)
    for start in range(0, len(values), most * len(columns)):
        part = values[start : start + most * len(columns)]
        rows = min(size for size in _ROWS if size * len(columns) >= len(part))
        db.execute(_inserting(table, columns, rows), part + [None] * (rows * len(columns) - len(part)))


@cache
def _inserting(table: str, columns: tuple[str, ...], rows: int) -> str:
    """A statement for so many rows at most: those that begin with NULL are left out, so that a few sizes do."""
    row = f"(?{', ?' * (len(columns) - 1)})"
    first = "column1 + 1 + (SELECT max(seq) FROM requests)" if columns[0] == "seq" else "column1"
    others = "".join(f", column{number}" for number in range(2, len(columns) + 1))
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {first}{others} "  # noqa: S608 - our names
        f"FROM (VALUES {row}{f', {row}' * (rows - 1)}) WHERE column1 IS NOT NULL"
    )


def prune(db: sqlite3.Connection, keep_requests: int) -> None:
    """Forget the oldest requests."""
    with _transaction(db):
        for table in ("requests", "attempts"):
            db.execute(f"DELETE FROM {table} WHERE seq <= (SELECT max(seq) FROM requests) - ?", (keep_requests,))  # noqa: S608


def read_sums(db: sqlite3.Connection, engine: str, server_pid: int) -> Sums:
    """Sums of one server; all zero when nothing ever ran there."""
    query = f"SELECT {', '.join(SUM_FIELDS)} FROM sums WHERE engine = ? AND server_pid = ?"  # noqa: S608
    row = db.execute(query, (engine, server_pid)).fetchone()
    return Sums() if row is None else Sums(**dict(zip(SUM_FIELDS, row, strict=True)))


def settle(db: sqlite3.Connection, key: tuple[str, int], seen: Sums, computed: int, generated: int) -> bool:
    """Give the attempts that were cut off what the server counted for them; False if another attempt came meanwhile.

    One alone learns its exact counts. Of several only the sum is known, and they stay marked as estimates.
    """
    with _transaction(db):
        now = read_sums(db, *key)
        if now != seen:
            return False
        db.execute(
            "UPDATE sums SET computed_tokens = computed_tokens + ?, generated_tokens = generated_tokens + ?, "
            "estimates = 0, estimated_computed_tokens = 0, estimated_generated_tokens = 0 "
            "WHERE engine = ? AND server_pid = ?",
            (computed, generated, *key),
        )
        if seen.estimates == 1:
            db.execute(
                "UPDATE attempts SET computed_tokens = ?, generated_tokens = ?, is_estimate = 0 WHERE (seq, number) = "
                "(SELECT seq, number FROM attempts WHERE is_estimate AND engine = ? AND server_pid = ? "
                "ORDER BY seq DESC, number DESC LIMIT 1)",
                (computed, generated, *key),
            )
    return True


def read_requests(db: sqlite3.Connection, where: str, values: Iterable[Any], limit: int) -> list[dict[str, Any]]:
    """Requests as `Ledger.explain` gives them, the latest first; `where` is SQL of ours."""
    query = f"SELECT seq, {', '.join(REQUEST_COLUMNS)} FROM requests WHERE {where} ORDER BY seq DESC LIMIT ?"  # noqa: S608
    return [_shown(db, *row) for row in db.execute(query, (*values, limit)).fetchall()]


def known_since(db: sqlite3.Connection, arrived_unix_nano: int) -> set[tuple[str, int]]:
    """Id and arrival of all requests that came at or after a time."""
    return set(
        db.execute(
            "SELECT request_id, arrived_unix_nano FROM requests WHERE arrived_unix_nano >= ?", (arrived_unix_nano,)
        )
    )


def _shown(db: sqlite3.Connection, seq: int, *row: Any) -> dict[str, Any]:
    values = dict(zip(REQUEST_COLUMNS, row, strict=True))
    values["is_balanced"] = bool(values["is_balanced"])
    values["is_exact"] = None if values["is_exact"] is None else bool(values["is_exact"])
    raw = values.pop("considered")
    considered = _PlainData(io.BytesIO(raw)).load() if raw else []
    query = f"SELECT {', '.join(ATTEMPT_FIELDS)} FROM attempts WHERE seq = ? ORDER BY number"  # noqa: S608
    attempts = [_shown_attempt(each) for each in db.execute(query, (seq,))]
    counted = {name: sum(each[name] for each in attempts) for name in ("generated_tokens", "wasted_tokens")}
    return values | counted | {"considered": list(considered), "attempts": attempts}


def _shown_attempt(row: Row) -> dict[str, Any]:
    values = dict(zip(ATTEMPT_FIELDS, row, strict=True))
    values["is_estimate"] = bool(values["is_estimate"])
    return values | {"wasted_tokens": Attempt(**values).wasted_tokens}


class _PlainData(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; a class in the file is refused, so the file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse."""
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one question."""
    with closing(connect(path)) as db:
        yield db
