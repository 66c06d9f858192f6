"""Exact nearest neighbours by cosine similarity: `VectorIndex`, kept in one file."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from lltm_ray.errors import ConfigError
from lltm_ray.knowledge.scores import Indices, NumpyScorer, Scorer
from lltm_ray.knowledge.vectors import Vectors, unit

_BLOCK_SCORES = 2**24
"""Scores held at once while many queries are answered: 64 MiB."""
_NO_INDEX = (
    *(OSError, ValueError, KeyError, EOFError, IndexError, TypeError, MemoryError, RuntimeError),
    *(BadZipFile, zlib.error, ConfigError),
)
"""What reading another file as an index may raise."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A text that was found, with its cosine similarity to the query, -1..1."""

    index: int
    """Its place in the order in which texts were added."""
    text: str
    score: float


class VectorIndex:
    """Texts with their vectors; a search is one product of matrices.

    Args:
        model: name of the model that makes the vectors; those of another one do not compare.
        length: elements of a vector; None: as the first one has.
        scorer: what multiplies, e.g. on a GPU; None: NumPy.
    """

    def __init__(self, model: str = "", length: int | None = None, *, scorer: Scorer | None = None) -> None:
        self.model = model
        self.scorer = scorer or NumpyScorer()
        self.texts: list[str] = []
        self._length = length
        self._blocks: list[Vectors] = []

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, texts: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Add texts.

        Args:
            texts: n of them.
            vectors: float [n, length], of any norm.

        Raises:
            ConfigError: another number or length of vectors, or one that is not finite.
        """
        check_texts(texts)
        if not len(texts) and not np.size(vectors):
            return
        block = unit(vectors, self._length)
        if len(block) != len(texts):
            raise ConfigError("vectors", len(block), f"must be one for each of {len(texts)} texts")
        self._length = block.shape[1]
        self.texts += texts
        self._blocks.append(block)

    def search(self, query: npt.ArrayLike, k: int = 5) -> list[Hit]:
        """The `k` nearest texts, nearest first; fewer where there are not so many.

        Args:
            query: float [length].
            k: at least 1.
        """
        return self.search_all(cast(npt.ArrayLike, [query]), k)[0]

    def search_all(self, queries: npt.ArrayLike, k: int = 5) -> list[list[Hit]]:
        """As `search` for each of several queries.

        Args:
            queries: float [n, length].
            k: at least 1.

        Raises:
            ConfigError: a wrong length, or k below 1.
        """
        if k < 1:
            raise ConfigError("k", k, "must be at least 1")
        asked = unit(queries, self._length)
        if not self.texts:
            return [[] for _ in asked]
        step = max(1, _BLOCK_SCORES // len(self.texts))
        return [
            [Hit(int(index), self.texts[index], float(score)) for index, score in zip(*row, strict=True)]
            for start in range(0, len(asked), step)
            for row in zip(*self._nearest(asked[start : start + step], k), strict=True)
        ]

    def _nearest(self, asked: Vectors, k: int) -> tuple[Indices, Vectors]:
        """The best of each query, in order: of the best of each tile of vectors."""
        vectors, tiles = self._vectors(), []
        for start in range(0, len(vectors), _BLOCK_SCORES):
            tile = vectors[start : start + _BLOCK_SCORES]
            best, scores = self.scorer.top(asked, tile, min(k, len(tile)))
            tiles.append((best + start, scores))
        indices, found = (np.concatenate(column, axis=1) for column in zip(*tiles, strict=True))
        order = np.lexsort((indices, -found), axis=1)[:, :k]  # equal ones in the order in which they were added
        return np.take_along_axis(indices, order, 1), np.take_along_axis(found, order, 1)

    def _vectors(self) -> Vectors:
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0]

    # files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, whole or not at all."""
        target = Path(path)
        vectors = self._vectors() if self.texts else np.zeros((0, self._length or 0), np.float32)
        texts = np.frombuffer(json.dumps(self.texts).encode(), np.uint8)  # NumPy pads texts to the longest one
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}", delete=False) as stream:
            try:
                np.savez(stream, model=np.array(self.model), texts=texts, vectors=vectors)
                stream.flush()
                Path(stream.name).replace(target)
            except BaseException:
                Path(stream.name).unlink()
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, scorer: Scorer | None = None) -> VectorIndex:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ConfigError: not such a file.
        """
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
                texts, vectors = json.loads(stored["texts"].tobytes()), stored["vectors"]
                if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                    raise TypeError("its texts are no list of texts")
                index = cls(str(stored["model"]), vectors.shape[1] or None, scorer=scorer)
                index.add(texts, vectors)
        except _NO_INDEX as error:
            raise ConfigError("path", os.fspath(path), f"is no saved index: {error}") from error
        return index


def check_texts(texts: Sequence[str]) -> None:
    """Refuse one text where several are wanted: it would be taken letter by letter.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(texts, str):
        raise ConfigError("texts", texts, "must be a list of texts: put it in brackets")
