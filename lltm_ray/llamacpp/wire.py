"""llama-server's HTTP routes as data: each function builds a `Call` or `StreamCall` that a client sends. Pure.

Flow: `wire.tokenize(...)` -> `Call(method, path, query, body, parse)` -> a client sends it -> `replies` -> a record.
Parameters that are not named here go to the server as they are, except None, which is dropped. Of their names `options`
knows those that llama.cpp has; one that looks misspelt is refused, unless it stands in `extra_body={...}`, and so is a
value that means nothing, wherever it stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lltm_ray._turns import as_messages
from lltm_ray.errors import ConfigError, UpstreamError
from lltm_ray.llamacpp import replies
from lltm_ray.llamacpp.options import KNOWN, check_values, read_options
from lltm_ray.llamacpp.replies import Health, JsonObject, LoraAdapter, Reply, SlotAction
from lltm_ray.llamacpp.sse import Decoder
from lltm_ray.records import Embeddings, RerankHit, SlotState

T = TypeVar("T")
Prompt = str | Mapping[str, Any] | Sequence[int | str]
"""Text, `{"prompt_string", "multimodal_data"}`, or token ids that may be mixed with text."""
Chat = str | Sequence[Mapping[str, Any]]
"""Messages, mappings with `role` in OpenAI's form; or a text, which is one message of the user."""
_TOO_LONG = "exceed_context_size_error"
"""llama-server's own type of that error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCall:
    """A request that is answered by server-sent events."""

    path: str
    body: Any
    decode: Decoder
    method: str = "POST"
    query: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """A request with one whole answer; `parse` may raise KeyError, TypeError or ValueError, which `read` turns."""

    path: str
    parse: Callable[[Reply], T]
    method: str = "POST"
    body: Any = None
    query: Mapping[str, str] = field(default_factory=dict)
    accept: frozenset[int] = frozenset()
    """Statuses besides 2xx that are answers, not errors."""

    def read(self, reply: Reply) -> T:
        """Parse the answer.

        Raises:
            UpstreamError: an error status, or a body that is not what this route answers.
        """
        check_status(reply, self.accept)
        try:
            return self.parse(reply)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UpstreamError(reply.status, reply.text) from error


def check_status(reply: Reply, accept: frozenset[int] = frozenset()) -> None:
    """Raise `UpstreamError` with the body unchanged, unless the status is 2xx or accepted."""
    if not 200 <= reply.status < 300 and reply.status not in accept:
        raise refusal(reply)


def is_stream(status: int, content_type: str | None) -> bool:
    """Whether an answer's head begins a stream of events."""
    return 200 <= status < 300 and (content_type or "").startswith("text/event-stream")


def refusal(reply: Reply) -> UpstreamError:
    """The error for an answer that is none, its body unchanged; of a prompt that is too long it says what to do."""
    error = UpstreamError(reply.status, reply.text)
    if _TOO_LONG in reply.text:
        with suppress(ValueError, KeyError, TypeError):  # older servers tell no numbers
            told = reply.json()["error"]
            why = f"the prompt's {told['n_prompt_tokens']:,} tokens do not fit a slot's context of {told['n_ctx']:,}"
            remedy = "shorten it, raise n_ctx, or lower n_parallel"
            error.args = (f"llama-server answered {reply.status} ({_TOO_LONG}): {why}: {remedy}",)
    return error


def encode(body: Any) -> bytes | None:
    """The request body as JSON bytes.

    Raises:
        ConfigError: a value has no JSON form.
    """
    if body is None:
        return None
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError("params", body, f"cannot be written as JSON: {error}") from error


# --- generation ------------------------------------------------------------------------------------------------------


def chat(messages: Chat, **params: Any) -> StreamCall:
    """Chat, POST /v1/chat/completions.

    Args:
        messages: mappings with `role`, in OpenAI's form; or a text, which is one message of the user.
        params: any parameter of the route: `max_tokens`, `tools`, `logprobs`, `id_slot`, ...; `extra_body` is a mapping
            of further ones, whose names are not looked at.

    Raises:
        ConfigError: a wrong message or parameter, a value that means nothing, or a name that looks misspelt, before
            anything is sent.
    """
    return _openai("/v1/chat/completions", params, messages=as_messages(messages))


def completions(prompt: Prompt, **params: Any) -> StreamCall:
    """OpenAI's text completion, POST /v1/completions; arguments and errors as `complete`."""
    return _openai("/v1/completions", params, prompt=as_prompt(prompt))


