"""Random walks over a router: claims never pass the slots, never leak, and waiters of a model are served in order."""

import asyncio
import math
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lltm_ray.errors import EngineNotReadyError, OverloadedError
from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.router import Lease, Router
from lltm_ray.routing.rows import LATE_DETAIL, SUSPECT_S

NAMES = ("a", "b", "c")
MODELS = {"a": "m", "b": "m", "c": "n"}
QUEUE_LIMIT = 3
QUEUE_TIMEOUT_S = 60.0


def acquire(router: Router, model: str | None, *, timeout_s: float | None = None, exclude=(), only=None):
    deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    return router.acquire(Ask(model=model or "", only=only, deadline_s=deadline_s), exclude=exclude)


def waiters(router: Router, model: str):
    return list(router._models[model].admission.order())


class Loop(asyncio.SelectorEventLoop):
    """Its clock is ours; it never sleeps, because there is always something to run."""

    now = 0.0

    def time(self) -> float:
        return self.now


class RouterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.router = Router(QUEUE_LIMIT, QUEUE_TIMEOUT_S)
        self.table: dict[str, EngineInfo] = {}
        self.leases: list[Lease] = []
        self.tasks: list[asyncio.Task[Lease]] = []
        self.wishes: dict[asyncio.Task[Lease], tuple[str, str | None]] = {}
        self.pids = dict.fromkeys(NAMES, 1)
        self.allowed: dict[str, int] = {}
        self.leaving: set[str] = set()

    def teardown(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.run()
        for lease in self.leases:
            self.router.release(lease)
        rows = self.router.snapshot()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        assert not rows["waiting"]
        assert all(row["slots_busy"] == 0 for row in rows["engines"].values())

    def run(self) -> None:
        """Let the loop go on until nothing changes; waiters of one model and pin must end in the order they came."""

        async def settle() -> None:
            for _ in range(4):
                await asyncio.sleep(0)

        self.loop.run_until_complete(settle())
        for at, task in enumerate(list(self.tasks)):
            if task.done() and not task.cancelled() and task.exception() is None:
                before = [each for each in self.tasks[:at] if not each.done()]
                assert self.wishes[task] not in [self.wishes[each] for each in before], "a newcomer overtook"
        for task in list(self.tasks):
            if task.done():
                self.tasks.remove(task)
                if not task.cancelled() and task.exception() is None:
                    self.leases.append(task.result())
                elif not task.cancelled():
                    assert isinstance(task.exception(), EngineNotReadyError | OverloadedError)

    @initialize()
    def start(self) -> None:
        self.set_engine("a", 2, False, EngineState.READY)
        self.set_engine("c", 1, False, EngineState.READY)

    @rule(
        name=st.sampled_from(NAMES),
        slots=st.integers(0, 3),
        restarts=st.booleans(),
        state=st.sampled_from([EngineState.READY, EngineState.STARTING, EngineState.DRAINING, EngineState.FAILED]),
        detail=st.sampled_from(["", f"{LATE_DETAIL} for 15 s"]),
    )
    def set_engine(self, name: str, slots: int, restarts: bool, state: EngineState, detail: str = "") -> None:
        self.pids[name] = pid = self.pids[name] + restarts
        info = EngineInfo(name=name, model=MODELS[name], state=state, detail=detail)
        self.table[name] = info.with_(url=f"http://{name}:{pid}", slots_total=slots, server_pid=pid)
        self.update()

    @rule(name=st.sampled_from(NAMES))
    def drop_engine(self, name: str) -> None:
        self.table.pop(name, None)
        self.update()

    def update(self) -> None:
        async def go() -> None:
            self.router.update(self.table.values())

        self.loop.run_until_complete(go())
        self.run()
        for name, row in self.router.snapshot()["engines"].items():
            self.allowed[name] = max(row["slots_total"], row["slots_busy"])

    @rule(model=st.sampled_from("mn"), exclude=st.sets(st.sampled_from(NAMES)), only=st.none() | st.sampled_from(NAMES))
    def ask(self, model: str, exclude: set[str], only: str | None) -> None:
        if model not in self.router.models() or (only and (only not in self.table or MODELS[only] != model)):
            return
        full = self.router.snapshot()["waiting"].get(model, 0) == QUEUE_LIMIT
        task = self.loop.create_task(acquire(self.router, model, exclude=exclude, only=only))
        self.tasks.append(task)
        self.wishes[task] = model, only
        self.run()
        if not full and task.done():
            assert not isinstance(task.exception(), OverloadedError), "refused beside a queue with places"

    @rule(name=st.sampled_from(NAMES), closes=st.booleans(), is_leaving=st.booleans())
    def close_or_open(self, name: str, closes: bool, is_leaving: bool) -> None:
        async def go() -> None:
            if closes:
                self.router.close_engine(name, is_leaving=is_leaving)
            else:
                self.router.open_engine(name)

        self.leaving &= self.shut()  # a new life leaves no more
        self.loop.run_until_complete(go())
        self.run()
        self.leaving = (self.leaving | ({name} if is_leaving else set())) if closes else self.leaving - {name}
        self.leaving &= self.shut()

    def shut(self) -> set[str]:
        return {name for name, row in self.router.snapshot()["engines"].items() if row["is_closed"]}

    @rule(name=st.sampled_from(NAMES), is_old=st.booleans())
    def suspect(self, name: str, is_old: bool) -> None:
        async def go() -> None:
            before = self.router.snapshot()
            info = self.table[name]
            self.router.suspect(info.with_(server_pid=-1) if is_old else info)
            assert not is_old or self.router.snapshot() == before, "a server that is gone told on the new one"

        if name in self.table:
            self.loop.run_until_complete(go())

    @rule(seconds=st.sampled_from([SUSPECT_S, QUEUE_TIMEOUT_S]))
    def advance(self, seconds: float) -> None:
        self.loop.now += seconds
        self.run()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), cancel_first_waiter=st.booleans())
    def release(self, data: st.DataObject, cancel_first_waiter: bool) -> None:
        """Also with the first waiter cancelled in the very step that may have granted it the slot."""
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))

        async def go() -> None:
            self.router.release(lease)
            if cancel_first_waiter and self.tasks:
                self.tasks[0].cancel()

        self.loop.run_until_complete(go())
        self.run()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.tasks[data.draw(st.integers(0, len(self.tasks) - 1))].cancel()
        self.run()

    @invariant()
    def claims_are_exactly_the_leases_held(self) -> None:
        for name, row in self.router.snapshot()["engines"].items():
            info = self.table[name]
            held = [
                lease
                for lease in self.leases
                if lease.engine.name == name
                and (lease.engine.url, lease.engine.server_pid) == (info.url, info.server_pid)
            ]
            assert row["slots_busy"] == len(held)
            assert row["slots_busy"] <= self.allowed[name], "more claims than slots"

    @invariant()
    def nobody_waits_beside_a_slot_it_could_use(self) -> None:
        engines = self.router.snapshot()["engines"]
        for model in self.router.snapshot()["waiting"]:
            usable = {
                name
                for name, row in engines.items()
                if row["model"] == model and row["state"] == "ready" and not row["is_suspect"] and not row["is_closed"]
                if row["slots_busy"] < row["slots_total"]
            }
            for waiter in waiters(self.router, model):
                assert not usable & ({waiter.only} if waiter.only else usable)

    @invariant()
    def nobody_waits_without_hope(self) -> None:
        rows = self.router.snapshot()["engines"]
        shut = {name for name, row in rows.items() if row["is_closed"] and row["state"] == "ready"} - self.leaving
        for model in self.router.snapshot()["waiting"]:
            for waiter in waiters(self.router, model):
                infos = [info for info in self.router.engines(model) if waiter.only in (None, info.name)]
                hopes = [info for info in infos if info.state is not EngineState.FAILED or info.detail]
                assert {info.name for info in hopes} - shut

    @invariant()
    def the_number_of_waiters_is_the_number_of_unfinished_requests(self) -> None:
        counts = self.router.snapshot()["waiting"].values()
        assert sum(counts) == len(self.tasks)
        assert all(count <= QUEUE_LIMIT for count in counts)


RouterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_walks_neither_overbook_nor_leak = RouterMachine.TestCase
