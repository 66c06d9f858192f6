"""Step 7: what the model knows, asked through llama-server on the CPU; a few minutes on two cores.

    python evaluate.py                           # the model that the package ships
    python evaluate.py --model build/tiny-f32.gguf --json scores.json
    python evaluate.py --check                   # ends with 1 where a score is below `WANTED`

Facts and questions without an answer in wordings that were never trained on, extraction under a JSON schema, whether
every answer ends by itself, and the perplexity of held-out text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lessons import HELD_OUT_TEXT, held_out_tasks, load_lessons
from reference import Reference

from lltm_ray import ServerManager
from lltm_ray.config import read_environment
from lltm_ray.llamacpp.client import LlamaClient
from lltm_ray.models.resolve import resolve

MAX_TOKENS = 160
SLOTS = 4
THREADS = {"n_threads": 1, "n_threads_batch": 1}
"""More wait for one another in every layer of so small a model, and for ever so long where others want the cores."""
WANTED = {"facts_right": 0.85, "unknown_right": 0.85, "json_valid": 1.0, "json_right": 0.98, "stopped": 1.0}
"""The least share of each for a model to be shipped."""
MOST_PERPLEXITY = 27.5


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares are 0..1 of what was asked."""

    asked: int
    facts_right: float
    """Held-out phrasings whose answer has every key term of the fact."""
    unknown_right: float
    """Questions without an answer here, to which the model says so."""
    json_valid: float
    json_right: float
    stopped: float
    """Answers that ended by their stop token, of all `asked`."""
    perplexity: float
    """Of held-out text, by token."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and whether it ended by itself."""

    text: str
    stopped: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the name of a model, or the path of a GGUF file")
    parser.add_argument("--json", type=Path, help="write the scores here too")
    parser.add_argument("--tasks", type=int, default=150, help="how many extractions")
    parser.add_argument("--wrong", type=Path, help="write wrong answers here")
    parser.add_argument("--check", action="store_true", help="fail if a score is too low to be shipped")
    options = parser.parse_args()
    wrong: list[dict[str, Any]] = []
    scores = evaluate(options.model, wrong, n_tasks=options.tasks)
    for name, value in asdict(scores).items():
        print(f"{name:>16}  {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(asdict(scores), indent=1) + "\n", encoding="utf-8")
    if options.wrong:
        options.wrong.write_text(json.dumps(wrong, indent=1) + "\n", encoding="utf-8")
    if options.check and (low := too_low(scores)):
        raise SystemExit(f"not fit to be shipped: {', '.join(low)}")


def too_low(scores: Scores) -> list[str]:
    """Names of the scores that a model must not have."""
    low = [name for name, least in WANTED.items() if not getattr(scores, name) >= least]
    return low if scores.perplexity <= MOST_PERPLEXITY else [*low, "perplexity"]


def evaluate(model: str, wrong: list[dict[str, Any]], *, n_tasks: int) -> Scores:
    """Ask everything; wrong answers are added to `wrong`."""
    began = time.perf_counter()
    path = resolve(model, cache_dir=read_environment().cache_dir).path
    lessons = load_lessons()
    facts = [(fact, question) for fact in lessons.facts for question in fact.held_out]
    tasks = held_out_tasks(n_tasks)
    print(f"asking {path.name} {len(facts) + len(lessons.unknown_held_out) + n_tasks:,} questions ...", flush=True)
    with ServerManager() as manager, ThreadPoolExecutor(2 * SLOTS) as pool:
        manager.start_server(str(path), n_parallel=SLOTS, ctx_size=SLOTS * 1024, **THREADS)
        ask = asker(manager.client)
        told = list(pool.map(ask, [question for _, question in facts]))
        unknown = list(pool.map(ask, lessons.unknown_held_out))
        made = list(pool.map(lambda task: ask(task[0], task[1]), tasks))
        text = np.array(manager.client.tokenize(HELD_OUT_TEXT.read_text(encoding="ascii")), np.int64)
    right = [fact.is_answered_by(reply.text) for (fact, _), reply in zip(facts, told, strict=True)]
    parsed = [parse(reply.text) for reply in made]
    wrong += [
        {"id": fact.id, "asked": question, "answered": reply.text, "wanted": fact.answer}
        for (fact, question), reply, good in zip(facts, told, right, strict=True)
        if not good
    ]
    replies = [*told, *unknown, *made]
    return Scores(
        asked=len(replies),
        facts_right=mean(right),
        unknown_right=mean("don't know" in reply.text for reply in unknown),
        json_valid=mean(value is not None for value in parsed),
        json_right=mean(value == task[2] for value, task in zip(parsed, tasks, strict=True)),
        stopped=mean(reply.stopped for reply in replies),
        perplexity=Reference(path).perplexity(text),
        seconds=time.perf_counter() - began,
    )


def asker(client: LlamaClient) -> Callable[..., Reply]:
    """Greedy answers to single questions, under a JSON schema if one is given."""

    def ask(question: str, schema: dict[str, Any] | None = None) -> Reply:
        form = {} if schema is None else {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        messages = [{"role": "user", "content": question}]
        reply = client.chat(messages, max_tokens=MAX_TOKENS, temperature=0.0, **form)
        return Reply(reply.text, reply.finish_reason == "stop")

    return ask


def parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def mean(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    main()
