"""What plans for GPUs are made from, and what they are: `PlanGpu`, `Machine`, `Shape`, `Demand`, `Wish`, `Plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lltm_ray.errors import ConfigError

LATENCY_S = {"nvlink": 10e-6, "pcie": 20e-6}
"""Of one exchange between two GPUs. NVLink's is measured: a tensor-split step of one stream on two H200s fits 11 us."""
NVLINK_BYTES_S = 25e9
"""Of one NVLink and direction, generations 2 to 4: where NVML counts links but does not tell their speed."""
GIB = 2**30
KINDS = {
    "replicas": "one engine per GPU",
    "shares": "several engines per GPU",
    "layer": "engines over several GPUs, layer by layer",
    "tensor": "engines over several GPUs, each layer divided (experimental in llama.cpp, so never the first choice)",
    "offload": "engines with some of their layers on the CPU",
    "cpu": "one engine on the CPU",
}
"""From the simplest to the last resort, which decides between plans of about the same speed. None splits by rows:
llama.cpp took that out of its CUDA backend (pull request 24216, June 2026), and servers since refuse to start so."""
EXPERIMENTAL = ("tensor",)
"""Only told: not for every architecture, and a layer split holds what they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanGpu:
    """One GPU. None: nobody knows, and plans are ranked by fit alone."""

    total_bytes: int
    free_bytes: int
    bytes_s: float | None = None
    """Of its memory."""
    flops: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to plan with."""

    gpus: tuple[PlanGpu, ...] = ()
    link_bytes_s: float = 15.76e9
    """Between two GPUs, one direction; PCIe 3.0 x16."""
    is_nvlink: bool = False
    ram_bytes: int = 0
    ram_bytes_s: float = 40e9
    """Of the host's memory; two channels of DDR4-2666 have 42.7e9."""

    @property
    def latency_s(self) -> float:
        """Of one exchange between GPUs."""
        return LATENCY_S["nvlink" if self.is_nvlink else "pcie"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of the model decides speed."""

    n_layer: int
    n_embd: int
    n_vocab: int
    n_params: int
    kv_token_bytes: int
    expert_ratio: float = 0.0
    """Part of the weights that are experts."""
    expert_use: float = 1.0
    """Experts used for a token, of all."""
    is_kv_quantized: bool = False
    """Which a tensor split does not take, by llama.cpp's documentation."""

    def read_ratio(self, streams: int) -> float:
        """Part of the weights that a step reads, each stream choosing its experts apart from the others."""
        return 1.0 - self.expert_ratio * float((1.0 - self.expert_use) ** streams)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one engine takes."""

    device_bytes: int
    host_bytes: int
    weights_device_bytes: int
    weights_host_bytes: int


Need = Callable[[int, int, int], Demand]
"""(slots, GPUs of one engine, layers on them as llama.cpp counts: n_layer + 1 is all) -> what it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the fleet shall serve at once."""

    streams: int = 8
    slot_tokens: int = 4096
    """Context of each slot; half of it is taken as filled."""

    def __post_init__(self) -> None:
        for name, least in (("streams", 1), ("slot_tokens", 256)):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"must be {least} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way, and what it comes to. Speeds are None where a bandwidth is not known."""

    kind: str
    """One of `KINDS`."""
    engines: int
    gpus_per_engine: int
    gpu_share: float
    n_parallel: int
    """Slots of one engine."""
    n_ctx: int
    """Tokens of one engine."""
    n_gpu_layers: int
    split_mode: str
    groups: tuple[tuple[int, ...], ...]
    """Of each engine, the places of its GPUs in the machine."""
    tensor_splits: tuple[tuple[float, ...], ...]
    """Of each engine: in proportion to its GPUs' free memory, even for `tensor`; empty where engines have one GPU."""
    need_bytes: int
    """Of one engine, on its devices; of the host for `cpu`."""
    budget_bytes: int
    """What the engine with the least may take there."""
    fits: bool
    stream_tokens_s: float | None = None
    """Decoding of one stream that is alone, on the slowest engine."""
    tokens_s: float | None = None
    """Decoding of all streams together."""
    prefill_x: float | None = None
    """Prompt tokens a second of the fleet, as a multiple of the fastest GPU with all layers on it."""
    prefill_tokens_s: float | None = None
    is_sampling_bound: bool = False
    """Most of its time goes to sampling, not to the GPU."""
    why: str = ""

    @property
    def title(self) -> str:
        """E.g. `2 x 1 GPU`, `1 x 2 GPUs (tensor)`, `4 x 0.5 GPU`, `CPU`."""
        if self.kind == "cpu":
            return "CPU"
        split = {"layer": " (layer)", "tensor": " (tensor)", "offload": " + CPU"}.get(self.kind, "")
        return f"{self.engines} x {self.gpu_share:g} GPU{'s' if self.gpu_share > 1 else ''}{split}"
