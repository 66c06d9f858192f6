"""Every setting, as frozen dataclasses that check themselves; TOML in; the environment read in one function.

`FleetConfig` holds an `EngineConfig` (one llama-server) and a `GatewayConfig` (the HTTP front).
Field docstrings give the unit, the llama-server flag, and the reason of the default.

A relative path in a TOML file is meant from that file's folder, one from the command line or from code from the
process's folder. `~` is the home folder in both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from lltm_ray._analytics_config import ANALYTICS_ENGINES, AnalyticsConfig
from lltm_ray._engine_config import (
    CACHE_TYPES,
    LLAMA_CPP_SIMILARITY_RATIO,
    POOLING,
    SIMILARITY_RATIO,
    SPLIT_MODES,
    EngineConfig,
    LoraAdapter,
)
from lltm_ray._settings import build, merge
from lltm_ray._settings import check as _check
from lltm_ray._settings import check_choice as _check_choice
from lltm_ray._settings import check_range as _check_range
from lltm_ray._telemetry_config import TelemetryConfig
from lltm_ray._toml import anchored, read_toml

__all__ = [
    "ANALYTICS_ENGINES",
    "CACHE_TYPES",
    "LLAMA_CPP_SIMILARITY_RATIO",
    "POOLING",
    "SIMILARITY_RATIO",
    "SPLIT_MODES",
    "AnalyticsConfig",
    "EngineConfig",
    "Environment",
    "FleetConfig",
    "GatewayConfig",
    "LoraAdapter",
    "ModelConfig",
    "TelemetryConfig",
    "build",
    "merge",
    "read_environment",
]
ROUTING_POLICIES = ("residency", "least-loaded", "round-robin", "consistent-hash", "prefix-hash")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_FILE = re.compile(r"(?:.*[/:])?(?P<stem>[^/:]+?)(?:-\d{5}-of-\d{5})?\.gguf(?:@.*)?\Z", re.DOTALL)


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
    """Longest wait for an answer to begin; a request may ask for less (`x-lltm-deadline-ms`)."""
    request_timeout_s: float = 3600.0
    """Longest life of one request, first byte to last."""
    policy: str = "residency"
    """Who chooses the engine: `residency` (where the prompt is cached, by expected time), or for comparison
    `least-loaded`, `round-robin`, `consistent-hash`, `prefix-hash`."""
    processes: int = 1
    """Gateway processes that share the port; each owns its part of every engine's slots."""
    failover: bool = True
    """Continue a stream on another engine when its own dies after the first byte."""
    failover_chat_ids: bool = False
    """Ask streamed chats for each token's id, so that a broken one is taken up where it broke; costs a few microseconds
    an event. Off: it is generated again from its start, compared, and passed on from where it broke."""
    ledger: bool = True
    """Keep an account of every request's tokens, for `lltm-ray explain` and for drift against the engines' counters."""
    sessions_mib: int = 8192
    """Disk for saved sessions, of all tenants together, on the gateways' node; the caches of those used longest ago go
    first. 0 keeps none."""
    ledger_requests: int = 100_000
    """Requests the account keeps; the oldest go first."""
    trace: str | None = None
    """File into which requests are recorded for `lltm-ray replay`, without their text; `-<gateway>` is added to its
    stem."""
    max_attempts: int = 3
    """Tries of one request, also those that go on with its broken stream; an engine out of reach counts if no other is
    left."""
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
            processes=(1, 64),
            sessions_mib=(0, 2**31),
            ledger_requests=(1, 10**8),
            request_timeout_s=(0.001, 10**7),
            max_attempts=(1, 100),
            connect_timeout_s=(0.001, 600),
            drain_timeout_s=(0, 10**5),
        )
        _check_choice("policy", self.policy, ROUTING_POLICIES)
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
class ModelConfig:
    """One model of a fleet that serves several (`[[models]]`); None: as the fleet has it, where it has that field."""

    model: str
    """As `FleetConfig.model`."""
    served_name: str | None = None
    engines: int = 1
    """Engines at start. 0: the first request starts one and waits for it; needs `max_engines`."""
    min_engines: int | None = None
    """Never fewer. None: load may shrink it to `engines`; idling (`idle_timeout_s`) or room for others may take all."""
    max_engines: int | None = None
    """Never more; None: `engines`."""
    gpu_share: float | None = None
    cpu_share: float | None = None
    engine: EngineConfig | None = None
    idle_timeout_s: float | None = None
    """Without requests for so long, its engines are stopped down to `min_engines` or 0; the next request starts one."""
    pinned: bool = False
    """Never stopped to make room for another model."""
    priority: int = 0
    """Models of lower priority make room first."""

    def __post_init__(self) -> None:
        _check(bool(self.model), "model", self.model, "must name a model")
        _check_elastic(self)

    @property
    def name(self) -> str:
        """What clients write into `model`: the served name, else the catalogue name or the file's stem."""
        file = _FILE.match(self.model)
        stem = file["stem"] if file else Path(self.model).stem if "/" in self.model else self.model
        return self.served_name or stem

    @property
    def is_elastic(self) -> bool:
        """Whether the number of its engines may change."""
        return self.idle_timeout_s is not None or self.engines not in (0, self.max_engines) or not self.engines


