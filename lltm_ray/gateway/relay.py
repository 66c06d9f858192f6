"""Carries requests to engines: claims a slot, tries, tries elsewhere, and goes on elsewhere.

An attempt that fails is repeated on another engine as long as the client cannot have seen a byte of it. A stream that
breaks later is continued on another engine where that can be done exactly; everything else breaks the client's
connection, so that nobody takes a part for the whole.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import aclosing

from lltm_ray.config import GatewayConfig
from lltm_ray.errors import EngineExitedError, EngineNotReadyError, LltmRayError, OverloadedError
from lltm_ray.gateway.exchange import Common, Confirm, Exchange, LoadingError, Warm
from lltm_ray.gateway.failover import Continuation
from lltm_ray.gateway.join import UnjoinableError
from lltm_ray.gateway.linger import Lingerer
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.tap import StreamTap, is_eligible
from lltm_ray.gateway.upstream import ConnectFailedError, UpstreamBrokenError
from lltm_ray.records import EngineInfo
from lltm_ray.routing.ledger import Attempt, Ledger
from lltm_ray.routing.ledger.entry import Outcome
from lltm_ray.routing.router import Lease, Router
from lltm_ray.routing.tries import Tries

_FAILED = (ConnectFailedError, UpstreamBrokenError, LoadingError)


class Relay:
    """Forwards requests to engines.

    Args:
        router: chooses the engine.
        pool: connections to the engines' servers.
        config: how many engines are tried for one request, and whether broken streams are continued elsewhere.
        ledger: the account; None keeps none.
        confirm: told what each answer reused.
        warm: makes a claimed slot ready before its request is sent.
        clock: monotonic seconds.
    """

    def __init__(  # noqa: PLR0913 - what it works with, by name
        self,
        router: Router,
        pool: UpstreamPool,
        config: GatewayConfig,
        *,
        ledger: Ledger | None = None,
        confirm: Confirm | None = None,
        warm: Warm | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = router
        self._pool = pool
        self._max_attempts = config.max_attempts
        self._failover = config.failover
        self._ledger = ledger
        self._common = Common(router, clock, confirm, warm, config.failover_chat_ids)
        self._clock = clock
        self._lingerer = Lingerer(router, pool)

    def close(self) -> None:
        """Wait for no engine any more."""
        self._lingerer.close()

    async def forward(self, request: Request) -> None:
        """Answer a request from an engine.

        Raises:
            LltmRayError: what `Router.acquire` raises; `EngineNotReadyError` when all attempts failed before the first
                byte; `EngineExitedError` when one failed after it and none could go on, for the ASGI host to close the
                connection.
        """
        is_pinned = request.only is not None
        tries = Tries(self._router, self._max_attempts, is_pinned=is_pinned, ask=request.ask, clock=self._clock)
        record = request.record
        while True:
            engine, lease, attempt = await self._begin(request, tries.avoid)
            exchange = Exchange(request, engine, lease, attempt, self._common)
            try:
                await exchange.run(self._pool, may_load=tries.is_last, failover=self._failover)
                attempt.outcome = Outcome.of_status(record.status)
                return
            except UnjoinableError:
                request.streamed = None
                attempt.outcome, attempt.is_estimate = Outcome.RETRIED, True
            except _FAILED as error:
                record.error = str(error)
                _note_failure(tries, engine, error)
                attempt.outcome, attempt.is_estimate = Outcome.FAILED, isinstance(error, UpstreamBrokenError)
                if request.is_started:
                    _note_cut(request, attempt, exchange)
                    self._release(lease)
                    if request.trace is not None:
                        request.trace.end()
                    await self._go_on(request, engine, attempt, exchange.tap, tries, error)
                    return
                if request.once or tries.is_over:
                    raise EngineNotReadyError(engine.name, f"unreachable: {error}") from error
                attempt.outcome = Outcome.RETRIED
            finally:
                self._end(request, lease, attempt, exchange)

    async def _begin(self, request: Request, avoid: set[str]) -> tuple[EngineInfo, Lease | None, Attempt]:
        """Claim a slot, or choose an engine where none is needed, and open the attempt's line in the account."""
        record, lease = request.record, None
        if request.ask is None:
            engine = self._router.pick(request.model, only=request.only, exclude=avoid)
            attempt = Attempt(engine=engine.name)
        else:
            asked_at = self._clock()
            seen = request.trace.attempt(asked_at) if request.trace is not None else None
            try:
                lease = await self._router.acquire(request.ask, exclude=avoid)
            except OverloadedError:
                record.model = request.ask.model  # by now the served name, and whose load it was
                raise
            engine = lease.engine
            granted_at = self._clock()
            attempt = _attempt_of(lease, granted_at - asked_at)
            if seen is not None:
                seen.sent_at = granted_at
            record.queue_s += attempt.queue_s
            entry = request.entry
            request.choice = request.choice or lease.choice
            entry.model = lease.model
            self._open(request, attempt)
        record.attempts += 1
        record.engine, record.model = engine.name, engine.model
        return engine, lease, attempt

    def _open(self, request: Request, attempt: Attempt) -> None:
        if self._ledger is not None:
            self._ledger.begin(request.entry, attempt)
        else:
            request.entry.attempts.append(attempt)

    def _release(self, lease: Lease | None) -> None:
        if lease is not None:
            self._router.release(lease)

    def _end(self, request: Request, lease: Lease | None, attempt: Attempt, exchange: Exchange) -> None:
        """Give the slot back unless the answer's end did; where the engine goes on for nobody, when it has stopped."""
        if request.trace is not None:
            request.trace.end()
        if lease is None or lease.released:
            return
        if request.is_started:
            _note_cut(request, attempt, exchange)
        attempt.is_estimate = attempt.is_estimate or attempt.outcome == Outcome.OK
        if exchange.is_relayed and attempt.outcome == Outcome.OK:  # cut off from our side
            self._lingerer.hold(lease)
        else:
            self._router.release(lease)

    # --- after the first byte

    async def _go_on(
        self,
        request: Request,
        engine: EngineInfo,
        attempt: Attempt,
        tap: StreamTap | None,
        tries: Tries,
        error: Exception,
    ) -> None:
        """Continue a broken stream on other engines.

        Raises:
            EngineExitedError: it cannot be continued, or no other engine could.
        """
        if tap is None:
            reason = is_eligible(request.path, request.body_json)[1] if request.is_stream else "no stream"
            raise EngineExitedError(f"{engine.name} ({reason or 'failover is off'})") from error
        if tap.is_finished:
            await self._finish(request, tap.ending())
            attempt.outcome = Outcome.OK
            return
        can, why = tap.can_continue
        if not can:
            raise EngineExitedError(f"{engine.name} ({why})") from error
        if request.ask is not None:  # its answer has begun in time; to go on it may wait as long as anybody
            request.ask.deadline_s = math.inf
        continuation = Continuation(
            request.path, request.body_json, tap, self._pool, request_id=request.id, trace=request.trace
        )
        while tries.spent < tries.most:
            try:
                if await self._continue(request, continuation, tap, tries):
                    return
            except LltmRayError as refusal:
                raise EngineExitedError(f"{engine.name} ({refusal.message})") from refusal
        raise EngineExitedError(engine.name) from error

    async def _continue(self, request: Request, continuation: Continuation, tap: StreamTap, tries: Tries) -> bool:
        """One more engine; whether it brought the answer to its end."""
        broken = request.entry.attempts[-1]
        survivor, lease, attempt = await self._begin(request, tries.avoid)
        broken.outcome = Outcome.CONTINUED
        before = tap.delivered_tokens
        slot, lora = (lease.slot, lease.lora) if lease else (-1, b"")
        try:
            async with aclosing(continuation.on(survivor, id_slot=slot, lora=lora)) as parts:
                async for part in parts:
                    request.record.bytes_sent += len(part)
                    request.ends.add(part)
                    request.entry.cell.delivered(tap.position - before)
                    await request.send({"type": "http.response.body", "body": part, "more_body": True})
            await self._finish(request, b"")
            return True
        except _FAILED as error:
            _note_failure(tries, survivor, error)
            if tap.is_finished:  # it died between its last event and the end of its answer
                await self._finish(request, tap.ending())
                return True
            attempt.outcome = Outcome.FAILED
            return False
        except LltmRayError:
            attempt.outcome = Outcome.FAILED
            raise
        except asyncio.CancelledError:
            request.is_whole = tap.is_finished
            raise
        finally:
            if request.trace is not None:
                request.trace.running.is_continued = True
                request.trace.end()
            request.entry.is_exact = continuation.is_exact
            _account(attempt, continuation, tap.delivered_tokens - before)
            request.record.delivered_tokens = tap.delivered_tokens
            self._release(lease)

    async def _finish(self, request: Request, rest: bytes) -> None:
        request.record.error = ""
        await request.send({"type": "http.response.body", "body": rest})


