"""The service is not thread-safe: all that touches it runs in the actor's own thread."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lltm_ray.actors import telemetry
from lltm_ray.config import TelemetryConfig


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
    async with asyncio.timeout(10):
        name = await threads.get()
        await actor.close()
    assert name.startswith("telemetry")
