"""Rows: what a process notes while it works, as plain tuples.

A row is appended to a deque when its subject ends; columns are built when a batch is sent (`batch`). A
request's row and its attempts' rows hold all that its spans and metrics are made of; see `spans`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

NEVER = math.nan
"""An offset of something that did not happen."""


class RequestRow(NamedTuple):
    """One request through a gateway, or one call through the driver. Offsets count from its arrival, in seconds."""

    trace_id: str
    span_id: str
    parent_span_id: str
    """Empty: no caller told of one."""
    flags: int
    state: str
    request_id: str
    route: str
    model_asked: str
    model: str
    """Served name; empty where none was found."""
    tenant: str
    conversation: str
    """Only what the client itself named so."""
    status: int
    """HTTP status; 0: the client left before one was sent."""
    error_type: str
    """Empty without an error; else of low cardinality: a class, an HTTP status, `client_gone`, `timeout`."""
    error: str
    arrived_unix_nano: int
    ttft_s: float
    total_s: float
    delivered_tokens: int
    bytes_sent: int
    is_stream: bool
    parameters: str
    """JSON object: the request's scalar fields that conventions know (`temperature`, `max_tokens`, ...)."""
    response_id: str
    response_model: str
    finish_reasons: str
    """Joined by commas."""
    policy: str
    why: str
    """One sentence: why it was routed so."""
    content: str
    """JSON object of `input`, `output`, `system`; empty unless content is captured."""
    prompt_bytes: int = 0
    """Of the prompt as the router compares it."""
    prefix: bytes = b""
    """Salted hashes of its beginnings; see `lltm_ray._prefix`."""
    blocks: bytes = b""
    """Salted hashes of its blocks, each by itself, with their sizes; see there."""


class AttemptRow(NamedTuple):
    """One try of a request on one engine. Offsets count from the request's arrival, in seconds."""

    trace_id: str
    request_span_id: str
    span_id: str
    number: int
    """From 1."""
    engine: str
    """Empty: it waited for a slot and got none."""
    server_pid: int
    slot: int
    """-1: llama-server's own choice, or none."""
    asked_s: float
    """The router was asked for a slot."""
    sent_s: float
    """A slot was granted and the request sent."""
    headers_s: float
    """The server's response headers: llama-server sends those of a stream when its slot starts."""
    first_s: float
    """First generated text."""
    ended_s: float
    predicted_cached_tokens: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    delivered_tokens: int
    prompt_ms: float
    """The server's own clock, as `predicted_ms`."""
    predicted_ms: float
    draft_tokens: int
    accepted_tokens: int
    outcome: str
    is_estimate: bool
    is_continued: bool
    """It took up another engine's broken answer."""


class SpanRow(NamedTuple):
    """Any other span: model load, slot save, the driver's and users' own."""

    trace_id: str
    span_id: str
    parent_span_id: str
    name: str
    kind: str
    """`internal`, `server`, `client`, `producer`, `consumer`."""
    start_unix_nano: int
    end_unix_nano: int
    error_type: str
    error: str
    engine: str
    attributes: str
    """JSON object; values are strings, numbers, booleans or lists of one of them."""


class GpuRow(NamedTuple):
    """One device at one moment; None: it does not tell."""

    at_unix_nano: int
    node: str
    gpu: int
    """NVML's index on its node."""
    uuid: str
    name: str
    driver: str
    utilization_ratio: float | None
    encoder_ratio: float | None
    decoder_ratio: float | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    power_w: float | None
    power_limit_w: float | None
    energy_j: float | None
    """Since the driver was loaded."""
    temperature_c: float | None
    throttle: int | None
    """NVML's clock event reasons, as bits."""
    pcie_sent_bytes: int | None
    """By the GPU, since the driver was loaded."""
    pcie_received_bytes: int | None
    ecc_corrected: int | None
    ecc_uncorrected: int | None


class ServerRow(NamedTuple):
    """One llama-server at one moment: its counters as it tells them, and its process. None: it does not tell."""

    at_unix_nano: int
    node: str
    engine: str
    model: str
    server_pid: int
    gpu_uuids: str
    """Joined by commas."""
    share: float
    """GPUs it asked for."""
    gpu_memory_bytes: int | None
    gpu_memory_share_bytes: int | None
    """What its share allows."""
    prompt_tokens: float | None
    prompt_tokens_cached: float | None
    prompt_seconds: float | None
    predicted_tokens: float | None
    predicted_seconds: float | None
    decodes: float | None
    draft_tokens: float | None
    draft_accepted: float | None
    busy_slots_per_decode: float | None
    processing: float | None
    deferred: float | None
    slots_total: int
    slots_busy: int
    context_tokens: int
    context_used_tokens: int
    cpu_s: float | None
    memory_bytes: int | None
    virtual_bytes: int | None
    threads: int | None
    open_files: int | None
    restarts: int


class NodeRow(NamedTuple):
    """One machine at one moment."""

    at_unix_nano: int
    node: str
    address: str
    cpus: int
    cpu_ratio: float
    """Of all CPUs, since the last sample."""
    memory_total_bytes: int
    memory_used_bytes: int
    load_1m: float
    gpu_reason: str
    """Why it shows no GPU, in one sentence; empty where it shows some."""


class SlotRow(NamedTuple):
    """One slot at one moment."""

    at_unix_nano: int
    engine: str
    slot: int
    is_processing: bool
    task: int
    prompt_tokens: int
    decoded_tokens: int
    n_ctx: int


class QueueRow(NamedTuple):
    """What one gateway had in hand of one model at one moment."""

    at_unix_nano: int
    gateway: str
    model: str
    waiting: int
    running: int
    rejected: int
    """Refused for want of a slot since the gateway started."""
    predicted_wait_s: float | None
    """Of the request that would join the queue now; None: nobody can say."""


class LogRow(NamedTuple):
    """One line of a log."""

    at_unix_nano: int
    trace_id: str
    span_id: str
    severity: str
    """Python's level names."""
    logger: str
    message: str
    attributes: str
    """JSON object."""


KINDS: dict[str, Any] = {
    "requests": RequestRow,
    "attempts": AttemptRow,
    "spans": SpanRow,
    "gpus": GpuRow,
    "nodes": NodeRow,
    "servers": ServerRow,
    "slots": SlotRow,
    "queues": QueueRow,
    "logs": LogRow,
}
"""What a batch may hold: name -> row type."""
