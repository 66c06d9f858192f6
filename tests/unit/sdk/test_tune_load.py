"""What tuning sends, and how it looks at it: shared beginnings, and answers that never come."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from lltm_ray.load.conversations import ConversationPrompts, Shape
from lltm_ray.load.prompts import PromptMaker
from lltm_ray.load.result import LoadPlan
from lltm_ray.load.window import Look, run_window

SHAPE = Shape(shared_tokens=20, question_tokens=10, grown_tokens=15, turns=3, sessions=4)


def test_a_conversation_grows_from_its_last_prompt_and_all_begin_alike():
    prompts = ConversationPrompts.sized(PromptMaker(SHAPE.longest_tokens, seed=3), SHAPE)
    texts = [prompts.make(number) for number in range(48)]
    beginning = " ".join(texts[0].split()[:20])
    assert all(text.startswith(beginning) for text in texts)
    assert {len(text.split()) for text in texts} == {30, 45, 60}
    grown = sum(texts[number].startswith(texts[number - 4]) for number in range(4, 48))
    assert grown == 44 * 2 // 3 + 1, "two of three turns go on with the last one of their session"
    assert len(set(texts)) == 48
    assert ConversationPrompts.sized(PromptMaker(60, seed=4), SHAPE).make(0) != texts[0]


@asynccontextmanager
async def server(answer):
    """Counts a word as a token; every third stream waits for `answer`, the others bring two tokens at once."""

    async def models(_request):
        return web.json_response({"data": [{"id": "m"}]})

    async def chat(request):
        bodies.append(body := await request.json())
        usage = {"prompt_tokens": len(body["messages"][0]["content"].split()), "completion_tokens": 2}
        if not body["stream"]:
            return web.json_response(
                {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": usage}
            )
        if len(bodies) % 3 == 0:
            await answer()
        await asyncio.sleep(0.01)
        delta = 'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
        return web.Response(text=2 * delta + "data: [DONE]\n\n", content_type="text/event-stream")

    bodies = []
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    async with TestServer(app) as listening:
        yield f"http://127.0.0.1:{listening.port}", bodies


async def never():
    await asyncio.sleep(60)


async def at_once():
    await asyncio.sleep(0)


async def test_requests_without_an_answer_count_with_the_time_they_waited():
    look = Look(window_s=1.0, warmup_s=0.2, grace_s=0.3)
    for _ in range(6):  # a machine that stands still makes all of them wait
        async with server(never) as (url, _):
            plan = LoadPlan(url=url, rate=30, max_tokens=2)
            seen = await run_window(plan, SHAPE, look, stop=asyncio.Event())
        waits = sorted(seen.waits_s)
        if len(waits) > 10 and waits[len(waits) // 3] < waits[-1] / 2 and waits[-1] <= 3:
            break
    else:
        raise AssertionError(f"most are answered at once: {waits}")
    assert waits[-1] >= 0.3
    assert sum(wait >= 0.3 for wait in waits) >= len(waits) // 5, "leaving them out would make a hung server look fast"


async def test_tokens_count_when_they_come_and_enough_ends_the_window():
    async with server(at_once) as (url, bodies):
        plan = LoadPlan(url=url, concurrency=2, max_tokens=2)
        seen = await run_window(plan, SHAPE, Look(window_s=30, enough=20), stop=asyncio.Event())
    assert 20 <= seen.ended < 40
    assert seen.seconds < 25
    assert seen.tokens_per_s == pytest.approx(2 * seen.requests_per_s, rel=0.3)
    assert bodies[-1]["max_tokens"] == 2
    assert not seen.errors


async def test_a_stop_ends_it_at_once():
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, stop.set)
    async with server(at_once) as (url, _):
        seen = await run_window(LoadPlan(url=url, concurrency=2), SHAPE, Look(window_s=30), stop=stop)
    assert seen.stopped
    assert seen.seconds < 25
