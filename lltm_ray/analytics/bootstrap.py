"""Bootstrap intervals of figures of a window, in O(n log n), and measures of how far two samples are apart.

Whole samples are never drawn. The k-th smallest of n draws with replacement from a sorted sample is its value at rank
n * Beta(k, n - k + 1), so that a resampled quantile costs one random number. Requests near in time are alike (they met
the same queue), which would make intervals too narrow; so n is divided by how much more the count below the quantile
varies between slices of the window than that of independent requests would (the design effect), and blocks of requests
need not be drawn. Rates and ratios are sums over slices, and slices are drawn.

Source: B. Efron, R. J. Tibshirani: An Introduction to the Bootstrap, 1993, chapters 6, 8 and 13.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lltm_ray.analytics.columns import Floats, Ints

SLICES = 40
"""Of a window; long against a request, many enough to draw from."""
DRAWS = 2000
Draws = tuple[float, Floats]
"""A figure, and what it is in `DRAWS` resampled windows."""


def draw_quantile(dice: np.random.Generator, values: Floats, slices: Ints, q: float) -> Draws:
    """The smallest of the values that at least a share `q` of them does not exceed, and its draws.

    Args:
        dice: where draws come from.
        values: ascending.
        slices: of each value, from 0 to `SLICES`.
        q: above 0, at most 1.
    """
    n = len(values)
    if not n:
        return math.nan, np.full(DRAWS, math.nan)
    k = math.ceil(q * n)
    found = float(values[k - 1])
    shrunk = 1 / design_effect(values <= found, slices)
    ranks = dice.beta(k * shrunk, (n - k) * shrunk + 1, DRAWS)
    return found, values[np.minimum((ranks * n).astype(np.int64), n - 1)]


def design_effect(is_in: Any, slices: Ints) -> float:
    """How much more a count varies between slices than if each value were in it independently; at least 1."""
    share = float(np.mean(is_in))
    if not 0 < share < 1:
        return 1.0
    apart = np.bincount(slices, weights=is_in - share, minlength=SLICES)
    return max(float((apart**2).sum()) / (len(is_in) * share * (1 - share)), 1.0)


def draw_slices(dice: np.random.Generator) -> Ints:
    """How often each slice is drawn: (DRAWS, SLICES)."""
    drawn: Ints = dice.multinomial(SLICES, np.full(SLICES, 1 / SLICES), DRAWS)
    return drawn


def draw_whole(drawn: Ints, part: Floats, whole: Floats) -> Draws:
    """Sum of `part` over sum of `whole`, bootstrapped by slices; NaN where there is no whole."""
    below, found = drawn @ whole, float(whole.sum())
    draws: Floats = np.where(below > 0, drawn @ part / np.where(below > 0, below, 1.0), math.nan)
    return float(part.sum()) / found if found else math.nan, draws


def cliffs_delta(before: Floats, after: Floats) -> float:
    """Chance that a value of `after` is larger than one of `before`, less that it is smaller; in O(n log n).

    Both ascending; NaN where one is empty.

    Source: N. Cliff: Dominance statistics: ordinal analyses to answer ordinal questions. Psychol. Bull. 114 (1993).
    """
    if not len(before) or not len(after):
        return math.nan
    below, up_to = (np.searchsorted(before, after, side=side) for side in ("left", "right"))
    return float(np.mean(below + up_to) / len(before) - 1)


def distance(before: Floats, after: Floats) -> float:
    """Largest distance of the two cumulative distributions (Kolmogorov and Smirnov); both ascending."""
    both = np.concatenate([before, after])
    shares = (np.searchsorted(each, both, side="right") / len(each) for each in (before, after))
    return float(np.abs(np.subtract(*shares)).max())
