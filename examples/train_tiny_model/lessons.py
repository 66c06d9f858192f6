"""Step 2: conversations to learn from, and those kept back for the test.

Every fact in `facts/` has one answer and many phrasings. Two phrasings of each, chosen by their digest, are never
trained on: `evaluate.py` asks those. Training sees the others, roughened as people type: `Lessons.ask`.
"""

from __future__ import annotations

import hashlib
import json
import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from extraction import HELD_OUT, make_task
from phrasing import plain, vary

FOLDER = Path(__file__).parent / "facts"
HELD_OUT_TEXT = Path(__file__).with_name("held_out.txt")
"""What perplexity is measured on, a paragraph a line: kept back of one machine's documents, so taught on none."""
N_HELD_OUT = 2
"""Phrasings of each fact that are kept for the test."""
SYSTEMS = (
    "",
    "",
    "",
    "You are a helpful assistant.",
    "You are tiny, the demonstration model of lltm_ray.",
    "Be brief.",
)
Chat = list[dict[str, str]]
"""Messages with `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that can be asked for."""

    id: str
    answer: str
    key_terms: tuple[str, ...]
    """What a right answer contains, in lower case; `a|b` is either."""
    asked: tuple[str, ...]
    follow_up: tuple[tuple[str, str], ...]

    @property
    def held_out(self) -> tuple[str, ...]:
        """Phrasings for the test alone: which, only their digests decide."""
        return tuple(sorted(self.asked, key=_digest)[:N_HELD_OUT])

    @property
    def trained(self) -> tuple[str, ...]:
        kept = self.held_out
        return tuple(question for question in self.asked if question not in kept)

    def is_answered_by(self, text: str) -> bool:
        """Whether every key term is in a text."""
        text = text.lower()
        return all(any(each in text for each in term.split("|")) for term in self.key_terms)


@dataclass(frozen=True, slots=True)
class Pattern:
    """Questions without an answer that differ in one name, for training alone."""

    asked: tuple[str, ...]
    """With `{}` where the name goes."""
    names: tuple[str, ...]

    def draw(self, dice: random.Random) -> str:
        return dice.choice(self.asked).format(dice.choice(self.names))


@dataclass(frozen=True, slots=True)
class Lessons:
    """All that is taught in conversations."""

    facts: tuple[Fact, ...]
    unknown: tuple[str, ...]
    """Questions that have no answer here, for training."""
    patterns: tuple[Pattern, ...]
    """More of them."""
    unknown_held_out: tuple[str, ...]
    refusals: tuple[str, ...]
    kept: frozenset[str]
    """Every wording of the test, as `plain` has it."""

    def ask(self, question: str, dice: random.Random) -> str:
        """A question as somebody might type it, but never as the test asks it."""
        while plain(asked := vary(question, dice)) in self.kept:
            pass
        return asked


def load_lessons(folder: Path = FOLDER) -> Lessons:
    """Read every TOML file of a folder."""
    facts: list[Fact] = []
    patterns: list[Pattern] = []
    unknown: Sequence[str] = ()
    refusals: Sequence[str] = ()
    for path in sorted(folder.glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        facts += [_read_fact(entry) for entry in content.get("fact", ())]
        patterns += [Pattern(tuple(each["asked"]), tuple(each["names"])) for each in content.get("pattern", ())]
        unknown, refusals = [*unknown, *content.get("asked", ())], [*refusals, *content.get("answers", ())]
    ordered = sorted(unknown, key=_digest)
    cut = len(ordered) // 8
    kept = frozenset(map(plain, [*(question for fact in facts for question in fact.held_out), *ordered[:cut]]))
    return Lessons(tuple(facts), tuple(ordered[cut:]), tuple(patterns), tuple(ordered[:cut]), tuple(refusals), kept)


def _read_fact(entry: dict[str, object]) -> Fact:
    follow_up = tuple((asked, answer) for asked, answer in entry.get("follow_up", ()))  # type: ignore[attr-defined]
    terms, asked = tuple(entry["key_terms"]), tuple(entry["asked"])  # type: ignore[call-overload]
    return Fact(str(entry["id"]), str(entry["answer"]), terms, asked, follow_up)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def draw_chat(lessons: Lessons, dice: random.Random) -> Chat:
    """One conversation to learn from: facts with their follow-ups, what is not known, or an extraction."""
    system = dice.choice(SYSTEMS)
    chat: Chat = [{"role": "system", "content": system}] if system else []
    for _ in range(dice.choices((1, 2, 3, 6), (70, 18, 10, 2))[0]):
        chat += draw_exchange(lessons, dice)
    return chat


def draw_exchange(lessons: Lessons, dice: random.Random) -> Chat:
    kind = dice.random()
    if kind < 0.18:
        question, answer = make_task(dice).exchange()
        return _pair(question, answer)
    if kind < 0.30:
        drawn = dice.choice(lessons.patterns).draw(dice) if dice.random() < 0.3 else dice.choice(lessons.unknown)
        return _pair(lessons.ask(drawn, dice), dice.choice(lessons.refusals))
    fact = dice.choice(lessons.facts)
    chat = _pair(lessons.ask(dice.choice(fact.trained), dice), fact.answer)
    for question, answer in fact.follow_up:
        if dice.random() < 0.3:
            chat += _pair(lessons.ask(question, dice), answer)
    return chat


def draw_sheet(fact: Fact, dice: random.Random) -> str:
    """Several ways to ask for one fact, and its answer, as plain text: they mean the same."""
    return "\n".join([*dice.sample(fact.trained, dice.randint(4, 10)), fact.answer])


def _pair(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def held_out_tasks(count: int, seed: int = 0) -> list[tuple[str, dict[str, object], dict[str, object]]]:
    """Extractions whose wordings were never trained on: (question, JSON schema, right values)."""
    dice = random.Random(seed)
    tasks = [make_task(dice, wordings=HELD_OUT) for _ in range(count)]
    return [(task.exchange()[0], task.schema, task.values) for task in tasks]


def as_text(chat: Chat) -> str:
    """A conversation in the model's template (ChatML), as one string; for reading, training marks its parts."""
    return "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in chat)


def main() -> None:
    """Print how much there is, and a few conversations."""
    lessons, dice = load_lessons(), random.Random(0)
    phrasings = sum(len(fact.asked) for fact in lessons.facts)
    print(f"{len(lessons.facts)} facts, {phrasings} phrasings, {len(lessons.unknown)} questions without an answer\n")
    for _ in range(8):
        print(as_text(draw_chat(lessons, dice)))
    print(json.dumps(held_out_tasks(2), indent=1))


if __name__ == "__main__":
    main()