def _check_elastic(settings: ModelConfig | FleetConfig) -> None:
    _check_range(
        settings,
        engines=(0, 100_000),
        min_engines=(0, 100_000),
        max_engines=(1, 100_000),
        idle_timeout_s=(0.1, 10**7),
        gpu_share=(0, 1024),
        cpu_share=(0, 4096),
    )
    share = settings.gpu_share or 0.0
    _check(share <= 1 or share == int(share), "gpu_share", share, "above 1 it must be a whole number of GPUs")
    low, most = settings.min_engines or 0, settings.max_engines
    _check(settings.engines > 0 or most is not None, "engines", 0, "needs max_engines >= 1: requests start an engine")
    most = settings.engines if most is None else most
    _check(settings.engines <= most, "engines", settings.engines, f"must be at most max_engines={most}")
    _check(low <= most, "min_engines", low, f"must be at most max_engines={most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """A fleet: how many engines of which model, on which shares, behind which gateway."""

    name: str = "default"
    """Fleets of different names live side by side on one Ray cluster."""
    model: str = "tiny"
    """`tiny`, `random`, a catalogue name, a path, or `repo:file[@revision]`."""
    served_name: str | None = None
    """What clients write into `model`. None: the catalogue name, or the file's stem."""
    engines: int = 1
    """At start; this, the next three and the shares are as in `ModelConfig`."""
    min_engines: int | None = None
    max_engines: int | None = None
    idle_timeout_s: float | None = None
    models: tuple[ModelConfig, ...] = ()
    """Several models; `model`, `engines` and their like above then stand in each of these instead."""
    scale_up_wait_s: float = 2.0
    """An engine is added while the queue's predicted wait is above this; below it a start costs more than it gains."""
    scale_down_after_s: float = 60.0
    """An engine is taken away after the others would have been under 60 % busy for so long."""
    room_timeout_s: float = 600.0
    """How long a start waits for room, e.g. until Ray's autoscaler has added a node."""
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
    shelf_mib: int = 4096
    """Disk on each node for slots of models that are stopped to the last engine, kept until somebody goes on with them;
    the oldest go first. 0 keeps none."""
    shelf_age_s: float = 21_600.0
    """How long they are kept."""
    log_dir: str | None = None
    """Where servers log. None: `<cache>/logs/<fleet>`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    gateway: GatewayConfig | None = field(default_factory=GatewayConfig)
    """None: no HTTP front, the driver API only."""
    telemetry: TelemetryConfig | None = field(default_factory=TelemetryConfig)
    """None: as one that is not `enabled`."""
    analytics: AnalyticsConfig = field(default_factory=AnalyticsConfig)

    def __post_init__(self) -> None:
        _check(bool(_NAME.match(self.name)), "name", self.name, "letters, digits, '.', '_', '-'; at most 63")
        _check(bool(self.model), "model", self.model, "must name a model")
        _check_elastic(self)
        _check_range(
            self,
            scale_up_wait_s=(0, 10**6),
            scale_down_after_s=(0, 10**7),
            room_timeout_s=(0, 10**7),
            memory_limit_bytes=(1, 2**50),
            start_timeout_s=(0.1, 10**6),
            restart_limit=(0, 10**6),
            drain_timeout_s=(0, 10**5),
            shelf_mib=(0, 2**31),
            shelf_age_s=(0, 10**9),
        )
        self._check_models()

    def _check_models(self) -> None:
        for name in ("model", "served_name", "engines", "min_engines", "max_engines") if self.models else ():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            _check(value == default, name, value, "belongs into each entry of models, since there are several")
        names = [model.name for model in self.models]
        for place, name in enumerate(names):
            is_new = name not in names[:place]
            _check(is_new, f"models[{place}].served_name", name, "two models have it: give one another name")

    def served(self) -> tuple[ModelConfig, ...]:
        """Every model with the fleet's settings where it has none of its own; one, where `models` is empty."""
        shared = ("gpu_share", "cpu_share", "engine", "idle_timeout_s")
        alone = ("model", "served_name", "engines", "min_engines", "max_engines")
        models = self.models or (ModelConfig(**{name: getattr(self, name) for name in alone}),)
        return tuple(
            replace(
                model,
                served_name=model.name,
                max_engines=model.max_engines or model.engines,
                **{name: getattr(self, name) for name in shared if getattr(model, name) is None},
            )
            for model in models
        )

    def for_model(self, model: ModelConfig) -> Self:
        """The fleet as an engine of one of its `served` models sees it: that model alone."""
        own = ("model", "served_name", "engines", "min_engines", "max_engines", "idle_timeout_s")
        changes: dict[str, Any] = {name: getattr(model, name) for name in (*own, "gpu_share", "cpu_share", "engine")}
        return replace(self, models=(), **changes)

    @property
    def is_elastic(self) -> bool:
        """Whether engines may be started and stopped while it runs."""
        return any(model.is_elastic for model in self.served())

    def with_absolute_paths(self) -> Self:
        """The same settings, with every relative path as it is meant in this process's folder."""
        config: Self = build(type(self), anchored(asdict(self), Path.cwd()))
        return config

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read a TOML file with the fields above at its top level and tables `[engine]`, `[gateway]`, `[[models]]`.

        Its relative paths are meant from its own folder, those of `overrides` from this process's.

        Args:
            path: the file.
            overrides: fields that win over the file; nested ones as dictionaries.

        Raises:
            ConfigError: unreadable, not TOML, an unknown field, or a wrong value; names the file, and the field with
                its table: `fleet.toml: gateway.port=99999: must be from 0 to 65535`.
        """
        config: Self = read_toml(partial(build, cls), path, overrides)
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is read from the environment, once, by `read_environment`."""

    llama_server_path: str | None
    ray_address: str | None
    cache_dir: Path
    hf_offline: bool
    llama_cpp_dir: Path | None = None
    """A build or release of llama.cpp, for its other programs."""

    def run_dir(self, fleet: str, run_id: str) -> Path:
        """Keys and tables of one run of a fleet, removed when it stops."""
        return self.cache_dir / "run" / f"{fleet}-{run_id}"


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """`LLAMA_SERVER_PATH`, `LLAMA_CPP_DIR`, `RAY_ADDRESS`, `LLTM_RAY_CACHE` (else XDG's folder), `HF_HUB_OFFLINE`."""
    env = os.environ if environ is None else environ
    base = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME", "~")).expanduser() / ".cache")
    return Environment(
        llama_server_path=env.get("LLAMA_SERVER_PATH") or None,
        ray_address=env.get("RAY_ADDRESS") or None,
        cache_dir=Path(env.get("LLTM_RAY_CACHE") or Path(base) / "lltm_ray"),
        hf_offline=env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        llama_cpp_dir=Path(env["LLAMA_CPP_DIR"]).expanduser() if env.get("LLAMA_CPP_DIR") else None,
    )
