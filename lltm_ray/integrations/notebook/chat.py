"""`Chat`: a conversation that answers in the background; `ChatWidget` is its face in a notebook."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator
from concurrent import futures
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from lltm_ray._turns import Messages, last_turns
from lltm_ray.errors import ConfigError, LltmRayError
from lltm_ray.integrations.notebook._job import Job, Pace
from lltm_ray.integrations.notebook._source import Answer, Collected, Source
from lltm_ray.llamacpp.client import AsyncLlamaClient
from lltm_ray.records import StreamEvent

UPDATES_PER_S = 20.0
"""How often at most `on_draft` is called while an answer comes."""


class Chat:
    """Keeps what was said, asks the model through its chat template, and leaves out the oldest turns when it must.

    A message that gets no answer leaves no trace; an answer that was stopped is kept as far as it came.

    Args:
        cluster: a `Cluster`, an `InferenceEngine`, or a gateway's base URL.
        api_key: of the gateway.
        model: served name; empty takes the first one.
        system: the system prompt; empty for none.
        temperature: 0 is greedy.
        max_tokens: longest answer.
        limit_tokens: longest request and answer together; None: one slot's context.

    Raises:
        ConfigError: a fleet without a gateway, or a setting out of its range.
    """

    system: str
    temperature: float
    max_tokens: int

    def __init__(  # noqa: PLR0913 - a chat's settings
        self,
        cluster: Any,
        *,
        api_key: str = "",
        model: str = "",
        system: str = "",
        temperature: float = 0.7,
        max_tokens: int = 512,
        limit_tokens: int | None = None,
    ) -> None:
        self.history: Messages = []
        """What was said and answered, in turn."""
        self.asked = self.draft = self.note = ""
        """The message under way, what has come of its answer, and the last answer's figures or error."""
        self.failed = False
        """Whether `note` is an error."""
        self.is_busy = False
        """Whether an answer is under way."""
        self._source = Source.of(cluster, api_key=api_key, model=model)
        self._limit_tokens = limit_tokens
        self._lock = threading.Lock()
        self._job: Job[Answer] | None = None
        self.set(system=system, temperature=temperature, max_tokens=max_tokens)

    def set(
        self, *, system: str | None = None, temperature: float | None = None, max_tokens: int | None = None
    ) -> None:
        """Change settings of the messages to come.

        Raises:
            ConfigError: one that is out of its range; none is changed then.
        """
        checked: dict[str, Any] = {}
        if system is not None:
            checked["system"] = str(system)
        if temperature is not None:
            checked["temperature"] = _number("temperature", temperature, 0)
        if max_tokens is not None:
            checked["max_tokens"] = int(_number("max_tokens", max_tokens, 1))
        vars(self).update(checked)

    # asking -----------------------------------------------------------------------------------------------------

    def send(self, text: str) -> None:
        """Ask, and return at once; `wait` has the answer.

        Raises:
            ConfigError: an empty message, or an answer is still under way.
        """
        if not text.strip():
            raise ConfigError("text", text, "is empty; write a message")
        with self._lock:
            if self.is_busy:
                raise ConfigError("text", text[:40], "an answer is still under way: wait() for it, or stop() it")
            self.asked, self.draft, self.note, self.failed, self.is_busy = text, "", "", False, True
            self._job = job = Job(self._answer(text))
        self.on_change()
        job.start()

    def wait(self, timeout_s: float | None = None) -> Answer:
        """The last message's answer, once it is there; of one that was stopped, what came.

        Raises:
            ConfigError: nothing was asked yet.
            LltmRayError: why there is none.
            TimeoutError: it takes longer.
        """
        if self._job is None:
            raise ConfigError("text", "", "nothing was asked yet: send() something")
        return self._job.result.result(timeout_s)

    def ask(self, text: str, timeout_s: float | None = None) -> Answer:
        """`send` and `wait`."""
        self.send(text)
        return self.wait(timeout_s)

    def stop(self) -> None:
        """End the answer where it is; its slot comes free. Without one under way nothing happens."""
        if self._job is not None:
            self._job.cancel()

    def clear(self) -> None:
        """Stop, and forget everything but the settings."""
        self.stop()
        if self._job is not None:
            futures.wait([self._job.result])
        self.history, self.note, self.failed = [], "", False
        self.on_change()

    # what a face overrides --------------------------------------------------------------------------------------

    def on_change(self) -> None:
        """Called when a message was sent, its answer has ended, or the history was cleared; on any thread."""

    def on_draft(self) -> None:
        """Called while an answer comes, `UPDATES_PER_S` times a second at most, on the answer's thread."""

    # on the answer's thread -------------------------------------------------------------------------------------

    async def _answer(self, text: str) -> Answer:
        collected, pace, began_s = Collected(), Pace(self.on_draft, UPDATES_PER_S), time.perf_counter()
        answer, note = None, "it broke off: wait() has the reason"
        try:
            with suppress(asyncio.CancelledError):  # by stop(): what came is the answer
                async with aclosing(self._events(await asyncio.to_thread(self._request, text))) as events:
                    async for event in events:
                        collected.add(event, time.perf_counter() - began_s)
                        self.draft += event.text
                        pace.news()
            answer = collected.answer()
            note = answer.figures
            return answer
        except LltmRayError as error:
            note = str(error)
            raise
        finally:
            pace.end()
            self._end(answer, note)

    async def _events(self, messages: Messages) -> AsyncGenerator[StreamEvent]:
        asked = self._source.params(temperature=self.temperature, max_tokens=self.max_tokens)
        async with (
            AsyncLlamaClient(self._source.url, api_key=self._source.api_key) as client,
            aclosing(client.chat_stream(messages, **asked)) as events,
        ):
            async for event in events:
                yield event

    def _request(self, text: str) -> Messages:
        messages: Messages = [*self.history, {"role": "user", "content": text}]
        with self._source.client() as client:
            count = partial(self._source.count_tokens, client)
            limit = self._limit_tokens or self._source.slot_tokens(client)
            return last_turns(messages, self.system, count, limit_tokens=limit, max_tokens=self.max_tokens)

    def _end(self, answer: Answer | None, note: str) -> None:
        if answer is not None and answer.text:
            said = {"role": "user", "content": self.asked}, {"role": "assistant", "content": answer.text}
            self.history = [*self.history, *said]
        self.asked, self.draft, self.note, self.failed, self.is_busy = "", "", note, answer is None, False
        self.on_change()


def _number(name: str, given: Any, least: float) -> float:
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        raise ConfigError(name, given, f"must be a number from {least}")
    return number
