"""Scores of vectors with PyTorch, on a GPU or not: what `lltm_ray.knowledge` takes as a scorer."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class TorchScorer:
    """Multiplies and selects on a device; only what was selected comes back.

    The vectors that were searched last stay on the device while the same array is searched again, so it must not be
    written to in between; an index that grows makes a new one. Products are float32 throughout, unless the process has
    switched TF32 on in PyTorch.

    Args:
        device: as PyTorch takes it; None: the GPU if there is one.

    Raises:
        MissingExtraError: PyTorch is not installed.
        ConfigError: there is no such device.
    """

    def __init__(self, device: Any = None) -> None:
        self._torch = load("torch", extra="torch")
        try:
            self.device = self._torch.device(device or ("cuda" if self._torch.cuda.is_available() else "cpu"))
        except (RuntimeError, TypeError) as error:
            raise ConfigError("device", device, "must be cpu, cuda or cuda:N") from error
        count = self._torch.cuda.device_count()
        if self.device.type == "cuda" and not 0 <= (self.device.index or 0) < count:
            raise ConfigError("device", device, f"PyTorch sees {count} CUDA devices here; take one of them, or cpu")
        self._lock = threading.Lock()
        self._kept: tuple[weakref.ref[Any], tuple[int, ...], Any] | None = None

    def top(self, queries: Vectors, vectors: Vectors, k: int) -> tuple[Indices, Vectors]:
        """The `k` best of float32 [n, length] for each of [m, length]: indices and scores, [m, k] each."""
        found = (self._sent(queries) @ self._resident(vectors).T).topk(k, dim=1, sorted=False)
        return found.indices.cpu().numpy(), found.values.cpu().numpy()

    def above(self, first: Vectors, second: Vectors, threshold: float) -> tuple[Indices, Indices, Vectors]:
        """All pairs of [m, length] and [n, length] that score at least `threshold`: rows, columns and scores."""
        scores = self._sent(first) @ self._sent(second).T
        rows, columns = (scores >= threshold).nonzero(as_tuple=True)
        return rows.cpu().numpy(), columns.cpu().numpy(), scores[rows, columns].cpu().numpy()

    def _sent(self, vectors: Vectors) -> Any:
        return self._torch.tensor(vectors, device=self.device)

    def _resident(self, vectors: Vectors) -> Any:
        """The vectors on the device, sent again only if they are not those of the last call."""
        owner = vectors.base if isinstance(vectors.base, np.ndarray) else vectors
        place = (vectors.__array_interface__["data"][0], *vectors.shape, *vectors.strides)
        with self._lock:
            if self._kept is None or self._kept[0]() is not owner or self._kept[1] != place:
                self._kept = None  # its memory first
                self._kept = (weakref.ref(owner), place, self._sent(vectors))
            return self._kept[2]
