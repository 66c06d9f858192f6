"""Routes of named sessions; each tenant has its own. `sessions` does the work."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from functools import partial
from typing import Any

from lltm_ray._sessions import HEAD_FIELDS, check_name
from lltm_ray.config import GatewayConfig
from lltm_ray.errors import ConfigError, DeadlineError, LltmRayError
from lltm_ray.gateway.pages import refuse_pages
from lltm_ray.gateway.replies import encode
from lltm_ray.gateway.request import ClientGoneError, Handler, Request, parse_json, read_body
from lltm_ray.gateway.session_store import SessionStore, Unfit
from lltm_ray.gateway.sessions import Sessions, off_loop

PATH = "/lltm/sessions"
_FIELDS = frozenset(("messages", "model", *HEAD_FIELDS))


class SessionRoutes:
    """Handlers of /lltm/sessions and what is below it.

    Args:
        sessions: None: this gateway keeps none.
        config: limits of bodies.
    """

    def __init__(self, sessions: Sessions | None, config: GatewayConfig) -> None:
        self._sessions, self._config = sessions, config

    def build(self) -> dict[tuple[str, str], Handler]:
        """Handlers by method and path."""
        routes: dict[tuple[str, str], Handler] = {
            ("GET", PATH): self._get,
            ("POST", PATH): self._save,
            ("DELETE", PATH): self._delete,
            ("POST", f"{PATH}/restore"): self._restore,
            ("POST", f"{PATH}/rename"): self._rename,
        }
        return {route: partial(_on_disk, handler) for route, handler in routes.items()}

    async def _get(self, request: Request) -> None:
        """`GET /lltm/sessions[?name=X]`: all of them, or one with its messages."""
        sessions, name = self._of(request), request.param("name")
        unfit = sessions.judge()
        await request.reply(200, await asyncio.to_thread(_shown, sessions.store, request.tenant, name, unfit))

    async def _save(self, request: Request) -> None:
        """`POST /lltm/sessions?name=X[&text=0]` with `{"messages", "model"}`; goes on if the client leaves.

        `text=0`: the messages are not kept; the cache's file still holds their tokens.
        """
        sessions, name = self._of(request), _name(request)
        limit_s = self._config.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                raw = await read_body(request.receive, request.headers, self._config.max_body_bytes)
        except TimeoutError:
            raise DeadlineError("the request", limit_s) from None
        body = await off_loop(len(raw), lambda: check_body(parse_json(raw)))
        keep_text = request.param("text") not in ("0", "false")
        info = await sessions.save(request, name, body, size_bytes=len(raw), keep_text=keep_text)
        await request.reply_json(asdict(info))

    async def _restore(self, request: Request) -> None:
        """`POST /lltm/sessions/restore?name=X`."""
        info = await self._of(request).restore(request, _name(request))
        await request.reply_json(asdict(info))

    async def _delete(self, request: Request) -> None:
        """`DELETE /lltm/sessions?name=X`."""
        store, name = self._of(request).store, _name(request)
        await asyncio.to_thread(store.delete, request.tenant, name)
        await request.reply_json({"name": name, "deleted": True})

    async def _rename(self, request: Request) -> None:
        """`POST /lltm/sessions/rename?name=X&to=Y`."""
        store, name = self._of(request).store, _name(request)
        to = check_name(request.param("to") or "", "to")
        kept = await asyncio.to_thread(store.rename, request.tenant, name, to)
        info = await asyncio.to_thread(store.info, kept)
        await request.reply_json(asdict(info))

    def _of(self, request: Request) -> Sessions:
        refuse_pages(request.headers, self._config.host, is_open=not request.tenant)
        if self._sessions is None:
            raise ConfigError("gateway.sessions_mib", 0, "this fleet keeps no sessions; start it with more")
        return self._sessions


def check_body(body: Any) -> dict[str, Any]:
    """What a save is given.

    Raises:
        ConfigError: a field is unknown, or these are no messages.
    """
    if not isinstance(body, dict):
        raise ConfigError("body", body, 'must be {"messages": [...]}')
    if unknown := sorted(body.keys() - _FIELDS):
        raise ConfigError(unknown[0], body[unknown[0]], f"is not kept; known are {', '.join(sorted(_FIELDS))}")
    messages = body.get("messages")
    is_list = isinstance(messages, list) and bool(messages)
    if not is_list or not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages or ()):
        raise ConfigError("messages", messages, "must be a list of at least one message, each with a role")
    return body


async def _on_disk(handler: Handler, request: Request) -> None:
    """A full disk, a folder that cannot be read: told in words, without paths."""
    try:
        await handler(request)
    except ClientGoneError:
        raise
    except OSError as error:
        raise LltmRayError(f"sessions cannot be read or written: {error.strerror or error}") from error


def _shown(store: SessionStore, tenant: str, name: str | None, unfit: Unfit) -> bytes:
    if name is None:
        return encode([asdict(info) for info in store.all_of(tenant, unfit)])
    return encode(asdict(store.info(*store.load_said(tenant, name), unfit)))


def _name(request: Request) -> str:
    return check_name(request.param("name") or "")
