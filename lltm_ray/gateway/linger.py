"""Keeps a slot claimed whose request nobody waits for any more, until its engine has stopped working on it.

llama-server notices that a client left only where it streams. An answer that must be asked for whole is generated to
its end: a slot that were given out before would make the next request wait inside the server, unseen.
"""

from __future__ import annotations

import asyncio
import json
import logging

from lltm_ray.gateway.headers import build_request
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.upstream import Headers
from lltm_ray.routing.router import Lease, Router

_log = logging.getLogger(__name__)
FIRST_LOOK_S, LAST_LOOK_S = 0.05, 1.0
_LIMIT_BYTES = 32 * 2**20
_MAX_SILENCES = 3
"""Looks without an answer after which the server counts as gone, and its slots with it."""


class Lingerer:
    """Watches slots that must not be given out yet."""

    def __init__(self, router: Router, pool: UpstreamPool) -> None:
        self._router = router
        self._pool = pool
        self._tasks: set[asyncio.Task[None]] = set()

    def hold(self, lease: Lease) -> None:
        """Release the lease when its engine is done with it."""
        task = asyncio.get_running_loop().create_task(self._watch(lease))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Release everything now."""
        for task in list(self._tasks):
            task.cancel()

    async def _watch(self, lease: Lease) -> None:
        pause_s, silences = FIRST_LOOK_S, 0
        suspects: set[tuple[int, int]] | None = None
        try:
            while silences < _MAX_SILENCES:
                await asyncio.sleep(pause_s)
                pause_s = min(LAST_LOOK_S, pause_s * 1.5)
                working = await self._working(lease)
                silences = silences + 1 if working is None else 0
                if working is None:
                    continue
                suspects = working if suspects is None else suspects & working
                if not _may_run(lease, working, suspects):
                    return
        finally:
            self._router.release(lease)

    async def _working(self, lease: Lease) -> set[tuple[int, int]] | None:
        """Slots of its engine that work, each with its task's number; None: no answer."""
        engine = lease.engine
        headers: Headers = [(b"authorization", b"Bearer " + engine.api_key.encode("utf-8"))] if engine.api_key else []
        request = build_request(b"GET", b"/slots", engine.url, headers, b"")
        try:
            async with asyncio.timeout(5.0):
                status, _, body = await self._pool.fetch(engine.url, request, limit_bytes=_LIMIT_BYTES)
            slots = json.loads(body) if status == 200 else None
        except (OSError, TimeoutError, ValueError) as error:
            _log.debug("engine %s gave no slots: %s", engine.name, error)
            return None
        if slots is None:
            return None
        return {(slot["id"], slot.get("id_task", -1)) for slot in slots if slot.get("is_processing")}


def _may_run(lease: Lease, working: set[tuple[int, int]], suspects: set[tuple[int, int]]) -> bool:
    """Whether its slot still works; if nobody knows which, one that did from the first look, and more than are claimed.

    Slots of other gateways work too, so that their number alone would never tell the end.
    """
    if lease.slot >= 0:
        return any(slot == lease.slot for slot, _ in working)
    return bool(suspects) and len(working) >= lease.row.busy
