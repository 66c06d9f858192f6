"""The notebook's widgets in a real browser: typed into, stopped, read by everybody, fed with what attacks a page."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lltm_ray.integrations.notebook._html import paragraph
from lltm_ray.integrations.notebook._source import Answer
from lltm_ray.integrations.notebook.chat_widget import ChatWidget
from lltm_ray.integrations.notebook.temperatures import Temperatures
from lltm_ray.integrations.notebook.token_view import Token, TokenView
from tests.browser import in_page as js
from tests.browser.cdp import Tab
from tests.browser.widget_host import Parrot, shown, speaking

pytestmark = pytest.mark.browser

HOSTILE = (
    '<script>window.owned = 1; alert(1)</script><img src=/x onerror="window.owned = 2; alert(2)">'
    "'\"><svg onload=alert(3)><a href=javascript:alert(4)>x</a></div></pre>&lt;b&gt;"
)
SAID = "[...document.querySelectorAll('.history .said')].map((e) => e.textContent)"
BUTTON = "[...document.querySelectorAll('button')].find((e) => e.textContent === '{}')"
IDLE = "document.querySelector('#cell').getAttribute('aria-busy') === 'false'"
NAMES = """
[...document.querySelectorAll("textarea, input, button, summary, [role]")].filter((e) => !(e.getAttribute("aria-label")
  || e.textContent.trim() || e.closest("label")?.textContent.trim() || e.role === "status")).map((e) => e.outerHTML)
"""


@pytest.fixture
async def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
async def widget(parrot: Parrot) -> AsyncIterator[ChatWidget]:
    async with speaking(parrot) as url:
        parrot.widget = ChatWidget(url, system="be brief", temperature=0.5)
        yield parrot.widget


def url_of(widget: ChatWidget) -> str:
    return widget._source.url


async def say(tab: Tab, text: str) -> None:
    await tab.eval("document.querySelector('.ask textarea').focus()")
    await tab.type(text)
    await tab.press("Enter")


async def test_a_question_is_answered_piece_by_piece_and_the_next_one_goes_on(
    tab: Tab, widget: ChatWidget, parrot: Parrot
) -> None:
    parrot.says, parrot.pause_s = ["one ", "two ", "three"], 0.15
    async with shown(tab, widget, url_of(widget)):
        await say(tab, "count")
        await tab.wait("document.querySelector('.scroll > .user .said').textContent === 'count'")
        await tab.wait("document.querySelector('.scroll > .assistant .said').textContent === 'one two '")
        assert await tab.eval(BUTTON.format("Send") + ".disabled")
        await tab.wait(IDLE)
        assert await tab.eval(SAID) == ["count", "one two three"]
        await tab.eval("document.querySelector('summary').click()")
        await tab.eval("document.querySelector('input[type=number]').value = '0'")
        await say(tab, "again")
        await tab.wait(f"{IDLE} && {SAID}.length === 4")
        assert await tab.eval("document.activeElement === document.querySelector('.ask textarea')")
    first, second = parrot.asked
    assert (first["temperature"], second["temperature"]) == (0.5, 0.0)
    messages = second["messages"]
    assert isinstance(messages, list)
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user"]
    assert tab.faults == []


async def test_stop_ends_the_answer_and_clear_forgets(tab: Tab, widget: ChatWidget, parrot: Parrot) -> None:
    parrot.says, parrot.pause_s = ["word "] * 1000, 0.02
    async with shown(tab, widget, url_of(widget)):
        await say(tab, "go")
        await tab.wait("document.querySelector('.scroll > .assistant .said').textContent.length > 20")
        await tab.eval(BUTTON.format("Stop") + ".click()")
        await tab.wait(f"{IDLE} && {SAID}.length === 2")
        assert "stopped" in await tab.text(".note")
        assert 20 < len((await tab.eval(SAID))[1]) < 2000
        await tab.eval(BUTTON.format("Clear") + ".click()")
        await tab.wait(f"{SAID}.length === 0")
    assert parrot.left == 1


async def test_what_people_and_models_say_is_never_run(tab: Tab, widget: ChatWidget, parrot: Parrot) -> None:
    parrot.says = [HOSTILE[place : place + 7] for place in range(0, len(HOSTILE), 7)]
    widget.set(system=HOSTILE)
    widget.on_change()
    async with shown(tab, widget, url_of(widget)):
        await say(tab, HOSTILE)
        await tab.wait(f"{IDLE} && {SAID}.length === 2")
        assert await tab.eval(SAID) == [HOSTILE, HOSTILE]
        parrot.says = []
        await say(tab, "and an error")
        await tab.wait("document.querySelector('.note.failed')")
        assert "onerror=alert(1)" in await tab.text(".note")
        assert await tab.eval("document.querySelector('.ask textarea').value") == "and an error"
        assert await tab.eval("document.querySelectorAll('#cell :is(script, img, svg, a)').length") == 0
    assert await tab.eval("window.owned") is None
    assert (tab.dialogs, tab.faults) == ([], [])
    assert not [each for each in tab.requested if each.endswith("/x")]


async def test_what_cells_show_is_never_run(tab: Tab, widget: ChatWidget) -> None:
    token = Token(id=1, piece=HOSTILE.encode(), probability=0.5, others=((HOSTILE, 0.1),))
    outputs = [
        paragraph(HOSTILE, HOSTILE),
        TokenView((token,))._repr_html_(),
        Temperatures(HOSTILE, ((0.0, Answer(text=HOSTILE, engine=HOSTILE)),))._repr_html_(),
    ]
    await tab.goto(url_of(widget))
    for output in outputs:
        await tab.eval(f"document.querySelector('#cell').innerHTML = {json.dumps(output)}")
        assert HOSTILE in await tab.text("#cell")
        assert await tab.eval("document.querySelectorAll('#cell :is(script, img, svg, a)').length") == 0
    assert await tab.eval("window.owned") is None
    assert (tab.dialogs, tab.faults) == ([], [])


@pytest.mark.parametrize("light", ["true", "false"])
async def test_everybody_can_read_and_reach_it(
    tab: Tab, widget: ChatWidget, parrot: Parrot, shots: Callable[[str], Path], light: str
) -> None:
    parrot.light = light
    await tab.prefer(prefers_color_scheme="light" if light == "false" else "dark")  # the notebook's own theme wins
    async with shown(tab, widget, url_of(widget)):
        await say(tab, "What is a slot?")
        await tab.wait(f"{IDLE} && {SAID}.length === 2")
        await tab.eval("document.querySelector('summary').click()")
        ground = await tab.eval("getComputedStyle(document.querySelector('.lltm-chat')).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if light == "true" else "rgb(20, 25, 30)")
        assert await tab.eval(NAMES) == []
        assert await tab.eval(js.CONTRAST) == []
        await tab.screenshot(shots(f"chat-{light}"), whole=False)
        await tab.resize(360, 700, is_phone=True)
        assert await tab.eval(js.OVERFLOW) <= 0
        await tab.screenshot(shots(f"chat-phone-{light}"), whole=False)


async def test_a_view_that_is_gone_listens_no_more(tab: Tab, widget: ChatWidget) -> None:
    async with shown(tab, widget, url_of(widget)):
        await tab.eval("leave()")
        assert await tab.eval("Object.values(heard).flat().length") == 0
