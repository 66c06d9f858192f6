"""Every setting, as frozen dataclasses that check themselves; TOML in; the environment read in one function.

`FleetConfig` holds an `EngineConfig` (one llama-server) and a `GatewayConfig` (the HTTP front).
Field docstrings give the unit, the llama-server flag, and the reason of the default.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from lltm_ray.errors import ConfigError

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
SPLIT_MODES = ("none", "layer", "row", "tensor")
POOLING = ("none", "mean", "cls", "last", "rank")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def _check(ok: bool, name: str, value: Any, why: str) -> None:
    if not ok:
        raise ConfigError(name, value, why)


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    _check(value is None or value in choices, name, value, f"must be one of {', '.join(choices)}")


def _check_range(settings: Any, **limits: tuple[float, float]) -> None:
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        _check(value is None or low <= value <= high, name, value, f"must be from {low} to {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """A GGUF LoRA adapter and its scale (`--lora-scaled`)."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One llama-server. Every field becomes a flag of it; `None` leaves the choice to the planner or to llama.cpp."""

    n_ctx: int | None = None
    """Tokens of KV cache, shared by all slots (`--ctx-size`). None: the largest that fits the share, at most the
    model's trained context for each slot."""
    n_parallel: int = 4
    """Slots (`--parallel`); 4 is llama-server's own automatic choice."""
    n_batch: int = 2048
    """Logical batch in tokens (`--batch-size`)."""
    n_ubatch: int = 512
    """Physical batch in tokens (`--ubatch-size`); sizes the compute buffer."""
    n_gpu_layers: int | None = None
    """Layers on the GPU (`--n-gpu-layers`). None: as many as fit the share."""
    split_mode: str = "layer"
    """How a model is split over several GPUs (`--split-mode none|layer|row|tensor`)."""
    tensor_split: tuple[float, ...] = ()
    """Proportions per GPU (`--tensor-split`)."""
    main_gpu: int = 0
    """GPU for small tensors when not splitting (`--main-gpu`), counted among the engine's own GPUs."""
    flash_attn: str = "auto"
    """`--flash-attn on|off|auto`."""
    cache_type_k: str = "f16"
    """KV cache type of keys (`--cache-type-k`)."""
    cache_type_v: str = "f16"
    """KV cache type of values (`--cache-type-v`); a quantized type needs flash attention."""
    kv_unified: bool = False
    """One KV buffer for all slots (`--kv-unified`); off, so that each slot owns n_ctx / n_parallel."""
    cache_ram_mib: int | None = None
    """Host-memory prompt cache in MiB (`--cache-ram`); 0 turns it off, which also keeps tenants apart. None: an eighth
    of the node's free memory, divided among its engines, at most llama.cpp's own 8192."""
    cache_reuse: int | None = None
    """Smallest chunk in tokens to reuse by KV shifting (`--cache-reuse`)."""
    swa_full: bool = False
    """Full-size cache for sliding-window layers (`--swa-full`)."""
    context_shift: bool = False
    """Shift the context when it is full instead of ending (`--context-shift`)."""
    slot_prompt_similarity: float | None = None
    """How similar a prompt must be to reuse a slot, 0..1 (`--slot-prompt-similarity`)."""
    n_threads: int | None = None
    """CPU threads for decode (`--threads`). None: on a GPU llama.cpp's choice, else the node's cores divided among its
    engines."""
    n_threads_batch: int | None = None
    """CPU threads for prefill (`--threads-batch`)."""
    n_threads_http: int | None = None
    """HTTP threads (`--threads-http`). None: more than twice the slots, so that /health answers under full load."""
    use_mmap: bool = True
    """Map the model file (`--load-mode mmap`, else `none`)."""
    use_mlock: bool = False
    """Lock the model in memory (`--load-mode mlock`)."""
    lora: tuple[LoraAdapter, ...] = ()
    """Adapters loaded at start (`--lora-scaled`)."""
    mmproj: str | None = None
    """Multimodal projector GGUF (`--mmproj`)."""
    model_draft: str | None = None
    """Draft model GGUF for speculative decoding (`--spec-draft-model`)."""
    draft_max: int | None = None
    """Most drafted tokens (`--spec-draft-n-max`)."""
    draft_min: int | None = None
    """Fewest drafted tokens (`--spec-draft-n-min`)."""
    draft_p_min: float | None = None
    """Least probability to go on drafting, 0..1 (`--spec-draft-p-min`)."""
    n_gpu_layers_draft: int | None = None
    """Draft layers on the GPU (`--spec-draft-ngl`)."""
    embeddings: bool = False
    """Serve embeddings (`--embeddings`)."""
    reranking: bool = False
    """Serve reranking (`--reranking`)."""
    pooling: str | None = None
    """`--pooling none|mean|cls|last|rank`."""
    chat_template: str | None = None
    """Template text or a built-in name (`--chat-template`)."""
    jinja: bool = True
    """Use the model's Jinja template (`--jinja`); tools need it."""
    reasoning_format: str = "auto"
    """Where thinking goes (`--reasoning-format none|deepseek|deepseek-legacy|auto`)."""
    rope_freq_base: float | None = None
    """`--rope-freq-base`."""
    rope_freq_scale: float | None = None
    """`--rope-freq-scale`."""
    slot_save_path: str | None = None
    """Folder for saved slots (`--slot-save-path`)."""
    sleep_idle_s: int | None = None
    """Unload after so many idle seconds (`--sleep-idle-seconds`)."""
    warmup: bool = True
    """Run once before serving (`--warmup`)."""
    extra_args: tuple[str, ...] = ()
    """Further llama-server arguments, as they are; the embedded engine refuses those it does not know."""

    def __post_init__(self) -> None:
        _check_range(
            self,
            n_ctx=(8, 2**31),
            n_parallel=(1, 1024),
            n_batch=(1, 2**20),
            n_ubatch=(1, 2**20),
            n_gpu_layers=(0, 100_000),
            main_gpu=(0, 127),
            cache_ram_mib=(-1, 2**31),
            n_threads=(1, 4096),
            n_threads_batch=(1, 4096),
            n_threads_http=(1, 65_536),
            slot_prompt_similarity=(0, 1),
            draft_p_min=(0, 1),
            draft_max=(0, 1024),
            draft_min=(0, 1024),
            sleep_idle_s=(1, 2**31),
        )
        _check_choice("split_mode", self.split_mode, SPLIT_MODES)
        _check_choice("flash_attn", self.flash_attn, ("on", "off", "auto"))
        _check_choice("cache_type_k", self.cache_type_k, CACHE_TYPES)
        _check_choice("cache_type_v", self.cache_type_v, CACHE_TYPES)
        _check_choice("pooling", self.pooling, POOLING)
        _check_choice("reasoning_format", self.reasoning_format, ("none", "deepseek", "deepseek-legacy", "auto"))
        quantized_v = self.cache_type_v not in ("f32", "f16", "bf16")
        _check(
            not (quantized_v and self.flash_attn == "off"),
            "cache_type_v",
            self.cache_type_v,
            "a quantized V cache needs flash_attn on or auto",
        )
        _check(all(part >= 0 for part in self.tensor_split), "tensor_split", self.tensor_split, "parts must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The HTTP front."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs an API key."""
    port: int = 8000
    """0 takes a free one."""
    api_key_file: str | None = None
    """File with one API key a line, read when the gateway starts."""
    max_body_bytes: int = 16 * 2**20
    """Largest request body; 16 MiB lets a few images through. A server takes many times a text's size to read it."""
    max_header_bytes: int = 64 * 2**10
    """Largest request head."""
    queue_limit: int = 256
    """Requests that may wait for a slot of one model; the next one gets 429."""
    queue_timeout_s: float = 60.0
    """Longest wait for a slot."""
    request_timeout_s: float = 3600.0
    """Longest life of one request, first byte to last."""
    max_attempts: int = 3
    """Engines tried for one request before its first byte."""
    connect_timeout_s: float = 2.0
    """Per attempt, to reach an engine's socket."""
    drain_timeout_s: float = 30.0
    """How long running requests may finish at shutdown."""

    def __post_init__(self) -> None:
        _check_range(
            self,
            port=(0, 65_535),
            max_body_bytes=(1, 2**40),
            max_header_bytes=(1024, 2**24),
            queue_limit=(0, 10**7),
            queue_timeout_s=(0, 10**6),
            request_timeout_s=(0.001, 10**7),
            max_attempts=(1, 100),
            connect_timeout_s=(0.001, 600),
            drain_timeout_s=(0, 10**5),
        )
        _check(bool(self.host), "host", self.host, "must be an address")
        _check(
            self.is_loopback or self.api_key_file is not None,
            "host",
            self.host,
            "a public address needs api_key_file (--api-key-file), or bind 127.0.0.1",
        )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """A fleet: how many engines of which model, on which shares, behind which gateway."""

    name: str = "default"
    """Fleets of different names live side by side on one Ray cluster."""
    model: str = "tiny"
    """`tiny`, a catalogue name, a path, or `repo:file[@revision]`."""
    served_name: str | None = None
    """What clients write into `model`. None: the catalogue name, or the file's stem."""
    engines: int = 1
    gpu_share: float | None = None
    """GPUs per engine: 0 is CPU only, 0.5 half a GPU, 2 two whole ones. None: 1 where the cluster has GPUs, else 0."""
    cpu_share: float | None = None
    """Ray CPUs per engine. None: 0 on a GPU; without one 1, or what the cluster's CPUs divide into."""
    memory_limit_bytes: int | None = None
    """Upper bound of the memory an engine may plan with, whatever its share has free."""
    llama_server: str | None = None
    """Path of llama-server. None: LLAMA_SERVER_PATH, PATH, our cache, then the embedded engine."""
    start_timeout_s: float = 600.0
    """Deadline for a server to load its model."""
    restart_limit: int = 5
    """Failed restarts in a row after which an engine is left `failed`."""
    drain_timeout_s: float = 30.0
    """How long running requests may finish before an engine is stopped."""
    log_dir: str | None = None
    """Where servers log. None: `<cache>/logs/<fleet>`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    gateway: GatewayConfig | None = field(default_factory=GatewayConfig)
    """None: no HTTP front, the driver API only."""

    def __post_init__(self) -> None:
        _check(bool(_NAME.match(self.name)), "name", self.name, "letters, digits, '.', '_', '-'; at most 63")
        _check(bool(self.model), "model", self.model, "must name a model")
        _check_range(
            self,
            engines=(1, 100_000),
            gpu_share=(0, 1024),
            cpu_share=(0, 4096),
            memory_limit_bytes=(1, 2**50),
            start_timeout_s=(0.1, 10**6),
            restart_limit=(0, 10**6),
            drain_timeout_s=(0, 10**5),
        )
        share = self.gpu_share or 0.0
        _check(share <= 1 or share == int(share), "gpu_share", share, "above 1 it must be a whole number of GPUs")

    def with_absolute_paths(self) -> Self:
        """The same settings, with every relative path as it is meant in this process's folder."""
        engine, gateway = self.engine, self.gateway
        engine = replace(
            engine,
            lora=tuple(replace(adapter, path=str(_absolute(adapter.path))) for adapter in engine.lora),
            mmproj=_absolute(engine.mmproj),
            model_draft=_absolute(engine.model_draft),
            slot_save_path=_absolute(engine.slot_save_path),
        )
        if gateway is not None:
            gateway = replace(gateway, api_key_file=_absolute(gateway.api_key_file))
        model = str(_absolute(self.model)) if Path(self.model).expanduser().is_file() else self.model
        server = self.llama_server if self.llama_server == "embedded" else _absolute(self.llama_server)
        log_dir = _absolute(self.log_dir)
        return replace(self, model=model, llama_server=server, log_dir=log_dir, engine=engine, gateway=gateway)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read a TOML file with the fields above at its top level and tables `[engine]` and `[gateway]`.

        Args:
            path: the file.
            overrides: fields that win over the file; nested ones as dictionaries.

        Raises:
            ConfigError: unreadable, not TOML, an unknown field, or a wrong value.
        """
        try:
            raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError("config", str(path), f"cannot be read: {error}") from error
        config: Self = build(cls, merge(raw, overrides))
        return config


def _absolute(path: str | None) -> str | None:
    """From this process's folder: actors run in another one."""
    return None if path is None else str(Path(path).expanduser().absolute())


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, tables merged field by field."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def build(cls: type[Any], raw: Mapping[str, Any], where: str = "") -> Any:
    """Make a settings dataclass from plain data, naming any field that is unknown or of a wrong type."""
    hints = get_type_hints(cls)
    known = {item.name for item in fields(cls)}
    values = {}
    for name, value in raw.items():
        near = " or ".join(difflib.get_close_matches(name, known, n=2))
        guess = f"did you mean {near}?" if near else f"known are {', '.join(sorted(known))}"
        _check(name in known, where + name, value, f"unknown setting; {guess}")
        values[name] = _convert(hints[name], value, where + name)
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        raise ConfigError(where.rstrip(".") or cls.__name__, dict(raw), str(error)) from error


def _convert(hint: Any, value: Any, name: str) -> Any:
    if get_origin(hint) is tuple:
        _check(isinstance(value, list | tuple), name, value, "must be a list")
        return tuple(_convert(get_args(hint)[0], item, name) for item in value)
    choices = [choice for choice in (get_args(hint) or (hint,)) if choice is not type(None)]
    if value is None and type(None) in get_args(hint):
        return None
    if is_dataclass(choices[0]) and isinstance(value, Mapping):
        return build(choices[0], value, f"{name}.")  # type: ignore[arg-type]
    if float in choices and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = type(value) in choices
    kinds = (f"a table [{name}]" if is_dataclass(choice) else choice.__name__ for choice in choices)
    _check(right, name, value, f"must be {' or '.join(kinds)}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is read from the environment, once, by `read_environment`."""

    llama_server_path: str | None
    ray_address: str | None
    cache_dir: Path
    hf_offline: bool

    def run_dir(self, fleet: str, run_id: str) -> Path:
        """Keys and tables of one run of a fleet, removed when it stops."""
        return self.cache_dir / "run" / f"{fleet}-{run_id}"


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """`LLAMA_SERVER_PATH`, `RAY_ADDRESS`, `LLTM_RAY_CACHE` (else XDG's cache folder), `HF_HUB_OFFLINE`."""
    env = os.environ if environ is None else environ
    base = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME", "~")).expanduser() / ".cache")
    return Environment(
        llama_server_path=env.get("LLAMA_SERVER_PATH") or None,
        ray_address=env.get("RAY_ADDRESS") or None,
        cache_dir=Path(env.get("LLTM_RAY_CACHE") or Path(base) / "lltm_ray"),
        hf_offline=env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )
