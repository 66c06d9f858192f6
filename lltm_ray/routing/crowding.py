"""What one more request and those that an engine has, or will have again, do to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import expm1
from typing import NamedTuple, TypeVar

from lltm_ray.routing.choice import Ask, Score
from lltm_ray.routing.rates import Rates
from lltm_ray.routing.table import EngineView, Table

T = TypeVar("T", bound=EngineView)

_MOST_TURNS = 4.0
"""Later turns that count: what is further away will be decided by what happens until then."""


class Outlook(NamedTuple):
    """How the conversations of a model go on, as far as it is the same for all engines."""

    goes_on: float
    """How probably there is a next turn."""
    turns: float
    """How many more are expected, at most `_MOST_TURNS`."""
    beside: float
    """Of a conversation that goes on, the share of its time for which it has a slot busy."""
    fade_s: float
    """See `Returns.fade_s`."""
    computed_tokens: float
    """Of a turn's prompt."""

    def others(self, ask: Ask, row: EngineView, own: int = 0) -> float:
        """Busy slots beside one of an engine in the next turns, on average."""
        return self.goes_on * self.beside * max(row.busy + row.resting(ask.arrived_s, self.fade_s) - own, 0.0)


def look_ahead(rates: Rates) -> Outlook:
    """By what replies and claims have taught."""
    returns, service_s = rates.returns, rates.service_s()
    goes_on, whole_s = returns.ratio, service_s + returns.pause_s(service_s)
    beside = service_s / whole_s if whole_s > 0 else 0.5
    turns = min(goes_on / (1.0 - goes_on), _MOST_TURNS)
    return Outlook(goes_on, turns, beside, rates.fade_s, returns.computed_tokens)


class Known(NamedTuple):
    """What a prompt finds in the fleet."""

    best_tokens: int
    """Most of it that one engine has cached."""
    shared_tokens: int
    usual_busy: float
    """Busy slots of an engine, on average."""
    output_tokens: float
    home_s: float
    """`later_s` of the engine that has content of its own of this conversation; 0: none has."""
    outlook: Outlook


def know(
    ask: Ask,
    table: Table[T],
    rates: Rates,
    output: float,
    free: Mapping[str, tuple[T, int]],
    full: Sequence[tuple[Score, T]],
) -> Known:
    """Of engines that are considered, those with a free slot and those without."""
    outlook, holders = look_ahead(rates), [*free.values(), *((row, score.cached_tokens) for score, row in full)]
    most = max([cached for _, cached in holders])
    own = [later_s(ask, row, rates, outlook, output, own=1) for row, cached in holders if cached > ask.shared_tokens]
    return Known(most, ask.shared_tokens, table.busy_total / len(table), output, max(own, default=0.0), outlook)


def harm(ask: Ask, row: EngineView, outlook: Outlook) -> tuple[float, int]:
    """What a new conversation does at an engine: requests beside it now, and in each of its later turns.

    One more busy slot is less than a conversation driven out that goes on; further ones are not.
    """
    driven_out = 0.0
    if row.spare_tokens:
        idle = max(row.slots_total - row.busy, 1)
        driven_out = outlook.goes_on * min(row.resting(ask.arrived_s, outlook.fade_s) / idle, 1.0)
    return max(row.busy, 1) + outlook.turns * outlook.others(ask, row) + driven_out, row.spare_tokens


def later_s(ask: Ask, row: EngineView, rates: Rates, outlook: Outlook, output: float, own: int = 0) -> float:
    """What a conversation's later turns will take there, and what they and the others at home there cost each other.

    Without that, conversations gather where it was quiet for a moment, and stay there: their caches hold them.

    Args:
        ask: one of its requests.
        row: where it would stay.
        rates: of the model.
        outlook: of the model.
        output: tokens of an answer.
        own: of those who rest there, how many are this one.

    Returns:
        Seconds.
    """
    speed = rates.speed(row.name)
    prefill_s = outlook.computed_tokens * speed.prefill_token_s
    beside_s = 2 * (output * speed.decode_step_s + prefill_s)
    turn_s = speed.prefill_overhead_s + prefill_s + output * speed.decode_s(1)
    return outlook.turns * (turn_s + outlook.others(ask, row, own) * beside_s)


def drift_s(known: Known, score: Score, rates: Rates) -> float:
    """What a conversation's cost changes by as others come and go while it runs, in seconds.

    An engine's busy slots return to the fleet's mean at the rate at which requests end (as in an M/M/inf queue). Those
    who come to an idle one wait for what it computes although another engine has it, and all decode side by side.
    """
    service_s, more = rates.service_s(), known.usual_busy - score.busy
    if known.best_tokens <= known.shared_tokens or service_s <= 0:
        return 0.0
    speed = rates.speed(score.engine)
    again_s = max(0, known.best_tokens - max(score.cached_tokens, known.shared_tokens)) * speed.prefill_token_s
    beside_s = 2 * known.output_tokens * speed.decode_step_s
    stopped = max(0.0, more) * _drifted(again_s / service_s)
    return stopped * again_s + more * _drifted(score.expected_s / service_s) * beside_s


def _drifted(span: float) -> float:
    """How much of the way to the mean is gone on average over a span, in mean times of a request."""
    return 1.0 + expm1(-span) / span if span > 0 else 0.0
