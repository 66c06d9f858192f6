"""What a policy is asked and what it answers; what a request would cost on one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from lltm_ray._sessions import Offer
from lltm_ray.routing.adapters import Lora
from lltm_ray.routing.rates import Rates
from lltm_ray.routing.table import EngineView

__all__ = ["NOBODY", "Ask", "Choice", "Matches", "Score", "choose_row", "estimate"]

Matches = Sequence[tuple[str, int]]
"""Engines and how many of the prompt's tokens each has cached and usable, best first."""
NOBODY: frozenset[str] = frozenset()


@dataclass(slots=True, kw_only=True)
class Ask:
    """What routing knows of a request; the router completes it, policies only read it."""

    model: str
    key: bytes = b""
    """Canonical bytes: if prompt A is a prefix of prompt B, so is its key."""
    prompt_tokens: int = 0
    """Length of the prompt, or an estimate; 0 is unknown."""
    max_tokens: int | None = None
    tenant: str = ""
    priority: int = 0
    arrived_s: float = 0.0
    """Monotonic seconds at which the router was asked."""
    deadline_s: float = inf
    """Monotonic seconds by which the answer must have begun."""
    affinity: str = ""
    """Key of the session."""
    shared_tokens: int = 0
    """How many of its first tokens other sessions' prompts have, too."""
    adapter: str = ""
    """LoRA adapter without which no engine will do."""
    lora: Lora | None = None
    """All adapters it chooses; None: the engine's own setting."""
    only: str | None = None
    """The one engine it may go to."""
    exclude: frozenset[str] = NOBODY
    """Engines to avoid as long as another one has a free slot."""
    can_pin: bool = True
    offer: Offer | None = None
    """Of the session it names."""
    hashes: bytes | None = None
    """Of the prompt's beginnings, once a hint asked for them; see `_prefix`."""


RETURN_RATIO = 0.25
"""How probably a conversation that is driven out of its slot comes back and must be computed again."""


class Score(NamedTuple):
    """What one engine would make of a request."""

    engine: str
    cached_tokens: int
    busy: int
    """Slots busy there without this request."""
    expected_s: float
    """From its slot to its last token."""
    others_s: float
    """What it adds to the requests that are there already, summed over them."""

    @property
    def cost_s(self) -> float:
        """What is made small: the time of all."""
        return self.expected_s + self.others_s


class Choice(NamedTuple):
    """The engine to claim a slot of now, and how it compared."""

    engine: str
    cached_tokens: int
    expected_s: float
    considered: tuple[Score, ...]
    """At most 8, best first."""
    wait_for: str | None = None
    """A full engine whose next free slot is expected to finish the request sooner than `engine` does."""
    wait_gain_s: float = 0.0
    """How much sooner."""
    wait_s: float = 0.0
    """How long its next free slot is expected to take, on the safe side."""
    prompt_tokens: int = 0
    busy: int = 0
    slots_total: int = 0
    rule: str = ""
    """What decided, if not the expected time: the name of the policy, "pinned" or "same session"."""

    @property
    def uncached_tokens(self) -> int:
        """What is left to compute."""
        return max(0, self.prompt_tokens - self.cached_tokens)

    @property
    def why(self) -> str:
        """One line for people."""
        cached = f"{self.cached_tokens:,} of {self.prompt_tokens:,} prompt tokens cached"
        line = f"{cached}; {self.busy} of {self.slots_total} slots busy"
        if self.rule:
            line = f"{self.rule}: {line}"
        if self.wait_for is not None:
            line += f"; waiting {self.wait_s:.1f} s for {self.wait_for} would save {self.wait_gain_s:.1f} s"
        return line


def estimate(ask: Ask, row: EngineView, rates: Rates, cached_tokens: int, output_tokens: float) -> Score:
    """What an engine would make of a request that gets the next slot there, in seconds.

    llama.cpp computes prompts in batches between decode steps, so all requests of an engine wait for each other's
    prefill (ggml-org/llama.cpp#29175): this one for half of what is pending there, as on average half of it is done;
    every decoding one for the whole of this one. Each decodes slower by one more busy slot. Requests with other LoRA
    adapters share no batch: it begins when those have ended.

    Args:
        ask: the request.
        row: the engine; a full one is taken as it is when one of its slots has come free.
        rates: of the model.
        cached_tokens: what of the prompt it has.
        output_tokens: how long the reply will be.
    """
    speed = rates.speed(row.name)
    token_s, busy = speed.prefill_token_s, row.busy
    others = busy if busy < row.slots_total else max(0, row.slots_total - 1)
    uncached = ask.prompt_tokens - cached_tokens
    prefill_s = uncached * token_s if uncached > 0 else 0.0
    behind_s = row.prefilling_tokens * token_s * 0.5
    own_s = speed.prefill_overhead_s + prefill_s + behind_s + output_tokens * speed.decode_s(others + 1)
    if row.adapters and row.is_taken(ask.lora):
        own_s += rates.service_s()
    others_s = min(row.decoding, others) * prefill_s + others * output_tokens * speed.decode_step_s
    if not cached_tokens:
        others_s += RETURN_RATIO * row.spare_tokens * token_s
    return Score(row.name, cached_tokens, busy, own_s, others_s)


def choose_row(ask: Ask, row: EngineView, rates: Rates, matches: Matches, rule: str) -> Choice:
    """The choice of an engine for another reason than its expected time; it is the only one considered."""
    cached = dict(matches).get(row.name, 0) if matches else 0
    score = estimate(ask, row, rates, cached, rates.output_tokens(ask.max_tokens))
    load = ask.prompt_tokens, row.busy, row.slots_total
    return Choice(row.name, cached, score.expected_s, (score,), None, 0.0, 0.0, *load, rule)
