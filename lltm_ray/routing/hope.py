"""Whether an engine of a model may still come to those who wait for one, and the words for it when none will."""

from __future__ import annotations

from collections.abc import Sequence

from lltm_ray.errors import EngineNotReadyError
from lltm_ray.records import EngineState, ModelInfo, ModelState
from lltm_ray.routing.rows import LATE_DETAIL, Row


def is_hopeless(rows: Sequence[Row], info: ModelInfo | None, only: str | None = None) -> bool:
    """Whether waiting is in vain: each engine has failed, not just by a missed heartbeat, or was drained to stay so.

    Where engines come with demand another one is made as long as there may be more; but not for requests that are
    pinned to one.

    Args:
        rows: all listed engines of the model.
        info: what the directory says of it.
        only: the engine that a request is pinned to.
    """
    meant = [row for row in rows if only in (None, row.name)]
    if info is not None and info.is_startable:
        is_full = only is not None or len(rows) >= info.max_engines
        return bool(meant) and is_full and all(_stays_closed(row) for row in meant)
    return all(_stays_closed(row) or _has_failed(row) for row in meant)


def not_ready(model: str, rows: Sequence[Row], info: ModelInfo | None) -> EngineNotReadyError:
    """The error that says why none of these engines of a model can be used now."""
    why = describe(rows) if rows or info is None else f"it is {info.state}: {info.detail}".rstrip(": ")
    if rows and info is not None and info.state is ModelState.FAILED:
        why = f"{why}; {info.detail}".rstrip("; ")
    return EngineNotReadyError(f"for model {model!r}", f"not ready: {why}")


def describe(rows: Sequence[Row]) -> str:
    """Why none of these engines can be used now, for people."""
    return ", ".join(f"{row.name} is {_trouble(row)}" for row in rows) or "it left the fleet"


def unserved(model: str, engine: str) -> str:
    """What people are told who drain the last open engine of a model."""
    remedy = f"`lltm-ray drain {engine} --undrain` opens the engine again"
    return f"no engine serves model {model!r} now, requests for it are refused with 503: {remedy}"


def _stays_closed(row: Row) -> bool:
    return row.closed and not row.leaving and row.info.state is EngineState.READY


def _has_failed(row: Row) -> bool:
    return row.info.state is EngineState.FAILED and not row.info.detail.startswith(LATE_DETAIL)


def _trouble(row: Row) -> str:
    if row.info.state is not EngineState.READY:
        return str(row.info.state)
    if row.closed:
        return "being drained" if row.leaving else f"drained (lltm-ray drain {row.name} --undrain opens it)"
    if row.suspicions:
        return "ready but did not answer just now"
    return "ready" if row.slots_total else "ready but has no slots"
