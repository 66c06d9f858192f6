import asyncio
import json
import math

import pytest

from lltm_ray.errors import ConfigError, ModelNotFoundError, OverloadedError
from lltm_ray.records import Adapter, EngineInfo, EngineState, ModelInfo, ModelState, Timings
from lltm_ray.routing.adapters import by_ids, check_name, choose, lora_field, split_model
from lltm_ray.routing.policy import Ask, EngineView, make_policy
from lltm_ray.routing.rates import Rates
from lltm_ray.routing.router import Router, Served
from lltm_ray.routing.table import Table

ADA, BOB = Adapter(name="ada", scale=0.0), Adapter(name="bob", scale=0.5)


def engine(name: str, *adapters: Adapter) -> EngineInfo:
    return EngineInfo(
        name=name, model="m", state=EngineState.READY, url=f"http://{name}", slots_total=4, adapters=adapters
    )


def field(*args: object) -> list[tuple[int, float]]:
    told = json.loads(b"{%b}" % lora_field(*args))
    return [(each["id"], each["scale"]) for each in told["lora"]]


def test_a_model_s_name_may_hold_a_colon_itself():
    served = ("qwen", "qwen:7b")
    assert split_model("qwen:7b", served) == ("qwen:7b", "")
    assert split_model("qwen:7b:ada", served) == ("qwen:7b", "ada")
    assert split_model("qwen:ada", served) == ("qwen", "ada")
    assert split_model("gemma:ada", served) == ("gemma:ada", "")


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ModelNotFoundError, match="adapters of 'm' are m:ada, m:bob"):
        check_name("m", "eve", (ADA, BOB))
    with pytest.raises(ModelNotFoundError, match="'m' has no adapters"):
        check_name("m", "eve", ())


def test_every_engine_is_told_by_its_own_numbers():
    chosen = (("bob", None),)
    assert field(chosen, (ADA, BOB)) == [(0, 0.0), (1, 0.5)]
    assert field(chosen, (BOB, ADA)) == [(0, 0.5), (1, 0.0)]
    assert field((("ada", None),), (ADA, BOB)) == [(0, 1.0), (1, 0.0)], "one that only those get who choose it"
    assert field((("ada", 0.25), ("bob", None)), (ADA, BOB)) == [(0, 0.25), (1, 0.5)]
    assert field((), (ADA, BOB)) == [(0, 0.0), (1, 0.0)]


def test_the_engine_s_own_setting_is_said_aloud_too():
    assert field(None, (ADA, BOB)) == [(0, 0.0), (1, 0.5)]
    assert field(None, (ADA, BOB), {0: 2.0}) == [(0, 2.0), (1, 0.0)]
    assert lora_field(None, ()) == b""


def test_ids_and_names_are_one_choice():
    known = (ADA, BOB)
    assert by_ids([{"id": 1, "scale": 0.5}], known) == (("bob", None),)
    assert by_ids([{"id": 1, "scale": 0.75}, {"id": 0, "scale": 1}], known) == (("ada", None), ("bob", 0.75))
    assert by_ids([{"id": 1}], known) == ()
    assert by_ids([], known) is None


@pytest.mark.parametrize(
    "raw",
    [7, ["ada"], [{"id": 2, "scale": 1}], [{"id": "0"}], *([{"id": 0, "scale": bad}] for bad in ("x", True, math.nan))],
)
def test_what_llama_server_would_pass_over_in_silence_is_refused(raw):
    with pytest.raises(ConfigError, match=r"ids are 0 \(ada\), 1 \(bob\)"):
        by_ids(raw, (ADA, BOB))


def test_ids_mean_nothing_where_engines_number_differently():
    both = [engine("a", ADA, BOB), engine("b", BOB, ADA)]
    with pytest.raises(ConfigError, match="choose one as model:adapter"):
        choose("m", [{"id": 0, "scale": 1}], "m", both)
    assert choose("m", [{"id": 0, "scale": 1}], "m", both[:1]) == (("ada", None),)
    assert choose("m:ada", None, "m", both) == (("ada", None),)
    assert choose("m", None, "m", both) is None
    assert choose("m", [{"id": 7, "scale": 1}], "m", [engine("c")]) is None, "loaded by an argument of one's own"


def busy(name: str, *running: str, slots: int = 4) -> EngineView:
    row = EngineView(name, "m", slots, busy=len(running), adapters=frozenset({"ada", "bob"}))
    for adapter in running:
        chosen = ((adapter, None),)
        row.running[chosen] = row.running.get(chosen, 0) + 1
    return row


