"""Random walks over a router: claims never pass the slots, never leak, and waiters of a model are served in order."""

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lltm_ray.errors import EngineNotReadyError, OverloadedError
from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.routing.router import Lease, Router

NAMES = ("a", "b", "c")
MODELS = {"a": "m", "b": "m", "c": "n"}


class RouterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.router = Router(queue_limit=6, queue_timeout_s=60)
        self.table: dict[str, EngineInfo] = {}
        self.leases: list[Lease] = []
        self.tasks: list[asyncio.Task[Lease]] = []
        self.wishes: dict[asyncio.Task[Lease], tuple[str, frozenset[str]]] = {}
        self.pids = dict.fromkeys(NAMES, 1)
        self.allowed: dict[str, int] = {}

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
        """Let the loop go on until nothing changes; waiters of one model must end in the order they came."""

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
        state=st.sampled_from([EngineState.READY, EngineState.STARTING, EngineState.DRAINING]),
    )
    def set_engine(self, name: str, slots: int, restarts: bool, state: EngineState) -> None:
        self.pids[name] = pid = self.pids[name] + restarts
        self.table[name] = EngineInfo(
            name=name, model=MODELS[name], state=state, url=f"http://{name}:{pid}", slots_total=slots, server_pid=pid
        )
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

    @rule(model=st.sampled_from("mn"), exclude=st.sets(st.sampled_from(NAMES)))
    def ask(self, model: str, exclude: set[str]) -> None:
        if model in self.router.models():
            task = self.loop.create_task(self.router.acquire(model, exclude=exclude))
            self.tasks.append(task)
            self.wishes[task] = model, frozenset(exclude)
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
        shown = self.router.snapshot()
        for model in shown["waiting"]:
            ready = [
                (name, row)
                for name, row in shown["engines"].items()
                if row["model"] == model and row["state"] == "ready" and row["slots_total"] > 0
            ]
            queue = self.router._queues[model]
            for waiter in queue:
                names = {name for name, _ in ready} - set(waiter.exclude) or {name for name, _ in ready}
                assert all(row["slots_busy"] >= row["slots_total"] for name, row in ready if name in names)

    @invariant()
    def the_number_of_waiters_is_the_number_of_unfinished_requests(self) -> None:
        assert sum(self.router.snapshot()["waiting"].values()) == len(self.tasks) == self.router._waiting


RouterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_walks_neither_overbook_nor_leak = RouterMachine.TestCase
