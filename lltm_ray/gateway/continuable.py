"""Which requests' streams another engine can go on with, and which of them come out the same. Pure rules."""

from __future__ import annotations

from typing import Any

_CHATS = frozenset(("/chat/completions", "/v1/chat/completions"))
_NATIVE = frozenset(("/completion", "/completions"))
LIMITS = ("n_predict", "max_completion_tokens", "max_tokens")
"""Names of a reply's limit, the strongest first."""
CONSTRAINTS = ("grammar", "json_schema", "tools", "functions", "grammar_lazy")
DETAILS = ("logprobs", "top_logprobs", "n_probs", "post_sampling_probs", "verbose", "response_fields")
_CLOCKED = ("n_indent", "t_max_predict_ms", "t_max_prompt_ms")
_REASONING = ("reasoning_budget_tokens", "thinking_budget_tokens", "reasoning_control")

_COUNTS = ("n", "n_cmpl", "best_of")
_WHYS = (
    (CONSTRAINTS, "constrains the reply, and its state died with the engine"),
    (DETAILS, "asks for details of each token that are not carried over"),
    (_CLOCKED, "ends the reply by what only the first engine knew"),
    (_REASONING, "steers reasoning, whose state died with the engine"),
)
_OBSTACLES = frozenset((*CONSTRAINTS, *DETAILS, *_CLOCKED, *_REASONING, *_COUNTS, "response_format", "echo"))
"""All that may be one: most requests have none of them, which is one look instead of twenty-five."""


def kind_of(path: str) -> str | None:
    """`chat`, `text` or `native`; None for a route whose streams cannot be continued."""
    if path in _CHATS:
        return "chat"
    return "text" if path == "/v1/completions" else "native" if path in _NATIVE else None


def limit_of(body: dict[str, Any]) -> Any:
    """The reply's most tokens as the request says; -1: it does not."""
    return next((body[name] for name in LIMITS if body.get(name) is not None), -1)


def asks_ids(kind: str | None, body: dict[str, Any]) -> bool:
    """Whether ids are cheap: a chat's only where top_k has cut the candidates before llama.cpp sorts them."""
    if kind != "chat":
        return kind is not None
    top_k = body.get("top_k", 40)
    return type(top_k) is int and 0 < top_k <= 1000 and not body.get("samplers") and not body.get("backend_sampling")


def ask_details(path: str, body: dict[str, Any], data: bytes, id_slot: int = -1) -> bytes:
    """The request's bytes with what a `StreamTap` needs, and the slot, added before the last brace: later keys win.

    Args:
        path: an eligible request's route.
        body: its parsed JSON.
        data: its bytes.
        id_slot: the slot to ask for; negative: llama.cpp's choice.
    """
    kind = kind_of(path)
    added = b',"id_slot":%d' % id_slot if id_slot >= 0 else b""
    if kind == "text":
        added += b',"verbose":true,"return_tokens":true'
    elif kind == "chat" and asks_ids(kind, body):
        added += b',"n_probs":1,"post_sampling_probs":true,"timings_per_token":true'
    end = data.rindex(b"}")
    return b"%b%b%b" % (data[:end], added, data[end:])


def is_eligible(path: str, body: Any) -> tuple[bool, str]:
    """Whether a request's stream can be continued elsewhere, else why not; most of all, one answer without constraints.

    Args:
        path: the request's route.
        body: its parsed JSON.
    """
    kind = kind_of(path)
    if kind is None or not isinstance(body, dict) or body.get("stream") is not True:
        return False, "only streams of chats and completions are continued"
    obstacle = "" if body.keys().isdisjoint(_OBSTACLES) else _obstacle(body)
    if obstacle:
        return False, obstacle
    if type(limit_of(body)) is not int:
        return False, f"its limit {limit_of(body)!r} is no whole number"
    return (True, "") if _is_plain_prompt(kind, body) else (False, "its prompt is not one text or one list of tokens")


def _obstacle(body: dict[str, Any]) -> str:
    """What in a request keeps its stream from being continued; empty: nothing."""
    for names, why in _WHYS:
        found = next((name for name in names if body.get(name)), None)
        if found:
            return f"`{found}` {why}"
    form = body.get("response_format")
    if form and not (isinstance(form, dict) and form.get("type", "text") == "text"):
        return "`response_format` constrains the reply, and its state died with the engine"
    if any(body.get(name) not in (None, 1) for name in _COUNTS) or body.get("echo"):
        return "it is not one plain answer"
    return ""


def _is_plain_prompt(kind: str, body: dict[str, Any]) -> bool:
    if kind != "chat":
        prompt = body.get("prompt")
        is_ids = isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
        return isinstance(prompt, str) or is_ids
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return all(isinstance(part, dict) and part.get("type") == "text" for part in parts)


def is_exact(body: dict[str, Any]) -> bool:
    """Whether the reply is the same on every engine: greedy, and free of state that is not carried over.

    Penalties and DRY are carried over: llama.cpp's sampler is fed the prompt's tokens as it is the reply's
    (`init_sampler` in server-context.cpp). Mirostat, XTC and the adaptive sampler are not.
    """
    stateful = ("mirostat", "xtc_probability", "dynatemp_range")
    if any(body.get(name) for name in stateful) or _number(body, "adaptive_target", -1.0) >= 0:
        return False
    samplers = body.get("samplers")
    names = samplers if isinstance(samplers, list) else ("temperature", "top_k") if samplers is None else ()
    by_temperature = "temperature" in names and _number(body, "temperature", 1.0) <= 0
    return by_temperature or ("top_k" in names and _number(body, "top_k", 0.0) == 1)


def _number(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default
