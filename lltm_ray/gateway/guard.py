"""Ends a request from outside: its client left, or its deadline passed."""

from __future__ import annotations

import asyncio
from enum import StrEnum

from lltm_ray.gateway.replies import ClientLink, Receive


class Cause(StrEnum):
    """Why a request was ended."""

    CLIENT_GONE = "client gone"
    DEADLINE = "deadline"


class Guard:
    """Cancels the task it was made in, and remembers why, so that every wait of a request ends the same way.

    The task must catch `CancelledError` and call `absorb`; with no cause the cancellation came from elsewhere.
    """

    __slots__ = ("_deadlines", "_link", "_task", "_watcher", "cause", "ends_at")

    def __init__(self, deadlines: Deadlines, ends_at: float) -> None:
        self._task = asyncio.current_task()
        self._deadlines = deadlines
        self._link: ClientLink | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.ends_at = ends_at
        self.cause: Cause | None = None

    def watch(self, receive: Receive, link: ClientLink | None) -> None:
        """Look out for the client's disconnect; its request must have been read.

        Args:
            receive: what any ASGI host offers, at the price of a task.
            link: what our own host offers instead: a call when the socket is gone.
        """
        if link is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch(receive))
        else:
            self._link = link
            link.when_gone(self._gone)

    def absorb(self) -> Cause | None:
        """After a `CancelledError`: the cause, its cancellation taken back; None if it was not ours."""
        if self.cause is not None and self._task is not None:
            self._task.uncancel()
        return self.cause

    def close(self) -> None:
        """The request is over; nothing may cancel its task any more."""
        self._task = None
        self._deadlines.forget(self)
        if self._link is not None:
            self._link.when_gone(None)
        if self._watcher is not None:
            self._watcher.cancel()

    def trip(self, cause: Cause) -> None:
        """Cancel the request, once."""
        if self._task is not None and self.cause is None:
            self.cause = cause
            self._task.cancel()

    def _gone(self) -> None:
        self.trip(Cause.CLIENT_GONE)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone()


class Deadlines:
    """Trips guards whose time is over. One timer for all: a timer each would cost every request as much as its routing.

    Args:
        limit_s: life of each guard; looked at every second, or ten times in a shorter life.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._step_s = min(1.0, limit_s / 10)
        self._guards: set[Guard] = set()
        self._timer: asyncio.TimerHandle | None = None

    def guard(self) -> Guard:
        """A guard over the current task, from now on."""
        loop = asyncio.get_running_loop()
        guard = Guard(self, loop.time() + self._limit_s)
        self._guards.add(guard)
        if self._timer is None:
            self._timer = loop.call_later(self._step_s, self._look)
        return guard

    def forget(self, guard: Guard) -> None:
        """A guard that is closed."""
        self._guards.discard(guard)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for guard in list(self._guards):
            if guard.ends_at <= now:
                guard.trip(Cause.DEADLINE)
        self._timer = loop.call_later(self._step_s, self._look) if self._guards else None
