"""Names: the attributes we emit, frozen here because the GenAI conventions are moving house.

Sources, pinned:

- 1.41: https://github.com/open-telemetry/semantic-conventions tag v1.41.0, docs/gen-ai: the last version published
  there, and what receivers read today.
- genai-dev: https://github.com/open-telemetry/semantic-conventions-genai at 024a4f944a1291fcb627c9c47da69e79868dd15e
  (docs/gen-ai/client-inference.md) and 32c328e85013588c6fe32ebc30934ab5b1752b6a (migration.md, the renames).
- vLLM: https://github.com/vllm-project/vllm vllm/tracing, `SpanAttributes`: `gen_ai.latency.*`, `gen_ai.request.id`.

Metrics and what differs between versions: `profiles`. Own names begin with `lltm.` and exist only where both have none.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PROVIDER: Final = "llama_cpp"
"""`gen_ai.provider.name`: a custom value, as neither list of providers has llama.cpp."""
OTHER: Final = "_other"
"""A label's value in place of one that would not be bounded."""

# --- gen_ai, any operation
OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
CONVERSATION_COMPACTED: Final = "gen_ai.conversation.compacted"
OUTPUT_TYPE: Final = "gen_ai.output.type"
PROMPT_NAME: Final = "gen_ai.prompt.name"
PROMPT_VERSION: Final = "gen_ai.prompt.version"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - a metric's attribute
TOKEN_MODALITY: Final = "gen_ai.token.modality"  # noqa: S105

# --- gen_ai, request
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
REQUEST_ENCODING_FORMATS: Final = "gen_ai.request.encoding_formats"
REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
REQUEST_PREVIOUS_RESPONSE_ID: Final = "gen_ai.request.previous_response.id"
REQUEST_REASONING_LEVEL: Final = "gen_ai.request.reasoning.level"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
EMBEDDINGS_DIMENSION_COUNT: Final = "gen_ai.embeddings.dimension.count"

# --- gen_ai, response and usage
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ: Final = "gen_ai.usage.cache_read.input_tokens"
USAGE_CACHE_WRITE: Final = "gen_ai.usage.cache_write.input_tokens"
USAGE_CACHE_CREATION: Final = "gen_ai.usage.cache_creation.input_tokens"

# --- gen_ai, content: opt-in only
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
SYSTEM_INSTRUCTIONS: Final = "gen_ai.system_instructions"
TOOL_DEFINITIONS: Final = "gen_ai.tool.definitions"
CONTENT: Final = frozenset((INPUT_MESSAGES, OUTPUT_MESSAGES, SYSTEM_INSTRUCTIONS, TOOL_DEFINITIONS))
"""What prompts and answers say."""

# --- gen_ai, agents and their tools
AGENT_ID: Final = "gen_ai.agent.id"
AGENT_NAME: Final = "gen_ai.agent.name"
AGENT_DESCRIPTION: Final = "gen_ai.agent.description"
AGENT_VERSION: Final = "gen_ai.agent.version"
WORKFLOW_NAME: Final = "gen_ai.workflow.name"
DATA_SOURCE_ID: Final = "gen_ai.data_source.id"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_DESCRIPTION: Final = "gen_ai.tool.description"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
TOOL_CALL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_CALL_RESULT: Final = "gen_ai.tool.call.result"
RETRIEVAL_DOCUMENTS: Final = "gen_ai.retrieval.documents"
RETRIEVAL_QUERY_TEXT: Final = "gen_ai.retrieval.query.text"
RETRIEVAL_TOP_K: Final = "gen_ai.retrieval.top_k"
EVALUATION_NAME: Final = "gen_ai.evaluation.name"
EVALUATION_SCORE_VALUE: Final = "gen_ai.evaluation.score.value"
EVALUATION_SCORE_LABEL: Final = "gen_ai.evaluation.score.label"
EVALUATION_EXPLANATION: Final = "gen_ai.evaluation.explanation"

# --- gen_ai as vLLM has it, seconds
REQUEST_ID: Final = "gen_ai.request.id"
LATENCY_QUEUE: Final = "gen_ai.latency.time_in_queue"
LATENCY_TTFT: Final = "gen_ai.latency.time_to_first_token"
LATENCY_E2E: Final = "gen_ai.latency.e2e"
LATENCY_PREFILL: Final = "gen_ai.latency.time_in_model_prefill"
LATENCY_DECODE: Final = "gen_ai.latency.time_in_model_decode"
LATENCY_INFERENCE: Final = "gen_ai.latency.time_in_model_inference"

# --- stable conventions
ERROR_TYPE: Final = "error.type"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

