"""Goes on with a stream whose engine died after its first byte, on another engine.

Flow: `is_eligible` and `ask_details` before the first attempt -> `StreamTap` -> the engine dies -> `Continuation.on` a
survivor, and again on the next if that one dies too. Two ways lead on:

- *resume*: /completion with the prompt and the reply's known token ids. Where the outcome is certain (`is_exact`) the
  last known token is left out: it comes again and must bring the same text. So a stop word that the dead engine had
  found, or half a character or half a stop word that it held back, is found and held back again.
- *restart*: the request as it came, on its own route, where too few ids are known. Text that the client has must come
  again, and is not sent twice.

A reply that comes out different ends with `EngineExitedError`, never with a text that no engine would have given.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from lltm_ray.errors import EngineExitedError
from lltm_ray.gateway.continuable import CONSTRAINTS, DETAILS, LIMITS, is_exact, limit_of
from lltm_ray.gateway.headers import build_request
from lltm_ray.gateway.pool import UpstreamPool
from lltm_ray.gateway.splice import Splice, parse_event
from lltm_ray.gateway.tap import StreamTap, ask_details
from lltm_ray.gateway.timeline import RequestTrace
from lltm_ray.gateway.told import DivergedError, Mark
from lltm_ray.gateway.upstream import Headers, UpstreamBrokenError
from lltm_ray.records import EngineInfo
from lltm_ray.telemetry.telling import known_type

_ANSWER_BYTES = 64 * 2**20
_NOT_RESUMED = frozenset(
    (
        *("prompt", "messages", "model", "stream_options", "n", "n_cmpl", "id_slot", "stop", "response_format"),
        *("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "parallel_tool_calls"),
        *("tool_choice", "reasoning_format", "reasoning_effort", "return_progress"),
        *(*LIMITS, *CONSTRAINTS, *DETAILS),
    )
)


def cannot_continue(engine: str, why: str) -> EngineExitedError:
    """The error that ends a reply which cannot be continued; its `why` is the sentence's end."""
    error = EngineExitedError(engine)
    error.args = (f"the engine died and its reply cannot be continued on engine {engine}: {why}",)
    error.__dict__["why"] = why
    return error


def _type_of(error: Any) -> str:
    """All that is told of an engine's error: its message may quote the prompt."""
    return known_type(error.get("type")) if isinstance(error, dict) else ""


