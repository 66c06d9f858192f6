"""The gateway before two real llama.cpp servers."""

import asyncio
import json
import re

import aiohttp
import openai
import pytest
from gateway_harness import CHAT, MODEL, SLOTS, VOLATILE, gateway, infos, raw, real_engine, until

from lltm_ray.errors import ConfigError
from lltm_ray.records import EngineState

LONG = CHAT | {"max_tokens": 7000, "stream": True}


def steady(value):  # without what differs from one run to the next
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in VOLATILE}
    return [steady(item) for item in value] if isinstance(value, list) else value


BODIES = {
    "/v1/chat/completions": CHAT,
    "/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hello", "max_tokens": 8, "temperature": 0},
    "/completions": {"prompt": "hello", "max_tokens": 8, "temperature": 0},
    "/completion": {"prompt": "hello", "n_predict": 8, "temperature": 0},
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "hello", "max_output_tokens": 8, "temperature": 0},
    "/v1/messages/count_tokens": CHAT,
    "/tokenize": {"content": "hello"},
    "/detokenize": {"tokens": [300, 301]},
    "/apply-template": CHAT,
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/v1/embeddings": {"input": "hello"},
    "/rerank": {"query": "a", "documents": ["b"]},
}


@pytest.mark.parametrize("path", BODIES)
async def test_an_answer_is_the_servers_own_with_the_engines_name(pair, path):
    async with gateway(*infos(pair)) as gate:
        async with gate.http.post(f"{pair[0].info.url}{path}", json=BODIES[path], headers=pair[0].headers) as reply:
            direct = reply.status, reply.headers["content-type"], steady(await reply.json())
        async with gate.http.post(f"{gate.url}{path}", json=BODIES[path], headers={"x-request-id": "r1"}) as reply:
            assert (reply.status, reply.headers["content-type"], steady(await reply.json())) == direct
            assert reply.headers["x-lltm-engine"] in ("e0", "e1")
            assert reply.headers["x-request-id"] == "r1"
            assert "keep-alive" not in reply.headers


def events_of(text: bytes) -> list:
    blocks = [block for block in text.split(b"\n\n") if block]
    data = [re.search(rb"^data: (.*)$", block, re.MULTILINE)[1] for block in blocks]
    return [item if item == b"[DONE]" else steady(json.loads(item)) for item in data]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion", "/v1/messages", "/v1/responses"])
async def test_a_stream_has_the_servers_own_events(pair, path):
    body = BODIES[path] | {"stream": True}
    async with gateway(*infos(pair)) as gate:
        async with gate.http.post(f"{pair[0].info.url}{path}", json=body, headers=pair[0].headers) as reply:
            direct = events_of(await reply.read())
        async with gate.http.post(f"{gate.url}{path}", json=body) as reply:
            assert reply.headers["content-type"] == "text/event-stream"
            assert len(events_of(await reply.read())) == len(direct)
        async with gate.http.post(f"{gate.url}{path}?engine=e0", json=body) as reply:
            shapes = [sorted(item) if isinstance(item, dict) else item for item in events_of(await reply.read())]
        assert shapes == [sorted(item) if isinstance(item, dict) else item for item in direct]
        record = gate.app.records[-1]
    assert record.usage is not None
    assert record.usage.output_tokens == 8
    assert record.usage.input_tokens > 0
    assert record.ttft_s is not None
    assert 0 < record.ttft_s <= record.total_s


async def test_events_arrive_one_by_one_not_at_the_end(pair):
    async with gateway(*infos(pair)) as gate, gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG) as reply:
        first = await reply.content.readuntil(b"\n\n")
        assert first.startswith(b"data: ")
        assert gate.app.running == 1


async def test_the_openai_client_works(pair):
    async with gateway(*infos(pair), keys=("sk-test",)) as gate:
        async with openai.AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="sk-test", max_retries=0) as client:
            chat = await client.chat.completions.create(**CHAT)
            assert chat.usage.completion_tokens == 8
            stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage.completion_tokens == 8
            text = await client.completions.create(model=MODEL, prompt="a", max_tokens=3)
            assert text.choices[0].finish_reason == "length"
            assert [model.id async for model in client.models.list()] == [MODEL]
            with pytest.raises(openai.NotFoundError, match="this fleet serves tiny"):
                await client.chat.completions.create(**CHAT | {"model": "gpt-9"})
        async with openai.AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="sk-wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="Invalid API Key"):
                await client.chat.completions.create(**CHAT)


