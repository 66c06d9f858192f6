"""Bringing a fleet up, finding it again, taking it down: the sequence that driver and Serve share."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray.actors import names
from lltm_ray.actors.directory import Directory
from lltm_ray.actors.engine import EngineActor
from lltm_ray.actors.gateway import GatewayActor
from lltm_ray.actors.launch import EngineSpec
from lltm_ray.actors.placement import Reservation, plan_placement, read_nodes, release, reserve
from lltm_ray.actors.remote import actor
from lltm_ray.actors.watch import get_directory
from lltm_ray.config import FleetConfig
from lltm_ray.errors import EngineStartError, FleetError, LltmRayError, PlacementError
from lltm_ray.gpu.shares import SharePlan
from lltm_ray.records import EngineState, FleetStatus

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 30.0
"""How long an actor may take to say anything; a busy laptop starts a worker in 3-9 s."""
VIEW_LAG_S = 3.0
OnProgress = Callable[[FleetStatus], None]


@dataclass(slots=True, kw_only=True)
class Fleet:
    """Handles of one running fleet."""

    config: FleetConfig
    run_id: str
    directory: Any
    engines: dict[str, Any] = field(default_factory=dict)
    gateway: Any | None = None

    def status(self) -> FleetStatus:
        """The directory's table now; waits while Ray restarts the directory.

        Raises:
            FleetError: the directory is gone, and with it the fleet.
        """
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                status: FleetStatus = ray.get(self.directory.status.remote(), timeout=ANSWER_TIMEOUT_S)
                return status
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                if time.monotonic() > deadline or find_directory(self.config.name) is None:
                    raise FleetError(f"fleet {self.config.name!r} does not answer: {error}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        """Drain the gateway, then the engines; end every actor and give the shares back."""
        drain_s = self.config.drain_timeout_s
        if self.gateway is not None:
            gateway_s = self.config.gateway.drain_timeout_s if self.config.gateway else 0.0
            _settle([self.gateway.drain.remote(gateway_s)], gateway_s)
        _settle([self.engines[name].stop.remote(drain_s) for name in self._alive()], drain_s)
        _settle([self.directory.close.remote()], 0.0)
        for handle in (self.gateway, *self.engines.values(), self.directory):
            if handle is not None:
                ray.kill(handle)
        release(self.config.name)

    def _alive(self) -> list[str]:
        """Engines that can hear; others have no server, or their node is gone, and are only killed."""
        try:
            engines = self.status().engines
        except FleetError as error:
            log.warning("%s; its engines are ended without a drain", error)
            return []
        return [engine.name for engine in engines if engine.state is not EngineState.FAILED]


def start_fleet(config: FleetConfig, *, detached: bool = False, on_progress: OnProgress | None = None) -> Fleet:
    """Reserve shares, start every actor, and return once all engines and the gateway are ready.

    Raises:
        FleetError: a fleet of this name runs already.
        PlacementError: the cluster has no room.
        LltmRayError: what kept an engine or the gateway from starting. Whatever was started is ended again.
    """
    if find_directory(config.name) is not None:
        raise FleetError(f"fleet {config.name!r} runs already: stop it (lltm-ray down), or choose another --name")
    reservations = reserve(config, _plan(config), detached=detached)
    try:
        fleet = _create(config, reservations, detached=detached)
    except BaseException:
        release(config.name)
        raise
    try:
        _wait_ready(fleet, on_progress)
    except BaseException:
        fleet.stop()
        raise
    return fleet


def _plan(config: FleetConfig) -> tuple[SharePlan, ...]:
    """A plan on what is free; Ray's view of that trails a fleet that has just been stopped by a moment."""
    deadline = time.monotonic() + VIEW_LAG_S
    while True:
        try:
            return plan_placement(config, read_nodes())
        except PlacementError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def find_fleet(name: str) -> Fleet:
    """Handles of a fleet that somebody else started on this Ray cluster.

    Raises:
        FleetError: none of that name runs here.
    """
    directory = find_directory(name)
    if directory is None:
        raise FleetError(f"no fleet {name!r} runs on this Ray cluster: start it (lltm-ray up --name {name})")
    config, run_id, engine_names = ray.get(directory.describe.remote(), timeout=ANSWER_TIMEOUT_S)
    engines = {engine: get_engine(name, engine) for engine in engine_names}
    gateway = ray.get_actor(names.gateway(name, "gateway-0"), names.NAMESPACE) if config.gateway else None
    return Fleet(config=config, run_id=run_id, directory=directory, engines=engines, gateway=gateway)


def find_directory(name: str) -> Any | None:
    """The directory of a fleet, or None when it does not run on this Ray cluster."""
    try:
        return get_directory(name)
    except ValueError:
        return None


def get_engine(fleet: str, name: str) -> Any:
    """Handle of one engine, by name."""
    return ray.get_actor(names.engine(fleet, name), namespace=names.NAMESPACE)


def _create(config: FleetConfig, shares: tuple[Reservation, ...], *, detached: bool) -> Fleet:
    run_id, here = secrets.token_hex(4), ray.get_runtime_context().get_node_id()
    common: dict[str, Any] = {"namespace": names.NAMESPACE, "lifetime": "detached" if detached else None}
    near = NodeAffinitySchedulingStrategy(here, soft=True)
    options = common | {"name": names.directory(config.name), "scheduling_strategy": near}
    directory = actor(Directory).options(**options).remote(config, run_id, tuple(share.plan.engine for share in shares))
    fleet = Fleet(config=config, run_id=run_id, directory=directory)
    crowd = Counter(share.plan.node_id for share in shares)
    for share in shares:
        name = share.plan.engine
        spec = EngineSpec(
            name=name,
            fleet=config,
            run_id=run_id,
            share=share.plan.gpus,
            engines_on_node=crowd[share.plan.node_id],
            gateway_node_id=here if config.gateway else None,
        )
        options = common | share.actor_options() | {"name": names.engine(config.name, name)}
        fleet.engines[name] = actor(EngineActor).options(**options).remote(spec)
    if config.gateway is not None:
        strategy = NodeAffinitySchedulingStrategy(here, soft=False)
        options = common | {"name": names.gateway(config.name, "gateway-0"), "scheduling_strategy": strategy}
        fleet.gateway = actor(GatewayActor).options(**options).remote("gateway-0", config.name, config.gateway)
    return fleet


def _wait_ready(fleet: Fleet, on_progress: OnProgress | None) -> None:
    """Every engine and the gateway ready, or the first reason why not."""
    pending = [engine.ensure_ready.remote() for engine in fleet.engines.values()]
    if fleet.gateway is not None:
        pending.append(fleet.gateway.ready.remote())
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=0.2)
        for result in done:
            unwrap(result)
        if on_progress is not None:
            on_progress(fleet.status())


def unwrap(result: Any) -> Any:
    """`ray.get`, with our own errors as they were raised in the actor."""
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None
    except ray.exceptions.RayActorError as error:
        raise EngineStartError(f"Ray lost its actor: {error}") from None


def cause_of(error: ray.exceptions.RayTaskError) -> BaseException:
    """Our own error inside Ray's wrapper, or the wrapper itself."""
    return error.cause if isinstance(error.cause, LltmRayError) else error


def _settle(calls: list[Any], expected_s: float) -> None:
    """Wait for last words; an actor that cannot say them is killed all the same."""
    deadline = time.monotonic() + expected_s + ANSWER_TIMEOUT_S
    for call in calls:
        try:
            ray.get(call, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            log.warning("ended without its last words: %s", error)
