"""From a plan of shares to Ray: one placement group for each engine.

One group an engine, not one for the fleet: Ray places a group's lost bundles all or none, and a fleet that lost a node
must come back as far as the remaining shares allow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # the public call sums over nodes
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lltm_ray.actors import names
from lltm_ray.config import FleetConfig, ModelConfig
from lltm_ray.errors import PlacementError
from lltm_ray.gpu.shares import NodeCapacity, ShareDemand, SharePlan, default_cpu_share, plan_shares

log = logging.getLogger(__name__)

RESERVE_TIMEOUT_S = 30.0
LEAST_CPUS = 0.01
"""A bundle may not be empty."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """An engine's share, held by a placement group."""

    plan: SharePlan
    group: PlacementGroup

    def actor_options(self) -> dict[str, Any]:
        """Options that put an actor on the share and let Ray isolate its devices."""
        strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=0)
        return {"num_gpus": self.plan.gpus, "num_cpus": self.plan.cpus, "scheduling_strategy": strategy}


def read_nodes() -> tuple[NodeCapacity, ...]:
    """Free CPUs and GPUs of every living node. Ray tells GPUs as a sum: whole ones first, then the rest of one."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    return tuple(
        NodeCapacity(
            node_id=node_id,
            cpus=float(free.get(node_id, {}).get("CPU", 0.0)),
            gpus=_split(float(free.get(node_id, {}).get("GPU", 0.0))),
        )
        for node_id in alive
    )


def resolve_models(fleet: FleetConfig, nodes: Sequence[NodeCapacity]) -> tuple[ModelConfig, ...]:
    """Every model of the fleet with its share in numbers, as the cluster suggests where the settings leave it open."""
    gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0  # type: ignore[no-untyped-call]
    models = tuple(
        replace(model, gpu_share=gpus if model.gpu_share is None else model.gpu_share) for model in fleet.served()
    )
    on_cpus = [model for model in models if not model.gpu_share]
    most = sum(model.max_engines or model.engines for model in on_cpus)
    cpus = default_cpu_share(most, sum(node.cpus for node in nodes))
    return tuple(_with_cpus(model, 0.0 if model.gpu_share else cpus) for model in models)


def _with_cpus(model: ModelConfig, default: float) -> ModelConfig:
    return replace(model, cpu_share=max(default if model.cpu_share is None else model.cpu_share, LEAST_CPUS))


def demand_of(model: ModelConfig, engine: str) -> ShareDemand:
    """What one engine of a resolved model asks for."""
    return ShareDemand(engine=engine, gpus=model.gpu_share or 0.0, cpus=model.cpu_share or LEAST_CPUS)


def name_engines(models: Sequence[ModelConfig]) -> dict[str, ModelConfig]:
    """The engines to start with, `engine-0`, `engine-1`, ..., and their models."""
    crew = [model for model in models for _ in range(model.engines)]
    return {f"engine-{index}": model for index, model in enumerate(crew)}


def plan_placement(engines: Mapping[str, ModelConfig], nodes: Sequence[NodeCapacity]) -> tuple[SharePlan, ...]:
    """Choose a node for every engine.

    Raises:
        PlacementError: they do not all fit; nothing is reserved.
    """
    return plan_shares([demand_of(model, name) for name, model in engines.items()], nodes)


def plan_share(demand: ShareDemand, nodes: Sequence[NodeCapacity]) -> SharePlan:
    """Choose a node for one engine; none (`node_id` is empty) when there is no room."""
    try:
        return plan_shares([demand], nodes)[0]
    except PlacementError:
        return SharePlan(engine=demand.engine, node_id="", gpus=demand.gpus, cpus=demand.cpus)


def give_back(nodes: Sequence[NodeCapacity], shares: Sequence[tuple[str, ShareDemand]]) -> tuple[NodeCapacity, ...]:
    """What would be free if those shares, each with its node, were given back."""
    return tuple(
        NodeCapacity(
            node_id=node.node_id,
            cpus=node.cpus + sum(share.cpus for at, share in shares if at == node.node_id),
            gpus=_split(sum(node.gpus) + sum(share.gpus for at, share in shares if at == node.node_id)),
        )
        for node in nodes
    )


def engines_beside(models: Sequence[ModelConfig], nodes: int, placed: int) -> int:
    """Engines that a node's cores and memory are divided among: those placed there, or its part of all there may be."""
    most = sum(model.max_engines or model.engines for model in models)
    return max(placed, -(-most // max(1, nodes)))


def reserve(fleet: FleetConfig, plans: Sequence[SharePlan], *, detached: bool) -> tuple[Reservation, ...]:
    """Make the groups and wait until Ray holds them all; on failure the caller gives them back (`release`).

    Raises:
        PlacementError: someone else took the room in between.
    """
    reservations = tuple(reserve_one(fleet.name, plan, detached=detached) for plan in plans)
    late = [item for item in reservations if not item.group.wait(RESERVE_TIMEOUT_S)]
    if late:
        raise PlacementError(late[0].plan.need, f"taken by others in the last {RESERVE_TIMEOUT_S:.0f} s")
    return reservations


def reserve_one(fleet: str, plan: SharePlan, *, detached: bool) -> Reservation:
    """Ask for one share; `group.wait` tells when it is there. A plan without a node takes the first that Ray finds."""
    bundle = {name: amount for name, amount in (("GPU", plan.gpus), ("CPU", plan.cpus)) if amount}
    group = placement_group(
        [bundle],
        strategy="STRICT_PACK",
        name=names.engine(fleet, plan.engine),
        lifetime="detached" if detached else None,
        _soft_target_node_id=plan.node_id or None,  # the plan's node, or another one once that is lost
    )
    return Reservation(plan=plan, group=group)


def release(fleet: str, engine: str | None = None) -> None:
    """Give back every share that the fleet still holds, or that of one engine, whoever reserved it."""
    for name, share in reserved(fleet):
        if engine in (None, name):
            log.info("giving back the share of %s", name)
            remove_placement_group(share.group)


@dataclass(frozen=True, slots=True)
class Held:
    """A share that Ray holds for an engine, or is asked for."""

    group: PlacementGroup
    node_id: str
    """Empty until it is there."""
    is_lost: bool
    """Its node is gone, and Ray looks for room elsewhere."""


def reserved(fleet: str) -> Iterator[tuple[str, Held]]:
    """Engines that hold a share, or wait for one, and their shares."""
    prefix = names.engine(fleet, "")
    for group_id, group in placement_group_table().items():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            node_id = group["bundles_to_node_id"].get(0, "") if group["state"] == "CREATED" else ""
            held = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
            yield group["name"].removeprefix(prefix), Held(held, node_id, group["state"] == "RESCHEDULING")


def _split(gpus: float) -> tuple[float, ...]:
    whole, rest = int(gpus), round(gpus - int(gpus), 4)
    return (1.0,) * whole + ((rest,) if rest else ())
