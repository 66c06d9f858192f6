"""Tokens delivered so far, where a `kill -9` of the gateway cannot take them: cells of a file mapped into memory.

`cell.delivered(n)` is one store of eight bytes, no system call. The pages belong to the kernel, so they outlive the
process; a power cut they do not. Each process has a file of its own and holds a lock on it, which the kernel lets go
when the process dies: a file that can be locked is a dead process's, and `take_over` reads what its requests had got.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import struct
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)

MAX_CELLS = 65_536
SUFFIX = ".cells"
_MAGIC = b"lltmcell\x01\x00\x00\x00\x00\x00\x00\x00"
_HEADER_BYTES = 64
FREE, RUNNING, DONE = 0, 1, 2

# Field by field in the order of the file; a torn write can only tear what its state does not vouch for yet.
_WHOLE = struct.Struct("<IIQQqqqii QQQII 64s64s64s96s32s32sq")
_CELL_BYTES = 448
_STATE = struct.Struct("<I").pack_into
_TOTAL = struct.Struct("<Q").pack_into
_COUNTS = struct.Struct("<QQQII").pack_into
_STATUS = struct.Struct("<i").pack_into
_MOVE = struct.Struct("<I").pack_into
_STATE_AT, _NUMBER_AT, _TOTAL_AT, _BASE_AT, _ARRIVED_AT, _STATUS_AT, _COUNTS_AT = 0, 4, 8, 16, 24, 52, 56
_ATTEMPT = struct.Struct("<qqi").pack_into
_STARTED_AT = 32
_NAMES = struct.Struct("<64s64s").pack_into
_NAMES_AT = 88 + 64
_PREVIOUS_PID = struct.Struct("<q").pack_into
_PREVIOUS_PID_AT = 440


class Mark(NamedTuple):
    """What a cell says of a request when it starts."""

    request_id: str
    engine: str
    model: str = ""
    tenant: str = ""
    route: str = ""
    arrived_unix_nano: int = 0
    started_unix_nano: int = 0
    server_pid: int = 0
    slot: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What a dead process's cell says of a request. Strings are cut to the cell's fields (64 bytes, model 96)."""

    mark: Mark
    is_done: bool
    """The request had ended, but the ledger had not yet written it."""
    number: int
    """Of the attempt that ran, from 1."""
    delivered_before: int
    """By the attempts before it."""
    delivered_tokens: int
    """By this attempt."""
    previous_engine: str = ""
    previous_pid: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    outcome: int = 0
    is_estimate: bool = False
    status: int = 0


class Cell:
    """One request's place in the file; the process that claimed it writes, nobody else."""

    __slots__ = ("_at", "_base", "_map", "_owner", "_total_at", "number")

    def __init__(self, owner: Progress | None, mapped: mmap.mmap | bytearray, at: int) -> None:
        self._owner = owner
        self._map = mapped
        self._at = at
        self._total_at = at + _TOTAL_AT
        self._base = 0
        self.number = 1

    def __bool__(self) -> bool:
        return self._owner is not None

    def delivered(self, tokens: int) -> None:
        """Note that this attempt has delivered so many tokens so far."""
        _TOTAL(self._map, self._total_at, self._base + tokens)

    def next_attempt(self, mark: Mark, previous_engine: str, previous_pid: int, delivered_before: int) -> None:
        """The request goes on elsewhere, after its earlier attempts delivered so many tokens."""
        mapped, at = self._map, self._at
        self._base = delivered_before
        self.number += 1
        _TOTAL(mapped, at + _TOTAL_AT, delivered_before)
        _TOTAL(mapped, at + _BASE_AT, delivered_before)
        _MOVE(mapped, at + _NUMBER_AT, self.number)
        _ATTEMPT(mapped, at + _STARTED_AT, mark.started_unix_nano, mark.server_pid, mark.slot)
        _NAMES(mapped, at + _NAMES_AT, _text(mark.engine), _text(previous_engine))
        _PREVIOUS_PID(mapped, at + _PREVIOUS_PID_AT, previous_pid)

    def done(self, counts: tuple[int, int, int, int, bool], delivered_total: int, status: int) -> None:
        """The request has ended: generated, computed, cached tokens, outcome's number, whether they are estimates."""
        mapped, at = self._map, self._at
        _COUNTS(mapped, at + _COUNTS_AT, *counts)
        _STATUS(mapped, at + _STATUS_AT, status)
        _TOTAL(mapped, at + _TOTAL_AT, delivered_total)
        _STATE(mapped, at + _STATE_AT, DONE)

    def free(self) -> None:
        """Give the place back; only after the request's account is safe elsewhere."""
        if self._owner is not None:
            owner, at = self._owner, self._at
            _STATE(self._map, at + _STATE_AT, FREE)
            self._owner, self._map, self._at, self._total_at = None, _NOWHERE, 0, _TOTAL_AT
            owner.give_back(at)  # last: from here on the place is another request's


