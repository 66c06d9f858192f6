import asyncio
import math
import time
from collections import Counter, deque
from dataclasses import replace

import pytest

from lltm_ray.config import ROUTING_POLICIES
from lltm_ray.errors import ConfigError, EngineNotReadyError, ModelNotFoundError, OverloadedError
from lltm_ray.records import Adapter, EngineInfo, EngineState, ModelInfo, ModelState, Timings
from lltm_ray.routing import rows as rows_module
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.router import Router, Served
from lltm_ray.routing.rows import LATE_DETAIL
from lltm_ray.routing.served import SlotShare


def acquire(router: Router, model: str | None, *, timeout_s: float | None = None, exclude=(), only=None):
    deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    return router.acquire(Ask(model=model or "", only=only, deadline_s=deadline_s), exclude=exclude)


def engine(name: str, *, model: str = "m", slots: int = 1, state: EngineState = EngineState.READY, pid: int = 1):
    url = f"http://{name}:{pid}" if state is EngineState.READY else ""
    return EngineInfo(name=name, model=model, state=state, url=url, slots_total=slots, server_pid=pid)


def make(*engines: EngineInfo, queue_limit: int = 8, timeout_s: float = 5.0, **kw) -> Router:
    router = Router(queue_limit, timeout_s, **kw)
    router.update(engines)
    return router


def busy(router: Router) -> dict[str, int]:
    return {name: row["slots_busy"] for name, row in router.snapshot()["engines"].items()}


async def waiting(router: Router, count: int) -> None:
    async with asyncio.timeout(60):
        while sum(router.snapshot()["waiting"].values()) != count:
            await asyncio.sleep(0)


async def test_requests_alternate_between_equal_engines():
    router = make(engine("a", slots=2), engine("b", slots=2))
    names = [(await acquire(router, "m")).engine.name for _ in range(4)]
    assert names == ["a", "b", "a", "b"]


async def test_a_full_queue_is_refused_with_a_retry_time_of_at_least_a_second():
    router = make(engine("a"), queue_limit=0)
    await acquire(router, "m")
    with pytest.raises(OverloadedError) as caught:
        await acquire(router, "m")
    assert caught.value.retry_after_s >= 1
    assert router.snapshot()["rejected"] == 1


async def test_the_retry_time_grows_with_the_time_that_requests_hold_their_slots():
    retries = []
    for held_s in (1.0, 30.0):
        now = [0.0]
        router = make(engine("a"), queue_limit=1, clock=lambda now=now: now[0])
        for _ in range(10):
            lease = await acquire(router, "m")
            now[0] += held_s
            told = Timings(prompt_n=10, prompt_ms=1e3, predicted_n=10, predicted_ms=held_s * 1e3 - 1e3)
            router.release(lease, Served(timings=told))
        lease = await acquire(router, "m")
        task = asyncio.create_task(acquire(router, "m", timeout_s=1e6))
        await waiting(router, 1)
        with pytest.raises(OverloadedError) as caught:
            await acquire(router, "m", timeout_s=1e6)
        retries.append(caught.value.retry_after_s)
        router.release(lease)
        router.release(await task)
    assert retries[1] > 5 * retries[0] >= 5


async def test_a_wait_that_is_too_long_is_refused_and_leaves_no_trace():
    router = make(engine("a"))
    lease = await acquire(router, "m")
    with pytest.raises(OverloadedError, match="before its deadline"):
        await acquire(router, "m", timeout_s=0.01)
    assert router.snapshot()["waiting"] == {}
    router.release(lease)
    assert busy(router) == {"a": 0}


async def test_waiters_get_slots_in_the_order_they_came():
    router = make(engine("a"))
    lease = await acquire(router, "m")
    order: list[int] = []

    async def take(number: int) -> None:
        mine = await acquire(router, "m")
        order.append(number)
        await asyncio.sleep(0)
        router.release(mine)

    tasks = []
    for number in range(5):
        tasks.append(asyncio.create_task(take(number)))
        await waiting(router, number + 1)
    router.release(lease)
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]


async def test_a_second_release_frees_nothing():
    router = make(engine("a", slots=2))
    first, second = await acquire(router, "m"), await acquire(router, "m")
    router.release(first)
    router.release(first)
    assert busy(router) == {"a": 1}
    router.release(second)


async def test_a_waiter_cancelled_in_the_step_that_grants_it_a_slot_gives_it_back():
    router = make(engine("a"))
    lease = await acquire(router, "m")
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    router.release(lease)  # the waiter owns the slot now, but has not run
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert busy(router) == {"a": 0}
    router.release(await acquire(router, "m", timeout_s=0))


