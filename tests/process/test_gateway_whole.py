"""Whole answers that the gateway joins from a stream, before real llama.cpp servers."""

import asyncio
import io
import json

import pytest
from gateway_harness import CHAT, VOLATILE, FakeEngine, engine_info, gateway, infos, real_engine, until, whole

BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hello"},
    "/completion": {"prompt": "hello", "n_predict": 8},
}
GRAMMAR = {"grammar": 'root ::= "a" "é" "€" "b"'}
SAME = [
    {},
    {"max_tokens": 1, "n_predict": 1},
    {"stop": [":"]},
    {"stop": ["3:zz"], "n_predict": 3, "max_tokens": 3},
    {"stop": ["M [qq"]},
    {"n_probs": 2, "logprobs": 2, "return_tokens": True},
    {"timings_per_token": True},
    {"verbose": True},
    {"return_progress": True},
    {"response_format": {"type": "json_object"}, "max_tokens": 8},
    {"grammar": 'root ::= ""'},
    {"grammar": "bad"},
    {"n": 2},
    GRAMMAR | {"n_predict": 30, "max_tokens": 30},
    GRAMMAR | {"n_predict": 4, "max_tokens": 4},
]


def settled(value):  # keys in their order, so that it counts too
    if isinstance(value, dict):
        return [(key, settled(item)) for key, item in value.items() if key not in VOLATILE]
    return [settled(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("extra", SAME)
async def test_an_answer_joined_from_a_stream_is_the_one_the_server_sends_whole(pair, path, extra):
    extra = extra | ({"logprobs": True} if "chat" in path and "logprobs" in extra else {})
    body = BODIES[path] | {"max_tokens": 4, "n_predict": 4, "seed": 1, "temperature": 0} | extra
    async with gateway(*infos(pair)) as gate:
        async with gate.http.post(f"{pair[0].info.url}{path}", json=body, headers=pair[0].headers) as reply:
            direct = reply.status, reply.headers["content-type"], settled(await reply.json())
        async with gate.http.post(f"{gate.url}{path}", json=body) as reply:
            assert (reply.status, reply.headers["content-type"], settled(await reply.json())) == direct
            assert int(reply.headers["content-length"])
        assert gate.app.records[-1].ttft_s <= gate.app.records[-1].total_s


WHOLE_LONG = CHAT | {"max_tokens": 7000, "ignore_eos": True}


async def test_a_client_that_leaves_a_whole_answer_frees_its_slot_at_once(pair):
    async with gateway(pair[0].info) as gate:
        leaver = asyncio.create_task(gate.http.post(f"{gate.url}/v1/chat/completions", json=WHOLE_LONG))
        await gate.until_decoding(pair[0], leaver)
        leaver.cancel()
        await gate.until_free(pair[0])
        assert await gate.was_cut_off(pair[0])
        await gate.idle()
        assert gate.app.records[-1].error == "client gone"


async def test_a_deadline_of_a_whole_answer_is_a_504_and_frees_its_slot_at_once(pair):
    async with gateway(pair[0].info, request_timeout_s=0.3) as gate:
        async with gate.http.post(f"{gate.url}/v1/chat/completions", json=WHOLE_LONG) as reply:
            assert reply.status == 504
        await gate.until_free(pair[0])
        assert await gate.was_cut_off(pair[0])


async def test_a_whole_answer_whose_engine_is_killed_comes_whole_from_another(pair, tiny, tmp_path):
    body = CHAT | {"max_tokens": 1500, "ignore_eos": True}
    with real_engine("doomed", tiny, tmp_path) as doomed:
        async with gateway(doomed.info) as gate:
            asked = asyncio.create_task(gate.http.post(f"{gate.url}/v1/chat/completions", json=body))
            await gate.until_decoding(doomed, asked)
            gate.router.update([doomed.info, pair[0].info])
            doomed.process.kill()
            async with await asked as reply:
                assert (reply.status, reply.headers["x-lltm-engine"]) == (200, "e0")
                text = (await reply.json())["choices"]
            assert gate.app.records[-1].attempts == 2
        async with gateway(pair[0].info) as gate:
            url = f"{pair[0].info.url}/v1/chat/completions"
            async with gate.http.post(url, json=body, headers=pair[0].headers) as reply:
                assert (await reply.json())["choices"] == text


async def test_a_target_over_8_kib_is_a_414_that_no_engine_sees(pair):
    async with gateway(*infos(pair)) as gate:
        async with gate.http.post(f"{gate.url}/completion?{'x' * 8200}", json=BODIES["/completion"]) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (414, 414)
        assert gate.app.records[-1].attempts == 0


async def test_a_body_over_a_mebibyte_is_understood_as_well(pair):
    async with gateway(*infos(pair)) as gate:
        body = json.dumps(BODIES["/completion"] | {"unused": "x" * (2**20 + 1)}).encode()
        async with gate.http.post(f"{gate.url}/completion", data=io.BytesIO(body)) as reply:
            assert (reply.status, (await reply.json())["tokens_predicted"]) == (200, 8)


async def test_a_slot_that_nobody_knows_is_not_kept_by_the_requests_of_other_gateways():
    looks = 0

    async def busy_for_others(request, writer):
        nonlocal looks
        if request.startswith(b"GET /slots"):
            looks += 1
            slots = [{"id": 0, "id_task": 7 if looks < 3 else 7 + looks, "is_processing": True}]
            writer.write(whole(json.dumps(slots).encode()))

    async with FakeEngine(busy_for_others) as engine, gateway(engine_info("e", engine.url)) as gate:
        leaver = asyncio.create_task(gate.http.post(f"{gate.url}/v1/messages", data=b"{}"))
        await until(lambda: engine.requests, leaver)
        leaver.cancel()
        await asyncio.wait([leaver])
        assert gate.claims() == {"e": 1}
        await gate.idle()
        assert looks == 3
