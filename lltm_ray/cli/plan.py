"""`lltm-ray plan`: ways to run a model on some GPUs, ranked, each with its reason."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from lltm_ray.cli._output import ERR, OUT, JsonFlag, errors_end_the_command, human_bytes, print_json, print_table
from lltm_ray.cli._sizes import parse_bytes
from lltm_ray.config import EngineConfig, read_environment
from lltm_ray.errors import ConfigError, ModelDoesNotFitError, ModelDownloadError, ModelNotFoundError
from lltm_ray.gpu.host import available_ram_bytes
from lltm_ray.gpu.plan_parts import GIB, NVLINK_BYTES_S, Demand, Machine, Need, Plan, PlanGpu, Shape, Wish
from lltm_ray.gpu.plans import choose
from lltm_ray.gpu.topology import GpuDetail, Pair, Topology, read_topology
from lltm_ray.models.catalog import load_catalog
from lltm_ray.models.gguf import GgufInfo, read_model
from lltm_ray.models.memory import estimate
from lltm_ray.models.resolve import resolve

_COLUMNS = (
    "plan",
    "engines",
    "GPUs each",
    "slots each",
    "layers",
    "memory of an engine",
    "alone",
    "tokens/s",
    "prefill",
)
PLAIN_CACHE_TYPES = {"f32", "f16", "bf16"}
_Model = Annotated[str, typer.Argument(help="tiny, random, a catalogue name that is here, a path, or repo:file.")]
_Streams = Annotated[int, typer.Option(help="Requests that are answered at once, over all engines.")]
_Slot = Annotated[int, typer.Option("--slot-ctx", help="Context of each, in tokens; at most the model's own.")]
_Cache = Annotated[str, typer.Option(help="KV cache type of keys and values, e.g. f16, q8_0.")]
_Gpus = Annotated[int | None, typer.Option(help="GPUs of an imagined machine.", show_default="this machine's")]
_Vram = Annotated[str | None, typer.Option(help="Memory of each, e.g. 16GiB.", show_default="this machine's")]
_Bandwidth = Annotated[float | None, typer.Option(help="Memory bandwidth of each GPU, GB/s.", show_default="by NVML")]
_Tflops = Annotated[float | None, typer.Option(help="Float32 TFLOP/s of each GPU.", show_default="by NVML")]
_Link = Annotated[float | None, typer.Option(help="Between two GPUs, GB/s.", show_default="by NVML, else 15.76")]
_NvLink = Annotated[bool, typer.Option("--nvlink", help="That link is NVLink: a shorter way than PCIe.")]
_Ram = Annotated[str | None, typer.Option(help="The host's memory, e.g. 32GiB.", show_default="what is free here")]
_RamBandwidth = Annotated[float, typer.Option(help="Its bandwidth, GB/s.")]


@errors_end_the_command()
def plan(
    model: _Model,
    *,
    streams: _Streams = 8,
    slot_ctx: _Slot = 4096,
    cache_type: _Cache = "f16",
    gpus: _Gpus = None,
    vram: _Vram = None,
    bandwidth: _Bandwidth = None,
    tflops: _Tflops = None,
    link: _Link = None,
    nvlink: _NvLink = False,
    ram: _Ram = None,
    ram_bandwidth: _RamBandwidth = 40.0,
    as_json: JsonFlag = False,
) -> None:
    """Rank the ways to run a model on this machine's GPUs, or on GPUs that are described, and say why.

    Speeds come from a simple model that was fitted to H200s; elsewhere they are to compare plans by.
    """
    info = _read(model)
    config = EngineConfig(cache_type_k=cache_type, cache_type_v=cache_type)
    found = _found(gpus, vram)
    ram_bytes = parse_bytes("ram", ram) if ram else available_ram_bytes()
    found = replace(found, ram_bytes=ram_bytes, ram_bytes_s=ram_bandwidth * 1e9)
    machine = _given(found, bandwidth, tflops, link, nvlink=nvlink)
    slot_ctx = min(slot_ctx, info.n_ctx_train or slot_ctx)
    wish = Wish(streams=streams, slot_tokens=slot_ctx)
    plans = choose(shape_of(info, config), machine, wish, need_of(info, config, slot_ctx))
    command, settings = up_line(model, plans[0], cache_type)
    if as_json:
        up = {"command": command, "toml": settings} if plans[0].fits else None
        print_json({"machine": asdict(machine), "plans": [asdict(each) for each in plans], "up": up})
        return
    _show(plans, machine, streams)
    if not plans[0].fits:
        best = min(plans, key=lambda each: each.need_bytes - each.budget_bytes)
        remedy = "take a smaller quantization, fewer streams, a smaller --slot-ctx, or --cache-type q8_0"
        raise ModelDoesNotFitError(info.name, best.need_bytes, best.budget_bytes, remedy)
    OUT.print(f"\n{command}", markup=False, soft_wrap=True)
    if settings:
        OUT.print(f"with plan.toml:\n{settings}", markup=False, soft_wrap=True)


def _read(model: str) -> GgufInfo:
    """What a model's file says of itself.

    Raises:
        ModelError: it cannot be read, or only the catalogue knows it, which has neither layers nor heads to plan with.
    """
    try:
        return read_model(resolve(model, cache_dir=read_environment().cache_dir, offline=True).path)
    except ModelDownloadError as error:
        if model not in load_catalog():
            raise
        why = "its file is not here, and the catalogue has no layers and heads to plan with"
        remedy = f"`lltm-ray models pull {model}` first; `lltm-ray models recommend {model} --vram 16GiB` needs no file"
        raise ModelNotFoundError(model, f"{why}: {remedy}") from error


def _found(gpus: int | None, vram: str | None) -> Machine:
    """This machine, or one of so many GPUs."""
    size_bytes = parse_bytes("vram", vram) if vram else 0
    if (gpus is None) != (vram is None) and gpus != 0:
        raise ConfigError("gpus" if gpus else "vram", gpus or vram, "an imagined machine needs both --gpus and --vram")
    return here(read_topology()) if gpus is None else imagined(gpus, size_bytes)


def here(topology: Topology) -> Machine:
    """This machine, linked as its slowest pair is. A GPU in MIG mode is its MIG devices, of unknown speed."""
    gpus = tuple(each for gpu in topology.gpus for each in _parts(gpu) if each.total_bytes)
    slowest = min(topology.pairs, key=_pair_bytes_s, default=None)
    if slowest is None or not _pair_bytes_s(slowest):
        return Machine(gpus=gpus)
    return Machine(gpus=gpus, link_bytes_s=_pair_bytes_s(slowest), is_nvlink=slowest.nvlinks > 0)


def _pair_bytes_s(pair: Pair) -> float:
    return pair.bytes_s or pair.nvlinks * NVLINK_BYTES_S


def _parts(gpu: GpuDetail) -> list[PlanGpu]:
    if gpu.migs:
        return [PlanGpu(total_bytes=mig.total_bytes or 0, free_bytes=mig.free_bytes or 0) for mig in gpu.migs]
    total, free = gpu.total_bytes or 0, gpu.free_bytes or 0
    return [PlanGpu(total_bytes=total, free_bytes=free, bytes_s=gpu.memory_bytes_s, flops=gpu.flops)]


def imagined(gpus: int, vram_bytes: int) -> Machine:
    """So many equal GPUs, all free."""
    if not 0 <= gpus <= 64:
        raise ConfigError("gpus", gpus, "must be from 0 to 64")
    return Machine(gpus=(PlanGpu(total_bytes=vram_bytes, free_bytes=vram_bytes),) * gpus)


def _given(
    machine: Machine, bandwidth: float | None, tflops: float | None, link: float | None, *, nvlink: bool
) -> Machine:
    for name, value in (
        ("bandwidth", bandwidth),
        ("tflops", tflops),
        ("link", link),
        ("ram_bandwidth", machine.ram_bytes_s),
    ):
        if value is not None and not value > 0:
            raise ConfigError(name, value, "must be above 0")
    told: dict[str, Any] = {"bytes_s": bandwidth and bandwidth * 1e9, "flops": tflops and tflops * 1e12}
    told = {name: value for name, value in told.items() if value}
    machine = replace(machine, gpus=tuple(replace(gpu, **told) for gpu in machine.gpus))
    if link:
        machine = replace(machine, link_bytes_s=link * 1e9)
    return replace(machine, is_nvlink=machine.is_nvlink or nvlink)


def shape_of(info: GgufInfo, config: EngineConfig) -> Shape:
    """What decides the model's speed, from its own tensors."""
    whole = sum(tensor.nbytes for tensor in info.tensors)
    experts = sum(tensor.nbytes for tensor in info.tensors if "_exps" in tensor.name)
    tokens = 8192
    kv = estimate(info, n_ctx=tokens, n_parallel=1, n_gpu_layers=0, config=config).kv_bytes
    return Shape(
        n_layer=info.n_layer,
        n_embd=info.n_embd,
        n_vocab=info.n_vocab,
        n_params=info.n_params,
        kv_token_bytes=kv // tokens,
        expert_ratio=experts / whole if whole else 0.0,
        expert_use=info.n_expert_used / info.n_expert if info.n_expert else 1.0,
        is_kv_quantized=not {config.cache_type_k, config.cache_type_v} <= PLAIN_CACHE_TYPES,
    )


