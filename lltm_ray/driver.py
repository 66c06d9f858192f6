"""The driver API: `Cluster` starts or finds a fleet and talks to its engines through Ray.

```python
with lltm_ray.Cluster.start(model="tiny", engines=2) as cluster:
    done = ray.get(cluster.engines[0].chat.remote([{"role": "user", "content": "hi"}], max_tokens=16))
    answer = cluster.chat("hi", max_tokens=16)
```

Calls go to engines by the same router as the gateway's, which names no slot here; it and the directory's watcher live
on one background event loop, so that a `Cluster` may be used from any thread.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import ray

from lltm_ray._loop import Loop
from lltm_ray._turns import as_messages
from lltm_ray.actors.adapters import AdapterInfo, FleetAdapters
from lltm_ray.actors.calls import Messages
from lltm_ray.actors.engine import CALL_TIMEOUT_S
from lltm_ray.actors.fleet import Fleet, OnProgress, find_fleet, start_fleet
from lltm_ray.actors.join import join_ray, leave_ray
from lltm_ray.actors.observe import FleetAnalytics, FleetTelemetry, WatchedCalls
from lltm_ray.actors.precheck import check_here
from lltm_ray.actors.remote import take_auth_mode
from lltm_ray.actors.runstate import RunState
from lltm_ray.actors.sessions import Sessions, sessions_of
from lltm_ray.config import FleetConfig, build, read_environment
from lltm_ray.errors import ConfigError
from lltm_ray.records import Completion, Embeddings, FleetStatus, RerankHit, StreamEvent

if TYPE_CHECKING:
    from lltm_ray.analytics.compare import Comparison
    from lltm_ray.analytics.report import Report

__all__ = ["Cluster", "join_ray", "leave_ray"]

BatchPrompt = str | list[int] | Messages


class Cluster:
    """A running fleet. Use `start` or `connect`, as a context manager or with `stop` / `close`."""

    def __init__(self, fleet: Fleet, *, started: bool, owns_ray: bool) -> None:
        self._fleet = fleet
        self._started = started
        self._owns_ray = owns_ray
        self._loop = Loop("Cluster", "start or connect another one")
        self._calls = WatchedCalls(fleet)
        self._sessions: Sessions | None = None
        self._loop.run(self._calls.open())

    @classmethod
    def start(
        cls,
        config: FleetConfig | None = None,
        *,
        address: str | None = None,
        detached: bool = False,
        on_progress: OnProgress | None = None,
        **settings: Any,
    ) -> Self:
        """Start a fleet and return once it serves.

        Args:
            config: all settings; or give them by name in `settings` (`model="tiny", engines=2, engine={...}`).
            address: Ray cluster to join. None: `RAY_ADDRESS`, the Ray this process uses already, else a new local one.
            detached: the fleet outlives this driver (only on a cluster that does).
            on_progress: called about five times a second with the fleet's status while it starts.
            settings: fields of `FleetConfig`.

        Raises:
            ConfigError, FleetError, PlacementError, ModelError, EngineError: see `actors.fleet.start_fleet`.
        """
        if config is not None and settings:
            raise ConfigError("config", sorted(settings), "give either a config or settings by name, not both")
        config = (config or build(FleetConfig, settings)).with_absolute_paths()
        if not (ray.is_initialized() or address or read_environment().ray_address):
            for model in config.served():
                check_here(config.for_model(model))
        owns_ray = join_ray(address)
        try:
            fleet = start_fleet(config, detached=detached, on_progress=on_progress)
        except BaseException:
            if owns_ray:
                ray.shutdown()
            raise
        return cls(fleet, started=True, owns_ray=owns_ray)

    @classmethod
    def connect(cls, name: str = "default", *, address: str | None = None) -> Self:
        """Handles to a fleet that runs already; leaving the context does not stop it.

        Args:
            name: the fleet's.
            address: Ray cluster. None: `RAY_ADDRESS`, else where `lltm-ray up` started that fleet on this machine, else
                the Ray of this machine where it runs.

        Raises:
            FleetError: no such fleet.
            ConfigError: no Ray cluster, or none that answers within 30 s.
        """
        state, origin = None if address or read_environment().ray_address else RunState.load(name), "the caller"
        if state is not None:
            address, origin = state.ray_address, f"fleet {name!r} (lltm-ray down --name {name} forgets it)"
            take_auth_mode(state.ray_auth_mode)
        owns_ray = join_ray(address, fleet=name, origin=origin)
        try:
            fleet = find_fleet(name)
        except BaseException:
            if owns_ray:
                ray.shutdown()
            raise
        return cls(fleet, started=False, owns_ray=owns_ray)

    # what there is ----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The fleet's name."""
        return self._fleet.config.name

    @property
    def engines(self) -> list[Any]:
        """Actor handles in name order: `ray.get(cluster.engines[0].chat.remote(messages))`."""
        self._fleet.refresh()
        return list(self._fleet.engines.values())

    @property
    def endpoint(self) -> str | None:
        """Base URL of the gateway, or None for a fleet without one."""
        gateways = self.status().gateways
        return gateways[0].url if gateways else None

    @property
    def ray_address(self) -> str:
        """Address by which other drivers join this Ray cluster."""
        return str(ray.get_runtime_context().gcs_address)

    def status(self) -> FleetStatus:
        """Engines and gateways as the directory knows them."""
        return self._fleet.status()

    @property
    def telemetry(self) -> FleetTelemetry:
        """What the fleet did and does: summaries, requests, timelines, metrics, rows."""
        return FleetTelemetry(self._fleet)

    @property
    def sessions(self) -> Sessions:
        """Conversations that are kept under a name, with their KV caches; where keys are asked for, the first key's.

        Raises:
            FleetError: the fleet has no gateway, which keeps them.
            ConfigError: its key file cannot be read on this machine.
        """
        if self._sessions is None:
            gateway = self._fleet.config.gateway
            self._sessions = sessions_of(self.endpoint, gateway.api_key_file if gateway else None)
        return self._sessions

    def report(self, window_s: float | None = None, *, until_unix_s: float | None = None) -> Report:
        """What an operator should know of the last `window_s` seconds: findings, the worst first, and all analyses.

        `lltm_ray.analytics.text.to_text` and `lltm_ray.analytics.html.to_html` make a page of it. The first one starts
        the fleet's analytics, which takes a few seconds; see `AnalyticsConfig`.

        Args:
            window_s: None: `analytics.window_s`. Where rows are kept of less, the report begins with the first one.
            until_unix_s: the window's end; None: the newest row that telemetry has.

        Raises:
            ConfigError: a window that is not positive, or an engine that is not usable.
            FleetError: the fleet runs without telemetry, or analytics does not answer.
            MissingExtraError: pandas or NetworkX is not installed.
            PlacementError: no GPU is free for it.
        """
        return FleetAnalytics(self._fleet).report(window_s, until_unix_s)

    def compare(self, before: tuple[float, float], after: tuple[float, float]) -> Comparison:
        """Two windows, as before and after a change: differences with confidence intervals.

        Args:
            before: start and end, seconds since the epoch.
            after: likewise.

        Raises:
            ConfigError: in one of them no request ended, or rows are kept of less than half of it; else as `report`.
        """
        return FleetAnalytics(self._fleet).compare(before, after)

    # adapters ---------------------------------------------------------------------------------------------------

    def adapters(self) -> list[AdapterInfo]:
        """LoRA adapters of every served model, with their scales on each engine."""
        return FleetAdapters(self._fleet).listing()

    def set_adapter_scale(self, name: str, scale: float) -> list[AdapterInfo]:
        """Change what requests that choose no adapter get of one, on all engines of its model.

        Args:
            name: `adapter`, or `served:adapter` where several models have one of that name.
            scale: its strength; 0: off.

        Raises:
            ModelNotFoundError, ConfigError: no such adapter, or several.
            FleetError: some engine did not take it; those that had taken it were set back.
        """
        FleetAdapters(self._fleet).set_scale(name, scale)
        return self.adapters()

    def load_adapter(
        self, path: str | os.PathLike[str], *, name: str | None = None, scale: float = 1.0, model: str | None = None
    ) -> list[AdapterInfo]:
        """Give a model's engines one more adapter: they are restarted one after the other, and no request is lost.

        Args:
            path: a GGUF adapter, at this path on every engine's node.
            name: what requests call it; None: the file's stem.
            scale: its strength; 0: only for requests that choose it.
            model: the served model; None: the only one.

        Raises:
            ConfigError, ModelError: not an adapter for this model; nothing was changed.
            FleetError: an engine did not start with it; all have what they had before.
        """
        FleetAdapters(self._fleet).load(os.fspath(path), name, scale, model)
        return self.adapters()

    def unload_adapter(self, name: str) -> list[AdapterInfo]:
        """Take an adapter away, as `load_adapter` brings one; requests that choose it by name are refused then."""
        FleetAdapters(self._fleet).unload(name)
        return self.adapters()

    # calls ------------------------------------------------------------------------------------------------------

    def chat(self, messages: str | Messages, *, timeout_s: float = CALL_TIMEOUT_S, **params: Any) -> Completion:
        """One chat answer from the engine that the router chooses; `params` as in /v1/chat/completions.

        Args:
            messages: in OpenAI's form; or a text, which is one message of the user.
            timeout_s: until the whole answer is there.
            params: parameters of the request; `extra_body={...}` sends names that look misspelt and are meant.

        Raises:
            ConfigError: these are no messages, or a parameter looks misspelt.
            UpstreamError: llama-server refused the request.
            DeadlineError: no answer within `timeout_s`; the request was cancelled and its slot freed.
            EngineNotReadyError, EngineExitedError: no engine could answer.
        """
        answer: Completion = self._loop.run(
            self._calls.call("chat", as_messages(messages), timeout_s=timeout_s, **params)
        )
        return answer

    def complete(self, prompt: str | list[int], *, timeout_s: float = CALL_TIMEOUT_S, **params: Any) -> Completion:
        """One completion of a raw prompt (text or token ids); `params` as in /completion, or OpenAI's `max_tokens`."""
        answer: Completion = self._loop.run(self._calls.call("complete", prompt, timeout_s=timeout_s, **params))
        return answer

    @overload
    def batch(
        self,
        prompts: Sequence[BatchPrompt],
        *,
        timeout_s: float = ...,
        return_exceptions: Literal[False] = ...,
        **params: Any,
    ) -> list[Completion]: ...
    @overload
    def batch(
        self, prompts: Sequence[BatchPrompt], *, timeout_s: float = ..., return_exceptions: bool, **params: Any
    ) -> list[Completion | BaseException]: ...
    def batch(
        self,
        prompts: Sequence[BatchPrompt],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        return_exceptions: bool = False,
        **params: Any,
    ) -> list[Any]:
        """Answers in input order, computed at once on all slots of all engines.

        Message lists are chatted; texts and token ids are completed as they are, without the chat template.

        Args:
            prompts: what is none is told by its place before anything is sent.
            timeout_s: until all answers are there.
            return_exceptions: errors of requests stand in the list at their prompts' places, beside the answers to the
                others. False: the first error is raised, no answer is returned.
            params: parameters of every request, see `chat`; checked before anything is sent, also where no prompt is.

        Raises:
            ConfigError: not a list of prompts, or `prompts[3]` is none, or a misspelt or wrong parameter.
            LltmRayError: the first error, after the other requests were cancelled; it notes its prompt's place.
            CancelledError: of asyncio, whatever `return_exceptions` is: a request was cancelled from outside.
        """
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
            kind = type(prompts).__name__
            raise ConfigError("prompts", prompts, f"is of type {kind}: give a list of prompts, [prompt] for one")
        answers: list[Any] = self._loop.run(
            self._calls.batch(prompts, timeout_s=timeout_s, return_exceptions=return_exceptions, **params)
        )
        return answers

    def stream(
        self, messages: str | Messages, *, timeout_s: float = CALL_TIMEOUT_S, **params: Any
    ) -> Generator[StreamEvent]:
        """As `chat`, event by event; leaving the loop early frees the slot."""
        events = self._calls.stream(as_messages(messages), timeout_s=timeout_s, **params)
        try:
            while (event := self._loop.run(_next(events))) is not None:
                yield event
        finally:
            self._loop.run(_close(events))

    def embed(self, texts: str | list[str], *, timeout_s: float = CALL_TIMEOUT_S, **params: Any) -> Embeddings:
        """One vector for each text; the fleet must run with `embeddings`."""
        answer: Embeddings = self._loop.run(self._calls.call("embed", texts, timeout_s=timeout_s, **params))
        return answer

    def rerank(
        self, query: str, documents: list[str], *, top_n: int | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[RerankHit, ...]:
        """Documents by relevance; the fleet must run with `reranking`."""
        call = self._calls.call("rerank", query, documents, timeout_s=timeout_s, top_n=top_n)
        hits: tuple[RerankHit, ...] = self._loop.run(call)
        return hits

    def count_tokens(self, messages: str | Messages, *, model: str = "", timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Tokens of chat messages, as `chat` takes them, as the model's template writes them; takes no slot."""
        call = self._calls.ask_any("count_tokens", as_messages(messages), model=model, timeout_s=timeout_s)
        count: int = self._loop.run(call)
        return count

    # life -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain and end the fleet, whoever started it; Ray too, if this object started Ray."""
        self._disconnect(self._fleet.stop)

    def close(self) -> None:
        """Let go of the fleet without stopping it."""
        self._disconnect(lambda: None)

    def _disconnect(self, last: Callable[[], None]) -> None:
        if self._loop.is_closed:
            return
        if self._sessions is not None:
            self._sessions.close()
        self._loop.run(self._calls.close())
        self._loop.stop()
        try:
            last()
        finally:
            if self._owns_ray:
                ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self.stop()
        else:
            self.close()


async def _next(events: AsyncIterator[StreamEvent]) -> StreamEvent | None:
    return await anext(events, None)


async def _close(events: Any) -> None:
    await events.aclose()
