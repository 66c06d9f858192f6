"""Figures: where an attempt's time and tokens went, read from its row; spans and metrics are made of the same."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan
from typing import Final, NamedTuple

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.rows import AttemptRow, RequestRow

GENERATING: Final = frozenset((names.CHAT, names.TEXT))
"""Operations that have phases, finish reasons and output tokens."""
Interval = tuple[float, float]
"""Start and end: offsets from the request's arrival, in seconds."""


class Phases(NamedTuple):
    """Where an attempt's time went; None: it did not come to that, or nobody told. They meet without a gap."""

    route: Interval | None
    """From asking the router for a slot until one was granted."""
    client: Interval | None
    """From sending the request to an engine until the attempt ended: the next three together."""
    queue: Interval | None = None
    """Waiting in llama-server, which sends a stream's headers when its slot starts."""
    prefill: Interval | None = None
    """Reading the prompt, until the first text."""
    decode: Interval | None = None
    """Writing the answer."""
    is_estimate: bool = False
    """No stream told them: counted back from the end by llama-server's own times."""


class Tokens(NamedTuple):
    """What an attempt, or a request, used. 0: none, or not told."""

    cached: int
    computed: int
    generated: int

    @property
    def input(self) -> int:
        """The prompt: cached and computed."""
        return self.cached + self.computed


def seconds(interval: Interval | None) -> float:
    """How long; 0 of nothing."""
    return interval[1] - interval[0] if interval else 0.0


def read_phases(attempt: AttemptRow, operation: str, total_s: float) -> Phases:
    """An attempt's phases. A phase that was cut off ends where the attempt ended.

    Args:
        attempt: its row; a NaN `ended_s` is taken as the request's end.
        operation: embeddings and reranking have no phases: their headers come with the answer.
        total_s: of the request.
    """
    ended = total_s if isnan(attempt.ended_s) else attempt.ended_s
    sent, slot, first = attempt.sent_s, attempt.headers_s, attempt.first_s

    def between(start: float, end: float) -> Interval | None:
        return None if isnan(start) else (start, ended if isnan(end) else end)

    route, client = between(attempt.asked_s, sent), between(sent, ended)
    if operation not in GENERATING or client is None:
        return Phases(route, client)
    is_estimate = isnan(first) and attempt.predicted_ms > 0 and attempt.prompt_ms >= 0
    if is_estimate:
        first = max(sent, ended - attempt.predicted_ms / 1e3)
        slot = max(sent, first - attempt.prompt_ms / 1e3)
    elif attempt.prompt_ms > 0 and slot <= first:  # a busy gateway may read a stream's headers late
        slot = max(sent, min(slot, first - attempt.prompt_ms / 1e3))
    return Phases(route, client, between(sent, slot), between(slot, first), between(first, ended), is_estimate)


def waited_s(phases: Sequence[Phases]) -> float:
    """How long a request waited for slots, ours and llama-server's; NaN: no engine was asked for it."""
    is_asked = any(each.client for each in phases)
    return sum(seconds(each.route) + seconds(each.queue) for each in phases) if is_asked else nan


def tokens_of(attempt: AttemptRow) -> Tokens:
    """What one attempt used."""
    return Tokens(max(attempt.cached_tokens, 0), max(attempt.computed_tokens, 0), max(attempt.generated_tokens, 0))


def tokens_of_all(attempts: Sequence[AttemptRow]) -> Tokens:
    """What the answer that the client got is made of: the last attempt, and those that it continued.

    The prompt is the first one's: later prompts hold what was generated before. Of those broken off, what was delivered
    counts, for the next one went on from there.
    """
    start = max((i for i, each in enumerate(attempts) if not each.is_continued), default=0)
    chain = attempts[start:]
    if not chain:
        return Tokens(0, 0, 0)
    first, last = tokens_of(chain[0]), tokens_of(chain[-1])
    prompt = first if first.input else last
    before = sum(max(each.delivered_tokens, 0) for each in chain[:-1])
    return Tokens(prompt.cached, prompt.computed, before + last.generated)


def wasted(attempts: Sequence[AttemptRow]) -> int:
    """Tokens that were generated and reached nobody."""
    return sum(max(each.generated_tokens - each.delivered_tokens, 0) for each in attempts)


_ERROR_TYPES = {"ok": "", "deadline": "timeout"}


def error_type_of(request: RequestRow, attempt: AttemptRow, is_last: bool) -> str:
    """Class of the error an attempt ended with, empty without one; the last one ends as the request does."""
    if is_last and request.error_type:
        return request.error_type
    return _ERROR_TYPES.get(attempt.outcome, attempt.outcome.replace(" ", "_"))
