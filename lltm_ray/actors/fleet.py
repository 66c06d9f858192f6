"""Bringing a fleet up, finding it again, taking it down: the sequence that driver and Serve share."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray._prefix import SALT_BYTES
from lltm_ray.actors import names
from lltm_ray.actors.analytics import find_analytics, make_analytics, wait_for_analytics
from lltm_ray.actors.controller import ControllerActor, ControllerSpec
from lltm_ray.actors.crew import Crew, cause_of, end_engine, end_leftovers, engine_names, find_engines
from lltm_ray.actors.directory import Directory
from lltm_ray.actors.gateway import GatewayActor, port_of
from lltm_ray.actors.lost import end_lost, is_lost
from lltm_ray.actors.placement import (
    Reservation,
    engines_beside,
    name_engines,
    plan_placement,
    read_nodes,
    release,
    reserve,
    resolve_models,
)
from lltm_ray.actors.remote import actor, find, get_named, near, options
from lltm_ray.actors.telemetry import make_telemetry
from lltm_ray.config import FleetConfig, GatewayConfig, ModelConfig
from lltm_ray.errors import EngineStartError, FleetError, PlacementError
from lltm_ray.gpu.shares import SharePlan
from lltm_ray.records import EngineState, FleetStatus
from lltm_ray.telemetry.content import settle_content

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
    gateways: dict[str, Any] = field(default_factory=dict)
    controller: Any | None = None
    """Of an elastic fleet."""
    telemetry: Any | None = None
    """None: the fleet runs without."""
    analytics: Any | None = None
    """None: made when somebody asks for a report."""

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
        """Drain the gateway, then the engines; end every actor and give the shares back.

        Nothing is drained where Ray was ended before: what is left of one that this process started is killed.
        """
        if is_lost():
            log.warning("Ray was ended before fleet %r, which is ended without a drain", self.config.name)
            end_lost()
            return
        if self.controller is not None:  # first of all: it would start new ones
            _settle([self.controller.close.remote()], 0.0)
            ray.kill(self.controller)
        _settle([self.directory.end_repairs.remote()], 0.0)
        self.refresh()
        try:
            self._drain()
        finally:
            self._end()

    def _end(self) -> None:
        if is_lost():
            end_lost()
        else:
            for handle in (*self.gateways.values(), self.directory, self.telemetry, self.analytics):
                if handle is not None:
                    ray.kill(handle)
            for name in {*self.engines, *engine_names(self.config.name)}:
                end_engine(self.config.name, name)
            release(self.config.name)

    def refresh(self) -> None:
        """See engines that were started, replaced or stopped since."""
        found = find_engines(self.config.name)
        self.engines = {name: newest(self.engines.get(name), handle) for name, handle in found.items()}

    def _drain(self) -> None:
        drain_s = self.config.drain_timeout_s
        gateway_s = self.config.gateway.drain_timeout_s if self.config.gateway else 0.0
        _settle([gateway.drain.remote(gateway_s) for gateway in self.gateways.values()], gateway_s)
        _settle([self.engines[name].stop.remote(drain_s) for name in self._alive()], drain_s)
        _settle([self.directory.close.remote()], 0.0)
        _settle([self.telemetry.close.remote()] if self.telemetry is not None else [], 0.0)

    def _alive(self) -> list[str]:
        """Engines that can hear; others have no server, or their node is gone, and are only killed."""
        try:
            engines = self.status().engines
        except FleetError as error:
            log.warning("%s; its engines are ended without a drain", error)
            return []
        lost = {engine.name for engine in engines if engine.state is EngineState.FAILED}
        return [name for name in self.engines if name not in lost]


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
        ConfigError: a wrong word in the environment's choice of captured content.
        LltmRayError: what kept an engine or the gateway from starting. Whatever was started is ended again.
    """
    config = replace(config, telemetry=settle_content(config.telemetry, os.environ))
    models, plans = _plan(config)
    here = ray.get_runtime_context().get_node_id() if config.gateway else None
    crew = Crew(config=config, run_id=secrets.token_hex(4), gateway_node_id=here, exposed=expose)
    fleet = _claim_name(crew, models, detached=detached)
    try:
        end_leftovers(config.name)
        shares = reserve(config, plans, detached=detached)
        _populate(fleet, crew, models, shares, detached=detached)
        _wait_ready(fleet, on_progress)
    except BaseException:
        fleet.stop()
        raise
    return fleet


