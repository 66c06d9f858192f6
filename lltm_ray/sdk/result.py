"""What a request came to: `InferResult`, and `InferStream` while it is still coming."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Self

from lltm_ray.errors import LltmRayError
from lltm_ray.records import Completion, StreamEvent, Timings, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResult:
    """An answer with its figures, or the error that kept it from coming; `str()` is the text.

    A failed one cannot pass for an answer: it is false, `text` raises its `error`, `str()` is `<failed: ...>` with its
    words and can be logged.
    """

    received: str = ""
    """Text that came; where `error` is set only the beginning of an answer, or nothing."""
    latency_ms: float
    """From the call to its last token, waiting included."""
    ttft_ms: float | None = None
    """From the call to its first token, as far as it was seen."""
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    engine: str = ""
    """Name of the engine that answered."""
    error: LltmRayError | None = None

    @property
    def text(self) -> str:
        """The answer.

        Raises:
            LltmRayError: the request's error; `received` has what came before it.
        """
        return self.check().received

    @property
    def success(self) -> bool:
        """Whether no error was seen; a stream that was left has what came."""
        return self.error is None

    @property
    def error_message(self) -> str | None:
        """What went wrong, in words; None where nothing did."""
        return None if self.error is None else str(self.error)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, as llama-server counted them."""
        return self.usage.input_tokens

    @property
    def tokens_generated(self) -> int:
        """Tokens of the answer."""
        return self.usage.output_tokens

    @property
    def tokens_per_sec(self) -> float:
        """Decode speed of this request alone, without waiting and prefill; 0 where nothing was timed."""
        return self.timings.predicted_per_second

    def check(self) -> Self:
        """This result.

        Raises:
            LltmRayError: the request's error.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)  # else each read would add its frames to the same object
        return self

    def __bool__(self) -> bool:
        return self.success

    def __str__(self) -> str:
        return self.received if self.error is None else f"<failed: {self.error_message}>"


def of_completion(done: Completion, latency_s: float) -> InferResult:
    """The result of an answer that came whole."""
    ttft_s = done.timings.ttft_s
    return InferResult(
        received=done.text,
        latency_ms=latency_s * 1e3,
        ttft_ms=None if ttft_s is None else ttft_s * 1e3,
        finish_reason=done.finish_reason,
        usage=done.usage,
        timings=done.timings,
        engine=done.engine,
    )


@dataclass(slots=True)
class _Reading:
    """What a stream and its generator share: were it the stream itself, leaving it would not end the generator."""

    events: Generator[StreamEvent]
    callback: Callable[[str], None] | None
    done: list[Callable[[InferResult], None]]
    result: InferResult | None = None


class InferStream:
    """Iterate for the pieces of the answer; an error is raised after the last piece that came, and kept in `result`.

    Args:
        events: of the request, which is sent when the first piece is asked for.
        callback: called with each piece.
        done: called with the result, once.
    """

    def __init__(
        self,
        events: Generator[StreamEvent],
        callback: Callable[[str], None] | None,
        done: Callable[[InferResult], None],
    ) -> None:
        self._reading = _Reading(events, callback, [done])
        self._pieces = _read(self._reading)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> InferResult:
        """The whole answer, or as much as came and the error; reads what is left of it."""
        with suppress(LltmRayError):  # the result has it
            for _ in self._pieces:
                pass
        if self._reading.result is None:
            return InferResult(latency_ms=0.0, error=LltmRayError("the stream was closed and never read"))
        return self._reading.result

    def when_done(self, tell: Callable[[InferResult], None]) -> None:
        """Call `tell` with the result as soon as the stream has ended or was left."""
        self._reading.done.append(tell)

    def close(self) -> None:
        """Leave the answer where it is: its slot comes free, `result` has what came."""
        self._pieces.close()


def _read(reading: _Reading) -> Generator[str]:
    began_s, first_s = time.perf_counter(), None
    error: LltmRayError | None = None
    texts: list[str] = []
    last = StreamEvent()
    try:
        with closing(reading.events):
            for last in reading.events:
                if last.text:
                    first_s = first_s or time.perf_counter()
                    texts.append(last.text)
                    if reading.callback is not None:
                        reading.callback(last.text)
                    yield last.text
    except GeneratorExit:
        raise
    except BaseException as problem:
        why = str(problem) or type(problem).__name__
        error = problem if isinstance(problem, LltmRayError) else LltmRayError(why)
        raise
    finally:
        reading.result = InferResult(
            received="".join(texts),
            latency_ms=(time.perf_counter() - began_s) * 1e3,
            ttft_ms=None if first_s is None else (first_s - began_s) * 1e3,
            finish_reason=last.finish_reason,
            usage=last.usage or Usage(output_tokens=len(texts)),
            timings=last.timings or Timings(),
            engine=last.engine,
            error=error,
        )
        for tell in reading.done:
            tell(reading.result)
