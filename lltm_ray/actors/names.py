"""Names of actors and placement groups: `lltm:<fleet>:<role>`, all in one Ray namespace."""

from __future__ import annotations

NAMESPACE = "lltm_ray"


def directory(fleet: str) -> str:
    """The fleet's directory."""
    return f"lltm:{fleet}:directory"


def controller(fleet: str) -> str:
    """The one that starts and stops engines with demand."""
    return f"lltm:{fleet}:controller"


def engine(fleet: str, name: str) -> str:
    """One engine, and the placement group that holds its share."""
    return f"lltm:{fleet}:engine:{name}"


def gateway(fleet: str, name: str) -> str:
    """One gateway."""
    return f"lltm:{fleet}:gateway:{name}"


def gateways(processes: int) -> tuple[str, ...]:
    """`gateway-0`, `gateway-1`, ...: those of one fleet that share a port."""
    return tuple(f"gateway-{index}" for index in range(processes))


def node(fleet: str, node_id: str) -> str:
    """The sampler on one node."""
    return f"lltm:{fleet}:node:{node_id}"


def telemetry(fleet: str) -> str:
    """The fleet's telemetry."""
    return f"lltm:{fleet}:telemetry"


def analytics(fleet: str) -> str:
    """The fleet's analytics."""
    return f"lltm:{fleet}:analytics"
