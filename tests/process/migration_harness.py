"""Conversations on real servers, and a router that keeps the books of a migration as plainly as can be."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.records import Completion, EngineInfo, EngineState

SLOTS = 4
# The child ends when its stdin does, so it cannot outlive the tests however they die.
_CHILD = """
import os, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames, p.api_keys = sys.argv[1], 0, ["127.0.0.1"], ["engine-key"]
p.n_parallel, p.n_ctx, p.n_threads_http = 4, 4 * 8192, 16
p.slot_save_path = sys.argv[2]
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1  # more spin against each other on a small machine
p.endpoint_slots = True
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@dataclass(frozen=True)
class Held:
    slot: int
    tokens: int


@dataclass(frozen=True)
class Lease:
    engine: EngineInfo
    slot: int


NO_HALF_CHARACTERS = [[3 + byte, False] for byte in range(0x80, 0x100)]
"""llama.cpp streams no token ids for the bytes before the last one of a character."""


class BookRouter:
    """Which slot of which engine is claimed or holds how many tokens; the order of `contents` is coldest first."""

    def __init__(self, *engines: EngineInfo) -> None:
        self.known = {engine.name: engine for engine in engines}
        self.contents: dict[tuple[str, int], int] = {}
        self.claims: set[tuple[str, int]] = set()
        self.closed: set[str] = set()
        self.moves: list[tuple[str, int, str, int]] = []
        self.erasures: list[tuple[str, int]] = []

    def engines(self, model: str | None = None) -> tuple[EngineInfo, ...]:
        return tuple(engine for engine in self.known.values() if model in (None, engine.model))

    def close_engine(self, name: str, *, is_leaving: bool = False) -> None:
        del is_leaving
        self.closed.add(name)

    def unserved(self, name: str) -> str:
        open_ = [each for each in self.engines(self.known[name].model) if each.name not in self.closed]
        return "" if open_ else f"nobody but {name}"

    def open_engine(self, name: str) -> None:
        self.closed.discard(name)

    def in_flight(self, name: str) -> int:
        return sum(engine == name for engine, _ in self.claims)

    def held(self, name: str) -> list[Held]:
        return [
            Held(slot, tokens)
            for (engine, slot), tokens in self.contents.items()
            if engine == name and (engine, slot) not in self.claims
        ]

    def claim_slot(self, model: str, *, exclude: Collection[str], tokens: int) -> Lease | None:
        del tokens
        usable = [each for each in self.engines(model) if each.name not in exclude and each.name not in self.closed]
        free = [
            (self.contents.get((each.name, slot), 0), each.name, slot)
            for each in usable
            for slot in range(each.slots_total)
            if (each.name, slot) not in self.claims
        ]
        return self.hold_slot(*min(free)[1:]) if free else None

    def hold_slot(self, name: str, slot: int) -> Lease | None:
        if (name, slot) in self.claims:
            return None
        self.claims.add((name, slot))
        return Lease(self.known[name], slot)

    def moved(self, source: str, slot: int, target: str, target_slot: int) -> None:
        self.contents[target, target_slot] = self.contents.pop((source, slot))
        self.moves.append((source, slot, target, target_slot))

    def erased(self, name: str, slot: int) -> None:
        self.contents.pop((name, slot), None)
        self.erasures.append((name, slot))

    def release(self, lease: Lease) -> None:
        self.claims.remove((lease.engine.name, lease.slot))

    def place(self, name: str, slot: int) -> tuple[str, int]:
        """Where a conversation that began on this slot is now."""
        return next(((to, at) for source, old, to, at in self.moves if (source, old) == (name, slot)), (name, slot))


@dataclass(frozen=True)
class Member:
    """One real engine."""

    info: EngineInfo
    process: subprocess.Popen[str]

    @property
    def files(self) -> list[str]:
        """Saved slots on its disk."""
        return [path.name for path in Path(self.info.slot_folder).iterdir() if path.suffix != ".log"]

    def kill(self) -> None:
        """As the kernel would for want of memory."""
        self.process.kill()
        self.process.wait()


@contextmanager
def member(name: str, model: Path, folder: Path) -> Iterator[Member]:
    """Start a server of four slots that saves them in `folder`."""
    folder.mkdir(exist_ok=True)
    log = folder / f"{name}.log"
    command = [sys.executable, "-c", _CHILD, str(model), f"{folder}/"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), log.read_text()[-2000:]
            info = EngineInfo(
                name=name,
                model="tiny",
                state=EngineState.READY,
                url=url,
                api_key="engine-key",
                slots_total=SLOTS,
                slot_folder=str(folder),
            )
            yield Member(info, process)
        finally:
            process.kill()


class Talk:
    """A conversation as token ids, so that its length is exact."""

    def __init__(self, router: BookRouter, engine: EngineInfo, slot: int, length: int) -> None:
        self.router, self.engine, self.slot = router, engine, slot
        self.tokens = [3 + (slot * 7919 + at * 31) % 200 for at in range(length)]
        self.began = asyncio.Event()

    async def turn(self, *, n_predict: int = 4) -> Completion:
        """One more turn, wherever the router says that the conversation is; the reply joins the prompt."""
        name, slot = self.router.place(self.engine.name, self.slot)
        engine = self.router.known[name]
        lease = self.router.hold_slot(name, slot)
        assert lease is not None
        ids: list[int] = []
        last = None
        async with AsyncLlamaClient(engine.url, api_key=engine.api_key) as client:
            stream = client.complete_stream(
                self.tokens,
                id_slot=slot,
                n_predict=n_predict,
                temperature=0,
                ignore_eos=True,
                return_tokens=True,
                logit_bias=NO_HALF_CHARACTERS,
            )
            async for event in stream:
                self.began.set()
                ids += event.tokens
                last = event
        assert last is not None
        assert last.timings is not None
        self.tokens += [*ids, 9]  # what the user says next
        self.router.contents.pop((name, slot), None)
        self.router.contents[name, slot] = len(self.tokens) - 2
        self.router.release(lease)
        return Completion(text="", timings=last.timings, tokens=tuple(ids))

    async def reused_ratio(self) -> float:
        """Of the prefix that was computed before, the part that the next turn finds cached."""
        prefix = len(self.tokens) - 2
        return (await self.turn()).timings.cache_n / prefix
