"""`KnowledgeGraph`: entities and the relations between them, each with the places in the texts that say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import ConfigError
from lltm_ray.knowledge.pairs import NO_PAIRS, similar_pairs
from lltm_ray.knowledge.vectors import Vectors

_ARTICLES = re.compile(r"^(the|a|an)\s+")
_EDGES = re.compile(r"^\W+|\W+$")


@dataclass(frozen=True, slots=True, order=True)
class Mention:
    """A place in the texts: characters `start` to `end` of text number `text`."""

    text: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Entity:
    """One thing that the texts speak of."""

    name: str
    """As it is written most often."""
    type: str
    mentions: tuple[Mention, ...]
    """Where its names stand, in the order of the texts."""
    also: tuple[str, ...] = ()
    """Other spellings."""


@dataclass(frozen=True, slots=True)
class Relation:
    """What the texts say of two entities; `source` and `target` are names of `KnowledgeGraph.entities`."""

    source: str
    relation: str
    target: str
    mentions: tuple[Mention, ...]
    """The pieces of text it was read from."""


@dataclass(frozen=True, slots=True)
class KnowledgeGraph:
    """What was read from some texts."""

    entities: tuple[Entity, ...] = ()
    relations: tuple[Relation, ...] = ()
    left_out: tuple[str, ...] = ()
    """What the model named although its text does not: no fact of the texts, so no part of the graph."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> KnowledgeGraph:
        """What `to_dict` gave.

        Raises:
            ConfigError: it is something else.
        """
        try:
            entities = [
                Entity(str(each["name"]), str(each["type"]), _places(each["mentions"]), tuple(each["also"]))
                for each in told["entities"]
            ]
            relations = [
                Relation(str(each["source"]), str(each["relation"]), str(each["target"]), _places(each["mentions"]))
                for each in told["relations"]
            ]
            return cls(tuple(entities), tuple(relations), tuple(told["left_out"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("told", type(told).__name__, f"is no saved knowledge graph: {error!r}") from error

    def to_frames(self) -> tuple[Any, Any]:
        """(nodes, edges) as pandas DataFrames: node, type, mentions; source, target, relation, mentions.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        frame = load("pandas:DataFrame", extra="pandas", feature="a graph as DataFrames")
        nodes = [(each.name, each.type, len(each.mentions)) for each in self.entities]
        edges = [(each.source, each.target, each.relation, len(each.mentions)) for each in self.relations]
        return (
            frame(nodes, columns=["node", "type", "mentions"]),
            frame(edges, columns=["source", "target", "relation", "mentions"]),
        )


def _places(told: Iterable[Mapping[str, int]]) -> tuple[Mention, ...]:
    return tuple(Mention(each["text"], each["start"], each["end"]) for each in told)


def same_name(name: str) -> str:
    """A key that names of one thing share: case, blanks, a leading article and punctuation do not count."""
    return _ARTICLES.sub("", _EDGES.sub("", " ".join(name.casefold().split())))


def unite(
    entities: Sequence[Entity],
    relations: Sequence[Relation],
    left_out: Iterable[str] = (),
    *,
    embed: Callable[[list[str]], Vectors] | None = None,
    threshold: float = 0.9,
) -> KnowledgeGraph:
    """One graph of what several pieces of text said: names that mean the same become one entity.

    Args:
        entities: of all pieces.
        relations: likewise; their ends are names of `entities`.
        left_out: names to pass on.
        embed: vectors float32 [n, length] of n names; with it, names of one type that are at least `threshold` alike
            by cosine are one entity too.
        threshold: 0..1.
    """
    parent = _alike(entities, embed, threshold)
    groups: dict[str, list[Entity]] = {}
    for each in entities:
        groups.setdefault(_root(parent, same_name(each.name)), []).append(each)
    united = {root: _one(group) for root, group in groups.items()}
    edges: dict[tuple[str, str, str], set[Mention]] = {}
    for told in relations:
        source, target = (united[_root(parent, same_name(end))].name for end in (told.source, told.target))
        if source != target:
            edges.setdefault((source, told.relation, target), set()).update(told.mentions)
    return KnowledgeGraph(
        tuple(sorted(united.values(), key=lambda each: (-len(each.mentions), each.name))),
        tuple(Relation(*ends, tuple(sorted(places))) for ends, places in sorted(edges.items())),
        tuple(sorted(set(left_out))),
    )


def _alike(
    entities: Sequence[Entity], embed: Callable[[list[str]], Vectors] | None, threshold: float
) -> dict[str, str]:
    """Each name's parent in a forest, whose trees are names that mean the same."""
    types: dict[str, list[str]] = {}
    for each in entities:
        types.setdefault(same_name(each.name), []).append(each.type)
    parent = {key: key for key in types}
    names = list(types)
    pairs = similar_pairs(embed(names), threshold) if embed is not None and len(names) > 1 else NO_PAIRS
    for first, second in zip(pairs.first, pairs.second, strict=True):
        if _commonest(types[names[first]]) == _commonest(types[names[second]]):
            parent[_root(parent, names[second])] = _root(parent, names[first])
    return parent


def _root(parent: dict[str, str], key: str) -> str:
    while parent[key] != key:
        parent[key] = key = parent[parent[key]]
    return key


def _one(group: Sequence[Entity]) -> Entity:
    mentions = sorted({place for each in group for place in each.mentions})
    name = _commonest(each.name for each in group)
    also = sorted({spelling for each in group for spelling in (each.name, *each.also)} - {name})
    return Entity(name, _commonest(each.type for each in group), tuple(mentions), tuple(also))


def _commonest(values: Iterable[str]) -> str:
    """Of equally common ones the first."""
    return Counter(values).most_common(1)[0][0]
