"""What the ledger holds: requests, their attempts, sums per server, and how far the sums are from the server's own.

Pure. What llama-server counts, read in its source (`server_metrics` of tools/server):

- `prompt_tokens_total` counts prompt tokens that were computed, batch by batch, without those found in the cache; also
  those of embeddings, of reranking, and of requests cancelled half-way. With `n` > 1 a prompt counts once.
- `tokens_predicted_total` grows by a request's whole count when its slot is released, however it ended; so while a
  request runs the counter lacks what it has generated, and it holds at rest what a cancelled request had generated.
- Both start at 0 with the server, and are printed with six significant digits: exact below a million only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from lltm_ray.routing.ledger.progress import NO_CELL, Cell, Lost

_PRINTED_DIGITS = 6
_NOT_SUPPORTED = 501
"""Of llama-server's: embeddings of an engine that was started without, or infill of a model without its tokens."""


class Outcome(StrEnum):
    """How an attempt ended."""

    OK = "ok"
    RETRIED = "retried"
    """Nothing of it reached the client; another attempt followed."""
    CONTINUED = "continued"
    """It broke off in the middle of the answer; another engine went on from there."""
    CLIENT_GONE = "client gone"
    FAILED = "failed"
    DEADLINE = "deadline"
    GATEWAY_LOST = "gateway lost"
    """The gateway process died; the next one wrote this, from the counts that outlived it."""
    ENGINE_REFUSED = "engine refused"
    """llama-server answered with an error of the request's own: status 4xx, or 501 for what this model cannot do."""

    @classmethod
    def of_status(cls, status: int) -> Outcome:
        """Of an attempt that was answered: an error for want of room is the engine's own."""
        if status < 400:
            return cls.OK
        is_refused = (status < 500 and status != 429) or status == _NOT_SUPPORTED
        return cls.ENGINE_REFUSED if is_refused else cls.FAILED


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One try of a request on one server."""

    engine: str
    server_pid: int = 0
    """Or any other number that a restart of the server changes: its counters restart with it."""
    slot: int = -1
    """-1: llama-server's choice."""
    started_unix_nano: int = 0
    queue_s: float = 0.0
    predicted_cached_tokens: int = 0
    """Prompt tokens that routing expected in the cache."""
    cached_tokens: int = 0
    """`timings.cache_n`."""
    computed_tokens: int = 0
    """`timings.prompt_n`; `usage.prompt_tokens` where an answer has no timings (embeddings)."""
    generated_tokens: int = 0
    """`timings.predicted_n`; of an attempt that was cut off, what is known."""
    delivered_tokens: int = 0
    outcome: str = Outcome.OK
    is_estimate: bool = False
    """Its last timings were never seen, so computed and generated are lower bounds."""

    @property
    def wasted_tokens(self) -> int:
        """Generated and not delivered."""
        return max(self.generated_tokens - self.delivered_tokens, 0)


ATTEMPT_FIELDS = tuple(each.name for each in fields(Attempt))


@dataclass(slots=True, kw_only=True)
class LedgerEntry:
    """One request, however it ended. Holds digests and labels only: no prompt, no answer, no key."""

    request_id: str
    tenant: str = ""
    """A label, or a short digest of the API key."""
    model: str = ""
    route: str = ""
    policy: str = ""
    why: str = ""
    """One sentence of the policy: why this engine."""
    considered: Sequence[Mapping[str, Any]] = ()
    """The engines that were weighed, best first, with what the policy thought of each."""
    affinity: str = ""
    """Digest of the client's affinity key."""
    arrived_unix_nano: int = 0
    wait_s: float = 0.0
    ttft_s: float | None = None
    total_s: float = 0.0
    status: int = 0
    """What the client was sent; 0: nothing."""
    error: str = ""
    is_exact: bool | None = None
    """After a failover: whether the continuation is what the first engine would have written; None without one."""
    delivered_tokens: int = 0
    """What the client got, counted apart from the attempts; the sum of theirs must equal it."""
    attempts: list[Attempt] = field(default_factory=list)
    cell: Cell = field(default=NO_CELL, repr=False, compare=False)

    @property
    def is_balanced(self) -> bool:
        """Whether the attempts account for every token that the client got."""
        return self.delivered_tokens == sum([attempt.delivered_tokens for attempt in self.attempts])