async def test_a_cancelled_waiter_does_not_hold_up_the_ones_behind_it():
    router = make(engine("a"))
    lease = await acquire(router, "m")
    first = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    second = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 2)
    first.cancel()
    router.release(lease)
    assert (await second).engine.name == "a"
    assert first.cancelled()


async def test_an_unknown_model_is_refused_with_the_names_that_are_served():
    router = make(engine("a", model="one"), engine("b", model="two"))
    with pytest.raises(ModelNotFoundError, match="one, two"):
        await acquire(router, "three")


async def test_no_model_means_the_first_one():
    router = make(engine("a", model="one"), engine("b", model="two"))
    assert (await acquire(router, None)).model == "one"


async def test_an_empty_fleet_is_not_ready():
    with pytest.raises(EngineNotReadyError, match="no engines"):
        await acquire(make(), "m")


async def test_a_model_whose_engines_start_is_waited_for():
    router = make(engine("a", state=EngineState.STARTING))
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    router.update([engine("a", pid=2)])
    assert (await task).engine.server_pid == 2


async def test_a_model_whose_engines_never_get_ready_says_so_after_the_wait():
    router = make(engine("a", state=EngineState.STARTING))
    with pytest.raises(EngineNotReadyError, match="a is starting"):
        await acquire(router, "m", timeout_s=0.01)


async def test_a_model_whose_engines_all_failed_is_refused_at_once():
    router = make(engine("a", state=EngineState.FAILED), timeout_s=60)
    with pytest.raises(EngineNotReadyError, match="a is failed"):
        await acquire(router, "m")


async def test_a_model_whose_engines_are_all_drained_is_refused_at_once_until_one_is_open_again():
    router = make(engine("a"), engine("b"), timeout_s=60)
    held = [await acquire(router, "m") for _ in range(2)]
    free, pinned = (asyncio.create_task(acquire(router, "m", only=only)) for only in (None, "a"))
    await waiting(router, 2)
    router.close_engine("a")
    async with asyncio.timeout(30):
        with pytest.raises(EngineNotReadyError, match=r"a is drained \(lltm-ray drain a --undrain opens it\)$"):
            await pinned
    assert not free.done(), "b serves on"
    assert not router.unserved("a")
    router.close_engine("b")
    async with asyncio.timeout(30):
        for request in (free, acquire(router, "m"), acquire(router, "m", only="b")):
            with pytest.raises(EngineNotReadyError, match="b is drained"):
                await request
    assert router.unserved("b").startswith("no engine serves model 'm' now")
    assert "lltm-ray drain b --undrain" in router.unserved("b")
    router.release(held[1])
    router.open_engine("b")
    assert not router.unserved("b")
    assert (await acquire(router, "m")).engine.name == "b"


async def test_beside_a_drained_engine_one_that_starts_is_waited_for():
    router = make(engine("a"), engine("b", state=EngineState.STARTING), timeout_s=60)
    router.close_engine("a")
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    assert not router.unserved("a")
    router.update([engine("a"), engine("b")])
    assert (await task).engine.name == "b"


async def test_a_drained_engine_that_is_restarted_is_waited_for():
    router = make(engine("a"), timeout_s=60)
    router.close_engine("a")
    router.update([engine("a", state=EngineState.STARTING)])
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    router.update([engine("a", pid=2)])
    assert (await task).engine.server_pid == 2


async def test_requests_wait_for_who_comes_after_an_engine_that_leaves():
    router = make(engine("a"), timeout_s=60)
    router.close_engine("a", is_leaving=True)
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    assert not router.unserved("a")
    router.update([engine("a").with_(state=EngineState.DRAINING)])
    await asyncio.sleep(0)
    assert not task.done()
    router.update([engine("b")])
    assert (await task).engine.name == "b"


async def test_where_engines_come_with_demand_a_drained_one_is_waited_for_only_as_long_as_there_may_be_more():
    told = ModelInfo(name="m", state=ModelState.READY, engines=1, max_engines=2, is_elastic=True)
    router = Router(8, 60.0)
    router.update([engine("a")], [told])
    router.close_engine("a")
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    assert not router.unserved("a")
    with pytest.raises(EngineNotReadyError, match="a is drained"):
        await acquire(router, "m", only="a")
    router.update([engine("a"), engine("b", state=EngineState.STARTING)], [told])
    await asyncio.sleep(0)
    assert not task.done()
    router.update([engine("a"), engine("b")], [told])
    assert (await task).engine.name == "b"
    router.close_engine("b")
    with pytest.raises(EngineNotReadyError, match=r"a is drained .* b is drained"):
        await acquire(router, "m")
    assert router.unserved("b")
    router.update([], [replace(told, state=ModelState.COLD)])
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    router.update([engine("c")], [told])
    assert (await task).engine.name == "c"


