"""Calls from a driver to engines: routed, retried while nothing was delivered, cancelled with whoever waits."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import ray

from lltm_ray._turns import as_messages
from lltm_ray.actors import names
from lltm_ray.actors.crew import cause_of
from lltm_ray.actors.engine import CALL_TIMEOUT_S, OWN
from lltm_ray.actors.fleet import Fleet, get_engine, newest
from lltm_ray.actors.remote import find
from lltm_ray.actors.watch import keep_going, watch_fleet
from lltm_ray.errors import ConfigError, DeadlineError, EngineError, EngineExitedError, LltmRayError
from lltm_ray.llamacpp import wire
from lltm_ray.llamacpp.options import TIMEOUT, check_value, settle
from lltm_ray.records import Completion, FleetStatus, StreamEvent, Timings
from lltm_ray.routing.adapters import choose
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.prompt import prompt_key, reply_key
from lltm_ray.routing.router import Lease, Router, Served
from lltm_ray.routing.tries import Tries

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Tries of one call, as in the gateway."""
GRACE_S = 5.0
"""An engine's own deadline, which is for callers that are gone, comes so much after ours: an error that it raised while
we cancel would reach nobody, and Ray prints those."""
Messages = list[dict[str, Any]]
ROUTES = {
    "chat": "/v1/chat/completions",
    "complete": "/completion",
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank",
}
"""llama-server's route of each method."""
_GENERATE = ("chat", "complete")


