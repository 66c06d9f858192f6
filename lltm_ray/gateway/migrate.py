"""Conversations move: a slot's KV cache is saved on one engine, carried, and restored on another.

    drain | relieve -> claim a slot elsewhere -> save -> carry -> restore -> verify -> router.moved -> files removed

The source keeps its copy until the target has said that it restored as many tokens as were saved, so a move that fails
costs nothing but time. llama.cpp saves and restores between two decode steps: everyone on that server waits meanwhile.
Whether a restored slot is really reused only its next request shows (`confirm`): models with sliding windows or
recurrent layers may silently compute everything anew, and are left alone once that is seen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from lltm_ray.errors import ConfigError, LltmRayError
from lltm_ray.gateway.moves import Failure, HeldSlot, Load, MigrationRouter, MoveReport, SlotLease, coldest, plan_relief
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.slot_calls import SlotCalls
from lltm_ray.gateway.slot_files import SlotFiles
from lltm_ray.gateway.work import Notes, Work, working
from lltm_ray.llamacpp.replies import SlotAction
from lltm_ray.llamacpp.slot_folder import new_name
from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.telemetry import semconv as names

__all__ = ["Failure", "HeldSlot", "Load", "MigrationRouter", "Migrator", "MoveReport", "SlotLease", "plan_relief"]

POLL_S = 0.05
"""Between two looks for a free slot elsewhere, or for running requests to end."""
USELESS_RATIO, USELESS_LIMIT = 0.25, 2
"""A restore whose next request reused less of what was expected was useless; so many in a row, and the model is left
alone. Not only 0: a model with sliding windows may find an old checkpoint and reuse a few tokens."""
_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Run:
    """One drain or relief while it goes on."""

    source: EngineInfo
    excluded: set[str]
    began_at: float = field(default_factory=time.monotonic)
    moved: list[SlotAction] = field(default_factory=list)
    failed: dict[int, Failure] = field(default_factory=dict)
    litter: list[tuple[EngineInfo, str]] = field(default_factory=list)
    """Files whose server may still have been writing when they were removed."""


class _TargetError(Exception):
    """This target did not take it; another one may."""


class Migrator:
    """Moves conversations between the engines of a router. One for each router; it may be asked many times at once.

    Args:
        router: knows who holds what; is told of every move.
        pool: connections to the servers.
        files: carries saved slots between folders.
        notes: told of every move and its parts; None: nobody is.
    """

    def __init__(
        self, router: MigrationRouter, pool: UpstreamPool, files: SlotFiles, notes: Notes | None = None
    ) -> None:
        self._router = router
        self.slots = SlotCalls(pool, notes)
        self.files = files
        self._notes = notes
        self._fresh: dict[tuple[str, int], str] = {}
        self._useless: dict[str, int] = {}
        self._off: set[str] = set()
        self._counts = dict.fromkeys(("moved", "tokens", "bytes", "failed", "verified", "files_left"), 0)

    # --- what it does

    async def drain(self, engine_name: str, deadline_s: float, *, is_leaving: bool = False) -> MoveReport:
        """Close an engine and move its conversations away, longest first, running ones as they end.

        The engine stays closed afterwards, whatever the outcome; see `undrain`.

        Args:
            engine_name: which.
            deadline_s: what has not moved by then stays.
            is_leaving: it will be ended by who starts others, for which requests wait; else those are refused that no
                other engine can take.

        Raises:
            ConfigError: no such engine.
        """
        run = self._begin(engine_name)
        self._router.close_engine(engine_name, is_leaving=is_leaving)
        with working(self._notes, Work("drain", engine_name)):
            try:
                async with asyncio.timeout(deadline_s):
                    await self._empty(run)
            except TimeoutError:
                _log.warning("%s: not empty within %g s", engine_name, deadline_s)
            return await self._end(run)

    def undrain(self, engine_name: str) -> None:
        """Open a drained engine again; raises ConfigError for an unknown one."""
        self._find(engine_name)
        self._router.open_engine(engine_name)

    async def relieve(self, engine_name: str, share: float, *, deadline_s: float = 30.0) -> MoveReport:
        """Move the coldest idle conversations of a hot engine to where slots are free now; the engine stays open.

        Args:
            engine_name: the hot engine, see `plan_relief`.
            share: how much of its held tokens, 0..1.
            deadline_s: what has not moved by then stays.

        Raises:
            ConfigError: no such engine.
        """
        run = self._begin(engine_name)
        with working(self._notes, Work("relieve", engine_name)):
            try:
                async with asyncio.timeout(deadline_s):
                    for held in coldest(self._router.held(engine_name), share):
                        await self._settle(run, held)
            except TimeoutError:
                _log.warning("%s: relief not over within %g s", engine_name, deadline_s)
            return await self._end(run)

    def expect(self, engine: EngineInfo, slot: int) -> None:
        """A slot was restored there: its next request shows whether it was of use."""
        self._fresh[engine.name, slot] = engine.model

    def confirm(self, engine: str, slot: int, cache_n: int, expected: int) -> None:
        """The next request on a slot has ended: was what we restored there reused?

        Args:
            engine: where it ran.
            slot: where it ran; one that was not restored since its last request means nothing here.
            cache_n: prompt tokens it found cached.
            expected: what the router had expected; 0 for another conversation's request, which proves nothing.
        """
        model = self._fresh.pop((engine, slot), None) if self._fresh else None
        if model is None or expected <= 0:
            return
        if cache_n >= USELESS_RATIO * expected:
            self._counts["verified"] += 1
            self._useless.pop(model, None)
            return
        self._useless[model] = self._useless.get(model, 0) + 1
        if self._useless[model] >= USELESS_LIMIT and model not in self._off:
            self._off.add(model)
            _log.warning("model %s does not reuse restored slots: its conversations are not moved any more", model)

    def is_off(self, model: str) -> bool:
        """Whether a model's conversations stay where they are: moving them proved useless, or it has adapters."""
        return model in self._off or any(engine.adapters for engine in self._router.engines(model))

    def snapshot(self) -> dict[str, Any]:
        """Counts since the start, restores that no request has confirmed yet, and models that are left alone."""
        return {**self._counts, "unconfirmed": len(self._fresh), "off": sorted(self._off)}

    # --- a run

    def _find(self, name: str) -> EngineInfo:
        known = {engine.name: engine for engine in self._router.engines()}
        if name not in known:
            raise ConfigError("engine", name, f"no such engine; known are {', '.join(sorted(known)) or 'none yet'}")
        return known[name]

    def _begin(self, name: str) -> _Run:
        source = self._find(name)
        here = {engine.name for engine in self._router.engines()}
        self._fresh = {key: model for key, model in self._fresh.items() if key[0] in here}
        others = self._router.engines(source.model)
        cannot = {engine.name for engine in others if not engine.slot_folder or engine.adapters}
        return _Run(source=source, excluded={name} | cannot)

    async def _empty(self, run: _Run) -> None:
        name = run.source.name
        while True:
            todo = [held for held in self._router.held(name) if held.slot not in run.failed]
            if not todo and not self._router.in_flight(name):
                return
            todo.sort(key=lambda held: held.tokens, reverse=True)
            if not any([await self._settle(run, held) for held in todo]):
                await asyncio.sleep(POLL_S)

    async def _end(self, run: _Run) -> MoveReport:
        for engine, filename in run.litter:
            await self._remove(engine, filename)
        failed = tuple(run.failed.values())
        report = MoveReport(
            engine=run.source.name,
            moved=len(run.moved),
            tokens=sum(each.tokens for each in run.moved),
            size_bytes=sum(each.size_bytes for each in run.moved),
            took_s=time.monotonic() - run.began_at,
            failed=failed,
            left=len(self._router.held(run.source.name)),
            running=self._router.in_flight(run.source.name),
            warning=self._router.unserved(run.source.name),
        )
        for name, count in (("moved", report.moved), ("tokens", report.tokens), ("bytes", report.size_bytes)):
            self._counts[name] += count
        self._counts["failed"] += len(failed)
        _log.info("%s: %s", run.source.name, report)
        return report

    # --- one conversation

    async def _settle(self, run: _Run, held: HeldSlot) -> bool:
        """Move a conversation or give it up; false when it has to wait for a slot."""
        reason = self._why_not(run)
        if reason:
            return self._give_up(run, held, reason)
        into = self._router.claim_slot(run.source.model, exclude=run.excluded, tokens=held.tokens)
        if into is None:
            return False
        out = self._router.hold_slot(run.source.name, held.slot)
        try:
            if out is not None:
                await self._try(run, held, into)
            return out is not None
        finally:
            self._router.release(into)
            if out is not None:
                self._router.release(out)

    def _why_not(self, run: _Run) -> str:
        model = run.source.model
        if run.source.adapters:
            return "the engine has adapters, and llama.cpp does not save whose keys and values these are"
        if self.is_off(model):
            return f"model {model!r} does not reuse restored slots"
        if not run.source.slot_folder:
            return "the engine has no folder for slots"
        coming = (EngineState.READY, EngineState.STARTING)
        others = [
            each for each in self._router.engines(model) if each.name not in run.excluded and each.state in coming
        ]
        can = others and not self._router.unserved(run.source.name)
        return "" if can else f"no other engine of model {model!r} can take it"

    async def _try(self, run: _Run, held: HeldSlot, into: SlotLease) -> None:
        try:
            await self._move(run, held, into)
        except _TargetError as error:  # another engine may take it
            run.excluded.add(into.engine.name)
            if self._why_not(run):
                self._give_up(run, held, f"{into.engine.name}: {error}")
            else:
                _log.warning("%s: slot %d not moved: %s: %s", run.source.name, held.slot, into.engine.name, error)
        except (OSError, LltmRayError) as error:
            self._give_up(run, held, str(error) or type(error).__name__)

    def _give_up(self, run: _Run, held: HeldSlot, why: str) -> bool:
        run.failed[held.slot] = Failure(slot=held.slot, tokens=held.tokens, why=why)
        _log.warning("%s: slot %d of %d tokens stays: %s", run.source.name, held.slot, held.tokens, why)
        return True

    async def _move(self, run: _Run, held: HeldSlot, into: SlotLease) -> None:
        work = Work("move slot", run.source.name)
        work.attributes |= {names.SLOT_ID: held.slot, names.TARGET_ENGINE: into.engine.name}
        with working(self._notes, work):
            await self._move_now(run, held, into)

    async def _move_now(self, run: _Run, held: HeldSlot, into: SlotLease) -> None:
        source, target, filename = run.source, into.engine, new_name()
        try:
            saved = await self.slots.save(source, held.slot, filename)
            if not saved.tokens:
                self._router.erased(source.name, held.slot)
                return
            await self._carry(source, target, filename)
            await self._restore(into, filename, saved)
            self._router.moved(source.name, held.slot, target.name, into.slot)
            self.expect(target, into.slot)
            run.moved.append(saved)
        except BaseException:
            run.litter += [(source, filename), (target, filename)]
            raise
        finally:
            for engine in {(each.node_id, each.slot_folder): each for each in (source, target)}.values():
                await self._remove(engine, filename)

    async def _carry(self, source: EngineInfo, target: EngineInfo, filename: str) -> None:
        try:
            with working(self._notes, Work("slot carry", target.name)):
                await self.files.carry(source, target, filename)
        except OSError as error:
            raise _TargetError(f"its file did not get there: {error}") from error

    async def _restore(self, into: SlotLease, filename: str, saved: SlotAction) -> None:
        is_whole = False
        try:
            restored = await self.slots.restore(into.engine, into.slot, filename)
            is_whole = restored.tokens == saved.tokens
        except (OSError, LltmRayError) as error:
            raise _TargetError(f"not restored: {error}") from error
        finally:
            if not is_whole:  # llama.cpp clears a slot that it cannot restore
                self._router.erased(into.engine.name, into.slot)
        if not is_whole:
            raise _TargetError(f"restored {restored.tokens} of {saved.tokens} tokens")

    async def _remove(self, engine: EngineInfo, filename: str) -> None:
        try:
            await self.files.remove(engine, filename)
        except OSError as error:
            self._counts["files_left"] += 1
            _log.warning("%s of %s is left behind: %s", filename, engine.name, error)