def entry_of(lost: Lost) -> LedgerEntry:
    """The account of a request whose gateway died, from its cell."""
    mark, outcomes = lost.mark, tuple(Outcome)
    outcome = outcomes[lost.outcome] if lost.is_done and lost.outcome < len(outcomes) else Outcome.GATEWAY_LOST
    last = Attempt(
        engine=mark.engine,
        server_pid=mark.server_pid,
        slot=mark.slot,
        started_unix_nano=mark.started_unix_nano,
        cached_tokens=lost.cached_tokens,
        computed_tokens=lost.computed_tokens,
        generated_tokens=max(lost.generated_tokens, lost.delivered_tokens),
        delivered_tokens=lost.delivered_tokens,
        outcome=outcome,
        is_estimate=lost.is_estimate or not lost.is_done,
    )
    earlier = [_earlier(lost)] if lost.number > 1 else []
    return LedgerEntry(
        request_id=mark.request_id,
        tenant=mark.tenant,
        model=mark.model,
        route=mark.route,
        arrived_unix_nano=mark.arrived_unix_nano,
        status=lost.status,
        error="" if lost.is_done else "the gateway process died",
        delivered_tokens=lost.delivered_before + lost.delivered_tokens,
        attempts=[*earlier, last],
    )


def _earlier(lost: Lost) -> Attempt:
    """All attempts before the last one in one: a cell has no room for more."""
    return Attempt(
        engine=lost.previous_engine,
        server_pid=lost.previous_pid,
        generated_tokens=lost.delivered_before,
        delivered_tokens=lost.delivered_before,
        outcome=Outcome.CONTINUED if lost.delivered_before else Outcome.RETRIED,
        is_estimate=True,
    )


@dataclass(slots=True, kw_only=True)
class Sums:
    """All finished attempts on one server. Those whose counts are exact are kept apart from those cut off."""

    attempts: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    delivered_tokens: int = 0
    estimates: int = 0
    """Attempts that were cut off and whose counts are not known yet."""
    estimated_computed_tokens: int = 0
    """At least so many in them."""
    estimated_generated_tokens: int = 0
    last_end_unix_nano: int = 0

    def __add__(self, other: Sums) -> Sums:
        """Sums of one server from the ledgers of two nodes."""
        values = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        values["last_end_unix_nano"] = max(self.last_end_unix_nano, other.last_end_unix_nano)
        return Sums(**values)


SUM_FIELDS = tuple(each.name for each in fields(Sums))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A server's counter minus the ledger: positive, it did work we have no record of; negative, we claim too much."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    estimates: int = 0
    """Attempts cut off that took what the exact ones leave of the counters; 0: every count is known."""

    def __add__(self, other: Drift) -> Drift:
        """Both together."""
        return Drift(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            estimates=self.estimates + other.estimates,
        )


def find_drift(sums: Sums, prompt_tokens_total: float, tokens_predicted_total: float) -> Drift:
    """Compare a server at rest with the ledger; attempts that were cut off take what the exact ones leave.

    Only a count below what is known of them, or any difference when there are none, is drift.
    """
    return Drift(
        prompt_tokens=_excess(prompt_tokens_total, sums.computed_tokens, sums.estimated_computed_tokens, sums),
        generated_tokens=_excess(tokens_predicted_total, sums.generated_tokens, sums.estimated_generated_tokens, sums),
        estimates=sums.estimates,
    )


def _excess(counter: float, exact: int, at_least: int, sums: Sums) -> int:
    excess = counter - exact - at_least
    if abs(excess) <= printed_error(counter) or (sums.estimates and excess > 0):
        return 0
    return round(excess)


def printed_error(counter: float) -> float:
    """How far a counter's printed value may be from its true one: half a unit of the sixth digit, 0 below a million."""
    if counter < 10**_PRINTED_DIGITS:
        return 0.0
    return 10.0 ** (math.floor(math.log10(counter)) - _PRINTED_DIGITS + 1) / 2
