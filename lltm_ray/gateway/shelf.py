"""Conversations outlive the last engine of their model: its slots are saved, and restored when somebody goes on.

    the last engine parts -> put_away: slot save -> a folder that outlives the engine
    a request has its slot -> warm: a saved beginning of its prompt? -> slot restore -> the request is sent

Nothing is restored before somebody asks, and only where that is expected to take less time than to compute the
beginning anew. Whatever fails costs that time and nothing else: the request computes its prompt as it would have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from typing import NamedTuple

from lltm_ray._prefix import END_BYTES, HASH_BYTES, hash_prefixes
from lltm_ray._sessions import RESTORED, Offer
from lltm_ray._shelf import Parting, SavedSlot
from lltm_ray.errors import LltmRayError, UpstreamError
from lltm_ray.gateway.migrate import Migrator
from lltm_ray.gateway.slot_files import SHOWN
from lltm_ray.gateway.work import Notes, Work, working
from lltm_ray.llamacpp.replies import SlotAction
from lltm_ray.llamacpp.slot_folder import new_name
from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.routing.residency import Held
from lltm_ray.routing.router import Lease, Router

_log = logging.getLogger(__name__)

WORTH_TOKENS = 128
"""Shorter conversations are neither saved nor restored."""
_WHOLE_BYTES = 16
_POLL_S = 0.05
_OVERHEAD_S = 0.005
_PRIOR_BYTE_S, _PRIOR_AFAR_BYTE_S = 1e-9, 1e-8
"""Seconds a byte, before the first restore: from a disk's cache, and from another node."""
_WEIGHT = 0.3
_QUICK, _SLOW = 1 / 8, 8
"""Measured paces are cut at these parts of the prior: no tiny file, no slow moment decides for all others."""
_FORGET = 0.05
"""Of a pace, towards the prior, at each restore that it forbids: else nothing would ever be measured again."""


class Find(NamedTuple):
    """A saved beginning of a prompt."""

    file: SavedSlot
    tokens: int
    """Of the prompt that it holds, about."""
    is_whole: bool
    """All that it holds is the beginning of this prompt."""
    is_named: bool = False
    """A session's, which stays."""


