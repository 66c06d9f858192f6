"""Carries out what `lifecycle` decides: one llama-server child, watched, probed, restarted, ended.

All state is written on one event loop. The child is made and waited for by one thread, which therefore lives as long as
the child does (see `_child`), and reports to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lltm_ray.errors import EngineNotReadyError, EngineStartError, LltmRayError, UpstreamError
from lltm_ray.llamacpp import lifecycle
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.llamacpp.lifecycle import Event, Life
from lltm_ray.llamacpp.logfile import LogFile
from lltm_ray.records import EngineState

log = logging.getLogger(__name__)

PROBE_FIRST_S, PROBE_MAX_S = 0.05, 0.5
HEALTH_EVERY_S = 5.0
HUNG_AFTER_S = 30.0
"""A server that answers no /health for so long is killed and started again."""
TERMINATE_GRACE_S = 10.0
MAX_CONNECTIONS = 4096
"""No limit of ours: callers are bounded by slots, and a health check must never wait for them."""
_CHILD = str(Path(__file__).with_name("_child.py"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What to run and how to know it. `argv(port)` is the whole command line."""

    name: str
    argv: Callable[[int], list[str]]
    host: str
    model_path: str
    api_key: str = field(repr=False)
    key_file: Path
    """Where the server reads it; private, and gone once the engine is stopped for good."""
    log_path: Path
    start_timeout_s: float = 600.0
    restart_limit: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSnapshot:
    """The server as it is now."""

    state: EngineState
    url: str
    pid: int | None
    restarts: int
    detail: str


