"""How conversations go on: how probably one does after an answer, and how long its client thinks."""

from __future__ import annotations

from lltm_ray.routing.residency import Match, SlotChoice

_KEEP = 0.99
"""Weight of what was seen one claim ago: about the last hundred count."""
_FIRST, _FIRST_RATIO = 8.0, 0.8
"""What is believed before anything was seen, and for how many claims that counts: most of what people ask are chats."""
_MOST = 0.95
_FADE = 2.0
"""Mean pauses after which a conversation that still rests is counted 1/e times: pauses have a long tail."""


class Returns:
    """Learnt from claims: each goes on from what an engine holds of its conversation, or begins one."""

    __slots__ = ("_claims", "_pause_s", "_pauses", "_returned", "_tokens", "_works")

    def __init__(self) -> None:
        self._claims, self._returned = _FIRST, _FIRST * _FIRST_RATIO
        self._pauses = self._pause_s = self._works = self._tokens = 0.0

    def claimed(self, match: Match, spot: SlotChoice, pause_s: float | None) -> None:
        """A slot was claimed.

        Args:
            match: of the prompt; a conversation goes on where an engine has more of it than other prompts share.
            spot: where it runs.
            pause_s: since the last answer of the conversation in that slot; None: not known.
        """
        is_return = bool(match.engines) and match.engines[0][1] > match.shared_tokens
        self._claims = _KEEP * self._claims + 1.0
        self._returned = _KEEP * self._returned + is_return
        if is_return and pause_s is not None and spot.cached_tokens > match.shared_tokens:
            self._pauses = _KEEP * self._pauses + 1.0
            self._pause_s = _KEEP * self._pause_s + pause_s

    def answered(self, computed_tokens: int) -> None:
        """A request had to compute so many tokens of its prompt."""
        self._works = _KEEP * self._works + 1.0
        self._tokens = _KEEP * self._tokens + computed_tokens

    @property
    def ratio(self) -> float:
        """Share of answers after which the conversation goes on, 0 to 0.95."""
        return min(self._returned / self._claims, _MOST)

    @property
    def computed_tokens(self) -> float:
        """Of a request's prompt, on average."""
        return self._tokens / self._works if self._works else 0.0

    def pause_s(self, otherwise_s: float) -> float:
        """Mean seconds between an answer and the next turn; `otherwise_s` as long as none was seen."""
        return self._pause_s / self._pauses if self._pauses else otherwise_s

    def fade_s(self, otherwise_s: float) -> float:
        """Seconds after which a conversation that rests is believed to go on 1/e times as much as at first."""
        return max(_FADE * self.pause_s(otherwise_s), 1e-3)