def _note_failure(tries: Tries, engine: EngineInfo, error: Exception) -> None:
    is_reached = not isinstance(error, ConnectFailedError)
    tries.fail(engine, is_reached=is_reached, is_broken=isinstance(error, UpstreamBrokenError))


def _note_cut(request: Request, attempt: Attempt, exchange: Exchange) -> None:
    """What the client has of an answer that was cut off."""
    request.record.delivered_tokens = attempt.delivered_tokens = exchange.delivered_tokens
    attempt.generated_tokens = max(attempt.generated_tokens, attempt.delivered_tokens)


def _attempt_of(lease: Lease, queue_s: float) -> Attempt:
    return Attempt(
        engine=lease.engine.name,
        server_pid=lease.engine.server_pid or 0,
        slot=lease.slot,
        started_unix_nano=time.time_ns(),
        queue_s=queue_s,
        predicted_cached_tokens=lease.cached_tokens,
    )


def _account(attempt: Attempt, continuation: Continuation, delivered_tokens: int) -> None:
    """What the continuation knows of its last attempt."""
    told = continuation.attempts[-1] if continuation.attempts else None
    attempt.delivered_tokens = delivered_tokens
    attempt.generated_tokens = delivered_tokens + (told.wasted_tokens if told else 0)
    attempt.is_estimate = told is None or not told.is_whole
    if told is not None:
        attempt.cached_tokens, attempt.computed_tokens = told.cached_tokens, told.prompt_tokens - told.cached_tokens
