"""Which engines were lost with their node for too long, and how they are replaced, whatever Ray says meanwhile."""

import asyncio
from types import SimpleNamespace

import pytest

from lltm_ray.actors import mender as mender_module
from lltm_ray.actors.directory_table import EXPIRE_AFTER_S, Table, is_silent
from lltm_ray.actors.mender import PATIENCE_S, LostShares, Mender
from lltm_ray.actors.placement import Held
from lltm_ray.config import ModelConfig
from lltm_ray.records import EngineInfo, EngineState

LOST, HERE, WAITS = Held(None, "", True), Held(None, "node", False), Held(None, "", False)


def test_a_share_is_overdue_once_it_was_lost_for_long_enough():
    lost = LostShares()
    held = {"a": LOST, "b": HERE, "c": WAITS}
    assert lost.overdue(held, 10.0) == []
    assert lost.overdue(held, 10.0 + PATIENCE_S - 0.1) == []
    assert lost.overdue(held, 10.0 + PATIENCE_S) == ["a"]


def test_a_share_that_found_a_place_in_between_is_not_overdue():
    lost = LostShares()
    lost.overdue({"a": LOST}, 10.0)
    lost.overdue({"a": HERE}, 11.0)
    assert lost.overdue({"a": LOST}, 10.0 + PATIENCE_S) == []
    assert lost.overdue({}, 20.0) == lost.overdue({"a": LOST}, 20.1) == []


def test_only_an_engine_of_which_nothing_is_heard_is_silent():
    known = {"name": "a", "model": "m"}
    assert is_silent(EngineInfo(**known, state=EngineState.FAILED, detail="no heartbeat for 6 s"))
    assert not is_silent(EngineInfo(**known, state=EngineState.FAILED, detail="the model is too big"))
    assert not is_silent(EngineInfo(**known, state=EngineState.READY, detail="no heartbeat for 6 s"))


class FakeRay:
    """What a mender asks of Ray and of its crew."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, Held] = {}
        self.actors: set[str] = set()
        self.made: list[tuple[str, int, bool]] = []
        self.faults: list[Exception] = []
        self.config = SimpleNamespace(name="f")
        patch.setattr(mender_module, "LOOK_EVERY_S", 0.001)
        patch.setattr(mender_module, "PATIENCE_S", 0.0)
        patch.setattr(mender_module, "reserved", lambda fleet: list(self.held.items()))
        patch.setattr(mender_module, "engine_names", lambda fleet: set(self.actors))
        patch.setattr(mender_module, "read_nodes", lambda: ("node",))
        patch.setattr(mender_module, "end_engine", self.end)
        patch.setattr(mender_module, "reserve_one", self.reserve)
        patch.setattr(mender_module, "is_revived", lambda: False)

    def end(self, fleet: str, name: str) -> None:
        self.held.pop(name, None)
        self.actors.discard(name)

    def reserve(self, fleet: str, plan, *, detached: bool):
        if self.faults:
            raise self.faults.pop()
        assert not detached
        self.held[plan.engine] = WAITS
        return SimpleNamespace(plan=plan)

    def make(self, model, share, *, engines_on_node: int, detached: bool, starts_itself: bool) -> None:
        if self.faults:
            raise self.faults.pop()
        self.actors.add(share.plan.engine)
        self.made.append((share.plan.engine, engines_on_node, detached and starts_itself))


@pytest.fixture
def ray_(monkeypatch):
    return FakeRay(monkeypatch)


@pytest.fixture
def table(tmp_path):
    known = Table("f", tmp_path / "t.json")
    for name in ("engine-0", "engine-1"):
        known.register(EngineInfo(name=name, model="m", state=EngineState.READY, url="http://x", node_id="gone"), 0.0)
    known.expire(EXPIRE_AFTER_S + 1)
    return known


def mender_of(ray_: FakeRay, table: Table) -> Mender:
    async def tell(changed: bool) -> None:
        assert changed in (True, False)

    model = ModelConfig(served_name="m", model="random", engines=2, gpu_share=0.5, cpu_share=1.0)
    return Mender(ray_, {"engine-0": model, "engine-1": model}, table, tell)


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_lost_engines_wait_for_a_share_and_are_made_anew_when_it_comes(ray_, table):
    ray_.held, ray_.actors = {"engine-0": LOST, "engine-1": LOST}, {"engine-0", "engine-1"}
    mender = mender_of(ray_, table)
    task = asyncio.create_task(mender.run())
    await until(lambda: ray_.held == {"engine-0": WAITS, "engine-1": WAITS})
    await until(lambda: all("waits for 0.5 GPU and 1 CPU" in each.detail for each in table.status().engines))
    assert (ray_.actors, ray_.made) == (set(), [])
    ray_.held = {"engine-0": HERE, "engine-1": HERE}
    await until(lambda: len(ray_.made) == 2)
    assert ray_.made == [("engine-0", 2, True), ("engine-1", 2, True)], "each is told of the other"
    await mender.close()
    await asyncio.wait_for(task, 60)


async def test_an_error_of_ray_between_giving_back_and_asking_anew_loses_no_engine(ray_, table):
    ray_.held, ray_.actors, ray_.faults = {"engine-0": LOST}, {"engine-0"}, [RuntimeError("the head is away")]
    mender = mender_of(ray_, table)
    with pytest.raises(RuntimeError, match="the head is away"):
        await mender.run()
    assert "engine-0" not in ray_.held
    task = asyncio.create_task(mender.run())  # as `keep_going` does
    await until(lambda: ray_.held.get("engine-0") is WAITS)
    ray_.held["engine-0"], ray_.faults = HERE, [ValueError("the name is taken until Ray has buried the old actor")]
    await until(lambda: ray_.made)
    await mender.close()
    await asyncio.wait_for(task, 60)


async def test_a_closed_mender_makes_nothing(ray_, table):
    ray_.held, ray_.actors = {"engine-0": LOST}, {"engine-0"}
    mender = mender_of(ray_, table)
    await mender.close()
    await asyncio.wait_for(mender.run(), 60)
    assert (ray_.held, ray_.made) == ({"engine-0": LOST}, [])


async def test_after_a_restart_of_the_directory_engines_that_nobody_holds_are_made_again(ray_, table, monkeypatch):
    monkeypatch.setattr(mender_module, "is_revived", lambda: True)
    monkeypatch.setattr(mender_module, "SPEAK_S", 0.0)
    ray_.actors = {"engine-1"}  # it is silent, but there: it may speak any moment
    mender = mender_of(ray_, table)
    task = asyncio.create_task(mender.run())
    await until(lambda: "engine-0" in ray_.held)
    assert set(ray_.held) == {"engine-0"}
    await mender.close()
    await asyncio.wait_for(task, 60)
