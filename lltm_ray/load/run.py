"""The load generator: sends chat completions, measures each, sums up. Prints nothing.

Closed loop: so many workers, each sends its next request when the last has ended. Open loop: requests arrive by a
seeded Poisson process whatever the server does, and every time counts from the *scheduled* arrival, so that a stalled
server cannot slow its own measurement down (coordinated omission; G. Tene, "How NOT to Measure Latency").
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import aiohttp

from lltm_ray.errors import LltmRayError, ModelNotFoundError, UpstreamError
from lltm_ray.load.answer import AnswerReader
from lltm_ray.load.conversations import Prompts
from lltm_ray.load.prompts import PromptMaker
from lltm_ray.load.result import LoadPlan, LoadResult, Sent, summarize

_PROBE_WORDS = (8, 24)
_TICK_S = 0.2
Progress = Callable[[str, int, int | None], None]


async def run_load(
    plan: LoadPlan, *, stop: asyncio.Event | None = None, progress: Progress | None = None
) -> LoadResult:
    """Carry the plan out.

    Args:
        plan: what to send.
        stop: when set, running requests are dropped and the result covers what had ended by then.
        progress: hears of ended requests five times a second.

    Raises:
        LltmRayError: the server cannot be reached at all.
        UpstreamError: it refuses even the two probe requests that size the prompts.
    """
    async with open_session(plan) as session:
        try:
            model = plan.model or await first_model(session, plan)
            prompts = await size_prompts(session, plan, model, plan.prompt_tokens)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise LltmRayError(f"cannot reach {plan.url}: {error or 'no answer'}; is it up? (`lltm-ray up`)") from error
        run = LoadRun(plan, session, model, prompts)
        interrupted = await _watch(run, stop or asyncio.Event(), progress)
        return summarize(
            plan, model, run.records, wall_s=run.now(), cancelled=len(run.dropped), interrupted=interrupted
        )


async def _watch(run: LoadRun, stop: asyncio.Event, progress: Progress | None) -> bool:
    """Wait for the run or for `stop`; returns whether it was stopped."""
    work, stopped = asyncio.create_task(run.work()), asyncio.create_task(stop.wait())
    try:
        while not work.done() and not stopped.done():
            await asyncio.wait((work, stopped), timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
            if progress is not None:
                progress("requests", len(run.records), run.plan.request_limit)
        if work.done():
            work.result()
        return not work.done()
    finally:
        for task in (work, stopped):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class LoadRun:
    """One run under way; single-threaded, so plain lists and counters do."""

    def __init__(self, plan: LoadPlan, session: aiohttp.ClientSession, model: str, prompts: Prompts) -> None:
        self.plan = plan
        self.records: list[Sent] = []
        self.running: dict[int, Sent] = {}
        self.dropped: list[Sent] = []
        self.streamed = 0
        """Events with content, of all requests."""
        self._session = session
        self._model = model
        self._prompts = prompts
        self._start = time.perf_counter()  # uvloop's own clock ticks in milliseconds

    def now(self) -> float:
        """Seconds since the run's start."""
        return time.perf_counter() - self._start

    async def work(self) -> None:
        """Send everything and wait for the last answer."""
        async with asyncio.TaskGroup() as group:
            if self.plan.rate is not None:
                await self._arrive(group)
                return
            numbers = self._numbers()
            for _ in range(self.plan.concurrency):
                group.create_task(self._repeat(numbers))

    def _numbers(self) -> Iterator[int]:
        limit, end_s = self.plan.request_limit, self.plan.duration_s
        for number in itertools.count() if limit is None else range(limit):
            if end_s is not None and self.now() >= end_s:
                return
            yield number

    async def _repeat(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._measure(number, self.now())

    async def _arrive(self, group: asyncio.TaskGroup) -> None:
        rng = random.Random(self.plan.seed)  # noqa: S311 - arrivals, not secrets
        due_s, rate = 0.0, self.plan.rate or 1.0
        for number in itertools.count() if self.plan.request_limit is None else range(self.plan.request_limit):
            due_s += rng.expovariate(rate)
            if self.plan.duration_s is not None and due_s >= self.plan.duration_s:
                return
            await asyncio.sleep(due_s - self.now())
            group.create_task(self._measure(number, due_s))

    async def _measure(self, number: int, due_s: float) -> None:
        record = self.running[number] = Sent(due_s=due_s, started_s=self.now())
        try:
            await self._send(number, record)
        except asyncio.CancelledError:
            self.dropped.append(record)
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            record.error, record.detail = _kind(error), str(error)
        finally:
            del self.running[number]
        record.ended_s = self.now()
        self.records.append(record)

    async def _send(self, number: int, record: Sent) -> None:
        body = _body(self.plan, self._model, self._prompts.make(number), number)
        async with await self._post(body, record) as response:
            record.engine = response.headers.get("x-lltm-engine", "")
            if response.status >= 400:
                record.error, record.detail = f"http {response.status}", (await response.text(errors="replace"))[:300]
                return
            reader = AnswerReader()
            if not self.plan.stream:
                reader.take_whole(await response.read())
            else:
                async for piece in response.content.iter_any():
                    before = reader.pieces
                    reader.feed(piece)
                    self.streamed += reader.pieces - before
                    if record.first_s is None and reader.pieces:
                        record.first_s = self.now()
        record.error, record.detail = reader.error()
        record.input_tokens, record.output_tokens = reader.input_tokens, reader.output_tokens

    async def _post(self, body: bytes, record: Sent) -> aiohttp.ClientResponse:
        """Send; again while a kept connection turns out closed without a byte back, which is no fault of the answer.

        llama-server closes connections without notice after a stream, so this is common when it is loaded directly.
        """
        while True:
            record.reused = False
            try:
                return await self._session.post("v1/chat/completions", data=body, trace_request_ctx=record)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not record.reused:
                    raise
                record.retried = True


def _kind(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "truncated"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    return "disconnected" if isinstance(error, aiohttp.ClientError | OSError) else "bad answer"


def open_session(plan: LoadPlan) -> aiohttp.ClientSession:
    """A client of the plan's server."""
    headers = {"content-type": "application/json"}
    if plan.api_key:
        headers["authorization"] = f"Bearer {plan.api_key}"
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    return aiohttp.ClientSession(
        base_url=plan.url.rstrip("/") + "/",
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=plan.timeout_s),
        trace_configs=[trace],
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def _note_reuse(_session: Any, context: Any, _params: Any) -> None:
    if isinstance(context.trace_request_ctx, Sent):
        context.trace_request_ctx.reused = True


def _body(plan: LoadPlan, model: str, prompt: str, number: int) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": plan.max_tokens,
        "seed": (plan.seed + number) % 2**31,
        "stream": plan.stream,
    }
    if plan.stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


async def first_model(session: aiohttp.ClientSession, plan: LoadPlan) -> str:
    """The first that the server lists.

    Raises:
        UpstreamError, ModelNotFoundError, LltmRayError: it refuses, has none, or is another kind of server.
    """
    async with session.get("v1/models") as response:
        text = await response.text(errors="replace")
        if response.status >= 400:
            raise UpstreamError(response.status, text)
    try:
        listed = json.loads(text)["data"]
        if not listed:
            raise ModelNotFoundError("", f"{plan.url} lists none; name one with --model")
        return str(listed[0]["id"])
    except (ValueError, TypeError, KeyError) as error:
        raise _no_server(plan, "v1/models", text) from error


def _no_server(plan: LoadPlan, path: str, text: str) -> LltmRayError:
    said = " ".join(text.split())[:80]
    return LltmRayError(f"{plan.url} is no OpenAI-compatible server: /{path} answered {said!r}; check the URL")


async def size_prompts(session: aiohttp.ClientSession, plan: LoadPlan, model: str, tokens: int) -> PromptMaker:
    """Two short requests tell how many tokens the server's template adds and how many a word of ours takes."""
    counts = []
    for words in _PROBE_WORDS:
        prompt = PromptMaker(words, plan.seed).make(-words)
        probe = LoadPlan(url=plan.url, max_tokens=1, stream=False, seed=plan.seed)
        async with session.post("v1/chat/completions", data=_body(probe, model, prompt, 0)) as response:
            text = await response.text(errors="replace")
            if response.status >= 400:
                raise UpstreamError(response.status, text)
        reader = AnswerReader()
        try:
            reader.take_whole(text.encode())
        except (ValueError, TypeError, AttributeError) as error:
            raise _no_server(plan, "v1/chat/completions", text) from error
        counts.append(reader.input_tokens)
    return PromptMaker.sized(tokens, plan.seed, dict(zip(_PROBE_WORDS, counts, strict=True)))
