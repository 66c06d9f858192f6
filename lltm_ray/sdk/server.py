"""`ServerManager`: one llama-server, started, supervised and ended by this process; no Ray.

```python
with ServerManager() as manager:
    manager.start_server("tiny", n_parallel=2)
    print(manager.client.complete("hi", n_predict=8).text)
```
"""

from __future__ import annotations

import os
import secrets
from types import TracebackType
from typing import Any, Self

from lltm_ray._loop import Loop
from lltm_ray.actors.launch import EngineSpec, Launch, plan_launch
from lltm_ray.config import FleetConfig, build
from lltm_ray.errors import ConfigError, EngineNotReadyError, LltmRayError
from lltm_ray.llamacpp.client import LlamaClient
from lltm_ray.llamacpp.process import ServerProcess, ServerSnapshot
from lltm_ray.llamacpp.replies import HealthStatus
from lltm_ray.records import EngineState
from lltm_ray.sdk.presence import check_models


class ServerManager:
    """At most one server at a time: on a free port of loopback, with a key of its own, restarted when it dies.

    Args:
        gpus: GPUs it may use, 0 for none; as `gpu_share` of a fleet.
        settings: fields of `FleetConfig` that concern one server: `llama_server`, `log_dir`, `start_timeout_s`, ...
    """

    def __init__(self, *, gpus: float = 0.0, **settings: Any) -> None:
        self._gpus, self._settings = gpus, settings
        self._loop: Loop | None = None
        self._launch: Launch | None = None
        self._process: ServerProcess | None = None
        self._client: LlamaClient | None = None

    def start_server(
        self,
        model: str = "tiny",
        *,
        gpu_layers: int | None = None,
        ctx_size: int | None = None,
        **engine: Any,
    ) -> ServerSnapshot:
        """Start it and return once it can answer; one that runs is ended first, once settings and files were checked.

        Args:
            model: `tiny`, a catalogue name, a path, or `repo:file[@revision]`.
            gpu_layers: layers on the GPU, `n_layer + 1` for all; None: as many as fit.
            ctx_size: KV tokens of all slots together; None: as many as fit, within reason.
            engine: other fields of `EngineConfig`, such as `n_parallel` or `embeddings`.

        Raises:
            ConfigError, ModelError, ServerBinaryError, EngineStartError: why it does not run; nothing is left behind.
        """
        own = {"n_gpu_layers": gpu_layers, "n_ctx": ctx_size} | engine
        spec = self._spec(model, {name: value for name, value in own.items() if value is not None})
        check_models(spec.fleet)
        self.stop_server()
        self._launch = plan_launch(spec, host="127.0.0.1")
        self._loop = Loop("ServerManager", "start_server again")
        try:
            return self._loop.run(self._start(self._launch))
        except BaseException:
            self.stop_server()
            raise

    def _spec(self, model: str, engine: dict[str, Any]) -> EngineSpec:
        given = {"name": f"server-{os.getpid()}", "model": model, "engine": engine} | self._settings
        config = build(FleetConfig, given)
        if (layers := config.engine.n_gpu_layers or 0) > 0 and not self._gpus:
            raise ConfigError("gpu_layers", layers, "needs a GPU: give ServerManager(gpus=1)")
        return EngineSpec(
            name="server",
            fleet=config.with_absolute_paths(),
            run_id=secrets.token_hex(4),
            share=self._gpus,
            engines_on_node=1,
            gateway_node_id=None,
        )

    async def _start(self, launch: Launch) -> ServerSnapshot:
        self._process = ServerProcess(launch.server)
        return await self._process.ensure_ready()

    def stop_server(self, drain_s: float = 0.0) -> None:
        """End it; running requests may finish for `drain_s` seconds. Without one nothing happens."""
        loop, launch, process, client = self._loop, self._launch, self._process, self._client
        self._loop = self._launch = self._process = self._client = None
        try:
            if client is not None:
                client.close()
            if loop is not None and process is not None:
                loop.run(process.stop(drain_s=drain_s))
        finally:
            if loop is not None:
                loop.stop()
            if launch is not None:
                launch.server.key_file.unlink(missing_ok=True)
                if launch.slots is not None:
                    launch.slots.remove()

    def restart_server(self) -> ServerSnapshot:
        """End the server's process and start it again with the same settings, at another port."""
        loop, process = self._running()
        self._drop_client()
        loop.run(process.stop(for_good=False))
        return loop.run(process.ensure_ready())

    @property
    def is_running(self) -> bool:
        """Whether it can answer."""
        return self._process is not None and self._process.snapshot().state is EngineState.READY

    @property
    def server_url(self) -> str:
        """Its base URL; it changes with every start. Requests need its key: use `client`."""
        return self._running()[1].snapshot().url

    @property
    def client(self) -> LlamaClient:
        """Every endpoint of the server.

        Raises:
            EngineNotReadyError: it does not run, or is being restarted.
        """
        now = self._running()[1].snapshot()
        if not now.url:
            raise EngineNotReadyError("of this ServerManager", f"{now.state}: {now.detail or 'it has no process now'}")
        url = now.url
        if self._client is None or self._client.url != url:
            self._drop_client()
            assert self._launch is not None  # noqa: S101 - it runs
            self._client = LlamaClient(url, api_key=self._launch.server.api_key)
        return self._client

    def check_server_health(self) -> bool:
        """Whether the server itself says that it is well."""
        try:
            return self.client.health().status is HealthStatus.OK
        except LltmRayError:
            return False

    def get_server_info(self) -> dict[str, Any]:
        """`{"state", "url", "pid", "restarts", "detail", "model", "n_ctx", "n_parallel", "n_gpu_layers"}`."""
        _, process = self._running()
        assert self._launch is not None  # noqa: S101 - it runs
        now, plan = process.snapshot(), self._launch.plan
        return {
            "state": str(now.state),
            "url": now.url,
            "pid": now.pid,
            "restarts": now.restarts,
            "detail": now.detail,
            "model": self._launch.served_name,
            "n_ctx": plan.n_ctx,
            "n_parallel": plan.n_parallel,
            "n_gpu_layers": plan.n_gpu_layers,
        }

    def _running(self) -> tuple[Loop, ServerProcess]:
        if self._loop is None or self._process is None:
            raise EngineNotReadyError("of this ServerManager", "not started: call start_server")
        return self._loop, self._process

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_server()
