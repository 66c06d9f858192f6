"""Carries one request to an engine and its answer back, byte for byte.

Flow: claim a slot -> send -> head -> body, one ASGI send for each wake-up -> give the slot back. An attempt that fails
is repeated on another engine as long as the client cannot have seen a byte of it; later failures break the client's
connection, so that nobody takes a part for the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lltm_ray.errors import EngineExitedError, EngineNotReadyError
from lltm_ray.gateway.headers import build_request, downstream_headers, find, upstream_headers
from lltm_ray.gateway.join import Joiner, UnjoinableError, may_hold_back
from lltm_ray.gateway.replies import JSON
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.upstream import ConnectFailedError, Connection, Headers, UpstreamBrokenError, UpstreamPool
from lltm_ray.records import EngineInfo
from lltm_ray.routing.router import Lease, Router

WHOLE_BYTES = 2**20
"""Answers of a known length up to this are read to their end before the first byte is sent, so they can be retried."""
JOINED_BYTES = 64 * 2**20
"""Longest stream that is joined to a whole answer."""
_EVENTS = b"text/event-stream"
_OF_STREAMS = (b"content-type", b"content-length", b"cache-control", b"x-accel-buffering")
_MAX_BREAKS = 2
"""Engines that may break off one request: the first could have been ill, a second says that the request is."""


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
        breaks = 0
        record = request.record
        while True:
            engine, lease = await self._claim(request, tried, needs_slot=needs_slot)
            record.attempts += 1
            record.engine, record.model = engine.name, engine.model
            try:
                await self._attempt(request, engine, lease)
                return
            except UnjoinableError:
                request.streamed = None
            except (ConnectFailedError, UpstreamBrokenError, _LoadingError) as error:
                record.error = str(error)
                breaks += isinstance(error, UpstreamBrokenError)
                self._router.suspect(engine)
                if request.is_started:
                    raise EngineExitedError(engine.name) from error
                if request.once or record.attempts >= self._max_attempts or breaks == _MAX_BREAKS:
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
        data = build_request(method, request.target, engine.url, headers, request.streamed or request.body)
        connection = await self._pool.open(engine.url, data, fresh=request.once)
        try:
            if connection.status == 503 and request.record.attempts < self._max_attempts:
                raise _LoadingError("its server is loading (503)")
            if request.streamed is not None and _is_event_stream(connection):
                await self._join(request, engine, connection, lease)
            elif connection.content_length is not None and connection.content_length <= WHOLE_BYTES:
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
        await self._start(request, engine, connection.status, connection.headers)
        await request.send({"type": "http.response.body", "body": body})

    async def _join(self, request: Request, engine: EngineInfo, connection: Connection, lease: Lease | None) -> None:
        joiner = Joiner(request.path, has_stops=may_hold_back(request.path, request.body_json))
        size_bytes = 0
        while part := await connection.read():
            if not size_bytes:
                request.record.ttft_s = self._clock() - request.arrived_at
            size_bytes += len(part)
            if size_bytes > JOINED_BYTES:
                raise UpstreamBrokenError(f"the answer is longer than {JOINED_BYTES} bytes")
            joiner.feed(part)
        status, body = joiner.finish()
        if lease is not None:
            self._router.release(lease)
        self._note(request, body)
        await self._start(request, engine, status, _whole_headers(connection.headers, len(body)))
        await request.send({"type": "http.response.body", "body": body})

    async def _stream(self, request: Request, engine: EngineInfo, connection: Connection, lease: Lease | None) -> None:
        part = await connection.read()
        self._note(request, part, is_first=True)
        await self._start(request, engine, connection.status, connection.headers)
        send = request.send
        while not connection.is_drained:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            part = await connection.read()
            self._note(request, part)
        if lease is not None:
            self._router.release(lease)
        await send({"type": "http.response.body", "body": part})

    async def _start(self, request: Request, engine: EngineInfo, status: int, headers: Headers) -> None:
        request.begin(status)
        request.record.error = ""
        head = downstream_headers(headers, engine.name, request.id)
        await request.send({"type": "http.response.start", "status": status, "headers": head})

    def _note(self, request: Request, part: bytes, *, is_first: bool = False) -> None:
        record = request.record
        record.bytes_sent += len(part)
        request.ends.add(part)
        if is_first:
            record.ttft_s = self._clock() - request.arrived_at


def _is_event_stream(connection: Connection) -> bool:
    return connection.status == 200 and (find(connection.headers, b"content-type") or b"").startswith(_EVENTS)


def _whole_headers(headers: Headers, size_bytes: int) -> Headers:
    """A stream's headers as the whole answer has them."""
    kept = [pair for pair in headers if pair[0] not in _OF_STREAMS]
    return [*kept, (b"content-type", JSON), (b"content-length", str(size_bytes).encode("ascii"))]
