"""What llama-server answers, read into records. Pure: one JSON value in, one record out.

`wire` names the route, this file reads its answer; `sse` joins streamed parts. Fields we do not know are ignored; a
field we need and do not find raises KeyError, TypeError or ValueError, which `Call.read` turns into `UpstreamError`.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from lltm_ray.errors import UpstreamError
from lltm_ray.records import (
    Embeddings,
    FinishReason,
    RerankHit,
    SlotState,
    StreamEvent,
    TokenLogprob,
    ToolCall,
    Usage,
    timings_from,
)

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        """The body as text; bytes that are not UTF-8 become U+FFFD."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON; ValueError when it is not."""
        return json.loads(self.body)


class HealthStatus(StrEnum):
    """What `/health` says."""

    OK = "ok"
    LOADING = "loading"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether the server can work, with the HTTP status that said so (200, or 503 while it loads the model)."""

    status: HealthStatus
    http_status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotAction:
    """What saving, restoring or erasing a slot did: tokens and bytes moved, milliseconds taken by the server."""

    slot_id: int
    tokens: int
    filename: str = ""
    size_bytes: int = 0
    elapsed_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """An adapter the server has loaded; `scale` 0 is off."""

    id: int
    path: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPiece:
    """A token id and the bytes it stands for; they need not be UTF-8 by themselves."""

    id: int
    piece: bytes


# --- streamed parts --------------------------------------------------------------------------------------------------

_STOP_TYPES = {"limit": FinishReason.LENGTH, "eos": FinishReason.STOP, "word": FinishReason.STOP}


def read_openai_chunk(raw: JsonObject) -> tuple[StreamEvent, bool]:
    """One chunk of /v1/chat/completions or /v1/completions; the stream ends with `[DONE]`, never with a chunk."""
    choice: JsonObject = next(iter(raw.get("choices") or ()), {})
    delta: JsonObject = choice.get("delta") or {}
    event = StreamEvent(
        text=delta.get("content") or choice.get("text") or "",
        reasoning=delta.get("reasoning_content") or "",
        tool_calls=tuple(read_tool_call(call) for call in delta.get("tool_calls") or ()),
        logprobs=read_logprobs((choice.get("logprobs") or {}).get("content")),
        finish_reason=_finish(choice.get("finish_reason")),
        usage=read_openai_usage(raw["usage"]) if raw.get("usage") else None,
        timings=timings_from(raw["timings"]) if raw.get("timings") else None,
        model=raw.get("model") or "",
        id=raw.get("id") or "",
        slot_id=_slot(raw),
    )
    return event, False


def read_native_chunk(raw: JsonObject) -> tuple[StreamEvent, bool]:
    """One chunk of /completion or /infill; the one with `stop` true ends the stream."""
    done = bool(raw.get("stop"))
    # a progress chunk (`return_progress`) carries a placeholder token that was never generated
    tokens = () if "prompt_progress" in raw else tuple(raw.get("tokens") or ())
    event = StreamEvent(
        text=raw.get("content") or "",
        tokens=tokens,
        logprobs=read_logprobs(raw.get("completion_probabilities")),
        timings=timings_from(raw["timings"]) if raw.get("timings") else None,
        model=raw.get("model") or "",
        slot_id=_slot(raw),
    )
    if done:
        stop_type = _STOP_TYPES.get(raw.get("stop_type") or "", FinishReason.STOP)
        event = replace(event, finish_reason=stop_type, usage=_native_usage(raw))
    return event, done


def _finish(reason: str | None) -> str | None:
    return FinishReason(reason) if reason in {known.value for known in FinishReason} else reason


def _slot(raw: JsonObject) -> int | None:
    slot = raw.get("id_slot")
    return slot if isinstance(slot, int) and slot >= 0 else None


def _native_usage(raw: JsonObject) -> Usage:
    return Usage(
        input_tokens=raw.get("tokens_evaluated") or 0,
        output_tokens=raw.get("tokens_predicted") or 0,
        cached_tokens=(raw.get("timings") or {}).get("cache_n") or 0,
    )


def read_tool_call(raw: JsonObject) -> ToolCall:
    """A tool call or a streamed part of one, in OpenAI's chat form."""
    function = raw.get("function") or {}
    return ToolCall(
        name=function.get("name") or "",
        arguments=function.get("arguments") or "",
        id=raw.get("id") or "",
        index=raw.get("index") or 0,
    )


