"""One call for a notebook: `quick_start` starts the fleet that suits this machine.

```python
from lltm_ray.sdk.quick import quick_start

with quick_start("qwen3-8b-q4_k_m") as cluster:
    print(cluster.chat([{"role": "user", "content": "hi"}], max_tokens=32).text)
```
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from lltm_ray.actors.fleet import OnProgress
from lltm_ray.config import read_environment
from lltm_ray.driver import Cluster
from lltm_ray.integrations.kaggle import secrets
from lltm_ray.integrations.kaggle.machine import Machine, detect
from lltm_ray.integrations.kaggle.presets import AUTO, build_fleet, mounted
from lltm_ray.llamacpp.binary import EMBEDDED, find_server
from lltm_ray.models.resolve import Origin, Progress, is_local, resolve

log = logging.getLogger(__name__)

TOKEN = "HF_TOKEN"  # noqa: S105 - its name


def quick_start(
    model: str = "tiny",
    *,
    preset: str = AUTO,
    machine: Machine | None = None,
    token: str | secrets.Secret | None = None,
    progress: Progress | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Cluster:
    """Start a fleet on this machine and return once it serves.

    A model that the service has mounted is used where it lies; another one is downloaded first, in this process, so
    that engines are laid out by the file itself and never see the token. Where the only llama-server is the embedded
    one, which has no CUDA, GPUs are left alone, with a warning.

    Args:
        model: as `FleetConfig.model`.
        preset: as `build_fleet` takes it.
        machine: None: measured now.
        token: for gated models. None: the secret `HF_TOKEN`, if there is one.
        progress: called with (file, bytes done, bytes in all) while it downloads.
        on_progress: called about five times a second with the fleet's status while it starts.
        settings: fields of `FleetConfig`, and `split` of `build_fleet`.

    Raises:
        ModelError: no such model, or the hub refuses it.
        ConfigError, FleetError, PlacementError, EngineError: see `build_fleet` and `Cluster.start`.
    """
    machine = with_usable_gpus(detect() if machine is None else machine, settings.get("llama_server"))
    path, name = _locate(model, machine, token, progress)
    settings = ({"served_name": name} if name else {}) | settings
    config = build_fleet(preset, model=path, machine=machine, **settings)
    return Cluster.start(config, on_progress=on_progress)


def _locate(
    model: str, machine: Machine, token: str | secrets.Secret | None, progress: Progress | None
) -> tuple[str, str]:
    """What to serve: a model's path once it is here, with the name it was asked by; or what needs no path."""
    if path := mounted(model, machine):
        return path, ""
    offline, shown = machine.is_online is False, _token(token, model)
    found = resolve(model, cache_dir=machine.cache_dir, offline=offline, progress=progress, token=shown)
    return (str(found.path), found.name) if found.origin in (Origin.CATALOG, Origin.HUB) else (model, "")


def _token(given: str | secrets.Secret | None, model: str) -> str | None:
    """What the hub is shown: nothing for models that are no hub's, for which no service is asked either."""
    if is_local(model):
        return None
    if given is None:
        given = secrets.find(TOKEN)
    return given.reveal() if isinstance(given, secrets.Secret) else given


def with_usable_gpus(machine: Machine, llama_server: str | None = None) -> Machine:
    """Without its GPUs, where the only llama-server is the embedded one; says so in the log."""
    if not machine.gpus or find_server(llama_server, read_environment()).origin != EMBEDDED:
        return machine
    why = "the embedded llama-server has no CUDA: set LLAMA_SERVER_PATH to a build that has"
    log.warning("%d GPUs are not used: %s", len(machine.gpus), why)
    return replace(machine, gpus=(), gpu_reason=why)
