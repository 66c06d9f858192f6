"""Requests of every kind, as rows, and where their engines run."""

import json
import math

from lltm_ray.telemetry import semconv as names
from lltm_ray.telemetry.rows import SpanRow
from lltm_ray.telemetry.spans import Place
from tests.unit.telemetry.rows_made import SPAN_ID, TRACE_ID, attempt_row, request_row

NAN = math.nan
PLACES = {
    "engine-0": Place("127.0.0.1", 8081, ("GPU-1",), "n1", "tiny"),
    "engine-1": Place("127.0.0.2", 8082, ("GPU-2", "GPU-3"), "n2", "tiny"),
}
CHAT_PARAMETERS = {
    "temperature": 0,
    "top_p": 0.9,
    "top_k": 40,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
    "max_completion_tokens": 10,
    "n": 2,
    "seed": 0,
    "stop": "END",
    "reasoning_effort": "low",
    "response_format": {"type": "json_schema", "json_schema": {}},
    "previous_response_id": "resp_1",
    "prompt": {"id": "greet", "version": "2"},
    "metadata": {
        names.AGENT_ID: "a-1",
        names.AGENT_NAME: "Tutor",
        names.AGENT_DESCRIPTION: "Helps",
        names.AGENT_VERSION: "1.0",
        names.WORKFLOW_NAME: "lesson",
        names.CONVERSATION_COMPACTED: "true",
        "secret": "kept out",
    },
}
CONTENT = {
    "input": [{"role": "user", "parts": [{"type": "text", "content": "Grüezi"}]}],
    "output": [{"role": "assistant", "parts": [{"type": "text", "content": "Hoi"}], "finish_reason": "length"}],
    "system": [{"type": "text", "content": "Be brief."}],
    "tools": [{"type": "function", "name": "weather", "description": None, "parameters": None}],
}


def chat():
    row = request_row(
        parameters=json.dumps(CHAT_PARAMETERS), content=json.dumps(CONTENT), conversation="conv-1", tenant="blue"
    )
    return row, [attempt_row(draft_tokens=8, accepted_tokens=6)]


def plain_chat():
    """Not streamed to its client, nor by llama-server to us: no moment but the end is known, and the server's times."""
    row = request_row(is_stream=False, parameters="", ttft_s=NAN)
    return row, [attempt_row(headers_s=0.249, first_s=NAN, prompt_ms=30.0, predicted_ms=190.0)]


def embeddings():
    row = request_row(
        route="/v1/embeddings",
        parameters='{"encoding_format":"base64","dimensions":256}',
        is_stream=False,
        ttft_s=NAN,
        finish_reasons="",
        response_id="",
    )
    counts = {"cached_tokens": 0, "computed_tokens": 12, "generated_tokens": 0, "delivered_tokens": 0}
    return row, [attempt_row(headers_s=0.249, first_s=NAN, prompt_ms=NAN, predicted_ms=NAN, **counts)]


def rerank():
    row, attempts = embeddings()
    return row._replace(route="/v1/rerank", parameters=""), attempts


def text():
    return request_row(route="/v1/completions"), [attempt_row()]


def cancelled():
    row = request_row(
        status=200,
        error_type="client_gone",
        error="the client left",
        finish_reasons="",
        delivered_tokens=7,
        total_s=0.2,
    )
    return row, [attempt_row(ended_s=0.2, generated_tokens=9, delivered_tokens=7, outcome="client gone")]


def failed():
    """Its only engine could not be reached."""
    row = request_row(
        status=503,
        error_type="engine_not_ready_error",
        error="unreachable",
        finish_reasons="",
        ttft_s=NAN,
        response_id="",
    )
    nothing = {"cached_tokens": 0, "computed_tokens": 0, "generated_tokens": 0, "delivered_tokens": 0}
    times = {"headers_s": NAN, "first_s": NAN, "ended_s": 0.24, "prompt_ms": NAN, "predicted_ms": NAN}
    return row, [attempt_row(outcome="failed", slot=-1, **times, **nothing)]


def rejected():
    row = request_row(
        status=429,
        error_type="overloaded_error",
        error="every slot is busy",
        finish_reasons="",
        ttft_s=NAN,
        response_id="",
    )
    return row, []


def failed_over():
    """Engine 0 died in the middle; engine 1 read the prompt and what was delivered, and wrote the rest."""
    first = attempt_row(ended_s=0.1, generated_tokens=5, delivered_tokens=4, outcome="continued", is_estimate=True)
    second = attempt_row(
        span_id="00f067aa0ba902b8",
        number=2,
        engine="engine-1",
        asked_s=0.1,
        sent_s=0.12,
        headers_s=0.13,
        first_s=0.15,
        cached_tokens=0,
        computed_tokens=44,
        generated_tokens=6,
        delivered_tokens=6,
        is_continued=True,
    )
    return request_row(), [first, second]


REQUESTS = (chat, plain_chat, embeddings, rerank, text, cancelled, failed, rejected, failed_over)


def span_row(name, kind="internal", error_type="", engine="", **attributes):
    return SpanRow(
        *(TRACE_ID, "1111111111111111", SPAN_ID, name, kind, 10, 20),
        *(error_type, "why" if error_type else "", engine, json.dumps(attributes)),
    )


USER_ROWS = (
    span_row(
        "execute_tool weather",
        **{
            names.OPERATION_NAME: "execute_tool",
            names.TOOL_NAME: "weather",
            names.TOOL_TYPE: "function",
            names.TOOL_DESCRIPTION: "Weather of a place",
            names.TOOL_CALL_ID: "call-1",
            names.TOOL_CALL_ARGUMENTS: '{"place":"Bern"}',
            names.TOOL_CALL_RESULT: '"rain"',
        },
    ),
    span_row(
        "retrieval docs",
        "client",
        **{
            names.OPERATION_NAME: "retrieval",
            names.DATA_SOURCE_ID: "docs",
            names.RETRIEVAL_TOP_K: 3,
            names.RETRIEVAL_QUERY_TEXT: "rain",
            names.RETRIEVAL_DOCUMENTS: '[{"id":"1","score":0.5}]',
        },
    ),
    span_row("move slot", **{names.TARGET_ENGINE: "engine-1", names.SLOT_TOKENS: 900, names.SLOT_BYTES: 4096}),
    span_row(
        "evaluation",
        **{
            names.EVALUATION_NAME: "relevance",
            names.EVALUATION_SCORE_VALUE: 0.5,
            names.EVALUATION_SCORE_LABEL: "pass",
            names.EVALUATION_EXPLANATION: "near",
        },
    ),
)
