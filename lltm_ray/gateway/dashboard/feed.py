"""One look a second for everybody who watches, and none while nobody does."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

log = logging.getLogger(__name__)

EVERY_S = 1.0


class TelemetryUnavailableError(Exception):
    """The fleet's telemetry does not answer now."""


class Telemetry(Protocol):
    """Where figures come from; the host brings it."""

    async def look(self) -> dict[str, Any]:
        """The fleet now, as `telemetry.live.Live.look` gives it.

        Raises:
            TelemetryUnavailableError: it does not answer.
        """

    async def timeline(self, request_id: str) -> dict[str, Any] | None:
        """A request's spans, `{"request": {...}, "spans": [...]}`; None if it is not (or no longer) known.

        Raises:
            TelemetryUnavailableError: it does not answer.
        """

    async def metrics(self, *, is_open: bool) -> bytes:
        """Everything as Prometheus' text, or as OpenMetrics' with exemplars if `is_open`.

        Raises:
            TelemetryUnavailableError: it does not answer.
        """


class Feed:
    """Looks as server-sent events.

    Args:
        telemetry: asked once a second, however many watch.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._latest = b""
        self._number = 0
        self._news = asyncio.Condition()
        self._watchers = 0
        self._task: asyncio.Task[None] | None = None

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Events for one page, the newest only: a slow reader misses some. Ends when looking does."""
        self._watchers += 1
        seen = 0
        if self._task is None:
            seen = self._number  # nobody has watched: what is here is old
            self._task = asyncio.create_task(self._run())
        try:
            while True:
                async with self._news:
                    await self._news.wait_for(lambda: self._number > seen or self._task is None)  # noqa: B023 - awaited here
                    if self._task is None:
                        return
                    seen, event = self._number, self._latest
                yield event
        finally:
            self._watchers -= 1

    def close(self) -> None:
        """End every stream that is being read."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            while self._watchers:
                event = await self._event()
                async with self._news:
                    self._latest, self._number = event, self._number + 1
                    self._news.notify_all()
                await asyncio.sleep(EVERY_S)
        finally:
            self._task = None
            async with self._news:
                self._news.notify_all()

    async def _event(self) -> bytes:
        try:
            look = await self._telemetry.look()
            text = json.dumps(look, separators=(",", ":"), allow_nan=False)
        except TelemetryUnavailableError as error:
            return b"event: away\ndata: %b\n\n" % json.dumps(str(error)).encode()
        except ValueError as error:
            log.exception("a look cannot be told as JSON")
            return b"event: away\ndata: %b\n\n" % json.dumps(f"a look cannot be told: {error}").encode()
        return b"event: look\ndata: %b\n\n" % text.encode()
