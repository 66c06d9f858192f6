"""EngineActor: one llama-server on one GPU share.

It starts its server by itself, also when Ray has restarted it, and tells the directory about every change.
`Engine` is the plain object; the actor only names its methods for Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from lltm_ray._turns import Messages
from lltm_ray.actors.engine_adapters import AdapterCalls, EngineAdapters
from lltm_ray.actors.engine_trace import Carrier, EngineTrace
from lltm_ray.actors.launch import EngineSpec, Launch, plan_launch, slot_seal
from lltm_ray.actors.orphan import end_this_actor, until_orphaned
from lltm_ray.actors.remote import is_revived, node_ip
from lltm_ray.actors.watch import HEARTBEAT_S, PROPAGATE_S, get_directory, keep_going, watch_fleet
from lltm_ray.errors import (
    DeadlineError,
    EngineExitedError,
    EngineNotReadyError,
    EngineStartError,
    LltmRayError,
    OverloadedError,
)
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.llamacpp.options import settle
from lltm_ray.llamacpp.process import ServerProcess, ServerSnapshot
from lltm_ray.llamacpp.slot_folder import OwnedFolder
from lltm_ray.records import Completion, Embeddings, EngineInfo, EngineState, RerankHit, SlotState, StreamEvent

if TYPE_CHECKING:
    from lltm_ray.actors.sender import Sender

log = logging.getLogger(__name__)

RETRY_START_S = 5.0
CALL_TIMEOUT_S = 3600.0
OWN = ("timeout_s", "carrier")  # arguments of an engine's calls that are no fields of the routes
MAX_WAITING = 1000
"""Calls that may wait for a slot of one engine."""


class Engine:
    """One server of a fleet: planned, started, supervised and described."""

    def __init__(self, spec: EngineSpec, *, node_id: str, address: str, tell: Callable[[EngineInfo], None]) -> None:
        self.spec = spec
        self._tell = tell
        self._server: ServerProcess | None = None
        self._fitted = ""
        self._slots_folder: OwnedFolder | None = None
        self._slots, self._slots_total, self._calls = asyncio.Semaphore(1), 1, 0
        self._starting: asyncio.Task[None] | None = None
        self.trace = EngineTrace(self, None)
        self.adapters = EngineAdapters(self)
        self._closed = self._is_restarting = False
        self._restarting = asyncio.Lock()
        self._info = EngineInfo(
            name=spec.name,
            model=spec.fleet.served_name or spec.fleet.model,
            state=EngineState.STARTING,
            node_id=node_id,
            node_ip=address,
            gpu_ids=tuple(int(gpu) for gpu in ray.get_gpu_ids()),
            share=spec.share,
            actor_pid=os.getpid(),
        )

    @property
    def info(self) -> EngineInfo:
        """What the directory is told."""
        return self._info

    @asynccontextmanager
    async def slot(self, timeout_s: float) -> AsyncIterator[AsyncLlamaClient]:
        """The server's HTTP face for one request that occupies a slot.

        Calls beyond the slots wait here and not in the server: there each would hold an HTTP thread, and /health,
        which tells a busy server from a hung one, needs one too. The deadline holds here as well as at the caller: a
        driver that was killed cancels nothing.

        Raises:
            OverloadedError: too many calls wait; more would keep Ray from delivering `stop` and `info`.
            DeadlineError: not done within `timeout_s`.
        """
        if self._calls >= self._slots_total + MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} calls wait for engine {self.spec.name}", retry_after_s=1.0)
        self._calls += 1
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                yield self.client
        except TimeoutError:
            raise DeadlineError(f"a call on engine {self.spec.name}", timeout_s) from None
        except EngineExitedError as error:  # the client does not know whose server it talks to
            raise EngineExitedError(self.spec.name, error.exit_code) from None
        except EngineNotReadyError as error:
            raise EngineNotReadyError(self.spec.name, error.state) from None
        finally:
            self._calls -= 1

    @property
    def client(self) -> AsyncLlamaClient:
        """The running server's HTTP face; raises EngineNotReadyError."""
        if self._server is None:
            raise EngineNotReadyError(self.spec.name, self._info.state.value)
        return self._server.client

    async def ensure_ready(self) -> EngineInfo:
        """Plan and start once, whoever asks; everyone who waits gets the same outcome."""
        if self._closed:
            raise EngineNotReadyError(self.spec.name, "stopped for good")
        if self._starting is None or self._starting.done():
            self._starting = asyncio.get_running_loop().create_task(self._start())
        await asyncio.shield(self._starting)
        return self._info

    async def keep_ready(self) -> None:
        """After Ray restarted the actor nobody waits for it, so it tries by itself until it stands."""
        while not self._closed:
            try:
                await self.ensure_ready()
                return
            except LltmRayError as error:
                log.warning("%s: not up again yet: %s", self.spec.name, error)
                await asyncio.sleep(RETRY_START_S)

    async def stop(self, drain_s: float) -> None:
        """Finish running requests for up to `drain_s`, then end the server for good."""
        self._closed = True
        await self._end_server(drain_s)
        self.update(state=EngineState.STOPPED)

    async def restart(self, drain_s: float) -> EngineInfo:
        """Another server, with the adapters that the fleet wants now; routers send nothing from the first moment on.

        Running requests have `drain_s` to finish. Of several restarts each waits for the one before.
        """
        async with self._restarting:
            if self._closed:
                raise EngineNotReadyError(self.spec.name, "stopped for good")
            self._is_restarting = True
            try:
                self.update(state=EngineState.STARTING, detail="restarts with other adapters")
                await asyncio.sleep(PROPAGATE_S)
                await self._end_server(drain_s)
            finally:
                self._is_restarting = False
            return await self.ensure_ready()

    async def _end_server(self, drain_s: float) -> None:
        server = self._server
        if server is not None:
            await server.stop(drain_s=drain_s)
            server.spec.key_file.unlink(missing_ok=True)
            self._server = None
        if self._slots_folder is not None:
            await asyncio.to_thread(self._slots_folder.remove)

    async def _start(self) -> None:
        began_unix_nano = time.time_ns()
        try:
            if self._server is None:
                self.spec = await self.adapters.dress(self.spec)
                host = "127.0.0.1" if self.spec.is_local(self._info.node_id) else self._info.node_ip
                progress = self._download_progress()
                self._server = self._adopt(
                    await asyncio.to_thread(plan_launch, self.spec, host=host, progress=progress)
                )
            if self._closed:  # stopped while we planned
                raise EngineNotReadyError(self.spec.name, "stopped for good")
            await self._server.ensure_ready()
            self.trace.loaded(began_unix_nano)
        except LltmRayError as error:
            self.update(state=EngineState.STOPPED if self._closed else EngineState.FAILED, detail=error.message)
            self.trace.loaded(began_unix_nano, error.message)
            raise
        except Exception as error:  # the actor's border: a full disk, a folder that cannot be written, ...
            log.exception("%s: cannot be started", self.spec.name)
            self.update(state=EngineState.FAILED, detail=repr(error))
            raise EngineStartError(repr(error)) from error

    def _adopt(self, launch: Launch) -> ServerProcess:
        embeds = self.spec.fleet.engine.embeddings
        kinds = [name for name, on in (("embeddings", embeds), ("rerank", self.spec.fleet.engine.reranking)) if on]
        self._fitted, self.adapters.model_path = launch.detail, launch.model.path
        self._slots_folder = launch.slots
        self._slots_total = launch.plan.n_parallel
        self._slots = asyncio.Semaphore(self._slots_total)
        self.update(
            model=launch.served_name,
            api_key=launch.server.api_key,
            slots_total=launch.plan.n_parallel,
            n_ctx=launch.plan.n_ctx,
            n_gpu_layers=launch.plan.n_gpu_layers,
            capabilities=tuple(kinds) or ("completion",),
            slot_folder=launch.slot_folder,
            slot_seal=slot_seal(self.spec.fleet.engine, launch.model.path, launch.server.argv(0)[0]),
            has_own_slot_folder=launch.slots is not None,
            cache_ram_tokens=launch.cache_ram_tokens,
            slot_similarity_ratio=launch.slot_similarity_ratio,
            kv_unified=self.spec.fleet.engine.kv_unified,
            adapters=self.adapters.worn,
        )
        return ServerProcess(launch.server, self._on_change)

    def _on_change(self, now: ServerSnapshot) -> None:
        state = EngineState.STARTING if self._is_restarting else now.state
        self.update(state=state, url=now.url, server_pid=now.pid, detail=now.detail or self._fitted)
        self.adapters.server_is(state)

    def update(self, **changes: Any) -> None:
        """Say something new of it to whoever follows."""
        self._info = self._info.with_(**changes)
        self._tell(self._info)

    def _download_progress(self) -> Callable[[str, int, int], None]:
        """Called in the planning thread, often; passed on to the loop twice a second at most."""
        loop, last = asyncio.get_running_loop(), 0.0

        def report(name: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                share = f"{done / total:.0%} of " if total else ""
                shown = f"downloading {name}: {share}{(total or done) / 2**20:,.0f} MiB"
                loop.call_soon_threadsafe(lambda: self.update(detail=shown))

        return report


class EngineActor(AdapterCalls):
    """Handle methods: `chat, complete, stream, embed, rerank, tokenize, detokenize, slots, health, info, stop`."""

    def __init__(self, spec: EngineSpec) -> None:
        context = ray.get_runtime_context()
        self._directory = get_directory(spec.fleet.name)
        self._engine = Engine(spec, node_id=context.get_node_id(), address=node_ip(), tell=self._register)
        sender = _make_sender(spec)
        self._trace = self._engine.trace = EngineTrace(self._engine, sender)
        loop = asyncio.get_running_loop()
        works = [self._live(revived=is_revived() or spec.starts_itself), self._end_with_fleet()]
        if sender is not None:
            works += [keep_going("send telemetry", sender.run), keep_going("learn the fleet's salt", self._learn_salt)]
        self._tasks = [loop.create_task(work) for work in works]

    async def ensure_ready(self) -> EngineInfo:
        """Start if needed, wait until ready; raises what kept it from starting."""
        return await self._engine.ensure_ready()

    async def chat(
        self,
        messages: str | Messages,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        carrier: Carrier | None = None,
        **params: Any,
    ) -> Completion:
        """One chat answer; `params` as in llama-server's /v1/chat/completions, `carrier` as in W3C Trace Context."""
        asked = {"messages": messages} | settle("/v1/chat/completions", params, OWN)
        async with self._trace.call("/v1/chat/completions", timeout_s, asked, carrier) as (client, seen):
            seen.see(done := await client.chat(messages, **params))
            return replace(done, engine=self._engine.spec.name)

    async def complete(
        self,
        prompt: str | list[int],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        carrier: Carrier | None = None,
        **params: Any,
    ) -> Completion:
        """One completion of a raw prompt; `params` as in llama-server's /completion, `max_tokens` works too."""
        asked = {"prompt": prompt} | settle("/completion", params, OWN)
        async with self._trace.call("/completion", timeout_s, asked, carrier) as (client, seen):
            seen.see(done := await client.complete(prompt, **params))
            return replace(done, engine=self._engine.spec.name)

    async def stream(
        self,
        messages: str | Messages,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        carrier: Carrier | None = None,
        **params: Any,
    ) -> AsyncIterator[StreamEvent]:
        """A chat answer event by event; closing the generator frees the slot."""
        asked = {"messages": messages} | settle("/v1/chat/completions", params, OWN)
        async with (
            self._trace.call("/v1/chat/completions", timeout_s, asked, carrier, is_stream=True) as (client, seen),
            aclosing(client.chat_stream(messages, **params)) as events,
        ):
            async for event in events:
                seen.see(event)
                yield replace(event, engine=self._engine.spec.name)

    async def embed(
        self,
        texts: str | list[str],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        carrier: Carrier | None = None,
        **params: Any,
    ) -> Embeddings:
        """One vector for each text; the fleet must serve embeddings."""
        asked = settle("/v1/embeddings", params, OWN)
        async with self._trace.call("/v1/embeddings", timeout_s, asked, carrier) as (client, seen):
            seen.see(done := await client.embed(texts, **params))
            return replace(done, engine=self._engine.spec.name)

    async def rerank(
        self,
        query: str,
        documents: list[str],
        top_n: int | None = None,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        carrier: Carrier | None = None,
    ) -> tuple[RerankHit, ...]:
        """Documents by relevance; the fleet must serve a reranker."""
        async with self._trace.call("/v1/rerank", timeout_s, {}, carrier) as (client, _):
            return await client.rerank(query, documents, top_n=top_n)

    async def tokenize(self, text: str, **params: Any) -> tuple[int, ...]:
        """Token ids of a text."""
        return await self._engine.client.tokenize(text, **params)

    async def count_tokens(self, messages: str | Messages) -> int:
        """Tokens of chat messages as the model's template writes them."""
        prompt = await self._engine.client.apply_template(messages)
        return len(await self._engine.client.tokenize(prompt, add_special=True, parse_special=True))

    async def detokenize(self, tokens: list[int]) -> str:
        """Text of token ids."""
        return await self._engine.client.detokenize(tokens)

    async def slots(self) -> tuple[SlotState, ...]:
        """The server's slots now."""
        return await self._engine.client.slots()

    async def health(self) -> bool:
        """Whether the server answers that it can serve."""
        return (await self._engine.client.health()).status == "ok"

    async def info(self) -> EngineInfo:
        """As the directory knows it."""
        return self._engine.info

    async def stop(self, drain_s: float = 0.0) -> None:
        """Let running requests finish for up to `drain_s`, then end the server; the actor stays to answer `info`."""
        await self._engine.stop(drain_s)

    async def _was_stopped(self) -> bool:
        async with aclosing(watch_fleet(self._engine.spec.fleet.name)) as tables:
            before = (await anext(tables)).engines
        return [engine.state for engine in before if engine.name == self._engine.spec.name] == [EngineState.STOPPED]

    def _register(self, info: EngineInfo) -> None:
        self._directory.register.remote(info)

    async def _end_with_fleet(self) -> None:
        spec = self._engine.spec
        await until_orphaned(spec.fleet.name, spec.run_id)
        log.warning("%s ends itself: fleet %r is gone", spec.name, spec.fleet.name)
        await self._engine.stop(0.0)
        await asyncio.to_thread(end_this_actor)

    async def _learn_salt(self) -> None:
        async with aclosing(watch_fleet(self._engine.spec.fleet.name)) as tables:
            async for table in tables:
                if table.salt:
                    self._trace.salt = table.salt
                    return

    async def _live(self, *, revived: bool) -> None:
        """Heartbeats; and after Ray restarted us the server again, unless the fleet had stopped it."""
        if revived and not await self._was_stopped():
            self._revival = asyncio.get_running_loop().create_task(self._engine.keep_ready())
        while True:
            self._register(self._engine.info)
            await asyncio.sleep(HEARTBEAT_S)


def _make_sender(spec: EngineSpec) -> Sender | None:
    if spec.fleet.telemetry is None or not spec.fleet.telemetry.enabled:
        return None
    from lltm_ray.actors.sender import Sender  # with telemetry off a process does without pyarrow

    return Sender(spec.fleet.name, spec.name)
