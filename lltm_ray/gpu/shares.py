"""Demands -> shares: which node and which GPUs each engine gets. Pure.

Fractions are packed (the fullest GPU that still has room goes first), so that whole GPUs stay free for wide engines
and for analytics; engines without a GPU are spread, because they compete for cores. This is best fit decreasing, the
bin packing heuristic that needs at most about 11/9 of the best possible number of bins (Johnson et al. 1974).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lltm_ray.errors import ConfigError, PlacementError

UNITS = 10_000
"""Ray counts resources in ten-thousandths; whole numbers of them add up without rounding."""
_MARGIN_RATIO = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareDemand:
    """What one engine asks for: 0, a fraction up to 1, or a whole number of GPUs; and Ray CPUs."""

    engine: str
    gpus: float = 0.0
    cpus: float = 0.0

    def __post_init__(self) -> None:
        whole = self.gpus == int(self.gpus) if 0 <= self.gpus < 2**31 else False
        if not (whole or 1 / UNITS <= self.gpus <= 1):
            raise ConfigError("gpu_share", self.gpus, f"must be 0, from {1 / UNITS:g} to 1, or a whole number of GPUs")
        if not 0 <= self.cpus < 2**31:
            raise ConfigError("cpu_share", self.cpus, "must be a number of CPUs, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCapacity:
    """What a node has left: CPUs, and the free fraction (0..1) of each of its GPUs."""

    node_id: str
    cpus: float
    gpus: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharePlan:
    """Where one engine goes; `gpu_ids` are positions in its node's `gpus`."""

    engine: str
    node_id: str
    gpus: float
    cpus: float
    gpu_ids: tuple[int, ...] = ()

    @property
    def need(self) -> str:
        """The share in words."""
        return f"{self.gpus:g} GPU and {self.cpus:g} CPU"


@dataclass(slots=True)
class _Node:
    """A node's free units while planning."""

    node_id: str
    cpus: int
    gpus: list[int]

    @property
    def whole(self) -> list[int]:
        return [index for index, free in enumerate(self.gpus) if free >= UNITS]


def plan_shares(demands: Sequence[ShareDemand], nodes: Sequence[NodeCapacity]) -> tuple[SharePlan, ...]:
    """Place every engine, or none.

    Widest first, so the outcome does not depend on the order of the demands; plans come back in that order though.
    Several whole GPUs always come from one node: llama.cpp's tensor split does not leave a machine.

    Args:
        demands: one per engine; names are unique.
        nodes: what is free; their order breaks ties.

    Raises:
        PlacementError: an engine finds no room; it names the need and the largest share left beside the others.
    """
    free = [_Node(node.node_id, _down(node.cpus), [_down(gpu) for gpu in node.gpus]) for node in nodes]
    widest_first = sorted(
        range(len(demands)), key=lambda at: (-demands[at].gpus, -demands[at].cpus, demands[at].engine)
    )
    placed = {at: _place(demands[at], free) for at in widest_first}
    return tuple(placed[at] for at in range(len(demands)))


def default_cpu_share(engines: int, cpus_total: float) -> float:
    """Ray CPUs for each engine without a GPU: 1 where they fit, else an equal part, rounded down to hundredths."""
    if engines <= cpus_total:
        return 1.0
    return int(cpus_total * 100 / engines) / 100


def memory_budget(total_bytes: int, free_bytes: int, share: float) -> int:
    """Bytes that an engine may plan with on its share.

    Its part of the total, at most what is free, less 2 %: free memory is in pieces, and neighbours on the GPU take a
    little more between this look and the engine's start. CUDA contexts and the engine's own margin are not taken off
    here, the memory estimate of the model counts them.

    Args:
        total_bytes: memory of the device; of all devices together for several whole ones.
        free_bytes: what is free of it now.
        share: the engine's GPUs; 1 and more take everything.
    """
    budget = max(0, min(free_bytes, int(total_bytes * min(share, 1.0))))
    return budget - int(budget * _MARGIN_RATIO)


def _place(demand: ShareDemand, nodes: list[_Node]) -> SharePlan:
    cpus, gpus = _up(demand.cpus), _up(demand.gpus)
    roomy = [node for node in nodes if node.cpus >= cpus]
    if gpus == 0:
        found = _emptiest(roomy)
    elif gpus < UNITS:
        found = _tightest_gpu(gpus, roomy)
    else:
        found = _tightest_node(gpus // UNITS, roomy)
    if found is None:
        raise PlacementError(_need(demand), _largest_free(demand, nodes))
    node, gpu_ids = found
    node.cpus -= cpus
    for index in gpu_ids:
        node.gpus[index] -= min(gpus, UNITS)
    return SharePlan(engine=demand.engine, node_id=node.node_id, gpus=demand.gpus, cpus=demand.cpus, gpu_ids=gpu_ids)


def _emptiest(nodes: list[_Node]) -> tuple[_Node, tuple[int, ...]] | None:
    return (max(nodes, key=lambda node: node.cpus), ()) if nodes else None


def _tightest_gpu(need: int, nodes: list[_Node]) -> tuple[_Node, tuple[int, ...]] | None:
    """The fullest GPU with room; among untouched ones that of the node with the fewest, to keep wide nodes whole."""
    rooms = [
        (free, len(node.whole), at, index) for at, node in enumerate(nodes) for index, free in enumerate(node.gpus)
    ]
    fitting = [room for room in rooms if room[0] >= need]
    if not fitting:
        return None
    _free, _whole, at, index = min(fitting)
    return nodes[at], (index,)


def _tightest_node(count: int, nodes: list[_Node]) -> tuple[_Node, tuple[int, ...]] | None:
    fitting = [node for node in nodes if len(node.whole) >= count]
    if not fitting:
        return None
    node = min(fitting, key=lambda node: len(node.whole))
    return node, tuple(node.whole[:count])


def _need(demand: ShareDemand) -> str:
    return f"{_words(_up(demand.gpus) or -1, _up(demand.cpus))} ({demand.engine})"


def _largest_free(demand: ShareDemand, nodes: list[_Node]) -> str:
    if not nodes:
        return "none: there are no nodes"
    if demand.gpus > 1:
        node = max(nodes, key=lambda node: (len(node.whole), node.cpus))
        gpus = len(node.whole) * UNITS
    elif demand.gpus > 0:
        node = max(nodes, key=lambda node: (max(node.gpus, default=0), node.cpus))
        gpus = max(node.gpus, default=0)
    else:
        node, gpus = max(nodes, key=lambda node: node.cpus), -1
    return f"{_words(gpus, node.cpus)} on node {node.node_id}"


def _words(gpus: int, cpus: int) -> str:
    """Units in words, e.g. `0.5 of a GPU and 2 CPUs`; -1 leaves the GPU out, where none was asked for."""
    cpu_words = f"{cpus / UNITS:g} CPU{'' if cpus == UNITS else 's'}"
    if gpus <= 0:
        return cpu_words if gpus < 0 else f"no GPU and {cpu_words}"
    if gpus < UNITS:
        return f"{gpus / UNITS:g} of a GPU and {cpu_words}"
    return f"{gpus // UNITS} whole GPU{'' if gpus < 2 * UNITS else 's'} and {cpu_words}"


def _up(amount: float) -> int:
    return round(amount * UNITS)


def _down(amount: float) -> int:
    """What is free, never more than there is; the small term absorbs binary fractions such as 0.3 * 10000."""
    return max(0, int(amount * UNITS + 1e-6))
