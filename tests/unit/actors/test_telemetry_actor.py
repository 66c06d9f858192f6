"""The service is not thread-safe: all that touches it runs in the actor's own thread."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lltm_ray.actors import telemetry
from lltm_ray.config import TelemetryConfig
from lltm_ray.errors import ConfigError
from lltm_ray.telemetry.outbox import Outbox
from tests.unit.telemetry.rows_made import attempt_row, request_row


async def test_engines_are_placed_in_the_thread_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow(_: str) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(engines=())
        await asyncio.Event().wait()

    threads: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(telemetry, "watch_fleet", follow)

    def place(_: object) -> None:
        loop.call_soon_threadsafe(threads.put_nowait, threading.current_thread().name)

    actor = telemetry.TelemetryActor("f", TelemetryConfig(exporters=(), segment_dir=str(tmp_path)), {})
    monkeypatch.setattr(actor._service, "place", place)
    async with asyncio.timeout(60):
        name = await threads.get()
        await actor.close()
    assert name.startswith("telemetry")


async def test_a_sampler_that_cannot_be_used_reaches_whoever_waits_for_the_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "")  # put back what the actor changes
    environ = {"OTEL_TRACES_SAMPLER": "jaeger_remote"}
    actor = telemetry.TelemetryActor("f", TelemetryConfig(exporters=(), segment_dir=str(tmp_path)), environ)
    with pytest.raises(ConfigError, match="OTEL_TRACES_SAMPLER"):
        await actor.ready()
    await actor.close()


async def test_a_timeline_outlives_the_actor_and_is_read_beside_its_other_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TelemetryConfig(exporters=(), segment_dir=str(tmp_path))
    outbox = Outbox()
    outbox.add("attempts", attempt_row())
    outbox.add("requests", request_row())
    first = telemetry.TelemetryActor("f", config, {})
    await first.put("gateway-0", outbox.take(), {})
    told = await first.timeline("r-1")
    await first.close()
    second = telemetry.TelemetryActor("f", config, {})
    threads: list[str] = []
    recall = second._service.recall

    def noted(request_id: str, asked_s: float) -> object:
        threads.append(threading.current_thread().name)
        return recall(request_id, asked_s)

    monkeypatch.setattr(second._service, "recall", noted)
    assert told is not None
    assert await second.timeline("r-1") == told
    assert threads[0].startswith("recall")
    await second.close()


async def test_only_a_few_are_looked_for_on_disk_at_once_and_the_others_are_told_so_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = telemetry.TelemetryActor("f", TelemetryConfig(exporters=(), segment_dir=str(tmp_path)), {})
    go_on, asked = threading.Event(), time.monotonic()
    limits_s: list[float] = []

    def recall(_: str, asked_s: float) -> dict[str, object]:
        assert go_on.wait(100)
        limits_s.append(asked_s)
        return {"request": {}}

    monkeypatch.setattr(actor._service, "recall", recall)
    looked = [asyncio.create_task(actor.timeline(f"r-{number}")) for number in range(9)]
    async with asyncio.timeout(60):
        while sum(each.done() for each in looked) < 5:
            await asyncio.sleep(0.005)
        told, released = [each.result() for each in looked if each.done()], time.monotonic()
        go_on.set()
        found = await asyncio.gather(*looked)
        assert await actor.timeline("r-9") == {"request": {}}
    await actor.close()
    assert told == [None] * 5
    assert found.count(None) == 5
    assert all(asked <= each <= released for each in limits_s[:4]), "the limit counts from the call"
