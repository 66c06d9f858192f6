"""What crosses a process border: plain frozen records, no behaviour beyond reading and writing themselves.

Times are seconds unless a name ends in `_ms` or `_unix_nano`; `_ratio` is 0..1; `_bytes` and `_tokens` are counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from lltm_ray._shelf import Shelf


class EngineState(StrEnum):
    """Where an engine is in its life; see `llamacpp.lifecycle`."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class ModelState(StrEnum):
    """Whether a served model can answer now."""

    COLD = "cold"
    """No engine; a request for it starts one."""
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting for room"
    """Its start waits until Ray finds a place for it."""
    FAILED = "failed"
    """Its last start failed; tried again after a pause while somebody asks for it."""


class FinishReason(StrEnum):
    """Why generation ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request, as llama-server counted them."""

    input_tokens: int = 0
    """Prompt tokens, cached ones included."""
    output_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV entries were reused."""

    @property
    def total_tokens(self) -> int:
        """Prompt and generated tokens together."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """llama-server's `timings` object, by its own names, and the times seen by our client (`*_s`)."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    draft_n: int = 0
    draft_n_accepted: int = 0
    queue_s: float | None = None
    """From sending the request to response headers (llama-server sends them when a slot starts); streams only."""
    ttft_s: float | None = None
    """From sending the request to the first generated text; streams only."""
    total_s: float | None = None

    @property
    def predicted_per_second(self) -> float:
        """Generated tokens per second of decode time; 0 when nothing was timed."""
        return self.predicted_n / self.predicted_ms * 1e3 if self.predicted_ms else 0.0

    @property
    def prompt_per_second(self) -> float:
        """Computed prompt tokens per second of prefill time; 0 when nothing was timed."""
        return self.prompt_n / self.prompt_ms * 1e3 if self.prompt_ms else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One generated token with its log probability and the alternatives that were asked for."""

    token: str
    logprob: float
    id: int | None = None
    bytes: tuple[int, ...] = ()
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function call the model asks for; `arguments` is the JSON text it wrote."""

    name: str
    arguments: str
    id: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer."""

    text: str
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: tuple[int, ...] = ()
    """Generated token ids, where `return_tokens` was asked for."""
    model: str = ""
    id: str = ""
    engine: str = ""
    """Name of the engine that served it; filled by the engine."""
    slot_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """One event of a stream. Text deltas come first; the last event has `finish_reason`, usage and timings."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    model: str = ""
    id: str = ""
    engine: str = ""
    slot_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors in input order; each is a tuple of floats of the model's embedding length."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    engine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankHit:
    """One document's relevance; `index` points into the documents that were sent."""

    index: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """One slot as `/slots` shows it."""

    id: int
    is_processing: bool
    n_ctx: int
    task_id: int | None = None
    prompt_tokens: int = 0
    decoded_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter that an engine has loaded; its place among the engine's is llama-server's id of it."""

    name: str
    scale: float = 1.0
    """With which its server was started: what requests get that choose it; 0 is 1 for them."""
    now: float | None = None
    """What requests that choose no adapter get of it, where that was changed since."""
    path: str = field(default="", compare=False, repr=False)

    @property
    def own(self) -> float:
        """What requests that choose no adapter get of it."""
        return self.scale if self.now is None else self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the directory, routers and `status` know of one engine."""

    name: str
    model: str
    """Served name: what clients put into `model`."""
    state: EngineState
    url: str = ""
    """Base URL of its llama-server; empty while there is none."""
    api_key: str = field(default="", repr=False)
    slots_total: int = 0
    slots_busy: int = 0
    node_id: str = ""
    node_ip: str = ""
    gpu_ids: tuple[int, ...] = ()
    share: float = 0.0
    """GPUs this engine may use: 0 is CPU only, 0.5 half of one, 2 two whole ones."""
    actor_pid: int = 0
    server_pid: int | None = None
    restarts: int = 0
    """Times its server was started again after it had been ready, in this actor's life or an earlier one."""
    n_ctx: int = 0
    n_gpu_layers: int = 0
    detail: str = ""
    """One line for people: load progress, why it failed, what was shrunk to fit."""
    capabilities: tuple[str, ...] = ("completion",)
    cache_ram_tokens: int = 0
    """Tokens that its server's host-memory prompt cache has room for."""
    slot_similarity_ratio: float = 0.1
    """Its server's `--slot-prompt-similarity`: which slots it uses without a look into that cache."""
    kv_unified: bool = False
    """Its slots share one KV buffer, and an idle one is cleared when another starts."""
    slot_folder: str = ""
    """Where its server saves slots, on its own node; empty where it saves none."""
    slot_seal: str = ""
    """Tells by whom its saved slots can be restored: engines of the same model file and settings; see `launch`."""
    has_own_slot_folder: bool = False
    """Nobody chose that folder: it is for moving conversations, not for what clients would save in it."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters that requests may choose from, in the order of llama-server's ids."""
    updated_unix_nano: int = 0

    def with_(self, **changes: Any) -> EngineInfo:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def public(self) -> dict[str, Any]:
        """As JSON for people and tools; the key stays out."""
        shown = asdict(self)
        del shown["api_key"]
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCounters:
    """One server's own account, as its node's sampler read it."""

    engine: str
    server_pid: int
    prompt_tokens: float
    """Prompt tokens it computed since it started."""
    generated_tokens: float
    busy: int
    """Requests in its slots or waiting for one, at that moment."""
    asked_unix_nano: int
    """When it was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDemand:
    """What is asked of one model, as one gateway sees it, or all of them together."""

    model: str
    """Served name."""
    waiting: int = 0
    running: int = 0
    predicted_wait_s: float = 0.0
    """Of the request that would join the queue now."""
    last_request_unix_nano: int = 0
    rejected: int = 0
    """Refused for want of a slot since the gateway started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the directory knows of one served model, also while it has no engine."""

    name: str
    state: ModelState
    engines: int = 0
    """Those that are ready."""
    min_engines: int = 0
    max_engines: int = 1
    is_elastic: bool = False
    """Whether its engines come and go with demand."""
    adapters: tuple[Adapter, ...] = ()
    """Of its engines, also while there are none."""
    detail: str = ""
    woken_unix_nano: int = 0
    """When a request last asked for it while no engine was ready; 0 once one is."""

    @property
    def is_startable(self) -> bool:
        """Whether a request for it should wait although no engine is ready."""
        return self.is_elastic and self.state is not ModelState.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayInfo:
    """What the directory knows of one gateway."""

    name: str
    url: str
    state: str
    node_id: str = ""
    pid: int = 0
    restarts: int = 0
    updated_unix_nano: int = 0
    demand: tuple[ModelDemand, ...] = ()
    closed: tuple[str, ...] = ()
    """Engines that were drained there: it sends them no requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuInfo:
    """One device as NVML shows it."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] = (0, 0)
    driver: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixFamily:
    """A beginning that several prompts share, and who has it cached."""

    end_bytes: int
    """One of `_prefix.END_BYTES`."""
    hash: bytes
    """Of the prompt up to there, salted; see `_prefix`."""
    engines: tuple[tuple[str, int], ...]
    """Engines and how many tokens of it each has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What analytics tells routers; nothing of it need be followed."""

    made_unix_nano: int = 0
    """0: there are none."""
    valid_s: float = 0.0
    """From when a router gets them."""
    families: tuple[PrefixFamily, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is told."""
        return bool(self.families)

    def public(self) -> dict[str, Any]:
        """As JSON; of families only how many there are."""
        return {"made_unix_nano": self.made_unix_nano, "families": len(self.families)}


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """One look at a fleet."""

    name: str
    engines: tuple[EngineInfo, ...] = ()
    gateways: tuple[GatewayInfo, ...] = ()
    models: tuple[ModelInfo, ...] = ()
    """Every served model, in the order of the settings."""
    version: int = 0
    salt: bytes = field(default=b"", repr=False)
    """What its gateways hash prompts with (see `_prefix`); a secret, made by whoever started the fleet."""
    hints: Hints = field(default_factory=Hints)
    shelf: Shelf = field(default_factory=Shelf)

    def public(self) -> dict[str, Any]:
        """As JSON: `{"name", "models": [...], "engines": [...], "gateways": [...], "hints", "shelf"}`, without keys."""
        return {
            "name": self.name,
            "models": [asdict(model) for model in self.models],
            "engines": [engine.public() for engine in self.engines],
            "gateways": [asdict(gateway) for gateway in self.gateways],
            "hints": self.hints.public(),
            "shelf": self.shelf.public(),
        }


def timings_from(raw: Mapping[str, Any] | None, **seen: float | None) -> Timings:
    """Read llama-server's `timings` object, ignoring what we do not know; `seen` adds our client's own times."""
    raw = raw or {}
    known = ("cache_n", "prompt_n", "prompt_ms", "predicted_n", "predicted_ms", "draft_n", "draft_n_accepted")
    values: dict[str, Any] = {name: raw[name] for name in known if raw.get(name) is not None}
    return Timings(**values | seen)
