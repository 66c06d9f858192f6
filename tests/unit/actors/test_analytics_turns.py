"""Questions to the analytics actor: one at a time, one in waiting, and hints beside them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from lltm_ray.actors.analytics import AnalyticsActor
from lltm_ray.config import AnalyticsConfig
from lltm_ray.errors import FleetError


@pytest.fixture(autouse=True)
def nice(monkeypatch):
    """The actor is; this process, which has the other tests to run, stays as it is."""
    given: list[int] = []
    monkeypatch.setattr("lltm_ray.actors.analytics.os.nice", given.append)
    yield
    assert given == [19]


class _Service:
    """One whose reports take until they are let go."""

    def __init__(self) -> None:
        self.may_end, self.began = threading.Event(), 0

    def report(self, window_s: float | None, until_unix_s: float | None) -> str:
        self.began += 1
        assert self.may_end.wait(100)
        return f"of {window_s} s until {until_unix_s}"

    def status(self) -> dict[str, object]:
        return {"rows": 0}


class _Actor(AnalyticsActor):
    """Without Ray: there is nothing to read."""

    def __init__(self, service: Any) -> None:
        super().__init__("fleet", AnalyticsConfig())
        self._service = service

    async def _catch_up(self) -> None:
        await asyncio.sleep(0)


async def test_one_question_is_answered_one_waits_and_a_third_is_told_so() -> None:
    service = _Service()
    actor = _Actor(service)
    asked = [asyncio.create_task(actor.report(each)) for each in (1.0, 2.0)]
    async with asyncio.timeout(60):
        while not service.began:
            await asyncio.sleep(0.01)
    with pytest.raises(FleetError, match="busy"):
        await actor.report(3.0)
    assert service.began == 1, "the second waits its turn"
    assert await asyncio.wait_for(actor.status(), 60) == {"rows": 0}, "rows and hints have a thread of their own"
    service.may_end.set()
    assert await asyncio.gather(*asked) == ["of 1.0 s until None", "of 2.0 s until None"]
    assert await actor.report(4.0) == "of 4.0 s until None"
