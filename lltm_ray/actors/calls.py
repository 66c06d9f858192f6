"""Calls from a driver to engines: routed, retried while nothing was delivered, cancelled with whoever waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray

from lltm_ray.actors.engine import CALL_TIMEOUT_S
from lltm_ray.actors.fleet import Fleet, cause_of, get_engine
from lltm_ray.actors.watch import watch_fleet
from lltm_ray.errors import DeadlineError, EngineError, EngineExitedError, LltmRayError
from lltm_ray.records import Completion, StreamEvent
from lltm_ray.routing.router import Lease, Router

MAX_ATTEMPTS = 3
"""Engines tried for one call, as in the gateway."""
Messages = list[dict[str, Any]]


class Calls:
    """Makes them. Lives on one event loop; `open` starts following the directory there."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._router = Router(queue_limit=2**31, queue_timeout_s=CALL_TIMEOUT_S)

    async def open(self) -> None:
        """Learn the fleet's table and keep it true from here on."""
        self._router.update((await self._fleet.directory.status.remote()).engines)
        self._watch = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Cancel whatever runs on this loop, which frees its slots, and wait until that is done."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        async for status in watch_fleet(self._fleet.config.name):
            self._router.update(status.engines)

    async def call(self, method: str, *args: Any, timeout_s: float, **params: Any) -> Any:
        """One method of the least loaded engine's actor."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._call(method, *args, timeout_s=timeout_s, **params)
        except TimeoutError:
            raise DeadlineError(f"{method} on fleet {self._fleet.config.name!r}", timeout_s) from None

    async def batch(self, prompts: Sequence[Any], *, timeout_s: float, **params: Any) -> list[Completion]:
        """One call for each prompt, all at once; the first error cancels the rest."""
        async with _first_error(), asyncio.TaskGroup() as group:
            calls = [
                group.create_task(self.call(_method_for(prompt), prompt, timeout_s=timeout_s, **params))
                for prompt in prompts
            ]
        return [call.result() for call in calls]

    async def stream(self, messages: Messages, *, timeout_s: float, **params: Any) -> AsyncIterator[StreamEvent]:
        """Tried elsewhere as long as no event was delivered."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        tried: set[str] = set()
        while True:
            lease = await self._router.acquire(None, exclude=tried, timeout_s=timeout_s)
            source = (
                self._handle(lease)
                .stream.options(num_returns="streaming")
                .remote(messages, timeout_s=timeout_s, **params)
            )
            delivered = False
            try:
                while (event := await _next_event(source, deadline, timeout_s)) is not None:
                    delivered = True
                    yield event
                return
            except LltmRayError as error:
                if delivered or not self._may_retry(error, lease, tried):
                    raise
            finally:
                ray.cancel(source)
                self._router.release(lease)

    async def _call(self, method: str, *args: Any, **params: Any) -> Any:
        tried: set[str] = set()
        while True:
            lease = await self._router.acquire(None, exclude=tried)
            try:
                return await _awaited(getattr(self._handle(lease), method).remote(*args, **params))
            except LltmRayError as error:
                if not self._may_retry(error, lease, tried):
                    raise
            finally:
                self._router.release(lease)

    def _may_retry(self, error: LltmRayError, lease: Lease, tried: set[str]) -> bool:
        """An engine that is gone or going has given nothing: another one may."""
        if not isinstance(error, EngineError) or len(tried) + 1 >= MAX_ATTEMPTS:
            return False
        tried.add(lease.engine.name)
        self._router.suspect(lease.engine)
        return True

    def _handle(self, lease: Lease) -> Any:
        name = lease.engine.name
        if name not in self._fleet.engines:
            self._fleet.engines[name] = get_engine(self._fleet.config.name, name)
        return self._fleet.engines[name]


class _first_error:  # noqa: N801 - used as a statement
    """Turn a task group's group of errors into the first of them."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None


def _method_for(prompt: Any) -> str:
    return "chat" if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict) else "complete"


async def _awaited(call: Any) -> Any:
    """A Ray result with our own errors as raised; cancelling the wait cancels the call."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None
    except ray.exceptions.RayActorError as error:
        raise EngineExitedError(str(error).splitlines()[0]) from None
    except asyncio.CancelledError:
        ray.cancel(call)
        raise


async def _next_event(source: Any, deadline: float, timeout_s: float) -> StreamEvent | None:
    try:
        async with asyncio.timeout_at(deadline):
            event: StreamEvent = await _awaited(await anext(source))
            return event
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise DeadlineError("the stream", timeout_s) from None
