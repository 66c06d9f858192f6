"""`lltm-ray status` and `lltm-ray down`: look at a running fleet, end it."""

from __future__ import annotations

import os
import signal
import time

from lltm_ray.actors.runstate import RunState
from lltm_ray.cli._endpoint import NameOption, fleet_meant
from lltm_ray.cli._output import ERR, OUT, JsonFlag, errors_end_the_command, print_json, print_table
from lltm_ray.config import read_environment
from lltm_ray.driver import Cluster
from lltm_ray.errors import FleetError
from lltm_ray.records import FleetStatus

DOWN_TIMEOUT_S = 120.0


@errors_end_the_command()
def status(name: NameOption = "default", as_json: JsonFlag = False) -> None:
    """Engines and gateways of a running fleet."""
    cluster = _connect(fleet_meant(name))
    try:
        seen = cluster.status()
    finally:
        cluster.close()
    if as_json:
        print_json(seen.public())
    else:
        _print(seen)


@errors_end_the_command()
def down(name: NameOption = "default") -> None:
    """Drain a fleet, end its servers, and Ray with it if `up` started Ray."""
    state = RunState.load(name)
    if state is not None and state.pid:
        _end_process(state)
    else:
        try:
            with ERR.status("draining …"):
                _connect(name).stop()
        finally:  # gone, or out of reach: either way it must not keep its name
            if state is not None:
                state.forget()
    OUT.print(f"{name} is down")


def _connect(name: str) -> Cluster:
    state = RunState.load(name)
    if state is None and read_environment().ray_address is None:
        raise FleetError(f"no fleet {name!r} runs here: start it (lltm-ray up --name {name}), or set RAY_ADDRESS")
    return Cluster.connect(name)


def _end_process(state: RunState) -> None:
    """Ask the process that holds the fleet to drain, and see it go."""
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    with ERR.status("draining …"):
        while state.is_alive:
            if time.monotonic() > deadline:
                raise FleetError(f"process {state.pid} has not ended within {DOWN_TIMEOUT_S:.0f} s: look at its log")
            time.sleep(0.1)
    state.forget()


def _print(seen: FleetStatus) -> None:
    closed = {name for gateway in seen.gateways for name in gateway.closed}
    columns = ("engine", "state", "model", "node", "gpus", "share", "server pid", "slots", "restarts", "detail")
    rows = [
        (
            engine.name,
            f"{engine.state}, closed" if engine.name in closed else str(engine.state),
            engine.model,
            engine.node_ip,
            ",".join(map(str, engine.gpu_ids)) or None,
            engine.share,
            str(engine.server_pid or ""),
            f"{engine.slots_busy}/{engine.slots_total}",
            engine.restarts,
            engine.detail or None,
        )
        for engine in seen.engines
    ]
    print_table(columns, rows, title=seen.name)
    if len(seen.models) > 1 or any(model.is_elastic for model in seen.models):
        models = [
            (model.name, str(model.state), f"{model.engines} of {model.min_engines}-{model.max_engines}", model.detail)
            for model in seen.models
        ]
        print_table(("model", "state", "engines", "detail"), models)
    gateways = [(item.name, item.state, item.url, str(item.pid), item.restarts) for item in seen.gateways]
    print_table(("gateway", "state", "url", "pid", "restarts"), gateways)