class Calls:
    """Makes them. Lives on one event loop; `open` starts following the directory there."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._router = Router(2**31, CALL_TIMEOUT_S, wake=fleet.directory.wake.remote)
        self._places: dict[str, str] = {}
        self._closed: frozenset[str] = frozenset()
        self._renewals: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Learn the fleet's table and keep it true from here on."""
        status = await self._fleet.directory.status.remote()
        self._learn(status)
        self._watch = asyncio.get_running_loop().create_task(keep_going("follow the directory", self._follow))

    async def close(self) -> None:
        """Cancel whatever runs on this loop, which frees its slots, and wait until that is done."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        async for status in watch_fleet(self._fleet.config.name):
            self._learn(status)

    def _keep_off(self, closed: frozenset[str]) -> None:
        """Engines that a gateway drained get no requests from here either; who waits for them waits for their time."""
        for name in closed:
            self._router.close_engine(name, is_leaving=True)
        for name in self._closed - closed:
            self._router.open_engine(name)
        self._closed = closed

    def _learn(self, status: FleetStatus) -> None:
        self._router.update(status.engines, status.models)
        self._router.hint(status.hints, status.salt)
        self._keep_off(frozenset(name for gateway in status.gateways for name in gateway.closed))
        before, self._places = self._places, {engine.name: engine.node_id for engine in status.engines}
        for name, node_id in self._places.items():
            if before.get(name, node_id) != node_id:
                task = asyncio.get_running_loop().create_task(self._renew(name))
                self._renewals.add(task)
                task.add_done_callback(self._renewals.discard)

    async def call(self, method: str, *args: Any, timeout_s: float, **params: Any) -> Any:
        """One method of the chosen engine's actor."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._call(method, *args, timeout_s=timeout_s, **params)
        except TimeoutError:
            raise DeadlineError(f"{method} on fleet {self._fleet.config.name!r}", timeout_s) from None

    async def ask_any(self, method: str, *args: Any, model: str, timeout_s: float) -> Any:
        """One method of any ready engine's actor, for what takes no slot."""
        check_value(TIMEOUT, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                tries = Tries(self._router, MAX_ATTEMPTS)
                while True:
                    engine = self._router.pick(model or None, exclude=tries.avoid)
                    try:
                        return await _awaited(getattr(self._handle(engine.name), method).remote(*args), engine.name)
                    except EngineError:
                        tries.fail(engine)
                        if tries.is_over:
                            raise
        except TimeoutError:
            raise DeadlineError(f"{method} on fleet {self._fleet.config.name!r}", timeout_s) from None

    async def batch(
        self, prompts: Iterable[Any], *, timeout_s: float, return_exceptions: bool = False, **params: Any
    ) -> list[Completion | BaseException]:
        """One call for each prompt, all at once, when all of them are prompts.

        The first error cancels the rest, or with `return_exceptions` stands in its prompt's place; a call that was
        cancelled is none, and raised.
        """
        asked = [_read_prompt(place, prompt) for place, prompt in enumerate(prompts)]
        check_value(TIMEOUT, timeout_s)
        methods, own = {method for method, _ in asked} or _GENERATE, (*OWN, "return_exceptions")
        settled = {method: settle(ROUTES[method], params, own=own) for method in methods}
        calls = [
            self._placed(place, method, prompt, timeout_s=timeout_s, **settled[method])
            for place, (method, prompt) in enumerate(asked)
        ]
        if return_exceptions:
            return _none_cancelled(await asyncio.gather(*calls, return_exceptions=True))
        async with _first_error(), asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
        return [task.result() for task in tasks]

    async def _placed(self, place: int, method: str, prompt: Any, **params: Any) -> Completion:
        """A call of a batch; its error notes which."""
        try:
            answer: Completion = await self.call(method, prompt, **params)
            return answer
        except LltmRayError as error:
            error.add_note(f"prompts[{place}] of the batch")
            raise

    async def stream(self, messages: Messages, *, timeout_s: float, **params: Any) -> AsyncIterator[StreamEvent]:
        """Tried elsewhere as long as no event was delivered."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        params = settle(ROUTES["chat"], params, own=OWN)
        ask = self._ask("chat", messages, timeout_s=timeout_s, **params)
        tries = Tries(self._router, MAX_ATTEMPTS, ask=ask)
        while True:
            lease = await self._router.acquire(ask, exclude=tries.avoid)
            delivered, served, text, source = False, None, [], None
            try:
                handle = self._handle(lease.engine.name)
                params |= _adapters(lease)
                stream = handle.stream.options(num_returns="streaming")
                source = stream.remote(messages, timeout_s=timeout_s + GRACE_S, **params)
                while (event := await _next_event(source, deadline, timeout_s, lease.engine.name)) is not None:
                    delivered = True
                    self._router.began(lease)
                    text.append(event.text)
                    if event.timings is not None:
                        served = _served("chat", event.timings, "".join(text))
                    yield event
                return
            except LltmRayError as error:
                if delivered or not self._may_retry(error, lease, tries):
                    raise
            finally:
                if source is not None:
                    ray.cancel(source)
                self._router.release(lease, served)

    async def _call(self, method: str, *args: Any, **params: Any) -> Any:
        params = settle(ROUTES[method], params, own=OWN)
        ask = self._ask(method, *args, **params)
        params["timeout_s"] += GRACE_S
        tries = Tries(self._router, MAX_ATTEMPTS, ask=ask)
        while True:
            lease, served = await self._router.acquire(ask, exclude=tries.avoid), None
            try:
                if method in _GENERATE:
                    params |= _adapters(lease)
                name = lease.engine.name
                answer = await _awaited(getattr(self._handle(name), method).remote(*args, **params), name)
                lease.row.recover()
                if isinstance(answer, Completion):
                    served = _served(method, answer.timings, answer.text)
                return answer
            except LltmRayError as error:
                if not self._may_retry(error, lease, tries):
                    raise
            finally:
                self._router.release(lease, served)

    def _ask(self, method: str, *args: Any, timeout_s: float, **params: Any) -> Ask:
        """As the gateway asks for the same request; the slot is llama-server's choice, for others claim some too."""
        body = params | {"messages" if method == "chat" else "prompt": args[0] if args else None}
        path, model = ROUTES[method] if method in _GENERATE else "", params.get("model") or ""
        lora = None
        if path and (":" in model or params.get("lora")):
            served = self._router.resolve(model)
            lora = choose(model, params.get("lora"), served, self._router.engines(served))
        return Ask(
            model=model,
            key=prompt_key(path, body, lora),
            max_tokens=params.get("max_tokens"),
            deadline_s=time.monotonic() + timeout_s,
            adapter=lora[0][0] if lora else "",
            lora=lora,
            can_pin=False,
        )

    def _may_retry(self, error: LltmRayError, lease: Lease, tries: Tries) -> bool:
        """An engine that is gone or going has given nothing: another one may."""
        if not isinstance(error, EngineError):
            return False
        tries.fail(lease.engine, is_broken=isinstance(error, EngineExitedError))
        return not tries.is_over

    def _handle(self, name: str) -> Any:
        if name not in self._fleet.engines:
            try:
                self._fleet.engines[name] = get_engine(self._fleet.config.name, name)
            except ValueError as error:  # it was stopped since the table was made
                raise EngineExitedError(name) from error
        return self._fleet.engines[name]

    async def _renew(self, name: str) -> None:
        """An engine is on another node: by Ray, as the same actor, or made anew under its name."""
        found = await asyncio.to_thread(find, names.engine(self._fleet.config.name, name))
        if found is not None:
            self._fleet.engines[name] = newest(self._fleet.engines.get(name), found)


def _adapters(lease: Lease) -> dict[str, Any]:
    """What the engine is to be told of its adapters."""
    field: dict[str, Any] = json.loads(b"{%b}" % lease.lora)
    return field


def _served(method: str, timings: Timings, text: str) -> Served:
    return Served(timings=timings, reply=reply_key(ROUTES[method], text))


class _first_error:  # noqa: N801 - used as a statement
    """Turn a task group's group of errors into the first of them."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None


def _read_prompt(place: int, prompt: Any) -> tuple[str, Any]:
    """The method that answers a prompt of a batch, and what it takes."""
    is_messages = isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping)
    try:
        return ("chat", as_messages(prompt)) if is_messages else ("complete", wire.as_prompt(prompt))
    except ConfigError as error:
        part = error.field.removeprefix("messages").removeprefix("prompt")
        raise ConfigError(f"prompts[{place}]{part}", error.value, error.why) from None


def _none_cancelled(done: list[Completion | BaseException]) -> list[Completion | BaseException]:
    for each in done:
        if isinstance(each, asyncio.CancelledError):
            raise each
    return done


async def _awaited(call: Any, engine: str) -> Any:
    """A Ray result with our own errors as raised; cancelling the wait cancels the call."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None
    except ray.exceptions.RayActorError as error:
        log.info("%s does not answer: %s", engine, error)
        raise EngineExitedError(engine) from None
    except asyncio.CancelledError:
        ray.cancel(call)
        raise


async def _next_event(source: Any, deadline: float, timeout_s: float, engine: str) -> StreamEvent | None:
    try:
        async with asyncio.timeout_at(deadline):
            event: StreamEvent = await _awaited(await anext(source), engine)
            return event
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise DeadlineError("the stream", timeout_s) from None
