"""What fits which GPU: `fit_gpus`, for common cards and those of a machine. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lltm_ray.config import EngineConfig
from lltm_ray.errors import ModelDoesNotFitError
from lltm_ray.models.gguf import GgufInfo
from lltm_ray.models.memory import plan_fit
from lltm_ray.models.recommend import largest_context

COMMON: Mapping[str, int] = {
    "RTX 3060": 12_288, "T4": 15_360, "L4, A10": 23_028, "RTX 3090, 4090": 24_564, "RTX 5090": 32_607,
    "A100 40 GB": 40_960, "L40S": 46_068, "A100 80 GB, H100": 81_559, "H200": 143_771, "B200": 183_359,
}  # fmt: skip
"""Card -> memory in MiB as its driver reports it; of several cards the least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One model on one GPU, with one slot."""

    gpu: str
    memory_bytes: int
    whole: bool
    n_layers: int
    """On the GPU, as llama.cpp counts them; 0: not even one."""
    n_ctx: int
    """Tokens, at most those the model was trained for; 0 with no layer on the GPU."""


def fit_gpus(info: GgufInfo, gpus: Iterable[tuple[str, int]]) -> list[Fit]:
    """For each (name, bytes): whether the model fits whole, and with which context; else how many layers do."""
    return [_fit(info, name, size) for name, size in gpus]


def common_gpus() -> list[tuple[str, int]]:
    """`COMMON` in bytes."""
    return [(name, size * 2**20) for name, size in COMMON.items()]


def _fit(info: GgufInfo, name: str, size: int) -> Fit:
    config = EngineConfig(n_parallel=1)
    whole = largest_context(info, config, size)
    if whole is not None:
        return Fit(gpu=name, memory_bytes=size, whole=True, n_layers=info.n_layer + 1, n_ctx=whole)
    try:
        plan = plan_fit(info, budget_bytes=size, config=config, on_gpu=True)
    except ModelDoesNotFitError:
        return Fit(gpu=name, memory_bytes=size, whole=False, n_layers=0, n_ctx=0)
    return Fit(gpu=name, memory_bytes=size, whole=False, n_layers=plan.n_gpu_layers, n_ctx=plan.n_ctx)
