"""Entities and relations: only what a text says, nothing lost in silence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltm_ray.errors import ConfigError, ExtractionError
from lltm_ray.knowledge.extract import ENTITY_TYPES, RELATION_TYPES, build_schema, cut, extract
from lltm_ray.knowledge.graph import Entity, KnowledgeGraph, Mention, Relation, same_name, unite

TEXT = "Ada Lovelace wrote notes on the Analytical Engine. The engine was designed by Charles Babbage in London."


def answer(entities=(), relations=()):
    return json.dumps(
        {
            "entities": [{"name": name, "type": kind} for name, kind in entities],
            "relations": [{"source": one, "relation": kind, "target": other} for one, kind, other in relations],
        }
    )


def says(entities=(), relations=()):
    return lambda _messages, _schema: (answer(entities, relations), True)


def test_entities_have_the_places_where_the_text_names_them():
    found = extract([TEXT], says([("charles babbage", "person"), ("Analytical Engine", "product")]))
    by_type = {each.type: each for each in found.entities}
    (place,) = by_type["person"].mentions
    assert TEXT[place.start : place.end] == "Charles Babbage"
    assert [TEXT[each.start : each.end] for each in by_type["product"].mentions] == ["Analytical Engine"]


def test_what_the_text_does_not_name_is_left_out_and_told():
    told = says([("Ada Lovelace", "person"), ("Alan Turing", "person")], [("Alan Turing", "uses", "Ada Lovelace")])
    found = extract([TEXT], told)
    assert [each.name for each in found.entities] == ["Ada Lovelace"]
    assert found.relations == ()
    assert found.left_out == ("Alan Turing",)


def test_a_name_within_another_word_is_no_mention():
    assert extract(["The engineer came."], says([("engine", "product")])).left_out == ("engine",)


def test_spellings_of_one_name_are_one_entity_and_relations_follow():
    texts = ["The Analytical Engine is in London.", "Babbage owns the analytical  engine."]
    replies = {
        texts[0]: answer([("The Analytical Engine", "product"), ("London", "location")],
                         [("The Analytical Engine", "located in", "London")]),
        texts[1]: answer([("analytical engine", "product"), ("Babbage", "person")],
                         [("Babbage", "owns", "Analytical Engine")]),
    }  # fmt: skip
    found = extract(texts, lambda messages, _: (replies[messages[0]["content"].rpartition("\n")[2]], True))
    engine = next(each for each in found.entities if each.type == "product")
    assert {engine.name, *engine.also} == {"The Analytical Engine", "analytical engine"}
    assert {(each.source, each.relation, each.target) for each in found.relations} == {
        (engine.name, "located in", "London"), ("Babbage", "owns", engine.name),
    }  # fmt: skip
    assert {place.text for place in engine.mentions} == {0, 1}


def test_vectors_unite_names_of_one_type_only():
    here = (Mention(0, 0, 1),)
    entities = [
        Entity("NYC", "location", here),
        Entity("New York", "location", here),
        Entity("Yorkers", "person", here),
    ]
    vectors = {"nyc": [1, 0], "new york": [1, 0.01], "yorkers": [1, 0.01]}
    found = unite(entities, [], embed=lambda names: np.asarray([vectors[name] for name in names], np.float32))
    assert sorted(len(each.also) for each in found.entities) == [0, 1]


def test_an_answer_that_does_not_end_is_asked_for_in_halves_and_places_stay_right():
    text = " ".join(f"Engine number{index} failed." for index in range(60))
    asked = []

    def ask(messages, _schema):
        words = messages[0]["content"].partition("Text:\n")[2]
        asked.append(words)
        names = [word for word in words.split() if word.startswith("number")]
        return answer([(name, "product") for name in names]), len(words) <= 500

    found = extract([text], ask)
    assert len(found.entities) == 60
    assert all(text[each.mentions[0].start : each.mentions[0].end] == each.name for each in found.entities)
    assert max(map(len, asked)) > 500 >= min(map(len, asked))


def test_an_answer_that_is_as_long_as_it_may_be_is_asked_for_in_halves():
    text = " ".join(f"Engine number{index} failed." for index in range(60))

    def ask(messages, schema):
        words = messages[0]["content"].partition("Text:\n")[2]
        names = [word for word in words.split() if word.startswith("number")]
        most = schema["properties"]["entities"]["maxItems"]
        return answer([(name, "product") for name in names[:most]]), True

    assert len(extract([text], ask).entities) == 60


def test_an_answer_that_never_ends_is_an_error_with_its_place():
    with pytest.raises(ExtractionError, match="text 1, from character 0: the answer did not end"):
        extract(["Fine.", "x" * 150], lambda messages, _: (answer(), "Fine" in messages[0]["content"]))


@pytest.mark.parametrize("reply", ["", "no JSON", "[]", '{"entities": []}', '{"entities": [1], "relations": []}'])
def test_an_answer_that_cannot_be_read_is_an_error_and_no_empty_graph(reply):
    with pytest.raises(ExtractionError, match="not as its schema wants it"):
        extract([TEXT], lambda *_: (reply, True))


def test_one_text_instead_of_several_and_no_types_are_refused():
    with pytest.raises(ConfigError, match="list of texts"):
        extract(TEXT, says())
    with pytest.raises(ConfigError, match="entity_types"):
        extract([TEXT], says(), entity_types=())


def test_no_texts_and_blank_ones_ask_nothing():
    assert extract([], says([("x", "other")])) == extract(["  \n "], says([("x", "other")])) == KnowledgeGraph()


@given(st.text(alphabet="ab .\n!é", max_size=600), st.integers(1, 50))
def test_pieces_are_the_text_and_none_is_too_long(text, limit):
    pieces = list(cut(0, text, limit))
    assert all(text[each.start : each.start + len(each.words)] == each.words for each in pieces)
    assert all(0 < len(each.words) <= limit for each in pieces)
    assert "".join(each.words for each in pieces).rstrip() == text.rstrip()


def test_pieces_end_with_sentences_where_they_can():
    assert [each.words for each in cut(0, "One two. Three four. Five", 12)] == ["One two. ", "Three four. ", "Five"]


def test_the_schema_bounds_every_answer():
    schema = build_schema(ENTITY_TYPES, RELATION_TYPES)
    arrays = schema["properties"]
    assert len(ENTITY_TYPES) == 11
    assert len(RELATION_TYPES) == 12
    assert all(each["maxItems"] and not each["items"]["additionalProperties"] for each in arrays.values())
    assert arrays["entities"]["items"]["properties"]["name"]["maxLength"]


@pytest.mark.parametrize(
    ("one", "other"), [("The Analytical  Engine", "analytical engine"), ("Ada.", "ADA"), ("a model", "Model")]
)
def test_names_that_mean_the_same_have_one_key(one, other):
    assert same_name(one) == same_name(other)


def test_a_graph_is_kept_as_json_and_tabled():
    here = (Mention(0, 3, 9),)
    found = KnowledgeGraph(
        (Entity("Ada", "person", here, ("ada",)), Entity("London", "location", here)),
        (Relation("Ada", "located in", "London", here),),
        ("Bob",),
    )
    assert KnowledgeGraph.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ConfigError, match="no saved knowledge graph"):
        KnowledgeGraph.from_dict({"entities": [{}]})
    nodes, edges = found.to_frames()
    assert nodes["node"].tolist() == ["Ada", "London"]
    assert edges[["source", "target", "relation"]].to_numpy().tolist() == [["Ada", "London", "located in"]]
