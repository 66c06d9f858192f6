"""What routers hear of slots that they did not do themselves: other routers' digests, and the servers' own samples.

Each router of a fleet owns its part of every engine's slots, and claims are never shared; but a slot of another's part
may be used by what goes on from its content. Should two use one slot at once, llama-server lets one of them wait. What
is heard is older than what is known: a router's own claim since then wins.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from lltm_ray.routing.hearsay import UNKNOWN, SlotDigest, SlotSample, hash_cuts
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.rows import Row
from lltm_ray.routing.served import ServedModel

__all__ = ["Board", "Gossip", "SlotDigest", "SlotSample"]

MOST_NEWS = 1024
"""Slots of which others are told at once; the rest follow the next time."""
MARGIN_S = 0.25
"""A sample must be so much newer than what is known: nodes' clocks differ, and a reply arrives after its slot's end."""
ROUNDING_S = 1e-5
"""No newer than that is our own word, which a first reading of the board brings back: seconds since 1970 as a float are
true to 0.2 us."""
MOST_POSTED = 65_536
_SLICE = 16
"""Slots after which others get their turn in the event loop: some 0.5 ms."""


class Gossip:
    """One router's ear and mouth.

    Args:
        models: the router's own; read as they are at each call.
        clock: the router's.
    """

    def __init__(self, models: Mapping[str, ServedModel], clock: Callable[[], float]) -> None:
        self._models = models
        self._clock = clock

    async def news(self, salt: bytes) -> list[SlotDigest]:
        """What happened to slots here since the last time. Give it to `untell` if nobody could be told."""
        digests: list[SlotDigest] = []
        for served in list(self._models.values()):
            for number, at in enumerate(list(served.untold)[: MOST_NEWS - len(digests)]):
                row = served.rows.get(at[0])
                if served.untold.pop(at, 0) is None and row is not None and at[1] in row.touched_s:
                    digests.append(self._digest(served, row, at[1], salt))
                if number % _SLICE == _SLICE - 1:
                    await asyncio.sleep(0)
        return digests

    def untell(self, digests: Iterable[SlotDigest]) -> None:
        """Say it again the next time."""
        for digest in digests:
            served, _ = self._find(digest)
            if served is not None:
                served.untold[digest.engine, digest.slot] = None

    async def hear(self, told: Iterable[SlotDigest | SlotSample], salt: bytes) -> None:
        """What others posted, the oldest first."""
        late_s = self._clock() - time.time()
        for number, each in enumerate(told):
            served, row = self._find(each)
            if served is not None and row is not None and each.slot not in row.pinned:
                newer_s = each.at_unix_nano / 1e9 + late_s - row.touched_s.get(each.slot, -math.inf)
                if isinstance(each, SlotSample):
                    if newer_s > MARGIN_S and not row.unpinned:
                        _correct(served, row, each)
                    elif newer_s > MARGIN_S and not each.is_busy:
                        row.taken.discard(each.slot)  # not told again before its next use
                elif newer_s > ROUNDING_S:
                    served.hearsay.salt = salt
                    row.touched_s[each.slot] = each.at_unix_nano / 1e9 + late_s
                    _take(served, row, each)
            if number % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)

    def unheard_tokens(self, model: str, ask: Ask) -> int:
        """Tokens of a prompt that no engine is known to have cached, where another router may yet say otherwise."""
        served = self._models.get(model)
        if served is None or not any(row.lent for row in served.rows.values()):
            return 0
        match = served.match(ask)
        return match.prompt_tokens - (match.engines[0][1] if match.engines else 0)

    def _find(self, told: SlotDigest | SlotSample) -> tuple[ServedModel | None, Row | None]:
        for served in self._models.values():
            row = served.rows.get(told.engine)
            if row is not None and row.info.server_pid == told.server_pid:
                return served, row
        return None, None

    def _digest(self, served: ServedModel, row: Row, slot: int, salt: bytes) -> SlotDigest:
        is_busy = slot in row.pinned
        key, tokens = (b"", 0) if is_busy else served.residency.outside.content(row.name, slot)
        return SlotDigest(
            engine=row.name,
            server_pid=row.info.server_pid,
            slot=slot,
            at_unix_nano=time.time_ns() - int((self._clock() - row.touched_s[slot]) * 1e9),
            is_busy=is_busy,
            tokens=tokens,
            size_bytes=len(key),
            marks=() if key.startswith(UNKNOWN) else hash_cuts(key, salt),
        )


def _take(served: ServedModel, row: Row, digest: SlotDigest) -> None:
    """Another router used the slot after us."""
    slot = digest.slot
    served.untold.pop((row.name, slot), None)
    row.tasks.pop(slot, None)
    (row.taken.add if digest.is_busy else row.taken.discard)(slot)
    # An owner must know that its slot holds something, or new conversations would drive it out first.
    tokens = digest.tokens if slot in row.owned else 0
    served.residency.outside.learn(row.name, slot, b"%s%s/%d" % (UNKNOWN, row.name.encode(), slot), tokens, tokens)
    served.hearsay.take(digest)


def _correct(served: ServedModel, row: Row, sample: SlotSample) -> None:
    """What the server shows of a slot that nobody here uses."""
    slot, task = sample.slot, sample.task_id or 0
    is_foreign = sample.is_busy or row.tasks.get(slot, task) != task
    (row.taken.add if sample.is_busy else row.taken.discard)(slot)
    row.tasks[slot] = task
    if is_foreign:
        served.residency.outside.overwritten(row.name, slot)
        served.hearsay.drop(row.name, slot)
    if not sample.is_busy:
        if not sample.tokens:
            served.hearsay.drop(row.name, slot)
        served.residency.outside.correct(row.name, slot, sample.tokens)


class Board:
    """The last word of each slot, for routers to read: the directory's part of it."""

    def __init__(self) -> None:
        self.version = time.time_ns()  # grows across restarts, so that nobody waits for a number that never comes
        self._posted: OrderedDict[tuple[type, str, int], tuple[int, str, SlotDigest | SlotSample]] = OrderedDict()

    def post(self, author: str, told: Iterable[SlotDigest | SlotSample]) -> None:
        """What a router or a sampler tells, instead of anything older of its kind."""
        for each in told:
            self.version += 1
            at = type(each), each.engine, each.slot
            self._posted.pop(at, None)
            self._posted[at] = self.version, author, each
        while len(self._posted) > MOST_POSTED:
            self._posted.popitem(last=False)

    def read(self, reader: str, after: int) -> tuple[int, list[SlotDigest | SlotSample]]:
        """What others posted after this version, the oldest first, and what the version is now.

        After 0 also what the reader posted, in a former life.
        """
        found = []
        for version, author, each in reversed(self._posted.values()):
            if version <= after:
                break
            if author != reader or not after:
                found.append(each)
        return self.version, found[::-1]