async def test_sixty_four_clients_share_four_slots_and_all_are_served(pair):
    async with gateway(*infos(pair)) as gate:

        async def ask(number: int) -> tuple[int, str]:
            body = CHAT | {"stream": number % 2 == 0}
            async with gate.http.post(f"{gate.url}/v1/chat/completions", json=body) as reply:
                await reply.read()
                return reply.status, reply.headers["x-lltm-engine"]

        answers = await asyncio.gather(*(ask(number) for number in range(64)))
        assert {status for status, _ in answers} == {200}
        assert {engine for _, engine in answers} == {"e0", "e1"}
        assert all(record.attempts == 1 and not record.error for record in gate.app.records)


async def test_a_full_queue_is_refused_with_retry_after_and_the_openai_shape(pair):
    async with gateway(*infos(pair), queue_limit=0) as gate:
        replies = [await gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG) for _ in range(2 * SLOTS)]
        async with gate.http.post(f"{gate.url}/v1/chat/completions", json=CHAT) as reply:
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert (await reply.json())["error"]["code"] == 429
        async with gate.http.post(f"{gate.url}/tokenize", json={"content": "a"}) as reply:
            assert reply.status == 200, "a cheap route needs no slot"
        for reply in replies:
            reply.close()


async def test_a_client_that_leaves_frees_exactly_its_own_slot(pair):
    async with gateway(pair[0].info) as gate:
        stays = await gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG)
        leaves = await gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG)
        assert gate.claims() == {"e0": 2}
        leaves.close()
        await gate.until_free(pair[0], busy=1)
        assert await gate.was_cut_off(pair[0])
        assert gate.claims() == {"e0": 1}
        assert gate.app.records[-1].error == "client gone"
        assert (await stays.content.readuntil(b"\n\n")).startswith(b"data: ")
        stays.close()
        await gate.until_free(pair[0])


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue(pair):
    async with gateway(pair[0].info) as gate:
        running = [await gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG) for _ in range(SLOTS)]
        leaver = asyncio.create_task(gate.http.post(f"{gate.url}/v1/chat/completions", json=CHAT))
        await until(gate.waiting, leaver)
        leaver.cancel()
        await until(lambda: not gate.waiting())
        assert gate.claims() == {"e0": SLOTS}, "and not with a slot"
        for reply in running:
            reply.close()


async def test_a_killed_engine_loses_no_request_that_was_not_yet_answered(pair, tiny, tmp_path):
    with real_engine("doomed", tiny, tmp_path) as doomed:
        async with gateway(pair[0].info, doomed.info) as gate:

            async def ask() -> int:
                async with gate.http.post(f"{gate.url}/v1/chat/completions", json=CHAT | {"max_tokens": 300}) as reply:
                    await reply.read()
                    return reply.status

            tasks = [asyncio.create_task(ask()) for _ in range(24)]
            await until(lambda: gate.claims()["doomed"] == SLOTS)
            doomed.process.kill()
            assert await asyncio.gather(*tasks) == [200] * 24
            assert max(record.attempts for record in gate.app.records) > 1, "nothing was on the killed engine"


async def test_a_stream_whose_engine_is_killed_breaks_visibly_and_logs_one_line(pair, tiny, tmp_path, caplog):
    with real_engine("doomed", tiny, tmp_path) as doomed:
        async with gateway(doomed.info) as gate:
            reply = await gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG)
            await reply.content.readuntil(b"\n\n")
            doomed.process.kill()
            with pytest.raises(aiohttp.ClientPayloadError):
                await reply.content.read()
            reply.close()
            await gate.idle()
            assert gate.app.records[-1].error
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(("uvicorn.error", "lltm_ray")) and record.levelname in ("WARNING", "ERROR")
    ]
    assert "answer broken off: closed before the end" in line
    assert not any(record.exc_info for record in caplog.records)


async def test_models_are_listed_once_with_both_shapes_and_counts(pair):
    starting = pair[0].info.with_(name="e2", model="other", state=EngineState.STARTING, url="")
    async with gateway(*infos(pair), starting) as gate, gate.http.get(f"{gate.url}/v1/models") as reply:
        listed = await reply.json()
    assert [entry["id"] for entry in listed["data"]] == [MODEL, "other"]
    assert [entry["model"] for entry in listed["models"]] == [MODEL, "other"]
    assert [entry["engines"] for entry in listed["data"]] == [{"ready": 2, "total": 2}, {"ready": 0, "total": 1}]
    assert listed["data"][0]["meta"]["n_ctx_train"] == 8192


