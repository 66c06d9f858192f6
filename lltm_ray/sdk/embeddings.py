"""`EmbeddingEngine`: vectors of texts from a fleet, each text computed once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from lltm_ray.errors import ConfigError
from lltm_ray.knowledge.search import Hit, VectorIndex, check_texts
from lltm_ray.knowledge.vectors import Vectors
from lltm_ray.sdk.engine import InferenceEngine

BATCH = 64
"""Texts of one request; llama-server shares them out over its slots."""


class EmbeddingEngine:
    """Embeds texts, and remembers what it has embedded; may be used from several threads.

    Args:
        engine: a model loaded with `engine={"embeddings": True}`.
        cache_bytes: memory for vectors that are kept; those used longest ago go first. 0 keeps none.
    """

    def __init__(self, engine: InferenceEngine, *, cache_bytes: int = 256 * 2**20) -> None:
        self.engine = engine
        self._limit = cache_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, Vectors] = OrderedDict()
        self._bytes = self.hits = self.misses = 0

    def embed(self, texts: str | Sequence[str]) -> Vectors:
        """Vectors of texts, of length 1 as llama-server gives them.

        Args:
            texts: n of them; none may be empty.

        Returns:
            float32 [n, length], or [length] for one text.

        Raises:
            ConfigError: an empty text, which has no vector.
            UpstreamError: the model makes no embeddings, or a text is longer than its context.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        if empty := [place for place, text in enumerate(several) if not text.strip()]:
            raise ConfigError("texts", f"empty at {empty[:5]}", "must hold something to embed; leave empty texts out")
        keys = [self._key(text) for text in several]
        found = self._look_up(keys)
        missing = {key: text for key, text in zip(keys, several, strict=True) if key not in found}
        wanted = list(missing.items())
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            vectors = self.engine.embed([text for _, text in part]).vectors
            found |= self._store([key for key, _ in part], np.asarray(vectors, np.float32))
        block = np.stack([found[key] for key in keys]) if keys else np.zeros((0, 0), np.float32)
        return block[0] if isinstance(texts, str) else block

    def _key(self, text: str) -> bytes:
        """By model too: vectors of two models do not compare."""
        return hashlib.blake2b(f"{self.engine.served_name}\0{text}".encode(), digest_size=16).digest()

    def _look_up(self, keys: Sequence[bytes]) -> dict[bytes, Vectors]:
        with self._lock:
            found = {key: self._cache[key] for key in keys if key in self._cache}
            for key in found:
                self._cache.move_to_end(key)
            known = sum(key in found for key in keys)
            self.hits += known
            self.misses += len(keys) - known
        return found

    def _store(self, keys: Sequence[bytes], vectors: Vectors) -> dict[bytes, Vectors]:
        with self._lock:
            for key, vector in zip(keys, vectors, strict=True):
                if key not in self._cache:
                    self._bytes += vector.nbytes
                self._cache[key] = vector.copy()  # a row would keep its whole batch alive
            while self._bytes > self._limit:
                self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return dict(zip(keys, vectors, strict=True))

    def clear_cache(self) -> None:
        """Forget all vectors."""
        with self._lock:
            self._cache.clear()
            self._bytes = 0

    def get_cache_stats(self) -> dict[str, int]:
        """`{"entries", "bytes", "hits", "misses"}`."""
        with self._lock:
            return {"entries": len(self._cache), "bytes": self._bytes, "hits": self.hits, "misses": self.misses}


class SemanticSearch:
    """Texts that are found by what they mean.

    Args:
        embeddings: of one model; an index that was saved goes on with the same.
        index: what was loaded with `VectorIndex.load`; None: an empty one.

    Raises:
        ConfigError: the index holds another model's vectors.
    """

    def __init__(self, embeddings: EmbeddingEngine, index: VectorIndex | None = None) -> None:
        name = embeddings.engine.served_name
        self._embeddings = embeddings
        self.index = VectorIndex(name) if index is None else index
        if self.index.model != name:
            raise ConfigError("index", self.index.model, f"holds vectors of that model, {name!r} is loaded")

    def add_documents(self, texts: Sequence[str]) -> None:
        """Add texts; their place is the number of those before them.

        Raises:
            ConfigError: one text, not a list; else as `EmbeddingEngine.embed`.
        """
        check_texts(texts)
        self.index.add(texts, self._embeddings.embed(list(texts)))

    def search(self, query: str, k: int = 5) -> list[Hit]:
        """The `k` texts nearest in meaning, nearest first."""
        return self.index.search(self._embeddings.embed(query), k)
