"""Options of requests: what each route of llama-server knows by name, and what may stand there; slips are not sent.

llama-server ignores what it does not know, and every release knows more. So a name that is nowhere near a known one is
passed on as it is, and so are those of another route or of another server, and whatever stands in `extra_body`, as with
OpenAI's client. It also moves many a value that means nothing to the nearest that does, or passes it over: those are
refused instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import inf
from typing import Any, Final

from lltm_ray.errors import ConfigError

EXTRA: Final = "extra_body"
"""The option whose members go into the request's body without a look at their names."""
NEARNESS: Final = 0.74
"""Similarity (`difflib`) from which one name is taken for another: two letters that changed places in a name of four
(0.75), but not vLLM's `length_penalty` for `repeat_penalty` (0.71)."""
TIMEOUT: Final = "timeout_s"
"""An argument of calls through Ray; of a client it is a setting, and of no route an option."""
_DEADLINE: Final = "deadline_s"
"""What people also call it; nobody would heed it."""

_GENERATION: Final = frozenset(
    {
        *("model", "lora", "id_slot", "cache_prompt", "n_cache_reuse", "stream", "stream_options", "return_tokens"),
        *("return_progress", "response_fields", "timings_per_token", "sse_ping_interval", "verbose", "metadata"),
        *("n_predict", "max_tokens", "max_completion_tokens", "n_indent", "n_keep", "n_discard", "n", "n_cmpl"),
        *("t_max_predict_ms", "t_max_prompt_ms", "stop", "ignore_eos", "logit_bias", "seed", "samplers", "echo"),
        *("n_probs", "logprobs", "post_sampling_probs", "min_keep", "backend_sampling"),
        *("temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p", "top_n_sigma", "typical_p"),
        *("xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta", "adaptive_target"),
        *("adaptive_decay", "repeat_last_n", "repeat_penalty", "frequency_penalty", "presence_penalty"),
        *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
        *("grammar", "grammar_lazy", "grammar_triggers", "grammar_type", "json_schema", "preserved_tokens"),
        *("chat_format", "chat_parser", "generation_prompt", "message_delimiters", "parse_tool_calls"),
        *("reasoning_format", "reasoning_control", "reasoning_budget_tokens", "reasoning_budget_message"),
        *("reasoning_in_content", "speculative.types"),
        *("reasoning_budget_start_tag", "reasoning_budget_end_tag", "reasoning_budget_end_tags"),
        *("thinking_budget_tokens", "continue_final_message", "user"),
    }
)
_TOOLS: Final = frozenset(
    {
        *("tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort", "top_logprobs"),
        *("chat_template_kwargs", "add_generation_prompt", "service_tier", "store", "moderation", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)
_CHAT: Final = (
    _GENERATION
    | _TOOLS
    | {
        *("messages", "audio", "modalities", "prediction", "verbosity", "web_search_options", "function_call"),
        "functions",
    }
)
_RESPONSES: Final = (
    _GENERATION
    | _TOOLS
    | {
        *("input", "instructions", "max_output_tokens", "max_tool_calls", "reasoning", "text", "truncation", "prompt"),
        *("previous_response_id", "conversation", "include", "background", "context_management", "image"),
        "access_programs",
    }
)
_MESSAGES: Final = frozenset(
    {
        *("model", "messages", "max_tokens", "system", "metadata", "stop_sequences", "stream", "temperature", "top_k"),
        *("top_p", "tools", "tool_choice", "thinking", "chat_template_kwargs", "service_tier", "container"),
        *("context_management", "mcp_servers", "output_config", "cache_control", "inference_geo"),
    }
)
KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "/v1/chat/completions": _CHAT,
    "/apply-template": _CHAT,
    "/completion": _GENERATION | {"prompt"},
    "/v1/completions": _GENERATION | {"prompt", "suffix", "best_of"},
    "/infill": _GENERATION | {"prompt", "input_prefix", "input_suffix", "input_extra"},
    "/v1/responses": _RESPONSES,
    "/v1/messages": _MESSAGES,
    "/v1/embeddings": frozenset(
        {"input", "content", "model", "encoding_format", "dimensions", "embd_normalize", "user"}
    ),
    "/v1/rerank": frozenset({"model", "query", "documents", "texts", "top_n", "return_text"}),
}
"""Fields of each route's body: llama.cpp's own (`tools/server`, b11434), and those of OpenAI's and Anthropic's clients
that it leaves alone."""
FOREIGN: Final = frozenset(
    {
        *("min_tokens", "repetition_penalty", "prompt_logprobs", "chat_template", "return_token_ids"),
        *("return_prompt_text", "return_token_offsets", "truncation_side", "normalize"),
        *("mirostat_target", "mirostat_lr", "prompt_cache_max_len", "prompt_cache_isolation_key"),
        *("dynatemp_high", "grammar_string", "mirostat_mode", "negative_prompt"),
        *("temperature_last", "truncation_length"),
        *("safe_prompt", "top_a", "models", "thinking_budget", "think", "images", "return_documents", "normalized"),
        *("speed", "logits"),
    }
)
"""Names that other servers' clients send and that look like slips here. By lines: vLLM's (`protocol.py` of its
OpenAI routes; some are SGLang's too), 2; Fireworks'; text-generation-webui's (`typing.py` of its API), 2; Mistral's,
OpenRouter's (2), DashScope's, Ollama's (2), Cohere's and Jina's, each in its API reference; Anthropic's (a beta), and
`logits`, which nobody means for `logit_bias`."""
FIXED: Final[Mapping[str, frozenset[str]]] = {
    "/v1/chat/completions": frozenset({"messages", "stream", "stream_options"}),
    "/apply-template": frozenset({"messages"}),
    "/completion": frozenset({"prompt", "stream"}),
    "/v1/completions": frozenset({"prompt", "stream", "stream_options"}),
    "/infill": frozenset({"input_prefix", "input_suffix", "stream"}),
    "/v1/responses": frozenset({"input", "stream"}),
    "/v1/messages": frozenset({"messages", "stream"}),
    "/v1/embeddings": frozenset({"input"}),
    "/v1/rerank": frozenset({"query", "documents"}),
}
"""Fields that each call sets itself, as `wire` does: `extra_body` cannot have them."""
_INT: Final = 2**31 - 1
_FLOAT: Final = 3.4e38
"""The largest that llama.cpp's samplers can hold, as `_INT`."""
VALUES: Final[Mapping[str, tuple[tuple[type, ...], float, float]]] = {
    name: values
    for values, names in (
        (((int,), -1, _INT), "max_tokens max_completion_tokens n_predict n_keep t_max_predict_ms id_slot top_k"),
        (((int,), -1, _INT), "repeat_last_n dry_penalty_last_n"),
        (((int,), 0, _INT), "n_indent n_discard n_cache_reuse n_probs top_logprobs min_keep dry_allowed_length"),
        (((int,), 1, _INT), "n n_cmpl"),
        (((int,), 0, 2), "mirostat"),
        (((int,), -(2**63), 2**63 - 1), "seed"),
        (((bool, int), 0, _INT), "logprobs"),
        (((float,), 0, 1), "top_p min_p xtc_probability xtc_threshold"),
        (((float,), 0, _FLOAT), "temperature repeat_penalty"),
        (((float,), -_FLOAT, _FLOAT), "frequency_penalty presence_penalty typical_p top_n_sigma dynatemp_range"),
        (((float,), -_FLOAT, _FLOAT), "dynatemp_exponent dry_multiplier dry_base mirostat_tau mirostat_eta"),
        (((float,), 0.001, inf), TIMEOUT),
        (((bool,), 0, 1), "ignore_eos cache_prompt stream echo return_tokens timings_per_token post_sampling_probs"),
        (((str,), 0, 0), "model grammar"),
        (((str, list, tuple), 0, 0), "stop samplers"),
        (((dict, list, tuple), 0, 0), "logit_bias"),
    )
    for name in names.split()
}
"""Well-known options -> their types, the lowest number and the highest: what llama.cpp takes as it is (its
`server-schema.cpp` and `sampling.cpp`, b11434) or OpenAI's reference has, and -1 where other builds have a use for it.
"""
_STREAMING: Final = frozenset({"stream", "stream_options"})
_PASSED: Final = FOREIGN.union(*KNOWN.values())


def read_options(path: str, given: Mapping[str, Any], own: Iterable[str] = ()) -> dict[str, Any]:
    """All options of a request by name, those in `extra_body` too; one that is None is left out.

    Args:
        path: the route; one that is not in `KNOWN` takes any names.
        given: the options.
        own: other arguments of the call, beside `FIXED`, which may have been meant by a name.

    Raises:
        ConfigError: an unknown name that is near to a known one: says which, and how to send it as it is; or
            `extra_body` is no mapping, or holds what is given beside it or set by the call.
    """
    own = FIXED.get(path, frozenset()).union(own)
    for name in sorted(given.keys() - _PASSED - own - {EXTRA}) if path in KNOWN else ():
        if why := _slip(path, own, name):
            raise ConfigError(name, given[name], f"{why} To send it as it is: {EXTRA}={{{name!r}: ...}}")
    options = {name: value for name, value in given.items() if name != EXTRA and value is not None}
    extra = {} if given.get(EXTRA) is None else given[EXTRA]
    if not isinstance(extra, Mapping):
        raise ConfigError(EXTRA, extra, "must be a mapping of names to values, such as {'new_option': 1}")
    for name, value in extra.items():
        if name in options or name in own:
            whose = "is set by the call itself" if name in own else "is given beside it"
            raise ConfigError(f"{EXTRA}[{name!r}]", value, f"{whose}: give it as an argument, or leave it out")
    return options | dict(extra)


def settle(path: str, given: Mapping[str, Any], own: Iterable[str] = ()) -> dict[str, Any]:
    """The same options for another `read_options`, where `extra_body` holds nothing but unknown names.

    Args and errors are those of `read_options`; and what the call sets itself cannot be given by name either, nor what
    `check_values` refuses, by name or in `extra_body`.
    """
    for name in sorted(given.keys() & (FIXED[path] - _STREAMING)):
        raise ConfigError(name, given[name], "is set by the call itself: leave it out")
    options = read_options(path, given, own)
    check_values(options)
    unknown = {name: options.pop(name) for name in given.get(EXTRA) or () if name not in KNOWN[path]}
    return options | ({EXTRA: unknown} if unknown else {})


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse by `check_value` each option that is not None."""
    for name, value in options.items():
        if value is not None:
            check_value(name, value)


def check_value(name: str, value: Any) -> None:
    """Refuse what has no meaning as the value of an option in `VALUES`; those of other names pass.

    Raises:
        ConfigError: it is of a wrong type, or outside of the limits.
    """
    types, low, high = VALUES.get(name, ((object,), 0, 0))
    if not any(_is(value, each) for each in types):
        raise ConfigError(name, value, f"must be {' or '.join(each.__name__ for each in types)}")
    if {int, float}.intersection(types) and not low <= value <= high:
        raise ConfigError(name, value, f"must be from {low} to {high}")


def _is(value: Any, kind: type) -> bool:
    """As llama.cpp reads JSON: 1 is a float, too, and 1.0 an int; True is none of them."""
    if kind not in (int, float):
        return isinstance(value, kind)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (kind is float or value == value // 1)


@lru_cache(maxsize=1024)
def _slip(path: str, own: frozenset[str], name: str) -> str:
    """What was meant by a name, by those that are most like it; empty: nothing is."""
    plain = name.lower().replace("-", "_")
    found = difflib.get_close_matches(plain, KNOWN[path] | own | {EXTRA, TIMEOUT, _DEADLINE}, 2, NEARNESS)
    near = list(dict.fromkeys(TIMEOUT if each == _DEADLINE else each for each in found))
    if near[:1] == [TIMEOUT] and TIMEOUT not in own:
        return f"is no option of a request, but of its client: LlamaClient(url, {TIMEOUT}=...)."
    meant = " or ".join(each for each in near if each != TIMEOUT or TIMEOUT in own)
    return f"{path} has no such option; did you mean {meant}?" if meant else ""
