"""How fast the engines of one model are, learnt from what llama-server says of each reply. Constant time, no clock.

Prefill: seconds = overhead + tokens x seconds a token; the slope is a ratio of sums that forget, so each token counts
the same, and the overhead comes from prompts too small for anything else. Decode: seconds a token = first + step x
(busy slots - 1), by least squares with exponential forgetting (recursive least squares; Haykin, "Adaptive Filter
Theory", ch. 10) in its closed form for two unknowns. Both start from the model's mean as if it had been observed a
few times (a ridge prior), the model's mean from a guess that the first replies outweigh. Readings outside 1/8..8 of
what is expected are cut there, as Huber's estimator does. An engine counts as faster or slower than the others only
where that is more than its readings' scatter explains. Service times have a mean and a mean deviation as TCP's timers
have (RFC 6298).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Any

from lltm_ray.records import Timings
from lltm_ray.routing.returns import Returns

__all__ = ["Rates", "Speed"]

TINY_PREFILL_TOKENS = 16
"""Prompts with less to compute say something of the overhead only."""
_KEEP = 0.98
"""What is left of a reading's weight after the next one: the last 50 decide."""
_PRIOR_TOKENS = 256.0
"""What a reply of trust in a prior is in prompt tokens."""
_ENGINE_TRUST, _MODEL_TRUST = 2.0, 1 / 16
"""How many replies the prior is worth: an engine's is the model's mean, the model's is a mere guess."""
_SHAPE_REPLIES, _SHAPE_BUSY = 4.0, 4.0
"""Weight of the prior's slope in replies, laid out at 1 and at 4 busy slots."""
_FULL_REPLY_TOKENS = 64
"""A reply with fewer tokens weighs less."""
_LEAST_SCATTER = 3.0
"""As many readings must have told how widely they scatter."""
_CUT = 8.0
_CUT_AFTER = 4
_SAME = 0.15
"""Engines that differ from the model's mean by less are taken as the mean, so that noise does not choose engines."""
_SURE = 3.0
"""Nor does it where readings scatter widely: an engine must lie as many standard errors from the mean, which replies
that ran together make as one reading, because what held up one of them held up all."""
_ODD = 0.5
"""How far apart an engine must be from the mean for its speed to decide where a short request goes."""
_MEAN_WEIGHT, _DEVIATION_WEIGHT = 1 / 8, 1 / 4
_MISSED_TURNS = 32
"""An engine that had no reply while others had so many each is as unknown as a new one: a slow engine that is passed
over for good could never show that it has recovered. While it has not, that costs one reply in a hundred or so."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast an engine is expected to be; the defaults are a mid-size model on a small GPU."""

    prefill_token_s: float = 1e-3
    prefill_overhead_s: float = 0.01
    decode_first_s: float = 0.02
    """Seconds a generated token when no other slot is busy."""
    decode_step_s: float = 0.002
    """What each further busy slot adds to that."""

    def prefill_s(self, tokens: float) -> float:
        """Seconds to compute so many prompt tokens on an otherwise idle engine."""
        return self.prefill_overhead_s + tokens * self.prefill_token_s

    def decode_s(self, busy: float) -> float:
        """Seconds a generated token with so many slots busy, this one among them."""
        return self.decode_first_s + (busy - 1) * self.decode_step_s if busy > 1 else self.decode_first_s


_PRIOR = Speed()