async def test_a_restarted_engine_starts_with_no_claims_and_old_leases_touch_nothing():
    router = make(engine("a", slots=2))
    old = await acquire(router, "m")
    router.update([engine("a", slots=2, pid=2)])
    assert busy(router) == {"a": 0}
    new = await acquire(router, "m")
    router.release(old)
    assert busy(router) == {"a": 1}
    router.release(new)


async def test_a_drained_engine_that_is_ready_again_keeps_its_claims():
    router = make(engine("a"))
    lease = await acquire(router, "m")
    router.update([engine("a").with_(state=EngineState.DRAINING)])
    router.update([])
    router.update([engine("a")])
    with pytest.raises(OverloadedError):
        await acquire(router, "m", timeout_s=0)
    router.release(lease)
    assert busy(router) == {"a": 0}


async def test_an_engine_that_left_is_forgotten_when_its_last_claim_ends():
    router = make(engine("a"), engine("b"))
    leases = [await acquire(router, "m") for _ in range(2)]
    router.update([engine("b")])
    assert router.models() == ("m",)
    for lease in leases:
        router.release(lease)
    assert busy(router) == {"b": 0}
    with pytest.raises(ConfigError, match="known are b"):
        await acquire(router, "m", only="a")


async def test_a_suspected_engine_is_skipped_until_its_cool_down_is_over(monkeypatch):
    monkeypatch.setattr(rows_module, "SUSPECT_S", 0.02)
    router = make(engine("a"), engine("b"))
    router.suspect("a")
    assert (await acquire(router, "m")).engine.name == "b"
    lease = await acquire(router, "m", timeout_s=5)  # waits for a's cool-down; nothing else wakes it
    assert lease.engine.name == "a"


async def test_an_engine_that_keeps_failing_is_skipped_for_longer_until_it_answers_again():
    router = make(engine("a"))
    (lease,) = [await acquire(router, "m")]
    skipped = []
    for _ in range(6):
        router.suspect("a")
        router.suspect("a")  # what failed with it at the same time is no further failure
        skipped.append(lease.row.skip_s)
        router._cooled(lease.row)
        router._cooled(lease.row)
    assert skipped == [1, 2, 4, 8, 16, 16]
    router.began(lease)
    router.suspect("a")
    assert lease.row.skip_s == 1


async def test_a_suspicion_ends_when_the_directory_shows_a_new_server():
    router = make(engine("a"))
    router.suspect("a")
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    router.update([engine("a", pid=2)])
    assert (await task).engine.server_pid == 2


async def test_a_model_that_is_down_does_not_take_the_places_of_a_healthy_one():
    router = make(engine("a", model="down", state=EngineState.STARTING), engine("b", model="up"), queue_limit=2)
    tasks = [asyncio.create_task(acquire(router, "down")) for _ in range(2)]
    await waiting(router, 2)
    lease = await acquire(router, "up")
    tasks.append(asyncio.create_task(acquire(router, "up")))
    await waiting(router, 3)
    with pytest.raises(OverloadedError, match="full"):
        await acquire(router, "down")
    router.release(lease)
    router.release(await tasks[2])
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("table", [[engine("a", state=EngineState.FAILED)], []], ids=["failed", "left"])
async def test_waiters_are_told_at_once_when_the_last_engine_of_their_model_is_gone(table):
    router = make(engine("a", state=EngineState.STARTING), timeout_s=60)
    tasks = [asyncio.create_task(acquire(router, "m", only=only)) for only in (None, "a")]
    await waiting(router, 2)
    router.update(table)
    async with asyncio.timeout(30):
        for task in tasks:
            with pytest.raises(EngineNotReadyError, match="a is failed" if table else "left the fleet"):
                await task
    assert router.snapshot()["waiting"] == {}


