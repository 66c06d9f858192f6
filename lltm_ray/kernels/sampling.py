"""Next tokens of many sequences at once, each with its own temperature, cut-offs and randomness: `pick`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen; the default is the likeliest one always."""

    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int = 0
    """Only the so many likeliest; 0: all."""
    top_p: float = 1.0
    """Only the likeliest that together reach this probability, above 0 and at most 1."""
    seed: int = 0
    """The same seed gives the same tokens, whatever else is in the batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("temperature", self.temperature, "must be 0 or above")
        if self.top_k < 0:
            raise ConfigError("top_k", self.top_k, "must be 0 or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "must be above 0 and at most 1")


def pick(logits: Any, sampling: Sequence[Sampling], draws: Sequence[random.Random]) -> list[int]:
    """One token for each row; waits for the device once.

    Args:
        logits: float [n, vocabulary].
        sampling: n of them.
        draws: each row's own source of randomness; one number is taken from it if the row is sampled.
    """
    torch = load("torch", extra="torch")
    chosen = logits.argmax(-1)
    rows = [row for row, each in enumerate(sampling) if each.temperature > 0]
    if rows:
        asked = [(sampling[row], draws[row].random()) for row in rows]
        options = [(each.temperature, each.top_k or logits.shape[1], each.top_p, draw) for each, draw in asked]
        columns = torch.tensor(options, dtype=torch.float32, device=logits.device).T[..., None]
        at = torch.tensor(rows, device=logits.device)
        chosen[at] = _draw(torch, logits[at], *columns)
    return list(chosen.tolist())


def _draw(torch: Any, logits: Any, temperature: Any, top_k: Any, top_p: Any, draw: Any) -> Any:
    """Inverse of the cumulated probabilities of the tokens that are kept, likeliest first."""
    order = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    share = order.values.softmax(-1)
    before = share.cumsum(-1) - share
    kept = (before < top_p) & (torch.arange(share.shape[-1], device=share.device) < top_k)
    kept[:, 0] = True
    summed = (share * kept).cumsum(-1)
    place = torch.searchsorted(summed, draw * summed[:, -1:], right=True)
    return order.indices.gather(-1, place.clamp(max=kept.sum(-1, keepdim=True) - 1))[:, 0]
