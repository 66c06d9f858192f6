"""How often one request may be tried, and where next."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from lltm_ray.records import EngineInfo
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.router import Router

_MAX_BREAKS = 2
"""Engines that may break off one request: the first could have been ill, a second says that the request is."""


@dataclass(slots=True)
class Tries:
    """The tries of one request.

    An engine that cannot be reached has seen nothing of the request, so it costs no try while another one could take
    it: with a node, many are lost at once, and who waits for one of the living may be offered a slot of a dead one, as
    only those are free. That ends with the request's own deadline; of one without, with the second such try of an
    engine.

    Args:
        router: knows the engines.
        most: tries that it has.
        is_pinned: to one engine, whatever happens.
        ask: tells its deadline; None: it needs no slot.
        clock: of that deadline, monotonic seconds.
    """

    router: Router
    most: int
    is_pinned: bool = False
    ask: Ask | None = None
    clock: Callable[[], float] = time.monotonic
    spent: int = 0
    avoid: set[str] = field(default_factory=set)
    """Engines that others are better than: those that failed it, and those that may have been lost with them."""
    _failed: set[str] = field(default_factory=set)
    _broken_nodes: set[str] = field(default_factory=set)
    _breaks: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the next try is the last one."""
        return self.spent + 1 >= self.most

    @property
    def is_over(self) -> bool:
        """Whether there is none left."""
        return self.spent >= self.most or self._breaks >= _MAX_BREAKS

    def fail(self, engine: EngineInfo, *, is_reached: bool = True, is_broken: bool = False) -> None:
        """This engine failed the request.

        Args:
            engine: as it was when the request was sent.
            is_reached: false when it cannot have seen anything of the request.
            is_broken: whether it broke off, so that the request may be to blame.
        """
        self.router.suspect(engine)
        names = self.router.loads(engine.model)
        usable = [each for each in self.router.engines(engine.model) if each.name in names]
        is_new = engine.name not in self._failed
        self._failed.add(engine.name)
        self.avoid.add(engine.name)
        is_lost = is_broken or not is_reached
        has_other_node = any(each.node_id != engine.node_id for each in usable)
        if is_lost and has_other_node:
            self.avoid.update(each.name for each in usable if each.node_id == engine.node_id)
        if is_broken:  # a second one on a node that is perhaps being lost says nothing of the request
            self._breaks += not (has_other_node and engine.node_id in self._broken_nodes)
            self._broken_nodes.add(engine.node_id)
        self.spent += is_reached or not self._is_free(usable, is_new=is_new)

    def _is_free(self, usable: Collection[EngineInfo], *, is_new: bool) -> bool:
        if self.is_pinned or all(each.name in self._failed for each in usable):
            return False
        return is_new if self.ask is None else self.clock() < self.ask.deadline_s
