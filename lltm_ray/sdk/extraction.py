"""`KnowledgeExtractor`: a graph of what texts say, read by the model of a fleet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lltm_ray.driver import Cluster
from lltm_ray.knowledge.extract import ENTITY_TYPES, RELATION_TYPES, Messages, extract
from lltm_ray.knowledge.graph import KnowledgeGraph
from lltm_ray.sdk.embeddings import EmbeddingEngine
from lltm_ray.telemetry.user_spans import trace


class KnowledgeExtractor:
    """Reads entities and relations, under a JSON schema, piece by piece and several at once.

    Args:
        cluster: a fleet with a model that follows instructions; an `InferenceEngine` has one as `cluster`.
        model: which of its models; empty: the first.
        embeddings: of names: those that are alike become one entity; None: only equal names do.
        entity_types: what entities may be.
        relation_types: what relations may be.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        model: str = "",
        embeddings: EmbeddingEngine | None = None,
        entity_types: Sequence[str] = ENTITY_TYPES,
        relation_types: Sequence[str] = RELATION_TYPES,
    ) -> None:
        self._cluster = cluster
        self._model = model or cluster.status().models[0].name
        self._types = {"entity_types": tuple(entity_types), "relation_types": tuple(relation_types)}
        self._embed = None if embeddings is None else embeddings.embed

    @trace(name="extract knowledge")
    def extract(self, texts: str | Sequence[str], *, max_tokens: int = 1024) -> KnowledgeGraph:
        """The graph of one text or of several.

        Args:
            texts: any lengths.
            max_tokens: of one answer; pieces whose answer is longer are halved.

        Raises:
            ExtractionError: an answer that cannot be read; it names its place.
            LltmRayError: a request failed; see `Cluster.chat`.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        slots = sum(each.slots_total for each in self._cluster.status().engines if each.model == self._model)
        return extract(several, partial(self._ask, max_tokens), at_once=slots, embed=self._embed, **self._types)

    def _ask(self, max_tokens: int, messages: Messages, schema: dict[str, Any]) -> tuple[str, bool]:
        form = {"type": "json_schema", "json_schema": {"name": "knowledge", "schema": schema}}
        asked: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens, "temperature": 0.0}
        done = self._cluster.chat(messages, response_format=form, **asked)
        return done.text, done.finish_reason == "stop"
