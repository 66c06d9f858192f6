"""`Conversation`: messages that go on, as long as the model's context has room, and that can be put away in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lltm_ray._files import write_private
from lltm_ray._turns import check_text, last_turns, with_system
from lltm_ray.actors.calls import Messages
from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp.options import check_value
from lltm_ray.sdk.engine import InferenceEngine
from lltm_ray.sdk.result import InferResult, InferStream

_ROLES = ("user", "assistant", "tool")


class Conversation:
    """A chat with one model. What is said and answered is kept; a request that fails leaves no trace.

    When the whole would not fit, the oldest turns are left out of the request, never the system prompt or the last
    message. `messages` keeps them.

    Args:
        engine: who answers.
        system: the system prompt; empty for none.
        limit_tokens: longest request and answer together; None: one slot's context.
    """

    def __init__(self, engine: InferenceEngine, *, system: str = "", limit_tokens: int | None = None) -> None:
        self.engine = engine
        self.system = system
        self.messages: Messages = []
        """User's, assistant's and tools' messages in turn."""
        self._limit_tokens = limit_tokens

    def ask(self, text: str, *, max_tokens: int = 256, **params: Any) -> InferResult:
        """The answer to one more message; `params` as in `InferenceEngine.infer`.

        Raises:
            ConfigError: the system prompt, this message and `max_tokens` alone are longer than the limit; an empty
                message, or a misspelt or wrong parameter.
            FleetError: no model is loaded.
        """
        request = self._request(text, max_tokens)
        result = self.engine.infer(request, max_tokens=max_tokens, **params)
        self._keep(text, result)
        return result

    def ask_stream(
        self, text: str, callback: Callable[[str], None] | None = None, *, max_tokens: int = 256, **params: Any
    ) -> InferStream:
        """The same, piece by piece; what was read of an answer that is left early is kept as the answer."""
        request = self._request(text, max_tokens)
        stream = self.engine.infer_stream(request, callback, max_tokens=max_tokens, **params)
        stream.when_done(lambda result: self._keep(text, result))
        return stream

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages.clear()

    @property
    def tokens(self) -> int:
        """Tokens of all messages, as the model's chat template writes them."""
        return self.engine.count_tokens(self._with_system(self.messages)) if self._with_system(self.messages) else 0

    def _keep(self, text: str, result: InferResult) -> None:
        if result.success:
            self.messages.append({"role": "user", "content": text})
            self.messages.append({"role": "assistant", "content": result.text})

    def _with_system(self, messages: Messages) -> Messages:
        return with_system(self.system, messages)

    def _request(self, text: str, max_tokens: int) -> Messages:
        """As many of the last turns as fit, all while no limit is known."""
        check_text("text", text)
        check_value("max_tokens", max_tokens)
        messages: Messages = [*self.messages, {"role": "user", "content": text}]
        limit = self._limit_tokens or self.engine.slot_tokens
        if not limit:  # no engine is ready: what becomes of the request is not ours to say
            return self._with_system(messages)
        count = self.engine.count_tokens
        return last_turns(messages, self.system, count, limit_tokens=limit, max_tokens=max_tokens)

    # files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the system prompt and all messages as JSON, readable by nobody else; whole or not at all."""
        stored = {"system": self.system, "messages": self.messages}
        write_private(path, json.dumps(stored, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str], engine: InferenceEngine, **settings: Any) -> Conversation:
        """Go on with a conversation that was saved; `settings` as in the constructor.

        Raises:
            ConfigError: not such a file.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            system, messages = stored["system"], stored["messages"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError("path", os.fspath(path), f"is no saved conversation: {error}") from error
        if not (isinstance(system, str) and isinstance(messages, list) and all(map(_is_message, messages))):
            why = f"is no saved conversation: each message needs a content, a text, and a role of {', '.join(_ROLES)}"
            raise ConfigError("path", os.fspath(path), why)
        conversation = cls(engine, system=system, **settings)
        conversation.messages = messages
        return conversation


def _is_message(given: object) -> bool:
    return isinstance(given, dict) and given.get("role") in _ROLES and isinstance(given.get("content"), str)
