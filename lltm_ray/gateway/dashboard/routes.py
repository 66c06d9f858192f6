"""`/dashboard`: the page and what it asks for."""

from __future__ import annotations

import asyncio
import gzip
import importlib.resources
from contextlib import aclosing
from functools import cache
from typing import Any

from lltm_ray.gateway.dashboard.feed import Feed, Telemetry, TelemetryUnavailableError
from lltm_ray.gateway.headers import find
from lltm_ray.gateway.request import Handler, Request
from lltm_ray.telemetry.semconv import CONTENT

PATH = "/dashboard"
TIMELINE_PATH = PATH + "/requests"
_HTML, _SCRIPT, _STYLE = b"text/html; charset=utf-8", b"text/javascript; charset=utf-8", b"text/css; charset=utf-8"
_SCRIPTS = ("page", "chart", "dom", "machines", "requests", "stream", "timeline", "units", "plotly")
_FILES = {
    PATH: ("index.html", _HTML),
    PATH + "/page.css": ("page.css", _STYLE),
    **{f"{PATH}/{name}.js": (f"{name}.js", _SCRIPT) for name in _SCRIPTS},
}
PUBLIC = frozenset(_FILES)
"""Open without a key: they hold no figures. The page asks for the key and sends it with what it fetches."""
_ONLY_OURS = b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"
"""Nothing from outside; Plotly styles its elements inline."""


class DashboardRoutes:
    """Handlers below `/dashboard`.

    Args:
        telemetry: None: the fleet runs without; the page says so.
    """

    def __init__(self, telemetry: Telemetry | None) -> None:
        self._telemetry = telemetry
        self._feed = None if telemetry is None else Feed(telemetry)

    def build(self) -> dict[tuple[str, str], Handler]:
        """Handlers by method and path."""
        routes: dict[tuple[str, str], Handler] = {("GET", path): _send_file for path in _FILES}
        return routes | {("GET", PATH + "/events"): self._events}

    def close(self) -> None:
        """End every page's stream: a host that waits for its requests would wait for ever."""
        if self._feed is not None:
            self._feed.close()

    async def timeline_path(self, request: Request) -> None:
        """`GET /dashboard/requests/{id}`: one request's spans."""
        id_ = request.path.removeprefix(TIMELINE_PATH + "/")
        if self._telemetry is None:
            await _refuse(request, 501, _OFF)
            return
        try:
            found = await self._telemetry.timeline(id_)
        except TelemetryUnavailableError as error:
            await _refuse(request, 503, str(error))
            return
        if found is None:
            await _refuse(request, 404, f"no request {id_!r} is known to telemetry (any more)")
            return
        is_own = found["request"]["tenant"] == request.tenant
        await request.reply_json(found if is_own else _without_content(found))

    async def _events(self, request: Request) -> None:
        if self._feed is None:
            await _refuse(request, 501, _OFF)
            return
        request.begin(200)
        head = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store"), *request.own_headers()]
        await request.send({"type": "http.response.start", "status": 200, "headers": head})
        gone = asyncio.create_task(_wait_gone(request))
        try:
            async with aclosing(self._feed.watch()) as events:
                async for event in events:
                    await request.send({"type": "http.response.body", "body": event, "more_body": True})
                    if gone.done():
                        return
            await request.send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()


_OFF = "this fleet runs without telemetry; start it with telemetry.enabled = true"
_TYPES = {404: "not_found_error", 501: "not_supported_error", 503: "unavailable_error"}


def _without_content(timeline: dict[str, Any]) -> dict[str, Any]:
    """Another tenant's request: its figures, for operators share the page, and nothing that was said."""
    shown = [
        span | {"attributes": {name: value for name, value in span["attributes"].items() if name not in CONTENT}}
        for span in timeline["spans"]
    ]
    return timeline | {"request": timeline["request"] | {"content": ""}, "spans": shown}


async def _refuse(request: Request, status: int, message: str) -> None:
    await request.reply_json({"error": {"message": message, "type": _TYPES[status], "code": status}}, status)


async def _wait_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _send_file(request: Request) -> None:
    name, kind = _FILES[request.path]
    packs = b"gzip" in (find(request.headers, b"accept-encoding") or b"")
    body = await asyncio.to_thread(_read, name, packs=packs)
    headers = [
        (b"content-security-policy", _ONLY_OURS),
        (b"cache-control", b"no-cache"),
        (b"x-content-type-options", b"nosniff"),
    ]
    headers += [(b"content-encoding", b"gzip")] if packs else []
    head = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers, *request.own_headers()]
    request.begin(200)
    await request.send({"type": "http.response.start", "status": 200, "headers": head})
    await request.send({"type": "http.response.body", "body": body})


@cache
def _read(name: str, *, packs: bool) -> bytes:
    folder = "plotly.package_data" if name == "plotly.js" else "lltm_ray.gateway.dashboard.static"
    file = "plotly.min.js" if name == "plotly.js" else name
    body = importlib.resources.files(folder).joinpath(file).read_bytes()
    return gzip.compress(body, 6, mtime=0) if packs else body
