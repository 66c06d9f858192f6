"""Joining a Ray cluster, and telling of one that does not answer: Ray itself tries for 14 minutes, without a word.

`ray.init` tries an address 20 times for 41 s. For "auto" it takes that of any raylet on this machine, whosever, and a
raylet outlives its cluster by up to a minute; or what `ray start` once wrote into a file. A process that has joined a
cluster of somebody else is ended by Ray a minute after that cluster. So ask first, and join none without need.

Asking takes parts of Ray that it does not promise to keep: where one is missing, Ray is joined unasked, as `ray.init`
alone would.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from lltm_ray.actors import names
from lltm_ray.actors.remote import take_auth_mode
from lltm_ray.config import read_environment
from lltm_ray.errors import ConfigError, FleetError

_START = "start one (lltm-ray up, or ray start --head)"
_STEP_S = 5.0
"""For each step towards an answer; Ray's client takes three, the first two of them always of 5 s."""
_TRIES = "RAY_gcs_server_port_wait_time_s"
"""How often Ray tries an address."""
_LIVING = ("ALIVE", "RESTARTING", "PENDING_CREATION")


def join_ray(address: str | None = None, *, fleet: str | None = None, origin: str = "the caller") -> bool:
    """Use the Ray this process is in, else join one, else start a local one; true when this call connected.

    Args:
        address: of a cluster. None: `RAY_ADDRESS`, else "local", or "auto" with `fleet`. "auto" is what `ray start`
            started last on this machine, else any that runs here; those that do not answer are passed over.
        fleet: none is started, and "auto" passes over those where this fleet does not run.
        origin: who names the address, for the error.

    Raises:
        ConfigError: nothing answers there, which takes 30 s at most; or there is none.
        FleetError: some answer, and have no such fleet.
    """
    if ray.is_initialized():
        return False
    if not address and (address := read_environment().ray_address):
        origin = "RAY_ADDRESS"
    address = address or ("auto" if fleet else "local")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a fleet of ours does not report to anyone by itself
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15, servers get what all else on the machine leaves
    refusal: ConfigError | FleetError = ConfigError("address", address, f"no Ray runs on this machine; {_START}")
    for place, namer in (_found() if address == "auto" else {address: origin}).items():
        try:
            _join(place, fleet if address == "auto" else None)
            return True
        except FleetError as error:
            refusal = error
        except (OSError, ValueError, RayError) as error:
            refusal = refusal if isinstance(refusal, FleetError) else _no_ray(place, namer, error)
    raise refusal


def leave_ray() -> None:
    """Undo a `join_ray` that connected."""
    ray.shutdown()


def _found() -> dict[str, str]:
    """Addresses on this machine with who names them, in the order of Ray's "auto", which tries one of them only."""
    find_last, find_all = (
        _part("_private.services", "find_bootstrap_address"),
        _part("_private.services", "find_gcs_addresses"),
    )
    if not (find_last and find_all):
        return {"auto": "Ray"}
    getattr(find_all, "cache_clear", lambda: None)()
    last = find_last(None)
    found = {last: "the last `ray start` (ray_current_cluster)"} if last else {}
    found |= {address: "a raylet of this machine" for address in find_all() if address != last}
    if found:
        take_auth_mode("token")  # as Ray does for "auto", if there is a token
    return found


def _join(address: str, fleet: str | None) -> None:
    """Join once a Ray answers there.

    Raises:
        OSError: nobody listens, or none of its nodes is this machine.
        RayError: nobody answers, or not to our token.
        FleetError: the fleet does not run there.
    """
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_STEP_S).close()
        if client_type := _part("_raylet", "InnerGcsClient"):
            client = client_type.standalone(address, cluster_id=None, timeout_ms=int(_STEP_S * 1e3))
            _await_node(client)
            if fleet and not _runs(fleet, client):
                why = f"no fleet {fleet!r} runs on a Ray of this machine: start it (lltm-ray up --name {fleet})"
                raise FleetError(why)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    with _one_try(address):
        ray.init(address, namespace=names.NAMESPACE, logging_level=logging.ERROR, log_to_driver=False, **options)


def _part(module: str, name: str) -> Any:
    """A part of Ray that is not for others; None where this Ray has no such."""
    return getattr(sys.modules.get(f"ray.{module}"), name, None)


def _await_node(client: Any) -> None:
    """Return once a node of this machine has registered: one that starts will soon, one that ends is gone for good."""
    find_nodes, deadline = _part("_private.services", "find_node_ids"), time.monotonic() + _STEP_S
    while find_nodes and (nodes := find_nodes()):  # none are seen from a container with processes of its own
        if any(client.check_alive([ray.NodeID.from_hex(node) for node in nodes], timeout=_STEP_S)):
            return
        if time.monotonic() > deadline:
            raise ConnectionError("none of its nodes is this machine")
        time.sleep(0.1)


def _runs(fleet: str, client: Any) -> bool:
    """Whether a fleet has a directory there, asked without joining."""

    async def ask() -> list[Any]:
        pages = (client.async_get_all_actor_info(actor_state_name=state, timeout=_STEP_S) for state in _LIVING)
        return [actor for page in await asyncio.gather(*pages) for actor in page.values()]

    with ThreadPoolExecutor(1) as pool:  # the caller may be in a loop of its own
        actors = pool.submit(asyncio.run, ask()).result()
    return any((actor.ray_namespace, actor.name) == (names.NAMESPACE, names.directory(fleet)) for actor in actors)


@contextmanager
def _one_try(address: str) -> Iterator[None]:
    """Should a Ray that has just answered end now, Ray is to try it once only."""
    mine = address != "local" and _TRIES not in os.environ
    if mine:
        os.environ[_TRIES] = "1"
    try:
        yield
    finally:
        if mine:
            os.environ.pop(_TRIES, None)


def _no_ray(address: str, namer: str, error: Exception) -> ConfigError:
    why = f"no Ray cluster answers there ({error}); {namer} names it: name another, or {_START}"
    refusal = ConfigError("address", address, why)
    refusal.__cause__ = error
    return refusal