class _Line:
    """Weighted least squares of y = first + step * (x - 1) that forgets."""

    __slots__ = ("w", "wx", "wxx", "wxy", "wy")

    def __init__(self) -> None:
        self.w = self.wx = self.wy = self.wxx = self.wxy = 0.0

    def learn(self, x: float, y: float, weight: float) -> None:
        self.w = self.w * _KEEP + weight
        self.wx = self.wx * _KEEP + weight * x
        self.wy = self.wy * _KEEP + weight * y
        self.wxx = self.wxx * _KEEP + weight * x * x
        self.wxy = self.wxy * _KEEP + weight * x * y

    def solve(self, prior: Speed, trust: float) -> tuple[float, float]:
        """First and step. The prior's level is worth `trust` replies; its shape, step to first, `_SHAPE_REPLIES`."""
        level = self.w * prior.decode_first_s + (self.wx - self.w) * prior.decode_step_s
        pull = trust * prior.decode_first_s
        scale = (self.wy + pull) / (level + pull)
        half = _SHAPE_REPLIES / 2
        low, high = scale * prior.decode_first_s, scale * prior.decode_s(_SHAPE_BUSY)
        w, wx = self.w + 2 * half, self.wx + half * (1 + _SHAPE_BUSY)
        wy, wxx = self.wy + half * (low + high), self.wxx + half * (1 + _SHAPE_BUSY**2)
        wxy = self.wxy + half * (low + _SHAPE_BUSY * high)
        step = max(0.0, (w * wxy - wx * wy) / (w * wxx - wx * wx))
        first = (wy - step * wx) / w + step
        if first >= step:
            return first, step
        # never below the line through the origin, where slots only queue for one another
        step = wxy / wxx
        return step, step


class _Bias:
    """How far an engine's readings lie from what is expected of the model, as a logarithm: 0 is as expected."""

    __slots__ = ("total", "weight")

    def __init__(self) -> None:
        self.weight = self.total = 0.0

    def learn(self, value: float, weight: float) -> None:
        """Take log(seen / expected)."""
        self.weight = self.weight * _KEEP + weight
        self.total = self.total * _KEEP + weight * value

    def is_sure(self, scatter: float) -> bool:
        """Whether readings that lie `scatter` from their mean, on average, do not come out like this by chance."""
        return abs(self.total) > _SURE * scatter * sqrt(self.weight)


