"""What tuning is told of the model and this machine: where `models` and `gpu` meet `llamacpp.tuning.plan`."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from lltm_ray.config import EngineConfig, FleetConfig, read_environment
from lltm_ray.errors import ConfigError
from lltm_ray.gpu.host import available_ram_bytes, usable_cores
from lltm_ray.gpu.nvml import read_inventory, visible
from lltm_ray.gpu.shares import memory_budget
from lltm_ray.llamacpp.tuning.plan import Facts
from lltm_ray.models.footprint import MemoryModel
from lltm_ray.models.gguf import GgufInfo, read_model
from lltm_ray.models.memory import DEFAULT_SLOT_TOKENS
from lltm_ray.models.resolve import Progress, resolve

DRAFTS = {"tiny": "tiny-draft"}
"""Draft models that are known to suit a model: same vocabulary, much smaller."""
_SAMPLE_TOKENS = 4096
_Q8 = EngineConfig(cache_type_k="q8_0", cache_type_v="q8_0")


def read_facts(
    fleet: FleetConfig, *, gpus: float | None = None, model_draft: str | None = None, progress: Progress | None = None
) -> Facts:
    """Find the model (downloading it if need be) and look at this machine.

    Args:
        fleet: its `model` and `memory_limit_bytes`.
        gpus: for the whole fleet: 0, a part of one, or whole ones; None: all that are visible here.
        model_draft: a draft model; None: the known one of the package's models, if any.
        progress: hears of the download.

    Raises:
        ModelError: the model cannot be had.
        ConfigError: more GPUs than there are, or a part of more than one.
    """
    environment = read_environment()
    find = partial(resolve, cache_dir=environment.cache_dir, offline=environment.hf_offline, progress=progress)
    info = read_model(find(fleet.model).path)
    gpus, budget = _room(gpus, fleet.memory_limit_bytes)
    draft = model_draft or DRAFTS.get(fleet.model)
    return Facts(
        model=fleet.model,
        model_bytes=info.tensor_bytes,
        n_params=info.n_params,
        n_layer=info.n_layer,
        n_ctx_train=info.n_ctx_train or DEFAULT_SLOT_TOKENS,
        n_vocab=info.n_vocab,
        kv_token_bytes=_kv_bytes(info, EngineConfig()) // _SAMPLE_TOKENS,
        memory=partial(_memory, info),
        budget_bytes=budget,
        host_bytes=available_ram_bytes(),
        cores=usable_cores(),
        gpus=gpus,
        can_quantize_cache=_can_quantize(info),
        model_draft=draft,
        draft_bytes=find(draft).path.stat().st_size if draft else 0,
    )


def _room(gpus: float | None, limit: int | None) -> tuple[float, int]:
    """GPUs to use, and the bytes of one, or of the host."""
    found = visible(read_inventory(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    gpus = float(len(found)) if gpus is None else gpus
    if not (0 <= gpus <= 1 or gpus == int(gpus) > 0):
        raise ConfigError("gpus", gpus, "must be 0, a part of one, or a whole number")
    if gpus > len(found):
        raise ConfigError("gpus", gpus, f"this machine shows {len(found)}; 0 tunes for the CPU")
    budget = available_ram_bytes()
    if gpus:
        budget = min(memory_budget(gpu.total_bytes, gpu.free_bytes, 1.0) for gpu in found) or budget
    return gpus, min(budget, limit or budget)


def _memory(info: GgufInfo, engine: EngineConfig, gpus: int) -> int:
    """Bytes of one engine with all layers on so many GPUs, or on the host."""
    model = MemoryModel(info, replace(engine, tensor_split=(1.0,) * gpus if gpus > 1 else ()))
    n_ctx = engine.n_ctx or min(info.n_ctx_train or DEFAULT_SLOT_TOKENS, DEFAULT_SLOT_TOKENS) * engine.n_parallel
    found = model.estimate(n_ctx, engine.n_parallel, model.n_all_layers if gpus else 0)
    return found.device_bytes if gpus else found.host_bytes


def _can_quantize(info: GgufInfo) -> bool:
    try:
        return bool(_kv_bytes(info, _Q8))
    except ConfigError:
        return False


def _kv_bytes(info: GgufInfo, engine: EngineConfig) -> int:
    return MemoryModel(info, engine).estimate(_SAMPLE_TOKENS, 1, 0).kv_bytes
