"""What a request asked for, in the conventions' words: OpenAI's, Anthropic's and llama-server's own fields alike.

A field of the wrong type is left out: the request was the client's, and llama-server has told it so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

from lltm_ray.telemetry import semconv as names

_MAX_CHARS = 256

Value = str | int | float | bool | list[str]


def _double(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    """-1 is llama-server's "no limit", which is none."""
    return value if _int(value) is not None and value > 0 else None


def _seed(value: Any) -> int | None:
    """-1 is llama-server's "any"."""
    return _int(value) if value != -1 else None


def _choices(value: Any) -> int | None:
    return _count(value) if value != 1 else None


def _text(value: Any) -> str | None:
    return value[:_MAX_CHARS] if isinstance(value, str) and value else None


def _texts(value: Any) -> list[str] | None:
    given = [value] if isinstance(value, str) else value
    return given if isinstance(given, list) and given and all(isinstance(each, str) for each in given) else None


def _format(value: Any) -> str | None:
    """`response_format`; `text` of /v1/responses has it one level deeper."""
    inner = value.get("format", value) if isinstance(value, dict) else None
    kind = inner.get("type") if isinstance(inner, dict) else None
    return "json" if kind in ("json_object", "json_schema") else "text" if kind == "text" else None


def _json(value: Any) -> str | None:
    return "json" if value else None


def _effort(value: Any) -> str | None:
    return _text(value.get("effort")) if isinstance(value, dict) else None


_Read = Callable[[Any], Value | None]
_READ: Final[dict[str, tuple[str, _Read]]] = {
    "temperature": (names.REQUEST_TEMPERATURE, _double),
    "top_p": (names.REQUEST_TOP_P, _double),
    "top_k": (names.REQUEST_TOP_K, _int),
    "frequency_penalty": (names.REQUEST_FREQUENCY_PENALTY, _double),
    "presence_penalty": (names.REQUEST_PRESENCE_PENALTY, _double),
    "max_tokens": (names.REQUEST_MAX_TOKENS, _count),
    "max_completion_tokens": (names.REQUEST_MAX_TOKENS, _count),
    "max_output_tokens": (names.REQUEST_MAX_TOKENS, _count),
    "n_predict": (names.REQUEST_MAX_TOKENS, _count),
    "n": (names.REQUEST_CHOICE_COUNT, _choices),
    "seed": (names.REQUEST_SEED, _seed),
    "stop": (names.REQUEST_STOP_SEQUENCES, _texts),
    "stop_sequences": (names.REQUEST_STOP_SEQUENCES, _texts),
    "reasoning_effort": (names.REQUEST_REASONING_LEVEL, _text),
    "reasoning": (names.REQUEST_REASONING_LEVEL, _effort),
    "previous_response_id": (names.REQUEST_PREVIOUS_RESPONSE_ID, _text),
    "response_format": (names.OUTPUT_TYPE, _format),
    "text": (names.OUTPUT_TYPE, _format),
    "json_schema": (names.OUTPUT_TYPE, _json),
    "encoding_format": (names.REQUEST_ENCODING_FORMATS, _texts),
    "dimensions": (names.EMBEDDINGS_DIMENSION_COUNT, _count),
}
TOLD: Final = (
    *(names.AGENT_ID, names.AGENT_NAME, names.AGENT_DESCRIPTION, names.AGENT_VERSION),
    *(names.PROMPT_NAME, names.PROMPT_VERSION, names.WORKFLOW_NAME),
)
"""What only the client can know; it tells them in the request's `metadata`, under these very names."""
METADATA: Final = frozenset((*TOLD, names.CONVERSATION_COMPACTED))
"""Members of `metadata` that are read."""
STORED_PROMPT: Final = frozenset(("id", "version"))
"""Members of a `prompt` that is an object; its `variables` are the prompt's own words."""
FIELDS: Final = frozenset((*_READ, "metadata", "prompt"))
"""Fields of a request that are read here; of `prompt` only an object, which is a stored prompt's name and version."""


def _metadata(given: Any) -> Iterator[tuple[str, Value]]:
    if not isinstance(given, dict):
        return
    for name in TOLD:
        if value := _text(given.get(name)):
            yield name, value
    if str(given.get(names.CONVERSATION_COMPACTED)).lower() == "true":
        yield names.CONVERSATION_COMPACTED, True


def _stored_prompt(given: Any) -> Iterator[tuple[str, Value]]:
    if isinstance(given, dict):
        for name, key in ((names.PROMPT_NAME, "id"), (names.PROMPT_VERSION, "version")):
            if value := _text(given.get(key)):
                yield name, value


@lru_cache(maxsize=1024)
def read_parameters(text: str) -> dict[str, Value]:
    """A request's parameters as attributes. The same dict for the same text: not to be changed.

    Args:
        text: JSON object of the request's fields in `FIELDS`; others are not looked at. Empty: none.
    """
    given = json.loads(text) if text else {}
    found: dict[str, Value] = {}
    for key, value in given.items():
        if key in _READ:
            attribute, read = _READ[key]
            if (one := read(value)) is not None:
                found[attribute] = one
    found.update(_stored_prompt(given.get("prompt")))
    found.update(_metadata(given.get("metadata")))
    return found
