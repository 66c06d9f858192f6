"""The front of a fleet: the ASGI app, its router, its account, and what keeps the router's table true.

`GatewayActor` serves it on uvicorn, the Serve ingress hands the same app to Serve. Fronts of one fleet share nothing on
a request's way: each owns its part of every engine's slots, by its place among the living ones.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from lltm_ray.actors import names
from lltm_ray.actors.remote import find
from lltm_ray.actors.shelf import Clerk
from lltm_ray.actors.telemetry import RemoteTelemetry
from lltm_ray.actors.transfer import RayFiles
from lltm_ray.actors.watch import HEARTBEAT_S, keep_going, reach_directory, watch_fleet
from lltm_ray.config import GatewayConfig, TelemetryConfig, read_environment
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.moves import MoveReport
from lltm_ray.gateway.session_store import SessionStore
from lltm_ray.gateway.trace import Tracing
from lltm_ray.records import FleetStatus, GatewayInfo, ServerCounters
from lltm_ray.routing.ledger import Drift, Ledger
from lltm_ray.routing.replay.recorder import TraceRecorder
from lltm_ray.routing.router import Router
from lltm_ray.routing.served import SlotShare
from lltm_ray.telemetry.content import make_capture, settle_content
from lltm_ray.telemetry.rows import QueueRow

if TYPE_CHECKING:
    from lltm_ray.actors.sender import Sender

log = logging.getLogger(__name__)

RECONCILE_EVERY_S = 3.0
GOSSIP_EVERY_S = 0.5
"""Two such times after a turn ended every gateway knows where; people and most tools take longer for the next."""


class OtherGateways:
    """The fleet's gateways but one, as actors.

    Args:
        fleet: whose.
        name: the one that is left out.
    """

    def __init__(self, fleet: str, name: str) -> None:
        self._fleet, self._name = fleet, name
        self.names: tuple[str, ...] = ()
        self.adapters: dict[str, tuple[str, ...]] = {}
        """Names of each engine's, by id; an engine that was restarted meanwhile may number them otherwise."""

    async def move_caches(self, engine: str, deadline_s: float) -> list[MoveReport]:
        """The same drain at each of them; one that does not answer keeps what it knows of."""
        done = await self._ask("move_caches", engine, deadline_s)
        return [each for each in done if isinstance(each, MoveReport)]

    async def open_engine(self, engine: str) -> None:
        """The same at each of them."""
        await self._ask("open_engine", engine)

    async def rescale(self, engine: str, scales: dict[int, float]) -> None:
        """The same at each of them; and the engine, which tells whoever else sends it requests."""
        named = {name: scales.get(id_, 0.0) for id_, name in enumerate(self.adapters.get(engine, ()))}
        await self._ask("rescale", engine, scales)
        handle = await asyncio.to_thread(find, names.engine(self._fleet, engine))
        if handle is not None:
            handle.note_scales.remote(named)

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        others = [names.gateway(self._fleet, name) for name in self.names if name != self._name]
        actors = await asyncio.to_thread(lambda: [find(name) for name in others])
        calls = [getattr(handle, method).remote(*args) for handle in actors if handle is not None]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                log.warning("a gateway of %s did not %s: %s", self._fleet, method, answer)
        return answers


