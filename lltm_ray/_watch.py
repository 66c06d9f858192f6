"""Who watches the calls that a program makes: nobody, until `telemetry.instrument()` brings somebody.

Clients and drivers ask here for a `Watch` of each call; those who watch and those who call know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

from lltm_ray.records import StreamEvent


class Asked(NamedTuple):
    """One call."""

    url: str
    """Base URL of the server; empty: it goes through Ray."""
    path: str
    """llama-server's route of its meaning."""
    body: Any
    """The request's fields."""
    is_stream: bool
    """Answered by events."""


class Watch:
    """Hears what becomes of one call, as a context around it. This one does not listen."""

    __slots__ = ()
    headers: Mapping[str, str] = MappingProxyType({})
    """To be sent with the request: the trace's `traceparent`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It is over; `GeneratorExit`: whoever read the stream went away."""

    def event(self, event: StreamEvent) -> None:
        """A stream's next event, before whoever reads it sees it."""

    def answer(self, answer: Any) -> None:
        """The whole answer."""


Observer = Callable[[Asked], Watch]
IDLE = Watch()
_observer: Observer | None = None


def watch(url: str, path: str, body: Any, *, is_stream: bool = False) -> Watch:
    """The watch of one call; arguments as in `Asked`."""
    return IDLE if _observer is None else _observer(Asked(url, path, body, is_stream))


def set_observer(observer: Observer | None) -> None:
    """Let `observer` watch all calls from now on; None: nobody."""
    global _observer
    _observer = observer
