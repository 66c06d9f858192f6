"""Two gateways' routers before real engines: who goes on at the other one finds its cache, and slots tell the truth."""

import asyncio
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress

import pytest
from failover_harness import write_model
from gateway_harness import gateway, infos, real_engine

from lltm_ray.actors.sampler import Servers, SlotChanges
from lltm_ray.routing.gossip import MARGIN_S, Board
from lltm_ray.routing.served import SlotShare

SALT = b"s" * 32
LONG_TOKENS = 7000
"""Nearly all that a slot takes: seconds of work on any machine. Who asks for it leaves before the end."""


@contextmanager
def servers(folder, *names, slots=4):
    model = write_model(folder / "tiny.gguf")
    with ExitStack() as stack:
        yield [stack.enter_context(real_engine(name, model, folder, slots=slots)) for name in names]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    with servers(tmp_path_factory.mktemp("engines"), "e0", "e1") as running:
        yield running


@pytest.fixture
def engine(tmp_path):
    """One that is this test's alone, with two slots."""
    with servers(tmp_path, "e0", slots=2) as (running,):
        yield running


class Fleet:
    """Gateways, and what the directory does for them."""

    def __init__(self, gates, engines):
        self.gates = gates
        self.board = Board()
        self._versions = [0] * len(gates)
        self._servers, self._changes = Servers(""), SlotChanges()
        self._servers.update(tuple(infos(engines)))

    async def exchange(self):
        for number, gate in enumerate(self.gates):
            self.board.post(str(number), await gate.router.gossip.news(SALT))
        for number, gate in enumerate(self.gates):
            self._versions[number], told = self.board.read(str(number), self._versions[number])
            await gate.router.gossip.hear(told, SALT)

    async def sample(self):
        """What a node's sampler sees once replies have settled, and every router is told."""
        await asyncio.sleep(MARGIN_S + 0.05)
        await self._servers.read_slots()
        self.board.post("", self._changes.of(self._servers.samples()))
        await self.exchange()

    async def close(self):
        self._servers.update(())
        await self._servers.read_slots()


@asynccontextmanager
async def fleet(engines, count=2):
    async with AsyncExitStack() as stack:
        gates = [await stack.enter_async_context(gateway(*infos(engines))) for _ in range(count)]
        for index, gate in enumerate(gates):
            gate.router.update(infos(engines), share=SlotShare(index, count))
        running = Fleet(gates, engines)
        yield running
        await running.close()


class Talk:
    """A conversation that grows."""

    def __init__(self, word):
        self.messages = [{"role": "user", "content": f"{word} talks of this and that. " * 20}]
        self.tokens = 0

    async def turn(self, gate, **more):
        """One turn through a gateway: predicted and found cached tokens, and the slot it ran on."""
        body = {"messages": self.messages, "max_tokens": 17, "temperature": 0, "ignore_eos": True, **more}
        async with gate.http.post(f"{gate.url}/v1/chat/completions", json=body) as reply:
            told = await reply.json()
            assert reply.status == 200, told
            slot = reply.headers["x-lltm-engine"], reply.headers["x-lltm-slot"]
            predicted = int(reply.headers["x-lltm-cached"].partition("/")[0])
        self.messages.append({"role": "assistant", "content": told["choices"][0]["message"]["content"]})
        self.messages.append({"role": "user", "content": "go on, please " * 8})
        cached, prompt = told["timings"]["cache_n"], told["timings"]["prompt_n"]
        self.tokens = cached + prompt + told["timings"]["predicted_n"] - 1
        return predicted, cached, slot


async def straight(gate, engine, path, body):
    """Past the gateway."""
    async with gate.http.post(f"{engine.info.url}{path}", json=body, headers=engine.headers) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