def wish(adapter: str, **more: object) -> Ask:
    return Ask(model="m", adapter=adapter, lora=((adapter, None),), prompt_tokens=50, max_tokens=50, **more)


def test_a_request_goes_where_its_adapter_runs_rather_than_where_another_one_does():
    table = Table([busy("a", "ada", "ada"), busy("b", "bob")])
    policy = make_policy()
    assert policy.choose(wish("ada"), table, Rates()).engine == "a"
    assert policy.choose(wish("bob"), table, Rates()).engine == "b"
    plain = Ask(model="m", prompt_tokens=50, max_tokens=50)
    table.add(busy("c"))
    assert policy.choose(plain, table, Rates()).engine == "c"


def test_it_is_found_although_others_are_less_busy():
    table = Table([busy("z", "ada", "ada", "ada"), *(busy(f"e{number:02}", "bob") for number in range(20))])
    assert make_policy().choose(wish("ada"), table, Rates()).engine == "z"


def test_an_idle_engine_is_better_than_a_busy_one_with_the_same_adapter():
    table = Table([busy("a", "ada", "ada", "ada"), busy("b")])
    assert make_policy().choose(wish("ada"), table, Rates()).engine == "b"


async def test_claims_are_counted_by_adapter_and_leave_nothing_behind():
    router = Router(8, 1.0)
    router.update([engine("a", ADA, BOB)])
    leases = [await router.acquire(wish("ada"))]
    router.began(leases[0])
    leases.append(await router.acquire(wish("bob")))
    row = leases[0].row
    assert row.running == {(("ada", None),): 1, (("bob", None),): 1}
    assert row.is_taken((("ada", None),))
    for lease in leases:
        router.release(lease)
    assert row.running == {}


async def test_an_adapter_that_no_engine_has_yet_is_waited_for_and_never_sent_to_another():
    router = Router(8, 0.05)
    models = [ModelInfo(name="m", state=ModelState.COLD, is_elastic=True, adapters=(ADA,))]
    router.update([engine("a")], models)
    assert router.resolve("m:ada") == "m"
    with pytest.raises(OverloadedError, match="deadline"):
        await router.acquire(wish("ada"))
    router.update([engine("a"), engine("b", ADA)], models)
    lease = await router.acquire(wish("ada"))
    assert lease.engine.name == "b"
    router.release(lease)


async def test_new_scales_make_old_caches_worthless_until_the_server_is_another_one():
    router = Router(8, 1.0)
    router.update([engine("a", BOB)])

    async def turn() -> int:
        lease = await router.acquire(Ask(model="m", key=b"k" * 600))
        timings = Timings(cache_n=lease.cached_tokens, prompt_n=200 - lease.cached_tokens, predicted_n=2)
        router.release(lease, Served(timings=timings, reply=b""))
        return lease.cached_tokens

    assert (await turn(), await turn() > 100) == (0, True)
    router.rescale("a", {0: 2.0})
    lease = await router.acquire(Ask(model="m"))
    assert json.loads(b"{%b}" % lease.lora) == {"lora": [{"id": 0, "scale": 2.0}]}
    router.release(lease)
    assert (await turn(), await turn() > 100) == (0, True)
    router.update([engine("a", BOB).with_(server_pid=9)])
    lease = await router.acquire(Ask(model="m"))
    assert json.loads(b"{%b}" % lease.lora) == {"lora": [{"id": 0, "scale": 0.5}]}
    router.release(lease)
    router.rescale("nobody", {0: 1.0})


async def test_whose_adapters_wait_for_their_turn_are_not_overtaken_for_ever():
    router = Router(8, 5.0)
    router.update([engine("a", ADA, BOB)])
    first = await router.acquire(wish("ada"))
    router.began(first)
    waits = await router.acquire(wish("bob"))
    later = asyncio.create_task(router.acquire(wish("ada")))
    await asyncio.sleep(0)
    assert router.snapshot()["waiting"] == {"m": 1}, "it would share ada's batches before bob's turn"
    router.release(first)
    await asyncio.sleep(0)
    assert not later.done()
    router.began(waits)
    again = await later
    for lease in (waits, again):
        router.release(lease)
    assert (again.row.running, again.row.coming) == ({}, {})


async def test_one_that_fails_before_its_turn_gives_way():
    router = Router(8, 5.0)
    router.update([engine("a", ADA, BOB)])
    broken = await router.acquire(wish("bob"))
    later = asyncio.create_task(router.acquire(wish("ada")))
    await asyncio.sleep(0)
    router.release(broken)
    router.release(await later)
    assert later.result().row.coming == {}
