"""Engines and routers of the runs on GPUs: llama-servers spread over the GPUs, fresh for every run.

`python -m tests.peers.gpu_fleet SPEC.json` is our gateway in a process of its own, everything on, before such engines.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import uvloop

from lltm_ray.config import EngineConfig, GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.llamacpp.command import build_args
from lltm_ray.models.footprint import estimate
from lltm_ray.models.gguf import read_model
from lltm_ray.records import EngineInfo, EngineState, FleetStatus
from lltm_ray.routing.ledger import Ledger
from lltm_ray.routing.router import Router

from . import engines
from .engines import Server
from .peers import BY_NAME, PROBE, Site
from .processes import Running, StartError, free_port, running, wait_for

HTTP_THREADS = 160
"""More than any router here opens connections; too few would make the servers refuse to listen to some."""
ALL_LAYERS = 99
START_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """What is given on the command line."""

    server: str
    """Path of llama-server, or `embedded`."""
    model: Path
    gpus: int
    """0: no GPU."""
    vllm_router: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further engine settings."""

    @property
    def argv(self) -> list[str]:
        """The server's program."""
        embedded = [sys.executable, "-m", "lltm_ray.llamacpp.embedded"]
        return embedded if self.server == "embedded" else [self.server]

    def config(self, slots: int, slot_tokens: int, cache_ram_mib: int) -> EngineConfig:
        """Settings of one engine."""
        settings: dict[str, Any] = {
            "n_parallel": slots,
            "n_ctx": slots * slot_tokens,
            "cache_ram_mib": cache_ram_mib,
            "n_threads_http": HTTP_THREADS,
        }
        if not self.gpus:
            exact = ("n_threads", "n_threads_batch", "flash_attn", "cache_type_k", "cache_type_v")
            settings |= {name: engines.SETTINGS[name] for name in exact}
        return EngineConfig(**settings | self.engine)

    def env(self, number: int) -> dict[str, str]:
        """Which GPU an engine sees."""
        return {"CUDA_VISIBLE_DEVICES": str(number % self.gpus)} if self.gpus else {}

    @property
    def layers(self) -> int:
        """On the GPU."""
        return ALL_LAYERS if self.gpus else 0

    def ram_tokens(self, config: EngineConfig) -> int:
        """Tokens in the host-memory prompt cache, by the planner's own sizes."""
        return _ram_tokens(self.model, config, self.layers)


@cache
def _ram_tokens(model: Path, config: EngineConfig, layers: int) -> int:
    slots, n_ctx = config.n_parallel, config.n_ctx or 0
    sizes = estimate(read_model(model), n_ctx=n_ctx, n_parallel=slots, n_gpu_layers=layers, config=config)
    return (config.cache_ram_mib or 0) * 2**20 * n_ctx // sizes.kv_bytes


@contextlib.contextmanager
def servers(host: Host, config: EngineConfig, count: int, folder: Path) -> Iterator[tuple[Server, ...]]:
    """Fresh engines, engine i on GPU i modulo their number.

    Raises:
        StartError: one did not start.
    """
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(count):
            port = free_port()
            args = build_args(
                config,
                model_path=str(host.model),
                host="127.0.0.1",
                port=port,
                alias="bench",
                api_key_file=None,
                n_gpu_layers=host.layers,
            )
            log = folder / f"engine-{number}.log"
            process = stack.enter_context(running([*host.argv, *args], log, host.env(number)))
            started.append((process, Server(f"http://127.0.0.1:{port}", process.pid)))
        deadline = time.monotonic() + START_S
        for process, server in started:
            _until_healthy(process, server, deadline)
        yield tuple(server for _, server in started)


def _until_healthy(process: Running, server: Server, deadline: float) -> None:
    while time.monotonic() < deadline and process.process.poll() is None:
        try:
            server.get("/health", timeout_s=5.0)
            return
        except OSError:
            time.sleep(0.05)
    raise StartError(f"an engine did not start: {process.tail()}")


@dataclass(frozen=True)
class Front:
    """A router in front of engines."""

    port: int
    process: Running


@contextlib.contextmanager
def router(name: str, host: Host, config: EngineConfig, behind: tuple[Server, ...], folder: Path) -> Iterator[Front]:
    """Start a router: a policy of ours by its name, or `vllm-router`; wait until it answers.

    Raises:
        StartError: it did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    if name == "vllm-router":
        build = BY_NAME[name].build
        assert build is not None
        site = Site(folder, port, tuple(server.url for server in behind), config.n_parallel)
        argv = [*shlex.split(host.vllm_router), *build(site, folder)[1:]]
    else:
        spec = folder / "gateway.json"
        shown = [_info(number, server, config, host.ram_tokens(config)) for number, server in enumerate(behind)]
        spec.write_text(json.dumps({"port": port, "policy": name, "folder": str(folder), "engines": shown}))
        argv = [sys.executable, "-m", "tests.peers.gpu_fleet", str(spec)]
    with running(argv, folder / "router.log") as process:
        wait_for(process, port, PROBE, 30.0)
        yield Front(port, process)


def _info(number: int, server: Server, config: EngineConfig, ram_tokens: int) -> dict[str, Any]:
    """An engine as the directory would show it."""
    info = EngineInfo(
        name=f"engine-{number}",
        model="bench",
        state=EngineState.READY,
        url=server.url,
        api_key="",
        slots_total=config.n_parallel,
        server_pid=server.pid,
        n_ctx=config.n_ctx or 0,
        cache_ram_tokens=ram_tokens,
        slot_similarity_ratio=config.slot_similarity_ratio,
        kv_unified=config.kv_unified,
    )
    return asdict(info)


async def _gateway(spec: dict[str, Any]) -> None:
    """Serve until killed, with the settings that a fleet has unless told otherwise."""
    config = GatewayConfig(port=spec["port"], policy=spec["policy"])
    table = Router(config.queue_limit, config.queue_timeout_s, policy=config.policy)
    table.update([EngineInfo(**each | {"state": EngineState.READY}) for each in spec["engines"]])
    ledger = Ledger(Path(spec["folder"]) / "ledger.sqlite", keep_requests=config.ledger_requests)
    app = GatewayApp(
        router=table,
        config=config,
        keys=ApiKeys(),
        status=lambda: FleetStatus(name="bench", engines=table.engines()),
        ledger=ledger,
        account=lambda: ledger.counters,
    )
    await serve(app, config, ready=lambda _: None)


if __name__ == "__main__":
    uvloop.run(_gateway(json.loads(Path(sys.argv[1]).read_text())))
