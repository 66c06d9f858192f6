"""Sends a process's rows and log lines to the telemetry actor: nothing that happens to it reaches whoever made them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

import ray

from lltm_ray.actors import names
from lltm_ray.actors.remote import find
from lltm_ray.telemetry.logs import LogHandler
from lltm_ray.telemetry.outbox import Outbox
from lltm_ray.telemetry.parcel import Parcel, seal

log = logging.getLogger(__name__)

EVERY_S = 0.5
"""Each call is 1.5 ms of CPU, of Ray's for the most part."""
MOST_IN_FLIGHT = 4
"""Batches that wait for the actor; beyond them rows stay here, where the oldest are dropped when room ends."""
_LAST_WORDS_S = 1.0
_ANSWER_S = 10.0
"""A batch that is not taken in this time is lost: a hung actor must not hold the next ones up for ever."""


class Sender:
    """Of one process, on its event loop.

    Args:
        fleet: whose telemetry actor.
        name: of this process, for the account of what was lost.
    """

    def __init__(self, fleet: str, name: str) -> None:
        self.outbox = Outbox()
        self._fleet, self._name = fleet, f"{name}/{secrets.token_hex(4)}"
        self._logs = LogHandler(self.outbox.add, name)
        self._actor: Any | None = None
        self._in_flight: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send, for ever; on cancellation what is left is sent once more."""
        with self._logs.installed():
            await asyncio.to_thread(seal, [])  # loads the codec
            try:
                while True:
                    await asyncio.sleep(EVERY_S)
                    await self._flush()
            finally:
                await self._send_some()
                if self._in_flight:  # the process may end with us
                    await asyncio.wait(self._in_flight, timeout=_LAST_WORDS_S)

    async def _flush(self) -> None:
        if len(self.outbox) and self._actor is None:
            self._actor = await self._reach()
        await self._send_some()

    async def _reach(self) -> Any | None:
        """The actor if it answers; until then rows wait here, for Ray gives up what is sent to one that restarts."""
        try:
            actor = await asyncio.to_thread(find, names.telemetry(self._fleet))
            if actor is None:
                return None
            async with asyncio.timeout(_ANSWER_S):
                await actor.put.remote(self._name, {}, dict(self.outbox.dropped))
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.debug("telemetry does not answer %s: %s", self._name, error)
            return None
        return actor

    async def _send_some(self) -> None:
        """At most one parcel in a step of the event loop."""
        while self._actor is not None and len(self._in_flight) < MOST_IN_FLIGHT:
            parcel = self.outbox.take()
            if not parcel:
                return
            task = asyncio.ensure_future(self._send(self._actor, parcel))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)
            await asyncio.sleep(0)

    async def _send(self, actor: Any, parcel: Parcel) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                await actor.put.remote(self._name, parcel, dict(self.outbox.dropped))
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.debug("a parcel of %s was not taken: %s", self._name, error)
            self.outbox.lose(parcel)
            self._actor = None  # it may come back as another one
