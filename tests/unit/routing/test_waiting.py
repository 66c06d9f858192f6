"""The waiting room's own rules: who waits although a slot is free, for how long, and what is left when nobody waits."""

import asyncio
import math
import time

import pytest

from lltm_ray.errors import EngineNotReadyError, OverloadedError
from lltm_ray.records import EngineInfo, EngineState, ModelInfo, ModelState, Timings
from lltm_ray.routing.admission import waiting as waiting_module
from lltm_ray.routing.admission.lead import Lead
from lltm_ray.routing.admission.waiter import is_frozen
from lltm_ray.routing.admission.waiting import MAX_PASSED
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.rates import Rates
from lltm_ray.routing.router import Router, Served
from lltm_ray.routing.rows import Lease

LONG = b"x" * 40_000
"""Well over the tokens from which a prefill is long, whatever a token is."""


def engine(name: str, *, slots: int = 2, state: EngineState = EngineState.READY, pid: int = 1) -> EngineInfo:
    url = f"http://{name}:{pid}" if state is EngineState.READY else ""
    room = {"slots_total": slots, "cache_ram_tokens": 10**6}
    return EngineInfo(name=name, model="m", state=state, url=url, server_pid=pid, **room)


def make(*engines: EngineInfo, queue_limit: int = 8, **kw) -> Router:
    router = Router(queue_limit, 5.0, **kw)
    router.update(engines)
    return router


def model(state: ModelState, *, detail: str = "", is_elastic: bool = True) -> ModelInfo:
    return ModelInfo(name="m", state=state, is_elastic=is_elastic, detail=detail)


def acquire(router: Router, key: bytes = b"", *, timeout_s: float = 200.0, **kw):
    return router.acquire(Ask(model="m", key=key, deadline_s=time.monotonic() + timeout_s, **kw))


def number(tag: int) -> bytes:
    return b"%08d" % tag


def at_once() -> asyncio.Timeout:
    """Long before half of the time that a request has."""
    return asyncio.timeout(20)


async def waiting(router: Router, count: int) -> None:
    async with asyncio.timeout(60):
        while sum(router.snapshot()["waiting"].values()) != count:
            await asyncio.sleep(0)


def told(cached: int, computed: int, *, generated: int = 10, prefill_s: float = 1e-3) -> Timings:
    return Timings(
        cache_n=cached,
        prompt_n=computed,
        prompt_ms=computed * prefill_s * 1e3,
        predicted_n=generated,
        predicted_ms=generated * 1.0,
    )


async def cached_on(router: Router, name: str, key: bytes, tokens: int) -> None:
    """Let a prompt of so many tokens run on an engine, again and again until the router trusts what it learnt."""
    for turn in range(10):
        lease = await acquire(router, key, only=name)
        router.began(lease)
        timings = told(tokens if turn else 0, 0 if turn else tokens)
        router.release(lease, Served(timings=timings))


async def busy(router: Router, name: str, slots: int) -> list[Lease]:
    """Fill an engine's slots with what is neither long nor cached."""
    leases = [await acquire(router, number(each), only=name) for each in range(slots)]
    for lease in leases:
        router.began(lease)
    return leases


async def home_is_busy(*, queue_limit: int = 8) -> tuple[Router, list[Lease]]:
    """Two engines: `home` has a long prompt cached and is full, `other` is free."""
    router = make(engine("home", slots=1), engine("other", slots=1), queue_limit=queue_limit)
    await cached_on(router, "home", LONG, 10_000)
    return router, await busy(router, "home", 1)


async def test_a_prompt_that_is_cached_on_a_full_engine_waits_for_it_and_gets_it():
    router, [holder] = await home_is_busy()
    task = asyncio.create_task(acquire(router, LONG))
    await waiting(router, 1)
    assert router._engines["home"].waiting == 1
    router.release(holder)
    lease = await task
    assert lease.engine.name == "home"
    assert router._engines["home"].waiting == 0
    router.release(lease)


