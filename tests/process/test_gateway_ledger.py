"""The account through the gateway: however a request ends, its tokens are in it, and they add up with the servers'."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from failover_harness import drift_at_rest
from gateway_harness import (
    CHAT,
    STREAM_HEAD,
    Engine,
    FakeEngine,
    Gateway,
    engine_info,
    event,
    gateway,
    infos,
    real_engine,
    until,
)

from lltm_ray.records import EngineState
from lltm_ray.routing import rows as rows_module
from lltm_ray.routing.ledger import Drift, Ledger

LONG = 7000
NATIVE = {"prompt": "hello", "n_predict": 12, "temperature": 0, "seed": 1, "ignore_eos": True}
STREAM = NATIVE | {"stream": True}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "account" / "ledger.sqlite")
    yield made
    made.close()


@pytest.fixture
def fresh(tiny: Path, tmp_path: Path) -> Iterator[Engine]:
    """A server whose counters start at 0."""
    with real_engine("fresh", tiny, tmp_path) as engine:
        yield engine


async def explain(gate: Gateway, id_: str, **headers: str) -> dict[str, Any]:
    async with gate.http.get(f"{gate.url}/lltm/explain/{id_}", headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


async def settled(gate: Gateway, ledger: Ledger, engine: Engine, id_: str) -> tuple[Drift, dict[str, Any]]:
    """The drift of a server that has come to rest, and the account of a request after it."""
    await gate.idle()
    drift = await drift_at_rest(gate, ledger, engine)
    return drift, await explain(gate, id_)


ENDINGS = {
    "joined": ("/v1/chat/completions", CHAT),
    "whole": ("/completion", NATIVE | {"n_probs": 2}),
    "stream": ("/v1/chat/completions", CHAT | {"stream": True}),
    "stream without a tap": ("/v1/completions", CHAT | {"prompt": "hello", "logprobs": 1, "stream": True}),
    "responses": ("/v1/responses", {"input": "hello", "max_output_tokens": 8, "temperature": 0}),
    "messages": ("/v1/messages", CHAT | {"stream": True}),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_a_good_answer_is_in_the_account_as_the_server_counted_it(fresh, ledger, name):
    path, body = ENDINGS[name]
    async with gateway(fresh.info, ledger=ledger) as gate:
        async with gate.http.post(gate.url + path, json=body) as reply:
            assert reply.status == 200, await reply.text()
            await reply.read()
            headers = reply.headers
        drift, entry = await settled(gate, ledger, fresh, headers["x-request-id"])
        assert drift == Drift()
        (attempt,) = entry["attempts"]
        assert (entry["status"], entry["error"], entry["route"], entry["model"]) == (200, "", path, "tiny")
        assert (attempt["outcome"], attempt["is_estimate"], attempt["engine"]) == (
            "ok",
            False,
            headers["x-lltm-engine"],
        )
        assert entry["delivered_tokens"] == attempt["generated_tokens"] == body.get("n_predict", 8)
        assert attempt["computed_tokens"] > 0
        assert entry["is_balanced"]
        assert entry["policy"] == "residency"
        assert entry["considered"][0]["engine"] == "fresh"
        assert entry["ttft_s"] <= entry["total_s"]
        assert headers["x-lltm-slot"] == ("any" if attempt["slot"] < 0 else str(attempt["slot"]))
        assert headers["x-lltm-attempts"] == "1"
        assert headers["x-lltm-cached"].startswith("0/")
        assert 0 <= float(headers["x-lltm-wait-ms"]) < 60_000


async def test_the_second_turn_is_told_to_be_cached_and_is(fresh, ledger):
    async with gateway(fresh.info, ledger=ledger) as gate:
        for _ in range(2):
            async with gate.http.post(f"{gate.url}/completion", json=NATIVE | {"prompt": "hello " * 40}) as reply:
                timings = (await reply.json())["timings"]
        predicted, _, prompt = reply.headers["x-lltm-cached"].partition("/")
        entry = await explain(gate, reply.headers["x-request-id"])
        (attempt,) = entry["attempts"]
        assert attempt["cached_tokens"] == timings["cache_n"] > 100
        assert abs(int(predicted) - timings["cache_n"]) <= 2
        assert abs(int(prompt) - timings["cache_n"] - timings["prompt_n"]) <= 2
        assert attempt["predicted_cached_tokens"] == int(predicted)
        assert "cached" in entry["why"]


GONE = {
    "tapped": ("/completion", STREAM | {"n_predict": LONG}),
    "without a tap": ("/completion", STREAM | {"n_predict": LONG, "n_probs": 1}),
    "chat without a tap": ("/v1/chat/completions", CHAT | {"stream": True, "max_tokens": LONG, "logprobs": True}),
}


@pytest.mark.parametrize("name", GONE)
async def test_what_a_client_had_when_it_left_is_delivered_and_the_rest_is_waste(fresh, ledger, name):
    path, body = GONE[name]
    async with gateway(fresh.info, ledger=ledger) as gate:
        seen = 0
        async with gate.http.post(gate.url + path, json=body | {"ignore_eos": True}) as reply:
            async for line in reply.content:
                seen += line.startswith(b"data: ") and b'"role"' not in line
                if seen == 30:
                    break
        id_ = reply.headers["x-request-id"]
        drift, entry = await settled(gate, ledger, fresh, id_)
        (attempt,) = entry["attempts"]
        assert drift == Drift()
        assert (attempt["outcome"], entry["error"]) == ("client gone", "client gone")
        assert seen <= entry["delivered_tokens"] == attempt["delivered_tokens"] <= attempt["generated_tokens"] < LONG
        assert entry["is_balanced"]
        assert not attempt["is_estimate"], "settled by the server's own counters"


TIMINGS = (
    b'"timings":{"cache_n":3,"prompt_n":4,"prompt_ms":1.5,"prompt_per_token_ms":0.1,"prompt_per_second":9.5,'
    b'"predicted_n":2,"predicted_ms":1.5,"predicted_per_token_ms":0.1,"predicted_per_second":9.5}'
)
CHAT_EVENT = b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"a"}}],"created":1,"id":"x","model":"m"}'
CHAT_END = b'{"choices":[{"finish_reason":"stop","index":0,"delta":{}}],"created":1,"id":"x","model":"m",%b}' % TIMINGS
NATIVE_EVENT = (
    b'{"index":0,"content":"a","tokens":[7],"stop":false,"id_slot":0,"tokens_predicted":%d,"tokens_evaluated":7}'
)
NATIVE_END = (
    b'{"index":0,"content":"","tokens":[],"stop":true,"id_slot":0,"tokens_predicted":2,"tokens_evaluated":7,%b}'
    % TIMINGS
)
ENDED = {
    "chat": (CHAT | {"stream": True}, [CHAT_EVENT, CHAT_EVENT, CHAT_END, b"[DONE]"]),
    "chat without a tap": (CHAT | {"stream": True, "logprobs": True, "n": 1, "tools": []},
                           [CHAT_EVENT, CHAT_EVENT, CHAT_END, b"[DONE]"]),
    "native": (STREAM, [NATIVE_EVENT % 1, NATIVE_EVENT % 2, NATIVE_END]),
    "native without a tap": (STREAM | {"n_probs": 1}, [NATIVE_EVENT % 1, NATIVE_EVENT % 2, NATIVE_END]),
}  # fmt: skip


async def leave_after(ledger, body, events):
    """The account of a client that leaves with the last of these events, before the body's end; and the claims then."""

    async def hold(request, writer):
        writer.write(STREAM_HEAD + b"".join(map(event, events)))
        await writer.drain()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(100)

    path = "/completion" if "prompt" in body else "/v1/chat/completions"
    async with FakeEngine(hold) as slow, gateway(engine_info("slow", slow.url), ledger=ledger) as gate:
        async with gate.http.post(gate.url + path, json=body, headers={"x-request-id": "left"}) as reply:
            async for line in reply.content:
                if line.strip() == b"data: " + events[-1]:
                    break
        await gate.idle()
        return await explain(gate, "left"), gate.claims()


