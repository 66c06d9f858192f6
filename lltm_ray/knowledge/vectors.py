"""Vectors of length 1: their product is their cosine similarity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError

Vectors = npt.NDArray[np.float32]


def unit(vectors: npt.ArrayLike, length: int | None = None) -> Vectors:
    """The same directions, of length 1; a vector of zeros stays one and is similar to nothing.

    Args:
        vectors: float [n, length], or [length] for one.
        length: what it must be; None: any.

    Raises:
        ConfigError: another shape, no numbers, or one that is not finite.
    """
    try:
        given = np.asarray(vectors)
        if given.dtype.kind in "SU":  # NumPy would read numbers out of them
            raise TypeError("they are texts")
        block = np.atleast_2d(given.astype(np.float32, copy=False))
    except (TypeError, ValueError) as error:
        why = f"must be numbers, in rows of one length: {error}"
        raise ConfigError("vectors", type(vectors).__name__, why) from error
    if block.ndim != 2 or length not in (None, block.shape[1]):
        raise ConfigError("vectors", block.shape, f"must be [n, {length or 'length'}]")
    if not np.isfinite(block).all():
        raise ConfigError("vectors", "nan or inf", "must be finite numbers")
    norms = np.linalg.norm(block, axis=1, keepdims=True)
    return np.asarray(block / np.where(norms > 0, norms, 1), np.float32)