def _claim_name(crew: Crew, models: tuple[ModelConfig, ...], *, detached: bool) -> Fleet:
    """The directory comes first: its name is the lock that keeps two starts of one fleet apart."""
    name = crew.config.name
    own = options(detached=detached) | {"name": names.directory(name)} | near()
    try:
        directory = actor(Directory).options(**own).remote(crew, models, secrets.token_bytes(SALT_BYTES))
    except ValueError:
        why = f"fleet {name!r} runs already: stop it (lltm-ray down), or choose another --name"
        raise FleetError(why) from None
    return Fleet(config=crew.config, run_id=crew.run_id, directory=directory)


def _plan(config: FleetConfig) -> tuple[tuple[ModelConfig, ...], tuple[SharePlan, ...]]:
    """A plan on what is free; Ray's view of that trails a fleet that has just been stopped by a moment."""
    deadline = time.monotonic() + VIEW_LAG_S
    while True:
        nodes = read_nodes()
        models = resolve_models(config, nodes)
        try:
            return models, plan_placement(name_engines(models), nodes)
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
    config, run_id, planned = ray.get(directory.describe.remote(), timeout=ANSWER_TIMEOUT_S)
    found = find_engines(name) if config.is_elastic else {each: find(names.engine(name, each)) for each in planned}
    engines = {engine: handle for engine, handle in found.items() if handle is not None}
    processes = config.gateway.processes if config.gateway else 0
    gateways = {each: find(names.gateway(name, each)) for each in names.gateways(processes)}
    return Fleet(
        config=config,
        run_id=run_id,
        directory=directory,
        engines=engines,
        gateways={each: handle for each, handle in gateways.items() if handle is not None},
        controller=find(names.controller(name)),
        telemetry=find(names.telemetry(name)),
        analytics=find_analytics(name),
    )


def find_directory(name: str) -> Any | None:
    """The directory of a fleet, or None when it does not run on this Ray cluster."""
    return find(names.directory(name))


def newest(known: Any | None, found: Any) -> Any:
    """The handle to use of two of one name: an actor ends with its first handle, so keep that while it is the same."""
    return known if known is not None and known._actor_id == found._actor_id else found


def get_engine(fleet: str, name: str) -> Any:
    """Handle of one engine, by name."""
    return get_named(names.engine(fleet, name))


def _populate(
    fleet: Fleet, crew: Crew, models: tuple[ModelConfig, ...], shares: tuple[Reservation, ...], *, detached: bool
) -> None:
    config = fleet.config
    crowd = Counter(share.plan.node_id for share in shares)
    fleet.telemetry = make_telemetry(config, detached=detached)
    for share, model in zip(shares, name_engines(models).values(), strict=True):
        beside = engines_beside(models, len(read_nodes()), crowd[share.plan.node_id]) if config.is_elastic else 0
        fleet.engines[share.plan.engine] = crew.make(
            model, share, engines_on_node=beside or crowd[share.plan.node_id], detached=detached
        )
    if config.gateway is not None and crew.gateway_node_id is not None:
        fleet.gateways = _make_gateways(config, config.gateway, crew.gateway_node_id, detached=detached)
    if config.is_elastic:
        own = options(detached=detached) | {"name": names.controller(config.name)} | near()
        fleet.controller = actor(ControllerActor).options(**own).remote(ControllerSpec(crew=crew, models=models))

    if config.analytics.enabled:
        fleet.analytics = make_analytics(config, detached=detached)


def _make_gateways(config: FleetConfig, gateway: GatewayConfig, node_id: str, *, detached: bool) -> dict[str, Any]:
    """One or several on a node. The first alone may look for a free port; the others share it."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    made: dict[str, Any] = {}
    for name in names.gateways(gateway.processes):
        own = options(detached=detached) | {"name": names.gateway(config.name, name), "scheduling_strategy": strategy}
        made[name] = actor(GatewayActor).options(**own).remote(name, config.name, gateway, config.telemetry)
        if gateway.processes > 1 and not gateway.port:
            gateway = replace(gateway, port=port_of(unwrap(made[name].ready.remote()).url))
    return made


def _wait_ready(fleet: Fleet, on_progress: OnProgress | None) -> None:
    """Every engine, the gateway and telemetry ready, or the first reason why not."""
    pending = [engine.ensure_ready.remote() for engine in fleet.engines.values()]
    pending += [gateway.ready.remote() for gateway in fleet.gateways.values()]
    pending += [fleet.telemetry.ready.remote()] if fleet.telemetry is not None else []
    if fleet.analytics is not None:
        wait_for_analytics(fleet.analytics, fleet.config.analytics)
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


def _settle(calls: list[Any], expected_s: float) -> None:
    """Wait for last words; an actor that cannot say them is killed all the same."""
    deadline = time.monotonic() + expected_s + ANSWER_TIMEOUT_S
    for call in calls:
        try:
            ray.get(call, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            log.warning("ended without its last words: %s", error)
