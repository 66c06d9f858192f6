"""A look at a running load: what came between two moments, for comparing settings in little time.

`run_load` waits for every answer; here what still runs at the end is dropped, and tokens count when they come. A
request that had no token by then counts with the time it had waited: leaving it out would make the slowest server look
best.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import aiohttp

from lltm_ray.errors import LltmRayError
from lltm_ray.load.conversations import ConversationPrompts, Shape
from lltm_ray.load.result import LoadPlan, Sent
from lltm_ray.load.run import LoadRun, first_model, open_session, size_prompts

_TICK_S = 0.02
_ENDLESS_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was seen."""

    seconds: float
    ended: int
    """Requests that ended well since the start, warm-up included."""
    requests_per_s: float
    """Of these."""
    tokens_per_s: float
    waits_s: tuple[float, ...]
    """To the first token, of requests that were due in the window; until it was given up, where none came."""
    errors: dict[str, int]
    error_example: str
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """When to look, in seconds."""

    window_s: float
    warmup_s: float = 0.0
    """Of load, before."""
    grace_s: float = 0.0
    """For requests of the window to bring their first token after it."""
    enough: int | None = None
    """End the window when so many requests have ended."""


async def run_window(plan: LoadPlan, shape: Shape, look: Look, *, stop: asyncio.Event) -> Window:
    """Load a server and look at it for a while.

    Args:
        plan: what to send; its `requests` and `duration_s` are not looked at.
        shape: prompts.
        look: when.
        stop: when set, it ends at once.

    Raises:
        LltmRayError: the server cannot be reached, or refuses the probes.
    """
    async with open_session(plan) as session:
        try:
            model = plan.model or await first_model(session, plan)
            prompts = ConversationPrompts.sized(await size_prompts(session, plan, model, shape.longest_tokens), shape)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise LltmRayError(f"cannot reach {plan.url}: {error or 'no answer'}") from error
        run = LoadRun(replace(plan, requests=None, duration_s=_ENDLESS_S), session, model, prompts)
        return await _look(run, look, stop)


async def _look(run: LoadRun, look: Look, stop: asyncio.Event) -> Window:
    work = asyncio.create_task(run.work())
    try:
        await _until(work, lambda: stop.is_set() or run.now() >= look.warmup_s)
        began_s, before = run.now(), run.streamed
        end_s, enough = look.warmup_s + look.window_s, look.enough or _ENDLESS_S
        await _until(work, lambda: stop.is_set() or run.now() >= end_s or len(run.records) >= enough)
        ended_s, after = run.now(), run.streamed
        late = _due(run, began_s, ended_s)
        await _until(
            work,
            lambda: (
                stop.is_set()
                or run.now() >= ended_s + look.grace_s
                or all(each.first_s is not None or each.error for each in late)
            ),
        )
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    return _sum_up(run, began_s, ended_s, after - before, stopped=stop.is_set())


async def _until(work: asyncio.Task[None], is_over: Callable[[], bool]) -> None:
    while not is_over():
        await asyncio.wait((work,), timeout=_TICK_S)
        if work.done():
            work.result()


def _due(run: LoadRun, began_s: float, ended_s: float) -> list[Sent]:
    return [
        each for each in (*run.records, *run.running.values()) if began_s <= each.due_s < ended_s and not each.error
    ]


def _sum_up(run: LoadRun, began_s: float, ended_s: float, tokens: int, *, stopped: bool) -> Window:
    now = run.now()
    failed = [each for each in run.records if each.error]
    good = [each for each in run.records if not each.error and each.ended_s <= ended_s]
    due = [each for each in (*run.records, *run.dropped) if began_s <= each.due_s < ended_s and not each.error]
    return Window(
        seconds=ended_s - began_s,
        ended=len(good),
        requests_per_s=len(good) / ended_s if ended_s else 0.0,
        tokens_per_s=tokens / (ended_s - began_s) if ended_s > began_s else 0.0,
        waits_s=tuple((now if each.first_s is None else each.first_s) - each.due_s for each in due),
        errors=dict(Counter(each.error for each in failed)),
        error_example=failed[0].detail if failed else "",
        stopped=stopped,
    )
