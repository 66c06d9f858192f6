"""Hints tip a router's choice as long as they are valid, and never keep a request from being served."""

import asyncio

import pytest

from lltm_ray._prefix import END_BYTES, HASH_BYTES, hash_prefixes
from lltm_ray.records import Hints, PrefixFamily, Timings
from lltm_ray.routing.hints import PROBE_EVERY
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.router import Router, Served
from tests.unit.routing.test_router import engine

SALT = b"s" * 32
TEXT = b"You are a helpful assistant. " * 100


class Clock:
    def __init__(self) -> None:
        self.now_s = 1.0000035  # no probe's

    def __call__(self) -> float:
        return self.now_s


def make(engines: int = 3, *, hints: Hints) -> tuple[Router, Clock]:
    clock = Clock()
    router = Router(8, 5.0, clock=clock)
    router.update([engine(f"e{number}", slots=2) for number in range(engines)])
    router.hint(hints, SALT)
    return router, clock


async def ask(router: Router, **fields):
    return await router.acquire(Ask(model="m", **fields))


async def test_a_slow_engine_is_spared_while_another_has_room():
    router, _ = make(2, hints=Hints(made_unix_nano=1, valid_s=60, slow={"e0": 2.0}))
    leases = [await ask(router) for _ in range(4)]
    assert [lease.engine.name for lease in leases] == ["e1", "e1", "e0", "e0"]


async def test_a_few_requests_show_whether_a_slow_engine_has_recovered():
    router, clock = make(2, hints=Hints(made_unix_nano=1, valid_s=60, slow={"e0": 2.0}))
    took = []
    for number in range(4 * PROBE_EVERY):
        clock.now_s = 2 + number * 1e-6 + 1e-8
        lease = await ask(router)
        took.append(lease.engine.name)
        router.release(lease)
    assert 1 <= took.count("e0") <= 4


async def test_hints_end_unless_they_are_renewed():
    router, _ = make(2, hints=Hints(made_unix_nano=1, valid_s=0.05, slow={"e0": 2.0}))
    first = await ask(router)
    await asyncio.sleep(0.1)
    second = await ask(router)
    assert (first.engine.name, second.engine.name) == ("e1", "e0")


async def test_the_same_hints_told_again_are_valid_no_longer():
    hints = Hints(made_unix_nano=1, valid_s=0.1, slow={"e0": 2.0})
    router, _ = make(2, hints=hints)
    await asyncio.sleep(0.07)
    router.hint(hints, SALT)
    await asyncio.sleep(0.07)
    assert (await ask(router)).engine.name == "e0"


def family(tokens: int, *names: str) -> PrefixFamily:
    depth = 5
    hashes = hash_prefixes(TEXT, SALT)
    end = END_BYTES[depth]
    key = hashes[depth * HASH_BYTES : (depth + 1) * HASH_BYTES]
    return PrefixFamily(end_bytes=end, hash=key, engines=tuple((name, tokens) for name in names))


async def test_a_beginning_that_another_gateway_has_seen_is_found_at_its_engine():
    hints = Hints(made_unix_nano=1, valid_s=60, families=(family(400, "e2"),))
    router, _ = make(3, hints=hints)
    for number in range(20):  # the router must know what a prompt costs
        lease = await ask(router, key=b"%d" % number + b"x" * 4000)
        told = Timings(cache_n=0, prompt_n=1000, prompt_ms=1000.0, predicted_n=4, predicted_ms=40.0)
        router.release(lease, Served(timings=told, reply=b""))
    lease = await ask(router, key=TEXT + b"and now?")
    assert lease.engine.name == "e2"
    assert lease.choice is not None
    assert lease.choice.cached_tokens == 400
    assert (await ask(router, key=b"other " + TEXT)).choice.cached_tokens == 0


@pytest.mark.parametrize(("tokens", "expected"), [(8000, {"e2"}), (100, {"e0", "e1", "e2"})])
async def test_long_prompts_of_a_tenant_that_holds_others_up_keep_apart(tokens, expected):
    router, _ = make(3, hints=Hints(made_unix_nano=1, valid_s=60, apart={"batch": ("e2",)}))
    took = set()
    for _ in range(6 if tokens == 100 else 2):
        took.add((await ask(router, tenant="batch", key=b"p" * 4 * tokens)).engine.name)
    assert took == expected


async def test_a_hint_about_engines_that_are_gone_keeps_nobody_waiting():
    router, _ = make(2, hints=Hints(made_unix_nano=1, valid_s=60, slow={"e9": 3.0}, apart={"": ("e8",)}))
    assert (await ask(router, key=b"q" * 9000)).engine.name in {"e0", "e1"}


async def test_a_tenant_kept_to_engines_of_one_model_may_use_any_of_another():
    router = Router(8, 5.0, clock=Clock())
    router.update([engine("a0"), engine("b0", model="other", slots=2), engine("b1", model="other", slots=2)])
    router.hint(Hints(made_unix_nano=1, valid_s=60, apart={"batch": ("a0",)}, slow={"b0": 2.0}), SALT)
    lease = await router.acquire(Ask(model="other", tenant="batch", key=b"p" * 32_000))
    assert lease.engine.name == "b1"


async def test_requests_of_a_hinted_beginning_do_not_all_chase_one_engine():
    hints = Hints(made_unix_nano=1, valid_s=60, families=(family(400, "e2"),))
    router, _ = make(3, hints=hints)
    took = [(await ask(router, key=TEXT + b"question %d" % number)).engine.name for number in range(5)]
    assert set(took) == {"e0", "e1", "e2"}
