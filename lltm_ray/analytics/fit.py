"""Robust straight lines through many groups at once: iteratively reweighted least squares on normal equations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lltm_ray.analytics.frames import Array

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over the median of its absolute deviations."""
IQR_TO_SIGMA = 0.7413
"""The same over the distance of its quartiles."""
_HUBER = 1.345
"""Standard deviations from which a residual counts less; 95 % efficient where the noise is normal (Huber, 1964)."""
_ROUNDS = 5
_REFITS, _BASE_REFITS = 2, 3
_RIDGE = 1e-9
"""Share of a column's own square that keeps a group solvable in which it never changes."""


@dataclass(frozen=True, slots=True)
class Fit:
    """`y` of a row is about the sum of `terms` of its group, each times its column."""

    terms: Array
    """(groups, columns)."""
    errors: Array
    """Their standard errors, of the same shape; wider where rows are few for the terms of all groups."""
    fitted: Array
    """(rows,)"""
    relative: Array
    """(y - fitted) * scale of each row."""
    sigma: float
    """Robust standard deviation of `relative`."""
    rows: Array
    """(groups,): how many each was fitted to."""


def fit_groups(xp: Any, group: Array, groups: int, columns: Sequence[Array], y: Array, scale: Array) -> Fit:
    """Huber's fit of `y` on `columns`, without a constant unless one of them is.

    Args:
        xp: the arrays' module.
        group: of each row, 0 <= group < groups.
        groups: how many.
        columns: float64, one a term.
        y: float64.
        scale: of each row; what a residual is multiplied by before it is compared with others: one over its noise.
    """
    if not len(y):
        return Fit(xp.zeros((groups, len(columns))), xp.zeros((groups, len(columns))), y, y, 0.0, xp.zeros(groups))
    sizes = [float(xp.abs(column).max()) or 1.0 for column in columns]
    scaled = xp.stack([column / size * scale for column, size in zip(columns, sizes, strict=True)])
    target, weight, sigma = y * scale, xp.full(len(y), 1.0), 0.0
    terms = errors = xp.zeros((groups, len(columns)))
    relative = target
    for _ in range(_ROUNDS):
        inverse, terms = _solve(xp, group, groups, scaled, target, weight)
        relative = target - _apply(terms, group, scaled)
        away = xp.abs(relative)
        sigma = MAD_TO_SIGMA * float(xp.percentile(away, 50))
        weight = xp.minimum(1.0, _HUBER * max(sigma, 1e-12) / xp.maximum(away, 1e-12))
        errors = xp.sqrt(xp.maximum(xp.stack([inverse[:, i, i] for i in range(len(columns))], axis=1), 0.0)) * sigma
    per_unit = xp.asarray(sizes)
    rows = xp.bincount(group, minlength=groups)
    errors = errors * _wider(len(y), len(columns) * int((rows > 0).sum()))
    return Fit(terms / per_unit, errors / per_unit, y - relative / scale, relative, sigma, rows)


def _wider(rows: int, terms: int) -> float:
    """By how much residuals are smaller than their noise, for terms bend to it; the least where no row is spare."""
    return math.sqrt(rows / max(rows - terms, 1))


def fit_positive(xp: Any, group: Array, groups: int, columns: Sequence[Array], y: Array, scale: Array) -> Fit:
    """`fit_groups`, but a group's columns whose terms come out negative are left out, and the others fitted anew."""
    fit = fit_groups(xp, group, groups, columns, y, scale)
    for _ in range(_REFITS):
        if not bool((fit.terms < 0).any()):
            return fit
        columns = [column * (fit.terms[:, i] >= 0)[group] for i, column in enumerate(columns)]
        fit = fit_groups(xp, group, groups, columns, y, scale)
    return fit


def fit_on_base(xp: Any, group: Array, groups: int, columns: Sequence[Array], y: Array, scale: Array) -> Fit:
    """As `fit_positive`, but the first column, of amounts above 0, always stays.

    Of two columns that look alike in what was seen either may come out negative for the other's sake.
    """
    fit = fit_groups(xp, group, groups, columns, y, scale)
    for turn in range(_BASE_REFITS):
        if not bool((fit.terms < 0).any()):
            return fit
        is_left_out = _left_out(xp, fit.terms, is_last=turn == _BASE_REFITS - 1)
        columns = [column * ~is_left_out[:, i][group] for i, column in enumerate(columns)]
        fit = fit_groups(xp, group, groups, columns, y, scale)
    return fit


def _left_out(xp: Any, terms: Array, *, is_last: bool) -> Array:
    """Columns of each group that are negative but for the first; all but the first where only that is."""
    is_first = (xp.arange(terms.shape[1]) == 0)[None, :]
    is_negative = (terms < 0) & ~is_first
    is_alone = (terms[:, 0] < 0) & (~is_negative.any(axis=1) | is_last)
    return is_negative | (is_alone[:, None] & ~is_first)


def _solve(xp: Any, group: Array, groups: int, columns: Array, target: Array, weight: Array) -> tuple[Array, Array]:
    """Inverse of each group's normal matrix, and its terms; `columns` is (columns, rows)."""
    k, heavy = len(columns), columns * weight
    normal, right = xp.zeros((groups, k, k)), xp.zeros((groups, k))
    if groups == 1:
        normal[0], right[0] = heavy @ columns.T, heavy @ target
    for i in range(k if groups > 1 else 0):
        right[:, i] = xp.bincount(group, weights=heavy[i] * target, minlength=groups)
        for j in range(i, k):
            normal[:, i, j] = normal[:, j, i] = xp.bincount(group, weights=heavy[i] * columns[j], minlength=groups)
    for i in range(k):
        normal[:, i, i] += _RIDGE * (normal[:, i, i] + 1.0)
    inverse = xp.linalg.solve(normal, xp.zeros((groups, k, k)) + xp.eye(k))
    return inverse, (inverse * right[:, None, :]).sum(axis=2)


def _apply(terms: Array, group: Array, columns: Array) -> Array:
    if len(terms) == 1:
        return terms[0] @ columns
    return sum(terms[:, i][group] * column for i, column in enumerate(columns))
