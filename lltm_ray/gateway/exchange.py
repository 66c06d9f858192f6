"""One request on one engine: sent, and its answer brought to the client, byte for byte.

Three ways for the answer: whole (it has a length), joined (asked for as a stream so that the engine notices a client
that leaves, put together again), streamed (one ASGI send for each wake-up). What the answer tells of its slot is kept
in `served`; the claim is given back as soon as the engine is done, however slowly the client reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from lltm_ray.gateway.accounting import count_events, is_several
from lltm_ray.gateway.headers import build_request, downstream_headers, find, upstream_headers
from lltm_ray.gateway.join import Joiner, may_hold_back
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.replies import JSON
from lltm_ray.gateway.request import Request
from lltm_ray.gateway.tap import StreamTap, ask_details, is_eligible, kind_of
from lltm_ray.gateway.upstream import Connection, Headers, UpstreamBrokenError
from lltm_ray.records import EngineInfo, Timings, timings_from
from lltm_ray.routing.ledger import Attempt
from lltm_ray.routing.prompt import reply_key
from lltm_ray.routing.router import Lease, Router, Served

WHOLE_BYTES = 2**20
"""Answers of a known length up to this are read to their end before the first byte is sent, so they can be retried."""
JOINED_BYTES = 64 * 2**20
"""Longest stream that is joined to a whole answer."""
_EVENTS = b"text/event-stream"
_OF_STREAMS = (b"content-type", b"content-length", b"cache-control", b"x-accel-buffering")


Confirm = Callable[[str, int, int, int], None]
"""Told engine, slot, cached and expected tokens of an answer; see `Migrator.confirm`."""
Warm = Callable[[Lease], Awaitable[None]]
"""Makes a claimed slot ready for its request; see `Shelf.warm`."""


class LoadingError(Exception):
    """The engine's server answers 503: it still loads its model."""


@dataclass(frozen=True, slots=True)
class Common:
    """What all exchanges of a relay share."""

    router: Router
    """Takes slots back."""
    clock: Callable[[], float] = time.monotonic
    confirm: Confirm | None = None
    warm: Warm | None = None
    chat_ids: bool = False
    """Whether streamed chats are asked for their token ids; see `GatewayConfig.failover_chat_ids`."""