class ServerProcess:
    """One supervised llama-server. Make and use it on one event loop."""

    def __init__(self, spec: ServerSpec, on_change: Callable[[ServerSnapshot], None] = lambda _: None) -> None:
        self.spec = spec
        self.log = LogFile(spec.log_path)
        self._policy = lifecycle.Policy(restart_limit=spec.restart_limit)
        self._on_change = on_change
        self._life = Life()
        self._detail = ""
        self._port = 0
        self._is_port_anothers = self._met_stranger = False
        self._child: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._ready_since: float | None = None
        self._drain_timeout_s = 0.0
        self._client: AsyncLlamaClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def client(self) -> AsyncLlamaClient:
        """HTTP face of the running server, for new requests.

        Raises:
            EngineNotReadyError: it is not ready.
        """
        if self._client is None or self._life.state is not EngineState.READY:
            raise EngineNotReadyError(self.spec.name, self._life.state.value)
        return self._client

    def snapshot(self) -> ServerSnapshot:
        """State, address and pid."""
        running = self._child is not None
        return ServerSnapshot(
            state=self._life.state,
            url=f"http://{_bracketed(self.spec.host)}:{self._port}" if running else "",
            pid=self._child.pid if self._child else None,
            restarts=self._life.restarts,
            detail=self._detail or self._life.why,
        )

    async def ensure_ready(self) -> ServerSnapshot:
        """Start if needed and wait until the server is ready.

        Raises:
            EngineStartError: it ended or missed its deadline; carries the exit code and the log's tail.
            EngineNotReadyError: it was shut down for good, or stopped while we waited.
        """
        self._post(lifecycle.Start())
        moving = (EngineState.STARTING, EngineState.DRAINING, EngineState.STOPPING)
        await self._until(lambda: self._life.state not in moving)
        match self._life.state:
            case EngineState.READY:
                return self.snapshot()
            case EngineState.FAILED:
                why = ": ".join(filter(None, (self._life.why, self.log.remedy())))
                raise EngineStartError(why, self._exit_code, self.log.tail())
        raise EngineNotReadyError(self.spec.name, self._life.state.value)

    async def stop(self, *, drain_s: float = 0.0, for_good: bool = True) -> None:
        """End the server; with `drain_s`, busy slots may finish first for so many seconds."""
        self._drain_timeout_s = drain_s
        if drain_s:
            self._post(lifecycle.Drain())
            await self._until(lambda: self._life.state is not EngineState.DRAINING)
        self._post(lifecycle.Stop(for_good=for_good))
        await self._until(lambda: self._life.state in (EngineState.STOPPED, EngineState.FAILED))

    # the one writer ---------------------------------------------------------------------------------------------

    def _post(self, event: Event) -> None:
        before = self._life
        self._life, effects = lifecycle.step(self._life, event, self._policy)
        if self._life.state is not before.state:
            log.info("%s: %s -> %s %s", self.spec.name, before.state, self._life.state, self._life.why)
            self._ready_since = time.monotonic() if self._life.state is EngineState.READY else None
            self._detail = ""
        for effect in effects:
            self._carry_out(effect)
        if self._life != before:
            self._announce()

    def _announce(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._on_change(self.snapshot())

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            await waiter

    def _carry_out(self, effect: lifecycle.Effect) -> None:
        match effect:
            case lifecycle.Spawn():
                self._spawn()
            case lifecycle.ScheduleRestart(delay_s):
                asyncio.get_running_loop().call_later(delay_s, self._post, lifecycle.RestartDue())
            case lifecycle.AwaitIdle():
                self._run(self._await_idle())
            case lifecycle.Terminate():
                self._run(self._terminate())
            case lifecycle.Kill():
                self._signal("kill")

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._check_supervision)

    def _check_supervision(self, task: asyncio.Task[None]) -> None:
        """A server nobody watches any more must not look well."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: supervision failed", self.spec.name, exc_info=error)
            self._post(lifecycle.Unusable(f"supervision failed: {error!r}"))

    # effects ----------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        self._exit_code, self._is_port_anothers, loop = None, False, asyncio.get_running_loop()
        try:
            self._port = free_port(self.spec.host)
            argv = [sys.executable, "-I", "-S", _CHILD, str(os.getpid()), *self.spec.argv(self._port)]
        except (OSError, LltmRayError) as error:
            loop.call_soon(self._gone, None, str(error))
            return
        threading.Thread(target=self._keep, args=(argv, loop), name=f"keeper-{self.spec.name}", daemon=True).start()

    def _keep(self, argv: list[str], loop: asyncio.AbstractEventLoop) -> None:
        """On its own thread: make the child, wait for it, report both."""
        try:
            with self.log.open() as sink:
                child = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
                )
        except (OSError, ValueError) as error:
            _call(loop, self._gone, None, f"cannot start {argv[5]}: {error}")
            return
        _call(loop, self._made, child)
        child.wait()
        _call(loop, self._gone, child)

    def _made(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self._client = AsyncLlamaClient(self.snapshot().url, api_key=self.spec.api_key, max_connections=MAX_CONNECTIONS)
        if self._life.state is EngineState.STARTING:
            self._run(self._watch(child, self._client))
            self._announce()
        else:  # a Stop came while the thread was making it
            self._run(self._terminate())

    def _gone(self, child: subprocess.Popen[bytes] | None, error: str = "") -> None:
        """The child ended, or could not be made for the reason `error`."""
        self._exit_code = child.returncode if child else None
        for task in self._tasks:  # they all look after this child
            task.cancel()
        if self._client is not None:
            self._run(self._client.aclose())
        self._child, self._client = None, None
        ready_for_s = time.monotonic() - self._ready_since if self._ready_since else 0.0
        port_taken = self._exit_code not in (None, 0) and "bind" in self.log.tail(2048).lower()
        port_taken = port_taken or self._is_port_anothers
        self._post(
            lifecycle.Exited(exit_code=self._exit_code, ready_for_s=ready_for_s, port_taken=port_taken, error=error)
        )

    async def _watch(self, child: subprocess.Popen[bytes], client: AsyncLlamaClient) -> None:
        """For as long as this child lives: probe until ready, then health, load progress and the log's size."""
        await self._probe(child, client)
        answered = time.monotonic()
        while self._child is child and self._life.state in (EngineState.READY, EngineState.DRAINING):
            await asyncio.sleep(HEALTH_EVERY_S)
            self.log.rotate()
            with contextlib.suppress(LltmRayError, TimeoutError):  # a miss shows as the time since the last answer
                await asyncio.wait_for(_health(client), HEALTH_EVERY_S)
                answered = time.monotonic()
            if time.monotonic() - answered > HUNG_AFTER_S and self._child is child:
                self._post(lifecycle.Unusable(f"no answer to /health for {HUNG_AFTER_S:.0f} s"))
                return

    async def _probe(self, child: subprocess.Popen[bytes], client: AsyncLlamaClient) -> None:
        deadline = time.monotonic() + self.spec.start_timeout_s
        pause = PROBE_FIRST_S
        while self._child is child and self._life.state is EngineState.STARTING:
            try:
                if await asyncio.wait_for(_health(client), 5.0):
                    await self._identify(client)
                    return
            except (LltmRayError, TimeoutError) as error:
                log.debug("%s: not ready yet: %s", self.spec.name, error)
            if time.monotonic() > deadline:
                self._post(lifecycle.Unusable(f"not ready after {self.spec.start_timeout_s:g} s"))
                return
            self._report_progress()
            await asyncio.sleep(pause)
            pause = min(PROBE_MAX_S, pause * 1.5)

    async def _identify(self, client: AsyncLlamaClient) -> None:
        """Make sure that who answers is our child: it takes our random key and serves our file.

        Another program, which took the port before our child could, costs it a start on another port and no more. Who
        refuses our key is one; who answers something else may be our own, with a fault that no other start mends.
        """
        try:
            served = str((await client.props()).get("model_path", ""))
        except UpstreamError as error:
            self._meet_stranger(is_sure=error.http_status in (401, 403))
            self._post(lifecycle.Unusable(f"another program answers on port {self._port}: {error}"))
            return
        if not _same_file(served, self.spec.model_path):
            if not served:
                self._meet_stranger(is_sure=False)
            self._post(lifecycle.Unusable(f"port {self._port} serves {served}, not {self.spec.model_path}"))
            return
        self._post(lifecycle.BecameReady())

    def _meet_stranger(self, *, is_sure: bool) -> None:
        self._is_port_anothers = is_sure or not self._met_stranger
        self._met_stranger = True

    def _report_progress(self) -> None:
        progress = self.log.load_progress()
        detail = "loading" if progress is None else f"loading {progress:.0%}"
        if detail != self._detail and self._life.state is EngineState.STARTING:
            self._detail = detail
            self._on_change(self.snapshot())

    async def _await_idle(self) -> None:
        deadline, client = time.monotonic() + self._drain_timeout_s, self._client
        try:
            while client and time.monotonic() < deadline and self._life.state is EngineState.DRAINING:
                if not any(slot.is_processing for slot in await client.slots()):
                    break
                await asyncio.sleep(0.1)
        except LltmRayError as error:
            log.warning("%s: cannot see its slots, so it is not drained: %s", self.spec.name, error)
        finally:
            self._post(lifecycle.Drained())

    async def _terminate(self) -> None:
        child = self._child
        self._signal("terminate")
        if child is not None:
            await asyncio.sleep(TERMINATE_GRACE_S)
            if self._child is child:
                log.warning("%s: ignored SIGTERM for %s s, killing it", self.spec.name, TERMINATE_GRACE_S)
                self._signal("kill")

    def _signal(self, how: str) -> None:
        if self._child is not None:
            getattr(self._child, how)()  # Popen knows whether the pid is still ours


def free_port(host: str) -> int:
    """A port nobody listens on now. Someone else may take it first: the server then ends and gets another."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


async def _health(client: AsyncLlamaClient) -> bool:
    return (await client.health()).status == "ok"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _call(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
        loop.call_soon_threadsafe(what, *args)