async def test_nobody_waits_for_its_own_engine_past_half_of_its_time():
    router, [holder] = await home_is_busy()
    took_s: list[float] = []
    while min(took_s, default=1.0) >= 0.19 and len(took_s) < 10:  # others use this machine, too
        began_s = time.monotonic()
        lease = await acquire(router, LONG, timeout_s=0.2)
        took_s.append(time.monotonic() - began_s)
        assert lease.engine.name == "other"
        assert router._engines["home"].waiting == 0
        router.release(lease)
    assert 0.09 <= min(took_s) < 0.19
    router.release(holder)


@pytest.mark.parametrize("left", [[], [engine("home", slots=1, state=EngineState.STARTING)]])
async def test_nobody_waits_for_an_engine_that_left_or_restarts(left):
    router, [holder] = await home_is_busy()
    task = asyncio.create_task(acquire(router, LONG))
    await waiting(router, 1)
    router.update([engine("other", slots=1), *left])
    async with at_once():
        assert (await task).engine.name == "other"
    router.release(holder)


async def test_nobody_is_overtaken_for_ever_by_those_whose_prompt_is_cached_where_slots_come_free():
    router = make(engine("home", slots=1), queue_limit=64)
    await cached_on(router, "home", LONG, 10_000)
    [lease] = await busy(router, "home", 1)
    cold = asyncio.create_task(acquire(router, number(1)))
    await waiting(router, 1)
    warm = [asyncio.create_task(acquire(router, LONG)) for _ in range(MAX_PASSED + 4)]
    await waiting(router, 1 + len(warm))
    overtaken = 0
    while not cold.done():
        router.release(lease)
        done, _ = await asyncio.wait([cold, *warm], return_when=asyncio.FIRST_COMPLETED)
        lease = await done.pop()
        overtaken = overtaken if cold.done() else overtaken + 1
        warm = [task for task in warm if not task.done()]
    assert overtaken == MAX_PASSED
    for task in warm:
        task.cancel()
    router.release(lease)


async def test_who_would_only_rather_wait_takes_the_free_slot_when_the_queue_has_no_place():
    router, [holder] = await home_is_busy(queue_limit=0)
    lease = await acquire(router, LONG)
    assert lease.engine.name == "other"
    router.release(lease)
    router.release(holder)


async def test_a_free_slot_that_nobody_who_waits_can_use_is_not_kept_from_a_newcomer():
    router = make(engine("a", slots=1), engine("b", slots=1), queue_limit=1)
    holder = await acquire(router, only="a")
    pinned = asyncio.create_task(acquire(router, only="a"))
    await waiting(router, 1)
    async with at_once():
        lease = await acquire(router)
    assert lease.engine.name == "b"
    router.release(lease)
    router.release(holder)
    router.release(await pinned)


async def test_many_who_wait_by_choice_do_not_hide_those_behind_them():
    router, [holder] = await home_is_busy(queue_limit=64)
    blocker = await acquire(router, only="other")
    tasks = [asyncio.create_task(acquire(router, LONG)) for _ in range(20)]
    await waiting(router, 20)
    plain = asyncio.create_task(acquire(router, b"short", tenant="late"))
    await waiting(router, 21)
    router.release(blocker)
    async with at_once():
        assert (await plain).engine.name == "other"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert router._engines["home"].waiting == 0
    router.release(holder)


async def test_a_waiter_cancelled_in_the_step_of_its_grant_or_its_end_leaves_nothing_behind():
    router, [holder] = await home_is_busy()
    task = asyncio.create_task(acquire(router, LONG))
    await waiting(router, 1)
    router.release(holder)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert router.in_flight("home") == 0
    assert router._engines["home"].waiting == 0


async def test_no_timer_is_left_when_nobody_waits():
    router, [holder] = await home_is_busy()
    blocker = await acquire(router, only="other")
    tasks = [asyncio.create_task(acquire(router, LONG)) for _ in range(3)]
    await waiting(router, 3)
    router.release(blocker)
    router.release(holder)
    for task in tasks:
        router.release(await task)
    room = router._rooms["m"]
    assert room._timer is None
    assert room._wake_timer is None


