"""From a machine and a model to a `FleetConfig`: values by preset or computed, engines by what fits which GPUs.

GPUs are judged by what NVML measured (memory, capability, number), never by their names.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lltm_ray.config import EngineConfig, FleetConfig, build, merge
from lltm_ray.errors import ConfigError, ModelDoesNotFitError
from lltm_ray.gpu.shares import memory_budget
from lltm_ray.integrations.kaggle.machine import Machine, detect, is_mig
from lltm_ray.models.catalog import load_catalog
from lltm_ray.models.embedded import EMBEDDED, embedded_path
from lltm_ray.models.gguf import read_model
from lltm_ray.models.memory import plan_fit
from lltm_ray.models.recommend import guess_memory
from lltm_ray.records import GpuInfo

AUTO = "auto"
SPLITS = ("equal", "balanced")
_GIB = 2**30
_SLOT_GIB = 4
"""Memory of an engine for each of its slots: reproduces the slots of the presets for T4, 3090, A100, H100 and H200."""
_LARGE_BATCHES = (8, 0)
"""From Ampere on, and with 32 GiB, batches are as in the presets for such GPUs; else llama.cpp's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Values for one kind of machine; `presets.toml`'s header says what each is."""

    name: str
    about: str = ""
    gpus: int = 1
    n_ctx: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_parallel: int = 4

    @property
    def engine(self) -> dict[str, Any]:
        """Fields of `EngineConfig`."""
        own = {name: getattr(self, name) for name in ("n_ctx", "n_batch", "n_ubatch", "n_parallel")}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A preset, and how the machine's GPUs are divided among engines."""

    preset: Preset
    engines: int
    gpu_share: float
    why: str
    """One clause for people."""

    def __str__(self) -> str:
        where = f"{self.gpu_share:g} GPU{'s' if self.gpu_share > 1 else ''} each" if self.gpu_share else "on the CPU"
        slots = f"{self.preset.n_parallel} slot{'s' if self.preset.n_parallel > 1 else ''} each"
        return f"{self.engines} engine{'s' if self.engines > 1 else ''}, {where}, {slots}: {self.why}"


