"""Conversations whose answers tell no times, as Anthropic's messages, go where their caches are, too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_harness import Gateway, gateway, infos

SYSTEM = "You are a heron at dusk and answer in few words. " * 8


async def ask(gate: Gateway, messages: list[dict[str, str]], *, stream: bool) -> tuple[str, dict[str, str]]:
    body = {"model": "tiny", "system": SYSTEM, "messages": messages, "max_tokens": 8, "stream": stream}
    async with gate.http.post(f"{gate.url}/v1/messages", json=body) as reply:
        text = await reply.text()
        assert reply.status == 200, text
        return (_streamed(text) if stream else json.loads(text)["content"][0]["text"]), dict(reply.headers)


def _streamed(text: str) -> str:
    events: list[dict[str, Any]] = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(each["delta"].get("text", "") for each in events if each["type"] == "content_block_delta")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_conversation_by_messages_stays_where_its_cache_is(pair, stream) -> None:
    async with gateway(*infos(pair)) as gate:
        mine: list[dict[str, str]] = [{"role": "user", "content": f"one, {stream}"}]
        reply, headers = await ask(gate, mine, stream=stream)
        home = headers["x-lltm-engine"]
        assert headers["x-lltm-cached"].startswith("0/")
        for turn in range(3):
            other = [
                {"role": "user", "content": f"{turn} {stream} " * 60}
            ]  # the least loaded engine is another one then
            async with gate.http.post(
                f"{gate.url}/v1/chat/completions", json={"messages": other, "max_tokens": 1}
            ) as by:
                assert by.status == 200
            mine += [{"role": "assistant", "content": reply}, {"role": "user", "content": f"turn {turn}"}]
            reply, headers = await ask(gate, mine, stream=stream)
            cached, _, tokens = headers["x-lltm-cached"].partition("/")
            assert headers["x-lltm-engine"] == home
            assert int(cached) > 0.8 * int(tokens)