@pytest.mark.parametrize("name", ENDED)
async def test_a_client_that_leaves_at_the_last_event_has_had_the_whole_answer(ledger, name):
    body, events = ENDED[name]

    entry, claims = await leave_after(ledger, body, events)
    (attempt,) = entry["attempts"]
    assert (attempt["outcome"], entry["error"], attempt["is_estimate"]) == ("ok", "", False)
    assert [attempt[f"{what}_tokens"] for what in ("cached", "computed", "generated", "delivered")] == [3, 4, 2, 2]
    assert claims == {"slow": 0}


NOT_ENDED = {
    "text like an end": (CHAT | {"stream": True, "logprobs": True}, CHAT_EVENT.replace(b'"a"', b'"data: [DONE]"')),
    "the first of two": (STREAM | {"prompt": ["a", "b"]}, NATIVE_END),
}


@pytest.mark.parametrize("name", NOT_ENDED)
async def test_what_only_looks_like_the_last_event_is_none(ledger, name):
    body, last = NOT_ENDED[name]

    entry, _ = await leave_after(ledger, body, [last])
    assert (entry["attempts"][0]["outcome"], entry["error"]) == ("client gone", "client gone")


async def test_a_client_that_leaves_a_joined_answer_got_nothing_and_its_waste_is_known(fresh, ledger):
    async with gateway(fresh.info, ledger=ledger) as gate:
        leaver = start(gate, CHAT | {"max_tokens": LONG, "ignore_eos": True}, "abandoned")
        await gate.until_decoding(fresh, leaver)
        leaver.cancel()
        drift, entry = await settled(gate, ledger, fresh, "abandoned")
        assert (drift, entry["delivered_tokens"], entry["attempts"][0]["outcome"]) == (Drift(), 0, "client gone")
        assert 0 < entry["wasted_tokens"] < LONG


