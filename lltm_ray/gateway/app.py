"""The gateway's ASGI application: llama-server's routes over a whole fleet. No framework, a dict of routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from lltm_ray.config import GatewayConfig
from lltm_ray.errors import ConfigError, DeadlineError, LltmRayError, RequestTooLargeError
from lltm_ray.gateway.accounting import RequestRecord
from lltm_ray.gateway.ask import build_ask
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.dashboard.feed import Telemetry
from lltm_ray.gateway.dashboard.routes import PUBLIC as DASHBOARD_FILES
from lltm_ray.gateway.dashboard.routes import TIMELINE_PATH, DashboardRoutes
from lltm_ray.gateway.drain_routes import DrainRoutes, Peers
from lltm_ray.gateway.explain_routes import PATH as EXPLAIN_PATH
from lltm_ray.gateway.explain_routes import ExplainRoutes
from lltm_ray.gateway.fleet import Fleet
from lltm_ray.gateway.fleet_routes import MODEL_PATHS, PUBLIC, STATUS_PATH, FleetRoutes
from lltm_ray.gateway.guard import Cause, Deadlines
from lltm_ray.gateway.headers import find, request_id
from lltm_ray.gateway.level import Leveller
from lltm_ray.gateway.migrate import Migrator
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.protocol import EXTENSION
from lltm_ray.gateway.relay import Relay
from lltm_ray.gateway.replies import NOT_FOUND, ClientLink, Receive, Scope, Send, refuse_and_linger, send_error
from lltm_ray.gateway.request import ClientGoneError, Handler, Request, read_body, read_pin, understand
from lltm_ray.gateway.session_routes import SessionRoutes
from lltm_ray.gateway.session_store import SessionStore
from lltm_ray.gateway.sessions import Sessions
from lltm_ray.gateway.settle import cut_off, settle
from lltm_ray.gateway.shelf import Shelf
from lltm_ray.gateway.slot_files import LocalFiles, SlotFiles
from lltm_ray.gateway.timeline import begin_trace, read_caller
from lltm_ray.gateway.trace import Tracing
from lltm_ray.gateway.work import Work, working
from lltm_ray.records import FleetStatus
from lltm_ray.routing.ledger import Ledger, LedgerEntry
from lltm_ray.routing.router import Router
from lltm_ray.telemetry.logs import at_work
from lltm_ray.telemetry.telling import tell_error

GENERATING = (
    *("/completion", "/completions", "/v1/completions", "/chat/completions", "/v1/chat/completions"),
    *("/responses", "/v1/responses", "/v1/messages", "/infill", "/embedding", "/embeddings", "/v1/embeddings"),
    *("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"),
)
"""POST routes that occupy a slot."""
CHEAP = (
    *("/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens"),
    *("/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"),
    *("/responses/input_tokens", "/v1/responses/input_tokens"),
)
"""POST routes that any ready engine of the model answers without a slot."""
_OPEN = PUBLIC | DASHBOARD_FILES
_log = logging.getLogger(__name__)
KEPT_RECORDS = 1024
MAX_TARGET_BYTES = 8192
"""Longest path and query; llama-server hangs up on ones that are too long for it, and does not say so."""
_DRAINING = b'{"error":{"message":"the gateway is shutting down","type":"unavailable_error","code":503}}'
_NO_FOLDER = (
    b'{"error":{"message":"slots are not saved or restored for clients here: to allow it, start the fleet with '
    b'engine.slot_save_path set to a folder of your own","type":"permission_error","code":403}}'
)


class GatewayApp:
    """The whole HTTP face of a fleet; any ASGI host can run it.

    Args:
        router: where requests go; the owner feeds it with `Router.update`.
        config: limits and timeouts.
        keys: API keys; none leaves the gateway open.
        status: the fleet's state for `/lltm/status`.
        clock: monotonic seconds.
        ledger: the account of every request's tokens; None keeps none.
        account: the ledger's state for `/lltm/status`.
        files: carries saved slots between engines' folders.
        sessions: where named sessions are kept; None: nowhere.
        peers: the fleet's other gateways.
        tracing: takes rows of finished requests; None: no clock is read for it.
        telemetry: the fleet's figures, for the live page and `/metrics`; None: the fleet runs without.
        on_done: takes each request's record when it is over; it must be quick and must not raise. None appends to
            `records`, which keeps the last 1024.
    """

    def __init__(  # noqa: PLR0913 - all that a host may bring, by name
        self,
        *,
        router: Router,
        config: GatewayConfig,
        keys: ApiKeys,
        status: Callable[[], FleetStatus],
        clock: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
        files: SlotFiles | None = None,
        sessions: SessionStore | None = None,
        account: Callable[[], dict[str, Any]] = dict,
        peers: Peers | None = None,
        tracing: Tracing | None = None,
        telemetry: Telemetry | None = None,
        on_done: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.records: deque[RequestRecord] = deque(maxlen=KEPT_RECORDS)
        self._router = router
        self._config = config
        self._keys = keys
        self._clock = clock
        self._on_done = on_done or self.records.append
        self._tracing = tracing
        self._pool = UpstreamPool(connect_timeout_s=config.connect_timeout_s)
        self._ledger = ledger
        self.migrator = Migrator(router, self._pool, files or LocalFiles(), tracing)
        self.shelf = Shelf(router, self.migrator, tracing)
        self.leveller = Leveller(router, self.migrator)
        confirm, warm = self.migrator.confirm, self.shelf.warm
        self._relay = Relay(router, self._pool, config, ledger=ledger, confirm=confirm, warm=warm, clock=clock)
        self.sessions = Sessions(sessions, router, self._relay, self.shelf, config) if sessions else None
        fleet, look = Fleet(router, self._pool, peers), self._look(status, account)
        self._fleet_routes = FleetRoutes(router, fleet, config, look, telemetry)
        self._explain_routes = ExplainRoutes(ledger)
        self._dashboard_routes = DashboardRoutes(telemetry)
        self._deadlines = Deadlines(config.request_timeout_s)
        self._running, self._is_draining = 0, False
        self._idle = asyncio.Event()
        self._routes = self._build_routes(peers)

    def _look(self, status: Callable[[], FleetStatus], account: Callable[[], dict[str, Any]]) -> Callable[[], Any]:
        """What `/lltm/status` shows."""
        return lambda: (
            status().public()
            | {"router": self._router.snapshot(), "ledger": account()}
            | {"migration": self.migrator.snapshot() | {"shelf": self.shelf.snapshot()}}
        )

    def _build_routes(self, peers: Peers | None) -> dict[tuple[str, str], Handler]:
        routes: dict[tuple[str, str], Handler] = {("POST", path): self._generate for path in GENERATING}
        routes |= {("POST", path): self._cheap for path in CHEAP}
        routes |= DrainRoutes(self.migrator, peers).build() | self._explain_routes.build()
        routes |= SessionRoutes(self.sessions, self._config).build()
        return routes | self._dashboard_routes.build() | self._fleet_routes.build()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and wait for running ones, at most `timeout_s` (None: the configured time).

        Returns:
            Whether all of them ended in time.
        """
        self._is_draining = True
        self._dashboard_routes.close()
        if self._running:
            self._idle.clear()
            try:
                async with asyncio.timeout(self._config.drain_timeout_s if timeout_s is None else timeout_s):
                    await self._idle.wait()
            except TimeoutError:
                return False
        self._relay.close()
        self._pool.close()
        return True

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_draining

    @property
    def running(self) -> int:
        """Requests inside the gateway now."""
        return self._running

    # --- one request

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        id_ = request_id(headers)
        method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        request = Request(
            method="GET" if method == "HEAD" else method,
            path=path,
            query=scope["query_string"],
            headers=headers,
            receive=receive,
            send=send,
            link=_client_link(scope),
            id=id_,
            arrived_at=self._clock(),
            record=RequestRecord(request_id=id_, route=path),
            entry=LedgerEntry(request_id=id_, route=path, arrived_unix_nano=time.time_ns()),
        )
        self._running += 1
        at_work.set(None)  # one request's task may have begun the next one's
        try:
            await self._dispatch(request)
        except LltmRayError as error:
            await self._refuse(request, error)
        except ClientGoneError:
            request.record.error = Cause.CLIENT_GONE
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
            self._finish(request)

    async def _dispatch(self, request: Request) -> None:
        if request.method == "OPTIONS":
            await _preflight(request)
            return
        self._check_head(request)
        if request.path not in _OPEN:
            request.tenant = self._keys.check(request.headers)
        handler = self._routes.get((request.method, request.path)) or self._by_pattern(request)
        if self._is_draining and request.path != STATUS_PATH:
            await request.reply(503, _DRAINING)
            return
        await handler(request)

    def _by_pattern(self, request: Request) -> Handler:
        """The handler of a path that is not in the table; records keep no path that a client made up."""
        if _is_slot_action(request):
            request.record.route = "/slots/{id}"
            return self._slot_action
        if request.method == "GET" and request.path.startswith(EXPLAIN_PATH + "/"):
            request.record.route = EXPLAIN_PATH
            return self._explain_routes.explain_path
        if request.method == "GET" and request.path.startswith(TIMELINE_PATH + "/"):
            request.record.route = TIMELINE_PATH
            return self._dashboard_routes.timeline_path
        if request.method == "GET" and request.path.startswith(MODEL_PATHS) and request.path not in MODEL_PATHS:
            request.record.route = "/v1/models/{model}"
            return self._fleet_routes.model_path
        request.record.route = "other"
        return _not_found

    def _check_head(self, request: Request) -> None:
        size_bytes = len(request.path) + len(request.query)
        if size_bytes > MAX_TARGET_BYTES:
            error = RequestTooLargeError("target", size_bytes, MAX_TARGET_BYTES)
            error.http_status = 414
            raise error
        for name, value in request.headers:
            size_bytes += len(name) + len(value)
        if size_bytes > self._config.max_header_bytes:
            error = RequestTooLargeError("head", size_bytes, self._config.max_header_bytes)
            error.http_status = 431
            raise error

    async def _refuse(self, request: Request, error: LltmRayError) -> None:
        if request.is_started:
            request.record.error = "; ".join(filter(None, (request.record.error, tell_error(error))))
            _log.warning("request %s: answer broken off: %s", request.id, request.record.error)
            raise error  # the host must break the connection: an end would look like success
        request.record.error = tell_error(error)
        request.record.status = error.http_status
        if request.trace is not None:
            request.trace.refuse(error)
        headers = request.own_headers()
        if not isinstance(error, RequestTooLargeError):
            await send_error(request.send, error, headers)
            return
        if not await refuse_and_linger(request.send, request.receive, error, headers):
            request.record.error += " (and its sender did not stop)"

    def _finish(self, request: Request) -> None:
        record = request.record
        record.total_s = self._clock() - request.arrived_at
        record.ends = request.ends.join()
        if request.is_accounted and self._ledger is not None:
            self._ledger.finish(settle(request, self._config.policy))
        if self._tracing is not None and request.trace is not None:
            self._tracing.note(request, request.trace)
        self._on_done(record)

    # --- forwarded routes

    async def _generate(self, request: Request) -> None:
        request.is_accounted = True
        if self._tracing is not None:
            request.trace = begin_trace(request.headers, self._clock)
            at_work.set(request.trace)
            request.reply_text = "" if self._tracing.capture is not None else None
        await self._forward(request, needs_slot=True)

    async def _cheap(self, request: Request) -> None:
        await self._forward(request, needs_slot=False)

    async def _forward(self, request: Request, *, needs_slot: bool, reads_model: bool = True) -> None:
        guard = self._deadlines.guard()
        try:
            request.body = await read_body(request.receive, request.headers, self._config.max_body_bytes)
            guard.watch(request.receive, request.link)
            request.only = read_pin(request)
            if reads_model:
                await understand(request)
            if needs_slot:
                patience_s = self._config.queue_timeout_s
                request.ask = build_ask(request, self._router, tenant=request.tenant, patience_s=patience_s)
                if self.sessions is not None:
                    await self.sessions.offer(request)
            await self._relay.forward(request)
        except asyncio.CancelledError:
            cause = guard.absorb()
            if cause is None:
                raise
            if request.is_whole and cause is Cause.CLIENT_GONE:
                return
            cut_off(request.entry, cause)
            if cause is Cause.DEADLINE:
                raise DeadlineError("the request", self._config.request_timeout_s) from None
            request.record.error = cause
        finally:
            guard.close()

    async def _slot_action(self, request: Request) -> None:
        known = self._router.engines()
        if read_pin(request) is None and len(known) > 1:
            names = ", ".join(engine.name for engine in known)
            raise ConfigError("engine", None, f"slots belong to engines: name one with ?engine=, of {names}")
        action = request.param("action")
        pinned = read_pin(request)
        if action != "erase" and any(each.has_own_slot_folder for each in known if pinned in (None, each.name)):
            request.record.error = "no folder for clients' slots"
            await request.reply(403, _NO_FOLDER)
            return
        # The engine takes the last of several, and writes of names, that we do not: it gets what was checked.
        checked = {"action": action or ""} | ({} if pinned is None else {"engine": pinned})
        request.query = urlencode(checked).encode("ascii")
        request.once = True
        with working(self._tracing, Work(f"slot {action}", pinned or "", parent=read_caller(request.headers))) as work:
            await self._forward(request, needs_slot=False, reads_model=False)
            work.engine = request.record.engine
            work.error_type = str(request.record.status) if request.record.status >= 400 else ""
        if request.record.status == 200 and action != "save":
            self._router.erased(request.record.engine, int(request.path.rpartition("/")[2]))


def _client_link(scope: Scope) -> ClientLink | None:
    if scope["method"] == "HEAD":
        return None  # no body bytes will follow the head
    link: ClientLink | None = (scope.get("extensions") or {}).get(EXTENSION)
    return link


def _is_slot_action(request: Request) -> bool:
    start, _, slot = request.path.rpartition("/")
    return request.method == "POST" and start == "/slots" and slot.isascii() and slot.isdigit()


async def _not_found(request: Request) -> None:
    await request.reply(404, NOT_FOUND)


async def _preflight(request: Request) -> None:
    headers = [
        (b"access-control-allow-origin", find(request.headers, b"origin") or b"*"),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
        (b"access-control-allow-headers", b"*"),
        (b"content-length", b"0"),
        (b"x-request-id", request.id.encode("ascii")),
    ]
    request.record.status = 200
    await request.send({"type": "http.response.start", "status": 200, "headers": headers})
    await request.send({"type": "http.response.body", "body": b""})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return
