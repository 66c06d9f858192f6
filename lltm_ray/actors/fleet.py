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
from lltm_ray.actors.engine import MAX_WAITING, EngineActor
from lltm_ray.actors.gateway import GatewayActor
from lltm_ray.actors.launch import EngineSpec
from lltm_ray.actors.placement import Reservation, plan_placement, read_nodes, release, reserve
from lltm_ray.actors.remote import actor
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
        try:
            self._drain()
        finally:
            for handle in (self.gateway, *self.engines.values(), self.directory):
                if handle is not None:
                    ray.kill(handle)
            release(self.config.name)

    def _drain(self) -> None:
        drain_s = self.config.drain_timeout_s
        if self.gateway is not None:
            gateway_s = self.config.gateway.drain_timeout_s if self.config.gateway else 0.0
            _settle([self.gateway.drain.remote(gateway_s)], gateway_s)
        _settle([self.engines[name].stop.remote(drain_s) for name in self._alive()], drain_s)
        _settle([self.directory.close.remote()], 0.0)

    def _alive(self) -> list[str]:
        """Engines that can hear; others have no server, or their node is gone, and are only killed."""
        try:
            engines = self.status().engines
        except FleetError as error:
            log.warning("%s; its engines are ended without a drain", error)
            return []
        return [engine.name for engine in engines if engine.state is not EngineState.FAILED]


def start_fleet(
    config: FleetConfig, *, detached: bool = False, expose: bool = False, on_progress: OnProgress | None = None
) -> Fleet:
    """Reserve shares, start every actor, and return once all engines and the gateway are ready.

    Args:
        config: the settings.
        detached: the fleet outlives the process that starts it.
        expose: gateways that are not the fleet's own may be on any node.
        on_progress: hears the status about five times a second.

    Raises:
        FleetError: a fleet of this name runs already.
        PlacementError: the cluster has no room.
        LltmRayError: what kept an engine or the gateway from starting. Whatever was started is ended again.
    """
    plans = _plan(config)
    fleet = _claim_name(config, plans, detached=detached)
    try:
        _populate(fleet, reserve(config, plans, detached=detached), detached=detached, expose=expose)
        _wait_ready(fleet, on_progress)
    except BaseException:
        fleet.stop()
        raise
    return fleet


def _claim_name(config: FleetConfig, plans: tuple[SharePlan, ...], *, detached: bool) -> Fleet:
    """The directory comes first: its name is the lock that keeps two starts of one fleet apart."""
    run_id = secrets.token_hex(4)
    near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = _options(detached=detached) | {"name": names.directory(config.name), "scheduling_strategy": near}
    try:
        directory = actor(Directory).options(**options).remote(config, run_id, tuple(plan.engine for plan in plans))
    except ValueError:
        why = f"fleet {config.name!r} runs already: stop it (lltm-ray down), or choose another --name"
        raise FleetError(why) from None
    return Fleet(config=config, run_id=run_id, directory=directory)


def _options(*, detached: bool) -> dict[str, Any]:
    return {"namespace": names.NAMESPACE, "lifetime": "detached" if detached else None}


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
    found = {engine: _find(names.engine(name, engine)) for engine in engine_names}
    engines = {engine: handle for engine, handle in found.items() if handle is not None}
    gateway = _find(names.gateway(name, "gateway-0"))
    return Fleet(config=config, run_id=run_id, directory=directory, engines=engines, gateway=gateway)


def find_directory(name: str) -> Any | None:
    """The directory of a fleet, or None when it does not run on this Ray cluster."""
    return _find(names.directory(name))


def _find(actor_name: str) -> Any | None:
    """An actor by name; None when there is none (any more), so that what is left of a fleet can still be ended."""
    try:
        return ray.get_actor(actor_name, namespace=names.NAMESPACE)
    except ValueError:
        return None


def get_engine(fleet: str, name: str) -> Any:
    """Handle of one engine, by name."""
    return ray.get_actor(names.engine(fleet, name), namespace=names.NAMESPACE)


def _populate(fleet: Fleet, shares: tuple[Reservation, ...], *, detached: bool, expose: bool) -> None:
    config, here, common = fleet.config, ray.get_runtime_context().get_node_id(), _options(detached=detached)
    crowd = Counter(share.plan.node_id for share in shares)
    for share in shares:
        name = share.plan.engine
        spec = EngineSpec(
            name=name,
            fleet=config,
            run_id=fleet.run_id,
            share=share.plan.gpus,
            engines_on_node=crowd[share.plan.node_id],
            gateway_node_id=here if config.gateway else None,
            exposed=expose,
        )
        calls = {"max_concurrency": config.engine.n_parallel + MAX_WAITING + 1000}
        options = common | calls | share.actor_options() | {"name": names.engine(config.name, name)}
        fleet.engines[name] = actor(EngineActor).options(**options).remote(spec)
    if config.gateway is not None:
        strategy = NodeAffinitySchedulingStrategy(here, soft=False)
        options = common | {"name": names.gateway(config.name, "gateway-0"), "scheduling_strategy": strategy}
        fleet.gateway = actor(GatewayActor).options(**options).remote("gateway-0", config.name, config.gateway)


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
