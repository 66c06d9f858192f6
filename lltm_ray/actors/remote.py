"""What every actor of ours has in common with Ray's scheduler."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lltm_ray.actors import names


def actor(cls: type[Any]) -> Any:
    """Make a Ray actor class: restarted for ever, no CPU of its own (engines ask for their share), no blind retries.

    Calls are not repeated by Ray, because only the caller knows whether a request may run twice.
    """
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(cls)


def node_ip() -> str:
    """This node's address as other nodes reach it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def take_auth_mode(mode: str) -> None:
    """Use a cluster's token mode, unless RAY_AUTH_MODE says otherwise.

    Ray finds the mode out by itself for "auto", not for an address; it reads the variable only when it is imported.
    """
    if mode == "token" and "RAY_AUTH_MODE" not in os.environ:
        logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def is_revived() -> bool:
    """Whether Ray restarted the actor we are in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own property reads one that Ray has deprecated
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def options(*, detached: bool) -> dict[str, Any]:
    """Ray's options that all named actors of a fleet have."""
    return {"namespace": names.NAMESPACE, "lifetime": "detached" if detached else None}


def near() -> dict[str, Any]:
    """Ray's options for an actor on its maker's node as long as that node lives, and on any other after that.

    Ray 2.60 ignores a soft affinity of actors that ask for no resource at all: so it is one byte of memory.
    """
    strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return {"scheduling_strategy": strategy, "memory": 1}


def get_named(actor_name: str) -> Any:
    """An actor by name.

    Raises:
        ValueError: there is none, or this process is in no cluster: Ray would start one to answer.
    """
    if not ray.is_initialized():
        raise ValueError(f"this process has joined no Ray cluster: no actor {actor_name!r}")
    return ray.get_actor(actor_name, namespace=names.NAMESPACE)


def find(actor_name: str) -> Any | None:
    """An actor by name; None when there is none (any more), so that what is left of a fleet can still be ended."""
    try:
        return get_named(actor_name)
    except ValueError:
        return None
