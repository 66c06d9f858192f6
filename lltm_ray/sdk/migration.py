"""What the calls of llamatelemetry are here: the README's table, and a test that each of them exists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Move:
    """One old call and what takes its place."""

    old: str
    new: str
    """`module:attribute`, or `module:Class.attribute`."""
    note: str = ""
    """What is different."""


_SDK = "lltm_ray.sdk"
MOVES = (
    Move("InferenceEngine(server_url)", f"{_SDK}.engine:InferenceEngine", "named by its fleet; nothing is started yet"),
    Move("load_model(name, gpu_layers, ctx_size)", f"{_SDK}.engine:InferenceEngine.load_model", "raises what is wrong"),
    Move("infer, generate", f"{_SDK}.engine:InferenceEngine.infer", "with the chat template; `raw=True` without"),
    Move("infer_stream(prompt, callback)", f"{_SDK}.engine:InferenceEngine.infer_stream", "iterate it; then `.result`"),
    Move("batch_infer", f"{_SDK}.engine:InferenceEngine.batch_infer", "on all slots of all engines at once"),
    Move("get_metrics, reset_metrics", f"{_SDK}.engine:InferenceEngine.get_metrics", "rates over wall time; TTFT too"),
    Move("InferResult", f"{_SDK}.result:InferResult", "frozen; real token counts, `ttft_ms`, `timings`, `error`"),
    Move("ServerManager.start_server", f"{_SDK}.server:ServerManager.start_server", "a free port, a key; supervised"),
    Move("ServerManager.restart_server", f"{_SDK}.server:ServerManager.restart_server"),
    Move("find_llama_server", "lltm_ray.llamacpp.binary:find_server", "says where it looked"),
    Move("LlamaCppClient.chat_completion", "lltm_ray.llamacpp.client:LlamaClient.chat", "`AsyncLlamaClient` likewise"),
    Move("LlamaCppClient.complete", "lltm_ray.llamacpp.client:LlamaClient.complete", "`complete_stream` for events"),
    Move("LlamaCppClient.slots.save", "lltm_ray.llamacpp.client:LlamaClient.slot_save"),
    Move("LlamaCppClient.lora.set_scales", "lltm_ray.llamacpp.client:LlamaClient.set_lora_adapters"),
    Move("ChatEngine.complete", f"{_SDK}.conversation:Conversation.ask", "trimmed by tokens, not by messages"),
    Move("ChatEngine.save_history", f"{_SDK}.conversation:Conversation.save"),
    Move("EmbeddingEngine.embed_batch", f"{_SDK}.embeddings:EmbeddingEngine.embed", "cache by model and text, bounded"),
    Move("SemanticSearch.search", f"{_SDK}.embeddings:SemanticSearch.search", "one product of matrices"),
    Move("TextClustering.fit", "lltm_ray.knowledge.clusters:k_means"),
    Move("list_registry_models", "lltm_ray.models.catalog:load_catalog", "or `lltm-ray models list`"),
    Move("parse_gguf_header, GGUFReader", "lltm_ray.models.gguf:read_model", "with all shards; hostile files refused"),
    Move("estimate_model_vram, can_fit_model", "lltm_ray.models.memory:estimate", "from the file's own tensors"),
    Move("detect_gpus", "lltm_ray.gpu.nvml:read_inventory"),
    Move("MultiGPUConfig, SplitMode", "lltm_ray.config:EngineConfig", "`split_mode`, `tensor_split`, `main_gpu`"),
    Move("setup_telemetry", "lltm_ray.config:TelemetryConfig", "on by default; OTLP by `OTEL_*` variables"),
    Move("instrument_llamacpp_client", "lltm_ray.telemetry:instrument", "no global provider is replaced"),
    Move("PerformanceMonitor", "lltm_ray.driver:Cluster.telemetry", "summaries as DataFrames"),
)


def markdown() -> str:
    """The table as the README has it."""
    rows = [f"| `{move.old}` | `{move.new.replace(':', '.')}` | {move.note} |" for move in MOVES]
    return "\n".join(["| llamatelemetry | lltm_ray | |", "|---|---|---|", *rows]) + "\n"