class Front:
    """Keeps serving from its last table while the directory is away.

    Args:
        config: the gateway's settings.
        fleet: whose engines it serves.
        name: of this front among those of the fleet.
        telemetry: the fleet's settings; None: it runs without.
    """

    def __init__(self, config: GatewayConfig, fleet: str, name: str, telemetry: TelemetryConfig | None = None) -> None:
        self._fleet, self._name = fleet, name
        is_on = telemetry is not None and telemetry.enabled
        self._sender = _make_sender(fleet, name) if is_on else None
        self._status = FleetStatus(name="")
        self._has_table = asyncio.Event()
        self._recorder = _open_trace(config, name)
        self._router = Router(
            config.queue_limit,
            config.queue_timeout_s,
            policy=config.policy,
            wake=self._wake,
            record=self._recorder.record_lease if self._recorder else None,
        )
        self._ledger = _open_ledger(config, fleet, name)
        self._drift: dict[str, Drift] = {}
        self._wakes: dict[str, asyncio.Task[None]] = {}
        self._others = OtherGateways(fleet, name)
        self._tracing = _tracing(self._sender, telemetry)
        node_id = ray.get_runtime_context().get_node_id()
        self.app = GatewayApp(
            router=self._router,
            config=config,
            keys=ApiKeys.from_file(config.api_key_file) if config.api_key_file else ApiKeys(),
            status=lambda: self._status,
            ledger=self._ledger,
            files=RayFiles(node_id),
            sessions=_open_sessions(config, fleet, node_id),
            account=self.account,
            peers=self._others,
            tracing=self._tracing,
            telemetry=RemoteTelemetry(fleet) if is_on else None,
        )
        self._clerk = Clerk(fleet, name, self.app.shelf)
        self._beating: asyncio.Task[None] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Claims and queues of its router."""
        return self._router.snapshot()

    def word(self) -> dict[str, Any]:
        """What every heartbeat tells of this front: the demand for each model here, and which engines are closed."""
        rows = self._router.snapshot()["engines"]
        closed = tuple(name for name, row in rows.items() if row["is_closed"])
        return {"demand": self._router.demand(), "closed": closed}

    def account(self) -> dict[str, Any]:
        """The ledger's counters, and each engine's drift from its own: 0 expected, None while it works."""
        if self._ledger is None:
            return {}
        drift = {name: [each.prompt_tokens, each.generated_tokens] for name, each in self._drift.items()}
        return self._ledger.counters | {"drift_tokens": drift}

    def rescale(self, engine: str, scales: dict[int, float]) -> None:
        """Another gateway gave an engine's adapters other scales."""
        self._router.rescale(engine, scales)

    async def has_table(self) -> None:
        """Once `follow` has heard of the fleet; before, a request would be told that there are no engines."""
        await self._has_table.wait()

    async def follow(self) -> None:
        """Keep the router's table true, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(keep_going("follow the directory", self._follow))
            group.create_task(keep_going("hear of other gateways", self._gossip))
            group.create_task(keep_going("compare the account", self._reconcile))
            group.create_task(keep_going("level the engines", self.app.leveller.run))
            if self._sender is not None:
                group.create_task(keep_going("send telemetry", self._sender.run))
                group.create_task(keep_going("tell of the queue", self._tell_queue))

    async def _follow(self) -> None:
        async for status in watch_fleet(self._fleet):
            self._status = status
            if self._tracing is not None and status.salt:
                self._tracing.salt = status.salt
            self._others.names = tuple(each.name for each in status.gateways)
            self._others.adapters = {each.name: tuple(own.name for own in each.adapters) for each in status.engines}
            self._router.update(status.engines, status.models, self._share(status))
            self._router.hint(status.hints, status.salt)
            self._clerk.hear(status)
            self._has_table.set()

    async def _gossip(self) -> None:
        """What gateways do with slots, and what the servers show of them; no request waits for it."""
        gossip, version, directory = self._router.gossip, 0, None
        while True:
            await asyncio.sleep(GOSSIP_EVERY_S)
            salt = self._status.salt
            news = await gossip.news(salt) if len(self._others.names) > 1 else []
            try:
                directory = directory or await reach_directory(self._fleet)
                version, told = await directory.exchange_slots.remote(self._name, news, version)
            except (ray.exceptions.RayError, ValueError) as error:  # it is being restarted
                log.debug("nobody to gossip with: %s", error)
                gossip.untell(news)
                directory = None
                continue
            await gossip.hear(told, salt)

    async def serve_unseen(self) -> None:
        """`follow`, and be known to the directory, where nobody else tells it of us."""
        self._beating = asyncio.create_task(keep_going("tell the directory of this front", self._beat))
        try:
            await self.follow()
        finally:
            self._beating.cancel()

    async def leave(self) -> None:
        """The opposite, when nothing runs here any more: the others get our slots at once."""
        if self._beating is not None:
            self._beating.cancel()
        try:
            await (await reach_directory(self._fleet)).remove.remote(self._name)
        except (ray.exceptions.RayError, ValueError) as error:  # they will notice our silence
            log.warning("gateway %s of %s cannot take its leave: %s", self._name, self._fleet, error)

    async def _beat(self) -> None:
        node_id = ray.get_runtime_context().get_node_id()
        while True:
            info = GatewayInfo(name=self._name, url="", state="ready", node_id=node_id, pid=os.getpid(), **self.word())
            try:
                (await reach_directory(self._fleet)).register_gateway.remote(info)
            except ValueError as error:  # it is being restarted
                log.debug("no directory to register at: %s", error)
            await asyncio.sleep(HEARTBEAT_S)

    async def _tell_queue(self) -> None:
        """What is in hand, for telemetry."""
        while self._sender is not None:
            now = time.time_ns()
            for each in self._router.demand():
                row = QueueRow(
                    at_unix_nano=now,
                    gateway=self._name,
                    model=each.model,
                    waiting=each.waiting,
                    running=each.running,
                    rejected=each.rejected,
                    predicted_wait_s=each.predicted_wait_s if isfinite(each.predicted_wait_s) else None,
                )
                self._sender.outbox.add("queues", row)
            await asyncio.sleep(HEARTBEAT_S)

    def close(self) -> None:
        """Write account and trace to their ends."""
        if self._recorder is not None:
            self._recorder.close()
        if self._ledger is not None:
            self._ledger.close()

    def _share(self, status: FleetStatus) -> SlotShare:
        """Our place among the fleet's living gateways, in the order of their names."""
        living = sorted({each.name for each in status.gateways if each.state != "failed"} | {self._name})
        return SlotShare(living.index(self._name), len(living))

    def _wake(self, model: str) -> None:
        """Called for every request that waits; one word under way is enough."""
        if model not in self._wakes:
            self._wakes[model] = asyncio.create_task(self._tell_to_wake(model))
            self._wakes[model].add_done_callback(lambda _task: self._wakes.pop(model))

    async def _tell_to_wake(self, model: str) -> None:
        try:
            (await reach_directory(self._fleet)).wake.remote(model)
        except ValueError as error:  # it is being restarted: the next heartbeat's demand says the same
            log.debug("no directory to wake %s: %s", model, error)

    async def _reconcile(self) -> None:
        while self._ledger is not None:
            await asyncio.sleep(RECONCILE_EVERY_S)
            try:
                told: list[ServerCounters] = await (await reach_directory(self._fleet)).counters.remote()
                here = {each.engine for each in told}
                self._ledger.forget_servers(here)
                self._drift = {name: drift for name, drift in self._drift.items() if name in here}
                for counters in told:
                    await self._compare(self._ledger, counters)
            except (ray.exceptions.RayError, ValueError) as error:
                log.debug("no counters: %s", error)
            except (sqlite3.Error, OSError) as error:  # the next turn tries again
                log.warning("the account of %s cannot be compared: %s", self._fleet, error)

    async def _compare(self, ledger: Ledger, told: ServerCounters) -> None:
        drift = await asyncio.to_thread(
            ledger.reconcile,
            (told.engine, told.server_pid),
            told.prompt_tokens,
            told.generated_tokens,
            busy=told.busy,
            asked_unix_nano=told.asked_unix_nano,
        )
        if drift is not None:
            is_news = drift != self._drift.get(told.engine)
            if is_news and (drift.prompt_tokens or drift.generated_tokens):
                log.warning("%s counts other tokens than we do: %s", told.engine, drift)
            self._drift[told.engine] = drift