_NOWHERE = bytearray(_CELL_BYTES)
NO_CELL = Cell(None, _NOWHERE, 0)
"""For requests without protection: takes what it is told, keeps nothing."""


class Progress:
    """This process's file of cells. All methods but `close` are for one thread; `Cell.free` may come from another."""

    def __init__(self, folder: Path, name: str, *, cells: int = 256) -> None:
        """Make the file; on a full or read-only disk there is none, and requests go without protection.

        Args:
            folder: where the ledger is; made if missing.
            name: of this gateway, for people who look at the folder.
            cells: to begin with; doubled when they run out, up to `MAX_CELLS`.
        """
        self.unprotected = 0
        self._free: deque[int] = deque()
        self._count = 0
        self._cells = cells
        self._fd, self._path = -1, Path()
        self._map: mmap.mmap | None = None
        try:
            self._create(folder, name)
        except OSError as error:
            _log.warning("requests in flight are not protected against a crash: %s", error)

    def claim(self, mark: Mark) -> Cell:
        """A cell for a request that starts; `NO_CELL` (counted) when there is none left."""
        if not self._free and not self._grow():
            self.unprotected += 1
            return NO_CELL
        at, mapped = self._free.popleft(), self._map
        assert mapped is not None  # noqa: S101 - free places exist only in a map
        try:
            _WHOLE.pack_into(mapped, at, FREE, 1, 0, 0, *_fields(mark))
        except struct.error as error:
            _log.warning("request %s is not protected: %s", mark.request_id, error)
            self.unprotected += 1
            self._free.append(at)
            return NO_CELL
        _STATE(mapped, at, RUNNING)
        return Cell(self, mapped, at)

    def give_back(self, at: int) -> None:
        """Called by `Cell.free`."""
        self._free.append(at)

    def close(self) -> None:
        """Remove the file if no request is in it; else it stays, for the next process to read."""
        if self._map is None:
            return
        if len(self._free) == self._count:
            self._path.unlink(missing_ok=True)
        self._free.clear()
        self._map = None  # not closed: requests that are being cancelled may still store into it
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # the map holds a copy of the descriptor, and with it the lock
        os.close(self._fd)

    def _create(self, folder: Path, name: str) -> None:
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
        self._fd, new = tempfile.mkstemp(prefix=f"{safe}-{os.getpid()}-", suffix=".new", dir=folder)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._fd, 0, _HEADER_BYTES)
            os.pwrite(self._fd, _MAGIC, 0)
            self._map = mmap.mmap(self._fd, _HEADER_BYTES)
            self._path = Path(new).with_suffix(SUFFIX)
            Path(new).rename(self._path)  # under its name only once it is locked: others take unlocked ones over
        except OSError:
            Path(new).unlink(missing_ok=True)
            os.close(self._fd)
            self._map = None
            raise
        self._grow()

    def _grow(self) -> bool:
        fresh = min(self._count or self._cells, MAX_CELLS - self._count)
        if self._map is None or fresh <= 0:
            return False
        start, size = self._count, _HEADER_BYTES + (self._count + fresh) * _CELL_BYTES
        try:
            os.posix_fallocate(self._fd, 0, size)  # a store into a page that the disk has no room for kills the process
            self._map.resize(size)
        except (OSError, ValueError, SystemError) as error:
            _log.warning("no more room to protect requests in flight: %s", error)
            return False
        self._count += fresh
        self._free.extend(_HEADER_BYTES + number * _CELL_BYTES for number in range(start, self._count))
        return True