async def test_openais_client_retrieves_a_model_by_a_name_with_slashes(pair):
    named = [each.info.with_(model="owner/model-GGUF:q4") for each in pair]
    async with gateway(*named) as gate, openai.AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="x") as client:
        found, listed = await client.models.retrieve("owner/model-GGUF:q4"), (await client.models.list()).data
        assert [found] == listed
        assert found.meta["n_ctx_train"] == 8192
        async with gate.http.get(f"{gate.url}/v1/models/owner/model-GGUF:q4") as reply:
            assert (await reply.json())["id"] == found.id
        with pytest.raises(openai.NotFoundError, match="this fleet serves owner/model-GGUF:q4"):
            await client.models.retrieve("owner/model")


async def test_props_slots_and_metrics_speak_for_every_engine(pair):
    async with gateway(*infos(pair)) as gate:
        async with gate.http.get(f"{gate.url}/props") as reply:
            props = await reply.json()
        assert props["total_slots"] == SLOTS
        assert [(own["name"], own["total_slots"]) for own in props["engines"]] == [("e0", SLOTS), ("e1", SLOTS)]
        async with gate.http.get(f"{gate.url}/slots") as reply:
            slots = await reply.json()
        assert [(slot["engine"], slot["id"]) for slot in slots] == [("e0", 0), ("e0", 1), ("e1", 0), ("e1", 1)]
        async with gate.http.get(f"{gate.url}/slots?engine=e1") as reply:
            assert {slot["engine"] for slot in await reply.json()} == {"e1"}
        async with gate.http.get(f"{gate.url}/metrics") as reply:
            text = await reply.text()
        assert text.count("# TYPE llamacpp:tokens_predicted_total counter") == 1
        assert len(re.findall(r'^llamacpp:tokens_predicted_total\{engine="e[01]"\} \d+$', text, re.MULTILINE)) == 2


async def test_slot_actions_need_an_engine_and_adapters_go_to_all(pair):
    async with gateway(*infos(pair)) as gate:
        async with gate.http.post(f"{gate.url}/slots/0?action=erase") as reply:
            assert reply.status == 400
            assert "?engine=" in (await reply.json())["error"]["message"]
        async with gate.http.post(f"{gate.url}/slots/0?action=erase&engine=e1") as reply:
            assert (reply.status, (await reply.json())["id_slot"]) == (200, 0)
            assert reply.headers["x-lltm-engine"] == "e1"
        async with gate.http.post(f"{gate.url}/lora-adapters", json=[]) as reply:
            assert await reply.json() == {"success": True}
        async with gate.http.post(f"{gate.url}/lora-adapters", json={"not": "a list"}) as reply:
            assert reply.status == 400
        async with gate.http.get(f"{gate.url}/lora-adapters") as reply:
            assert await reply.json() == []


async def test_a_request_can_be_pinned_to_an_engine(pair):
    async with gateway(*infos(pair)) as gate:
        for _ in range(3):
            async with gate.http.post(f"{gate.url}/v1/chat/completions?engine=e1", json=CHAT) as reply:
                assert reply.headers["x-lltm-engine"] == "e1"
            async with gate.http.post(
                f"{gate.url}/tokenize", json={"content": "a"}, headers={"x-lltm-engine": "e0"}
            ) as reply:
                assert reply.headers["x-lltm-engine"] == "e0"
        async with gate.http.post(f"{gate.url}/v1/chat/completions?engine=e9", json=CHAT) as reply:
            assert reply.status == 400
            assert "known are e0, e1" in (await reply.json())["error"]["message"]


async def test_status_shows_the_fleet_without_keys(pair):
    async with gateway(*infos(pair)) as gate, gate.http.get(f"{gate.url}/lltm/status") as reply:
        text = await reply.text()
    assert [engine["name"] for engine in json.loads(text)["engines"]] == ["e0", "e1"]
    assert "engine-key" not in text


@pytest.mark.parametrize(("method", "path"), [("GET", "/nope"), ("GET", "/completion"), ("PUT", "/v1/models")])
async def test_unknown_routes_and_wrong_methods_get_llama_servers_404(pair, method, path):
    async with gateway(*infos(pair)) as gate:
        async with gate.http.request(method, f"{pair[0].info.url}{path}", headers=pair[0].headers) as reply:
            direct = reply.status, await reply.json()
        async with gate.http.request(method, f"{gate.url}{path}") as reply:
            assert (reply.status, await reply.json()) == direct


async def test_keys_guard_everything_but_health(pair):
    async with gateway(*infos(pair), keys=("one", "two")) as gate:
        for path in ("/health", "/v1/health"):
            async with gate.http.get(f"{gate.url}{path}") as reply:
                assert (reply.status, await reply.json()) == (200, {"status": "ok"})
        for path in ("/v1/models", "/props", "/metrics", "/lltm/status", "/nope"):
            async with gate.http.get(f"{gate.url}{path}") as reply:
                assert reply.status == 401
        for headers in ({"authorization": "Bearer two"}, {"x-api-key": "one"}):
            async with gate.http.post(f"{gate.url}/v1/chat/completions", json=CHAT, headers=headers) as reply:
                assert reply.status == 200


