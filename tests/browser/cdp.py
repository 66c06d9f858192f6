"""Chromium, driven over its own DevTools protocol: all that the page's tests need, and nothing to install for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"),
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--force-color-profile=srgb", "--remote-debugging-port=0"),
)
_START_S = 60.0
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowDown": 40, "ArrowUp": 38, "Home": 36, "End": 35, " ": 32}


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """A browser of its own profile; yields the address of its DevTools."""
    command = ["chromium", *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as it:
        try:
            yield _address(folder / "DevToolsActivePort", it)
        finally:
            it.terminate()
            try:
                it.wait(20)
            except subprocess.TimeoutExpired:
                it.kill()


def _address(told: Path, browser: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and browser.poll() is None:
        lines = told.read_text().split() if told.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise RuntimeError(f"chromium did not start (exit code {browser.poll()})")


class Tab:
    """One page in a profile that nothing else shares; remembers what went wrong and what was asked for."""

    def __init__(self, link: aiohttp.ClientWebSocketResponse) -> None:
        self._link = link
        self._session = ""
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())
        self.faults: list[str] = []
        """Console errors and warnings, uncaught exceptions, resources that failed, refusals of the CSP."""
        self.requested: list[str] = []
        self.dialogs: list[str] = []

    async def open(self) -> None:
        """A tab in a fresh profile."""
        context = await self.ask("Target.createBrowserContext", disposeOnDetach=True)
        target = await self.ask("Target.createTarget", url="about:blank", browserContextId=context["browserContextId"])
        attached = await self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.ask(f"{domain}.enable")

    async def close(self) -> None:
        """Let go."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, its result."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        told = {"id": number, "method": method, "params": params}
        await self._link.send_json(told | ({"sessionId": self._session} if self._session else {}))
        async with asyncio.timeout(60):
            reply = await answer
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        result: dict[str, Any] = reply["result"]
        return result

    async def goto(self, url: str) -> None:
        """Go there; returns when the document is loaded."""
        await self.ask("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def eval(self, script: str) -> Any:
        """A value of the page."""
        given = await self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in given:
            raise RuntimeError(f"{script}: {given['exceptionDetails']['exception'].get('description')}")
        return given["result"].get("value")

    async def wait(self, condition: str, timeout_s: float = 20.0) -> None:
        """Until an expression is truthy."""
        deadline = time.monotonic() + timeout_s
        while not await self.eval(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}; {self.faults}"
            await asyncio.sleep(0.03)

    async def text(self, selector: str) -> str:
        """What an element says."""
        return str(await self.eval(f"document.querySelector({json.dumps(selector)}).textContent"))

    async def press(self, key: str) -> None:
        """A key, down and up."""
        base = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.ask("Input.dispatchKeyEvent", type="keyDown", **base, **text)
        await self.ask("Input.dispatchKeyEvent", type="keyUp", **base)

    async def type(self, text: str) -> None:
        """Text into what has the focus."""
        await self.ask("Input.insertText", text=text)

    async def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        """The viewport, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        await self.ask("Emulation.setDeviceMetricsOverride", **size)

    async def prefer(self, **media: str) -> None:
        """Media features, such as `prefers-color-scheme`, with underscores."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        await self.ask("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the whole page, or of what the viewport shows."""
        given = await self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(given["data"]))

    async def _read(self) -> None:
        async for message in self._link:
            told = json.loads(message.data)
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
            else:
                self._note(told["method"], told["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.faults.append(str([each.get("value", each.get("description")) for each in params["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.faults.append(str(params["exceptionDetails"].get("exception", params)))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.faults.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])


@contextlib.asynccontextmanager
async def new_tab(address: str) -> AsyncIterator[Tab]:
    """A tab of a running browser; it goes with the connection."""
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as link:
        tab = Tab(link)
        try:
            await tab.open()
            yield tab
        finally:
            await tab.close()
