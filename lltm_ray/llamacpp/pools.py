"""Connection pools that count the connections they open, which tells a reused one from a new one."""

from __future__ import annotations

import threading
from http.client import RemoteDisconnected
from typing import Final

import requests
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


class _Connects(threading.local):
    """How many connections this thread has opened: a request that opened none went over a reused one."""

    count = 0


connects = _Connects()
"""Of this thread."""


class _CountedHTTP(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        connects.count += 1


class _CountedHTTPS(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        connects.count += 1


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _CountedHTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _CountedHTTPS


POOLS: Final = {"http": _HTTPPool, "https": _HTTPSPool}
"""Scheme -> its pool."""


def ended_silently(error: requests.ConnectionError) -> bool:
    """Whether the peer closed the connection without a byte of an answer."""
    causes = getattr(error.args[0] if error.args else None, "args", ())
    return any(isinstance(cause, RemoteDisconnected | ConnectionResetError | BrokenPipeError) for cause in causes)
