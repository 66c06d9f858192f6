"""From a fleet's settings and an actor's share to a server that can be started on this node.

`plan_launch` is where the siblings meet: the model's file (`models`), the share's memory (`gpu`), the executable and
its arguments (`llamacpp`). It blocks (it may download a model): call it from a thread.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

from lltm_ray.config import (
    LLAMA_CPP_SIMILARITY_RATIO,
    EngineConfig,
    Environment,
    FleetConfig,
    LoraAdapter,
    read_environment,
)
from lltm_ray.errors import PlacementError
from lltm_ray.gpu.host import available_ram_bytes, usable_cores
from lltm_ray.gpu.nvml import read_inventory, visible
from lltm_ray.gpu.shares import memory_budget
from lltm_ray.llamacpp.binary import find_server
from lltm_ray.llamacpp.command import build_args
from lltm_ray.llamacpp.process import ServerSpec
from lltm_ray.llamacpp.slot_folder import OwnedFolder, SlotFolder, own_folder, sweep_folders
from lltm_ray.models.gguf import read_model, shard_paths
from lltm_ray.models.memory import MemoryPlan, plan_fit
from lltm_ray.models.resolve import ResolvedModel, naming_the_draft, resolve
from lltm_ray.records import Adapter, GpuInfo, ModelInfo, ModelState

Progress = Callable[[str, int, int], None]

LLAMA_CPP_CACHE_RAM_MIB = 8192
"""`--cache-ram`'s own default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine is told by whoever made it; the same after every restart."""

    name: str
    fleet: FleetConfig
    run_id: str
    """Tells this run of the fleet from earlier ones on the same machine."""
    share: float
    """GPUs; 0 for none."""
    engines_on_node: int
    """Engines of this fleet on the node, which share its cores."""
    gateway_node_id: str | None
    """Node of the only gateway; None for a fleet without one, or with gateways that are not ours."""
    exposed: bool = False
    """Gateways may be on any node (Ray Serve)."""
    starts_itself: bool = False
    """Nobody waits for it: it tries until it stands, as after a restart by Ray."""

    def is_local(self, node_id: str) -> bool:
        """Whether nobody on another node needs the server of an engine on this one: then it binds loopback."""
        return not self.exposed and self.gateway_node_id in (None, node_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A server ready to be started, and what was decided for it."""

    server: ServerSpec
    model: ResolvedModel
    plan: MemoryPlan
    served_name: str
    gpus: tuple[GpuInfo, ...]
    cache_ram_tokens: int
    """What the server's host-memory prompt cache has room for."""
    slot_similarity_ratio: float
    """The server's `--slot-prompt-similarity`."""
    slots: OwnedFolder | None = None
    """Where its slots are saved, where nobody chose a folder; removed with the engine."""
    slot_folder: str = ""
    """The same, or the folder that somebody chose; empty where none can be saved."""

    @property
    def detail(self) -> str:
        """One line on what was chosen to fit."""
        return "; ".join(self.plan.shrunk)


def plan_launch(spec: EngineSpec, *, host: str, progress: Progress | None = None) -> Launch:
    """Resolve the model, fit it into the share, and write the command line for a server bound to `host`.

    Raises:
        ModelError: missing, broken, or too big for the share.
        ServerBinaryError: no usable llama-server.
        PlacementError: a GPU share was given but no GPU is visible here.
    """
    environment = read_environment()
    find = partial(resolve, cache_dir=environment.cache_dir, offline=environment.hf_offline, progress=progress)
    spec, model = _with_draft(spec, find), find(spec.fleet.model)
    gpus = _own_gpus(spec.share)
    engine = _by_slot_rule(spec, _as_neighbour(spec))
    plan = plan_fit(
        read_model(model.path),
        budget_bytes=memory_for(spec, engine, gpus),
        config=replace(engine, tensor_split=_devices_used(engine, len(gpus))),
        on_gpu=bool(gpus),
    )
    served_name = spec.fleet.served_name or model.name
    slots = _own_slots(spec, environment)
    engine = replace(engine, slot_save_path=str(slots.path)) if slots else engine
    try:
        own = replace(spec, fleet=replace(spec.fleet, engine=engine))
        server = _server(own, environment, model.path, plan, served_name, host)
    except BaseException:
        if slots:
            slots.remove()
        raise
    return Launch(
        server=server,
        model=model,
        plan=plan,
        served_name=served_name,
        gpus=gpus,
        cache_ram_tokens=_cache_ram_tokens(engine.cache_ram_mib or 0, plan),
        slot_similarity_ratio=engine.slot_similarity_ratio,
        slots=slots,
        slot_folder=engine.slot_save_path or "",
    )


def _with_draft(spec: EngineSpec, find: Callable[[str], ResolvedModel]) -> EngineSpec:
    """The same engine, its draft model named by the file.

    Raises:
        ModelNotFoundError: no such draft; it names the setting, for there are two models.
    """
    engine = spec.fleet.engine
    if engine.model_draft is None:
        return spec
    with naming_the_draft(engine.model_draft):
        path = find(engine.model_draft).path
    engine = replace(engine, model_draft=str(path))
    return replace(spec, fleet=replace(spec.fleet, engine=engine))


def slot_seal(engine: EngineConfig, model: Path, executable: str) -> str:
    """Equal for engines that can restore each other's slots without a doubt.

    llama.cpp refuses a file of another shape, but takes one of other weights. What a share had shrunk, and how a node's
    cores were divided, does not matter to it.

    Args:
        engine: the settings as they were given.
        model: its file, or the first shard; another path, size or time of change makes it another one.
        executable: whose server it is.
    """
    seen = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in shard_paths(model)]
    facts = (seen, executable, engine)
    return blake2b(repr(facts).encode("utf-8"), digest_size=16).hexdigest()


