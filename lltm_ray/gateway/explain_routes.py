"""`/lltm/explain`: what the account says of a request, and of the latest ones."""

from __future__ import annotations

import asyncio
import re

from lltm_ray.errors import ConfigError
from lltm_ray.gateway.request import Handler, Request
from lltm_ray.routing.ledger import Ledger

PATH = "/lltm/explain"
_MOST = 1000
_NUMBER = re.compile(r"[0-9]{1,4}\Z")


class ExplainRoutes:
    """Answers from the ledger, or says that there is none."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    def build(self) -> dict[tuple[str, str], Handler]:
        """Handlers by method and path."""
        return {("GET", PATH): self._latest}

    async def explain_path(self, request: Request) -> None:
        """`GET /lltm/explain/{id}`: one request."""
        id_ = request.path.removeprefix(PATH + "/")
        entry = await asyncio.to_thread(self._open.explain, id_)
        if entry is None:
            error = {"message": f"no request {id_!r} in the account", "type": "not_found_error", "code": 404}
            await request.reply_json({"error": error}, 404)
            return
        await request.reply_json(entry)

    async def _latest(self, request: Request) -> None:
        """`GET /lltm/explain[?limit=20][&tenant=]`: the latest requests."""
        limit = request.param("limit") or "20"
        if not _NUMBER.match(limit) or not 0 < int(limit) <= _MOST:
            raise ConfigError("limit", limit, f"must be a number from 1 to {_MOST}")
        tenant = request.param("tenant") or ""
        found = await asyncio.to_thread(self._open.find, limit=int(limit), tenant=tenant)
        await request.reply_json({"requests": found})

    @property
    def _open(self) -> Ledger:
        if self._ledger is None:
            raise ConfigError("ledger", False, "this gateway keeps no account; start it with gateway.ledger = true")
        return self._ledger