async def test_a_pinned_waiter_is_told_when_its_engine_fails_while_others_wait_on():
    router = make(engine("a"), engine("b"), timeout_s=60)
    held = [await acquire(router, "m") for _ in range(2)]
    free = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    pinned = asyncio.create_task(acquire(router, "m", only="a"))
    await waiting(router, 2)
    router.update([engine("a", state=EngineState.FAILED), engine("b")])
    async with asyncio.timeout(30):
        with pytest.raises(EngineNotReadyError, match=r"a is failed$"):
            await pinned
    assert not free.done()
    router.release(held[1])
    assert (await free).engine.name == "b"


async def test_a_waiter_cancelled_in_the_step_that_tells_it_the_end_is_just_cancelled():
    router = make(engine("a", state=EngineState.STARTING))
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    router.update([])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_engine_that_failed_only_by_its_silence_is_waited_for():
    silent = engine("a", state=EngineState.FAILED).with_(detail=f"{LATE_DETAIL} for 15 s")
    router = make(silent, timeout_s=60)
    task = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 1)
    router.update([silent, engine("b", state=EngineState.FAILED)])
    await asyncio.sleep(0)
    assert not task.done()
    router.update([engine("a", pid=2)])
    assert (await task).engine.server_pid == 2


async def test_a_failure_of_a_server_that_was_replaced_meanwhile_is_not_held_against_the_new_one():
    router = make(engine("a"))
    old = router.pick("m")
    router.update([engine("a", pid=2)])
    router.suspect(old)
    assert not router.snapshot()["engines"]["a"]["is_suspect"]
    router.suspect(router.pick("m"))
    assert router.snapshot()["engines"]["a"]["is_suspect"]


async def test_a_retry_uses_the_engine_it_avoids_when_the_others_are_busy_and_it_is_well_again(monkeypatch):
    monkeypatch.setattr(rows_module, "SUSPECT_S", 0.02)
    router = make(engine("a"), engine("b"), timeout_s=60)
    await acquire(router, "m", only="b")
    router.suspect(router.engines("m")[0])
    async with asyncio.timeout(30):
        assert (await acquire(router, "m", exclude={"a"})).engine.name == "a"


async def test_a_request_without_a_slot_goes_to_a_suspect_rather_than_nowhere():
    router = make(engine("a"), engine("b"))
    router.suspect("a")
    assert [router.pick("m").name for _ in range(2)] == ["b", "b"]
    assert router.pick("m", exclude={"b"}).name == "b", "an avoided engine that answers is better than a suspect"
    assert router.pick("m", only="a").name == "a"
    router.suspect("b")
    assert router.pick("m", exclude={"a"}).name == "b"


async def test_a_refusal_says_which_engines_did_not_answer():
    router = make(engine("a"), engine("b", state=EngineState.STARTING))
    router.suspect("a")
    with pytest.raises(EngineNotReadyError, match="a is ready but did not answer just now, b is starting"):
        await acquire(router, "m", timeout_s=0.01)


async def test_excluded_engines_are_used_only_when_no_other_has_a_free_slot():
    router = make(engine("a"), engine("b"))
    first = await acquire(router, "m", exclude={"b"})
    assert first.engine.name == "a"
    router.release(first)
    assert (await acquire(router, "m", exclude={"a", "b"}, timeout_s=0)).engine.name in ("a", "b")
    assert (await acquire(router, "m", exclude={"b"}, timeout_s=0)).engine.name in ("a", "b")


async def test_a_pinned_waiter_neither_takes_another_engine_nor_blocks_those_behind_it():
    router = make(engine("a"), engine("b"))
    on_a, on_b = await acquire(router, "m", only="a"), await acquire(router, "m", only="b")
    pinned = asyncio.create_task(acquire(router, "m", only="a"))
    await waiting(router, 1)
    free = asyncio.create_task(acquire(router, "m"))
    await waiting(router, 2)
    router.release(on_b)
    assert (await free).engine.name == "b"
    assert not pinned.done()
    router.release(on_a)
    assert (await pinned).engine.name == "a"


async def test_a_pin_to_an_engine_of_another_model_is_refused():
    router = make(engine("a", model="one"), engine("b", model="two"))
    with pytest.raises(ConfigError, match="serves 'one'"):
        await acquire(router, "two", only="a")
    assert (await acquire(router, None, only="b")).model == "two"


async def test_fewer_slots_after_an_update_are_respected():
    router = make(engine("a", slots=3))
    leases = [await acquire(router, "m") for _ in range(3)]
    router.update([engine("a", slots=1)])
    router.release(leases[0])
    router.release(leases[1])
    with pytest.raises(OverloadedError):
        await acquire(router, "m", timeout_s=0)
    router.release(leases[2])
    await acquire(router, "m", timeout_s=0)


