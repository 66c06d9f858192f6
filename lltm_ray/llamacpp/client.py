"""HTTP client of one llama-server: `LlamaClient` (requests, blocking) and `AsyncLlamaClient` (aiohttp).

The routes live in `wire`, the methods in one table (`_Face`), once for both; a client is only a transport: `send` (one
whole answer), `stream` (events) and `collect` (a stream joined). Whatever generates always streams from the server:
only then are queue time and time to first token known, and only then does a caller who goes away free the slot
(llama.cpp was seen to work an unstreamed request to its end). Closing or dropping a stream closes its socket.

Errors of every method: `ConfigError` (a wrong argument, nothing sent), `EngineNotReadyError` (nothing listens, or the
client is closed), `EngineExitedError` (the connection broke), `DeadlineError` (out of time), `UpstreamError` (the
server's own error).
The `engine` of these errors is empty: the engine that owns the client knows its name.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import aiohttp
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from lltm_ray._settings import check
from lltm_ray._watch import watch
from lltm_ray.errors import ConfigError, DeadlineError, EngineExitedError, EngineNotReadyError, LltmRayError
from lltm_ray.llamacpp import wire
from lltm_ray.llamacpp.base_url import base_url
from lltm_ray.llamacpp.pools import POOLS, connects, ended_silently
from lltm_ray.llamacpp.replies import Reply
from lltm_ray.llamacpp.sse import StreamReader, collect
from lltm_ray.records import Completion, StreamEvent

P = ParamSpec("P")
T = TypeVar("T")
SyncT = TypeVar("SyncT")
AsyncT = TypeVar("AsyncT")
AnyCall = wire.Call[Any] | wire.StreamCall

_IDLE_S = 4.0
"""Idle connections are dropped after this long; llama-server drops its side after 5 s (`Keep-Alive: timeout=5`)."""


class _Route(Generic[P, SyncT, AsyncT]):
    """A method of both faces: arguments and docstring are the route's, `how` names the transport that sends it."""

    def __init__(self, how: str, route: Callable[P, AnyCall]) -> None:
        self._how = how
        self._route = route
        self.__doc__ = route.__doc__

    @overload
    def __get__(self, face: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, face: LlamaClient, owner: Any) -> Callable[P, SyncT]: ...
    @overload
    def __get__(self, face: AsyncLlamaClient, owner: Any) -> Callable[P, AsyncT]: ...
    def __get__(self, face: Any, owner: Any) -> Any:
        if face is None:
            return self
        how, route = getattr(face, self._how), self._route

        @functools.wraps(route)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return how(route(*args, **kwargs))

        return method


def _sent(route: Callable[P, wire.Call[T]]) -> _Route[P, T, Coroutine[Any, Any, T]]:
    return _Route("send", route)


def _streamed(route: Callable[P, wire.StreamCall]) -> _Route[P, Generator[StreamEvent], AsyncGenerator[StreamEvent]]:
    return _Route("stream", route)


def _collected(route: Callable[P, wire.StreamCall]) -> _Route[P, Completion, Coroutine[Any, Any, Completion]]:
    return _Route("collect", route)