def need_of(info: GgufInfo, config: EngineConfig, slot_tokens: int) -> Need:
    """What engines of this model take, as the planner of a fleet counts it."""

    def need(slots: int, gpus: int, layers: int) -> Demand:
        over = replace(config, tensor_split=(1.0,) * gpus if gpus > 1 else ())
        found = estimate(info, n_ctx=slots * slot_tokens, n_parallel=slots, n_gpu_layers=layers, config=over)
        return Demand(
            device_bytes=found.device_bytes,
            host_bytes=found.host_bytes,
            weights_device_bytes=found.weights_device_bytes,
            weights_host_bytes=found.weights_host_bytes,
        )

    return need


def up_line(model: str, best: Plan, cache_type: str) -> tuple[str, str]:
    """The command that starts the fleet, and the settings that have no option there, as TOML."""
    settings = {"cache_type_k": cache_type, "cache_type_v": cache_type} if cache_type != "f16" else {}
    table = "\n".join(["[engine]", *(f'{name} = "{value}"' for name, value in settings.items())]) if settings else ""
    words = ["lltm-ray", "up", *(["--config", "plan.toml"] if table else []), "--model", model]
    words += ["--engines", str(best.engines), "--gpu-share", f"{best.gpu_share:g}"]
    words += ["--n-parallel", str(best.n_parallel), "--ctx", str(best.n_ctx)]
    words += ["--split-mode", best.split_mode] if best.split_mode == "tensor" else []
    return shlex.join(words), table