def read_logprobs(raw: Sequence[JsonObject] | None) -> tuple[TokenLogprob, ...]:
    """OpenAI's `logprobs.content` or llama.cpp's `completion_probabilities`: natural logarithms.

    With `post_sampling_probs` llama.cpp sends `prob` instead, which is turned into its logarithm (-inf for 0).
    """
    return tuple(_logprob(entry) for entry in raw or ())


def _logprob(raw: JsonObject) -> TokenLogprob:
    return TokenLogprob(
        token=raw["token"],
        logprob=_log(raw["prob"]) if "prob" in raw else float(raw["logprob"]),
        id=raw.get("id"),
        bytes=tuple(raw.get("bytes") or ()),
        top=read_logprobs(raw.get("top_logprobs") or raw.get("top_probs")),
    )


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


def read_openai_usage(raw: Mapping[str, Any]) -> Usage:
    """Usage as OpenAI's routes report it: chat says `prompt_tokens`, Responses says `input_tokens`."""
    details = raw.get("prompt_tokens_details") or raw.get("input_tokens_details") or {}
    return Usage(
        input_tokens=raw.get("prompt_tokens") or raw.get("input_tokens") or 0,
        output_tokens=raw.get("completion_tokens") or raw.get("output_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
    )


# --- streamed parts of foreign APIs ----------------------------------------------------------------------------------


def read_responses_event(raw: JsonObject) -> tuple[StreamEvent, bool]:
    """One event of /v1/responses. Tool calls come whole with the last event: their deltas carry no index.

    llama.cpp calls an answer cut off at `max_output_tokens` completed, so its finish reason is `stop` here.
    """
    kind = raw["type"]
    if kind == "response.output_text.delta":
        return StreamEvent(text=raw["delta"]), False
    if kind == "response.reasoning_text.delta":
        return StreamEvent(reasoning=raw["delta"]), False
    if kind in ("response.completed", "response.incomplete"):
        return _response_end(raw), True
    return StreamEvent(), False


def _response_end(raw: JsonObject) -> StreamEvent:
    response = raw["response"]
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    ended = FinishReason.LENGTH if raw["type"] == "response.incomplete" else FinishReason.STOP
    return StreamEvent(
        tool_calls=tuple(
            ToolCall(name=call["name"], arguments=call["arguments"], id=call.get("call_id") or "", index=index)
            for index, call in enumerate(calls)
        ),
        finish_reason=FinishReason.TOOL_CALLS if calls else ended,
        usage=read_openai_usage(response["usage"]) if response.get("usage") else None,
        timings=timings_from(raw["timings"]) if raw.get("timings") else None,
        model=response.get("model") or "",
        id=response.get("id") or "",
    )


_ANTHROPIC_STOPS = {"max_tokens": FinishReason.LENGTH, "tool_use": FinishReason.TOOL_CALLS}


def read_messages_event(raw: JsonObject) -> tuple[StreamEvent, bool]:
    """One event of /v1/messages; a tool call's `index` is that of its content block."""
    kind = raw["type"]
    if kind == "message_start":
        message = raw["message"]
        event = StreamEvent(model=message["model"], id=message["id"], usage=_anthropic_usage(message["usage"]))
        return event, False
    if kind == "content_block_start" and raw["content_block"]["type"] == "tool_use":
        block = raw["content_block"]
        call = ToolCall(name=block["name"], arguments="", id=block["id"], index=raw["index"])
        return StreamEvent(tool_calls=(call,)), False
    if kind == "content_block_delta":
        return _anthropic_delta(raw["delta"], raw["index"]), False
    if kind == "message_delta":
        finish = _ANTHROPIC_STOPS.get(raw["delta"]["stop_reason"], FinishReason.STOP)
        return StreamEvent(finish_reason=finish, usage=_anthropic_usage(raw.get("usage") or {})), False
    return StreamEvent(), kind == "message_stop"


def _anthropic_delta(delta: JsonObject, index: int) -> StreamEvent:
    if delta["type"] == "text_delta":
        return StreamEvent(text=delta["text"])
    if delta["type"] == "thinking_delta":
        return StreamEvent(reasoning=delta["thinking"])
    if delta["type"] == "input_json_delta":
        return StreamEvent(tool_calls=(ToolCall(name="", arguments=delta["partial_json"], index=index),))
    return StreamEvent()


def _anthropic_usage(raw: JsonObject) -> Usage:
    """Anthropic's `input_tokens` leaves cached ones out, ours has them in."""
    cached = raw.get("cache_read_input_tokens") or 0
    return Usage(
        input_tokens=cached + (raw.get("input_tokens") or 0),
        output_tokens=raw.get("output_tokens") or 0,
        cached_tokens=cached,
    )


# --- vectors and tokens ----------------------------------------------------------------------------------------------


def read_embeddings(reply: Reply) -> Embeddings:
    """The answer of /v1/embeddings; base64 holds little-endian float32."""
    raw = reply.json()
    ordered = sorted(raw["data"], key=lambda item: int(item["index"]))
    return Embeddings(
        vectors=tuple(_vector(item["embedding"]) for item in ordered),
        usage=read_openai_usage(raw.get("usage") or {}),
        model=raw.get("model") or "",
    )


def _vector(raw: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(raw, str):
        data = base64.b64decode(raw, validate=True)
        if len(data) % 4:
            raise ValueError(f"{len(data)} bytes are no float32 vector")
        return struct.unpack(f"<{len(data) // 4}f", data)
    return tuple(float(value) for value in raw)


def read_rerank(reply: Reply) -> tuple[RerankHit, ...]:
    """The answer of /v1/rerank, best first."""
    hits = [RerankHit(index=hit["index"], score=float(hit["relevance_score"])) for hit in reply.json()["results"]]
    return tuple(sorted(hits, key=lambda hit: -hit.score))


def read_pieces(reply: Reply) -> tuple[TokenPiece, ...]:
    """The answer of /tokenize `with_pieces`; a piece that is not UTF-8 comes as a list of byte values."""
    pieces = reply.json()["tokens"]
    return tuple(
        TokenPiece(id=raw["id"], piece=raw["piece"].encode() if isinstance(raw["piece"], str) else bytes(raw["piece"]))
        for raw in pieces
    )


# --- the server itself -----------------------------------------------------------------------------------------------


def read_object(reply: Reply) -> JsonObject:
    """Any JSON object."""
    raw = reply.json()
    if not isinstance(raw, dict):
        raise TypeError("not a JSON object")
    return raw


def read_success(reply: Reply) -> None:
    """`{"success": true}`; anything else is an `UpstreamError`."""
    if reply.json().get("success") is not True:
        raise UpstreamError(reply.status, reply.text)


def read_health(reply: Reply) -> Health:
    """200 is ok, 503 is loading."""
    status = HealthStatus.OK if reply.status == 200 else HealthStatus.LOADING
    return Health(status=status, http_status=reply.status)


def read_slots(reply: Reply) -> tuple[SlotState, ...]:
    """The answer of /slots."""
    return tuple(_slot_state(raw) for raw in reply.json())


def _slot_state(raw: JsonObject) -> SlotState:
    following = raw.get("next_token") or {}
    if isinstance(following, list):  # one entry since speculative drafts; a plain object before
        following = following[0]
    return SlotState(
        id=raw["id"],
        is_processing=raw["is_processing"],
        n_ctx=raw["n_ctx"],
        task_id=raw.get("id_task"),
        prompt_tokens=raw.get("n_prompt_tokens") or 0,
        decoded_tokens=following.get("n_decoded") or 0,
    )


def read_slot_action(reply: Reply) -> SlotAction:
    """The answer of POST /slots/{id}?action=save|restore|erase."""
    raw = reply.json()
    timings = raw.get("timings") or {}
    return SlotAction(
        slot_id=raw["id_slot"],
        tokens=_first(raw, "n_saved", "n_restored", "n_erased"),
        filename=raw.get("filename") or "",
        size_bytes=_first(raw, "n_written", "n_read"),
        elapsed_ms=float(_first(timings, "save_ms", "restore_ms")),
    )


def _first(raw: JsonObject, *names: str) -> Any:
    return next((raw[name] for name in names if name in raw), 0)


def read_adapters(reply: Reply) -> tuple[LoraAdapter, ...]:
    """The answer of GET /lora-adapters."""
    return tuple(LoraAdapter(id=raw["id"], path=raw["path"], scale=float(raw["scale"])) for raw in reply.json())
