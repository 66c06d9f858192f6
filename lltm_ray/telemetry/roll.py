"""Who is in the fleet: what is kept for each engine must end some time after the engine has."""

from __future__ import annotations

from collections.abc import Iterable

GONE_AFTER_S = 900.0
"""Longer than requests' energy may take to be known (`energy.PATIENCE_S`), and than any scraper pauses."""


class Roll:
    """Engines by when they were last there; for one thread. Nobody is gone before the fleet's table is known."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._members: tuple[str, ...] | None = None

    def name(self, engines: Iterable[str]) -> None:
        """Who is in the fleet's table now."""
        self._members = tuple(engines)

    def see(self, engine: str, now_s: float) -> None:
        """Rows tell of it, whether it is in the table or not."""
        self._seen[engine] = now_s

    def gone(self, now_s: float) -> frozenset[str]:
        """Those that were not there for `GONE_AFTER_S`, each told once."""
        if self._members is None:
            return frozenset()
        self._seen.update(dict.fromkeys(self._members, now_s))
        found = frozenset(engine for engine, at in self._seen.items() if at < now_s - GONE_AFTER_S)
        for engine in found:
            del self._seen[engine]
        return found
