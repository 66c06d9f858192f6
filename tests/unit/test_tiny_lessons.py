"""What the embedded model is taught, and what is kept back for its test."""

import importlib
import json
import random
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_model"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module


def test_there_are_four_hundred_facts_in_a_dozen_wordings_each_and_their_answers_hold_their_key_terms(module):
    facts = module("lessons").load_lessons().facts
    assert len({fact.id for fact in facts}) == len(facts) >= 400
    assert min(len(fact.asked) for fact in facts) >= 12
    assert [fact.id for fact in facts if not fact.is_answered_by(fact.answer)] == []


def test_no_two_facts_share_a_wording(module):
    facts, plain = module("lessons").load_lessons().facts, module("phrasing").plain
    wordings = [plain(question) for fact in facts for question in fact.asked]
    assert len(set(wordings)) == len(wordings)


def test_what_is_asked_in_the_test_is_never_taught(module):
    lessons_of, phrasing = module("lessons"), module("phrasing")
    lessons, plain = lessons_of.load_lessons(), phrasing.plain
    kept = {plain(question) for fact in lessons.facts for question in fact.held_out}
    assert len(kept) == 2 * len(lessons.facts)
    assert not kept & {plain(question) for fact in lessons.facts for question in fact.trained}
    dice = random.Random(1)
    taught = [lessons_of.draw_chat(lessons, dice) for _ in range(3000)]
    asked = {plain(message["content"]) for chat in taught for message in chat if message["role"] == "user"}
    assert not asked & kept
    assert not asked & {plain(question) for question in lessons.unknown_held_out}
    assert lessons.kept == kept | {plain(question) for question in lessons.unknown_held_out}
    [ssh] = [fact for fact in lessons.facts if fact.id == "ssh"]  # roughening its wordings makes one of the test's
    rough = [(phrasing.vary(each, dice), lessons.ask(each, dice)) for each in ssh.trained for _ in range(300)]
    assert [sum(plain(question) in kept for question in questions) > 0 for questions in zip(*rough, strict=True)] == [
        True,
        False,
    ]
    assert {phrasing.vary("What is a slot?", dice) for _ in range(200)} > {"What is a slot?"}


def test_no_question_is_both_answered_and_declined(module):
    lessons, plain = module("lessons").load_lessons(), module("phrasing").plain
    answered = {plain(question) for fact in lessons.facts for question in fact.asked}
    answered |= {plain(question) for fact in lessons.facts for question, _ in fact.follow_up}
    drawn = [each.format(name) for pattern in lessons.patterns for each in pattern.asked for name in pattern.names]
    declined = [*lessons.unknown, *lessons.unknown_held_out, *drawn]
    assert [question for question in declined if plain(question) in answered] == []
    assert len(lessons.unknown_held_out) >= 200
    both = {plain(question) for question in drawn} & {plain(question) for question in lessons.unknown_held_out}
    assert (len(drawn), len(both)) == (2192, 2), "as README says"


def test_an_extractions_answer_fits_its_schema_and_its_test_has_wordings_of_its_own(module):
    extraction = module("extraction")
    dice = random.Random(2)
    for _ in range(500):
        task = extraction.make_task(dice)
        answer = json.loads(task.exchange()[1])
        kinds = {"string": str, "integer": int, "boolean": bool}
        assert list(answer) == task.schema["required"]
        for name, value in answer.items():
            assert type(value) is kinds[task.schema["properties"][name]["type"]]
    for kind in extraction.KINDS:
        assert not {*kind.wordings[extraction.TRAINED]} & {*kind.wordings[extraction.HELD_OUT]}
        assert len(set(kind.wordings)) == len(kind.wordings)
