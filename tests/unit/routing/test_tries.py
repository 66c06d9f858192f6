"""How often one request is tried, and where next."""

import pytest

from lltm_ray.records import EngineInfo, EngineState
from lltm_ray.routing.policy import Ask
from lltm_ray.routing.router import Router
from lltm_ray.routing.tries import Tries

REFUSED, BROKEN, LOADING = {"is_reached": False}, {"is_broken": True}, {}


def fleet(**nodes: str) -> tuple[Router, dict[str, EngineInfo]]:
    engines = {
        name: EngineInfo(
            name=name,
            model="m",
            state=EngineState.READY,
            url=f"http://{name}",
            slots_total=1,
            server_pid=1,
            node_id=node,
        )
        for name, node in nodes.items()
    }
    router = Router(8, 5.0)
    router.update(engines.values())
    return router, engines


async def test_an_engine_out_of_reach_costs_no_try_while_another_has_not_failed():
    router, engines = fleet(a="1", b="1", c="1")
    tries = Tries(router, 2, ask=Ask(model="m"))
    spent = []
    for name in "abab":
        tries.fail(engines[name], **REFUSED)
        spent.append(tries.spent)
    tries.fail(engines["c"], **REFUSED)
    tries.fail(engines["c"], **REFUSED)
    assert (spent, tries.spent, tries.is_over) == ([0, 0, 0, 0], 2, True)


@pytest.mark.parametrize(("error", "is_pinned"), [(REFUSED, True), (BROKEN, False), (LOADING, False)])
async def test_every_other_failure_costs_a_try(error, is_pinned):
    router, engines = fleet(a="1", b="1")
    tries = Tries(router, 2, is_pinned=is_pinned)
    assert not tries.is_last
    tries.fail(engines["a"], **error)
    assert (tries.spent, tries.is_last, tries.is_over) == (1, True, False)


async def test_engines_that_take_no_requests_are_no_others():
    router, engines = fleet(a="1", b="1")
    router.close_engine("b")
    tries = Tries(router, 2)
    tries.fail(engines["a"], **REFUSED)
    assert tries.spent == 1


async def test_without_a_deadline_an_engine_out_of_reach_is_free_once():
    router, engines = fleet(a="1", b="1")
    tries = Tries(router, 2)
    spent = []
    for _ in range(3):
        tries.fail(engines["a"], **REFUSED)
        spent.append(tries.spent)
    assert spent == [0, 1, 2]


async def test_after_the_deadline_nothing_is_free():
    router, engines = fleet(a="1", b="1")
    now = [10.0]
    tries = Tries(router, 2, ask=Ask(model="m", deadline_s=20.0), clock=lambda: now[0])
    spent = []
    for now[0] in (10.0, 15.0, 20.0, 21.0):
        tries.fail(engines["a"], **REFUSED)
        spent.append(tries.spent)
    assert (spent, tries.is_over) == ([0, 0, 1, 2], True)


async def test_a_request_that_broke_two_engines_is_not_sent_to_a_third():
    router, engines = fleet(a="1", b="2", c="3")
    tries = Tries(router, 9)
    tries.fail(engines["a"], **BROKEN)
    assert not tries.is_over
    tries.fail(engines["b"], **BROKEN)
    assert tries.is_over


async def test_engines_of_a_node_that_is_being_lost_break_as_one():
    router, engines = fleet(a="1", b="1", c="2")
    tries = Tries(router, 3)
    tries.fail(engines["a"], **BROKEN)
    tries.fail(engines["b"], **BROKEN)
    assert not tries.is_over
    assert tries.is_last
    tries.fail(engines["c"], **BROKEN)
    assert tries.is_over


@pytest.mark.parametrize(("error", "avoided"), [(REFUSED, "ab"), (BROKEN, "ab"), (LOADING, "a")])
async def test_after_a_lost_connection_the_rest_of_that_node_comes_last(error, avoided):
    router, engines = fleet(a="1", b="1", c="2")
    tries = Tries(router, 3)
    tries.fail(engines["a"], **error)
    assert tries.avoid == set(avoided)


async def test_on_the_only_node_nothing_but_the_failed_engine_is_avoided():
    router, engines = fleet(a="1", b="1")
    tries = Tries(router, 3)
    tries.fail(engines["a"], **REFUSED)
    assert tries.avoid == {"a"}