@dataclass(eq=False)
class _Face:
    """What both faces share: the methods, where the server is, and how long it may take.

    Raises:
        ConfigError: the URL, the key or a number cannot be used.
    """

    chat = _collected(wire.chat)
    chat_stream = _streamed(wire.chat)
    complete = _collected(wire.complete)
    complete_stream = _streamed(wire.complete)
    completions = _collected(wire.completions)
    completions_stream = _streamed(wire.completions)
    infill = _collected(wire.infill)
    infill_stream = _streamed(wire.infill)
    responses = _collected(wire.responses)
    responses_stream = _streamed(wire.responses)
    messages = _collected(wire.messages)
    messages_stream = _streamed(wire.messages)
    embed = _sent(wire.embed)
    rerank = _sent(wire.rerank)
    tokenize = _sent(wire.tokenize)
    detokenize = _sent(wire.detokenize)
    apply_template = _sent(wire.apply_template)
    health = _sent(wire.health)
    props = _sent(wire.props)
    set_props = _sent(wire.set_props)
    metrics = _sent(wire.metrics)
    slots = _sent(wire.slots)
    slot_save = _sent(wire.slot_save)
    slot_restore = _sent(wire.slot_restore)
    slot_erase = _sent(wire.slot_erase)
    lora_adapters = _sent(wire.lora_adapters)
    set_lora_adapters = _sent(wire.set_lora_adapters)
    models = _sent(wire.models)
    model_load = _sent(wire.model_load)
    model_unload = _sent(wire.model_unload)

    url: str
    """The server's base URL, such as `http://127.0.0.1:8080`; the `/v1` of OpenAI's clients is left out."""
    _: KW_ONLY
    api_key: str = field(default="", repr=False)
    """Sent as a bearer token; empty sends none."""
    timeout_s: float = 600.0
    """Longest life of one request, first byte to last. The blocking face looks at the clock whenever bytes arrive, so a
    server that falls silent in mid-stream is noticed up to `timeout_s` later."""
    connect_timeout_s: float = 5.0
    """Longest wait for the server's socket."""
    max_connections: int = 64
    """Connections kept; the async face never opens more and lets requests wait."""

    def __post_init__(self) -> None:
        self.url = base_url(self.url)
        for name in ("timeout_s", "connect_timeout_s", "max_connections"):
            value = getattr(self, name)
            is_limit = isinstance(value, Real) and 0 < float(value) <= 10**7
            check(is_limit, name, value, "must be a number above 0, at most 10000000")
        if not (isinstance(self.api_key, str) and self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("api_key", "...", "must be printable ASCII, without line ends")
        # compressed events would wait in the compressor
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            self._headers["Authorization"] = f"Bearer {self.api_key}"
        self._further: Mapping[str, str] = {}
        self._life = SimpleNamespace(is_closed=False)  # one for all twins

    def sending(self, headers: Mapping[str, str]) -> Self:
        """This client once more, on the same connections; its requests carry further headers, such as a trace's."""
        twin = copy.copy(self)
        twin._further = headers
        return twin

    def _check_open(self) -> None:
        if self._life.is_closed:
            raise EngineNotReadyError("", "out of reach: this client is closed; make another one")

    def _not_ready(self) -> EngineNotReadyError:
        return EngineNotReadyError("", f"not listening at {self.url}")

    def _exited(self, call: AnyCall) -> EngineExitedError:
        error = EngineExitedError("")
        error.add_note(f"the connection to {self.url} broke during {call.method} {call.path}")
        return error

    def _late(self, call: AnyCall, limit_s: float) -> DeadlineError:
        return DeadlineError(f"{call.method} {call.path}", limit_s)


class LlamaClient(_Face):
    """Blocking client of one llama-server; may be shared by threads. Streams are generators of `StreamEvent`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._session = self._new_session()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Send nothing more, and close idle connections; running requests keep theirs."""
        self._life.is_closed = True
        self._session.close()

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # a proxy or .netrc of this machine must not come between us and a server of ours
        session.headers.update(self._headers)
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=self.max_connections)
        adapter.poolmanager.pool_classes_by_scheme = POOLS
        for scheme in ("http://", "https://"):
            session.mount(scheme, adapter)
        return session

    def _ask(self, session: requests.Session, call: AnyCall, headers: Mapping[str, str]) -> requests.Response:
        return session.request(
            call.method,
            self.url + call.path,
            params=dict(call.query),
            data=wire.encode(call.body),
            headers={**self._further, **headers},
            stream=True,
            allow_redirects=False,
            timeout=(self.connect_timeout_s, self.timeout_s),
        )

    @contextmanager
    def _open(self, call: AnyCall, headers: Mapping[str, str]) -> Iterator[requests.Response]:
        """The answer's head; its socket goes back to the pool when the body was read to its end, else it is closed."""
        opened = connects.count
        with ExitStack() as stack:
            try:
                try:
                    response = self._ask(self._session, call, headers)
                except requests.ConnectionError as error:
                    if connects.count != opened or not ended_silently(error):
                        raise
                    # a session of its own, so that the second try cannot meet another stale connection
                    response = self._ask(stack.enter_context(self._new_session()), call, headers)
                stack.callback(response.close)
                yield response
            except requests.RequestException as error:
                raise self._translated(error, call) from error

    def _translated(self, error: requests.RequestException, call: AnyCall) -> LltmRayError:
        inner = error.args[0] if error.args else None
        if isinstance(error, requests.ConnectTimeout):
            return self._late(call, self.connect_timeout_s)
        if isinstance(error, requests.Timeout) or isinstance(inner, ReadTimeoutError):
            return self._late(call, self.timeout_s)
        if isinstance(getattr(inner, "reason", None), NewConnectionError):
            return self._not_ready()
        return self._exited(call)

    def _pieces(self, response: requests.Response, call: AnyCall, started: float) -> Iterator[bytes]:
        for piece in response.iter_content(None):
            if time.perf_counter() - started > self.timeout_s:
                raise self._late(call, self.timeout_s)
            yield piece

    def send(self, call: wire.Call[T]) -> T:
        """Send a call of `wire` and read its whole answer."""
        self._check_open()
        started = time.perf_counter()
        with watch(self.url, call.path, call.body) as seen:
            with self._open(call, seen.headers) as response:
                body = b"".join(self._pieces(response, call, started))
            answer = call.read(Reply(response.status_code, body))
            seen.answer(answer)
            return answer

    def stream(self, call: wire.StreamCall) -> Generator[StreamEvent]:
        """Send a streamed call of `wire`; the request goes out when the first event is asked for."""
        self._check_open()
        started = time.perf_counter()
        with (
            watch(self.url, call.path, call.body, is_stream=True) as seen,
            self._open(call, seen.headers) as response,
        ):
            reader = StreamReader(call.decode, queue_s=time.perf_counter() - started)
            pieces = self._pieces(response, call, started)
            if not wire.is_stream(response.status_code, response.headers.get("Content-Type")):
                raise wire.refusal(Reply(response.status_code, b"".join(pieces)))
            for piece in pieces:
                for event in reader.feed(piece, elapsed_s=time.perf_counter() - started):
                    seen.event(event)
                    yield event
                if reader.done:
                    return
            reader.finish()

    def collect(self, call: wire.StreamCall) -> Completion:
        """Send a streamed call of `wire` and join its events."""
        return collect(self.stream(call))