def complete(prompt: Prompt, **params: Any) -> StreamCall:
    """llama.cpp's own completion, POST /completion.

    Args:
        prompt: text, token ids, or ids mixed with text (one prompt a call).
        params: `max_tokens` (sent as `n_predict`), `n_probs`, `return_tokens`, `cache_prompt`, `id_slot`, ...

    Raises:
        ConfigError: a wrong prompt or parameter, before anything is sent.
    """
    return _native("/completion", params, prompt=as_prompt(prompt))


def infill(input_prefix: str, input_suffix: str, **params: Any) -> StreamCall:
    """Fill in the middle, POST /infill; needs a model with infill tokens. `input_extra`, `prompt` and others pass."""
    return _native("/infill", params, input_prefix=input_prefix, input_suffix=input_suffix)


def responses(input: str | Sequence[Mapping[str, Any]], **params: Any) -> StreamCall:  # noqa: A002  OpenAI's word
    """OpenAI's Responses API, POST /v1/responses: `max_output_tokens`, `instructions`, `tools`, ..."""
    body = _given("/v1/responses", params, input=input, stream=True)
    return StreamCall(path="/v1/responses", body=body, decode=replies.read_responses_event)


def messages(messages: Chat, **params: Any) -> StreamCall:
    """Anthropic's Messages API, POST /v1/messages: `max_tokens`, `system`, `tools`, ..."""
    body = _given("/v1/messages", params, messages=as_messages(messages), stream=True)
    return StreamCall(path="/v1/messages", body=body, decode=replies.read_messages_event)


# --- vectors and tokens ----------------------------------------------------------------------------------------------


def embed(input: str | Sequence[Any], **params: Any) -> Call[Embeddings]:  # noqa: A002  OpenAI's word
    """Embeddings, POST /v1/embeddings; `encoding_format="base64"` is a third of the bytes, and decoded here."""
    body = _given("/v1/embeddings", params, input=input)
    return Call(path="/v1/embeddings", body=body, parse=replies.read_embeddings)


def rerank(
    query: str, documents: Sequence[str], top_n: int | None = None, **params: Any
) -> Call[tuple[RerankHit, ...]]:
    """Relevance of documents to a query, best first, POST /v1/rerank; the best `top_n`, or all."""
    body = _given("/v1/rerank", params, query=query, documents=list(documents), top_n=top_n)
    return Call(path="/v1/rerank", body=body, parse=replies.read_rerank)


def tokenize(
    text: str, *, add_special: bool = False, parse_special: bool = True, with_pieces: bool = False
) -> Call[tuple[Any, ...]]:
    """Tokens of a text, POST /tokenize: ids, or with `with_pieces` a `TokenPiece` each, the bytes beside the id."""
    body = {"content": text, "add_special": add_special, "parse_special": parse_special, "with_pieces": with_pieces}
    parse = replies.read_pieces if with_pieces else _read_ids
    return Call(path="/tokenize", body=body, parse=parse)


def _read_ids(reply: Reply) -> tuple[int, ...]:
    return tuple(reply.json()["tokens"])


def detokenize(tokens: Sequence[int]) -> Call[str]:
    """The text of token ids, POST /detokenize."""
    return Call(path="/detokenize", body={"tokens": list(tokens)}, parse=lambda reply: str(reply.json()["content"]))


def apply_template(messages: Chat, **params: Any) -> Call[str]:
    """The prompt that the model's chat template makes of messages, POST /apply-template."""
    body = _given("/apply-template", params, messages=as_messages(messages))
    return Call(path="/apply-template", body=body, parse=lambda reply: str(reply.json()["prompt"]))


# --- the server itself -----------------------------------------------------------------------------------------------


def health() -> Call[Health]:
    """GET /health."""
    return Call(method="GET", path="/health", parse=replies.read_health, accept=frozenset({503}))


def props() -> Call[JsonObject]:
    """The server's properties, GET /props: `model_path`, `total_slots`, `chat_template`, ..."""
    return Call(method="GET", path="/props", parse=replies.read_object)


def set_props(**props: Any) -> Call[None]:
    """Change properties, POST /props; the server must run with `--props`."""
    return Call(path="/props", body=_given("/props", props), parse=replies.read_success)


def metrics() -> Call[str]:
    """Prometheus text, GET /metrics. One reader a server: each read resets its rate gauges."""
    return Call(method="GET", path="/metrics", parse=lambda reply: reply.text)


def slots(*, fail_on_no_slot: bool = False) -> Call[tuple[SlotState, ...]]:
    """GET /slots; with `fail_on_no_slot` a server without an idle slot answers 503, raised as `UpstreamError`."""
    query = {"fail_on_no_slot": "1"} if fail_on_no_slot else {}
    return Call(method="GET", path="/slots", query=query, parse=replies.read_slots)