class Exchange:
    """One attempt at a request.

    Args:
        request: the request.
        engine: where it goes.
        lease: its slot; None for what needs none.
        attempt: its line in the account.
        common: what it shares with the others.
    """

    def __init__(
        self,
        request: Request,
        engine: EngineInfo,
        lease: Lease | None,
        attempt: Attempt,
        common: Common,
    ) -> None:
        self._request = request
        self._engine = engine
        self._lease = lease
        self._attempt = attempt
        self._seen = request.trace.running if request.trace is not None else None
        self._router = common.router
        self._clock = common.clock
        self._confirm = common.confirm
        self._warm = common.warm
        self._chat_ids = common.chat_ids
        self._events = 0
        self._is_counted = self._is_sending = self._is_closed = False
        self._text: str | None = None
        self.tap: StreamTap | None = None
        self.is_relayed = request.streamed is None and not request.is_stream
        """Asked for whole and sent on as such: the engine will not notice when the client leaves."""

    @property
    def delivered_tokens(self) -> int:
        """Tokens of a stream that went to the client so far, of one without a tap about so many; 0 of other answers."""
        return self.tap.delivered_tokens if self.tap is not None else self._events

    async def run(self, pool: UpstreamPool, *, may_load: bool, failover: bool) -> None:
        """Send the request, bring the answer.

        Args:
            pool: connections to engines.
            may_load: whether an answer of 503 may be passed on.
            failover: whether a stream should tell what another engine needs to go on.

        Raises:
            LoadingError: a 503, and it may not.
            ConnectFailedError, UpstreamBrokenError, UnjoinableError: the attempt failed.
        """
        request = self._request
        if self._lease is not None and self._warm is not None and _may_reuse(request.body_json):
            await self._warm(self._lease)
            self._attempt.predicted_cached_tokens = self._lease.cached_tokens
        trace = request.trace.headers() if request.trace is not None else None
        headers = upstream_headers(request.headers, self._engine.api_key, request.id, trace)
        body = self._body(failover=failover)
        data = build_request(request.method.encode("ascii"), request.target, self._engine.url, headers, body)
        connection = await pool.open(self._engine.url, data, fresh=request.once)
        if request.trace is not None:
            request.trace.saw_head()
        try:
            if connection.status == 503 and not may_load:
                raise LoadingError("its server is loading (503)")
            is_events = self._is_counted = _is_event_stream(connection)
            if request.streamed is not None and is_events:
                await self._join(connection)
            elif connection.content_length is not None and connection.content_length <= WHOLE_BYTES:
                await self._send_whole(connection)
            else:
                self.tap = self.tap if is_events else None
                await self._send_stream(connection)
        finally:
            pool.release(connection)

    def _body(self, *, failover: bool) -> bytes:
        """The request's own bytes, with adapters, slot and what the tap needs spliced in."""
        request, lease = self._request, self._lease
        data = request.streamed or request.body
        slot = lease.slot if lease is not None else -1
        fields = request.body_json
        if not isinstance(fields, dict) or not fields:
            return data
        if lease is not None and lease.engine.adapters:
            data = splice(data, lease.lora)
        if failover and request.is_stream and is_eligible(request.path, fields)[0]:
            has_ids = self._chat_ids or kind_of(request.path) != "chat"
            self.tap = StreamTap(request.path, fields, details=has_ids)
            if has_ids:
                return ask_details(request.path, fields, data, slot)
        if slot < 0:
            return data
        return splice(data, b'"id_slot":%d' % slot)

    # --- the answer's three ways

    async def _send_whole(self, connection: Connection) -> None:
        body = await connection.read_all(WHOLE_BYTES)
        self._note(body, is_first=True)
        if self._request.keep is not None and self._lease is not None and connection.status == 200:
            await self._request.keep(self._lease)
        self.close(is_good=connection.status == 200)
        await self._request.answer(connection.status, self._head(connection.headers), body)

    async def _join(self, connection: Connection) -> None:
        request = self._request
        joiner = Joiner(request.path, has_stops=may_hold_back(request.path, request.body_json))
        size_bytes = 0
        while part := await connection.read():
            if not size_bytes:
                self._began()
            size_bytes += len(part)
            self._attempt.generated_tokens += count_events(request.path, part)
            if size_bytes > JOINED_BYTES:
                raise UpstreamBrokenError(f"the answer is longer than {JOINED_BYTES} bytes")
            joiner.feed(part)
        status, body = joiner.finish()
        self._text = joiner.text
        self._note(body)
        self.close(is_good=status == 200)
        await request.answer(status, self._head(_whole_headers(connection.headers, len(body))), body)

    async def _send_stream(self, connection: Connection) -> None:
        """Pass on part by part: past ASGI where the host can, for a task's turn costs more than all else we do."""
        part = b""
        while not part and not connection.is_drained:
            part = self._told(await connection.read())
        self._began()
        request, head = self._request, self._head(connection.headers)
        request.begin(connection.status)
        await request.send({"type": "http.response.start", "status": connection.status, "headers": head})
        try:
            if not connection.is_drained:
                request.entry.cell.delivered(self._position)
                await self._send(part)
                part = await self._pass_on(connection)
            if self.tap is not None:
                part += self.tap.rest()
            self.close(is_good=connection.status == 200)
            await self._send(part, more=False)
        except asyncio.CancelledError:
            if self._is_told:  # a client may leave at the last event, without waiting for the body's end
                request.is_whole = True
                self.close(is_good=True)
            raise

    async def _send(self, part: bytes, *, more: bool = True) -> None:
        self._is_sending = bool(part)
        await self._request.send({"type": "http.response.body", "body": part, "more_body": more})
        self._is_sending = False

    async def _pass_on(self, connection: Connection) -> bytes:
        """Everything up to the last part, which is returned."""
        link, cell = self._request.link, self._request.entry.cell
        push = link.pusher(connection.unblock) if link is not None else None
        if link is None or push is None:
            part = self._told(await connection.read())
            while not connection.is_drained:
                if part:
                    cell.delivered(self._position)
                    await self._send(part)
                part = self._told(await connection.read())
            return part

        told, tap, delivered = self._told, self.tap, cell.delivered

        def sink(data: bytes) -> bool:
            if link.is_gone:
                return False
            part = told(data)
            delivered(self._events if tap is None else tap.position)
            return push(part) if part else True

        part = await connection.pump(sink)
        return told(part) if part else b""

    def _told(self, data: bytes) -> bytes:
        """What of the engine's bytes is the client's, noted."""
        request, tap = self._request, self.tap
        if tap is None:
            part = data
            request.ends.add(part)
            if self._is_counted:
                self._events += count_events(request.path, data)
        else:
            part = tap.feed(data)
            if tap.is_finished:  # the counts are in its end, and nothing else is looked for
                request.ends.add(part)
        request.record.bytes_sent += len(part)
        return part

    @property
    def _is_told(self) -> bool:
        """Whether the client was sent the answer's last event."""
        if self._is_sending:
            return False
        if self.tap is not None:
            return self.tap.is_finished
        return self._is_counted and self._request.ends.is_final and not is_several(self._request.body_json)

    @property
    def _position(self) -> int:
        """Tokens that the client has been sent, as far as the stream tells."""
        return self._events if self.tap is None else self.tap.position

    # --- what it tells

    def _began(self, *, is_whole: bool = False) -> None:
        now = self._clock()
        self._request.record.ttft_s = now - self._request.arrived_at
        if self._seen is not None and not is_whole:
            self._seen.first_at = now
        if self._lease is not None:
            self._router.began(self._lease)

    def _note(self, part: bytes, *, is_first: bool = False) -> None:
        request = self._request
        request.record.bytes_sent += len(part)
        request.ends.add(part)
        if is_first:
            self._began(is_whole=True)

    def _head(self, headers: Headers) -> Headers:
        """An engine's headers for the client; from here on nothing of earlier attempts counts as an error."""
        request = self._request
        request.record.error = ""
        head = downstream_headers(headers, self._engine.name, request.id)
        if self._lease is not None:
            head += route_headers(self._lease, self._attempt, request.record.attempts)
        return head

    def close(self, *, is_good: bool) -> None:
        """The engine is done: read its counts, give the slot back; once."""
        if self._is_closed:
            return
        self._is_closed = True
        timings, attempt = self._timings(), self._attempt
        served = timings
        if self._seen is not None:
            self._seen.ended_at, self._seen.timings = self._clock(), timings
        if self._request.reply_text is not None:
            self._request.reply_text = self.tap.text if self.tap is not None else self._text or ""
        if timings is not None:
            attempt.cached_tokens, attempt.computed_tokens = timings.cache_n, timings.prompt_n
            attempt.generated_tokens = attempt.delivered_tokens = timings.predicted_n
            attempt.is_estimate = is_several(self._request.body_json)
        elif is_good and (usage := self._request.ends.usage()) is not None:
            attempt.cached_tokens = usage.cached_tokens
            attempt.computed_tokens = usage.input_tokens - usage.cached_tokens
            attempt.generated_tokens = attempt.delivered_tokens = usage.output_tokens
            served = self._counted(attempt)
        elif is_good:  # a stream that ended with an error
            attempt.generated_tokens = attempt.delivered_tokens = self.delivered_tokens
            attempt.is_estimate = True
        self._request.record.delivered_tokens = attempt.delivered_tokens
        self._request.entry.cell.delivered(attempt.delivered_tokens)
        if self._lease is not None:
            self._give_back(self._lease, served)

    def _counted(self, attempt: Attempt) -> Timings | None:
        """What an answer without times, as that of /v1/messages, has cached and computed; None: it leaves no cache."""
        if self._lease is None or not self._lease.ask.key:
            return None
        cached, computed = attempt.cached_tokens, attempt.computed_tokens
        return Timings(cache_n=cached, prompt_n=computed, predicted_n=attempt.generated_tokens)

    def _give_back(self, lease: Lease, timings: Timings | None) -> None:
        served = None
        if timings is not None:
            served = Served(timings=timings, reply=self._reply(), delivered_tokens=self._attempt.delivered_tokens)
            if self._confirm is not None:
                self._confirm(lease.engine.name, lease.slot, timings.cache_n, lease.cached_tokens)
        self._router.release(lease, served)

    def _timings(self) -> Timings | None:
        if self.tap is not None:
            return timings_from(self.tap.timings) if self.tap.is_finished and self.tap.timings else None
        raw = self._request.ends.find(b'"timings":')
        return None if raw is None else timings_from(raw)

    def _reply(self) -> bytes | None:
        if self.tap is not None and self.tap.is_plain:
            self._text = self.tap.text
        return None if self._text is None else reply_key(self._request.path, self._text)


