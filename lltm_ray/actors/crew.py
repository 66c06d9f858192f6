"""Making an engine's actor, finding those that run, ending one: what starting a fleet and scaling it share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray

from lltm_ray.actors import names
from lltm_ray.actors.engine import MAX_WAITING, EngineActor
from lltm_ray.actors.launch import EngineSpec
from lltm_ray.actors.placement import Reservation, release
from lltm_ray.actors.remote import actor, find, options
from lltm_ray.config import FleetConfig, ModelConfig
from lltm_ray.errors import LltmRayError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What all engines of one fleet have in common."""

    config: FleetConfig
    run_id: str
    gateway_node_id: str | None
    """As in `EngineSpec`."""
    exposed: bool = False

    def make(
        self,
        model: ModelConfig,
        share: Reservation,
        *,
        engines_on_node: int,
        detached: bool,
        starts_itself: bool = False,
    ) -> Any:
        """The actor of one more engine on its share; its server starts when `ensure_ready` is called, or by itself."""
        spec = EngineSpec(
            name=share.plan.engine,
            fleet=self.config.for_model(model),
            run_id=self.run_id,
            share=share.plan.gpus,
            engines_on_node=engines_on_node,
            gateway_node_id=self.gateway_node_id,
            exposed=self.exposed,
            starts_itself=starts_itself,
        )
        calls = {"max_concurrency": spec.fleet.engine.n_parallel + MAX_WAITING + 1000}
        own = {"name": names.engine(self.config.name, spec.name)} | options(detached=detached)
        return actor(EngineActor).options(**own, **calls, **share.actor_options()).remote(spec)


def engine_names(fleet: str) -> set[str]:
    """Engines of a fleet whose actors Ray knows, whoever made them."""
    prefix = names.engine(fleet, "")
    found = {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True) if entry["name"]}
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def find_engines(fleet: str) -> dict[str, Any]:
    """Their handles, in the order in which they were made."""
    ordered = sorted(engine_names(fleet), key=lambda name: (len(name), name))
    found = {name: find(names.engine(fleet, name)) for name in ordered}
    return {name: handle for name, handle in found.items() if handle is not None}


def end_engine(fleet: str, name: str) -> None:
    """Kill an engine's actor, its server with it, and give its share back."""
    handle = find(names.engine(fleet, name))
    if handle is not None:
        ray.kill(handle)
    release(fleet, name)


def end_leftovers(fleet: str) -> None:
    """End what an earlier fleet of this name left: its driver was killed and Ray, or the engines, have not noticed yet.

    Only for who holds the name, that is the directory.
    """
    for name in engine_names(fleet):
        log.warning("ending %s, which an earlier fleet %r left", name, fleet)
        end_engine(fleet, name)
    for name in (names.controller(fleet), names.telemetry(fleet), names.analytics(fleet)):
        handle = find(name)
        if handle is not None:
            ray.kill(handle)
    release(fleet)


def cause_of(error: Exception) -> BaseException:
    """Our own error inside Ray's wrapper, or the error itself."""
    inner = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    return inner if isinstance(inner, LltmRayError) else error
