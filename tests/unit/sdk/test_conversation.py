"""Conversations and caches of vectors over an engine that is told what to answer."""

import json

import numpy as np
import pytest

from lltm_ray.errors import ConfigError, UpstreamError
from lltm_ray.knowledge.search import VectorIndex
from lltm_ray.records import Embeddings, StreamEvent
from lltm_ray.sdk.conversation import Conversation
from lltm_ray.sdk.embeddings import EmbeddingEngine, SemanticSearch
from lltm_ray.sdk.result import InferResult, InferStream


class Echo:
    """Answers with the number of messages it got; one token a character, four more for each message."""

    served_name, slot_tokens = "echo", 2000

    def __init__(self):
        self.asked, self.error, self.texts = [], None, []

    def count_tokens(self, messages):
        return sum(len(message["content"]) + 4 for message in messages)

    def infer(self, messages, **params):
        self.asked.append(messages)
        return InferResult(received=f"{len(messages)} heard", latency_ms=1, error=self.error)

    def infer_stream(self, messages, callback=None, **params):
        self.asked.append(messages)
        return InferStream((StreamEvent(text=text) for text in ("one ", "two")), callback, lambda _: None)

    def embed(self, texts):
        self.texts.append(texts)
        return Embeddings(vectors=tuple((float(len(text)), 1.0) for text in texts))


def test_a_conversation_goes_on():
    engine = Echo()
    chat = Conversation(engine, system="be brief")
    assert chat.ask("first").text == "2 heard"
    assert chat.ask("second").text == "4 heard"
    assert [message["role"] for message in engine.asked[-1]] == ["system", "user", "assistant", "user"]
    assert chat.tokens == engine.count_tokens([{"role": "system", "content": "be brief"}, *chat.messages])
    chat.clear()
    assert chat.ask("third").text == "2 heard"


def test_a_request_that_fails_leaves_no_trace():
    engine = Echo()
    chat = Conversation(engine)
    engine.error = UpstreamError(400, b"no")
    assert not chat.ask("first").success
    assert chat.messages == []


@pytest.mark.parametrize(
    ("text", "params", "field"),
    [("", {}, "text"), (" ", {}, "text"), (5, {}, "text"), ("hi", {"max_tokens": "5"}, "max_tokens")],
)
def test_what_says_nothing_is_refused_and_leaves_no_trace(text, params, field):
    engine = Echo()
    chat = Conversation(engine)
    for ask in (chat.ask, chat.ask_stream):
        with pytest.raises(ConfigError, match=f"^{field}="):
            ask(text, **params)
    assert (chat.messages, engine.asked) == ([], [])


def test_a_stream_is_kept_when_it_was_read_and_as_far_as_it_was_read():
    chat = Conversation(Echo())
    assert chat.ask_stream("whole").result.text == "one two"
    stream = chat.ask_stream("part")
    next(stream)
    assert len(chat.messages) == 2
    stream.close()
    assert [message["content"] for message in chat.messages] == ["whole", "one two", "part", "one "]


def test_the_oldest_turns_are_left_out_by_tokens_not_by_number():
    engine = Echo()
    chat = Conversation(engine, system="s" * 10, limit_tokens=100)
    for text in ("a" * 30, "b" * 5, "c" * 5, "d" * 5):
        chat.ask(text, max_tokens=20)
        request = engine.asked[-1]
        assert engine.count_tokens(request) <= 80
        assert (request[0]["role"], request[1]["role"], request[-1]["content"]) == ("system", "user", text)
    last = [message["content"] for message in engine.asked[-1]]
    assert "a" * 30 not in last
    assert "c" * 5 in last
    assert len(chat.messages) == 8


def test_as_many_turns_as_fit_are_sent():
    engine = Echo()
    chat = Conversation(engine, limit_tokens=120)
    for number in range(20):
        chat.ask(f"{number:5}", max_tokens=16)
        turns = [place for place, message in enumerate(chat.messages) if message["role"] == "user"]
        sent = engine.asked[-1]
        first = len(chat.messages) - 1 - len(sent)
        earlier = [start for start in turns if start < first]
        if earlier:
            assert engine.count_tokens(chat.messages[earlier[-1] : -1]) > 104


