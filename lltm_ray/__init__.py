"""A fleet of llama.cpp servers on Ray: one engine per GPU share, one endpoint, numbers you can believe.

Names are loaded on first use: `import lltm_ray` imports neither Ray nor anything else that is slow.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "AsyncLlamaClient": "lltm_ray.llamacpp.client",
    "Cluster": "lltm_ray.driver",
    "Completion": "lltm_ray.records",
    "ConfigError": "lltm_ray.errors",
    "Conversation": "lltm_ray.sdk.conversation",
    "EmbeddingEngine": "lltm_ray.sdk.embeddings",
    "EngineConfig": "lltm_ray.config",
    "EngineInfo": "lltm_ray.records",
    "FleetConfig": "lltm_ray.config",
    "GatewayConfig": "lltm_ray.config",
    "InferResult": "lltm_ray.sdk.result",
    "InferenceEngine": "lltm_ray.sdk.engine",
    "LlamaClient": "lltm_ray.llamacpp.client",
    "LltmRayError": "lltm_ray.errors",
    "SemanticSearch": "lltm_ray.sdk.embeddings",
    "ServerManager": "lltm_ray.sdk.server",
    "StreamEvent": "lltm_ray.records",
    "build_app": "lltm_ray.serve.builder",
    "split_gpu": "lltm_ray.sdk.split",
}

__all__ = sorted([*_WHERE, "__version__"])  # noqa: PLE0605 - the table above is the list


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lltm_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