class AsyncLlamaClient(_Face):
    """Client of one llama-server for one event loop; its methods are awaited, its streams are async generators."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # made inside the loop that sends the first request
        self._running: set[aiohttp.ClientResponse] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Send nothing more, and close all connections; running requests end with `EngineExitedError`."""
        self._life.is_closed = True
        for response in tuple(self._running):  # aiohttp 3 forgets to tell whoever reads a body
            response.content.set_exception(aiohttp.ServerDisconnectedError())
        while self._sessions:
            _, session = self._sessions.popitem()
            await session.close()

    def _session(self, *, fresh: bool) -> aiohttp.ClientSession:
        """The session that keeps connections alive, or the one that opens a new one for each request."""
        if fresh not in self._sessions:
            alive: dict[str, Any] = {"force_close": True} if fresh else {"keepalive_timeout": _IDLE_S}
            traces = aiohttp.TraceConfig()
            traces.on_connection_reuseconn.append(_note_reuse)
            self._sessions[fresh] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.max_connections, **alive),
                timeout=aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=self.connect_timeout_s),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                trace_configs=[traces],
            )
        return self._sessions[fresh]

    async def _ask(
        self, call: AnyCall, headers: Mapping[str, str], *, fresh: bool, seen: SimpleNamespace
    ) -> aiohttp.ClientResponse:
        return await self._session(fresh=fresh).request(
            call.method,
            self.url + call.path,
            params=call.query,
            data=wire.encode(call.body),
            headers={**self._further, **headers},
            allow_redirects=False,
            trace_request_ctx=seen,
        )

    @asynccontextmanager
    async def _open(self, call: AnyCall, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """As `LlamaClient._open`; a cancelled task closes the socket too."""
        seen = SimpleNamespace(reused=False)
        async with AsyncExitStack() as stack:
            try:
                try:
                    response = await self._ask(call, headers, fresh=False, seen=seen)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    if not seen.reused or isinstance(error, aiohttp.ClientConnectorError):
                        raise
                    response = await self._ask(call, headers, fresh=True, seen=seen)
                stack.callback(response.close)
                self._running.add(response)
                stack.callback(self._running.discard, response)
                yield response
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._translated(error, call) from error

    def _translated(self, error: Exception, call: AnyCall) -> LltmRayError:
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return self._late(call, self.connect_timeout_s)
        if isinstance(error, TimeoutError):
            return self._late(call, self.timeout_s)
        if isinstance(error, aiohttp.ClientConnectorError):
            return self._not_ready()
        return self._exited(call)

    async def send(self, call: wire.Call[T]) -> T:
        """As `LlamaClient.send`."""
        self._check_open()
        with watch(self.url, call.path, call.body) as seen:
            async with self._open(call, seen.headers) as response:
                body = await response.read()
            answer = call.read(Reply(response.status, body))
            seen.answer(answer)
            return answer

    async def stream(self, call: wire.StreamCall) -> AsyncGenerator[StreamEvent]:
        """As `LlamaClient.stream`."""
        self._check_open()
        started = time.perf_counter()
        with watch(self.url, call.path, call.body, is_stream=True) as seen:
            async with self._open(call, seen.headers) as response:
                reader = StreamReader(call.decode, queue_s=time.perf_counter() - started)
                if not wire.is_stream(response.status, response.headers.get("Content-Type")):
                    raise wire.refusal(Reply(response.status, await response.read()))
                async for piece in response.content.iter_any():
                    for event in reader.feed(piece, elapsed_s=time.perf_counter() - started):
                        seen.event(event)
                        yield event
                    if reader.done:
                        return
                reader.finish()

    async def collect(self, call: wire.StreamCall) -> Completion:
        """As `LlamaClient.collect`."""
        return collect([event async for event in self.stream(call)])


async def _note_reuse(session: aiohttp.ClientSession, context: SimpleNamespace, params: Any) -> None:
    context.trace_request_ctx.reused = True
