"""Whom a notebook asks: a fleet's gateway. `Answer` is what it said, with the figures of that one request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from lltm_ray._turns import Messages, as_messages, with_system
from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp import replies
from lltm_ray.llamacpp.client import LlamaClient
from lltm_ray.llamacpp.sse import Collector
from lltm_ray.llamacpp.wire import Call
from lltm_ray.records import Completion, StreamEvent

Prompt = str | Messages


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests go: a gateway, or a llama-server of one's own."""

    url: str
    api_key: str = field(default="", repr=False)
    model: str = ""
    """Served name; empty takes the first one."""

    @classmethod
    def of(cls, given: Any, *, api_key: str = "", model: str = "") -> Self:
        """The gateway of a `Cluster` or an `InferenceEngine`, or of a base URL.

        Raises:
            ConfigError: a fleet without a gateway.
            FleetError: an `InferenceEngine` without a model.
        """
        if isinstance(given, str):
            return cls(given, api_key, model)
        if hasattr(given, "served_name"):  # an InferenceEngine; its fleet is below it
            given, model = given.cluster, model or given.served_name
        url = given.endpoint
        if not url:
            raise ConfigError("cluster", given, "must be a fleet with a gateway, or a URL")
        return cls(url, api_key, model)

    def client(self) -> LlamaClient:
        """A client of its own for whoever asks; use it as a context manager."""
        return LlamaClient(self.url, api_key=self.api_key)

    def params(self, **given: Any) -> dict[str, Any]:
        """A request's parameters: those that were given, and the model's name where one is known."""
        chosen = {"model": self.model} if self.model else {}
        return chosen | {name: value for name, value in given.items() if value is not None}

    def count_tokens(self, client: LlamaClient, messages: Messages) -> int:
        """Tokens of chat messages as the model's template writes them; takes no slot."""
        prompt = client.apply_template(messages, **self.params())
        return len(self.tokenize(client, prompt, add_special=True))

    def tokenize(self, client: LlamaClient, text: str, *, add_special: bool) -> tuple[replies.TokenPiece, ...]:
        """Tokens of a text with their bytes; a text that holds a special token's name counts as that token."""
        body = self.params(content=text, add_special=add_special, with_pieces=True)
        return client.send(Call(path="/tokenize", body=body, parse=replies.read_pieces))

    def slot_tokens(self, client: LlamaClient) -> int:
        """KV tokens of one slot: the longest request and its answer together."""
        return client.send(Call(method="GET", path="/props", parse=self._read_slot_tokens))

    def _read_slot_tokens(self, reply: replies.Reply) -> int:
        told = reply.json()
        engines = told.get("engines") or [told]  # a gateway's, or llama-server's own
        own = [each for each in engines if each.get("model_alias") == self.model] or engines
        return min(int(each["default_generation_settings"]["n_ctx"]) for each in own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said. Times are seconds from sending the request, seen from here."""

    text: str
    ttft_s: float | None = None
    """To the first text."""
    tokens: int = 0
    """Tokens of the answer; of one that was stopped, events that came."""
    tokens_per_s: float = 0.0
    """Decode speed of this request alone; 0 where the server did not say it."""
    finish_reason: str | None = None
    """None: it was stopped."""
    engine: str = ""

    @property
    def figures(self) -> str:
        """One line for people."""
        said = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.ttft_s is not None:
            said.append(f"first after {self.ttft_s * 1e3:.0f} ms")
        if self.tokens_per_s:
            said.append(f"{self.tokens_per_s:.0f} tokens/s")
        if self.finish_reason != "stop":
            said.append("cut at max_tokens" if self.finish_reason == "length" else self.finish_reason or "stopped")
        return ", ".join(said)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Answer({self.text[:60]!r}{'...' if len(self.text) > 60 else ''}: {self.figures})"


def to_answer(done: Completion) -> Answer:
    """Of a completion."""
    return Answer(
        text=done.text,
        ttft_s=done.timings.ttft_s,
        tokens=done.usage.output_tokens,
        tokens_per_s=done.timings.predicted_per_second,
        finish_reason=done.finish_reason,
        engine=done.engine,
    )


class Collected:
    """An answer while it comes, so that one that is stopped has its figures too."""

    def __init__(self) -> None:
        self._events = Collector()
        self._ttft_s: float | None = None
        self._pieces = 0

    def add(self, event: StreamEvent, elapsed_s: float) -> None:
        """Take one event, so long after the request was sent."""
        self._events.add(event)
        if event.text:
            self._pieces += 1
            self._ttft_s = elapsed_s if self._ttft_s is None else self._ttft_s

    def answer(self) -> Answer:
        """As far as it came."""
        answer = to_answer(self._events.result())
        return replace(answer, ttft_s=self._ttft_s, tokens=answer.tokens or self._pieces)


def to_messages(prompt: Prompt, system: str = "") -> Messages:
    """A text as a chat of one message; messages as they are, after the system prompt."""
    return with_system(system, as_messages(prompt))