@dataclass(slots=True, kw_only=True)
class Attempt:
    """What one engine did for a continuation."""

    engine: str
    is_resumed: bool
    """False: it began from the start."""
    delivered_tokens: int = 0
    """New to the client."""
    wasted_tokens: int = 0
    """Generated again: the client had them."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    id_slot: int = -1
    is_whole: bool = False


class Continuation:
    """The rest of one reply.

    Args:
        path: the request's route.
        body: its parsed JSON, one that `is_eligible` accepts.
        tap: what the client got so far; kept up to date here.
        pool: connections to the engines' servers.
        request_id: for the engines' logs.
        trace: whose running attempt notes the clock; None: nobody keeps any.
    """

    def __init__(
        self,
        path: str,
        body: dict[str, Any],
        tap: StreamTap,
        pool: UpstreamPool,
        *,
        request_id: str = "",
        trace: RequestTrace | None = None,
    ) -> None:
        self._path = path
        self._body = dict(body)
        self._tap = tap
        self._pool = pool
        self._request_id = request_id
        self._trace = trace
        self._prompt: str | list[int] | None = None if tap.kind == "chat" else body["prompt"]
        self._is_greedy = is_exact(body)
        self.is_exact = True
        """Whether the reply is what one engine would have given; False once a sampled one was taken up."""
        self.attempts: list[Attempt] = []

    async def on(self, engine: EngineInfo, *, id_slot: int = -1, lora: bytes = b"") -> AsyncGenerator[bytes, None]:
        """The client's bytes from one engine, to the end of the stream.

        Args:
            engine: that goes on.
            id_slot: its slot; -1: llama-server chooses.
            lora: what it is to be told of adapters, as `Lease.lora`.

        Raises:
            ConnectFailedError, UpstreamBrokenError: this engine failed too; call again with another.
            EngineExitedError: the reply cannot be continued.
        """
        can_continue, why = self._tap.can_continue
        if not can_continue:
            raise cannot_continue(engine.name, why)
        if lora:
            self._body |= json.loads(b"{%b}" % lora)
        told = self._tap.told
        mark = self._start()
        attempt = Attempt(engine=engine.name, is_resumed=mark is not None)
        self.attempts.append(attempt)
        before = told.position
        try:
            parts = self._restarted(engine, id_slot) if mark is None else self._resumed(engine, id_slot, mark)
            try:
                async for part in parts:
                    yield part
            except DivergedError as error:  # before anything new was passed on: only what the client has is compared
                if not self._is_greedy or told.position > before:
                    raise cannot_continue(engine.name, str(error)) from error
                mark = self._from_text()
                async for part in self._resumed(engine, id_slot, mark):
                    yield part
            attempt.is_whole = True
        finally:
            started_at = mark.tokens if mark else 0
            attempt.wasted_tokens = max(0, min(before, told.seen_tokens) - started_at)
            attempt.delivered_tokens = told.position - before

    def _start(self) -> Mark | None:
        """Where the next engine takes the reply up; None: at its start."""
        told = self._tap.told
        if self._is_greedy or not told.chars:
            mark = told.mark(2)
            is_known = bool(mark.tokens and told.chars)
            told.rewind(mark if is_known else Mark(0, 0))
            return mark if is_known else None
        mark = told.mark()
        if mark.chars == told.chars:
            self.is_exact = False
            told.rewind(mark)
            return mark
        return self._from_text()

    def _from_text(self) -> Mark:
        """At the end of the text, by the tokens that the next engine makes of it.

        So do sampled replies whose ids have a gap, and greedy ones that another engine says otherwise: where requests
        share a GPU's batches, rounding may tip a near tie.
        """
        self._is_greedy = self.is_exact = False
        self._tap.told.give_up_ids()
        return Mark(self._tap.told.position, self._tap.told.chars)

    # --- from the start

    async def _restarted(self, engine: EngineInfo, id_slot: int) -> AsyncIterator[bytes]:
        tap = self._tap
        again = StreamTap(self._path, self._body, told=tap.told)
        data = json.dumps(self._body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        splice = Splice(tap, self._body, Mark(0, 0))
        try:
            async for part in self._ask(engine, self._path, ask_details(self._path, self._body, data, id_slot)):
                fed = again.feed(part)
                again.digest()  # checks it, before the client gets what follows
                sent = splice.repeat(fed)
                if again.error:
                    raise cannot_continue(engine.name, again.error)
                if sent:
                    yield sent
        finally:
            again.digest()
            tap.adopt(again)
            self._count(again.timings)
            self.attempts[-1].id_slot = again.id_slot
        if tap.told.seen_chars < tap.told.chars:
            raise DivergedError("the reply ended before what the client has")
        if not again.is_finished:
            raise UpstreamBrokenError("the stream ended before its last event")

    # --- from known ids

    async def _resumed(self, engine: EngineInfo, id_slot: int, mark: Mark) -> AsyncIterator[bytes]:
        tap = self._tap
        body = await self._resume_body(engine, id_slot, mark)
        splice = Splice(tap, self._body, mark)
        if body.get("n_predict") == 0:
            yield splice.end_at_limit()
            return
        rest = b""
        async for part in self._ask(engine, "/completion", json.dumps(body).encode("ascii")):
            *events, rest = (rest + part).split(b"\n\n")
            sent = b"".join(self._say_all(splice, events))
            if sent:
                yield sent
        if not tap.is_finished:
            raise UpstreamBrokenError("the stream ended before its last event")

    def _say_all(self, splice: Splice, events: list[bytes]) -> list[bytes]:
        sent = []
        for event in events:
            found = parse_event(event)
            if found is None:
                continue
            if "error" in found:
                raise UpstreamBrokenError(f"the engine answered {_type_of(found['error']) or 'an error'}")
            if found["stop"]:
                self.attempts[-1].id_slot = found["id_slot"]
                self._count(found["timings"])
            sent.append(splice.say(found))
        return sent

    async def _resume_body(self, engine: EngineInfo, id_slot: int, mark: Mark) -> dict[str, Any]:
        told = self._tap.told
        prompt = await self._read_prompt(engine)
        ids = told.ids[: mark.tokens].tolist()
        body = {key: value for key, value in self._body.items() if key not in _NOT_RESUMED}
        if len(ids) == mark.tokens:
            body["prompt"] = [*prompt, *ids] if isinstance(prompt, list) else [prompt, *ids]
        else:  # to say the same again is left to chance, so the text itself becomes the prompt
            body["prompt"] = [*prompt, told.text] if isinstance(prompt, list) else prompt + told.text
        limit = limit_of(self._body)
        if limit >= 0:
            body["n_predict"] = max(limit, 1) - mark.tokens
        stop = self._body.get("stop")
        if stop:
            body["stop"] = [stop] if isinstance(stop, str) else stop
        if id_slot >= 0:
            body["id_slot"] = id_slot
        return body | {"stream": True, "return_tokens": True, "cache_prompt": True}

    async def _read_prompt(self, engine: EngineInfo) -> str | list[int]:
        if self._prompt is None:
            asked = {key: value for key, value in self._body.items() if key != "stream"}
            data = json.dumps(asked).encode("ascii")
            request = build_request(b"POST", b"/apply-template", engine.url, self._headers(engine), data)
            status, _, answer = await self._pool.fetch(engine.url, request, limit_bytes=_ANSWER_BYTES)
            self._check(engine, status, answer)
            self._prompt = str(json.loads(answer)["prompt"])
        return self._prompt

    # --- the engine

    async def _ask(self, engine: EngineInfo, path: str, data: bytes) -> AsyncIterator[bytes]:
        request = build_request(b"POST", path.encode("ascii"), engine.url, self._headers(engine), data)
        connection = await self._pool.open(engine.url, request)
        try:
            if connection.status != 200:
                self._check(engine, connection.status, await connection.read_all(_ANSWER_BYTES))
            if self._trace is not None:
                self._trace.saw_head()
            while part := await connection.read():
                if self._trace is not None:
                    self._trace.saw_text()
                yield part
        finally:
            self._pool.release(connection)

    def _headers(self, engine: EngineInfo) -> Headers:
        headers = [(b"content-type", b"application/json")]
        if self._request_id:
            headers.append((b"x-request-id", self._request_id.encode("ascii")))
        if engine.api_key:
            headers.append((b"authorization", b"Bearer " + engine.api_key.encode("utf-8")))
        return headers + self._trace.headers() if self._trace is not None else headers

    @staticmethod
    def _check(engine: EngineInfo, status: int, answer: bytes) -> None:
        if 400 <= status < 500:
            told = parse_event(b"data:" + answer) or {}
            raise cannot_continue(engine.name, f"it answered {status} {_type_of(told.get('error'))}".rstrip())
        if status != 200:
            raise UpstreamBrokenError(f"the engine answered {status}")

    def _count(self, timings: dict[str, Any] | None) -> None:
        if timings:
            self.attempts[-1].cached_tokens = timings["cache_n"]
            self.attempts[-1].prompt_tokens = timings["cache_n"] + timings["prompt_n"]
