"""Conversations leave an engine through the gateway: drains, relief of hot engines, what clients may do to slots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from failover_harness import write_model
from gateway_harness import Engine, Gateway, gateway, infos, real_engine, until

from lltm_ray.gateway.level import PATIENCE, Leveller

SLOTS = 8


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, ...]]:
    folder = tmp_path_factory.mktemp("engines")
    model = write_model(folder / "tiny.gguf")
    with ExitStack() as stack:
        yield tuple(stack.enter_context(real_engine(name, model, folder, slots=SLOTS)) for name in ("e0", "e1", "e2"))


class Talk:
    """One conversation of a client, as a chat that grows."""

    def __init__(self, gate: Gateway, number: int) -> None:
        self.gate = gate
        self.messages = [{"role": "user", "content": f"{number} talks of this and that. " * (12 + number)}]
        self.engine = ""
        self.tokens = 0
        """Length of the prompt and the reply of the last turn."""

    async def turn(self, *, max_tokens: int = 24, engine: str = "") -> dict[str, Any]:
        """One more turn; returns its timings."""
        body = {"messages": self.messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        headers = {"x-lltm-engine": engine} if engine else {}
        async with self.gate.http.post(f"{self.gate.url}/v1/chat/completions", json=body, headers=headers) as reply:
            told = await reply.json()
            assert reply.status == 200, told
            self.engine = reply.headers["x-lltm-engine"]
        self.messages.append({"role": "assistant", "content": told["choices"][0]["message"]["content"]})
        self.messages.append({"role": "user", "content": "go on"})
        timings: dict[str, Any] = told["timings"]
        self.tokens = timings["cache_n"] + timings["prompt_n"] + timings["predicted_n"]
        return timings


async def drained(gate: Gateway, name: str, **query: Any) -> dict[str, Any]:
    async with gate.http.post(f"{gate.url}/lltm/drain", params={"engine": name, **query}) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


async def test_after_a_drain_every_conversation_goes_on_elsewhere_with_its_prefix_cached(engines):
    async with gateway(*infos(engines)) as gate:
        talks = [Talk(gate, number) for number in range(5)]
        for talk in talks:
            await talk.turn(engine="e0")
        running = asyncio.create_task(talks[4].turn(max_tokens=900, engine="e0"))
        await until(lambda: gate.claims()["e0"] or running.done())
        report = await drained(gate, "e0", timeout_s=100)
        assert running.done(), "the drain ended before the running request did"
        assert (report["moved"], report["left"], report["running"], report["failed"]) == (5, 0, 0, [])
        for talk in talks:
            before = talk.tokens
            timings = await talk.turn()
            assert talk.engine != "e0"
            assert timings["cache_n"] >= 0.95 * (before - 1), (timings, before)
        migration = gate.app.migrator.snapshot()
        assert (migration["verified"], migration["unconfirmed"], migration["off"]) == (5, 0, [])
        async with gate.http.post(f"{gate.url}/lltm/undrain?engine=e0") as reply:
            assert reply.status == 200
        fresh = Talk(gate, 9)
        await fresh.turn(engine="e0")
        assert fresh.engine == "e0"
    assert not [path for engine in engines for path in Path(engine.info.slot_folder).iterdir()]


async def test_a_model_whose_last_engine_is_drained_is_refused_at_once_and_the_drain_says_so(engines):
    async with gateway(*infos(engines[:2]), queue_timeout_s=600) as gate:
        assert (await drained(gate, "e0"))["warning"] == ""
        long = {"prompt": "z", "n_predict": 7000, "stream": True, "ignore_eos": True}
        busy = [await gate.http.post(f"{gate.url}/completion", json=long) for _ in range(SLOTS)]
        waits = asyncio.create_task(gate.http.post(f"{gate.url}/completion", json=long))
        await until(lambda: gate.waiting() or waits.done())
        warning = (await drained(gate, "e1", timeout_s=0))["warning"]
        assert "no engine serves model 'tiny' now" in warning
        assert "`lltm-ray drain e1 --undrain`" in warning
        async with asyncio.timeout(60):  # of 600 that they might wait
            for reply in (await waits, await gate.http.post(f"{gate.url}/completion", json=long)):
                told = (await reply.json())["error"]["message"]
                assert (reply.status, reply.headers.get("retry-after")) == (503, None), "nobody will come by itself"
                assert "model 'tiny'" in told
                assert "e1 is drained (lltm-ray drain e1 --undrain opens it)" in told
        for reply in busy:
            reply.close()
        async with gate.http.post(f"{gate.url}/lltm/undrain?engine=e1") as reply:
            assert reply.status == 200
        assert (await Talk(gate, 5).turn())["predicted_n"]
        await gate.idle()
        async with asyncio.timeout(10):  # of 60: its conversations can go nowhere
            again = await drained(gate, "e1", timeout_s=60)
        assert "no other engine of model 'tiny' can take it" in again["failed"][0]["why"]


async def test_a_hot_engine_gives_idle_conversations_away_once_it_stays_hot(engines):
    async with gateway(*infos(engines)) as gate:
        talks = [Talk(gate, 20)]
        await talks[0].turn(engine="e1")
        level = Leveller(gate.router, gate.app.migrator)
        long = {"prompt": "z", "n_predict": 7000, "stream": True, "ignore_eos": True}
        busy = [
            await gate.http.post(f"{gate.url}/completion?engine=e1", json=long | {"prompt": f"{number} z"})
            for number in range(SLOTS - 1)
        ]
        looks = [await level.look("tiny") for _ in range(PATIENCE - 1)]
        assert looks == [None] * (PATIENCE - 1), "a burst is no reason to move"
        report = await level.look("tiny")
        assert gate.claims()["e1"] == SLOTS - 1
        assert report is not None, gate.router.loads("tiny")
        assert (report.engine, report.moved, report.failed) == ("e1", 1, ())
        before = talks[0].tokens
        assert (await talks[0].turn())["cache_n"] >= 0.95 * (before - 1)
        assert talks[0].engine != "e1"
        assert await level.look("tiny") is None, "it rests after a relief"
        for reply in busy:
            reply.close()
        await gate.idle()


async def test_engines_at_one_level_are_left_alone(engines):
    async with gateway(*infos(engines)) as gate:
        await Talk(gate, 30).turn()
        level = Leveller(gate.router, gate.app.migrator)
        assert [await level.look("tiny") for _ in range(2 * PATIENCE)] == [None] * 2 * PATIENCE


async def act(gate: Gateway, action: str, slot: int = 0, engine: str = "e0", **body: Any) -> tuple[int, Any]:
    url = f"{gate.url}/slots/{slot}?action={action}&engine={engine}"
    async with gate.http.post(url, json=body) as reply:
        return reply.status, await reply.json(content_type=None)


async def test_clients_cannot_fill_a_folder_that_nobody_gave_them(engines):
    own = [engine.info.with_(has_own_slot_folder=True) for engine in engines]
    async with gateway(*own) as gate:
        await Talk(gate, 40).turn(engine="e0")
        for action in ("save", "restore"):
            status, told = await act(gate, action, filename="mine.bin")
            assert (status, told["error"]["type"]) == (403, "permission_error")
            assert "slot_save_path" in told["error"]["message"]
        for last in ("action", "%61ction", "%u0061ction"):  # the engine takes the last of several
            action = f"erase&{last}=save"
            assert (await act(gate, action, filename="mine.bin"))[0] == 200
        assert not list(Path(engines[0].info.slot_folder).iterdir())
        async with gate.http.post(f"{gate.url}/slots/0?action=save", json={}) as reply:
            assert reply.status == 400, "which engine?"


async def test_in_a_folder_of_the_operators_own_clients_save_and_restore(engines):
    async with gateway(*infos(engines)) as gate:
        talk = Talk(gate, 50)
        await talk.turn(engine="e0")
        (held,) = [each for each in gate.router.held("e0") if each.tokens > 100][:1]
        assert (await act(gate, "save", held.slot, filename="mine.bin"))[0] == 200
        saved = Path(engines[0].info.slot_folder) / "mine.bin"
        assert saved.is_file()
        assert (await act(gate, "restore", held.slot, filename="mine.bin"))[0] == 200
        assert held.slot not in {each.slot for each in gate.router.held("e0")}, "its content is not ours to know"
        saved.unlink()


async def test_an_erased_slot_is_not_expected_to_be_cached(engines):
    async with gateway(*infos(engines)) as gate:
        talk = Talk(gate, 60)
        await talk.turn(engine="e2")
        for held in gate.router.held("e2"):
            assert (await act(gate, "erase", held.slot, "e2"))[0] == 200
        assert gate.router.held("e2") == ()
        body = json.dumps({"messages": talk.messages, "max_tokens": 4})
        async with gate.http.post(
            f"{gate.url}/v1/chat/completions?engine=e2", data=body, timeout=aiohttp.ClientTimeout(60)
        ) as reply:
            assert reply.status == 200
            assert reply.headers["x-lltm-cached"].startswith("0/")
