"""How much slots slow each other down: the service time were all of them held, from a load that held few of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from lltm_ray.analytics.fit import Fit, fit_groups
from lltm_ray.analytics.frames import Array
from lltm_ray.analytics.occupancy import Engines, Held
from lltm_ray.analytics.overlaps import Timeline
from lltm_ray.analytics.trace import Trace

_PREFILL_PART = 0.05
"""Seconds of a computed token over those of a generated one, about: only how much a long prompt counts in a fit."""
_FIT_ROWS = 10_000
"""Attempts that a line is fitted to, taken evenly; more would not move it."""
_FITS = 2
"""Shares are of an attempt's own work, which the first fit takes to be as its tokens."""
_SURE = 3.0
"""Standard errors of a share: few attempts tell of many slots, and how a batch's time grows is no straight line."""
_LEAST_ROWS = 15
"""Attempts of a model, three for each term of a fit: the spread of fewer tells nothing of what chance leaves open."""
_LEAST_ALONE = 0.05
"""Of what an attempt took, at least so much is its own work."""


class Slowing(NamedTuple):
    """Seconds for which attempts held their slots, each as long as its array."""

    now_s: Array
    least_s: Array
    most_s: Array
    """Were all slots of their engine held meanwhile: no less, no more."""


def at_full_load(trace: Trace, held: Held, engines: Engines) -> Slowing:
    """What attempts would take were all slots held, as far as those that were held together tell.

    An attempt's own work, fitted to its tokens, takes by a share longer for the first slot held beside it, and by
    another for each further one: llama.cpp decodes all slots in one batch, where a second may cost as much as six more
    do. What chance leaves open of both is between `least_s` and `most_s`. Of further slots that were hardly ever held,
    it leaves all between nothing and what the first one costs; and together n slots need no more than in turns. The
    fuller the fleet was, the less is open. Of fewer than `_LEAST_ROWS` attempts, all of that is.
    """
    xp, models = trace.engine.xp, len(trace.names.model) + 1
    took, model = held.ended - held.slot, xp.where(held.model >= 0, held.model, models - 1)
    line = Timeline(xp, {"slots": (held.engine, held.slot, held.ended)})
    level = line.level("slots")
    beside, first = (
        xp.maximum(line.mean(each, held.engine, held.slot, held.ended) - 1.0, 0.0)
        for each in (level, xp.minimum(level, 2.0))
    )
    further = xp.maximum(beside - first, 0.0)
    others = xp.maximum(xp.asarray([*engines.slots, 1])[held.engine] - 1.0, beside)
    alone, fit = _fit(xp, model, models, took, (held.computed * 1.0, held.generated * 1.0, first, further))
    to_first = xp.maximum(xp.minimum(others, 1.0) - first, 0.0) * alone
    to_last = xp.maximum(others - 1.0, 0.0) * alone - further * alone
    (least, most), (least_more, most_more) = (_range(xp, fit, each) for each in (-2, -1))
    most_more = xp.minimum(most_more, xp.maximum(most, least_more))
    in_turns = took * (others + 1) / (beside + 1)
    most_s = took + most[model] * to_first + most_more[model] * xp.maximum(to_last, 0.0)
    least_s = took + least[model] * to_first + least_more[model] * xp.maximum(to_last, 0.0)
    is_few = (fit.rows < _LEAST_ROWS)[model]
    least_s = xp.where(is_few, took, xp.minimum(least_s, in_turns))
    return Slowing(took, least_s, xp.where(is_few, in_turns, xp.minimum(most_s, in_turns)))


def _fit(xp: Any, model: Array, models: int, took: Array, terms: tuple[Array, ...]) -> tuple[Array, Fit]:
    """Seconds of each attempt's own work, and the fit, whose last terms are the shares of first and further slots.

    The shares are of both kinds of work: where prompts and answers are alike, they cannot be told from each other.
    """
    computed, generated, first, further = terms
    alone = work = generated + _PREFILL_PART * computed + 1.0
    some = slice(None, None, max(len(took) // _FIT_ROWS, 1))
    for _ in range(_FITS):
        columns = (took * 0.0 + 1.0, computed, generated, alone * first, alone * further)
        fit = fit_groups(xp, model[some], models, [each[some] for each in columns], took[some], 1.0 / work[some])
        own = fit.terms[model]
        alone = own[:, 0] + own[:, 1] * computed + own[:, 2] * generated
        alone = xp.maximum(alone, _LEAST_ALONE * took)
    return alone, fit


def _range(xp: Any, fit: Fit, term: int) -> tuple[Array, Array]:
    """By model, what chance leaves open of a term that is not negative."""
    return tuple(xp.maximum(fit.terms[:, term] + sign * _SURE * fit.errors[:, term], 0.0) for sign in (-1.0, 1.0))