def slot_save(slot_id: int, filename: str) -> Call[SlotAction]:
    """Write a slot's KV cache to a file below the server's `--slot-save-path`."""
    return _slot_action(slot_id, "save", {"filename": filename})


def slot_restore(slot_id: int, filename: str) -> Call[SlotAction]:
    """Read a slot's KV cache from a file below the server's `--slot-save-path`."""
    return _slot_action(slot_id, "restore", {"filename": filename})


def slot_erase(slot_id: int) -> Call[SlotAction]:
    """Forget a slot's KV cache."""
    return _slot_action(slot_id, "erase", {})


def lora_adapters() -> Call[tuple[LoraAdapter, ...]]:
    """The adapters the server has loaded, GET /lora-adapters."""
    return Call(method="GET", path="/lora-adapters", parse=replies.read_adapters)


def set_lora_adapters(scales: Mapping[int, float]) -> Call[None]:
    """Set the scale of each adapter by id for all later requests, POST /lora-adapters; those left out get 0."""
    body = [{"id": adapter, "scale": scale} for adapter, scale in scales.items()]
    return Call(path="/lora-adapters", body=body, parse=replies.read_success)


def models() -> Call[tuple[JsonObject, ...]]:
    """The models the server knows, GET /v1/models, each as it describes it."""
    return Call(method="GET", path="/v1/models", parse=lambda reply: tuple(reply.json()["data"]))


def model_load(model: str, **params: Any) -> Call[None]:
    """Load a model, POST /models/load; servers in router mode only. Returns when loading has begun."""
    return Call(path="/models/load", body=_given("/models/load", params, model=model), parse=replies.read_success)


def model_unload(model: str, **params: Any) -> Call[None]:
    """Unload a model, POST /models/unload; servers in router mode only."""
    return Call(path="/models/unload", body=_given("/models/unload", params, model=model), parse=replies.read_success)


# --- request bodies --------------------------------------------------------------------------------------------------


def _given(path: str, params: Mapping[str, Any], **fixed: Any) -> JsonObject:
    """`fixed` over `params`, without what is None; values of params are looked at where the route is known."""
    fixed = {name: value for name, value in fixed.items() if value is not None}
    options = {name: value for name, value in read_options(path, params, own=fixed).items() if value is not None}
    if path in KNOWN:
        check_values(options)
    return options | fixed


def _openai(path: str, params: Mapping[str, Any], **fixed: Any) -> StreamCall:
    # usage comes only when asked for
    options = {**(params.get("stream_options") or {}), "include_usage": True}
    body = _given(path, params, **fixed, stream=True, stream_options=options)
    _check_one_choice(body)
    return StreamCall(path=path, body=body, decode=replies.read_openai_chunk)


def _native(path: str, params: Mapping[str, Any], **fixed: Any) -> StreamCall:
    body = _given(path, params, **fixed, stream=True)
    _check_one_choice(body)
    if "max_tokens" in body:
        limit = body.pop("max_tokens")
        if "n_predict" in body:
            raise ConfigError("max_tokens", limit, "means the same as n_predict; give one of them")
        body["n_predict"] = limit
    return StreamCall(path=path, body=body, decode=replies.read_native_chunk)


def _check_one_choice(params: Mapping[str, Any]) -> None:
    for name in ("n", "n_cmpl"):
        if params.get(name) not in (None, 1):
            raise ConfigError(name, params[name], "one answer a call; send the request again for another")


def _slot_action(slot_id: int, action: str, body: JsonObject) -> Call[SlotAction]:
    return Call(path=f"/slots/{slot_id}", query={"action": action}, body=body, parse=replies.read_slot_action)


def as_prompt(prompt: Any) -> Any:
    """One prompt as it is sent.

    Raises:
        ConfigError: it is none, or several.
    """
    if isinstance(prompt, Mapping) and not isinstance(prompt.get("prompt_string"), str):
        raise ConfigError("prompt", prompt, 'has no text "prompt_string"; messages are chatted, and stand in a list')
    if isinstance(prompt, str | Mapping):
        return prompt
    parts = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else []
    if not parts:
        raise ConfigError("prompt", prompt, "must be text, or a list of token ids that may be mixed with text")
    for index, part in enumerate(parts):
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise ConfigError(f"prompt[{index}]", part, "must be a token id or text; send one prompt a call")
    if len(parts) > 1 and all(isinstance(part, str) for part in parts):
        raise ConfigError("prompt", prompt, "a list of texts is many prompts to the server; send one prompt a call")
    return parts
