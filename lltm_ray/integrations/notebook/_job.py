"""Work in the background for a notebook: `Job` runs one coroutine, `Pace` keeps its news from flooding the page."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """One coroutine on a thread and an event loop of its own, which end with it.

    Args:
        work: what to run; a `cancel` reaches it at an `await`, never before it has begun.
    """

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.result: Future[T] = Future()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(work)
        self._lock = threading.Lock()
        self._is_ending = False

    def start(self) -> None:
        """Let it run; returns at once."""
        threading.Thread(target=self._run, name="lltm-ray-notebook", daemon=True).start()

    def cancel(self) -> None:
        """Ask it to end; only the first time counts."""
        with self._lock:
            if not self._is_ending:
                self._is_ending = True
                self._loop.call_soon_threadsafe(self._task.cancel)

    def _run(self) -> None:
        try:
            self.result.set_result(self._loop.run_until_complete(self._task))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self.result.set_exception(error)
        finally:
            with self._lock:
                self._is_ending = True
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


class Pace:
    """Calls `tell` so often at most, and once more for what came last. Belongs to a running event loop.

    Args:
        tell: what to call.
        per_s: calls a second.
    """

    def __init__(self, tell: Callable[[], None], per_s: float) -> None:
        self._tell, self._every_s = tell, 1 / per_s
        self._loop = asyncio.get_running_loop()
        self._next_s = self._loop.time()
        self._waiting: asyncio.TimerHandle | None = None

    def news(self) -> None:
        """There is something to tell."""
        if self._waiting is None:
            self._waiting = self._loop.call_at(self._next_s, self._now)

    def end(self) -> None:
        """Nothing will be told any more."""
        if self._waiting is not None:
            self._waiting.cancel()

    def _now(self) -> None:
        self._waiting = None
        self._next_s = self._loop.time() + self._every_s
        self._tell()
