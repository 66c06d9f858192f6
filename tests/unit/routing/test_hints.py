"""Hints tip a router's choice as long as they are valid, and never keep a request from being served."""

import asyncio

from lltm_ray._prefix import END_BYTES, HASH_BYTES, hash_prefixes
from lltm_ray.records import Hints, PrefixFamily, Timings
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.router import Router, Served
from tests.unit.routing.test_router import engine

SALT = b"s" * 32
TEXT = b"You are a helpful assistant. " * 100


class Clock:
    def __init__(self) -> None:
        self.now_s = 1.0

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


async def test_hints_end_unless_they_are_renewed():
    router, _ = make(2, hints=Hints(made_unix_nano=1, valid_s=0.05, families=(family(400, "e1"),)))
    first = await hinted_tokens(router)
    await asyncio.sleep(0.1)
    assert (first, await hinted_tokens(router)) == (400, 0)


async def test_the_same_hints_told_again_are_valid_no_longer():
    hints = Hints(made_unix_nano=1, valid_s=0.1, families=(family(400, "e1"),))
    router, _ = make(2, hints=hints)
    await asyncio.sleep(0.07)
    router.hint(hints, SALT)
    await asyncio.sleep(0.07)
    assert await hinted_tokens(router) == 0


async def hinted_tokens(router: Router) -> int:
    request = Ask(model="m", key=TEXT)
    router.release(await router.acquire(request))
    return request.shared_tokens


async def test_a_hint_about_engines_that_are_gone_keeps_nobody_waiting():
    router, _ = make(2, hints=Hints(made_unix_nano=1, valid_s=60, families=(family(400, "e9"),)))
    assert (await ask(router, key=TEXT)).engine.name in {"e0", "e1"}


async def test_requests_of_a_hinted_beginning_do_not_all_chase_one_engine():
    hints = Hints(made_unix_nano=1, valid_s=60, families=(family(400, "e2"),))
    router, _ = make(3, hints=hints)
    took = [(await ask(router, key=TEXT + b"question %d" % number)).engine.name for number in range(5)]
    assert set(took) == {"e0", "e1", "e2"}