async def test_cors_preflight_and_head_are_answered_as_llama_server_does(pair):
    async with gateway(*infos(pair), keys=("one",)) as gate:
        async with gate.http.options(f"{gate.url}/v1/chat/completions", headers={"origin": "http://x"}) as reply:
            assert reply.status == 200
            assert reply.headers["access-control-allow-origin"] == "http://x"
            assert "POST" in reply.headers["access-control-allow-methods"]
        async with gate.http.head(f"{gate.url}/health") as reply:
            assert (reply.status, reply.headers["content-length"]) == (200, "15")
        async with gate.http.get(f"{gate.url}/health") as reply:
            assert reply.status == 200, "the connection is still good after HEAD"


async def test_bodies_and_heads_over_the_limits_are_refused(pair):
    async with gateway(*infos(pair), max_body_bytes=1000, max_header_bytes=2000) as gate:
        async with gate.http.post(f"{gate.url}/completion", data=b"x" * 200_000) as reply:
            assert reply.status == 413
        head = b"POST /completion HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n"
        assert (await raw(gate, head)).startswith(b"HTTP/1.1 413")

        async def endless():
            for _ in range(50):
                yield b"x" * 1000

        async with gate.http.post(f"{gate.url}/completion", data=endless()) as reply:
            assert reply.status == 413
        async with gate.http.get(f"{gate.url}/health", headers={"x-pad": "y" * 3000}) as reply:
            assert reply.status == 431
        flood = b"GET /health HTTP/1.1\r\nx-pad: " + b"y" * 2_000_000
        assert (await raw(gate, flood))[:12] in (b"HTTP/1.1 431", b""), "a head that never ends is cut off"


async def test_malformed_json_is_a_400_and_the_connection_goes_on(pair):
    async with gateway(*infos(pair)) as gate:
        for body in (b"{bad", b"", b"[" * 100_000):
            async with gate.http.post(f"{gate.url}/v1/chat/completions", data=body) as reply:
                assert reply.status == 400
                assert (await reply.json())["error"]["type"] == "invalid_request_error"


async def test_a_deadline_breaks_a_stream_and_frees_the_slot(pair):
    for limit_s in (0.3, 2.0, 10.0):  # where the machine stands still, the first byte may come later
        async with gateway(pair[0].info, request_timeout_s=limit_s) as gate:
            reply = await gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG)
            if reply.status == 200:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await reply.content.read()
            reply.close()
            await gate.until_free(pair[0])
            if reply.status == 200:
                assert await gate.was_cut_off(pair[0])
                return
    raise AssertionError("no stream began")


async def test_draining_refuses_new_requests_and_lets_running_ones_end(pair):
    async with gateway(*infos(pair)) as gate:
        running = await gate.http.post(f"{gate.url}/v1/chat/completions", json=LONG | {"max_tokens": 1500})
        draining = asyncio.create_task(gate.app.drain(100))
        await asyncio.sleep(0)
        for path in ("/v1/chat/completions", "/tokenize"):
            async with gate.http.post(f"{gate.url}{path}", json=CHAT) as reply:
                assert reply.status == 503
        async with gate.http.get(f"{gate.url}/health") as reply:
            assert reply.status == 503
        assert (await running.content.read()).endswith(b"data: [DONE]\n\n")
        running.close()
        assert await draining


async def test_a_fleet_without_a_ready_engine_is_unhealthy(pair):
    async with gateway(pair[0].info.with_(state=EngineState.STARTING), queue_timeout_s=0.05) as gate:
        async with gate.http.get(f"{gate.url}/health") as reply:
            assert (reply.status, (await reply.json())["error"]["message"]) == (503, "Loading model")
        async with gate.http.post(f"{gate.url}/v1/chat/completions", json=CHAT) as reply:
            assert reply.status == 503


async def test_a_taken_port_is_a_config_error_and_a_freed_one_can_be_had_at_once(pair):
    async with gateway(*infos(pair)) as gate:
        port = gate.port
        with pytest.raises(ConfigError, match="is taken"):
            async with gateway(*infos(pair), port=port):
                pass
        async with gate.http.post(f"{gate.url}/v1/chat/completions", json=CHAT) as reply:
            assert reply.status == 200
    async with gateway(*infos(pair), port=port) as again:
        assert again.port == port