class Shelf:
    """What one gateway does with saved slots.

    Args:
        router: knows what engines hold.
        migrator: has the hands for it, and knows which models reuse nothing; told of every restore.
        notes: told of saves and restores; None: nobody is.
    """

    def __init__(self, router: Router, migrator: Migrator, notes: Notes | None = None) -> None:
        self._router = router
        self.slots, self._files = migrator.slots, migrator.files
        self._migrator = migrator
        self._notes = notes
        self._salt = b""
        self._saved: dict[str, list[SavedSlot]] = {}
        self._taken: set[str] = set()
        self._byte_s = {False: _PRIOR_BYTE_S, True: _PRIOR_AFAR_BYTE_S}
        self._counts = dict.fromkeys(("saved", "restored", "failed"), 0)
        self.used: Callable[[str], None] = lambda _name: None
        """Told the name of a file that nobody needs any more."""

    def update(self, files: Iterable[SavedSlot], salt: bytes) -> None:
        """What is saved now, and with what its keys were hashed."""
        self._salt = salt
        self._saved = {}
        for file in files:
            self._saved.setdefault(file.model, []).append(file)
        self._taken &= {file.name for listed in self._saved.values() for file in listed}

    def snapshot(self) -> dict[str, int]:
        """Counts since the start."""
        return dict(self._counts)

    # --- saving

    async def put_away(self, parting: Parting) -> tuple[SavedSlot, ...]:
        """Move or save what this router's slots of an engine hold; of saved ones first what was used last.

        Running requests end before. What cannot be moved or saved, or not in time, is lost with the engine.
        """
        if not parting.folder:
            await self._move(parting)
            return ()
        engine = next((each for each in self._router.engines() if each.name == parting.engine), None)
        if engine is None or not self._is_kept(engine):
            return ()
        saved: list[SavedSlot] = []
        with working(self._notes, Work("put away", engine.name)):
            try:
                async with asyncio.timeout(parting.deadline_s):
                    await self._empty(engine, parting, saved)
            except TimeoutError:
                _log.warning("%s: not all is saved within %g s", engine.name, parting.deadline_s)
        self._counts["saved"] += len(saved)
        return tuple(saved)

    async def _move(self, parting: Parting) -> None:
        try:
            await self._migrator.drain(parting.engine, parting.deadline_s, is_leaving=True)
        except LltmRayError as error:
            _log.warning("%s: nothing is moved: %s", parting.engine, error)

    def _is_kept(self, engine: EngineInfo) -> bool:
        """llama.cpp saves no adapters with a slot, and reuses restored ones of some models not at all."""
        can = engine.slot_folder and engine.slot_seal and not engine.adapters
        return bool(can and self._salt) and not self._migrator.is_off(engine.model)

    async def _empty(self, engine: EngineInfo, parting: Parting, saved: list[SavedSlot]) -> None:
        done: set[int] = set()
        began_unix_nano = time.time_ns()
        while True:
            todo = [held for held in self._router.held(engine.name) if held.slot not in done]
            if not todo and not self._router.in_flight(engine.name):
                return
            for held in reversed(todo):
                done.add(held.slot)
                if sum(each.size_bytes for each in saved) < parting.limit_bytes:
                    saved += await self._save(engine, held, parting.folder, began_unix_nano - len(done))
            await asyncio.sleep(_POLL_S)

    async def _save(self, engine: EngineInfo, held: Held, folder: str, used_unix_nano: int) -> list[SavedSlot]:
        key, filename = held.key, new_name()
        lease = None
        if held.tokens >= WORTH_TOKENS and len(key) >= END_BYTES[0]:
            lease = self._router.hold_slot(engine.name, held.slot)
        if lease is None:
            return []
        try:
            done = await self.copy_out(engine, held.slot, engine.with_(slot_folder=folder), filename)
            if done.tokens < WORTH_TOKENS:
                return []
        except (OSError, LltmRayError) as error:
            why = _reason(error)
            _log.warning("%s: slot %d of %d tokens is not saved: %s", engine.name, held.slot, held.tokens, why)
            return []
        finally:
            self._router.release(lease)
        file = SavedSlot(
            name=filename,
            folder=folder,
            node_id=engine.node_id,
            model=engine.model,
            seal=engine.slot_seal,
            tokens=done.tokens,
            size_bytes=done.size_bytes,
            key_bytes=len(key),
            whole=hash_whole(key, self._salt),
            hashes=hash_prefixes(key, self._salt),
            saved_unix_nano=used_unix_nano,
        )
        return [file]

    async def copy_out(self, engine: EngineInfo, slot: int, place: EngineInfo, filename: str) -> SlotAction:
        """Save a slot that the caller has claimed into the folder of `place`; fewer than `WORTH_TOKENS` nowhere.

        Raises:
            OSError, LltmRayError: it could not be saved or carried; nothing of it is left.
        """
        try:
            done = await self.slots.save(engine, slot, filename)
            if done.tokens >= WORTH_TOKENS:
                await self._files.carry(engine, place, filename)
        except BaseException:  # what nobody lists must not stay
            await self._remove(place, filename)
            raise
        finally:
            await self._remove(engine, filename)
        return done

    async def _remove(self, engine: EngineInfo, filename: str) -> None:
        try:
            await self._files.remove(engine, filename)
        except OSError as error:
            _log.warning("%s of %s is left behind: %s", filename[:SHOWN], engine.name, _reason(error))

    # --- restoring

    async def warm(self, lease: Lease) -> None:
        """A request has its slot: restore there what is saved of its prompt, if that is worth it."""
        offer = lease.ask.offer
        if offer is not None and offer.file is not None and await self._warm_session(lease, offer, offer.file):
            return
        if lease.model not in self._saved or lease.slot < 0 or lease.engine.adapters:
            return
        found = self._find(lease)
        if found is None or self._migrator.is_off(lease.model) or not self._pays(found, lease):
            return
        if found.is_whole:  # a beginning that others may share is left to whom it belongs
            self._taken.add(found.file.name)
        with suppress(OSError, LltmRayError), working(self._notes, Work("take from shelf", lease.engine.name)):
            await self._restore(found, lease)

    async def _warm_session(self, lease: Lease, offer: Offer, file: SavedSlot) -> bool:
        """Restore the session that the request names, however long that takes: its user asked for it."""
        why = await self._unfit(lease, offer, file)
        key = lease.ask.key
        found = self._match(file, key, hash_prefixes(key, offer.salt), offer.salt)._replace(is_named=True)
        if not why and found.tokens < WORTH_TOKENS:
            why = "its prompt does not begin as what was saved"
        if why:
            offer.refuse(why)
            return False
        if found.tokens - lease.cached_tokens < WORTH_TOKENS:
            offer.outcome = "cached"
            return False
        try:
            with working(self._notes, Work("take session", lease.engine.name)):
                await self._restore(found, lease)
        except (OSError, LltmRayError) as error:
            offer.refuse(f"its file is not restored: {_reason(error)}")
            return False
        offer.outcome = f"{RESTORED}{found.tokens}"
        return True

    async def _unfit(self, lease: Lease, offer: Offer, file: SavedSlot) -> str:
        """Why an engine's slot must not take a session's file; empty where it may."""
        engine = lease.engine
        if why := self.unsavable(engine, lease.slot):
            return why
        if why := other_seal(engine, file.seal):
            return why
        try:
            build = await self.slots.build(engine)
        except (OSError, LltmRayError) as error:
            return f"the engine does not say which llama.cpp it is: {_reason(error)}"
        return "" if build == offer.build else f"it was saved by llama.cpp {offer.build}, this is {build}"

    def unsavable(self, engine: EngineInfo, slot: int) -> str:
        """Why an engine's slot can be neither saved nor restored; empty where it can."""
        if slot < 0:
            return "llama-server chose the slot; sessions need gateway.policy = 'residency'"
        if engine.adapters:
            return "the engine has adapters (engine.lora), and llama.cpp does not save whose keys and values these are"
        if not (engine.slot_folder and engine.slot_seal):
            return "the engine has no folder for slots, by engine.embeddings, engine.reranking or engine.extra_args"
        is_off = self._migrator.is_off(engine.model)
        return f"model {engine.model!r} does not reuse restored slots" if is_off else ""

    def _find(self, lease: Lease) -> Find | None:
        seal, key = lease.engine.slot_seal, lease.ask.key
        hashes = hash_prefixes(key, self._salt)
        fitting = (file for file in self._saved[lease.model] if file.seal == seal and file.name not in self._taken)
        finds = (self._match(file, key, hashes, self._salt) for file in fitting)
        return max(finds, key=lambda find: (find.is_whole, find.tokens), default=None)

    @staticmethod
    def _match(file: SavedSlot, key: bytes, hashes: bytes, salt: bytes) -> Find:
        depth = _common(file.hashes, hashes)
        is_all = depth * HASH_BYTES == len(file.hashes) and file.key_bytes <= len(key)
        if is_all and hash_whole(key[: file.key_bytes], salt) == file.whole:
            return Find(file, file.tokens, is_whole=True)
        shared_bytes = END_BYTES[depth - 1] if depth else 0
        return Find(file, file.tokens * shared_bytes // file.key_bytes, is_whole=False)

    def _pays(self, found: Find, lease: Lease) -> bool:
        """Whether to restore takes less time than to compute what is not cached there."""
        gained = found.tokens - lease.cached_tokens
        if gained < WORTH_TOKENS or lease.speed is None:
            return False
        is_afar = found.file.node_id != lease.engine.node_id
        restore_s = _OVERHEAD_S + found.file.size_bytes * self._byte_s[is_afar]
        pays = restore_s < gained * lease.speed.prefill_token_s
        if not pays:
            self._byte_s[is_afar] += _FORGET * (_prior(is_afar) - self._byte_s[is_afar])
        return pays

    async def _restore(self, found: Find, lease: Lease) -> None:
        file, engine, began_s = found.file, lease.engine, time.monotonic()
        copy = new_name()  # others may restore the same file there
        is_good = is_bad = False
        try:
            await self._files.carry(_shelf_of(file), engine, file.name, copy)
            done = await self.slots.restore(engine, lease.slot, copy)
            is_good = done.tokens == file.tokens
            is_bad = not is_good
            if is_bad and found.is_named:
                raise OSError(f"{done.tokens} of {file.tokens} tokens were restored")
        except (OSError, LltmRayError) as error:
            is_bad = _is_damage(error)
            _log.warning("%s: %s is not restored: %s", engine.name, file.name[:SHOWN], _reason(error))
            raise
        finally:
            self._settle(found, is_good=is_good, is_bad=is_bad)
            await self._remove(engine, copy)
        if is_good:
            self._learn(file, file.node_id != engine.node_id, time.monotonic() - began_s)
            lease.cached_tokens = min(found.tokens, max(0, lease.ask.prompt_tokens - 1))
            self._migrator.expect(engine, lease.slot)

    def _settle(self, found: Find, *, is_good: bool, is_bad: bool) -> None:
        """A file goes when its conversation went on from it, or when it will never do; else somebody may try again."""
        self._counts["restored" if is_good else "failed"] += 1
        if found.is_named:
            return
        if is_bad or (is_good and found.is_whole):
            self._taken.add(found.file.name)
            self.used(found.file.name)
        elif found.is_whole:
            self._taken.discard(found.file.name)

    def _learn(self, file: SavedSlot, is_afar: bool, took_s: float) -> None:
        prior = _prior(is_afar)
        seen = max(took_s - _OVERHEAD_S, 0.0) / max(file.size_bytes, 1)
        seen = min(max(seen, _QUICK * prior), _SLOW * prior)
        self._byte_s[is_afar] += _WEIGHT * (seen - self._byte_s[is_afar])


def other_seal(engine: EngineInfo, seal: str) -> str:
    """Why an engine must not take a slot that was saved under a seal; empty where that is its own."""
    if seal == engine.slot_seal:
        return ""
    return "it was saved with another model file, llama-server or `engine` settings: set them again, or save it again"


def hash_whole(key: bytes, salt: bytes) -> bytes:
    """What tells a prompt's key from every other one."""
    return blake2b(key, digest_size=_WHOLE_BYTES, key=salt).digest()


def _prior(is_afar: bool) -> float:
    return _PRIOR_AFAR_BYTE_S if is_afar else _PRIOR_BYTE_S


def _reason(error: Exception) -> str:
    """Without the file's name, which the system's errors hold."""
    return getattr(error, "strerror", None) or str(error)


def _is_damage(error: Exception) -> bool:
    """Whether the file will never do: it is gone, or the server would not read it."""
    return isinstance(error, FileNotFoundError | UpstreamError)


def _common(left: bytes, right: bytes) -> int:
    """How many hashes two prompts have in common from their beginning."""
    most = min(len(left), len(right)) // HASH_BYTES
    for depth in range(most):
        at = slice(depth * HASH_BYTES, (depth + 1) * HASH_BYTES)
        if left[at] != right[at]:
            return depth
    return most


def _shelf_of(file: SavedSlot) -> EngineInfo:
    """Where a file lies, as `SlotFiles` takes it: like the folder of an engine."""
    return EngineInfo(
        name="the shelf", model=file.model, state=EngineState.STOPPED, node_id=file.node_id, slot_folder=file.folder
    )