async def test_a_joined_answer_that_breaks_off_wasted_what_its_engine_had_generated(ledger):
    async def break_off(request, writer):
        told = b'{"index":0,"content":"a","tokens":[7],"stop":false,"id_slot":0,"tokens_predicted":1}'
        writer.write(STREAM_HEAD + event(told) * 5)
        await writer.drain()
        writer.close()

    async with (
        FakeEngine(break_off) as bad,
        gateway(engine_info("bad", bad.url), ledger=ledger, max_attempts=1) as gate,
    ):
        body = {"prompt": "a", "n_predict": 99}
        async with gate.http.post(f"{gate.url}/completion", json=body, headers={"x-request-id": "cut"}) as reply:
            assert reply.status == 503
        await gate.idle()
        (attempt,) = (await explain(gate, "cut"))["attempts"]
        assert (attempt["generated_tokens"], attempt["delivered_tokens"], attempt["is_estimate"]) == (5, 0, True)


def start(gate: Gateway, body: dict[str, Any], id_: str) -> asyncio.Task[aiohttp.ClientResponse]:
    """Ask for a chat; whoever cancels the task has left."""
    asked = gate.http.post(f"{gate.url}/v1/chat/completions", json=body, headers={"x-request-id": id_})
    return asyncio.ensure_future(asked)


async def test_an_answer_that_cannot_be_streamed_keeps_its_slot_to_its_end_and_is_all_waste(fresh, ledger):
    async with gateway(fresh.info, ledger=ledger) as gate:
        body = CHAT | {"max_tokens": 1500, "ignore_eos": True, "logprobs": True}
        leaver = start(gate, body, "abandoned")
        await gate.until_decoding(fresh, leaver)
        leaver.cancel()
        is_claimed = works = True
        while works:
            is_claimed = gate.claims() == {"fresh": 1}
            works = any(each["is_processing"] for each in await gate.slots(fresh))
            assert is_claimed or not works, "its slot was given away while it was at work"
            await asyncio.sleep(0.01)
        await gate.idle()
        drift, entry = await settled(gate, ledger, fresh, "abandoned")
        assert (drift, entry["delivered_tokens"], entry["attempts"][0]["outcome"]) == (Drift(), 0, "client gone")
        assert entry["wasted_tokens"] == 1500