async def test_a_request_without_a_slot_goes_round_and_avoids_engines_that_failed():
    router = make(engine("a"), engine("b"))
    assert [router.pick("m").name for _ in range(3)] == ["a", "b", "a"]
    assert router.pick("m", exclude={"b"}).name == "a"
    assert router.pick("m", only="a").name == "a"
    router.update([engine("a", state=EngineState.FAILED)])
    with pytest.raises(EngineNotReadyError):
        router.pick("m")


def test_the_snapshot_shows_no_key():
    router = make(engine("a").with_(api_key="secret"))
    assert "secret" not in repr(router.snapshot())


async def test_more_routers_than_slots_share_them_rather_than_have_none():
    names = set()
    for index in range(3):
        router = make(engine("a", slots=2))
        router.update([engine("a", slots=2)], share=SlotShare(index, 3))
        lease = await acquire(router, "m", timeout_s=1)
        names.add(lease.slot)
    assert names <= {0, 1}
    shares = [SlotShare(index, 2).of("a", 4) for index in range(2)]
    assert shares[0] | shares[1] == {0, 1, 2, 3}
    assert not shares[0] & shares[1]


def words(thing: object, seen: set[int]) -> set[str]:
    """Every text that can be reached from an object of ours."""
    if isinstance(thing, str):
        return {thing}
    if id(thing) in seen:
        return set()
    seen.add(id(thing))
    parts: list[object] = []
    if isinstance(thing, dict):
        parts = [*thing, *thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        parts = list(thing)
    elif type(thing).__module__.startswith("lltm_ray"):
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [*vars(thing).values()] if hasattr(thing, "__dict__") else []
        parts += [getattr(thing, name) for name in slots if hasattr(thing, name)]
    return {word for part in parts for word in words(part, seen)}


@pytest.mark.parametrize("policy", ROUTING_POLICIES)
async def test_nothing_of_an_engine_that_left_for_good_is_kept(policy):
    router = make(engine("stays"), policy=policy)
    for number in range(20):
        adapters = (Adapter(name="ada"),)
        for pid in (1, 2):
            router.update([engine("stays"), engine(f"comes-{number}", pid=pid).with_(adapters=adapters)])
            lease = await router.acquire(Ask(model="m", key=b"k" * 500, only=f"comes-{number}"))
            router.began(lease)
            router.release(lease, Served(timings=Timings(prompt_n=99, predicted_n=9, prompt_ms=9.0), reply=b""))
        router.update([engine("stays")])
    assert "stays" in words(router, set())
    left = {word for word in words(router, set()) if "comes-" in word}
    assert left <= {"comes-19"}, "at most the last one, where the next one's turn is told from it"


async def test_who_asks_about_caches_right_after_a_claim_sees_what_it_took():
    router = make(engine("a"))
    lease = await router.acquire(Ask(model="m", key=b"x" * 400))
    router.release(lease, Served(timings=Timings(prompt_n=100, prompt_ms=9.0, predicted_n=2, predicted_ms=9.0)))
    assert [held.key_bytes for held in router.held("a")] == [400]
    await router.acquire(Ask(model="m", key=b"y" * 400))
    assert router.held("a") == ()


async def test_a_claims_bookkeeping_is_done_when_the_request_is_on_its_way():
    router = make(engine("a"))
    settled: list[str] = []
    served = router._models["m"]
    served.policy.placed = lambda _, name: settled.append(name)
    await acquire(router, "m")
    assert settled == []
    await asyncio.sleep(0)
    assert settled == ["a"]


async def test_an_engine_that_was_slow_gets_its_share_again_once_it_has_recovered():
    router = Router(8, 5.0)
    router.update([engine(f"e{number}", slots=4) for number in range(4)])

    async def serve(requests: int, slow: str) -> Counter[str]:
        took: Counter[str] = Counter()
        for _ in range(requests):
            lease = await router.acquire(Ask(model="m", max_tokens=64))
            took[lease.engine.name] += 1
            factor = 3.0 if lease.engine.name == slow else 1.0
            told = Timings(prompt_n=400, prompt_ms=200 * factor, predicted_n=64, predicted_ms=640 * factor)
            router.release(lease, Served(timings=told, reply=b""))
        return took

    await serve(200, "e0")
    assert (await serve(800, "e0"))["e0"] <= 40
    await serve(800, "")
    assert (await serve(400, ""))["e0"] >= 60
