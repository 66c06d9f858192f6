"""What a notebook asks a model: streams, comparisons, tokens and chats, on a real server; and what it shows of them."""

import asyncio
import json
import re
import sys
import threading
import time
from html.parser import HTMLParser

import pytest
from gateway_harness import STREAM_HEAD, FakeEngine, engine_info, event, gateway, infos

from lltm_ray.errors import ConfigError, LltmRayError, UpstreamError
from lltm_ray.integrations.jupyter import (
    Answer,
    Chat,
    ChatWidget,
    Temperatures,
    Token,
    TokenView,
    compare_temperatures,
    stream_generate,
    view_answer,
    view_tokens,
)
from lltm_ray.integrations.notebook import streaming
from lltm_ray.integrations.notebook._html import paragraph
from lltm_ray.llamacpp.client import LlamaClient

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"' onmouseover=alert(3) &lt;"


@pytest.fixture
def here(server):
    return {"cluster": server.url, "api_key": server.api_key}


def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


class Elements(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.names, self.text, self.titles = set(), set(), "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_data(self, data):
        self.text += data


# --- streams


def test_without_a_notebook_a_stream_is_printed_with_its_figures(here, capsys):
    answer = stream_generate(**here, prompt="hello", max_tokens=12, temperature=0, seed=1)
    out = capsys.readouterr().out
    assert out == f"{answer}\n[{answer.figures}]\n"
    assert re.search(r"12 tokens, first after \d+ ms, \d+ tokens/s", out)
    assert (answer.tokens, answer.finish_reason) == (12, "length")
    with LlamaClient(here["cluster"], api_key=here["api_key"]) as client:
        chatted = client.chat([{"role": "user", "content": "hello"}], max_tokens=12, temperature=0, seed=1)
    assert str(answer) == chatted.text  # by the chat template, as any client


class Cell:
    """IPython's display, as a cell's output sees it."""

    def __init__(self):
        self.shown, self.updates = None, 0

    def __call__(self, bundle, *, raw, display_id):
        assert (raw, display_id) == (True, True)
        self.shown = bundle
        return self

    def update(self, bundle, *, raw):
        self.shown, self.updates = bundle, self.updates + 1


def test_in_a_cell_a_stream_is_escaped_and_does_not_flood_the_page():
    cell = Cell()
    shown = streaming.Displayed(cell)
    for piece in [HOSTILE, *"abc" * 500]:
        shown.add(piece)
    shown.end("3 tokens")
    found = Elements(cell.shown["text/html"])
    assert found.tags == {"div", "pre"}
    assert found.names == {"style"}
    assert found.text == HOSTILE + "abc" * 500 + "3 tokens"
    assert cell.updates < 10


def test_a_stream_that_fails_says_so_below_what_came(here, capsys):
    with pytest.raises(UpstreamError):
        stream_generate(**here, prompt="hello", max_tokens=4, grammar="root ::= (")
    assert "[broken off]" in capsys.readouterr().out
    with pytest.raises(UpstreamError, match="401"):
        stream_generate(here["cluster"], "hello")


# --- temperatures


def test_temperatures_run_at_once_and_stand_side_by_side(here):
    compared = compare_temperatures(**here, prompt=HOSTILE, temperatures=(0, 0, 1.5), max_tokens=10, seed=7)
    first, again, hot = (answer.text for _, answer in compared.answers)
    assert first == again != hot
    assert list(compared.frame()["temperature"]) == [0, 0, 1.5]
    assert compared.records()[2]["text"] == hot in repr(compared)
    found = Elements(Temperatures(HOSTILE, ((0.0, Answer(text=HOSTILE)),))._repr_html_())
    assert found.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td", "div", "pre"}
    assert found.names == {"style", "scope"}
    assert found.text.count(HOSTILE) == 2


def test_temperatures_overlap():
    both = asyncio.Barrier(2)

    async def answer(_request, writer):
        async with asyncio.timeout(60):  # one after the other would wait for ever
            await both.wait()
        choice = {"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}
        writer.write(STREAM_HEAD + event(json.dumps({"choices": [choice]}).encode()) + event(b"[DONE]") + b"0\r\n\r\n")

    async def ask():
        async with FakeEngine(answer) as engine, gateway(engine_info("e0", engine.url)) as gate:
            return await asyncio.to_thread(compare_temperatures, gate.url, "hello", (0, 1), max_tokens=4)

    assert [str(answer) for _, answer in asyncio.run(ask()).answers] == ["hi", "hi"]


def test_nothing_to_compare_is_an_error(here):
    with pytest.raises(ConfigError, match="temperatures"):
        compare_temperatures(**here, prompt="hi", temperatures=())


# --- tokens

TEXT = "h\u00e9llo \u20ac \U0001f642\n\tend \u202e"


def test_tokens_are_pieces_and_a_cut_character_is_named(here):
    view = view_tokens(**here, text=TEXT)
    assert view.text.removeprefix(" ") == TEXT  # this tokenizer puts one before a text
    with LlamaClient(here["cluster"], api_key=here["api_key"]) as client:
        assert [token.id for token in view.tokens] == list(client.tokenize(TEXT))
    cut = [token for token in view.tokens if token.whole == "\u20ac"]
    assert b"".join(token.piece for token in cut) == "\u20ac".encode()
    assert [token.text for token in cut] == [f"<{token.piece.hex(' ').upper()}>" for token in cut]
    assert all("part of '\u20ac'" in token.hint for token in cut)
    assert list(view.frame()["id"]) == [token.id for token in view.tokens]
    assert "\u202e" not in view._repr_html_()


def test_bytes_that_never_become_text_do_not_swallow_what_follows():
    alone = TokenView((Token(id=1, piece=b"\xff"), Token(id=2, piece=b"a")))
    assert [token.text for token in alone.tokens] == ["<FF>", "a"]
    assert alone.text == "\ufffda"
    assert "no UTF-8" in alone.tokens[0].hint


def test_hostile_tokens_are_text(here):
    view = view_tokens(**here, text=HOSTILE)
    assert len(view) > 10
    sly = Token(id=1, piece=HOSTILE.encode(), probability=0.5, others=((HOSTILE, 0.25),))
    for shown in (view, TokenView((sly,))):
        found = Elements(shown._repr_html_())
        assert found.tags == {"div", "bdi"}
        assert found.names == {"style", "title"}
        assert HOSTILE in found.text
    assert HOSTILE in found.titles[0].replace("\\'", "'")


def test_an_answers_tokens_have_their_probabilities(here):
    view = view_answer(**here, prompt="hello", max_tokens=8, top=2, temperature=0)
    assert len(view) == 8
    for token in view.tokens:
        assert 0 < token.probability <= 1
        assert len(token.others) == 2
        assert token.probability >= token.others[0][1] >= token.others[1][1]
        assert f"p {token.probability:.3f}" in token.hint
    with LlamaClient(here["cluster"], api_key=here["api_key"]) as client:
        assert view.text == client.chat([{"role": "user", "content": "hello"}], max_tokens=8, temperature=0).text
    hues = [int(each) for each in re.findall(r"background-color:hsla\((\d+),", view._repr_html_())]
    assert hues == [round(130 * token.probability) for token in view.tokens]


# --- chats


def test_a_chat_goes_on_and_trims_by_tokens(here):
    chat = Chat(**here, system="be brief", temperature=0, max_tokens=8)
    first = chat.ask("hello", 30)
    assert (first.tokens, chat.note) == (8, first.figures)
    chat.ask("and on", 30)
    assert [message["role"] for message in chat.history] == ["user", "assistant"] * 2
    with LlamaClient(here["cluster"], api_key=here["api_key"]) as client:
        whole = [{"role": "system", "content": "be brief"}, *chat.history[:3]]
        assert chat.history[3]["content"] == client.chat(whole, temperature=0, max_tokens=8).text
        last = [whole[0], {"role": "user", "content": "last"}]
        need = len(client.tokenize(client.apply_template(last), add_special=True))
    short = Chat(**here, system="be brief", temperature=0, max_tokens=8, limit_tokens=need + 8)
    short.history = list(chat.history)
    assert short._request("last") == last
    assert short._source.count_tokens(short._source.client(), last) == need
    assert len(short.history) == 4
    short.set(max_tokens=9)
    with pytest.raises(ConfigError, match=f"take {need} tokens"):
        short.ask("last", 30)
    assert (short.failed, short.is_busy, len(short.history)) == (True, False, 4)


async def test_stopping_frees_the_slot_at_once_and_keeps_what_came(pair):
    async with gateway(*infos(pair)) as gate:
        chat = Chat(gate.url, max_tokens=7000, temperature=0)
        began = time.monotonic()
        chat.send("hello")
        assert time.monotonic() - began < 5  # the answer takes longer
        await asyncio.to_thread(until, lambda: len(chat.draft) > 20)
        with pytest.raises(ConfigError, match="under way"):
            chat.send("me too")
        chat.stop()
        chat.stop()
        answer = await asyncio.to_thread(chat.wait, 60)
        assert (answer.finish_reason, answer.figures.endswith("stopped")) == (None, True)
        assert answer.tokens > 0 < answer.ttft_s
        assert chat.history == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer.text}]
        await asyncio.to_thread(until, lambda: not sum(gate.claims().values()))
        chat.stop()
        chat.set(max_tokens=4)
        assert (await asyncio.to_thread(chat.ask, "go on", 30)).tokens == 4
        chat.clear()
    assert chat.history == []