async def hold_all(gate: Gateway, slots: int = 2) -> list[aiohttp.ClientResponse]:
    body = STREAM | {"n_predict": LONG}
    held = [await gate.http.post(f"{gate.url}/completion", json=body) for _ in range(slots)]
    assert [reply.status for reply in held] == [200] * slots
    return held


async def test_one_that_leaves_the_queue_and_those_that_are_refused_are_in_the_account(fresh, ledger):
    async with gateway(fresh.info, ledger=ledger, queue_limit=1) as gate:
        held = await hold_all(gate)
        queued = start(gate, CHAT, "queued")
        await until(gate.waiting, queued)
        for id_, data, status in (("full", json.dumps(CHAT), 429), ("broken", "{", 400), ("who", '{"model":"x"}', 404)):
            async with gate.http.post(
                f"{gate.url}/v1/chat/completions", data=data, headers={"x-request-id": id_}
            ) as reply:
                assert reply.status == status
        queued.cancel()
        await until(lambda: not gate.waiting())
        for reply in held:
            reply.close()
        await gate.idle()
        told = {id_: await explain(gate, id_) for id_ in ("queued", "full", "broken", "who")}
        assert {id_: entry["status"] for id_, entry in told.items()} == {
            "queued": 0,
            "full": 429,
            "broken": 400,
            "who": 404,
        }
        assert told["queued"]["error"] == "client gone"
        assert told["full"]["error"]
        assert not any(entry["attempts"] or entry["delivered_tokens"] for entry in told.values())
        assert (await drift_at_rest(gate, ledger, fresh)) == Drift()