# --- own
ATTEMPTS: Final = "lltm.attempts"
ATTEMPT_NUMBER: Final = "lltm.attempt.number"
ATTEMPT_CONTINUED: Final = "lltm.attempt.continued"
ATTEMPT_OUTCOME: Final = "lltm.attempt.outcome"
ENGINE: Final = "lltm.engine"
GPU_UUIDS: Final = "lltm.gpu.uuids"
NODE: Final = "lltm.node"
PHASES_ESTIMATED: Final = "lltm.phases.estimated"
POLICY: Final = "lltm.routing.policy"
REJECT_REASON: Final = "lltm.reject.reason"
REUSE_DIRECTION: Final = "lltm.reuse.direction"
SERVER_PID: Final = "lltm.server.pid"
SLOT_BYTES: Final = "lltm.slot.bytes"
SLOT_ID: Final = "lltm.slot.id"
SLOT_TOKENS: Final = "lltm.slot.tokens"
TARGET_ENGINE: Final = "lltm.engine.target"
TENANT: Final = "lltm.tenant"
TOKENS_ACCEPTED: Final = "lltm.tokens.accepted"
TOKENS_CACHED: Final = "lltm.tokens.cached"
TOKENS_COMPUTED: Final = "lltm.tokens.computed"
TOKENS_DELIVERED: Final = "lltm.tokens.delivered"
TOKENS_DRAFTED: Final = "lltm.tokens.drafted"
TOKENS_ESTIMATED: Final = "lltm.tokens.estimated"
TOKENS_GENERATED: Final = "lltm.tokens.generated"
TOKENS_PREDICTED: Final = "lltm.tokens.predicted_cached"
TIME_IN_GATEWAY: Final = "lltm.latency.time_in_gateway"
WHY: Final = "lltm.routing.why"

CHAT: Final = "chat"
TEXT: Final = "text_completion"
EMBEDDINGS: Final = "embeddings"
RERANK: Final = "rerank"
OPERATIONS: Final[dict[str, str]] = {
    **dict.fromkeys(("/v1/chat/completions", "/chat/completions", "/v1/messages", "/v1/responses", "/responses"), CHAT),
    **dict.fromkeys(("/completion", "/completions", "/v1/completions", "/infill"), TEXT),
    **dict.fromkeys(("/embedding", "/embeddings", "/v1/embeddings"), EMBEDDINGS),
    **dict.fromkeys(("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"), RERANK),
}
"""Route -> `gen_ai.operation.name`. A route that is not here asks no model and makes no span."""


class Attribute(NamedTuple):
    """One attribute that we emit."""

    name: str
    operations: str
    """Who has it, joined by blanks; see `GROUPS`."""
    requirement: str
    """`required`, `conditional`, `recommended`, `opt-in`."""
    source: str
    """`1.41`, `genai-dev` (newer; emitted by either profile, as 1.41 has no other name for it), `vLLM`, `lltm`."""


GROUPS: Final = {
    "inference": f"{CHAT}, {TEXT}",
    "request": f"{CHAT}, {TEXT}, {EMBEDDINGS}, {RERANK}",
    "attempt": f"{CHAT}, {TEXT}, {EMBEDDINGS}, {RERANK} (CLIENT)",
    "phases": "lltm.queue, lltm.prefill, lltm.decode",
    "moves": "drain, relieve, move slot, slot carry, slot restore, slot save",
    "metrics": "metrics",
}
"""What `operations` abbreviates."""


def _rows(operations: str, requirement: str, source: str, *names: str) -> tuple[Attribute, ...]:
    return tuple(Attribute(name, operations, requirement, source) for name in names)


_GENERATION = "inference invoke_agent"

