"""Finished requests as the values of two SQL statements, made on the request path while they are still in its caches.

The writer's thread then needs Python's lock for some steps a second instead of some a request. Each costs more than the
work itself: an event loop lets go of the lock and takes it back many times a request, and while a thread waits for it,
each of those wakes that thread up in vain.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from lltm_ray.routing.ledger.entry import ATTEMPT_FIELDS, LedgerEntry
from lltm_ray.routing.ledger.progress import Cell

_PLAIN = tuple(each.name for each in fields(LedgerEntry) if each.name not in ("considered", "attempts", "cell"))
REQUEST_COLUMNS = (*_PLAIN, "is_balanced", "considered")
ATTEMPT_COLUMNS = ("place", "number", *ATTEMPT_FIELDS)
"""`place` is the request's in the batch, from 0."""
_REQUEST, _ATTEMPT = len(REQUEST_COLUMNS), len(ATTEMPT_COLUMNS)


class Batch:
    """Requests in the order in which they ended."""

    __slots__ = ("attempts", "cells", "requests")

    def __init__(self, entries: Iterable[LedgerEntry] = ()) -> None:
        self.requests: list[Any] = []
        """Values of `REQUEST_COLUMNS`, one request after the other."""
        self.attempts: list[Any] = []
        """Values of `ATTEMPT_COLUMNS`, one attempt after the other."""
        self.cells: list[Cell] = []
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def unbalanced(self) -> list[str]:
        """Ids of requests whose attempts do not account for every token that the client got."""
        balanced = self.requests[REQUEST_COLUMNS.index("is_balanced") :: _REQUEST]
        return [id_ for id_, is_sound in zip(self.requests[::_REQUEST], balanced, strict=True) if not is_sound]

    def add(self, entry: LedgerEntry) -> None:
        """Take in one request.

        Raises:
            Exception: what was considered cannot be pickled; nothing of it is taken in.
        """
        considered = pickle.dumps(entry.considered, 4) if entry.considered else None
        place = len(self.cells)
        self.requests += (
            entry.request_id, entry.tenant, _whole(entry.model), entry.route, entry.policy, entry.why, entry.affinity,
            entry.arrived_unix_nano, entry.wait_s, entry.ttft_s, entry.total_s, entry.status, _whole(entry.error),
            entry.is_exact, entry.delivered_tokens, entry.is_balanced, considered,
        )  # fmt: skip
        for number, each in enumerate(entry.attempts, 1):
            self.attempts += (
                place, number, each.engine, each.server_pid, each.slot, each.started_unix_nano, each.queue_s,
                each.predicted_cached_tokens, each.cached_tokens, each.computed_tokens, each.generated_tokens,
                each.delivered_tokens, each.outcome, each.is_estimate,
            )  # fmt: skip
        self.cells.append(entry.cell)

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """One of all their requests."""
        whole = cls()
        for each in batches:
            each.attempts[::_ATTEMPT] = [place + len(whole) for place in each.attempts[::_ATTEMPT]]
            whole.requests += each.requests
            whole.attempts += each.attempts
            whole.cells += each.cells
        return whole

    def singly(self) -> Iterator[Batch]:
        """Each request alone."""
        tried = defaultdict[int, list[Any]](list)
        for at in range(0, len(self.attempts), _ATTEMPT):
            tried[self.attempts[at]] += (0, *self.attempts[at + 1 : at + _ATTEMPT])
        for place, cell in enumerate(self.cells):
            one = type(self)()
            one.requests = self.requests[place * _REQUEST : (place + 1) * _REQUEST]
            one.attempts, one.cells = tried[place], [cell]
            yield one


def _whole(text: str) -> str:
    """Without halves of surrogate pairs, which a client's JSON can hold and SQLite refuses."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
