"""The gateway's pen: writes a trace off the request path.

Block ids are salted hashes of every 64 bytes of a prompt's key. The salt is made anew for each recorder and written
nowhere, so that nobody can test what a prompt was.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Self

from lltm_ray.errors import ConfigError
from lltm_ray.routing.choice import Ask, Choice
from lltm_ray.routing.replay.simulated import BLOCK_BYTES
from lltm_ray.routing.replay.trace import HEADER, MOST, Arrival, Parents, write_line
from lltm_ray.routing.rows import Lease, Served

__all__ = ["KEY_BYTES", "TraceRecorder"]

_log = logging.getLogger(__name__)

KEY_BYTES = 64
"""Bytes of a prompt's key in one block, about 16 tokens of English."""


class _Note(NamedTuple):
    """What the request path leaves for the writer."""

    ask: Ask
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    engine: str
    predicted_tokens: int
    reply: bytes


class TraceRecorder:
    """Records requests into a file: `record` appends to a queue, one thread hashes and writes.

    The file begins anew each time and stops growing at `limit_bytes`. What is not written is counted as `dropped`.

    Args:
        path: of the file; made with mode 0600.
        clock: monotonic seconds, as in `arrived_s`.
        limit_bytes: of the file.
        max_pending_bytes: of keys that wait for the writer.
        flush_s: the writer's pause.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        limit_bytes: int = 2**30,
        max_pending_bytes: int = 16 * 2**20,
        flush_s: float = 0.25,
    ) -> None:
        self._salt = os.urandom(32)
        self._zero_s: float = clock()
        self._limit_bytes, self._max_pending_bytes, self._flush_s = limit_bytes, max_pending_bytes, flush_s
        self._pending: deque[_Note] = deque()
        self._taken_bytes = self._given_bytes = 0
        self._parents = Parents()
        self.written = self.dropped = self._unflushed = 0
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError("trace", str(path), f"cannot be written: {error.strerror}") from error
        self._file = os.fdopen(handle, "w", encoding="ascii")
        self._size_bytes = self._file.write(json.dumps(HEADER) + "\n")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def record_lease(self, lease: Lease, served: Served) -> None:
        """Note a request that an engine has answered; see `Router`."""
        told = served.timings
        prompt_tokens = told.cache_n + told.prompt_n
        if lease.choice is not None:
            self.record(
                lease.ask, lease.ask.arrived_s, prompt_tokens, told.predicted_n, lease.choice, reply=served.reply
            )

    def record(
        self,
        ask: Ask,
        arrived_s: float,
        prompt_tokens: int,
        output_tokens: int,
        choice: Choice | None,
        reply: bytes | None = None,
    ) -> None:
        """A request ended.

        Args:
            ask: as the router was asked.
            arrived_s: when it came, by the recorder's clock.
            prompt_tokens: of its prompt, cached ones included.
            output_tokens: generated.
            choice: where it went; None if it was refused.
            reply: what the reply adds to the key of the session's next turn, if that is known.
        """
        size = len(ask.key) + len(reply or b"")
        if self._given_bytes - self._taken_bytes + size > self._max_pending_bytes or self._closing.is_set():
            self.dropped += 1
            return
        self._given_bytes += size
        engine, predicted = ("", 0) if choice is None else (choice.engine, choice.cached_tokens)
        self._pending.append(_Note(ask, arrived_s, prompt_tokens, output_tokens, engine, predicted, reply or b""))

    def close(self) -> None:
        """Write what waits and close the file."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.wait(self._flush_s):
                self._write()
            self._write()
        except OSError as error:
            _log.warning("the trace ends here: %s", error)
            self._closing.set()
            self.dropped += self._unflushed + len(self._pending)
        finally:
            # what a full disk did not take is counted already; closing tries it again
            with suppress(OSError):
                self._file.close()

    def _write(self) -> None:
        while self._pending:
            note = self._pending.popleft()
            self._taken_bytes += len(note.ask.key) + len(note.reply)
            if self._size_bytes >= self._limit_bytes:
                self.dropped += 1
                continue
            self._unflushed += 1
            self._size_bytes += self._file.write(write_line(self._arrival(note), self._parents))
        self._file.flush()
        self.written, self._unflushed = self.written + self._unflushed, 0

    def _arrival(self, note: _Note) -> Arrival:
        ask = note.ask
        content = self._blocks(ask.key + note.reply)
        key = content[: len(ask.key) // KEY_BYTES * BLOCK_BYTES]
        return Arrival(
            arrived_s=note.arrived_s - self._zero_s,
            key=key,
            reply=content[len(key) :],
            prompt_tokens=max(1, note.prompt_tokens),
            output_tokens=note.output_tokens,
            # what cannot be read again would make the whole trace useless
            max_tokens=ask.max_tokens if ask.max_tokens is not None and 0 <= ask.max_tokens <= MOST else None,
            tenant=self._label(ask.tenant),
            session=self._label(ask.affinity),
            priority=ask.priority,
            allowance_s=max(1e-6, ask.deadline_s - note.arrived_s),
            engine=note.engine,
            predicted_tokens=note.predicted_tokens,
        )

    def _blocks(self, key: bytes) -> bytes:
        salt = self._salt
        ends = range(KEY_BYTES, len(key) + 1, KEY_BYTES)
        return b"".join(blake2b(key[end - KEY_BYTES : end], digest_size=BLOCK_BYTES, key=salt).digest() for end in ends)

    def _label(self, word: str) -> str:
        return blake2b(word.encode("utf-8"), digest_size=BLOCK_BYTES, key=self._salt).hexdigest() if word else ""
