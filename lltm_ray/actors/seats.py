"""Which GPU an actor gets: Ray chooses devices and takes no index, so the others are held while it chooses.

`Holds` takes every free GPU of a node, each by a placement group that tells its index, and lets go of one at a time.
`Guest` is an actor for a user's own functions on such a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from lltm_ray.actors.crew import cause_of
from lltm_ray.actors.placement import read_nodes
from lltm_ray.actors.remote import actor
from lltm_ray.errors import ConfigError, DeadlineError, EngineStartError, FleetError, PlacementError
from lltm_ray.gpu.nvml import read_inventory, visible

_HOLD_S = 20.0
_LOOK_S = 60.0
"""To start a worker for each GPU on a cold machine."""
_SEAT_S = 60.0
"""For an actor to start; one whose GPU somebody else took waits for ever."""
_BACK_S, _LOOK_AGAIN_S = 5.0, 0.2
"""Until Ray has what an ended actor held: killing its process takes a moment."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where an actor is, as it sees itself."""

    node_id: str
    gpus: tuple[int, ...] = ()
    """Indices of the devices that Ray gave it."""
    uuids: tuple[str, ...] = ()
    """The devices that it sees, by NVML; none where NVML has none."""
    visible: str = ""
    """Its CUDA_VISIBLE_DEVICES."""

    def __str__(self) -> str:
        return "GPU " + " and ".join(map(str, self.gpus)) if self.gpus else "CPU"


def take_seat(_actor: Any = None) -> Seat:
    """Where the process that calls this is."""
    context, seen = ray.get_runtime_context(), os.environ.get(_VISIBLE, "")
    return Seat(
        node_id=context.get_node_id(),
        gpus=tuple(_index_of(str(each)) for each in context.get_accelerator_ids()["GPU"]),
        uuids=tuple(gpu.uuid for gpu in visible(read_inventory(), seen)) if seen else (),
        visible=seen,
    )


def seats_of(handles: Sequence[Any]) -> tuple[Seat, ...]:
    """Where these actors are, by their own word.

    Raises:
        PlacementError: one of them does not get its place.
        EngineStartError: one of them died.
    """
    calls = [handle.__ray_call__.remote(take_seat) for handle in handles]
    try:
        return tuple(ray.get(calls, timeout=_SEAT_S))
    except ray.exceptions.GetTimeoutError:
        free = ray.available_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        why = f"{free:g} GPUs of the cluster; somebody else took one meanwhile: try again"
        raise PlacementError(f"an actor its place (none within {_SEAT_S:g} s)", why) from None
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None
    except ray.exceptions.RayActorError as error:
        raise EngineStartError(f"Ray lost its actor: {error}") from None


def roomiest_node(need: int = 0) -> tuple[str, int]:
    """The node with the most whole GPUs free, this one where no other has more; and how many.

    Where some node has `need` of them, but not free, they are waited for: a fleet that has ended gives its own back a
    moment later.
    """
    here = ray.get_runtime_context().get_node_id()
    most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + (_BACK_S if most >= need else 0.0)
    while True:
        counts = {node.node_id: sum(gpu >= 1 for gpu in node.gpus) for node in read_nodes()}
        best = max(counts, key=lambda node_id: (counts[node_id], node_id == here))
        if counts[best] >= need or time.monotonic() >= deadline:
            return best, counts[best]
        time.sleep(_LOOK_AGAIN_S)


class Holds:
    """Free GPUs of a node, by index; a context manager that gives all of them back.

    Args:
        node_id: the node.
        count: how many are free there.
    """

    def __init__(self, node_id: str, count: int) -> None:
        self._node_id, self._count = node_id, count
        self._groups: list[PlacementGroup] = []
        self._by_index: dict[int, PlacementGroup] = {}

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                own = {"strategy": "STRICT_PACK", "_soft_target_node_id": self._node_id}
                self._groups.append(placement_group([{"GPU": 1}], **own))
            self._look()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _look(self) -> None:
        held = [group for group in self._groups if group.wait(_HOLD_S)]
        look = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(take_seat)
        places = [PlacementGroupSchedulingStrategy(placement_group=group) for group in held]
        seats = ray.get([look.options(scheduling_strategy=place).remote() for place in places], timeout=_LOOK_S)
        for group, seat in zip(held, seats, strict=True):
            if seat.node_id == self._node_id and seat.gpus:
                self._by_index[seat.gpus[0]] = group

    def check(self, field: str, index: int) -> None:
        """Refuse an index that is not held.

        Raises:
            ConfigError: names the field and what is held.
        """
        if index not in self._by_index:
            raise ConfigError(field, index, f"the node has these GPUs free: {sorted(self._by_index)}")

    def let_go(self, *indices: int) -> None:
        """Give these back: who asks for a GPU of this node now gets one of them, and no other."""
        for index in indices:
            remove_placement_group(self._by_index.pop(index))

    def _end(self) -> None:
        for group in self._groups:
            remove_placement_group(group)


class Guest:
    """Runs a user's functions, one after another, in a process of its own."""

    def __init__(self, *, hides_gpus: bool) -> None:
        if hides_gpus:  # without a share Ray leaves all of them visible, those of the engines too
            os.environ[_VISIBLE] = ""

    def ready(self) -> None:
        """Once it is there."""

    def run(self, work: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the function returns."""
        return work(*args, **options)


def make_guest(node_id: str, share: float) -> Any:
    """A `Guest` with so much of a GPU of this node; with 0 it sees none and may be on any node."""
    place = NodeAffinitySchedulingStrategy(node_id, soft=not share)
    return actor(Guest).options(num_gpus=share, scheduling_strategy=place).remote(hides_gpus=not share)


def call_guest(
    guest: Any, work: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], timeout_s: float | None
) -> Any:
    """What `work` returns there, or what it raises.

    Raises:
        DeadlineError: not done within `timeout_s`; it is still at work.
        FleetError: it ended its process.
    """
    try:
        return ray.get(guest.run.remote(work, args, options), timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except ray.exceptions.GetTimeoutError:
        raise DeadlineError("the function", timeout_s or 0.0) from None
    except ray.exceptions.RayActorError as error:
        _wait_for(guest)
        why = f"the function ended its process ({type(error).__name__}); the next call finds a new one"
        raise FleetError(why) from None


def _wait_for(guest: Any) -> None:
    """Until Ray has started it again, or it is gone for good: calls in between are lost."""
    deadline = time.monotonic() + _LOOK_S
    while time.monotonic() < deadline:
        try:
            return ray.get(guest.ready.remote(), timeout=_LOOK_S)  # type: ignore[no-any-return]
        except ray.exceptions.ActorDiedError:
            return None
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            time.sleep(0.1)
    return None


def end_actor(handle: Any) -> None:
    """End it for good."""
    ray.kill(handle)


def leave_ray() -> None:
    """Leave the cluster; a local one that this process started ends."""
    ray.shutdown()


def _index_of(device: str) -> int:
    """Ray names devices as its node's CUDA_VISIBLE_DEVICES does: by index, or by UUID."""
    if device.isdigit():
        return int(device)
    gpus = read_inventory().gpus
    return next((place for place, gpu in enumerate(gpus) if gpu.uuid.startswith(device)), -1)
