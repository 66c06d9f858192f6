"""Conversations that rest between two turns count where the next one is placed, and keep one at its home."""

import pytest

from lltm_ray.routing.policy import Ask, make_policy
from lltm_ray.routing.residency import Match, SlotChoice
from lltm_ray.routing.returns import Returns
from lltm_ray.routing.router import Router
from lltm_ray.routing.table import EngineView, Table
from tests.unit.routing.test_gossip_words import ANSWER, chat, engine, serve
from tests.unit.routing.test_policy import taught, view

PAUSE_S = 0.5


def claims(returns: Returns, *, back: bool, times: int = 400, pause_s: float = PAUSE_S) -> Returns:
    match = Match(b"k", (("a", 100),) if back else (), 200, 0, 10, None)
    for _ in range(times):
        returns.claimed(match, SlotChoice(0, 100 if back else 0), pause_s)
    return returns


def fleet(*rows: EngineView, back: bool):
    rates = taught("ab", service_s=1.0)
    claims(rates.returns, back=back)
    return Table(rows), rates


def test_what_comes_back_and_after_how_long_is_learnt():
    seldom, often = claims(Returns(), back=False), claims(Returns(), back=True, pause_s=3.0)
    assert seldom.ratio < 0.02
    assert seldom.pause_s(7.0) == 7.0
    assert 0.9 < often.ratio < 1
    assert often.pause_s(7.0) == pytest.approx(3.0)
    assert often.fade_s(7.0) == pytest.approx(6.0)


def test_what_only_shares_a_system_prompt_is_no_return():
    returns, shared = Returns(), Match(b"k", (("a", 100),), 200, 0, 100, None)
    for _ in range(400):
        returns.claimed(shared, SlotChoice(0, 100), 1.0)
    assert returns.ratio < 0.02
    assert returns.pause_s(7.0) == 7.0


def test_a_return_elsewhere_tells_nothing_of_the_pause():
    returns, match = Returns(), Match(b"k", (("a", 100),), 200, 0, 0, None)
    for _ in range(400):
        returns.claimed(match, SlotChoice(0, 0), 1.0)
    assert returns.ratio > 0.9
    assert returns.pause_s(7.0) == 7.0


@pytest.mark.parametrize("prompt_tokens", [100, 1000])  # the short way, and the one by expected times
@pytest.mark.parametrize(("back", "taken"), [(True, "b"), (False, "a")])
def test_a_new_conversation_goes_where_fewer_are_at_home_if_they_come_back(back, taken, prompt_tokens):
    at = Ask(model="m", prompt_tokens=prompt_tokens, arrived_s=10.0)
    table, rates = fleet(view("a", 1, warm=3.0, warm_s=10.0, spare_tokens=1), view("b", 2), back=back)
    assert make_policy("residency").choose(at, table, rates).engine == taken


@pytest.mark.parametrize("prompt_tokens", [100, 1000])
@pytest.mark.parametrize(("busy", "slots", "resting"), [(3, 4, 2), (3, 4, 1), (7, 8, 4)])
def test_a_nearly_full_engine_is_not_taken_before_an_idle_one_with_some_at_home(prompt_tokens, busy, slots, resting):
    at = Ask(model="m", prompt_tokens=prompt_tokens, arrived_s=10.0)
    idle = view("b", 0, slots, warm=float(resting), warm_s=10.0, spare_tokens=1)
    table, rates = fleet(view("a", busy, slots, spare_tokens=1), idle, back=True)
    assert make_policy("residency").choose(at, table, rates).engine == "b"


def test_a_session_without_a_match_goes_home_though_it_rests_there_itself():
    at = Ask(model="m", prompt_tokens=200, affinity="s", arrived_s=10.0)
    table, rates = fleet(view("a"), view("b", warm=1.0, warm_s=10.0), back=True)
    policy = make_policy("residency")
    policy.placed(at, "b")
    assert policy.choose(at, table, rates).engine == "b"


def test_those_who_have_rested_for_long_do_not_count():
    at = Ask(model="m", prompt_tokens=100, arrived_s=10.0 + 20 * PAUSE_S)
    table, rates = fleet(view("a", 1, warm=3.0, warm_s=10.0, spare_tokens=1), view("b", 2), back=True)
    assert make_policy("residency").choose(at, table, rates).engine == "a"


@pytest.mark.parametrize(("elsewhere", "taken"), [(4.0, "a"), (0.0, "b")])
def test_a_conversation_leaves_its_busy_home_only_for_an_engine_where_it_is_less_crowded(elsewhere, taken):
    at = Ask(model="m", prompt_tokens=200, max_tokens=16, arrived_s=10.0)
    home = view("a", 3, warm=1.0, warm_s=10.0, prefilling_tokens=2000)
    other = view("b", 0, warm=elsewhere, warm_s=10.0)
    table, rates = fleet(home, other, back=True)
    assert make_policy("residency").choose(at, table, rates, [("a", 150)]).engine == taken


async def test_a_router_knows_who_rests_where():
    now = [100.0]
    router = Router(8, 5.0, clock=lambda: now[0])
    router.update([engine()])
    served = router._models["m"]
    (row,) = served.table

    def resting() -> float:
        return row.resting(now[0], served.rates.fade_s)

    async def turn(*texts: str) -> None:
        await serve(router, chat(*texts))

    for first in ("the sea " * 20, "mountains " * 20, "a river " * 20):
        await turn(first)
    assert resting() == pytest.approx(3.0, rel=0.1)
    await turn("a river " * 20, ANSWER, "and then?")
    assert resting() == pytest.approx(3.0, rel=0.1), "it is the same one, not one more"
    for first in ("some woods", "a desert", "an island"):
        await turn(first * 20)
    assert resting() == pytest.approx(4.0, rel=0.1), "the others were driven out of its four slots"
    now[0] += 60
    assert resting() < 0.01


async def test_what_was_cut_off_or_moved_away_does_not_rest():
    router = Router(8, 5.0)
    router.update([engine()])
    (row,) = router._models["m"].table
    for first in ("the sea " * 20, "mountains " * 20):
        router.release(await router.acquire(Ask(model="m", key=chat(first))))
    assert row.resting(0.0, 1.0) == 0
    lease = await serve(router, chat("a river " * 20))
    assert row.warm == 1
    held = router.hold_slot("a", lease.slot)
    assert row.warm == 0
    router.release(held)
    assert row.warm == 0
