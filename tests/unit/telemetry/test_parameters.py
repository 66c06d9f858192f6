"""A request's parameters: every API's spelling, and what a client may send instead of them."""

import json

import pytest

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.parameters import FIELDS, TOLD, read_parameters


def read(**given):
    return read_parameters(json.dumps(given))


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"])
def test_each_apis_limit_is_the_same_attribute(field):
    assert read(**{field: 16}) == {names.REQUEST_MAX_TOKENS: 16}
    assert field in FIELDS


def test_stops_and_encodings_are_lists_whatever_they_came_as():
    assert read(stop="a") == read(stop_sequences=["a"]) == {names.REQUEST_STOP_SEQUENCES: ["a"]}
    assert read(encoding_format="float") == {names.REQUEST_ENCODING_FORMATS: ["float"]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"response_format": {"type": "json_object"}}, "json"),
        ({"response_format": {"type": "text"}}, "text"),
        ({"text": {"format": {"type": "json_schema"}}}, "json"),
        ({"json_schema": {"type": "object"}}, "json"),
    ],
)
def test_the_output_type_is_told_only_as_the_conventions_know_it(given, told):
    assert read(**given) == {names.OUTPUT_TYPE: told}


def test_reasoning_is_the_same_in_either_api():
    assert (
        read(reasoning_effort="high") == read(reasoning={"effort": "high"}) == {names.REQUEST_REASONING_LEVEL: "high"}
    )


def test_numbers_have_the_conventions_types():
    told = read(temperature=1, top_p=1, top_k=40, seed=0)
    assert {name: type(value) for name, value in told.items()} == {
        names.REQUEST_TEMPERATURE: float,
        names.REQUEST_TOP_P: float,
        names.REQUEST_TOP_K: int,
        names.REQUEST_SEED: int,
    }


@pytest.mark.parametrize(
    "given",
    [
        {"n": 1}, {"seed": -1}, {"max_tokens": -1}, {"temperature": "hot"}, {"temperature": True}, {"stop": [1]},
        {"stop": []}, {"metadata": "x"}, {"metadata": {"user_key": "secret"}}, {"prompt": "text"},
        {"reasoning": "high"}, {"response_format": "json"}, {"response_format": {"type": ["json_object"]}},
        {"unknown": 1}, {"top_k": 1.5},
    ],
)  # fmt: skip
def test_what_is_not_asked_or_not_usable_is_left_out(given):
    assert read(**given) == {}


def test_only_the_conventions_names_are_taken_from_metadata_and_they_are_cut():
    told = read(metadata=dict.fromkeys(TOLD, "x" * 1000) | {names.CONVERSATION_COMPACTED: "false", "password": "x"})
    assert told == dict.fromkeys(TOLD, "x" * 256)


def test_no_parameters_are_none():
    assert read_parameters("") == read_parameters("{}") == {}