class _Scatter:
    """How far readings lie from their own engine's mean, over all engines of the model, as a logarithm."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known = _Bias()

    def compare(self, bias: _Bias, seen: float, expected: float, busy: float) -> bool:
        """Take a reading of an engine; whether its bias is more than chance."""
        value, weight = log(min(max(seen / expected, 1 / _CUT), _CUT)), 1 / max(1.0, busy)
        if bias.weight:
            self._known.learn(abs(value - bias.total / bias.weight), weight)
        bias.learn(value, weight)
        return self._known.weight >= _LEAST_SCATTER and bias.is_sure(self._known.total / self._known.weight)


class _Learner:
    """The readings of one engine, or of the whole model."""

    __slots__ = (
        *("biases", "count", "last", "line", "overhead_s", "prefill_s", "prefill_tokens"),
        *("speed", "stands_out", "sure", "trust"),
    )

    def __init__(self, speed: Speed, trust: float) -> None:
        self.speed = speed
        self.trust = trust
        self.stands_out = False
        self.count = self.last = 0
        self.prefill_tokens = 0.0
        self.prefill_s = 0.0
        self.overhead_s: float | None = None
        self.line = _Line()
        self.biases = _Bias(), _Bias()
        self.sure = [False, False]

    def learn(self, timings: Timings, busy: float, prior: Speed) -> None:
        self._learn_prefill(timings.prompt_n, timings.prompt_ms / 1e3)
        # llama.cpp's decode time begins with the first token, so n tokens are n - 1 steps (its `n_gen_steps`)
        steps = timings.predicted_n - 1
        if steps > 0 and timings.predicted_ms > 0:
            seen = self._cut(timings.predicted_ms / 1e3 / steps, self.speed.decode_s(busy))
            self.line.learn(max(1.0, busy), seen, min(1.0, steps / _FULL_REPLY_TOKENS))
        self.count += 1
        self.speed = self._fit(prior)

    def _learn_prefill(self, tokens: int, seconds: float) -> None:
        if tokens <= 0 or seconds <= 0:
            return
        if tokens < TINY_PREFILL_TOKENS:
            over = max(0.0, seconds - tokens * self.speed.prefill_token_s)
            over = over if self.overhead_s is None else min(over, _CUT * self.overhead_s + 1e-3)
            known = over if self.overhead_s is None else self.overhead_s
            self.overhead_s = known + _MEAN_WEIGHT * (over - known)
            return
        # a first overhead that is a mere guess must not make a fast engine's tokens free
        net = max(seconds / 2, seconds - self.speed.prefill_overhead_s)
        self.prefill_tokens = self.prefill_tokens * _KEEP + tokens
        self.prefill_s = self.prefill_s * _KEEP + self._cut(net / tokens, self.speed.prefill_token_s) * tokens

    def _cut(self, seen: float, expected: float) -> float:
        return seen if self.count < _CUT_AFTER else min(max(seen, expected / _CUT), expected * _CUT)

    def _fit(self, prior: Speed) -> Speed:
        first, step = self.line.solve(prior, self.trust)
        pull = self.trust * _PRIOR_TOKENS
        return Speed(
            (self.prefill_s + pull * prior.prefill_token_s) / (self.prefill_tokens + pull),
            prior.prefill_overhead_s if self.overhead_s is None else self.overhead_s,
            first,
            step,
        )


class _Mean:
    """A moving mean and mean deviation; RFC 6298, section 2."""

    __slots__ = ("deviation", "mean")

    def __init__(self, mean: float, deviation: float) -> None:
        self.mean, self.deviation = mean, deviation

    def learn(self, value: float, *, is_first: bool) -> None:
        if is_first:
            self.mean, self.deviation = value, value / 2
            return
        self.deviation += _DEVIATION_WEIGHT * (abs(value - self.mean) - self.deviation)
        self.mean += _MEAN_WEIGHT * (value - self.mean)


class Rates:
    """What is known of the speed of one model's engines and of what its requests take.

    An engine that nothing is known of has the speed of the others; a fleet that nothing is known of has `prior`.

    Args:
        prior: speed to begin with.
        output_tokens: length of a reply to begin with.
    """

    def __init__(self, prior: Speed = _PRIOR, output_tokens: float = 256.0) -> None:
        self.returns = Returns()
        self._prior = prior
        self._model = _Learner(prior, _MODEL_TRUST)
        self._engines: OrderedDict[str, _Learner] = OrderedDict()
        service_s = prior.prefill_s(512) + output_tokens * prior.decode_first_s
        self._service = _Mean(service_s, service_s / 2)
        self._output = _Mean(output_tokens, output_tokens / 2)
        self._scatters = _Scatter(), _Scatter()
        self._tokens = 0.0
        self._held_s = 0.0
        self.requests = 0
        """Replies learnt from so far."""
        self.odd: set[str] = set()
        """Engines that are much faster or slower than the others."""

    def learn(self, engine: str, timings: Timings, *, busy: float, held_s: float | None = None) -> None:
        """Take a finished reply. Replies without any timed work teach nothing.

        Args:
            engine: where it was made.
            timings: what llama-server said of it.
            busy: busy slots of that engine, this one among them; the mean over the reply's life.
            held_s: seconds the slot was claimed; None takes the server's own working time.
        """
        work_s = (timings.prompt_ms + timings.predicted_ms) / 1e3
        if not 0 < work_s < inf:
            return
        self._model.learn(timings, busy, self._prior)
        own = self._engines.get(engine)
        if own is None:
            own = self._engines[engine] = _Learner(self._model.speed, _ENGINE_TRUST)
        own.learn(timings, busy, self._model.speed)
        is_sure = self._compare(own, timings, busy)
        own.stands_out = is_sure and not _is_same(own.speed, self._model.speed)
        is_odd = is_sure and not _is_same(own.speed, self._model.speed, _ODD)
        (self.odd.add if is_odd else self.odd.discard)(engine)
        held_s = work_s if held_s is None else held_s
        self._service.learn(held_s, is_first=not self.requests)
        self._output.learn(timings.predicted_n, is_first=not self.requests)
        self._tokens = self._tokens * _KEEP + timings.prompt_n + timings.predicted_n
        self._held_s = self._held_s * _KEEP + held_s
        self.returns.answered(timings.prompt_n)
        self.requests += 1
        own.last = self.requests
        self._forget_one()

    def _compare(self, own: _Learner, timings: Timings, busy: float) -> bool:
        """Whether an engine is surely faster or slower than the model's mean, in reading or in writing."""
        mean, steps = self._model.speed, timings.predicted_n - 1
        pairs = (
            (timings.prompt_n >= TINY_PREFILL_TOKENS, timings.prompt_ms, mean.prefill_s(timings.prompt_n)),
            (steps > 0, timings.predicted_ms, steps * mean.decode_s(busy)),
        )
        for index, (tells, seen_ms, expected_s) in enumerate(pairs):
            if tells and seen_ms > 0 and expected_s > 0:
                bias, scatter = own.biases[index], self._scatters[index]
                own.sure[index] = scatter.compare(bias, seen_ms / 1e3, expected_s, busy)
        return any(own.sure)

    def _forget_one(self) -> None:
        """Look whether one engine, each in its turn, has been passed over for too long."""
        name, own = next(iter(self._engines.items()))
        if self.requests - own.last > _MISSED_TURNS * len(self._engines):
            self.forget(name)
        else:
            self._engines.move_to_end(name)

    def forget(self, engine: str) -> None:
        """The engine left, or is another one under the old name."""
        self._engines.pop(engine, None)
        self.odd.discard(engine)

    def speed(self, engine: str) -> Speed:
        """An engine's own speed where that stood out from the model's mean at its last reply, else the mean."""
        own = self._engines.get(engine)
        return own.speed if own is not None and own.stands_out else self._model.speed

    def prefill_s(self, engine: str, tokens: float) -> float:
        """Seconds that an engine needs to compute so many prompt tokens."""
        return self.speed(engine).prefill_s(tokens)

    def prefill_tokens_s(self, engine: str) -> float:
        """Prompt tokens that an engine computes in a second."""
        return 1.0 / self.speed(engine).prefill_token_s

    def decode_s(self, engine: str, busy: float) -> float:
        """Seconds a generated token on an engine with so many slots busy, this one among them."""
        return self.speed(engine).decode_s(busy)

    @property
    def service_dev_s(self) -> float:
        """Mean deviation of the time a request holds its slot."""
        return self._service.deviation

    def service_s(self, deviations: float = 0.0) -> float:
        """How long a request holds its slot: the mean, and so many mean deviations on top to be on the safe side."""
        return self._service.mean + deviations * self._service.deviation

    @property
    def fade_s(self) -> float:
        """See `Returns.fade_s`; before a pause was seen it counts as long as a request."""
        return self.returns.fade_s(self._service.mean)

    def output_tokens(self, max_tokens: int | None = None, deviations: float = 0.0) -> float:
        """How many tokens a reply will have, at most `max_tokens`; llama.cpp's -1 is no limit."""
        expected = self._output.mean + deviations * self._output.deviation
        # a client's limit may be an int that no float can hold
        return float(max_tokens) if max_tokens is not None and 0 <= max_tokens < expected else expected

    def slot_wait_s(self, slots: int, ahead: int = 0, deviations: float = 1.0) -> float:
        """Seconds until one of so many busy slots is free for a request with `ahead` others before it.

        Service times are taken as exponential, so that the time a slot has been busy says nothing (M/M/c queue).
        """
        return self.service_s(deviations) * (ahead + 1) / max(1, slots)

    def throughput_tokens_s(self) -> float:
        """Tokens computed and generated in a second by each busy slot."""
        if self._held_s > 0:
            return self._tokens / self._held_s
        return (512 + self._output.mean) / self._service.mean if self._service.mean > 0 else 0.0

    def snapshot(self) -> dict[str, Any]:
        """What is known, as JSON."""
        return {
            "requests": self.requests,
            "service_s": self._service.mean,
            "service_dev_s": self._service.deviation,
            "output_tokens": self._output.mean,
            "throughput_tokens_s": self.throughput_tokens_s(),
            "engines": {name: _as_dict(self.speed(name)) for name in sorted(self._engines)},
        }


def _is_same(own: Speed, mean: Speed, apart: float = _SAME) -> bool:
    return (
        abs(own.prefill_token_s - mean.prefill_token_s) <= apart * mean.prefill_token_s
        and abs(own.decode_first_s - mean.decode_first_s) <= apart * mean.decode_first_s
        and abs(own.decode_s(4) - mean.decode_s(4)) <= apart * mean.decode_s(4)
    )


def _as_dict(speed: Speed) -> dict[str, float]:
    return {
        "prefill_tokens_s": 1.0 / speed.prefill_token_s,
        "prefill_overhead_s": speed.prefill_overhead_s,
        "decode_first_s": speed.decode_first_s,
        "decode_step_s": speed.decode_step_s,
    }