ATTRIBUTES: Final = (
    *_rows("request execute_tool invoke_agent retrieval", "required", "1.41", OPERATION_NAME),
    *_rows("request invoke_agent retrieval", "required", "1.41", PROVIDER_NAME),
    *_rows("request invoke_agent retrieval", "conditional", "1.41", REQUEST_MODEL),
    *_rows("request execute_tool invoke_agent retrieval", "conditional", "1.41", ERROR_TYPE),
    *_rows(_GENERATION, "conditional", "1.41", CONVERSATION_ID, OUTPUT_TYPE, REQUEST_CHOICE_COUNT, REQUEST_SEED),
    *_rows("inference", "conditional", "1.41", REQUEST_STREAM, REQUEST_TOP_K, PROMPT_NAME),
    *_rows("inference", "conditional", "genai-dev", PROMPT_VERSION, CONVERSATION_COMPACTED),
    *_rows(_GENERATION, "recommended", "1.41", REQUEST_MAX_TOKENS, REQUEST_TEMPERATURE, REQUEST_TOP_P),
    *_rows(_GENERATION, "recommended", "1.41", REQUEST_FREQUENCY_PENALTY, REQUEST_PRESENCE_PENALTY),
    *_rows(_GENERATION, "recommended", "1.41", REQUEST_STOP_SEQUENCES),
    *_rows("inference", "recommended", "genai-dev", REQUEST_REASONING_LEVEL, REQUEST_PREVIOUS_RESPONSE_ID),
    *_rows(EMBEDDINGS, "recommended", "1.41", REQUEST_ENCODING_FORMATS, EMBEDDINGS_DIMENSION_COUNT),
    *_rows("inference", "recommended", "1.41", RESPONSE_ID, RESPONSE_TIME_TO_FIRST_CHUNK),
    *_rows("request", "recommended", "1.41", RESPONSE_MODEL),
    *_rows(_GENERATION, "recommended", "1.41", RESPONSE_FINISH_REASONS, USAGE_OUTPUT_TOKENS),
    *_rows("request invoke_agent", "recommended", "1.41", USAGE_INPUT_TOKENS),
    *_rows("inference", "recommended", "1.41", USAGE_CACHE_READ, USAGE_CACHE_CREATION),
    *_rows("inference", "recommended", "genai-dev", USAGE_CACHE_WRITE),
    *_rows("attempt", "recommended", "1.41", SERVER_ADDRESS),
    *_rows("attempt", "conditional", "1.41", SERVER_PORT),
    *_rows(_GENERATION, "opt-in", "1.41", INPUT_MESSAGES, OUTPUT_MESSAGES, SYSTEM_INSTRUCTIONS, TOOL_DEFINITIONS),
    *_rows("inference invoke_agent", "conditional", "1.41", AGENT_ID, AGENT_NAME, AGENT_DESCRIPTION, AGENT_VERSION),
    *_rows("inference invoke_workflow", "conditional", "1.41", WORKFLOW_NAME),
    *_rows("retrieval invoke_agent", "conditional", "1.41", DATA_SOURCE_ID),
    *_rows("retrieval", "recommended", "genai-dev", RETRIEVAL_TOP_K),
    *_rows("retrieval", "opt-in", "1.41", RETRIEVAL_DOCUMENTS, RETRIEVAL_QUERY_TEXT),
    *_rows("execute_tool", "required", "1.41", TOOL_NAME),
    *_rows("execute_tool", "recommended", "1.41", TOOL_TYPE, TOOL_DESCRIPTION, TOOL_CALL_ID),
    *_rows("execute_tool", "opt-in", "1.41", TOOL_CALL_ARGUMENTS, TOOL_CALL_RESULT),
    *_rows("evaluation", "required", "1.41", EVALUATION_NAME),
    *_rows("evaluation", "conditional", "1.41", EVALUATION_SCORE_VALUE, EVALUATION_SCORE_LABEL),
    *_rows("evaluation", "recommended", "1.41", EVALUATION_EXPLANATION),
    *_rows("request", "recommended", "vLLM", REQUEST_ID, LATENCY_QUEUE, LATENCY_E2E),
    *_rows("inference", "recommended", "vLLM", LATENCY_TTFT, LATENCY_PREFILL, LATENCY_DECODE, LATENCY_INFERENCE),
    *_rows("metrics", "required", "1.41", TOKEN_TYPE),
    *_rows("metrics", "required", "genai-dev", TOKEN_MODALITY),
    *_rows("request", "recommended", "1.41", HTTP_ROUTE, HTTP_STATUS),
    *_rows("request", "recommended", "lltm", ATTEMPTS, TENANT, TIME_IN_GATEWAY, TOKENS_DELIVERED),
    *_rows("route", "recommended", "lltm", POLICY, WHY, TOKENS_PREDICTED),
    *_rows("attempt route", "recommended", "lltm", ENGINE, ATTEMPT_NUMBER),
    *_rows("attempt", "recommended", "lltm", ATTEMPT_CONTINUED, ATTEMPT_OUTCOME, SLOT_ID, SERVER_PID),
    *_rows("attempt", "recommended", "lltm", GPU_UUIDS, NODE, TOKENS_ESTIMATED),
    *_rows("phases", "recommended", "lltm", TOKENS_CACHED, TOKENS_COMPUTED, TOKENS_GENERATED),
    *_rows("phases", "recommended", "lltm", TOKENS_DRAFTED, TOKENS_ACCEPTED, PHASES_ESTIMATED),
    *_rows("moves", "recommended", "lltm", SLOT_TOKENS, SLOT_BYTES, TARGET_ENGINE),
    *_rows("metrics", "recommended", "lltm", REJECT_REASON, REUSE_DIRECTION),
)
"""All we emit, in the order of the documentation's table. Spans of `execute_tool`, `invoke_agent`, `invoke_workflow`,
`retrieval` and `evaluation` come from users' code through `instrument`; the rest from requests."""


def to_markdown() -> str:
    """The documentation's table of attributes: name, operations, requirement, source."""
    lines = ["| Attribute | Operations | Requirement | Source |", "| --- | --- | --- | --- |"]
    for name, operations, requirement, source in ATTRIBUTES:
        spelled = ", ".join(GROUPS.get(each, each) for each in operations.split())
        lines.append(f"| `{name}` | {spelled} | {requirement} | {source} |")
    return "\n".join(lines) + "\n"