def test_a_message_that_cannot_fit_is_refused_with_a_remedy():
    chat = Conversation(Echo(), limit_tokens=50)
    with pytest.raises(ConfigError, match=r"max_tokens.*raise limit_tokens"):
        chat.ask("x" * 60, max_tokens=10)
    with pytest.raises(ConfigError, match="max_tokens"):
        chat.ask("x", max_tokens=60)
    assert chat.messages == []


def test_without_a_known_limit_nothing_is_counted_or_left_out():
    engine = Echo()
    engine.slot_tokens, engine.count_tokens = 0, None
    chat = Conversation(engine)
    chat.ask("x" * 5000)
    chat.ask("y" * 5000)
    assert len(engine.asked[-1]) == 3


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    chat = Conversation(Echo(), system="\ud800")
    with pytest.raises(UnicodeEncodeError):
        chat.save(tmp_path / "chat.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        Conversation(Echo()).save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_conversation_comes_back_from_its_file(tmp_path):
    chat = Conversation(Echo(), system="naïve")
    chat.ask("größer")
    path = tmp_path / "chat.json"
    chat.save(path)
    assert path.stat().st_mode & 0o77 == 0
    again = Conversation.load(path, Echo(), limit_tokens=90)
    assert (again.system, again.messages) == (chat.system, chat.messages)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"system": "", "messages": {}}',
        '{"system": "", "messages": ["user"]}',
        '{"system": "", "messages": [{"role": "root", "content": "x"}]}',
        '{"system": "", "messages": [{"role": ["user"], "content": "x"}]}',
        '{"system": "", "messages": [{"role": "user", "content": 3}]}',
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="no saved conversation"):
        Conversation.load(path, Echo())
    with pytest.raises(ConfigError, match="no saved conversation"):
        Conversation.load(tmp_path / "absent.json", Echo())


def test_each_text_is_embedded_once_in_batches():
    engine = Echo()
    vectors = EmbeddingEngine(engine)
    block = vectors.embed(["a", "bb", "a", "ccc"])
    assert block.tolist() == [[1, 1], [2, 1], [1, 1], [3, 1]]
    assert engine.texts == [["a", "bb", "ccc"]]
    assert vectors.embed("bb").tolist() == [2, 1]
    assert vectors.get_cache_stats() == {"entries": 3, "bytes": 24, "hits": 1, "misses": 4}
    vectors.embed([str(number) for number in range(1000, 1150)])
    assert [len(batch) for batch in engine.texts[1:]] == [64, 64, 22]
    assert vectors.embed([]).shape == (0, 0)


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    engine = Echo()
    vectors = EmbeddingEngine(engine, cache_bytes=16)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        vectors.embed(text)
    assert [batch[0] for batch in engine.texts] == ["a", "bb", "ccc", "bb"]
    assert vectors.get_cache_stats()["bytes"] == 16
    vectors.clear_cache()
    assert vectors.get_cache_stats()["bytes"] == 0
    none = EmbeddingEngine(engine, cache_bytes=0)
    assert none.embed(["x", "x"]).shape == (2, 2)


def test_vectors_of_another_model_are_not_taken_from_the_cache():
    engine = Echo()
    vectors = EmbeddingEngine(engine)
    vectors.embed("a")
    engine.served_name = "other"
    vectors.embed("a")
    assert len(engine.texts) == 2
    with pytest.raises(ConfigError, match="other"):
        SemanticSearch(vectors, VectorIndex("echo"))


def test_empty_texts_are_refused_by_place():
    with pytest.raises(ConfigError, match=r"texts.*\[1\]"):
        EmbeddingEngine(Echo()).embed(["a", " "])


def test_documents_are_found():
    search = SemanticSearch(EmbeddingEngine(Echo()))
    search.add_documents(["a", "bb" * 20])
    assert [hit.text for hit in search.search("b" * 39, 1)] == ["bb" * 20]
    assert json.dumps(search.index.texts)
    assert np.isclose(search.search("a", 1)[0].score, 1)
    with pytest.raises(ConfigError, match="must be a list"):
        search.add_documents("one text")
    search.add_documents([])
    assert len(search.index) == 2
