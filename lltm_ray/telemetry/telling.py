"""What of a request its rows may tell, whichever way it came: no prompt, no answer, and nothing of any length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from lltm_ray.errors import ConfigError, LltmRayError, UpstreamError
from lltm_ray.telemetry.logs import sendable
from lltm_ray.telemetry.parameters import FIELDS, METADATA, STORED_PROMPT

_SCHEMAS = frozenset(("response_format", "text", "json_schema"))
_SHAPES = ("text", "json_object", "json_schema")
_OBJECTS: Final = {"metadata": METADATA, "prompt": STORED_PROMPT}
"""Of these fields only the members that are read; the others are the client's own, and may be of any text."""
_NESTED = _SCHEMAS | _OBJECTS.keys()
_MOST_ERROR_CHARS, _MOST_PARAMETER_CHARS, _MOST_ENCODED = 1024, 4096, 1024
_ERROR_TYPES = frozenset(
    (
        *("invalid_request_error", "authentication_error", "server_error", "not_found_error", "permission_error"),
        *("unavailable_error", "not_supported_error", "exceed_context_size_error"),
    )
)
"""llama-server's own (`error_type` of tools/server)."""
_encode = json.JSONEncoder(separators=(",", ":"), default=lambda value: type(value).__name__).encode
_encoded: dict[str, str] = {}
"""Parameters, as Python writes them -> as JSON, of late requests: clients ask for the same again and again."""


def tell_error(error: BaseException) -> str:
    """An error's sentence without what it may quote of a prompt or an answer: a wrong value, a server's own words."""
    if isinstance(error, ConfigError):
        return f"{error.field}: {error.__dict__['why']}"
    if isinstance(error, UpstreamError):
        return f"llama-server answered {error.http_status}"
    return error.message if isinstance(error, LltmRayError) else type(error).__name__


def cut_error(text: str) -> str:
    """As much of an error's text as a row holds."""
    return sendable(text[:_MOST_ERROR_CHARS])


def known_type(told: object) -> str:
    """The `type` in an error of llama-server's if it is one of its own, else empty: anything else may be any text."""
    return told if isinstance(told, str) and told in _ERROR_TYPES else ""


def tell_parameters(fields: Mapping[str, Any]) -> str:
    """What a request asks for, as a JSON object of `FIELDS`; empty: nothing of these, or too much."""
    found = {name: value for name, value in fields.items() if name in FIELDS}
    if not _NESTED.isdisjoint(found):
        _read_nested(found)
    if not found:
        return ""
    key = repr(found)
    return _encoded.get(key) or _encode_anew(key, found)


def _read_nested(found: dict[str, Any]) -> None:
    """Leave of parameters that may be objects what is read of them."""
    if not isinstance(found.get("prompt", {}), dict):
        del found["prompt"]
    for name in found.keys() & _SCHEMAS:
        found[name] = _without_schema(found[name])
    for name in found.keys() & _OBJECTS.keys():
        found[name] = _read_only(found[name], _OBJECTS[name])


def _encode_anew(key: str, found: dict[str, Any]) -> str:
    text = _encode(found)
    if len(text) > _MOST_PARAMETER_CHARS:
        return ""
    if len(_encoded) >= _MOST_ENCODED:
        _encoded.clear()
    _encoded[key] = text
    return text


def _without_schema(shape: Any) -> Any:
    """What an answer shall look like, in a word: its schema may be long, and is the client's own."""
    if not isinstance(shape, dict):
        return bool(shape)
    inner = shape.get("format", shape)
    kind = inner.get("type") if isinstance(inner, dict) else None
    return {"type": kind if kind in _SHAPES else None}


def _read_only(given: Any, names: frozenset[str]) -> dict[str, Any]:
    return {name: given[name] for name in given if name in names} if isinstance(given, dict) else {}