@cache
def load_presets() -> Mapping[str, Preset]:
    """All presets by name; `auto` is not among them, it is computed."""
    text = resources.files(__package__).joinpath("presets.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    return MappingProxyType({name: build(Preset, {**each, "name": name}, f"{name}.") for name, each in raw.items()})


def build_fleet(
    preset: str = AUTO,
    *,
    model: str = "tiny",
    machine: Machine | None = None,
    split: str | Sequence[float] | None = None,
    **settings: Any,
) -> FleetConfig:
    """A fleet that suits this machine.

    Args:
        preset: `auto`, or a name of `load_presets`.
        model: as `FleetConfig.model`; a file that the service has mounted is used where it lies.
        machine: None: measured now.
        split: one engine over all GPUs, divided as `tensor_split` says. None: an engine a GPU where the model fits one,
            else as few GPUs an engine as it fits, divided by free memory.
        settings: fields of `FleetConfig` that win over all of this.

    Raises:
        ConfigError: no such preset, one for more GPUs than there are, a wrong split or setting.
        ModelError: a file that is no usable GGUF.
    """
    machine = detect(look_online=False) if machine is None else machine
    choice = choose(preset, model=model, machine=machine, split=split)
    values: dict[str, Any] = {
        "model": mounted(model, machine) or model,
        "engines": choice.engines,
        "gpu_share": choice.gpu_share,
        "engine": choice.preset.engine,
    }
    if split is not None and machine.gpus:
        values["engine"]["tensor_split"] = tensor_split(split, machine.gpus[: int(choice.gpu_share)])
    if machine.kept_limit_bytes is not None:
        values["telemetry"] = {"segment_dir": str(machine.kept_dir / "lltm_ray" / "telemetry")}
    config: FleetConfig = build(FleetConfig, merge(values, settings))
    return config


def choose(
    preset: str = AUTO, *, model: str = "tiny", machine: Machine, split: str | Sequence[float] | None = None
) -> Choice:
    """What `build_fleet` would start, and why; arguments and errors as there."""
    known = load_presets()
    if preset != AUTO and preset not in known:
        raise ConfigError("preset", preset, f"must be {AUTO} or one of {', '.join(known)}")
    chosen = None if preset == AUTO else known[preset]
    gpus = machine.gpus if chosen is None else machine.gpus[: chosen.gpus]
    if chosen is not None and len(gpus) < chosen.gpus:
        why = f"is for {chosen.gpus} GPUs, this machine has {len(gpus)}: use {AUTO}"
        raise ConfigError("preset", preset, why)
    if not gpus:
        why = "its preset uses none" if machine.gpus else machine.gpu_reason or "there is no GPU"
        return Choice(preset=chosen or compute((), machine.cores), engines=1, gpu_share=0.0, why=why)
    single = chosen or compute(gpus[:1], machine.cores)
    width, why = (len(gpus), "split as asked") if split is not None else _width(gpus, single, model, machine)
    if width > 1 and is_mig(gpus):
        raise ConfigError("split", split, "a process gets one MIG device: leave split out, or turn MIG mode off")
    values = chosen or compute(gpus[:width], machine.cores)
    return Choice(preset=values, engines=len(gpus) // width, gpu_share=float(width), why=why)


def compute(gpus: Sequence[GpuInfo], cores: int) -> Preset:
    """Values for an engine over these GPUs: slots by memory, batches by memory and capability.

    Context and layers are left to the planner, which knows the model; flash attention to llama.cpp.
    """
    memory = sum(gpu.total_bytes for gpu in gpus)
    if not gpus:
        return Preset(name=AUTO, gpus=0, n_parallel=max(1, min(4, cores // 2)))
    if not all(gpu.total_bytes for gpu in gpus):  # memory shared with the host: nobody knows
        return Preset(name=AUTO, gpus=len(gpus))
    slots = 2 ** max(0, (memory // (_SLOT_GIB * _GIB)).bit_length() - 1)
    values = Preset(name=AUTO, gpus=len(gpus), n_parallel=min(slots, 64))
    if memory >= 32 * _GIB and min(gpu.compute_capability for gpu in gpus) >= _LARGE_BATCHES:
        return replace(values, n_batch=4096, n_ubatch=1024)
    if memory < 8 * _GIB:
        return replace(values, n_batch=1024, n_ubatch=256)
    return values


def tensor_split(how: str | Sequence[float], gpus: Sequence[GpuInfo]) -> tuple[float, ...]:
    """Parts for each GPU, as llama.cpp's `--tensor-split` takes them; empty for fewer than two.

    Args:
        how: `equal`; `balanced`, by free memory, which is what llama.cpp does unasked; or a number for each GPU.
        gpus: the engine's own.

    Raises:
        ConfigError: another word, a wrong number of parts, or parts that are negative or all 0.
    """
    if isinstance(how, str) and how not in SPLITS:
        raise ConfigError("split", how, f"must be {' or '.join(SPLITS)}, or a number for each GPU")
    if isinstance(how, str):
        known = how == "balanced" and all(gpu.free_bytes for gpu in gpus)
        total = sum(gpu.free_bytes for gpu in gpus)
        parts = tuple(round(gpu.free_bytes / total, 4) if known else 1.0 for gpu in gpus)
    else:
        parts = tuple(float(part) for part in how)
        if len(parts) != len(gpus):
            raise ConfigError("split", parts, f"has {len(parts)} parts for {len(gpus)} GPUs")
        if not any(parts) or any(part < 0 for part in parts):
            raise ConfigError("split", parts, "parts must be 0 or more, and one of them more")
    return parts if len(parts) > 1 else ()


def mounted(model: str, machine: Machine) -> str:
    """Path of a model that the service has mounted, by its catalogue name, file name or `repo:file`; else empty."""
    entry = load_catalog().get(model)
    file = entry.file if entry else model.partition(":")[2].partition("@")[0] or model
    file = file.rpartition("/")[2]
    if not machine.input_dirs or not file.endswith(".gguf") or Path(model).is_file():
        return ""
    found = machine.find_model(file)
    return str(found) if found else ""


def _width(gpus: Sequence[GpuInfo], values: Preset, model: str, machine: Machine) -> tuple[int, str]:
    """The fewest GPUs that hold the model, and why. The smallest are counted: Ray chooses which an engine gets."""
    by_size = sorted(gpus, key=lambda gpu: gpu.free_bytes)
    file = _file_of(model, machine)
    for width in range(1, len(gpus) + 1):
        if is_mig(gpus) and width > 1:
            return 1, "the model is larger than a MIG device, the rest runs on the CPU"
        fits = _fits(model, file, by_size[:width], values)
        if fits is None:
            return 1, "the model's size is not known before it is here"
        if fits:
            return width, "the model fits one GPU" if width == 1 else f"the model needs {width} GPUs"
    return len(gpus), "the model is larger than all GPUs, the rest runs on the CPU"


def _fits(model: str, file: Path | None, gpus: Sequence[GpuInfo], values: Preset) -> bool | None:
    """Whether all layers fit with a comfortable context; None where nobody knows."""
    if not all(gpu.total_bytes for gpu in gpus):
        return True
    budget = sum(memory_budget(gpu.total_bytes, gpu.free_bytes, 1.0) for gpu in gpus)
    if model == "random":
        return budget >= _GIB
    if file is None:
        entry = load_catalog().get(model)
        return guess_memory(entry, len(gpus)) <= budget if entry else None
    parts = (1.0,) * len(gpus) if len(gpus) > 1 else ()
    info = read_model(file)
    try:
        plan = plan_fit(
            info, budget_bytes=budget, config=EngineConfig(tensor_split=parts, **values.engine), on_gpu=True
        )
    except ModelDoesNotFitError:
        return False
    return plan.n_gpu_layers > info.n_layer


def _file_of(model: str, machine: Machine) -> Path | None:
    """The model's file, where it is known without a download."""
    if model in EMBEDDED:
        return embedded_path(model)
    path = Path(mounted(model, machine) or model).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None
