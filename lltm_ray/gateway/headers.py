"""Which headers pass in which direction, and the request head as bytes."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterable

from lltm_ray.gateway.upstream import Headers, origin

_HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
    )
)
"""RFC 9110, section 7.6.1, and what proxies add to it."""
_NOT_UPSTREAM = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"authorization", b"x-api-key"}
_NOT_UPSTREAM |= {b"x-lltm-engine", b"x-lltm-deadline-ms", b"x-lltm-priority", b"x-lltm-session", b"x-request-id"}
_NOT_UPSTREAM |= {b"x-conversation-id"}  # with it llama-server would go on generating after the client left
_NOT_UPSTREAM_TRACED = _NOT_UPSTREAM | {b"traceparent", b"tracestate"}
_NOT_DOWNSTREAM = _HOP_BY_HOP | {b"server"}
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}\Z")
_ID_PREFIX = secrets.token_hex(6)
_ids = itertools.count(1)


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header; `name` in lower case, as ASGI has them."""
    for each, value in headers:
        if each == name:
            return value
    return None


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's `x-request-id` if it is short and plain, else a new one, unique over processes."""
    given = find(headers, b"x-request-id")
    if given is not None and _SANE_ID.match(given):
        return given.decode("ascii")
    return f"{_ID_PREFIX}-{next(_ids):x}"


def upstream_headers(
    headers: Iterable[tuple[bytes, bytes]], api_key: str, id_: str, trace: Headers | None = None
) -> Headers:
    """A client's headers for the engine: hop-by-hop ones and the client's key out, the engine's own key in.

    Args:
        headers: the client's.
        api_key: the engine's; empty: it has none.
        id_: of the request.
        trace: trace context to send instead of the client's; None leaves that as it is.
    """
    options = _connection_options(headers)
    dropped = _NOT_UPSTREAM if trace is None else _NOT_UPSTREAM_TRACED
    if options:
        dropped |= options
    kept = [pair for pair in headers if pair[0] not in dropped]
    kept.append((b"x-request-id", id_.encode("ascii")))
    if api_key:
        kept.append((b"authorization", b"Bearer " + api_key.encode("utf-8")))
    return kept if trace is None else kept + trace


def downstream_headers(headers: Headers, engine: str, id_: str) -> Headers:
    """An engine's headers for the client, with the engine's name and the request's id."""
    kept = [pair for pair in headers if pair[0] not in _NOT_DOWNSTREAM and pair != _NO_ORIGIN]
    kept.append((b"x-lltm-engine", engine.encode("utf-8")))
    kept.append((b"x-request-id", id_.encode("ascii")))
    return kept


_NO_ORIGIN = (b"access-control-allow-origin", b"")
"""llama.cpp's answer to a request without `Origin`: a header that says nothing."""


def _connection_options(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Header names that `Connection` declares hop-by-hop for this message."""
    values = [value for name, value in headers if name == b"connection"]
    if not values or (len(values) == 1 and values[0].lower() == b"keep-alive"):
        return frozenset()
    return frozenset(option.strip().lower() for option in b",".join(values).split(b","))


def build_request(method: bytes, target: bytes, url: str, headers: Headers, body: bytes) -> list[bytes]:
    """A request as the byte strings to write together: the head, and a body that is too long to copy into it."""
    parts = [method, b" ", target, b" HTTP/1.1\r\nhost: ", origin(url)[2], b"\r\n"]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    if body or method != b"GET":
        parts += (b"content-length: ", str(len(body)).encode("ascii"), b"\r\n")
    parts.append(b"\r\n")
    if len(body) > 65_536:
        return [b"".join(parts), body]
    parts.append(body)
    return [b"".join(parts)]
