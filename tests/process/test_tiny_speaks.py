"""The embedded model through llama.cpp: what it knows, how it cuts text, and its draft."""

import importlib
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lltm_ray import ServerManager

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_model"
PARTS = {"facts": slice(3, None, 5), "unknown_held_out": slice(1, None, 3)}
"""Of what `evaluate.py` asks: the model gets 87.6 % and 87.1 % of these right; of all, which CI asks,
87.5 % and 87.6 %."""
TEXT = slice(16_000, 24_000)
"""Of the held-out text: its perplexity is 25.4, that of all 26.7."""


@pytest.fixture
def load_step(monkeypatch):
    """A module of the example by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module


def test_it_answers_wordings_that_it_was_not_taught_as_well_as_its_card_says(load_step, tmp_path, monkeypatch):
    evaluate, scores, text = load_step("evaluate"), tmp_path / "scores.json", tmp_path / "text"
    lessons = evaluate.load_lessons()
    part = replace(lessons, **{name: getattr(lessons, name)[each] for name, each in PARTS.items()})
    text.write_text(evaluate.HELD_OUT_TEXT.read_text(encoding="ascii")[TEXT], encoding="ascii")
    monkeypatch.setattr(evaluate, "load_lessons", lambda: part)
    monkeypatch.setattr(evaluate, "HELD_OUT_TEXT", text)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--tasks", "50", "--check", "--json", str(scores)])
    evaluate.main()
    found = json.loads(scores.read_text())
    assert found["asked"] == 210 + 70 + 50
    assert found["perplexity"] < 26.1


@pytest.mark.parametrize(
    ("changed", "low"),
    [
        ({}, []),
        ({"facts_right": 0.84, "stopped": 0.999}, ["facts_right", "stopped"]),
        ({"perplexity": 30.0}, ["perplexity"]),
    ],
)
def test_a_model_with_low_scores_is_not_fit_to_be_shipped(load_step, changed, low):
    evaluate = load_step("evaluate")
    good = {"asked": 1, "json_valid": 1.0, "json_right": 1.0, "stopped": 1.0, "perplexity": 20.0, "seconds": 1.0}
    scores = evaluate.Scores(**{"facts_right": 0.9, "unknown_right": 0.9, **good, **changed})
    assert evaluate.too_low(scores) == low


def test_it_cuts_any_text_as_its_tokenizer_did_in_training(load_step):
    vocabulary, dice = load_step("vocabulary"), random.Random(3)
    texts = ["".join(vocabulary.random_text(dice) for _ in range(10)) for _ in range(1_000)]
    wanted = [tuple(each.ids) for each in Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode_batch(texts)]
    with ServerManager() as manager, ThreadPoolExecutor(4) as pool:
        manager.start_server("tiny", n_parallel=1)
        found = [tuple(ids) for ids in pool.map(manager.client.tokenize, texts)]
    assert [text for text, ours, theirs in zip(texts, found, wanted, strict=True) if ours != theirs] == []


def test_its_draft_is_mostly_right_and_changes_no_answer():
    questions = ("What is a slot?", "How do I start a fleet?", "what does ttft mean", "Who are you?")
    answers, drafted, accepted = {}, 0, 0
    for draft in (None, "tiny-draft"):
        with ServerManager() as manager:
            manager.start_server("tiny", n_parallel=1, model_draft=draft)
            for question in questions:
                reply = manager.client.chat([{"role": "user", "content": question}], temperature=0.0, max_tokens=120)
                drafted, accepted = drafted + reply.timings.draft_n, accepted + reply.timings.draft_n_accepted
                answers.setdefault(question, set()).add(reply.text)
    assert [text for texts in answers.values() for text in texts if not text] == []
    assert [len(texts) for texts in answers.values()] == [1] * len(questions)
    assert accepted > 0.5 * drafted > 0


def test_it_keeps_to_a_conversation():
    talk = [{"role": "user", "content": "How do I start a fleet?"}]
    with ServerManager() as manager:
        manager.start_server("tiny", n_parallel=1)
        first = manager.client.chat(talk, temperature=0.0, max_tokens=120)
        talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "How do I stop it?"}]
        second = manager.client.chat(talk, temperature=0.0, max_tokens=120)
    assert "lltm-ray up" in first.text
    assert "drain" in second.text
    assert (first.finish_reason, second.finish_reason) == ("stop", "stop")