async def leave(task):
    """The client goes before it is answered."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("gossips", [True, False])
async def test_turns_that_alternate_between_gateways_find_all_only_if_they_gossip(engines, gossips):
    async with fleet(engines) as both:
        talks = [Talk(f"{name} {gossips}") for name in ("ann", "bob", "cyd")]
        reused = wanted = 0
        for turn in range(4):
            for place, talk in enumerate(talks):
                before = talk.tokens
                _, cached, _ = await talk.turn(both.gates[(turn + place) % 2])
                reused, wanted = reused + min(cached, before), wanted + before
            if gossips:
                await both.exchange()
        if gossips:
            assert reused >= 0.98 * wanted, (reused, wanted)
        else:
            assert reused < 0.85 * wanted, (reused, wanted)


async def test_a_conversation_stays_on_its_slot_whoever_answers_it(engines):
    async with fleet(engines) as both:
        talk, places = Talk("dan"), set()
        for turn in range(4):
            _, _, slot = await talk.turn(both.gates[turn % 2])
            places.add(slot)
            await both.exchange()
        assert len(places) == 1
        assert [gate.claims() for gate in both.gates] == [{"e0": 0, "e1": 0}] * 2


async def test_a_slot_that_the_other_gateway_uses_is_not_given_out(engine):
    async with fleet([engine]) as both:
        talk = Talk("eve")
        _, _, (_, slot) = await talk.turn(both.gates[0])
        await both.exchange()
        long = asyncio.create_task(talk.turn(both.gates[1], max_tokens=LONG_TOKENS))
        async with asyncio.timeout(60):
            while not both.gates[1].claims()["e0"]:
                await asyncio.sleep(0.005)
        assert both.gates[1].router._engines["e0"].pinned == {int(slot)}
        await both.exchange()
        _, _, (_, other) = await Talk("fay").turn(both.gates[0])
        assert not long.done(), "too short to show anything"
        assert other != slot, "it would have waited for the other gateway's request"
        await leave(long)


async def test_an_erased_slot_predicts_nothing_before_the_next_request(engine):
    async with fleet([engine], count=1) as one:
        talk = Talk("gus")
        _, _, (_, slot) = await talk.turn(one.gates[0])
        await one.sample()
        predicted, cached, (_, again) = await talk.turn(one.gates[0])
        assert (predicted == cached, cached > 400, again) == (True, True, slot), "a true sample changes nothing"
        await one.sample()
        await straight(one.gates[0], engine, f"/slots/{slot}?action=erase", {})
        await one.sample()
        predicted, cached, _ = await talk.turn(one.gates[0])
        assert (predicted, cached) == (0, 0)


async def test_a_request_past_the_gateway_that_overwrites_a_slot_is_noticed(tmp_path):
    with servers(tmp_path, "e0", slots=1) as (engine,):
        async with fleet([engine], count=1) as one:
            talk = Talk("hal")
            await talk.turn(one.gates[0])
            await one.sample()
            believed = one.gates[0].router.held("e0")
            await straight(one.gates[0], engine, "/completion", {"prompt": "else " * 90, "n_predict": 9, "id_slot": 0})
            await one.sample()
            assert [each.tokens for each in believed] == [talk.tokens]
            assert one.gates[0].router.held("e0") == ()


async def test_a_slot_that_is_busy_with_somebody_else_is_passed_over_until_it_is_idle(engine):
    async with fleet([engine], count=1) as one:
        gate = one.gates[0]
        body = {"prompt": "long " * 50, "n_predict": LONG_TOKENS, "id_slot": 0, "ignore_eos": True}
        foreign = asyncio.create_task(straight(gate, engine, "/completion", body))
        taken = gate.router._engines["e0"].taken
        async with asyncio.timeout(60):
            while not taken:
                await one.sample()
        slots = [(await Talk(name).turn(gate))[2][1] for name in ("ida", "jon")]
        assert not foreign.done(), "too short to show anything"
        assert slots == ["1", "1"]
        await leave(foreign)
        async with asyncio.timeout(60):
            while taken:
                await one.sample()
        both = await asyncio.gather(Talk("kim").turn(gate), Talk("lea").turn(gate))
        assert {slot for _, _, (_, slot) in both} == {"0", "1"}