@contextlib.contextmanager
def take_over(folder: Path) -> Iterator[list[Lost]]:
    """The requests of all dead processes of this folder; leaving the block without an error removes their files."""
    held: list[tuple[int, Path]] = []
    lost: list[Lost] = []
    try:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            fd = _lock_of_the_dead(path)
            if fd is not None:
                held.append((fd, path))
                lost += _read(fd)
        yield lost
        for _, path in held:
            path.unlink(missing_ok=True)
    finally:
        for fd, _ in held:
            os.close(fd)


def count_active(folder: Path, engine: str) -> int:
    """Requests that any process of this node has in flight on an engine, or has not yet written down."""
    wanted = _text(engine)[:64].ljust(64, b"\0")
    found = 0
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # ended in between, and left nothing
            raw = path.read_bytes()[_HEADER_BYTES:]
            for at in range(0, len(raw) - _CELL_BYTES + 1, _CELL_BYTES):
                if raw[at] != FREE and raw[at + _NAMES_AT : at + _NAMES_AT + 64] == wanted:
                    found += 1
    return found


def _lock_of_the_dead(path: Path) -> int | None:
    """The file, open and locked; None if its process lives or another one took it over."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None  # another process was faster
    if _is_ours(fd, path):
        return fd
    os.close(fd)
    return None


def _is_ours(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.stat().st_ino == os.fstat(fd).st_ino
    except BlockingIOError:
        return False  # its process lives
    except FileNotFoundError:
        return False  # another process has just taken it over


def _read(fd: int) -> list[Lost]:
    raw = os.pread(fd, os.fstat(fd).st_size, 0)
    if raw[: len(_MAGIC)] != _MAGIC:
        _log.warning("a file of requests in flight is of another version and cannot be read; it is dropped")
        return []
    ends = range(_HEADER_BYTES, len(raw) - _CELL_BYTES + 1, _CELL_BYTES)
    return [_lost(raw, at) for at in ends if raw[at] in (RUNNING, DONE)]


def _lost(raw: bytes, at: int) -> Lost:
    (state, number, total, base, arrived, started, pid, slot, status, generated, computed, cached, outcome, estimate,
     *names, previous_pid) = _WHOLE.unpack_from(raw, at)  # fmt: skip
    request_id, engine, previous, model, tenant, route = (
        name.rstrip(b"\0").decode("utf-8", "ignore") for name in names
    )
    mark = Mark(
        request_id=request_id, engine=engine, model=model, tenant=tenant, route=route, arrived_unix_nano=arrived,
        started_unix_nano=started, server_pid=pid, slot=slot,
    )  # fmt: skip
    base = min(base, total)
    return Lost(
        mark=mark, is_done=state == DONE, number=number, delivered_before=base, delivered_tokens=total - base,
        previous_engine=previous, previous_pid=previous_pid, generated_tokens=generated,
        computed_tokens=computed, cached_tokens=cached, outcome=outcome, is_estimate=bool(estimate), status=status,
    )  # fmt: skip


def _fields(mark: Mark) -> tuple[int | bytes, ...]:
    return (
        mark.arrived_unix_nano, mark.started_unix_nano, mark.server_pid, mark.slot, 0, 0, 0, 0, 0, 0,
        _text(mark.request_id), _text(mark.engine), b"", _text(mark.model), _text(mark.tenant),
        _text(mark.route), 0,
    )  # fmt: skip


def _text(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a client's JSON can hold half a surrogate pair