def splice(data: bytes, field: bytes) -> bytes:
    """A JSON object that is not empty, with one more field; llama-server takes the last of several of one name."""
    end = data.rfind(b"}")
    return b"%b,%b%b" % (data[:end], field, data[end:])


def route_headers(lease: Lease, attempt: Attempt, attempts: int) -> Headers:
    """Why it went where it went, in short: slot, prompt tokens that should be cached there, wait, attempts."""
    offer = lease.ask.offer
    return [
        (b"x-lltm-slot", b"%d" % lease.slot if lease.slot >= 0 else b"any"),
        (b"x-lltm-cached", b"%d/%d" % (lease.cached_tokens, lease.ask.prompt_tokens)),
        (b"x-lltm-wait-ms", b"%.1f" % (attempt.queue_s * 1e3)),
        (b"x-lltm-attempts", b"%d" % attempts),
        *([] if offer is None else [(b"x-lltm-session", offer.header())]),
    ]


def _may_reuse(fields: Any) -> bool:
    """Whether llama-server may use what its slot holds."""
    return isinstance(fields, dict) and fields.get("cache_prompt", True) is not False


def _is_event_stream(connection: Connection) -> bool:
    return connection.status == 200 and (find(connection.headers, b"content-type") or b"").startswith(_EVENTS)


def _whole_headers(headers: Headers, size_bytes: int) -> Headers:
    """A stream's headers as the whole answer has them."""
    kept = [pair for pair in headers if pair[0] not in _OF_STREAMS]
    return [*kept, (b"content-type", JSON), (b"content-length", str(size_bytes).encode("ascii"))]