def test_news_come_twenty_times_a_second_at_most_and_the_last_is_not_lost(here):
    class Watched(Chat):
        drafts, changes = (), ()

        def on_draft(self):
            self.drafts += ((time.monotonic(), self.draft, threading.current_thread().name),)

        def on_change(self):
            self.changes += ((self.is_busy, len(self.history)),)

    chat = Watched(**here, max_tokens=300, temperature=0)
    began = time.monotonic()
    answer = chat.ask("hello", 60)
    took = time.monotonic() - began
    assert 1 <= len(chat.drafts) <= 20 * took + 2
    assert all(answer.text.startswith(draft) for _, draft, _ in chat.drafts)
    assert {name for *_, name in chat.drafts} == {"lltm-ray-notebook"}
    assert chat.changes == ((True, 0), (False, 2))


def test_a_question_that_fails_leaves_no_trace(here):
    chat = Chat("http://127.0.0.1:9")
    with pytest.raises(LltmRayError):
        chat.ask("hello", 30)
    assert (chat.history, chat.failed, chat.is_busy) == ([], True, False)
    assert "127.0.0.1:9" in chat.note
    with pytest.raises(ConfigError, match="empty"):
        chat.send("  ")
    with pytest.raises(ConfigError, match="nothing was asked"):
        Chat(**here).wait()


