"""Answers of the whole fleet before engines that are away, slow or silent."""

import asyncio
import json
import logging

import pytest
from gateway_harness import FakeEngine, engine_info, gateway, raw, whole

from lltm_ray.gateway import fleet as fleet_module
from lltm_ray.records import EngineState

METRICS = b"# TYPE up gauge\nup 1\n"


async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
    bodies = {b"/slots": b'[{"id":0}]', b"/metrics": METRICS, b"/lora-adapters": b'{"success":true}'}
    writer.write(whole(bodies[request.split(b" ", 2)[1]]))


async def hang_up(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def silence(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(100)


async def post(gate, path: str):
    async with gate.http.post(f"{gate.url}{path}", data=b"[]") as reply:
        return reply.status, await reply.json()


async def get(gate, path: str) -> str:
    async with gate.http.get(f"{gate.url}{path}") as reply:
        assert reply.status == 200
        return await reply.text()


def away(name: str):
    return engine_info(name, "").with_(state=EngineState.STARTING)


async def test_adapters_for_a_model_without_a_ready_engine_are_refused():
    async with gateway(away("a")) as gate:
        status, body = await post(gate, "/lora-adapters")
        assert status == 503
        assert "a is starting" in body["error"]["message"]


async def test_adapters_that_miss_a_listed_engine_are_a_failure_that_names_it():
    async with FakeEngine(answer) as good, gateway(engine_info("good", good.url), away("a")) as gate:
        status, body = await post(gate, "/lora-adapters")
        assert status == 503
        assert "1 of 2 engines" in body["error"]["message"]
        assert "a: is starting" in body["error"]["message"]
        assert await post(gate, "/lora-adapters?engine=good") == (200, {"success": True})
        assert len(good.requests) == 2


async def test_adapters_with_a_body_that_never_ends_meet_the_deadline():
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url), request_timeout_s=0.5) as gate:
        head = b"POST /lora-adapters HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n["
        seen = await raw(gate, head)
        assert seen.startswith(b"HTTP/1.1 504")
        assert not engine.requests


async def test_adapters_are_never_sent_twice_to_an_engine_that_hangs_up():
    async with FakeEngine(answer) as engine, gateway(engine_info("e", engine.url)) as gate:
        await get(gate, "/slots")  # leaves a pooled connection
        engine.script = hang_up
        status, _ = await post(gate, "/lora-adapters")
        assert status == 503
        assert [request.split(b" ", 2)[1] for request in engine.requests] == [b"/slots", b"/lora-adapters"]


async def test_metrics_name_the_engines_that_did_not_answer():
    async with (
        FakeEngine(answer) as good,
        FakeEngine(hang_up) as bad,
        gateway(engine_info("good", good.url), engine_info("bad", bad.url)) as gate,
    ):
        lines = (await get(gate, "/metrics")).splitlines()
        assert lines[:3] == ["# TYPE up gauge", 'up{engine="good"} 1', "# engine bad did not answer"]
    assert 'lltm_gateway_claimed_slots{engine="bad"} 0' in lines, "and what the gateway itself counts"


async def test_an_engine_silent_on_slots_is_logged_once_per_change(caplog, monkeypatch):
    monkeypatch.setattr(fleet_module, "ASK_TIMEOUT_S", 0.2)
    caplog.set_level(logging.WARNING, logger=fleet_module.__name__)
    async with FakeEngine(silence) as engine, gateway(engine_info("e", engine.url)) as gate:
        for _ in range(3):
            assert json.loads(await get(gate, "/slots")) == []
        assert [record.message for record in caplog.records] == ["engine e: /slots unanswered: no answer within 0.2 s"]
        engine.script = answer
        monkeypatch.setattr(fleet_module, "ASK_TIMEOUT_S", 60.0)
        for _ in range(2):
            assert json.loads(await get(gate, "/slots")) == [{"id": 0, "engine": "e"}]
        assert [record.message for record in caplog.records][1:] == ["engine e: /slots is answered again"]
        engine.script = hang_up
        await get(gate, "/slots")
        assert len(caplog.records) == 3


async def test_the_silence_of_engines_that_left_is_not_remembered(caplog):
    caplog.set_level(logging.WARNING, logger=fleet_module.__name__)
    async with FakeEngine(hang_up) as engine, gateway(engine_info("a", engine.url)) as gate:
        for name in ("a", "b", "a", "a"):
            gate.router.update([engine_info(name, engine.url)])
            await get(gate, "/slots")
        assert [record.message.split(":")[0] for record in caplog.records] == ["engine a", "engine b", "engine a"]


@pytest.mark.parametrize("path", ["/slots", "/metrics"])
async def test_a_fleet_answer_without_engines_is_empty(path):
    async with gateway(away("a")) as gate:
        answer = await get(gate, path)
    assert answer == "[]" or "llamacpp" not in answer


async def test_a_slot_action_never_runs_twice():
    async def answer_then_break(request: bytes, writer: asyncio.StreamWriter) -> None:
        if request.startswith(b"POST /slots"):
            writer.close()
        else:
            writer.write(whole(b'{"tokens":[]}'))

    async with FakeEngine(answer_then_break) as engine, gateway(engine_info("e", engine.url)) as gate:
        assert (await post(gate, "/tokenize"))[0] == 200  # leaves a connection in the pool
        status, _ = await post(gate, "/slots/0?action=save")
        assert status == 503
        assert sum(request.startswith(b"POST /slots") for request in engine.requests) == 1
