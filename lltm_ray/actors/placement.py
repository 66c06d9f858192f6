"""From a plan of shares to Ray: one placement group for each engine.

One group an engine, not one for the fleet: Ray places a group's lost bundles all or none, and a fleet that lost a node
must come back as far as the remaining shares allow.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # the public call sums over nodes
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lltm_ray.actors import names
from lltm_ray.config import FleetConfig
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


def engine_names(fleet: FleetConfig) -> tuple[str, ...]:
    """`engine-0`, `engine-1`, ..."""
    return tuple(f"engine-{index}" for index in range(fleet.engines))


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


def plan_placement(fleet: FleetConfig, nodes: Sequence[NodeCapacity]) -> tuple[SharePlan, ...]:
    """Choose a node for every engine.

    Raises:
        PlacementError: they do not all fit; nothing is reserved.
    """
    gpus = fleet.gpu_share
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0  # type: ignore[no-untyped-call]
    cpus = fleet.cpu_share
    if cpus is None:
        cpus = 0.0 if gpus else default_cpu_share(fleet.engines, sum(node.cpus for node in nodes))
    demands = [ShareDemand(engine=name, gpus=gpus, cpus=max(cpus, LEAST_CPUS)) for name in engine_names(fleet)]
    return plan_shares(demands, nodes)


def reserve(fleet: FleetConfig, plans: Sequence[SharePlan], *, detached: bool) -> tuple[Reservation, ...]:
    """Make the groups and wait until Ray holds them all; on failure the caller gives them back (`release`).

    Raises:
        PlacementError: someone else took the room in between.
    """
    reservations = tuple(_reserve(fleet, plan, detached=detached) for plan in plans)
    late = [item for item in reservations if not item.group.wait(RESERVE_TIMEOUT_S)]
    if late:
        need = f"{late[0].plan.gpus:g} GPU and {late[0].plan.cpus:g} CPU"
        raise PlacementError(need, f"taken by others in the last {RESERVE_TIMEOUT_S:.0f} s")
    return reservations


def release(fleet: str) -> None:
    """Give back every share that the fleet still holds, whoever reserved it."""
    prefix = names.engine(fleet, "")
    for group_id, group in placement_group_table().items():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            log.info("giving back %s", group["name"])
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


def _reserve(fleet: FleetConfig, plan: SharePlan, *, detached: bool) -> Reservation:
    bundle = {name: amount for name, amount in (("GPU", plan.gpus), ("CPU", plan.cpus)) if amount}
    group = placement_group(
        [bundle],
        strategy="STRICT_PACK",
        name=names.engine(fleet.name, plan.engine),
        lifetime="detached" if detached else None,
        _soft_target_node_id=plan.node_id,  # the plan's node, or another one once that is lost
    )
    return Reservation(plan=plan, group=group)


def _split(gpus: float) -> tuple[float, ...]:
    whole, rest = int(gpus), round(gpus - int(gpus), 4)
    return (1.0,) * whole + ((rest,) if rest else ())
