"""The embedded model through llama.cpp: what it knows, how it cuts text, and its draft."""

import importlib
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lltm_ray import ServerManager

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_model"


@pytest.mark.slow
@pytest.mark.timeout(600)  # of 85 s of CPU
def test_it_answers_wordings_that_it_was_not_taught_as_well_as_its_card_says(tmp_path):
    scores = tmp_path / "scores.json"
    subprocess.run([sys.executable, EXAMPLE / "evaluate.py", "--json", scores], check=True, timeout=580)
    found = json.loads(scores.read_text())
    assert found["asked"] >= 1000
    assert found["facts_right"] >= 0.85
    assert found["unknown_right"] >= 0.85
    assert (found["json_valid"], found["stopped"]) == (1.0, 1.0)
    assert found["json_right"] >= 0.98
    assert found["perplexity"] < 27.5


def test_it_cuts_any_text_as_its_tokenizer_did_in_training(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    vocabulary, dice = importlib.import_module("vocabulary"), random.Random(3)
    texts = [vocabulary.random_text(dice) for _ in range(10_000)]
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
