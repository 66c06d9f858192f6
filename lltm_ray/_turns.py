"""What is said to a model: as messages, and which turns of a conversation still fit its context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lltm_ray.errors import ConfigError

Messages = list[dict[str, Any]]
_REMEDY = 'give a text, or a list of at least one message such as {"role": "user", "content": "hi"}'


def as_messages(given: str | Sequence[Mapping[str, Any]]) -> Messages:
    """A text as one message of the user; messages as they are.

    Raises:
        ConfigError: it is neither, or blank, or one of the messages is none.
    """
    if isinstance(given, str):
        if not given.strip():
            raise ConfigError("messages", given, f"is blank: {_REMEDY}")
        return [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ConfigError("messages", given, f"is of type {type(given).__name__}: {_REMEDY}")
    if not given:
        raise ConfigError("messages", given, f"is empty: {_REMEDY}")
    messages: Messages = []
    for index, message in enumerate(given):
        if not isinstance(message, Mapping):
            why = f'is of type {type(message).__name__}: give a mapping with "role" and "content"'
            raise ConfigError(f"messages[{index}]", message, why)
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ConfigError(f"messages[{index}].role", role, 'must be a name such as "user" or "assistant"')
        messages.append(dict(message))
    return messages


def check_text(name: str, text: Any) -> None:
    """Refuse what says nothing: a model answers that, too.

    Raises:
        ConfigError: it is no text, or blank.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(name, text, "must be a text that is not blank")


def with_system(system: str, messages: Messages) -> Messages:
    """The messages after the system prompt; an empty one is left out."""
    return [{"role": "system", "content": system}, *messages] if system else messages


def last_turns(
    messages: Messages, system: str, count: Callable[[Messages], int], *, limit_tokens: int, max_tokens: int
) -> Messages:
    """The system prompt and as many of the last turns as fit beside the answer; a turn begins with a user's message.

    Args:
        messages: the last one is the user's.
        system: the system prompt, never left out.
        count: tokens of messages as the model's template writes them.
        limit_tokens: longest request and answer together.
        max_tokens: longest answer.

    Raises:
        ConfigError: the system prompt, the last turn and `max_tokens` alone are longer than the limit.
    """
    room = limit_tokens - max_tokens
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
    low, high = 0, len(starts) - 1  # how many turns are left out
    while low < high:
        middle = (low + high) // 2
        fits = count(with_system(system, messages[starts[middle] :])) <= room
        low, high = (low, middle) if fits else (middle + 1, high)
    request = with_system(system, messages[starts[low] :])
    if low == len(starts) - 1 and (need := count(request)) > room:
        why = f"the message and its system prompt take {need} tokens, the limit leaves {room} beside the answer"
        raise ConfigError("max_tokens", max_tokens, f"{why}: shorten it, or raise limit_tokens or ctx_size")
    return request
