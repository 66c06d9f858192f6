"""A widget's page in a tab, tied to its widget as a notebook ties them, and a model that says anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from lltm_ray.integrations.notebook.chat_widget import ChatWidget
from tests.browser.cdp import Tab

_PAGE = """<!doctype html><meta charset="utf-8"><title>notebook</title><link rel="icon" href="data:,">
<style>%s</style><body data-jp-theme-light="%s"><div id="cell"></div>"""
_TIE = """
(async () => {
  const { default: widget } = await import("/chat.js");
  const heard = {}, values = %s;
  window.sent = [];
  window.told = (name, value) => { values[name] = value; (heard[`change:${name}`] ?? []).forEach((tell) => tell()); };
  const model = {
    get: (name) => values[name],
    on: (name, tell) => (heard[name] ??= []).push(tell),
    off: (name, tell) => (heard[name] = heard[name].filter((each) => each !== tell)),
    send: (content) => sent.push(content),
  };
  window.leave = widget.render({ model, el: document.querySelector("#cell") });
  window.heard = heard;
})()
"""


class Parrot:
    """Speaks as llama-server does, and says what it is told to."""

    def __init__(self) -> None:
        self.says = ["hello"]
        self.pause_s = 0.0
        self.asked: list[dict[str, object]] = []
        self.left = 0
        self.light = "true"
        self.widget: ChatWidget | None = None

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if not self.says:
            error = {"code": 500, "message": "<img src=x onerror=alert(1)> is away", "type": "server_error"}
            return web.json_response({"error": error}, status=500)
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        try:
            for piece in self.says:
                await answer.write(_event({"delta": {"content": piece}, "index": 0, "finish_reason": None}))
                await asyncio.sleep(self.pause_s)
            await answer.write(_event({"delta": {}, "index": 0, "finish_reason": "stop"}) + b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.left += 1
            raise
        return answer

    async def page(self, _: web.Request) -> web.Response:
        assert self.widget is not None
        return web.Response(text=_PAGE % (self.widget.view._css, self.light), content_type="text/html")

    async def script(self, _: web.Request) -> web.Response:
        assert self.widget is not None
        return web.Response(text=self.widget.view._esm, content_type="text/javascript")


def _event(choice: dict[str, object]) -> bytes:
    return b"data: " + json.dumps({"choices": [choice], "id": "x", "model": "parrot"}).encode() + b"\n\n"


async def _props(_: web.Request) -> web.Response:
    return web.json_response({"default_generation_settings": {"n_ctx": 4096}})


async def _template(request: web.Request) -> web.Response:
    return web.json_response({"prompt": str(await request.json())})


async def _tokens(request: web.Request) -> web.Response:
    words = str((await request.json())["content"]).split()
    return web.json_response({"tokens": [{"id": place, "piece": word} for place, word in enumerate(words)]})


@asynccontextmanager
async def speaking(parrot: Parrot) -> AsyncIterator[str]:
    """Its URL while the block runs."""
    app = web.Application()
    app.add_routes(
        [
            *(web.get("/props", _props), web.post("/apply-template", _template), web.post("/tokenize", _tokens)),
            web.post("/v1/chat/completions", parrot.chat),
            *(web.get("/", parrot.page), web.get("/chat.js", parrot.script)),
        ]
    )
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def shown(tab: Tab, widget: ChatWidget, url: str) -> AsyncIterator[None]:
    """The widget on the page; what either tells reaches the other while the block runs."""
    news: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    widget.view.observe(lambda change: loop.call_soon_threadsafe(news.put_nowait, change.name), ["state", "draft"])
    await tab.goto(url)
    await tab.eval(_TIE % json.dumps({name: getattr(widget.view, name) for name in ("state", "draft")}))

    async def to_page() -> None:
        while True:
            name = await news.get()
            await tab.eval(f"told({json.dumps(name)}, {json.dumps(getattr(widget.view, name))})")

    async def to_widget() -> None:
        while True:
            for content in await tab.eval("sent.splice(0)"):
                await asyncio.to_thread(widget.view._handle_custom_msg, content, [])
            await asyncio.sleep(0.02)

    running = [asyncio.create_task(to_page()), asyncio.create_task(to_widget())]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
