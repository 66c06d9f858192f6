"""Who waits for an engine that may come, who is refused at once because none will, and when to come back."""

import asyncio
import time

import pytest

from lltm_ray.errors import EngineNotReadyError, LltmRayError, OverloadedError
from lltm_ray.gateway.replies import send_error
from lltm_ray.records import EngineInfo, EngineState, ModelInfo, ModelState
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.router import Router
from lltm_ray.routing.scaling import Look, ModelRules, ScalingSettings, ScalingState, Start, plan

READY, STARTING, FAILED = EngineState.READY, EngineState.STARTING, EngineState.FAILED
ELASTIC = ModelInfo(name="m", state=ModelState.READY, engines=2, max_engines=2, is_elastic=True)
COME_BACK_S = 5


def engine(name, state=READY, *, pid=1):
    url = f"http://{name}:{pid}" if state is READY else ""
    return EngineInfo(name=name, model="m", state=state, url=url, slots_total=1, server_pid=pid)


def elastic(*engines):
    router = Router(8, 60.0)
    router.update(engines, [ELASTIC])
    return router


def acquire(router, only=None, deadline_s=60.0):
    return router.acquire(Ask(model="m", only=only, deadline_s=time.monotonic() + deadline_s))


async def waiter(router, only=None):
    task = asyncio.create_task(acquire(router, only))
    async with asyncio.timeout(30):
        while not router.snapshot()["waiting"] and not task.done():
            await asyncio.sleep(0)
    return task


def at_once():
    return asyncio.timeout(10)


async def test_where_engines_come_with_demand_who_is_pinned_to_one_that_leaves_is_told_so():
    router = elastic(engine("a"), engine("b"))
    router.close_engine("a", is_leaving=True)
    task = await waiter(router, only="a")
    router.update([engine("b")], [ELASTIC])
    async with at_once():
        with pytest.raises(EngineNotReadyError, match=r"^engine for model 'm' is not ready: a left the fleet$") as told:
            await task
    assert told.value.retry_after_s is None


async def test_where_engines_come_with_demand_who_is_pinned_to_one_that_failed_is_refused():
    router = elastic(engine("a"), engine("b", FAILED))
    async with at_once():
        with pytest.raises(EngineNotReadyError, match=r"b is failed$") as told:
            await acquire(router, only="b")
    assert told.value.retry_after_s is None
    router.update([engine("b", FAILED)], [ELASTIC])
    task = await waiter(router)
    assert not task.done(), "another one is made for who is not pinned"
    task.cancel()


async def test_a_failed_engine_holds_no_place_another_one_is_started_beside_a_drained_one():
    engines = [engine("a"), engine("b", FAILED)]
    router = elastic(*engines)
    router.close_engine("a")
    task = await waiter(router)
    assert not task.done()
    assert not router.unserved("a")
    state, now_s, actions = ScalingState(), 0.0, ()
    while not actions and now_s < 30:
        look = Look(rules=[ModelRules(name="m", ceiling=2)], demand=router.demand(), engines=engines, now_s=now_s)
        state, actions = plan(look, state, ScalingSettings())
        now_s += 0.5
    assert actions == (Start("m"),), "else waiting were in vain"
    router.update([*engines, engine("c")], [ELASTIC])
    assert (await task).engine.name == "c"


async def test_beside_as_many_drained_engines_as_there_may_be_a_failed_one_is_no_hope():
    router = elastic(engine("a"), engine("b"), engine("c", FAILED))
    router.close_engine("a")
    router.release(await acquire(router))
    assert not router.unserved("a")
    router.close_engine("b")
    assert router.unserved("b")
    async with at_once():
        with pytest.raises(EngineNotReadyError, match=r"b is drained .* c is failed$"):
            await acquire(router)


async def test_a_drain_by_hand_of_an_engine_that_leaves_refuses_nobody_who_waits_for_its_successor():
    router = Router(8, 60.0)
    router.update([engine("a")])
    router.close_engine("a", is_leaving=True)
    task = await waiter(router)
    router.close_engine("a")
    await asyncio.sleep(0)
    assert not task.done()
    assert not router.unserved("a")
    router.update([engine("b")])
    assert (await task).engine.name == "b"
    router.update([engine("a")])
    router.open_engine("a")
    router.close_engine("a")
    assert router.unserved("a"), "opened meanwhile, it leaves no more"
    router.update([engine("a", pid=2)])
    router.close_engine("a", is_leaving=True)
    router.update([engine("a", pid=3)])
    router.close_engine("a")
    assert router.unserved("a"), "another life, which nobody ends"


async def retry_after(error: LltmRayError) -> bytes | None:
    heads = []

    async def send(message):
        heads.append(message)

    await send_error(send, error, [])
    return dict(heads[0]["headers"]).get(b"retry-after")


async def test_only_where_somebody_may_come_a_client_is_told_to_come_back():
    router = Router(8, 60.0)
    router.update([engine("a", STARTING)])
    with pytest.raises(EngineNotReadyError) as told:
        await acquire(router, deadline_s=0.01)
    assert await retry_after(told.value) == b"%d" % COME_BACK_S
    router.update([engine("a")])
    router.close_engine("a")
    with pytest.raises(EngineNotReadyError) as told:
        await acquire(router)
    assert await retry_after(told.value) is None
    assert await retry_after(EngineNotReadyError("a", "unreachable")) == b"%d" % COME_BACK_S
    assert await retry_after(OverloadedError("full", 2.5)) == b"3"
    assert await retry_after(LltmRayError("else")) is None