def _cache_ram_tokens(cache_ram_mib: int, plan: MemoryPlan) -> int:
    """Tokens in the host-memory prompt cache: each takes there what it takes in a slot. -1 MiB is no limit."""
    kv_bytes = plan.estimate.kv_device_bytes + plan.estimate.kv_host_bytes
    if cache_ram_mib < 0 or not kv_bytes:
        return 2**31
    return cache_ram_mib * 2**20 * plan.n_ctx // kv_bytes


def adapters_of(engine: EngineConfig) -> tuple[Adapter, ...]:
    """What requests may choose from, in the order in which llama-server numbers them."""
    return tuple(Adapter(name=each.label, scale=each.scale, path=each.path) for each in engine.lora)


def with_adapters(spec: EngineSpec, adapters: tuple[Adapter, ...]) -> EngineSpec:
    """An engine's part with these adapters instead of its settings'.

    Raises:
        ConfigError: its other settings do not go with adapters.
    """
    lora = tuple(LoraAdapter(path=each.path, scale=each.scale, name=each.name) for each in adapters)
    return replace(spec, fleet=replace(spec.fleet, engine=replace(spec.fleet.engine, lora=lora)))


def models_of(config: FleetConfig) -> tuple[ModelInfo, ...]:
    """What the table lists of each model before anything is known of its engines."""
    return tuple(
        ModelInfo(
            name=model.name,
            state=ModelState.COLD,
            min_engines=model.min_engines or 0,
            max_engines=model.max_engines or model.engines,
            is_elastic=config.is_elastic,
            adapters=adapters_of(model.engine or config.engine),
        )
        for model in config.served()
    )


def _server(
    spec: EngineSpec, environment: Environment, model_path: Path, plan: MemoryPlan, alias: str, host: str
) -> ServerSpec:
    fleet = spec.fleet
    binary = find_server(fleet.llama_server, environment)
    api_key = secrets.token_hex(24)
    key_file = _write_key(environment.run_dir(fleet.name, spec.run_id) / f"{spec.name}.key", api_key)

    def argv(port: int) -> list[str]:
        args = build_args(
            fleet.engine,
            model_path=str(model_path),
            host=host,
            port=port,
            alias=alias,
            api_key_file=str(key_file),
            n_gpu_layers=plan.n_gpu_layers,
            n_ctx=plan.n_ctx,
            n_parallel=plan.n_parallel,
        )
        return [*binary.argv, *args]

    logs = Path(fleet.log_dir) if fleet.log_dir else environment.cache_dir / "logs" / fleet.name
    return ServerSpec(
        name=spec.name,
        argv=argv,
        host=host,
        model_path=str(model_path),
        api_key=api_key,
        key_file=key_file,
        log_path=logs / f"{spec.name}.log",
        start_timeout_s=fleet.start_timeout_s,
        restart_limit=fleet.restart_limit,
    )


def _own_slots(spec: EngineSpec, environment: Environment) -> OwnedFolder | None:
    """A private folder for the slots of a server that has some and was given none; what dead runs left is removed."""
    engine = spec.fleet.engine
    if engine.slot_save_path and Path(engine.slot_save_path).is_dir():
        SlotFolder(engine.slot_save_path).sweep()
    if engine.slot_save_path or engine.embeddings or engine.reranking or "--slot-save-path" in engine.extra_args:
        return None
    sweep_folders(environment.cache_dir / "run")
    return own_folder(environment.run_dir(spec.fleet.name, spec.run_id) / "slots", spec.name)


