"""From an HTTP request to what routing needs to know of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from lltm_ray._sessions import SESSION_HEADER
from lltm_ray.errors import ConfigError
from lltm_ray.gateway.request import Request
from lltm_ray.routing.adapters import Lora, choose
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.prompt import prompt_key
from lltm_ray.routing.router import Router

DEADLINE_HEADER = b"x-lltm-deadline-ms"
"""Milliseconds from the request's arrival to the latest beginning of its answer."""
PRIORITY_HEADER = b"x-lltm-priority"
"""-10..10; higher is served first, 0 is everybody's."""
_SESSION_HEADERS = (b"x-session-id", b"x-conversation-id", SESSION_HEADER.encode("ascii"))
_SESSION_FIELDS = ("prompt_cache_key", "conversation", "session_id", "user")
_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict", "max_output_tokens")
_MOST_TOKENS = 2**31
"""JSON knows no largest number, but what is computed from one has to."""
_CANNOT_PIN = frozenset(("/v1/messages", "/responses", "/v1/responses"))
"""Routes where llama-server drops `id_slot`."""
_DROPS_LORA = "/v1/messages"
"""Where llama-server drops `lora`, too: it would go on from whatever adapter's cache has the longest match."""
_CHATS = "/v1/chat/completions"
_ANY = {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}


def build_ask(request: Request, router: Router, *, tenant: str, patience_s: float) -> Ask:
    """What the router is asked for.

    Args:
        request: with its body parsed.
        router: knows the LoRA adapters.
        tenant: who asks, as a label that is no secret.
        patience_s: how long after its arrival the answer must have begun; a client may only shorten it.

    Raises:
        ConfigError: a deadline or priority that is no number in its range, or adapters that cannot be had there.
        ModelNotFoundError: no such adapter.
    """
    fields = request.body_json if isinstance(request.body_json, dict) else {}
    headers = dict(reversed(request.headers))  # of several of one name the first one counts
    lora = _lora(request, router, fields)
    wait_ms = _number(headers, DEADLINE_HEADER, 1, math.inf)
    return Ask(
        model=request.model or "",
        key=prompt_key(request.path, fields, lora),
        max_tokens=_limit(fields),
        tenant=tenant,
        priority=int(_number(headers, PRIORITY_HEADER, -10, 10) or 0),
        deadline_s=request.arrived_at + (patience_s if wait_ms is None else min(patience_s, wait_ms / 1e3)),
        affinity=_affinity(headers, fields, tenant),
        adapter=lora[0][0] if lora else "",
        lora=lora,
        only=request.only,
        can_pin=request.path not in _CANNOT_PIN and "id_slot" not in fields,
    )


def _lora(request: Request, router: Router, fields: dict[str, Any]) -> Lora | None:
    model, raw, path = request.model or "", fields.get("lora"), request.path
    if not raw and ":" not in model and path != _DROPS_LORA:
        return None
    served = router.resolve(model, request.only)
    if path == _DROPS_LORA and router.adapters(served):
        raise ConfigError("model", model or served, f"has adapters, which {path} cannot choose; use {_CHATS}")
    lora = choose(model, raw, served, (each for each in router.engines(served) if request.only in (None, each.name)))
    if lora and not prompt_key(path, _ANY):
        raise ConfigError("model", model or served, f"adapters are for generating text, not for {path}")
    return lora


def _limit(fields: dict[str, Any]) -> int | None:
    for name in _LIMITS:
        value = fields.get(name)
        if type(value) is int and value >= 0:
            return min(value, _MOST_TOKENS)
    return None


def _affinity(headers: Mapping[bytes, bytes], fields: dict[str, Any], tenant: str) -> str:
    """The client's own name of its session, as a digest: it may be a person's."""
    for name in _SESSION_HEADERS:
        if value := headers.get(name):
            return _digest(value, tenant)
    for field in _SESSION_FIELDS:
        given = fields.get(field)
        if isinstance(given, dict):
            given = given.get("id")
        if isinstance(given, str) and given:
            return _digest(given.encode("utf-8", "surrogatepass"), tenant)
    return ""


def _digest(value: bytes, tenant: str) -> str:
    return blake2b(value, digest_size=8, key=tenant.encode("utf-8")[:64]).hexdigest()


def _number(headers: Mapping[bytes, bytes], name: bytes, low: float, high: float) -> float | None:
    raw = headers.get(name)
    if raw is None:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        shown = raw.decode("utf-8", "replace")
        wanted = f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(name.decode("ascii"), shown, f"must be a number {wanted}")
    return value
