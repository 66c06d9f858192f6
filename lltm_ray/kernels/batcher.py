"""Continuous batching of PyTorch decoders: requests join and leave between steps of one running batch.

Each step runs the model once: over the newest token of every request that is being answered, and over a chunk of every
prompt that is still being read. Prompts share `chunk_tokens` a step evenly, so a long one delays a short one no more
than a short one would. If the cache is full the newest request gives its blocks back and is computed again later: the
oldest always ends. (Yu et al. 2022, "Orca"; Agrawal et al. 2024, "Sarathi-Serve".)
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from lltm_ray._optional import load
from lltm_ray.errors import CacheFullError, ConfigError
from lltm_ray.kernels.batch_step import Part, run_step
from lltm_ray.kernels.paged_cache import PagedCache
from lltm_ray.kernels.sampling import Sampling, pick

Attend = Callable[[int, Any, Any, Any], Any]
"""`attend(layer, query, key, value)`: [n, heads or KV heads, head size] each, of n tokens; positions are in them."""


class Decoder(Protocol):
    """A model as the batcher needs it."""

    @property
    def n_vocab(self) -> int:
        """Tokens there are."""

    def hidden(self, tokens: Any, positions: Any, attend: Attend) -> Any:
        """Last hidden states [n, width] of n tokens of many sequences: int64 [n] each; each layer calls `attend`."""

    def logits(self, hidden: Any) -> Any:
        """[n, vocabulary] of hidden states [n, width]."""


@dataclass(slots=True)
class Figures:
    """What a batcher has done."""

    steps: int = 0
    """Runs of the model."""
    computed_tokens: int = 0
    """Tokens that went through the model, also those computed again."""
    shared_tokens: int = 0
    """Tokens of prompts that were in the cache already."""
    generated_tokens: int = 0
    preempted: int = 0
    """Times that a request gave its blocks back to older ones."""


class Stream:
    """The answer to one request: iterate over its tokens, or read `tokens` when it has ended.

    Whoever iterates drives the batch, for all requests, when its own next token is not there. `close` ends it early.
    """

    def __init__(self, batcher: Batcher, number: int) -> None:
        self.tokens: list[int] = []
        """All so far; the stop token is not among them."""
        self.reason: str | None = None
        """Why it ended: stop, length, closed or error; None: it goes on."""
        self.error: BaseException | None = None
        self.number = number
        self._batcher = batcher
        self._ready: deque[int] = deque()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while not self._ready:
            if self.error is not None:
                raise self.error
            if self.reason is not None:
                raise StopIteration
            self._batcher.advance(self)
        return self._ready.popleft()

    def read(self) -> list[int]:
        """Drive the batch until this ends; all of its tokens."""
        for _ in self:
            pass
        return self.tokens

    def close(self) -> None:
        """End it now; its blocks are given back before the next step."""
        if self.reason is None:
            self.reason = "closed"

    @property
    def has_news(self) -> bool:
        """Whether a token or the end is there to be read."""
        return bool(self._ready) or self.reason is not None

    def put(self, token: int) -> None:
        """A new token, from the batcher."""
        self.tokens.append(token)
        self._ready.append(token)


@dataclass(slots=True, eq=False)
class _Request:
    tokens: list[int]
    """The prompt and what was generated."""
    end: int
    """Most of them."""
    stop: frozenset[int]
    sampling: Sampling
    draws: random.Random
    stream: Stream
    on_token: Callable[[int], None] | None
    sequence: int = -1
    """In the cache, while it runs."""


@dataclass(slots=True)
class _Queues:
    """Both in the order of arrival."""

    waiting: deque[_Request] = field(default_factory=deque)
    running: list[_Request] = field(default_factory=list)


class Batcher:
    """Answers many requests with one model and one cache; any thread may call it.

    Args:
        model: a `Decoder` on the cache's device.
        cache: its keys and values; used by this batcher alone.
        max_running: requests in one step.
        chunk_tokens: tokens of prompts in one step, at least `max_running`.

    Raises:
        ConfigError: a number that cannot be used.
    """

    def __init__(self, model: Decoder, cache: PagedCache, *, max_running: int = 64, chunk_tokens: int = 512) -> None:
        if max_running < 1:
            raise ConfigError("max_running", max_running, "must be at least 1")
        if chunk_tokens < max_running:
            raise ConfigError("chunk_tokens", chunk_tokens, f"must be at least max_running, {max_running}")
        self.model, self.cache = model, cache
        self.max_running, self.chunk_tokens = max_running, chunk_tokens
        self.figures = Figures()
        self._queues = _Queues()
        self._numbers = count()
        self._lock = threading.RLock()
        self._stepping = False

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[int] = (),
        sampling: Sampling | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Stream:
        """Ask; joins the batch before its next step.

        Args:
            prompt: tokens, at least one.
            max_tokens: most tokens of the answer, at least 1.
            stop: tokens that end it.
            sampling: None: the likeliest token always.
            on_token: called with each token by the thread that drives the batch; what it raises ends this request. It
                may submit, but neither step nor read a stream.

        Raises:
            ConfigError: a token that the model does not have, or a number that cannot be used.
            CacheFullError: prompt and answer do not fit the cache even alone.
        """
        tokens, sampling = list(prompt), sampling or Sampling()
        odd = next((token for token in tokens if not 0 <= token < self.model.n_vocab), None)
        if not tokens or odd is not None:
            raise ConfigError("prompt", odd, f"must be tokens from 0 to {self.model.n_vocab - 1}, at least one")
        if max_tokens < 1:
            raise ConfigError("max_tokens", max_tokens, "must be at least 1")
        tables, end = self.cache.tables, len(tokens) + max_tokens
        if tables.blocks_for(end - 1) > tables.n_blocks:
            room = tables.n_blocks * tables.block_size
            raise CacheFullError(f"{end - 1} tokens never fit a cache of {room}: ask for less, or make it larger")
        stream = Stream(self, next(self._numbers))
        draws = random.Random(sampling.seed)  # noqa: S311  reproducible, not secret
        asked = _Request(tokens, end, frozenset(stop), sampling, draws, stream, on_token)
        self._queues.waiting.append(asked)
        return stream

    def run(self) -> None:
        """Step until every request has ended."""
        while self.step():
            pass

    def step(self) -> bool:
        """Run the model once.

        Returns:
            False: there was nothing to do.

        Raises:
            Exception: the model's own; the requests of the step end with it too.
        """
        with self._lock:
            did, error = self._guarded()
        if error is not None:
            raise error
        return did

    def advance(self, stream: Stream) -> None:
        """One step, unless another thread's has brought the stream news. An error reaches those whom it ended."""
        with self._lock:
            if not stream.has_news:
                self._guarded()

    # one step ---------------------------------------------------------------------------------------------------

    def _guarded(self) -> tuple[bool, Exception | None]:
        """`_step`, but not from within one: `on_token` runs in the middle of it."""
        if self._stepping:
            raise ConfigError(
                "on_token", "stepping", "must not drive the batch that calls it; let another thread do so"
            )
        self._stepping = True
        try:
            return self._step()
        finally:
            self._stepping = False

    def _step(self) -> tuple[bool, Exception | None]:
        self._retire()
        self._admit()
        parts = self._reserve(self._plan())
        if not parts:
            return False, None
        try:
            with load("torch", extra="torch").inference_mode():
                done = run_step(self.model, self.cache, parts)
                self._tell(parts, done)
        except Exception as error:  # noqa: BLE001  whatever a model raises is its requests' end, not the batcher's
            for request in self._queues.running:
                request.stream.error, request.stream.reason = error, "error"
            self._retire()
            return True, error
        self._retire()
        return True, None

    def _retire(self) -> None:
        """Give back what ended requests hold."""
        queues = self._queues
        for request in [each for each in queues.running if each.stream.reason is not None]:
            queues.running.remove(request)
            self.cache.tables.free(request.sequence)
        for request in [each for each in list(queues.waiting) if each.stream.reason is not None]:
            queues.waiting.remove(request)

    def _admit(self) -> None:
        """Let waiting requests in, in order, while there is room for all that running ones have to compute."""
        queues, tables = self._queues, self.cache.tables
        room = tables.free_blocks - sum(
            tables.blocks_for(len(each.tokens)) - len(tables.blocks(each.sequence)) for each in queues.running
        )
        while queues.waiting and len(queues.running) < self.max_running:
            request = queues.waiting[0]
            if tables.blocks_for(len(request.tokens)) > room:
                return
            room -= tables.blocks_for(len(request.tokens))
            request.sequence = tables.open(request.tokens)
            self.figures.shared_tokens += tables.length(request.sequence)
            queues.running.append(queues.waiting.popleft())
        queues.running.sort(key=lambda each: each.stream.number)

    def _plan(self) -> list[Part]:
        """What each request computes in this step: its newest token, or its share of `chunk_tokens`."""
        running, lengths = self._queues.running, self.cache.tables.length
        left = {id(each): len(each.tokens) - lengths(each.sequence) for each in running}
        reading = sorted(each for each in left.values() if each > 1)
        budget, share = self.chunk_tokens, 1
        for position, wanted in enumerate(reading):  # what a short rest leaves of its share goes to the longer ones
            share = max(1, budget // (len(reading) - position))
            if wanted >= share:
                break
            budget -= wanted
        parts = []
        for request in running:
            start, size = lengths(request.sequence), min(left[id(request)], share)
            new = request.tokens[start : start + size]
            parts.append(Part(request, request.sequence, new, start, start + size == len(request.tokens)))
        return parts

    def _reserve(self, parts: list[Part]) -> list[Part]:
        """Find room for each part, oldest request first; where there is none, the newest request waits again."""
        for part in parts:
            while part.owner in self._queues.running:
                try:
                    self.cache.reserve(part.sequence, len(part.tokens))
                    break
                except CacheFullError:
                    self._preempt()
        return [part for part in parts if part.owner in self._queues.running]

    def _preempt(self) -> None:
        request = self._queues.running.pop()
        self.cache.tables.free(request.sequence)
        self._queues.waiting.appendleft(request)
        self.figures.preempted += 1

    def _tell(self, parts: list[Part], logits: Any) -> None:
        """Note what was computed, and give each request that is at its end a token."""
        for part in parts:
            self.cache.tables.advance(part.sequence, part.tokens)
        self.figures.steps += 1
        self.figures.computed_tokens += sum(len(part.tokens) for part in parts)
        asking = [part.owner for part in parts if part.is_last]
        if not asking:
            return
        chosen = pick(logits, [each.sampling for each in asking], [each.draws for each in asking])
        for request, token in zip(asking, chosen, strict=True):
            self._give(request, token)

    def _give(self, request: _Request, token: int) -> None:
        stream = request.stream
        if stream.reason is not None:
            return
        if token in request.stop:
            stream.reason = "stop"
            return
        request.tokens.append(token)
        self.figures.generated_tokens += 1
        stream.put(token)
        if len(request.tokens) == request.end:
            stream.reason = "length"
        if request.on_token is not None:
            try:
                request.on_token(token)
            except Exception as error:  # noqa: BLE001  one caller's mistake must not end the others' requests
                stream.error, stream.reason = error, "error"
