"""Whether an engine of a model may still come to those who wait for one, and the words for it when none will."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lltm_ray.errors import EngineNotReadyError
from lltm_ray.records import EngineState, ModelInfo, ModelState
from lltm_ray.routing.rows import LATE_DETAIL, Row


@dataclass(frozen=True, slots=True)
class Hope:
    """What those may expect who wait for a model; `only` is the engine that a request is pinned to."""

    model: str
    rows: Sequence[Row]
    """All its listed engines."""
    info: ModelInfo | None
    """What the directory says of it."""

    def is_vain(self, only: str | None = None) -> bool:
        """Whether each engine has failed, not just by a missed heartbeat, or was drained to stay so, or left.

        Where engines come with demand another one is made as long as there may be more; but not for requests that are
        pinned to one.
        """
        meant = self._meant(only)
        if only is None and self.info is not None and self.info.is_startable:
            meant = [row for row in meant if not _has_failed(row)]  # they hold no place: others are made for them
            if not meant or len(meant) < self.info.max_engines:
                return False
        return all(_stays_closed(row) or _has_failed(row) for row in meant)

    def error(self, only: str | None = None) -> EngineNotReadyError:
        """Says why no engine, or not the pinned one, can be used now."""
        error = EngineNotReadyError(f"for model {self.model!r}", f"not ready: {self._why(only)}")
        if self.is_vain(only):
            error.retry_after_s = None
        return error

    def warning(self, engine: str) -> str:
        """What people are told who drain the last open engine; empty where it is not."""
        if not self.is_vain():
            return ""
        remedy = f"`lltm-ray drain {engine} --undrain` opens the engine again"
        return f"no engine serves model {self.model!r} now, requests for it are refused with 503: {remedy}"

    def _meant(self, only: str | None) -> list[Row]:
        return [row for row in self.rows if only in (None, row.name)]

    def _why(self, only: str | None) -> str:
        info, meant = self.info, self._meant(only)
        why = ", ".join(f"{row.name} is {_trouble(row)}" for row in meant)
        if meant and info is not None and info.state is ModelState.FAILED:
            return f"{why}; {info.detail}".rstrip("; ")
        if meant or only is not None or info is None:
            return why or f"{only or 'it'} left the fleet"
        return f"it is {info.state}: {info.detail}".rstrip(": ")


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
