"""What residency learns from replies: how long keys are in tokens, whom to trust, and when to stop predicting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from lltm_ray.routing.residency.slots import Use

_WEIGHT = 0.2
"""Weight of the newest observation in a moving average: the last ten or so decide."""
_RATIO_PRIOR = 0.25
"""Tokens per byte of English text, before the first reply."""
_WINDOW = 512
_CLAIM_TOKENS = 64
"""A smaller prediction proves nothing about a model."""
_FAILURES_OF_SEVERAL, _FAILURES_OF_ONE = 5, 8
_PROBE_EVERY, _PROBE_REQUESTS = 200, 4
_TEMPLATE_TOKENS = 16
"""A prompt's last tokens open the reply (a role, a thinking tag) and may look different in the next turn."""


class Calibration:
    """Moving averages and the off-switch of one model. Ratios are 0..1 except `tokens_per_byte`."""

    def __init__(self) -> None:
        self.tokens_per_byte = _RATIO_PRIOR
        self.ram_trust = 1.0
        """What part of the tokens expected from RAM was really found."""
        self.retention = 1.0
        """What part of a reply's tokens the next turn found cached; low where templates drop the reasoning."""
        self._window: deque[tuple[int, int, int]] = deque(maxlen=_WINDOW)
        self._told = False
        self._off = False
        self._failed: list[str] = []
        self._awaited: set[str] = set()
        self._since_off = 0

    @property
    def is_off(self) -> bool:
        """Whether predictions are 0; a few of every 200 requests are tried all the same."""
        return self._off and self._since_off % _PROBE_EVERY < _PROBE_EVERY - _PROBE_REQUESTS

    def begun(self) -> None:
        """Another request started."""
        self._since_off += 1

    def gone(self, engine: str) -> None:
        """This engine's server ended."""
        self._awaited.discard(engine)

    def restarted(self) -> None:
        """An engine has a new server; when all have that were there at the switch, the model gets another chance."""
        if not self._awaited:
            self._off = False

    def measured(self, key_bytes: int, prompt_tokens: int) -> None:
        """A key of so many bytes had so many tokens."""
        if key_bytes >= 16 and prompt_tokens > 0:
            weight = _WEIGHT if self._told else 1.0
            self._told = True
            self.tokens_per_byte += weight * (prompt_tokens / key_bytes - self.tokens_per_byte)

    def finished(self, engine: str, prompt_tokens: int, cached: int, predicted: int, use: Use | None) -> bool:
        """Learn from one reply, all in tokens; True if this one switched predictions off."""
        if prompt_tokens >= 16:
            self._window.append((predicted, cached, prompt_tokens))
        claim = predicted if use is None else max(predicted, use.cached_tokens)
        if claim >= _CLAIM_TOKENS and cached >= claim / 2:
            self._off = False
        if use is not None:
            self._learn_from(use, cached)
        return self._judge(engine, predicted, cached)

    def wait_for(self, engines: Iterable[str]) -> None:
        """Predictions stay off until all of these have a new server."""
        self._awaited = set(engines)

    def _learn_from(self, use: Use, cached: int) -> None:
        if use.ram_serial >= 0 and use.cached_tokens >= 16:
            self.ram_trust += _WEIGHT * (min(1.0, cached / use.cached_tokens) - self.ram_trust)
        if use.reply is not None:
            began, matched = use.reply
            # Less than the prompt itself: something else went wrong, the reply is not to blame.
            if matched - began >= 8 and cached >= began - _TEMPLATE_TOKENS:
                found = min(1.0, max(0.0, (cached - began) / (matched - began)))
                self.retention += _WEIGHT * (found - self.retention)

    def _judge(self, engine: str, predicted: int, cached: int) -> bool:
        if cached > 0:
            self._failed = []
        elif predicted >= _CLAIM_TOKENS and not self._off:
            self._failed.append(engine)
            enough = _FAILURES_OF_SEVERAL if len(set(self._failed)) > 1 else _FAILURES_OF_ONE
            if len(self._failed) >= enough:
                self._off, self._failed, self._since_off = True, [], 0
                return True
        return False

    def snapshot(self) -> dict[str, Any]:
        """The window and what was learnt, as JSON."""
        errors = [abs(predicted - cached) / prompt for predicted, cached, prompt in self._window]
        return {
            "n": len(self._window),
            "predicted_tokens": sum(each[0] for each in self._window),
            "actual_tokens": sum(each[1] for each in self._window),
            "median_error_ratio": median(errors) if errors else 0.0,
            "ram_trust": self.ram_trust,
            "reply_retention": self.retention,
            "tokens_per_byte": self.tokens_per_byte,
            "is_off": self.is_off,
        }