def _show(plans: tuple[Plan, ...], machine: Machine, streams: int) -> None:
    print_table(_COLUMNS, [_row(each) for each in plans])
    OUT.print()
    for number, each in enumerate(plans, 1):
        OUT.print(f"{number}. {each.title}: {each.why}", markup=False, soft_wrap=True)
    if any(gpu.bytes_s is None for gpu in machine.gpus):
        ERR.print("No speeds: a GPU's memory bandwidth is not known; give --bandwidth.", style="dim", markup=False)
    ERR.print(f"slots each: for {streams} requests at once over all engines (--streams).", style="dim", markup=False)
    ERR.print("alone: tokens/s of one stream; prefill: beside the fastest GPU alone.", style="dim", markup=False)
    if len(machine.gpus) > 1:
        ERR.print("No split by rows: llama.cpp's CUDA backend has none. Tensor: --split-mode tensor.", style="dim")
    link = f"{machine.link_bytes_s / 1e9:.1f} GB/s between GPUs, " if len(machine.gpus) > 1 else ""
    ERR.print(f"Reckoned with {link}{machine.ram_bytes_s / 1e9:.0f} GB/s to host memory.", style="dim", markup=False)


def _row(each: Plan) -> tuple[Any, ...]:
    memory = f"{human_bytes(each.need_bytes)} of {each.budget_bytes / GIB:.1f} GiB{'' if each.fits else ', too much'}"
    figures = (each.stream_tokens_s, each.tokens_s) if each.fits else (None, None)
    return (
        each.title,
        each.engines,
        each.gpu_share,
        each.n_parallel,
        each.n_gpu_layers,
        memory,
        *figures,
        f"{each.prefill_x:.2f}x" if each.prefill_x is not None and each.fits else None,
    )
