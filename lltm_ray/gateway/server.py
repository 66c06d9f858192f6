"""Runs the gateway's ASGI app on uvicorn: one socket, one event loop, no signals, no access log."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from lltm_ray.config import GatewayConfig
from lltm_ray.errors import ConfigError, LltmRayError
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.protocol import GatewayProtocol

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than the keep-alive of common clients and proxies, so that they close first and never meet a closed socket."""
_YOUNG_OBJECTS = 4_000
"""Made since the last collection of the young until the next: by Python's 700 the same requests in flight are looked
at again and again."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to whoever runs this process."""
        yield


class _NotOurs(logging.Filter):
    """Drops uvicorn's traceback for an error that the app raised on purpose, and has logged, to break a connection."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], LltmRayError))


_NOT_OURS = _NotOurs()


def bind(config: GatewayConfig) -> socket.socket:
    """A listening address taken now, so that a clash is told before anything starts.

    Raises:
        ConfigError: the address is no address of this machine, or its port is taken.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError("host", config.host, f"is not an address: {error}") from error
    family, kind, proto, _, address = found[0]
    # The protocol number matters: asyncio turns Nagle's delay off only for sockets that name TCP.
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.processes > 1:  # the kernel spreads connections over those who share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(config, error) from error
    listener.setblocking(False)
    return listener


def _bind_error(config: GatewayConfig, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError("port", config.port, f"is taken on {config.host}; choose another, or 0 for a free one")
    if error.errno == errno.EACCES:
        return ConfigError("port", config.port, "needs privileges; choose one above 1023")
    return ConfigError("host", config.host, f"cannot be bound: {error}")


async def serve(
    app: GatewayApp,
    config: GatewayConfig,
    *,
    ready: Callable[[int], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until `stop` is set, then drain unless that was done; or until cancelled, then close at once.

    Args:
        app: the application.
        config: address and timeouts.
        ready: called once with the real port when connections are accepted.
        stop: set it to end in good order.

    Raises:
        ConfigError: the address cannot be bound.
    """
    listener = bind(config)
    port = int(listener.getsockname()[1])
    logging.getLogger("uvicorn.error").addFilter(_NOT_OURS)
    gc.freeze()  # what is here now stays: a collection that looks at it all holds up every stream
    gc.set_threshold(_YOUNG_OBJECTS)
    server = _Server(_uvicorn_config(app, config), lambda: ready(port))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and not app.is_draining:
            await app.drain()
    finally:
        stopping.cancel()
        server.should_exit = True
        await running


def _uvicorn_config(app: GatewayApp, config: GatewayConfig) -> uvicorn.Config:
    protocol: Any = type("BoundedProtocol", (GatewayProtocol,), {"head_limit_bytes": config.max_header_bytes})
    return uvicorn.Config(
        app,
        http=protocol,
        loop="none",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
