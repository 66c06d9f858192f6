"""Keep-alive connections to the engines' servers, a stack for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lltm_ray.gateway.upstream import ConnectFailedError, Connection, Headers, UpstreamBrokenError, origin

_SWEEP_S = 1.0


class UpstreamPool:
    """Keep-alive connections to any number of servers, for one event loop.

    Args:
        connect_timeout_s: to reach a socket.
        idle_timeout_s: connections idle for longer are dropped; below the server's own 5 s.
        idle_limit: most idle connections per server.
    """

    def __init__(self, *, connect_timeout_s: float = 2.0, idle_timeout_s: float = 3.0, idle_limit: int = 128) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._idle_limit = idle_limit
        self._idle: dict[str, list[Connection]] = {}
        self._hangs_up: set[str] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def open(self, url: str, request: Sequence[bytes], *, fresh: bool = False) -> Connection:
        """Send a request and wait for the answer's head; give the connection to `release` afterwards.

        A pooled connection that the server had closed already (not a byte came back) is replaced by a fresh one, once.
        The server may have read the request by then, so requests that must not run twice take `fresh`, which uses no
        pooled connection and sends once.

        Raises:
            ConnectFailedError: no connection within `connect_timeout_s`; the server has seen nothing of the request.
            UpstreamBrokenError: it broke before the head.
        """
        pooled = None if fresh else self._take(url)
        if pooled is not None:
            was_chunked = pooled.is_chunked
            try:
                return await self._exchange(pooled, request)
            except UpstreamBrokenError:
                if pooled.got_bytes:
                    raise
                self._note_end(url, was_chunked=was_chunked)
        try:
            connection = await self._connect(url)
        except ConnectFailedError as error:
            if pooled is not None and pooled.was_sent:
                raise UpstreamBrokenError(f"{error}, since the request was sent") from error
            raise
        return await self._exchange(connection, request)

    def release(self, connection: Connection) -> None:
        """Pool a connection whose answer was read to its end; abort it in any other state.

        Whether a server keeps the connection of a chunked answer, no answer says; llama.cpp does not. So the first one
        is pooled, and no other once it was closed.
        """
        keeps = connection.is_reusable and not (connection.is_chunked and connection.url in self._hangs_up)
        if not keeps or len(self._idle.get(connection.url, ())) >= self._idle_limit:
            connection.abort()
            return
        connection.park()
        self._idle.setdefault(connection.url, []).append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def forget(self, connection: Connection) -> None:
        """An idle connection was closed by its server."""
        stack = self._idle.get(connection.url, [])
        if connection in stack:
            stack.remove(connection)
            self._note_end(connection.url, was_chunked=connection.is_chunked)

    def close(self) -> None:
        """Drop all idle connections."""
        for stack in self._idle.values():
            for connection in list(stack):
                connection.abort()
        self._idle.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def idle_count(self) -> int:
        """Idle connections, over all servers."""
        return sum(len(stack) for stack in self._idle.values())

    async def fetch(
        self, url: str, request: Sequence[bytes], *, limit_bytes: int, fresh: bool = False
    ) -> tuple[int, Headers, bytes]:
        """A whole exchange: status, headers (lower-case names) and body; `fresh` as in `open`.

        Raises:
            ConnectFailedError, UpstreamBrokenError: as `open` and `Connection.read_all`.
        """
        connection = await self.open(url, request, fresh=fresh)
        try:
            body = await connection.read_all(limit_bytes)
            return connection.status, connection.headers, body
        finally:
            self.release(connection)

    def _note_end(self, url: str, *, was_chunked: bool) -> None:
        """The server closed a connection that was idle, or had been until now."""
        if was_chunked:
            self._hangs_up.add(url)

    def _take(self, url: str) -> Connection | None:
        stack = self._idle.get(url)
        if not stack:
            return None
        connection = stack.pop()  # the one used last: the least likely to be stale
        if asyncio.get_running_loop().time() - connection.idle_since <= self._idle_timeout_s:
            return connection
        connection.abort()
        return None

    async def _connect(self, url: str) -> Connection:
        host, port, _ = origin(url)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(lambda: Connection(self.forget, url), host, port)
        except TimeoutError as error:
            raise ConnectFailedError(f"{url} did not accept within {self._connect_timeout_s:g} s") from error
        except OSError as error:
            raise ConnectFailedError(f"{url}: {error}") from error
        return connection

    async def _exchange(self, connection: Connection, request: Sequence[bytes]) -> Connection:
        try:
            connection.start(request)
            await connection.head()
        except BaseException:
            connection.abort()
            raise
        return connection

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._idle_timeout_s
        for url, stack in list(self._idle.items()):
            for connection in [each for each in stack if each.idle_since < oldest]:
                stack.remove(connection)
                connection.abort()
            if not stack:
                del self._idle[url]
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep) if self._idle else None