@pytest.mark.parametrize(
    "wrong", [{"temperature": "hot"}, {"temperature": -1}, {"max_tokens": 0}, {"max_tokens": 1e999}]
)
def test_a_setting_out_of_its_range_changes_nothing(here, wrong):
    chat = Chat(**here)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        chat.set(system="new", **wrong)
    assert (chat.system, chat.temperature, chat.max_tokens) == ("", 0.7, 512)


# --- the widget, as its page drives it


def told_by_the_page(widget, **content):
    widget.view._handle_custom_msg(content, [])


def test_the_widget_shows_what_the_chat_does(here):
    widget = ChatWidget(**here, temperature=0, max_tokens=40)
    drafts = []
    widget.view.observe(lambda change: drafts.append(change.new), "draft")
    states = []
    widget.view.observe(lambda change: states.append(change.new), "state")
    told_by_the_page(
        widget, kind="send", text="hello", settings={"system": "be brief", "temperature": "0", "max_tokens": "24"}
    )
    answer = widget.wait(60)
    assert "hello" in [state["asked"] for state in states if state["busy"]]
    until(lambda: not widget.view.state["busy"])
    assert answer.tokens == 24
    assert widget.view.state["history"] == widget.history
    assert widget.view.state["settings"] == {"system": "be brief", "temperature": 0.0, "max_tokens": 24}
    assert widget.view.state["note"] == answer.figures
    assert drafts[-1] == ""
    assert all(answer.text.startswith(draft) for draft in drafts)
    told_by_the_page(widget, kind="clear")
    assert widget.view.state["history"] == []


def test_what_is_wrong_with_a_message_of_the_page_is_shown_there(here):
    widget = ChatWidget(**here)
    told_by_the_page(widget, kind="send", text="hi", settings={"temperature": ""})
    assert widget.view.state["failed"]
    assert "temperature" in widget.view.state["note"]
    for odd in ({"kind": "send"}, {"kind": "quit"}, {}):
        told_by_the_page(widget, **odd)
    assert not widget.is_busy


def test_a_saved_notebook_has_the_widgets_text_and_nothing_that_runs(here):
    widget = ChatWidget(**here)
    widget.history = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    data, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    found = Elements(data["text/html"])
    assert (found.tags, found.names) == ({"div", "pre"}, {"style"})
    assert found.text.count(HOSTILE) == 2
    assert data["text/plain"] == widget.transcript() == f"user: {HOSTILE}\n\nassistant: {HOSTILE}"


def test_without_anywidget_the_widget_says_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(LltmRayError, match="jupyter"):
        ChatWidget(**here)


# --- whom to ask


class Fleet:
    """A cluster as far as these calls know it."""

    def __init__(self, endpoint, cluster=None):
        self.endpoint = endpoint
        if cluster is not None:
            self.cluster, self.served_name = cluster, "tiny"


def test_a_cluster_an_engine_and_a_url_are_the_same_fleet(here):
    ids = [
        [token.id for token in view_tokens(given, "hello", api_key=here["api_key"]).tokens]
        for given in (here["cluster"], Fleet(here["cluster"]), Fleet(None, Fleet(here["cluster"])))
    ]
    assert ids[0] == ids[1] == ids[2] != []
    with pytest.raises(ConfigError, match="gateway"):
        view_tokens(Fleet(None), "hello")


def test_what_cannot_be_seen_is_written_out():
    assert "\u2400\u241b" in paragraph("\x00\x1b")
    assert "\\u202e" in paragraph("\u202e")
