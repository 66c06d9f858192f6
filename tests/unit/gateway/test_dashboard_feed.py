"""One look a second for all who watch, and none while nobody does."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import aclosing
from typing import Any

import pytest

from lltm_ray.gateway.dashboard import feed
from lltm_ray.gateway.dashboard.feed import Feed, TelemetryUnavailableError


class Counting:
    """Numbers its looks."""

    def __init__(self) -> None:
        self.asked = 0
        self.trouble: Exception | None = None

    async def look(self) -> dict[str, Any]:
        self.asked += 1
        if self.trouble is not None:
            raise self.trouble
        return {"number": self.asked}

    async def timeline(self, request_id: str) -> dict[str, Any] | None:
        return None

    async def metrics(self, *, is_open: bool) -> bytes:
        return b""


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(feed, "EVERY_S", 0.02)
    return Counting()


def told(event: bytes) -> tuple[str, Any]:
    kind, data = event.decode().strip().split("\n")
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_all_who_watch_get_the_same_looks(source: Counting) -> None:
    shared = Feed(source)
    async with aclosing(shared.watch()) as one, aclosing(shared.watch()) as other:
        firsts = await asyncio.gather(anext(one), anext(other))
    assert [told(each) for each in firsts] == [("look", {"number": 1})] * 2


async def test_nobody_is_asked_while_nobody_watches_and_an_old_look_is_not_shown_again(source: Counting) -> None:
    shared = Feed(source)
    async with aclosing(shared.watch()) as events:
        await anext(events)
    await asyncio.sleep(0.1)
    asked = source.asked
    await asyncio.sleep(0.1)
    assert source.asked == asked
    async with aclosing(shared.watch()) as events:
        assert told(await anext(events)) == ("look", {"number": asked + 1})


async def test_telemetry_that_is_away_is_told_and_comes_back(source: Counting) -> None:
    source.trouble = TelemetryUnavailableError("it is gone")
    async with aclosing(Feed(source).watch()) as events:
        assert told(await anext(events)) == ("away", "it is gone")
        source.trouble = None
        assert told(await anext(events))[0] == "look"


async def test_a_look_that_is_no_json_does_not_end_the_stream(
    source: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless() -> dict[str, Any]:
        return {"wait_s": math.inf}

    monkeypatch.setattr(source, "look", endless)
    async with aclosing(Feed(source).watch()) as events:
        assert told(await anext(events))[0] == "away"


async def test_a_stream_ends_when_it_is_closed_and_another_can_begin(source: Counting) -> None:
    shared = Feed(source)
    async with aclosing(shared.watch()) as events:
        await anext(events)
        shared.close()
        async with asyncio.timeout(30):
            assert [each async for each in events] == []
    async with aclosing(shared.watch()) as events:
        assert told(await anext(events))[0] == "look"
