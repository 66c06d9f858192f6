"""Asking a llama-server to save or restore one of its slots, and which build of llama.cpp it is."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import urlencode

from lltm_ray.gateway.headers import build_request
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.upstream import Headers
from lltm_ray.gateway.work import Notes, Work, working
from lltm_ray.llamacpp import wire
from lltm_ray.llamacpp.replies import Reply, SlotAction
from lltm_ray.llamacpp.wire import Call
from lltm_ray.records import EngineInfo
from lltm_ray.telemetry import semconv as names

T = TypeVar("T")
_ANSWER_LIMIT_BYTES = 2**20


class SlotCalls:
    """All raise OSError or LltmRayError when the server cannot be reached or does not do it.

    Args:
        pool: connections to the servers.
        notes: told of every call; None: nobody is.
    """

    def __init__(self, pool: UpstreamPool, notes: Notes | None = None) -> None:
        self._pool = pool
        self._notes = notes
        self._builds: dict[str, tuple[str, int | None, str]] = {}

    async def save(self, engine: EngineInfo, slot: int, filename: str) -> SlotAction:
        """Write a slot into a file of the engine's folder."""
        return await self._ask(engine, "slot save", wire.slot_save(slot, filename))

    async def restore(self, engine: EngineInfo, slot: int, filename: str) -> SlotAction:
        """Read a slot from a file of the engine's folder; llama.cpp clears a slot that it cannot restore."""
        return await self._ask(engine, "slot restore", wire.slot_restore(slot, filename))

    async def build(self, engine: EngineInfo) -> str:
        """What the server says of its llama.cpp, such as `b11434-1a2b3c4`; asked once in a server's life."""
        url, pid, known = self._builds.get(engine.name, ("", None, ""))
        if (url, pid) != (engine.url, engine.server_pid):
            known = str((await self._send(engine, wire.props())).get("build_info") or "unknown")
            self._builds[engine.name] = engine.url, engine.server_pid, known
        return known

    async def _ask(self, engine: EngineInfo, name: str, call: Call[SlotAction]) -> SlotAction:
        with working(self._notes, Work(name, engine.name, "client")) as work:
            done = await self._send(engine, call)
            work.attributes[names.SLOT_ID] = done.slot_id
            work.attributes |= {names.SLOT_TOKENS: done.tokens, names.SLOT_BYTES: done.size_bytes}
            return done

    async def _send(self, engine: EngineInfo, call: Call[T]) -> T:
        headers: Headers = [(b"content-type", b"application/json")]
        if engine.api_key:
            headers.append((b"authorization", b"Bearer " + engine.api_key.encode("utf-8")))
        target = f"{call.path}?{urlencode(call.query)}".rstrip("?").encode("ascii")
        request = build_request(call.method.encode("ascii"), target, engine.url, headers, wire.encode(call.body) or b"")
        status, _, body = await self._pool.fetch(engine.url, request, limit_bytes=_ANSWER_LIMIT_BYTES, fresh=True)
        return call.read(Reply(status, body))