def _as_neighbour(spec: EngineSpec) -> EngineConfig:
    """What llama.cpp would take as if it were alone on the node, divided among the engines there.

    Its CPU threads spin while they wait for each other: several servers that each take all cores starve one another
    for seconds. Its host-memory prompt cache is 8 GiB a server by default: a few servers would fill a small machine.
    That cache takes one adapter's keys and values for another's, so there is none where requests choose adapters.
    """
    engine = spec.fleet.engine
    if engine.lora:
        engine = replace(engine, cache_ram_mib=0)
    if engine.cache_ram_mib is None:
        part_mib = available_ram_bytes() // (8 * spec.engines_on_node) // 2**20
        engine = replace(engine, cache_ram_mib=min(LLAMA_CPP_CACHE_RAM_MIB, part_mib))
    if engine.n_threads is None and not spec.share:
        engine = replace(engine, n_threads=max(1, usable_cores() // spec.engines_on_node))
    return engine


def _by_slot_rule(spec: EngineSpec, engine: EngineConfig) -> EngineConfig:
    """Our own rule is for requests that name their slot: where none do, slots are better taken by llama.cpp's."""
    gateway = spec.fleet.gateway
    pins = spec.exposed if gateway is None else gateway.policy == "residency"
    if pins or engine.slot_prompt_similarity is not None:
        return engine
    return replace(engine, slot_prompt_similarity=LLAMA_CPP_SIMILARITY_RATIO)


def _own_gpus(share: float) -> tuple[GpuInfo, ...]:
    """The devices Ray gave to this actor; Ray's own isolation set CUDA_VISIBLE_DEVICES."""
    if not share:
        return ()
    inventory = read_inventory()
    own = visible(inventory, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not own:
        raise PlacementError(f"{share:g} GPU", f"none: {inventory.reason or 'no device is visible to this actor'}")
    return own


def memory_for(spec: EngineSpec, engine: EngineConfig, gpus: tuple[GpuInfo, ...]) -> int | None:
    """Bytes an engine may plan with: its part of its devices, or of its node's memory, less what else it loads.

    None where nobody knows: a GPU that shares the host's memory tells no size of its own.
    """
    limit = spec.fleet.memory_limit_bytes
    if any(not gpu.total_bytes for gpu in gpus):
        return limit
    if gpus:
        part = spec.share if spec.share < 1 else 1.0
        budget = _jointly(engine, [memory_budget(gpu.total_bytes, gpu.free_bytes, part) for gpu in gpus])
    else:
        budget = available_ram_bytes() // spec.engines_on_node - (engine.cache_ram_mib or 0) * 2**20
    return max(0, min(budget, limit or budget) - _side_files_bytes(engine))


def _jointly(engine: EngineConfig, budgets: list[int]) -> int:
    """What several devices hold together under the engine's way of splitting.

    Without `tensor_split` llama.cpp divides layers by free memory, so they fill up together, and tensors evenly
    (`llama_meta_device_get_split_state` in llama-model.cpp); with it, the device that is full first bounds them all;
    without splitting there is but one.
    """
    if engine.split_mode == "none":
        return budgets[min(engine.main_gpu, len(budgets) - 1)]
    parts = engine.tensor_split[: len(budgets)]
    if not any(parts):
        return len(budgets) * min(budgets) if engine.split_mode == "tensor" else sum(budgets)
    return min(int(budget * sum(parts) / part) for budget, part in zip(budgets, parts, strict=False) if part)


def _devices_used(engine: EngineConfig, gpus: int) -> tuple[float, ...]:
    """One part for each device that will hold buffers: the planner counts them."""
    if engine.split_mode == "none" or gpus < 2:
        return ()
    return engine.tensor_split[:gpus] or (1.0,) * gpus


def _side_files_bytes(engine: EngineConfig) -> int:
    """Files that are loaded beside the model; a missing one is llama-server's to complain about."""
    paths = [engine.mmproj, engine.model_draft, *(adapter.path for adapter in engine.lora)]
    return sum(Path(path).stat().st_size for path in paths if path and Path(path).exists())


def _write_key(path: Path, api_key: str) -> Path:
    """By file, readable by its owner only: an argument or variable would show in the process list."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(api_key + "\n")
    return path
