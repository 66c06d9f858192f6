"""`stream_generate`: an answer that grows in its cell while the model writes it."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from typing import Any

from lltm_ray._optional import load
from lltm_ray.errors import MissingExtraError
from lltm_ray.integrations.notebook._html import paragraph
from lltm_ray.integrations.notebook._source import Answer, Collected, Prompt, Source, to_messages

UPDATES_PER_S = 20.0


def stream_generate(
    cluster: Any, prompt: Prompt, *, api_key: str = "", system: str = "", max_tokens: int = 256, **params: Any
) -> Answer:
    """Show an answer as it comes, with its time to first token and tokens per second; stop it by interrupting the cell.

    In a notebook the cell's output is brought up to date, elsewhere the text goes to standard output.

    Args:
        cluster: a `Cluster`, an `InferenceEngine`, or a gateway's base URL.
        prompt: a text, or a list of chat messages; the model's chat template is applied.
        api_key: of the gateway.
        system: the system prompt.
        max_tokens: longest answer.
        params: others of /v1/chat/completions: `temperature`, `seed`, `model`, ...

    Raises:
        ConfigError: a fleet without a gateway, or a wrong parameter.
        LltmRayError: the gateway's error, or none reached; what came until then stays shown.
    """
    source = Source.of(cluster, api_key=api_key, model=params.pop("model", ""))
    asked = source.params(max_tokens=max_tokens, **params)
    collected, began_s, shown, note = Collected(), time.perf_counter(), live_text(), "broken off"
    try:
        with source.client() as client, closing(client.chat_stream(to_messages(prompt, system), **asked)) as events:
            for event in events:
                collected.add(event, time.perf_counter() - began_s)
                shown.add(event.text)
        note = collected.answer().figures
    finally:
        shown.end(note)
    return collected.answer()


class Printed:
    """Text on standard output."""

    def add(self, text: str) -> None:
        """A piece of it."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self, note: str) -> None:
        """What is to be known of it."""
        sys.stdout.write(f"\n[{note}]\n")


class Displayed:
    """Text in a cell; updated `UPDATES_PER_S` times a second at most, so that a fast model does not flood the page.

    Args:
        display: IPython's.
    """

    def __init__(self, display: Any) -> None:
        self._texts: list[str] = []
        self._handle = display(self._bundle(""), raw=True, display_id=True)
        self._next_s = 0.0

    def add(self, text: str) -> None:
        """A piece of it."""
        self._texts.append(text)
        if (now_s := time.monotonic()) >= self._next_s:
            self._handle.update(self._bundle(""), raw=True)
            self._next_s = now_s + 1 / UPDATES_PER_S

    def end(self, note: str) -> None:
        """What is to be known of it."""
        self._handle.update(self._bundle(note), raw=True)

    def _bundle(self, note: str) -> dict[str, str]:
        text = "".join(self._texts)
        return {"text/plain": f"{text}\n[{note}]" if note else text, "text/html": paragraph(text, note)}


def live_text() -> Printed | Displayed:
    """Where a text that is being written is shown: the running cell of a notebook, or standard output."""
    try:
        shell = load("IPython:get_ipython", extra="jupyter", feature="answers in a cell")()
        display = load("IPython.display:display", extra="jupyter", feature="answers in a cell")
    except MissingExtraError:
        return Printed()
    return Displayed(display) if hasattr(shell, "kernel") else Printed()
