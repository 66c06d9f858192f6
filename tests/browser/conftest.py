"""A browser for the whole folder; for each test a made fleet, a gateway, and a tab."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.cdp import Tab, chromium, new_tab
from tests.browser.fleet_made import MadeFleet
from tests.browser.page_host import FleetHost, Host, serving


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def tab(browser: str) -> AsyncIterator[Tab]:
    async with new_tab(browser) as found:
        yield found


@pytest.fixture
def shots(tmp_path: Path) -> Callable[[str], Path]:
    """Where a screenshot goes: below `LLTM_RAY_SHOTS`, else with the test's own files."""
    folder = Path(os.environ.get("LLTM_RAY_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: folder / f"{name}.png"


@pytest.fixture
async def host() -> AsyncIterator[FleetHost]:
    fleet = MadeFleet()
    host = FleetHost(fleet)
    sampling = asyncio.create_task(fleet.keep_sampling())
    async with serving(host):
        yield host
    sampling.cancel()
    fleet.close()


@pytest.fixture
async def bare_host() -> AsyncIterator[Host]:
    """A fleet without telemetry."""
    host = Host(None)
    async with serving(host):
        yield host