async def test_who_expires_in_the_step_of_its_grant_keeps_its_slot():
    now = [0.0]
    router = make(engine("a", slots=1), clock=lambda: now[0])
    holder = await acquire(router)
    task = asyncio.create_task(router.acquire(Ask(model="m", deadline_s=100.0)))
    await waiting(router, 1)
    router.release(holder)
    now[0] = 101.0  # the deadline passes before the waiter runs
    router._rooms["m"]._expire()
    lease = await task
    assert lease.engine.name == "a"
    router.release(lease)


# --- long prompts


async def long_beside_decode(*, slots: int = 4, engines: int = 1) -> tuple[Router, Lease, Lease]:
    router = make(*[engine(f"e{each}", slots=slots) for each in range(engines)])
    [decoder] = await busy(router, "e0", 1)
    first = await acquire(router, number(1) + LONG, only="e0")
    assert is_frozen(router._engines["e0"])
    return router, decoder, first


async def test_a_second_long_prompt_waits_where_others_decode_until_the_first_has_begun():
    router, decoder, first = await long_beside_decode()
    second = asyncio.create_task(acquire(router, number(2) + LONG))
    await waiting(router, 1)
    short = await acquire(router, b"short")
    assert router.in_flight("e0") == 3
    router.began(first)
    async with at_once():
        lease = await second
    for each in (decoder, first, short, lease):
        router.release(each)


@pytest.mark.parametrize("which", ["decoder", "first"])
async def test_a_second_long_prompt_goes_on_when_the_first_fails_or_nobody_decodes_any_more(which):
    router, decoder, first = await long_beside_decode()
    second = asyncio.create_task(acquire(router, number(2) + LONG))
    await waiting(router, 1)
    router.release(decoder if which == "decoder" else first)
    async with at_once():
        await second


async def test_a_second_long_prompt_goes_to_another_engine_at_once():
    router, _, _ = await long_beside_decode(engines=3)
    names = set()
    for each in (2, 3):
        async with at_once():
            names.add((await acquire(router, number(each) + LONG)).engine.name)
    assert names == {"e1", "e2"}


async def test_a_long_prompt_leaves_the_engine_that_has_a_bit_of_it_cached_rather_than_freeze_it():
    names = []
    for is_frozen_there in (False, True):
        router = make(engine("e0", slots=4), engine("e1", slots=4))
        await cached_on(router, "e0", b"p" * 4_000, 1_000)
        await busy(router, "e0", 1)
        await busy(router, "e1", 3)
        if is_frozen_there:
            await acquire(router, number(1) + b"q" * 16_000, only="e0")
        async with at_once():
            names.append((await acquire(router, b"p" * 4_000 + b"r" * 16_000)).engine.name)
    assert names == ["e0", "e1"]


async def test_a_long_prompt_waits_for_half_of_its_time_at_most():
    router, _, _ = await long_beside_decode()
    took_s: list[float] = []
    while min(took_s, default=1.0) >= 0.29 and len(took_s) < 10:  # others use this machine, too
        began_s = time.monotonic()
        lease = await acquire(router, number(2) + LONG, timeout_s=0.3)
        took_s.append(time.monotonic() - began_s)
        assert lease.engine.name == "e0"
        router.release(lease)
    assert 0.14 <= min(took_s) < 0.29


async def test_long_prompts_do_not_wait_for_each_other_where_nobody_decodes():
    router = make(engine("e0", slots=3))
    for each in range(3):
        async with at_once():
            await acquire(router, number(each) + LONG)


async def test_any_number_of_long_prompts_gets_through_one_after_the_other():
    router, decoder, first = await long_beside_decode(slots=4)
    tasks = [asyncio.create_task(acquire(router, number(each) + LONG)) for each in range(2, 8)]
    await waiting(router, 6)
    lease = first
    for left in range(5, -1, -1):
        router.began(lease)
        await asyncio.sleep(0)
        [done] = [task for task in tasks if task.done()]
        tasks.remove(done)
        router.release(lease)
        await waiting(router, left)
        lease = await done
        assert router._engines["e0"].long_prefills == 1
    router.release(lease)
    router.release(decoder)


