"""Entities and relations from texts: `extract`. A model answers under a JSON schema, piece of text by piece.

    text ─ cut at sentences ─> pieces ─ ask, several at once ─> JSON ─ only what the piece itself says ─> unite ─> graph

Nothing is lost silently: an answer that ends early, or is as long as it may be, is asked for again in two halves, and
one that cannot be read is an error that names its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lltm_ray.errors import ConfigError, ExtractionError
from lltm_ray.knowledge.graph import Entity, KnowledgeGraph, Mention, Relation, same_name, unite
from lltm_ray.knowledge.search import check_texts
from lltm_ray.knowledge.vectors import Vectors

ENTITY_TYPES = (
    "person", "organization", "location", "event", "date", "product", "technology", "concept", "document", "quantity",
    "other",
)  # fmt: skip
RELATION_TYPES = (
    "is a", "part of", "located in", "works for", "created by", "owns", "uses", "causes", "depends on", "happened on",
    "related to", "opposed to",
)  # fmt: skip
PIECE_CHARS = 2000
"""Longest piece that is asked about at once: some 500 tokens, whose answer fits a small context too."""
_LEAST_CHARS = 200
"""A piece this short is not halved again: it can hardly name more than an answer may."""
_MOST_ENTITIES, _MOST_RELATIONS, _MOST_CHARS = 24, 24, 80
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n{2,}")
_ASKING = (
    "Read the text. List the entities it names, spelled as in the text, and the relations it states between them. "
    "Leave out what it does not say. Answer with JSON.\n\nText:\n"
)

Messages = list[dict[str, str]]
Ask = Callable[[Messages, dict[str, Any]], tuple[str, bool]]
"""(messages, JSON schema) -> (the answer, whether it ended by itself). May be called from several threads."""
_Told = tuple[list[tuple[str, str]], list[tuple[str, str, str]]]
"""Names with types, and (source, relation, target), as an answer has them."""
_Said = tuple[list[Entity], list[Relation], list[str]]
"""What of it stands in the text, and names that do not."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of text number `text`, which begins there at character `start`."""

    text: int
    start: int
    words: str


def extract(
    texts: Sequence[str],
    ask: Ask,
    *,
    entity_types: Sequence[str] = ENTITY_TYPES,
    relation_types: Sequence[str] = RELATION_TYPES,
    at_once: int = 4,
    embed: Callable[[list[str]], Vectors] | None = None,
) -> KnowledgeGraph:
    """The graph of what texts say.

    Args:
        texts: any lengths.
        ask: answers under a JSON schema.
        entity_types: what entities may be.
        relation_types: what relations may be.
        at_once: questions that are open at a time.
        embed: vectors of names, which unite different spellings; see `graph.unite`.

    Raises:
        ExtractionError: an answer that cannot be read, or that is too long even for a short piece.
        ConfigError: one text instead of several, or no types.
    """
    check_texts(texts)
    for name, types in (("entity_types", entity_types), ("relation_types", relation_types)):
        if not types:
            raise ConfigError(name, types, "must name at least one")
    schema = build_schema(entity_types, relation_types)
    pieces = [piece for number, text in enumerate(texts) for piece in cut(number, text)]
    with ThreadPoolExecutor(max(1, at_once), "extract") as pool:
        told = list(pool.map(lambda piece: _read(piece, ask, schema), pieces))
    return unite(*_joined(told), embed=embed)


def build_schema(entity_types: Sequence[str], relation_types: Sequence[str]) -> dict[str, Any]:
    """JSON schema of an answer; bounded in every direction, so that it ends."""
    text = {"type": "string", "minLength": 1, "maxLength": _MOST_CHARS}
    entity = {"name": text, "type": {"enum": list(entity_types)}}
    relation = {"source": text, "relation": {"enum": list(relation_types)}, "target": text}
    return _object(
        entities={"type": "array", "items": _object(**entity), "maxItems": _MOST_ENTITIES},
        relations={"type": "array", "items": _object(**relation), "maxItems": _MOST_RELATIONS},
    )


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def cut(number: int, text: str, limit: int = PIECE_CHARS) -> Iterator[Piece]:
    """A text in pieces of at most `limit` characters, that end where sentences do if they can."""
    start = 0
    while len(text) - start > limit:
        ends = [found.end() for found in _SENTENCE_END.finditer(text, start, start + limit)]
        end = ends[-1] if ends else (text.rfind(" ", start + 1, start + limit) + 1 or start + limit)
        yield Piece(number, start, text[start:end])
        start = end
    if text[start:].strip():
        yield Piece(number, start, text[start:])


def _read(piece: Piece, ask: Ask, schema: dict[str, Any]) -> _Said:
    answer, is_whole = ask([{"role": "user", "content": _ASKING + piece.words}], schema)
    is_short = len(piece.words) <= _LEAST_CHARS
    if is_whole:
        told = _parse(piece, answer)
        if is_short or (len(told[0]) < _MOST_ENTITIES and len(told[1]) < _MOST_RELATIONS):
            return _keep_what_it_says(piece, told)
    elif is_short:
        raise ExtractionError(piece.text, piece.start, "the answer did not end; give the model more context")
    halves = cut(piece.text, piece.words, max(_LEAST_CHARS // 2, len(piece.words) // 2 + 1))
    return _joined([_read(Piece(each.text, piece.start + each.start, each.words), ask, schema) for each in halves])


def _joined(parts: Sequence[_Said]) -> _Said:
    entities, relations, left_out = zip(*parts, strict=True) if parts else ((), (), ())
    return list(chain(*entities)), list(chain(*relations)), list(chain(*left_out))


def _parse(piece: Piece, answer: str) -> _Told:
    try:
        told = json.loads(answer)
        entities = [(str(each["name"]), str(each["type"])) for each in told["entities"]]
        relations = [(str(each["source"]), str(each["relation"]), str(each["target"])) for each in told["relations"]]
    except (ValueError, KeyError, TypeError) as error:
        why = f"the answer is not as its schema wants it ({error!r}); does the server keep to `response_format`?"
        raise ExtractionError(piece.text, piece.start, why) from error
    return entities, relations


def _keep_what_it_says(piece: Piece, told: _Told) -> _Said:
    """Entities whose name stands in the piece, and relations between them."""
    entities, left_out, known = list[Entity](), list[str](), dict[str, str]()
    for name, kind in told[0]:
        places = tuple(_find(piece, name))
        if places:
            entities.append(Entity(name.strip(), kind, places))
            known[same_name(name)] = name.strip()
        else:
            left_out.append(name)
    whole = (Mention(piece.text, piece.start, piece.start + len(piece.words)),)
    relations = [
        Relation(known[same_name(source)], relation, known[same_name(target)], whole)
        for source, relation, target in told[1]
        if same_name(source) in known and same_name(target) in known
    ]
    return entities, relations, left_out


def _find(piece: Piece, name: str) -> Iterator[Mention]:
    """Where a name stands, as a word of its own; blanks may be any."""
    words = name.split()
    if not same_name(name):
        return
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
    for found in re.finditer(pattern, piece.words, re.IGNORECASE):
        yield Mention(piece.text, piece.start + found.start(), piece.start + found.end())
