"""An event loop on a thread of its own, for objects that blocking code uses from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar, cast

from lltm_ray.errors import FleetError

T = TypeVar("T")
_END_S = 5.0
"""How long tasks that `stop` cancels may take to end."""


class Loop:
    """Runs from its making until `stop`.

    Args:
        owner: class of the object that it belongs to, for errors.
        remedy: what to do once that object is closed.
    """

    def __init__(self, owner: str, remedy: str) -> None:
        self._owner, self._remedy = owner, remedy
        self._stopped = False
        self._lock = threading.RLock()  # the garbage collector may end a stream, and so call `run`, inside of `run`
        self._unwaited: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"lltm-ray-{owner}", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop, wait here; Ctrl-C here cancels it there.

        On the loop's own thread, where the garbage collector may end a stream, the work is started and not waited for:
        None.

        Raises:
            FleetError: the loop was stopped, before or meanwhile.
        """
        if threading.current_thread() is self._thread:
            task = self._loop.create_task(work)
            self._unwaited.add(task)
            task.add_done_callback(self._unwaited.discard)
            return cast(T, None)
        with self._lock:
            if self._stopped:
                work.close()
                raise FleetError(f"this {self._owner} object is closed: {self._remedy}")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise FleetError(f"this {self._owner} object was closed while the call ran") from None
        except BaseException:
            future.cancel()
            raise

    @property
    def is_closed(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """Cancel what runs on the loop and end the thread; a second call does nothing."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            ended = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        try:
            ended.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_END_S)
        await asyncio.wait([self._loop.create_task(self._loop.shutdown_asyncgens())], timeout=_END_S)
