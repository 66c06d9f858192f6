"""Roughen a question as people type: other openers, other words, case, typing errors, words left out."""

from __future__ import annotations

import random
import re

_OPENERS = (
    (
        r"(?i)^what is (an? |the )?",
        (
            "What's ",
            "Define ",
            "Explain ",
            "Tell me about ",
            "Describe ",
            "what exactly is ",
            "I want to know what is ",
        ),
    ),
    (r"(?i)^what are (the )?", ("Explain ", "Tell me about ", "Describe ", "What exactly are ")),
    (r"(?i)^(explain|describe|define) ", ("What is ", "Tell me about ", "Can you explain ", "Please explain ")),
    (
        r"(?i)^how (do|can) i ",
        (
            "How to ",
            "How would I ",
            "What is the way to ",
            "I want to ",
            "Show me how to ",
            "how should i ",
            "I need to ",
        ),
    ),
    (r"(?i)^how does ", ("In what way does ", "Explain how ", "Can you tell me how does ")),
    (r"(?i)^why (is|are|do|does) ", ("What is the reason that ", "How come ", "For what reason ")),
)
_SYNONYMS = tuple(
    line.split("/")
    for line in """\
start/launch/bring up/run
stop/shut down/end/halt
show/display/print
use/employ/work with
meaning/definition
difference/distinction
fast/quick
slow/sluggish
big/large
small/little
need/require
choose/pick/select
set/configure
change/alter
remove/delete
find/locate
happens/occurs
happen/occur
several/multiple/many
purpose/point/use
gpu/graphics card
install/set up
command/cli command
computer/machine
request/call
error/failure
measure/gauge
send/submit
keep/hold/retain
save/store
make/create
get/obtain
server/llama-server
quickly/fast
often/frequently
important/crucial""".splitlines()
)
_PREFIXES = """\
hi,
Hello!
please:
Quick question:
hey,
Sorry, but
So,
ok,
And
Can you tell me:
I wonder,
Q:
Tell me:""".splitlines()
_SUFFIXES = """\
please
thanks
in one sentence
(short answer)
Keep it short.
I am new to this.
exactly
then""".splitlines()


def plain(text: str) -> str:
    """Letters, digits and spaces alone, in lower case: by this, two wordings are the same."""
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()


def vary(question: str, dice: random.Random) -> str:
    """A question as somebody else might type it: other openers, words, case, typing errors, words left out."""
    if dice.random() < 0.25:
        return question
    for pattern, openers in _OPENERS:
        if dice.random() < 0.3 and re.match(pattern, question):
            question = re.sub(pattern, dice.choice(openers), question)
            break
    if dice.random() < 0.3:
        question = _swap_word(question, dice)
    if dice.random() < 0.35:
        question = _drop_words(question, dice)
    if dice.random() < 0.15:
        question = _mistype(question, dice)
    if dice.random() < 0.2:
        question = f"{dice.choice(_PREFIXES)} {question}"
    if dice.random() < 0.3:
        question = question.rstrip(".?!")
    if dice.random() < 0.1:
        question = f"{question} {dice.choice(_SUFFIXES)}"
    return question.lower() if dice.random() < 0.3 else question


def _swap_word(text: str, dice: random.Random) -> str:
    words = text.split(" ")
    for place in dice.sample(range(len(words)), len(words)):
        bare = words[place].strip(".?!,").lower()
        for group in _SYNONYMS:
            if bare in group:
                words[place] = words[place].lower().replace(bare, dice.choice(group))
                return " ".join(words)
    return text


def _drop_words(text: str, dice: random.Random) -> str:
    words = text.split(" ")
    if len(words) < 4:
        return text
    share = dice.choice((0.08, 0.15, 0.25))
    return " ".join(word for word in words if dice.random() > share) or text


def _mistype(text: str, dice: random.Random) -> str:
    places = [place for place in range(len(text) - 1) if text[place : place + 2].isalpha()]
    if not places:
        return text
    place = dice.choice(places)
    pair = text[place : place + 2]
    return text[:place] + dice.choice((pair[::-1], pair[0], pair[1], pair[0] + pair)) + text[place + 2 :]
