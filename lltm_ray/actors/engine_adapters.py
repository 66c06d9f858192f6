"""An engine's LoRA adapters: which ones its server is started with, and at what scales it applies them.

What a model's engines shall have stands in the directory (`ModelInfo.adapters`) and is looked up at every start, so an
engine that Ray restarts, or that is made later, has what the others have. A server that is restarted alone knows the
scales of its start only: those that were set since are set again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from lltm_ray.actors.launch import EngineSpec, adapters_of, with_adapters
from lltm_ray.actors.watch import reach_directory
from lltm_ray.errors import ConfigError, EngineNotReadyError, LltmRayError
from lltm_ray.models.gguf import read_model
from lltm_ray.models.lora.file import check_fits, read_lora
from lltm_ray.records import Adapter, EngineInfo, EngineState

if TYPE_CHECKING:
    from lltm_ray.actors.engine import Engine

log = logging.getLogger(__name__)

_LOOKS, _LOOK_S = 4, 0.5
"""At what a server shows after a call that was given up: by then it has taken what lay in its queue."""
_ROUNDING = 1e-6
"""llama-server keeps scales as 32-bit floats."""


class EngineAdapters:
    """Part of one `Engine`, on its loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.worn = adapters_of(engine.spec.fleet.engine)
        self.model_path: Path | None = None
        """Of what its server serves; None before it was first planned."""
        self._was_ready = False
        self._setting = asyncio.Lock()
        self._is_unsure = False
        self._again: asyncio.Task[None] | None = None

    async def dress(self, spec: EngineSpec) -> EngineSpec:
        """The engine's part with the adapters that the fleet wants now; with those of before where nobody can tell."""
        model = spec.fleet.served_name or spec.fleet.model
        async with self._setting:
            try:
                status = await (await reach_directory(spec.fleet.name)).status.remote()
            except (ray.exceptions.RayError, ValueError) as error:
                log.warning("%s starts with the adapters it had, the directory does not answer: %s", spec.name, error)
                return spec
            for wanted in (each.adapters for each in status.models if each.name == model):
                self.worn = wanted
                self._engine.update(adapters=wanted)  # the file may take long to come, and scales may change meanwhile
                return with_adapters(spec, wanted)
            return spec

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Whether llama.cpp would load them with this model; reads files of this node.

        Raises:
            ConfigError, ModelError: it would not, or a file is not here.
        """
        if self.model_path is None:
            raise EngineNotReadyError(self._engine.spec.name, self._engine.info.state.value)
        check_files(self.model_path, adapters)

    async def rescale(self, scales: dict[str, float]) -> None:
        """Set some, by name; an engine that is not ready does so when it is.

        Raises:
            ConfigError: it has no such adapter.
            EngineError, UpstreamError: its server did not take them.
        """
        async with self._setting:
            before = {each.name: each.own for each in self.worn}
            if unknown := scales.keys() - before.keys():
                raise ConfigError(
                    "adapter", min(unknown), f"{self._engine.spec.name} has {', '.join(before) or 'none'}"
                )
            after = before | scales
            if self._engine.info.state is EngineState.READY:
                ids = {id_: after[each.name] for id_, each in enumerate(self.worn)}
                await self._set(ids)
            self._wear(after)

    async def _set(self, ids: dict[int, float]) -> None:
        """Until the server shows them: a call that was given up may lie in its queue, and be taken after this one."""
        client, looks = self._engine.client, _LOOKS if self._is_unsure else 0
        self._is_unsure = True
        await client.set_lora_adapters(ids)
        for _ in range(looks):
            await asyncio.sleep(_LOOK_S)
            shown = {each.id: each.scale for each in await client.lora_adapters()}
            if any(abs(shown.get(id_, scale) - scale) > _ROUNDING * max(1.0, abs(scale)) for id_, scale in ids.items()):
                await client.set_lora_adapters(ids)
        self._is_unsure = False

    async def note(self, scales: dict[str, float]) -> None:
        """The server has these already, by name."""
        async with self._setting:
            self._wear(scales)

    def _wear(self, scales: dict[str, float]) -> None:
        """Those that are not named keep theirs; a name that is gone is nobody's."""
        self.worn = tuple(replace(each, now=scales.get(each.name, each.own)) for each in self.worn)
        self._engine.update(adapters=self.worn)

    def server_is(self, state: EngineState) -> None:
        """Called with every change: a server that has become ready knows the scales of its start only."""
        is_ready = state is EngineState.READY
        if is_ready and not self._was_ready and any(each.now is not None for each in self.worn):
            self._again = asyncio.get_running_loop().create_task(self._set_again())
        self._was_ready = is_ready

    async def _set_again(self) -> None:
        """Requests of ours say their scales themselves; this is for those that are sent to the server past us."""
        try:
            await self.rescale({})
        except LltmRayError as error:
            log.warning("%s has the scales of its start: %s", self._engine.spec.name, error)
        except Exception:
            log.exception("%s has the scales of its start", self._engine.spec.name)


def check_files(model_path: Path, adapters: Sequence[Adapter]) -> None:
    """Whether llama.cpp would load adapters with a model; all are files of this node.

    Raises:
        ConfigError, ModelError: it would not, or a file is not here.
    """
    model = read_model(model_path)
    for each in adapters:
        if set(each.path) & set(',:"'):
            raise ConfigError("adapter", each.path, "llama-server splits at ',' and ':'; use a path without them")
        check_fits(read_lora(each.path), model)


class AdapterCalls:
    """Handle methods of an engine's actor: `check_adapters, set_scales, note_scales, restart`."""

    _engine: Engine

    async def check_adapters(self, adapters: tuple[Adapter, ...]) -> None:
        """As `EngineAdapters.check`."""
        await asyncio.to_thread(self._engine.adapters.check, adapters)

    async def set_scales(self, scales: dict[str, float]) -> None:
        """As `EngineAdapters.rescale`."""
        await self._engine.adapters.rescale(scales)

    async def note_scales(self, scales: dict[str, float]) -> None:
        """As `EngineAdapters.note`."""
        await self._engine.adapters.note(scales)

    async def restart(self, drain_s: float) -> EngineInfo:
        """As `Engine.restart`: another server, with the adapters that the fleet wants now."""
        return await self._engine.restart(drain_s)