def _make_sender(fleet: str, name: str) -> Sender:
    from lltm_ray.actors.sender import Sender  # with telemetry off a process does without pyarrow

    return Sender(fleet, name)


def _tracing(sender: Sender | None, config: TelemetryConfig | None) -> Tracing | None:
    if sender is None or config is None:
        return None
    settled = settle_content(config, os.environ)  # a fleet's start has done so; a front alone asks here
    capture = make_capture(config.redact) if settled and settled.capture_content else None
    return Tracing(sender.outbox.add, capture, later=sender.outbox.later)


def _open_sessions(config: GatewayConfig, fleet: str, node_id: str) -> SessionStore | None:
    folder = read_environment().cache_dir / "sessions" / fleet
    return SessionStore(folder, config.sessions_mib * 2**20, node_id) if config.sessions_mib else None


def _open_trace(config: GatewayConfig, name: str) -> TraceRecorder | None:
    if config.trace is None:
        return None
    path = Path(config.trace)
    return TraceRecorder(path.with_name(f"{path.stem}-{name}{path.suffix}"))


def _open_ledger(config: GatewayConfig, fleet: str, name: str) -> Ledger | None:
    if not config.ledger:
        return None
    path = read_environment().cache_dir / "ledger" / f"{fleet}.sqlite"
    return Ledger(path, name=name, keep_requests=config.ledger_requests)
