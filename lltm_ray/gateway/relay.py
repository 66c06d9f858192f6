"""Carries one request to an engine and its answer back, byte for byte.

Flow: claim a slot -> send -> head -> body, one ASGI send for each wake-up -> give the slot back. An attempt that fails
is repeated on another engine as long as the client cannot have seen a byte of it; later failures break the client's
connection, so that nobody takes a part for the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lltm_ray.errors import EngineExitedError, EngineNotReadyError
from lltm_ray.gateway.headers import build_request, downstream_headers, upstream_headers
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.upstream import ConnectFailedError, Connection, UpstreamBrokenError, UpstreamPool
from lltm_ray.records import EngineInfo
from lltm_ray.routing.router import Lease, Router

WHOLE_BYTES = 2**20
"""Answers of a known length up to this are read to their end before the first byte is sent, so they can be retried."""


class _LoadingError(Exception):
    """The engine's server answers 503: it still loads its model."""


class Relay:
    """Forwards requests to engines.

    Args:
        router: chooses the engine.
        pool: connections to the engines' servers.
        max_attempts: engines tried for one request.
        clock: monotonic seconds.
    """

    def __init__(
        self, router: Router, pool: UpstreamPool, *, max_attempts: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._router = router
        self._pool = pool
        self._max_attempts = max_attempts
        self._clock = clock

    async def forward(self, request: Request, *, needs_slot: bool = True) -> None:
        """Answer a request from an engine.

        Raises:
            LltmRayError: what `Router.acquire` raises; `EngineNotReadyError` when all attempts failed before the first
                byte; `EngineExitedError` when one failed after it, for the ASGI host to close the connection.
        """
        tried: set[str] = set()
        record = request.record
        while True:
            engine, lease = await self._claim(request, tried, needs_slot=needs_slot)
            record.attempts += 1
            record.engine, record.model = engine.name, engine.model
            try:
                await self._attempt(request, engine, lease)
                return
            except (ConnectFailedError, UpstreamBrokenError, _LoadingError) as error:
                record.error = str(error)
                self._router.suspect(engine.name)
                if request.is_started:
                    raise EngineExitedError(engine.name) from error
                if record.attempts >= self._max_attempts:
                    raise EngineNotReadyError(engine.name, f"unreachable: {error}") from error
                tried.add(engine.name)
            finally:
                if lease is not None:
                    self._router.release(lease)

    async def _claim(self, request: Request, tried: set[str], *, needs_slot: bool) -> tuple[EngineInfo, Lease | None]:
        if not needs_slot:
            return self._router.pick(request.model, only=request.only, exclude=tried), None
        asked_at = self._clock()
        lease = await self._router.acquire(request.model, exclude=tried, only=request.only)
        request.record.queue_s += self._clock() - asked_at
        return lease.engine, lease

    async def _attempt(self, request: Request, engine: EngineInfo, lease: Lease | None) -> None:
        headers = upstream_headers(request.headers, engine.api_key, request.id)
        method = request.method.encode("ascii")
        data = build_request(method, request.target, engine.url, headers, request.body)
        connection = await self._pool.open(engine.url, data)
        try:
            if connection.status == 503 and request.record.attempts < self._max_attempts:
                raise _LoadingError("its server is loading (503)")
            if connection.content_length is not None and connection.content_length <= WHOLE_BYTES:
                await self._send_whole(request, engine, connection, lease)
            else:
                await self._stream(request, engine, connection, lease)
        finally:
            self._pool.release(connection)

    async def _send_whole(
        self, request: Request, engine: EngineInfo, connection: Connection, lease: Lease | None
    ) -> None:
        body = await connection.read_all(WHOLE_BYTES)
        if lease is not None:
            self._router.release(lease)  # the slot is free now, however slowly the client reads
        self._note(request, body, is_first=True)
        await self._start(request, engine, connection)
        await request.send({"type": "http.response.body", "body": body})

    async def _stream(self, request: Request, engine: EngineInfo, connection: Connection, lease: Lease | None) -> None:
        part = await connection.read()
        self._note(request, part, is_first=True)
        await self._start(request, engine, connection)
        send = request.send
        while not connection.is_drained:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            part = await connection.read()
            self._note(request, part)
        if lease is not None:
            self._router.release(lease)
        await send({"type": "http.response.body", "body": part})

    async def _start(self, request: Request, engine: EngineInfo, connection: Connection) -> None:
        request.begin(connection.status)
        request.record.error = ""
        headers = downstream_headers(connection.headers, engine.name, request.id)
        await request.send({"type": "http.response.start", "status": connection.status, "headers": headers})

    def _note(self, request: Request, part: bytes, *, is_first: bool = False) -> None:
        record = request.record
        record.bytes_sent += len(part)
        request.ends.add(part)
        if is_first:
            record.ttft_s = self._clock() - request.arrived_at