# --- models without engines


async def test_a_model_without_engines_is_asked_for_again_and_again_and_nobody_is_refused(monkeypatch):
    monkeypatch.setattr(waiting_module, "WAKE_S", 0.02)
    woken: list[str] = []
    router = Router(8, 5.0, wake=woken.append)
    router.update((), [model(ModelState.COLD)])
    tasks = [asyncio.create_task(acquire(router)) for _ in range(3)]
    await waiting(router, 3)
    async with asyncio.timeout(60):
        while len(woken) < 5:
            await asyncio.sleep(0.01)
    assert set(woken) == {"m"}
    router.update([engine("a", slots=3)], [model(ModelState.READY)])
    for task in tasks:
        router.release(await task)
    count = len(woken)
    await asyncio.sleep(0.06)
    assert len(woken) == count


async def test_a_model_that_goes_to_sleep_while_somebody_waits_is_asked_for(monkeypatch):
    monkeypatch.setattr(waiting_module, "WAKE_S", 0.02)
    woken: list[str] = []
    router = Router(8, 5.0, wake=woken.append)
    router.update([engine("a", slots=1)], [model(ModelState.READY)])
    holder = await acquire(router)
    task = asyncio.create_task(acquire(router))
    await waiting(router, 1)
    router.update((), [model(ModelState.COLD)])
    router.release(holder)
    async with asyncio.timeout(60):
        while not woken:
            await asyncio.sleep(0.01)
    router.update([engine("b", slots=1)], [model(ModelState.READY)])
    assert (await task).engine.name == "b"


@pytest.mark.parametrize("engines", [(), (engine("a", state=EngineState.FAILED),)])
async def test_a_model_that_failed_is_refused_with_its_detail_also_those_who_wait(engines):
    router = Router(8, 5.0, wake=lambda _: None)
    router.update((), [model(ModelState.COLD)])
    task = asyncio.create_task(acquire(router))
    await waiting(router, 1)
    router.update(engines, [model(ModelState.FAILED, detail="the file is no GGUF")])
    for each in (task, acquire(router)):
        with pytest.raises(EngineNotReadyError, match="the file is no GGUF") as caught:
            await each
        assert caught.value.http_status == 503
    assert router._rooms["m"]._wake_timer is None


# --- time to the first byte


def known_rates() -> Rates:
    rates = Rates()
    for _ in range(20):
        rates.learn("a", told(0, 1000, generated=100), busy=1.0, held_s=1.1)
    return rates


def test_the_time_to_the_first_byte_is_no_reason_to_refuse_anybody_before_it_was_seen():
    assert Lead(known_rates()).bound_s(1000, 4) == 0.0


def test_99_of_100_first_bytes_come_within_the_bound():
    lead, late = Lead(known_rates()), 0
    for each in range(4000):
        took_s = 1.0 + (each * 37 % 100) / 25  # evenly from 1 to 5 s
        late += each >= 2000 and took_s > lead.bound_s(1000, 4)
        lead.learn(1000, 4, took_s)
    assert late <= 20
    assert lead.bound_s(1000, 4) < 6.0
    assert lead.bound_s(3000, 4) - lead.bound_s(1000, 4) == pytest.approx(2.0, rel=0.2)


async def test_who_could_have_a_slot_in_time_but_no_first_byte_is_refused_at_once():
    router = make(engine("a", slots=1))
    for each in range(20):
        lease = await acquire(router, number(each) + b"y" * 1000)
        router.release(lease, Served(timings=told(0, 1000, generated=1, prefill_s=0.1)))
    room = router._rooms["m"]
    for _ in range(600):
        room._lead.learn(1000, 1, 100.0)
    holder = await acquire(router)
    async with at_once():
        with pytest.raises(OverloadedError):
            await acquire(router, number(99) + b"y" * 1000, timeout_s=90)
    task = asyncio.create_task(acquire(router, b"z", timeout_s=90))
    await waiting(router, 1)
    router.release(holder)
    router.release(await task)