WRONG_CHAT = "/v1/chat/completions", CHAT | {"response_format": {"type": "no such"}}
NO_INFILL = "/infill", {"input_prefix": "a", "input_suffix": "b"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status"), [(*WRONG_CHAT, 400), (*NO_INFILL, 501)])
async def test_what_llama_server_refuses_is_no_attempt_that_went_well(fresh, ledger, stream, path, body, status):
    async with gateway(fresh.info, ledger=ledger) as gate:
        async with gate.http.post(f"{gate.url}{path}", json=body | {"stream": stream}) as reply:
            assert reply.status == status
        await gate.idle()
        entry = await explain(gate, reply.headers["x-request-id"])
        (attempt,) = entry["attempts"]
        assert (entry["status"], attempt["outcome"], attempt["is_estimate"]) == (status, "engine refused", False)
        assert (await drift_at_rest(gate, ledger, fresh)) == Drift()


async def test_an_answer_that_is_the_engine_s_own_error_failed(ledger):
    async def fail(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 X\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()

    async with FakeEngine(fail) as bad, gateway(engine_info("bad", bad.url), ledger=ledger) as gate:
        async with gate.http.post(f"{gate.url}/completion", json=STREAM) as reply:
            assert reply.status == 500
        await gate.idle()
        (attempt,) = (await explain(gate, reply.headers["x-request-id"]))["attempts"]
        assert attempt["outcome"] == "failed"


async def test_a_fleet_that_is_not_ready_is_a_503_in_the_account(ledger):
    away = engine_info("away", "http://127.0.0.1:9").with_(state=EngineState.STARTING)
    async with gateway(away, ledger=ledger, queue_timeout_s=0.1) as gate:
        async with gate.http.post(f"{gate.url}/completion", json=NATIVE) as reply:
            assert reply.status == 503
        entry = await explain(gate, reply.headers["x-request-id"])
        assert (entry["status"], entry["attempts"], entry["model"]) == (503, [], "tiny")


async def test_a_retry_before_the_first_byte_is_two_attempts_of_which_one_delivered(fresh, ledger, monkeypatch):
    monkeypatch.setattr(rows_module, "SUSPECT_S", rows_module.MAX_SUSPECT_S)

    async def reset(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with FakeEngine(reset) as bad, gateway(engine_info("bad", bad.url), ledger=ledger) as gate:
        gate.router.update([engine_info("bad", bad.url), fresh.info])
        ids = []
        for _ in range(4):
            async with gate.http.post(f"{gate.url}/completion", json=STREAM) as reply:
                assert b'"stop":true' in await reply.read()
                ids.append(reply.headers["x-request-id"])
        told = [await explain(gate, id_) for id_ in ids]
        (retried,) = [entry for entry in told if len(entry["attempts"]) == 2]
        assert [attempt["outcome"] for attempt in retried["attempts"]] == ["retried", "ok"]
        assert [attempt["delivered_tokens"] for attempt in retried["attempts"]] == [0, 12]
        assert all(entry["is_balanced"] and entry["delivered_tokens"] == 12 for entry in told)
        assert (await drift_at_rest(gate, ledger, fresh)) == Drift()


async def test_a_stream_that_cannot_go_on_elsewhere_failed_with_what_was_delivered(ledger):
    async def break_off(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"".join(event(b'{"index":0,"content":"a","stop":false}') for _ in range(3)))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    async with FakeEngine(break_off) as bad, gateway(engine_info("bad", bad.url), ledger=ledger) as gate:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with gate.http.post(f"{gate.url}/completion", json=STREAM | {"grammar": "root ::= [a-z]*"}) as reply:
                await reply.read()
        await gate.idle()
        entry = await explain(gate, reply.headers["x-request-id"])
        assert entry["attempts"][0]["outcome"] == "failed"
        assert (entry["delivered_tokens"], entry["is_balanced"], entry["status"]) == (3, True, 200)
        assert "grammar" in entry["error"] or "broke" in entry["error"] or "closed" in entry["error"]


async def test_a_deadline_in_the_middle_is_an_outcome_of_its_own(fresh, ledger):
    for limit_s in (0.3, 2.0, 10.0):  # where the machine stands still, the first byte may come later
        async with gateway(fresh.info, ledger=ledger, request_timeout_s=limit_s) as gate:
            async with gate.http.post(f"{gate.url}/completion", json=STREAM | {"n_predict": LONG}) as reply:
                if reply.status == 200:
                    with pytest.raises(aiohttp.ClientPayloadError):
                        await reply.read()
            drift, entry = await settled(gate, ledger, fresh, reply.headers["x-request-id"])
        if entry["delivered_tokens"]:
            break
    else:
        raise AssertionError("no stream began")
    assert (drift, entry["attempts"][0]["outcome"], entry["is_balanced"]) == (Drift(), "deadline", True)
    assert 0 < entry["delivered_tokens"] < LONG


async def test_a_failover_tells_both_attempts_and_that_it_is_exact(fresh, tiny, tmp_path, ledger):
    with real_engine("doomed", tiny, tmp_path) as doomed:
        async with gateway(doomed.info, ledger=ledger) as gate:
            async with gate.http.post(f"{gate.url}/completion", json=STREAM | {"n_predict": 1500}) as reply:
                async for _ in reply.content:
                    break
                gate.router.update([doomed.info, fresh.info])
                doomed.process.kill()
                lines = [line async for line in reply.content if line.startswith(b"data: ")]
            assert json.loads(lines[-1][6:])["tokens_predicted"] == 1500
            drift, entry = await settled(gate, ledger, fresh, reply.headers["x-request-id"])
            first, second = entry["attempts"]
            assert (first["engine"], first["outcome"], second["engine"], second["outcome"]) == (
                *("doomed", "continued"),
                *("fresh", "ok"),
            )
            assert first["delivered_tokens"] + second["delivered_tokens"] == entry["delivered_tokens"] == 1500
            assert (entry["is_exact"], entry["is_balanced"], drift) == (True, True, Drift())


_GATEWAY = """
import sys, uvloop
from pathlib import Path
from lltm_ray.config import GatewayConfig
from lltm_ray.gateway.app import GatewayApp
from lltm_ray.gateway.auth import ApiKeys
from lltm_ray.gateway.server import serve
from lltm_ray.records import EngineInfo, EngineState, FleetStatus
from lltm_ray.routing.ledger import Ledger
from lltm_ray.routing.router import Router
url, pid, path = sys.argv[1:]
config = GatewayConfig(port=0)
router = Router(config.queue_limit, config.queue_timeout_s)
router.update([EngineInfo(name="fresh", model="tiny", state=EngineState.READY, url=url, api_key="engine-key",
                          slots_total=2, server_pid=int(pid))])
app = GatewayApp(router=router, config=config, keys=ApiKeys(), status=lambda: FleetStatus(name="t"),
                 ledger=Ledger(Path(path), name="doomed"))
uvloop.run(serve(app, config, ready=lambda port: print(port, flush=True)))
"""


@pytest.mark.parametrize("extra", [{}, {"n_probs": 1}], ids=["tapped", "without a tap"])
async def test_what_clients_had_when_the_gateway_was_killed_is_found_by_the_next_one(fresh, tmp_path, extra):
    path = tmp_path / "shared" / "ledger.sqlite"
    argv = [sys.executable, "-c", _GATEWAY, fresh.info.url, str(fresh.process.pid), str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as doomed:
        try:
            assert doomed.stdout is not None
            url = f"http://127.0.0.1:{int(doomed.stdout.readline())}"
            got = await asyncio.gather(*(_read_until_killed(url, id_, doomed, extra) for id_ in ("one", "two")))
        finally:
            doomed.kill()
    ledger = Ledger(path, name="next")
    try:
        assert ledger.counters["recovered"] == 2
        async with gateway(fresh.info, ledger=ledger) as gate:
            for id_, tokens in zip(("one", "two"), got, strict=True):
                drift, entry = await settled(gate, ledger, fresh, id_)
                assert entry["attempts"][0]["outcome"] == "gateway lost"
                # The cell is written just before the socket: between the two a kill may fall, and cost what had come
                # at once, which is more than a token where the gateway had to wait for the processor.
                assert 0 <= entry["delivered_tokens"] - tokens <= 30
                assert (entry["error"], drift) == ("the gateway process died", Drift())
    finally:
        ledger.close()


async def _read_until_killed(url: str, id_: str, doomed: subprocess.Popen[str], extra: dict[str, Any]) -> int:
    """Tokens that came, up to the last byte that was in the socket."""
    lines, buffer = 0, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    body = json.dumps(STREAM | {"n_predict": LONG} | extra).encode()
    writer.write(b"POST /completion HTTP/1.1\r\nhost: x\r\nx-request-id: %b\r\n" % id_.encode())
    writer.write(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    try:
        while part := await reader.read(65536):
            buffer += part
            lines = buffer.count(b'"stop":false')
            if lines > 200 and doomed.poll() is None:
                doomed.kill()
    except ConnectionError:
        pass
    finally:
        writer.close()
    return lines


async def test_the_latest_requests_are_listed_by_tenant_and_wrong_questions_are_refused(pair, ledger):
    keys = ("key-a", "key-b")
    async with gateway(*infos(pair), ledger=ledger, keys=keys) as gate:
        for number, key in enumerate(("key-a", "key-b", "key-a")):
            headers = {"authorization": f"Bearer {key}", "x-request-id": f"r{number}"}
            async with gate.http.post(f"{gate.url}/completion", json=NATIVE, headers=headers) as reply:
                assert reply.status == 200
        me = {"authorization": "Bearer key-a"}

        async def listed(query: str) -> Any:
            async with gate.http.get(f"{gate.url}/lltm/explain{query}", headers=me) as reply:
                return (await reply.json())["requests"] if reply.status == 200 else reply.status

        assert [entry["request_id"] for entry in await listed("?limit=2")] == ["r2", "r1"]
        tenant = (await listed("?limit=1"))[0]["tenant"]
        assert tenant
        assert "key-a" not in tenant
        assert [entry["request_id"] for entry in await listed(f"?tenant={tenant}")] == ["r2", "r0"]
        wrong = ("0", "x", "1001", "%C2%B2", "9" * 5000)
        assert [await listed(f"?limit={limit}") for limit in wrong] == [400] * len(wrong)
        assert await listed("/nobody") == 404
        async with gate.http.get(f"{gate.url}/lltm/explain/r0") as reply:
            assert reply.status == 401


async def test_a_gateway_without_an_account_says_so(pair):
    async with gateway(pair[0].info) as gate, gate.http.get(f"{gate.url}/lltm/explain/x") as reply:
        assert reply.status == 400
        assert "keeps no account" in (await reply.json())["error"]["message"]