async def test_an_answer_that_begins_after_its_deadline_costs_the_room_credit():
    now = [0.0]
    router = make(engine("a", slots=1), clock=lambda: now[0])
    holder = await acquire(router)
    task = asyncio.create_task(router.acquire(Ask(model="m", deadline_s=5.0)))
    await waiting(router, 1)
    router.release(holder)
    lease = await task
    before = router._models["m"].admission.snapshot()["miss_credit"]
    now[0] = 5.1
    router.began(lease)
    router.began(lease)
    assert router._models["m"].admission.snapshot()["miss_credit"] == pytest.approx(before - 1.0)
    router.release(lease)


async def test_slots_that_were_free_are_charged_as_long_as_it_is_crowded():
    now = [0.0]
    router = make(engine("a", slots=1), clock=lambda: now[0])
    ask = {"model": "m", "deadline_s": math.inf}
    lease = await router.acquire(Ask(**ask))
    assert lease.cost_tokens == 0
    task = asyncio.create_task(router.acquire(Ask(**ask)))
    await waiting(router, 1)
    router.release(lease)
    router.release(await task)
    lease = await router.acquire(Ask(**ask))
    assert lease.cost_tokens > 0
    router.release(lease)
    now[0] = 11.0
    assert (await router.acquire(Ask(**ask))).cost_tokens == 0


async def test_who_broke_off_after_the_first_byte_pays_and_who_got_none_does_not():
    now = [0.0]
    router = make(engine("a", slots=1), clock=lambda: now[0])
    holder = await acquire(router, timeout_s=math.inf)
    tasks = [asyncio.create_task(acquire(router, tenant="t", timeout_s=math.inf)) for _ in range(2)]
    await waiting(router, 2)
    lanes = router._models["m"].admission._queue._classes[0].lanes
    router.release(holder)
    for task, has_begun in zip(tasks, (False, True), strict=True):
        lease = await task
        assert lanes["t"].counter == lease.cost_tokens > 0
        if has_begun:
            router.began(lease)
        router.release(lease)
    assert lanes["t"].counter == lease.cost_tokens


async def test_a_model_that_left_the_fleet_keeps_nobody_waiting():
    router = Router(8, 5.0, wake=lambda _: None)
    router.update((), [model(ModelState.COLD)])
    task = asyncio.create_task(acquire(router))
    await waiting(router, 1)
    router.update((), [])
    async with at_once():
        with pytest.raises(EngineNotReadyError, match="left the fleet"):
            await task
    assert router._rooms["m"]._wake_timer is None


async def test_who_is_pinned_to_an_engine_that_failed_is_refused_at_once_while_others_are_ready():
    router = make(engine("a"), engine("b", state=EngineState.FAILED))
    async with at_once():
        with pytest.raises(EngineNotReadyError, match="b is failed"):
            await acquire(router, only="b")
    woken: list[str] = []
    router = Router(8, 5.0, wake=woken.append)
    router.update([engine("a"), engine("b", state=EngineState.FAILED)], [model(ModelState.READY)])
    with pytest.raises(EngineNotReadyError):
        await acquire(router, only="b", timeout_s=0.05)
    assert not woken


async def test_a_reply_to_a_prompt_without_a_key_is_taken_for_the_beginning_of_no_prompt():
    router, reply = make(engine("a")), b"once upon a time " * 40
    router.release(await acquire(router, b""), Served(timings=told(0, 40, generated=160), reply=reply))
    assert router._models["m"].residency.match(reply + b"in the west").engines == ()


async def test_a_restarted_engine_is_a_stranger_to_rates_and_sessions():
    router = make(engine("a"), engine("b"))
    served, ask = router._models["m"], Ask(model="m", affinity="s")
    lease = await acquire(router, affinity="s", only="a")
    router.release(lease, Served(timings=told(0, 100)))

    def knows_it() -> tuple[bool, bool]:
        home = served.policy._home(ask, served.table, served.table.get("b"))
        return "a" in served.rates.snapshot()["engines"], home is not None

    assert knows_it() == (True, True)
    router.update([engine("a", pid=2), engine("b")])
    assert knows_it() == (False, False)
